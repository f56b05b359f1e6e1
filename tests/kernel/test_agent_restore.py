"""Restarts of a network with a real agent: VMs that are deployed at that moment, and VMs that are gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until
from kernel.isolated_network import (
    BRIDGE,
    DB,
    DB_IP,
    DB_MAC,
    DB_NIC,
    DEPLOY,
    FILE,
    WEB,
    WEB_IP,
    WEB_MAC,
    get,
    lease,
    live_with_vm,
    lookup,
)

WEB_UUID = "6b7c2a10-0000-4000-8000-000000005101"
VMS = 6


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        lease(it, WEB)
        yield it


def nics(host: AgentHost) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(host.path(FILE).read_text())["networks"]["204"]["nics"]
    return found


def listed(nic: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A VM in the list of a restore."""
    items = [{"dir": "metadata", "file": "instance-id", "content": f"i-{nic['mac']}"}]
    return {**{key: nic[key] for key in ("nic_uuid", "mac", "ip", "hostname")}, "default_nic": True, "device_id": "0",
            "vm_data": items, **more}  # fmt: skip


def restore(host: AgentHost, vms: list[Any]) -> None:
    services = {"dhcp_enabled": True, "dns_enabled": True, "userdata_enabled": True}
    done(host.call("110", "restore-network", restore_data={**services, "vms": vms}))


WEB_VM = {"nic_uuid": WEB_UUID, "mac": WEB_MAC, "ip": WEB_IP, "hostname": "web-1"}
DB_VM = {key: DB_NIC[key] for key in ("nic_uuid", "mac", "ip", "hostname")}


def test_vms_that_are_deployed_in_parallel_with_restarts_keep_everything(host: AgentHost) -> None:
    """CloudStack makes the list before the NICs of some VMs exist, and sends it while these VMs are deployed.

    VM n has sent n of its commands when the first list arrives, and two more restarts run at the same time. VM 0 is
    deployed after the list, VM 5 before it is sent.
    """
    vms = [
        {
            "nic_id": f"70{number}",
            "nic_uuid": f"6b7c2a10-0000-4000-8000-000000007{number}",
            "ip": f"10.10.1.{number}",
            "mac": f"02:01:00:cc:07:{number:02x}",
            "hostname": f"vm-{number}",
        }
        for number in range(100, 100 + VMS)
    ]
    reserved: list[dict[str, Any]] = []  # CloudStack reserves a NIC before it sends the NIC's first command
    listing, arriving = Event(), [Event() for _ in vms]
    restoring = Event()

    def deploy(number: int) -> None:
        assert listing.wait(60)
        nic = vms[number]
        reserved.append(nic)
        with host.client() as client:
            for at, (fixture, command) in enumerate(DEPLOY):
                if at == number:
                    arriving[number].set()
                    assert restoring.wait(60)
                more: dict[str, Any] = {}
                if command == "save-vm-data":
                    more["vm_data"] = [
                        *listed(nic)["vm_data"],
                        {"dir": "password", "file": "vm_password", "content": "x"},
                    ]
                done(client.call(fixture, command, **nic, **more))

    def restart() -> None:
        done(host.call("137", "implement-network"))
        vms_of_list = [listed(it) for it in (WEB_VM, *reserved)]
        if not listing.is_set():
            listing.set()
            for it in arriving:
                assert it.wait(60)
            restoring.set()
        restore(host, vms_of_list)

    with ThreadPoolExecutor(VMS + 3) as workers:
        works = [workers.submit(deploy, number) for number in range(VMS)]
        works.append(workers.submit(restart))
        assert listing.wait(60)
        works += [workers.submit(restart) for _ in range(2)]
        for it in works:
            it.result()
    known = {nic["nic_uuid"]: nic for nic in nics(host).values()}
    for vm in vms:
        nic = known[vm["nic_uuid"]]
        assert [nic[key] for key in ("mac", "ip", "hostname", "leased", "named")] == [
            *(vm[key] for key in ("mac", "ip", "hostname")), True, True,
        ]  # fmt: skip
        assert (nic["metadata"]["instance-id"], nic["password"]) == (f"i-{vm['mac']}", "x")
        wait_until(lambda: lookup(host, WEB, vm["hostname"]) == vm["ip"])  # noqa: B023
    host.plug("vm", BRIDGE, vms[0]["mac"])
    assert lease(host, "vm")["ip"] == vms[0]["ip"]
    assert get(host, "vm", "/latest/meta-data/instance-id") == f"i-{vms[0]['mac']}"


@pytest.mark.parametrize("same", ["hostname", "ip", "mac"])
def test_a_vm_that_was_expunged_while_the_host_was_down_keeps_nothing(host: AgentHost, same: str) -> None:
    """Its name, address or MAC address belongs to a new VM, before and after the restart. A bad VM is in the list."""
    for fixture, command in DEPLOY:
        done(host.call(fixture, command, **DB_NIC))
    host.plug(DB, BRIDGE, DB_MAC)
    assert lease(host, DB)["ip"] == DB_IP
    host.kill()
    host.start()
    new = {"nic_id": "5199", "nic_uuid": "6b7c2a10-0000-4000-8000-000000005199", "ip": "10.10.1.99",
           "mac": "02:01:00:cc:00:99", "hostname": "new", same: DB_NIC[same]}  # fmt: skip
    for fixture, command in DEPLOY:
        more = {"vm_data": listed(new)["vm_data"]} if command == "save-vm-data" else {}
        done(host.call(fixture, command, **new, **more))
    vm = DB if same == "mac" else "new"
    if vm == DB:
        host.ip("-n", DB, "addr", "flush", "dev", "eth0")
    else:
        host.plug(vm, BRIDGE, new["mac"])
    assert lease(host, vm)["ip"] == new["ip"]
    assert get(host, vm, "/latest/meta-data/instance-id") == f"i-{new['mac']}"
    wait_until(lambda: lookup(host, WEB, new["hostname"]) == new["ip"])
    for bad in ({}, {"hostname": "not_a name"}, {"vm_data": "nonsense"}):
        done(host.call("137", "implement-network"))
        restore(host, [{"mac": "nonsense", "ip": "10.10.1.77"}, None, listed(WEB_VM, **bad), listed(new)])
        assert lease(host, WEB)["ip"] == WEB_IP
        assert lease(host, vm)["ip"] == new["ip"]
    done(host.call("137", "implement-network"))
    restore(host, [listed(WEB_VM), listed(new)])
    done(host.call("137", "implement-network"))
    restore(host, [listed(WEB_VM), listed(new)])
    assert set(nics(host)) == {WEB_UUID, new["nic_uuid"]}
    text = host.path(FILE).read_text()
    assert DB_NIC["nic_uuid"] not in text
    if same != "hostname":
        wait_until(lambda: lookup(host, WEB, DB_NIC["hostname"]) == "")
    wait_until(lambda: lookup(host, WEB, new["hostname"]) == new["ip"])
    if same != "mac":
        client = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "1", "-T", "1", "-s", "/run/udhcpc"]
        assert "ip=" not in host.run(*client, namespace=DB, check=False)
