"""Calls that only remove or look install nothing: a host without the program holds nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, Sent
from bed.lab import Host, difference
from bed.machines import until
from netloom.commands.table import TABLE
from ssh.deploy_lab import (
    LIBEXEC,
    ONE,
    SETTLE_S,
    THREE,
    TWO,
    Server,
    builds,
    current,
    host_objects,
    running_agents,
    succeeded,
)
from ssh.onefile import OneFiles

NETWORK = {
    "network_id": "204",
    "zone_id": "1",
    "vlan": "",
    "guest_type": "isolated",
    "gateway": "10.10.1.1",
    "cidr": "10.10.1.0/24",
    "extension_ip": "10.10.1.1",
    "network_state": "implemented",
    "public_ip": "203.0.113.21",
    "public_vlan": "vlan://101",
    "public_gateway": "203.0.113.1",
    "public_cidr": "203.0.113.0/24",
    "public_port": "80",
    "private_ip": "10.10.1.45",
    "private_port": "80",
    "protocol": "tcp",
    "nic_id": "7",
    "mac": "02:01:00:00:00:45",
    "ip": "10.10.1.45",
    "hostname": "web-1",
}
VPC = {"vpc_id": "7", "zone_id": "1", "vpc_state": "inactive", "vpc_cidr": "10.20.0.0/16"}
SHUT_DOWN = {
    **NETWORK,
    "network_state": "shutdown",
    "fw_rules": {"default_egress_allow": True, "cidr": "10.10.1.0/24", "rules": []},
    "lb_rules": [],
}

REMOVALS = sorted(name for name, row in TABLE.items() if row.kind == "removes")
# CloudStack sends these during a shutdown, too. They create nothing then.
OF_A_SHUTDOWN = ("apply-fw-rules", "apply-lb-rules", "assign-ip")


def payload_of(command: str) -> dict[str, Any]:
    if command in OF_A_SHUTDOWN:
        return SHUT_DOWN
    return VPC if command.endswith("-vpc") else NETWORK


def send(server: Server, command: str, *, stored: str = "", **fields: Any) -> Sent:
    """One execution, with this stored host."""
    payload = {**payload_of(command), **fields}
    scope = f"cs-vpc-{payload['vpc_id']}" if "vpc_id" in payload else f"cs-net-{payload['network_id']}"
    details = {"host": stored, "namespace": scope} if stored else {}
    return server.cloud.execute(command, details, payload)


def ensure(server: Server, fields: dict[str, Any]) -> Sent:
    return server.cloud.execute("ensure-network-device", {}, {**fields, "current_details": "{}"})


@pytest.mark.mutation("a-removal-installs-nothing")
@pytest.mark.mutation("placing-for-a-removal-installs-nothing", instead="True")
def test_removals_leave_a_host_without_the_program_as_it_is(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one, user="netadmin")
    before = host_objects(host)
    for fields in ({**NETWORK, "network_state": "allocated"}, SHUT_DOWN, VPC):
        assert json.loads(ensure(server, fields).output)["host"] == host.address
    for number, command in enumerate([*REMOVALS, *OF_A_SHUTDOWN]):
        sent = send(server, command, stored=host.address if number % 2 else "")
        assert (sent.execution.status, sent.output) == (0, ""), command
    for stored in ("", host.address):
        told = server.cloud.execute_text("custom-action", custom_action(server, stored)).execution
        assert (told.status, told.output) == (
            3,
            f"{host.address}: custom-action: net-204 is not on this host, and netloom is not installed there "
            "(is the network implemented?)\n",
        )
    assert difference(before, host_objects(host)) == {}
    assert succeeded(server.ask())  # a call that builds installs the program
    assert running_agents(host) == [ONE]


def custom_action(server: Server, stored: str) -> str:
    details = {"host": stored, "namespace": "cs-net-204"} if stored else {}
    flat = {"network_id": "204", "action": "check", "action-params": {}}
    both = {"physical-network-extension-details": server.cloud.registration, "network-extension-details": details}
    return json.dumps({**both, **flat})


@pytest.mark.mutation("what-is-left-on-a-host-is-told")
def test_a_network_without_the_program_is_named_and_stays(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one)
    bed.add_segments([("eth1", "1204")])
    net = server.cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=101)
    net.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:00:00:45")
    host.run(f"{LIBEXEC}/current/netloom", "agent", "uninstall", "--networks", "leave")
    for command in ("destroy-network", "release-ip"):
        for stored in (host.address, ""):
            told = send(server, command, stored=stored).execution
            assert (told.status, told.output) == (
                3,
                f"{host.address}: net-204 is still on this host (/var/lib/netloom/scopes/net-204.json, "
                "/run/netns/cs-net-204), and netloom is not installed there "
                f"(netloom agent install --hosts {host.address}, and repeat the command)\n",
            )
    assert send(server, "destroy-network", network_id="205").ok  # another network is not there
    assert current(host) == ""
    assert succeeded(server.ask())
    net.delete()
    assert host.sh("ip netns") == ""


def test_a_removal_uses_the_agent_that_is_there(bed: Bed, host: Host, files: OneFiles, one: Path) -> None:
    """It starts one that does not run, and does not upgrade an older one."""
    host.run(str(one), "agent", "install")
    host.sh("pkill -f '[a]gent serve'")
    server = Server(bed, files.make(TWO))
    assert send(server, "destroy-network", stored=host.address).ok
    assert send(server, "release-ip").ok
    assert running_agents(host) == [ONE]
    assert builds(host) == [ONE, "current"]


@pytest.mark.mutation("an-uninstall-is-not-undone")
def test_removals_during_an_uninstall_do_not_undo_it(bed: Bed, host: Host, files: OneFiles) -> None:
    slow = "original_remove_unit = _remove_unit\ndef _remove_unit():\n    import time\n    time.sleep(2)\n"
    program = files.make(THREE, changes={"netloom/agent/setup/uninstall.py": f"{slow}    original_remove_unit()\n"})
    host.sh("rm -rf /root/.cache")
    before = host_objects(host)
    server = Server(bed, program)
    host.run(str(program), "agent", "install")
    ended: list[Sent] = []
    removed = threading.Event()

    def keep_removing() -> None:
        while not removed.is_set():
            ended.append(send(server, "destroy-network", stored=host.address))

    callers = [threading.Thread(target=keep_removing) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        assert until(lambda: ended, seconds=SETTLE_S)
        host.run(f"{LIBEXEC}/current/netloom", "agent", "uninstall")
        during = len(ended)
        assert until(lambda: len(ended) > during + 2, seconds=SETTLE_S)
    finally:
        removed.set()
        for caller in callers:
            caller.join(SETTLE_S)
    assert [sent.execution for sent in ended if not sent.ok] == []
    assert until(lambda: difference(before, host_objects(host)) == {}, seconds=SETTLE_S), difference(
        before, host_objects(host)
    )
