"""Longest names, ids and addresses, and many rules, through a real agent, each checked with a few packets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kernel.agent_host import AgentHost, agent_host, done, make_call, steps, wait_until
from netloom import names
from netloom.commands import Context, apply, decode
from netloom.state import Scope
from netloom.wire import Registration

NIC = "enx0123456789ab"  # 15 characters
LARGE = Registration(owner="test", guest_nic=NIC, public_nic="eth2")
# Ids of ten and nine digits, VLAN tags with a common prefix, the same subnet.
TWINS = {"9999999999": "1204", "999999999": "120"}
GATEWAY = "198.151.100.254/24"
ADDRESSES = [f"198.151.100.{100 + at}" for at in range(64)]  # 15 characters each
PUBLIC = {"public_vlan": "101", "public_cidr": "198.151.100.0/24", "public_gateway": "198.151.100.254"}
FILE = "/var/lib/netloom/scopes/net-204.json"
MAC, VM_IP = "02:01:00:cc:00:03", "10.10.1.45"


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1204", "eth2.101") as it:
        it.run("ip", "addr", "add", GATEWAY, "dev", "sw-eth2.101", pid=it.fabric)
        it.start()
        yield it


def listen(host: AgentHost, vm: str, *ports: int) -> None:
    """Make the VM answer with its name on these ports."""
    for port in ports:
        host.run("sh", "-c", f"busybox nc -ll -p {port} -e echo {vm} >/dev/null 2>&1 </dev/null &", namespace=vm)
    for port in ports:
        wait_until(lambda: host.run("ss", "-Hltn", f"sport = {port}", namespace=vm))  # noqa: B023


def unplug(host: AgentHost, vm: str) -> None:
    host.ip("link", "del", f"tap-{vm}")
    host.ip("netns", "del", vm)


def answer_from(host: AgentHost, address: str, port: int) -> str:
    """The answer of an address to a client outside; empty without an answer."""
    return host.run(
        "timeout", "3", "busybox", "nc", "-w", "2", address, str(port), pid=host.fabric, check=False
    ).strip()


def answered_by(host: AgentHost, vm: str, address: str, port: int) -> None:
    """Assert that the VM answers a client outside. On a busy machine one answer may come too late."""
    answers = (answer_from(host, address, port) for _ in range(10))
    assert next(filter(None, answers), "") == vm


def nothing_is_left(host: AgentHost, before: dict[str, int]) -> None:
    """The kernel removes the links of a deleted namespace later."""
    wait_until(lambda: {**host.inventory(), "connections": 0} == {**before, "connections": 0})


def test_networks_with_the_longest_names_and_ids_coexist(host: AgentHost) -> None:
    host.ip("link", "add", NIC, "type", "veth", "peer", "name", "nic-x")
    for vlan in TWINS.values():
        host.add_vlan(names.vlan_link(NIC, vlan))
    before = host.inventory()
    for (network_id, vlan), address in zip(TWINS.items(), ADDRESSES, strict=False):
        fields: dict[str, Any] = {"registration": LARGE, "network_id": network_id, "vlan": vlan}
        done(host.call("020", "implement-network", **fields))
        done(host.call("021", "assign-ip", **fields, **PUBLIC, public_ip=address))
        done(host.call("053", "add-port-forward", **fields, **PUBLIC, public_ip=address, public_port="22"))
        rule = {"id": 1, "type": "ingress", "protocol": "tcp", "portStart": 22, "publicIp": address}
        done(host.call("070", "apply-fw-rules", **fields, fw_rules={"default_egress_allow": True, "rules": [rule]}))
        vm = f"vm-{vlan}"
        host.plug(vm, names.bridge(NIC, vlan), MAC, f"{VM_IP}/24")
        host.ip("-n", vm, "route", "add", "default", "via", "10.10.1.1")
        listen(host, vm, 22)
    # Both VMs have the same guest address. Each public address leads to the VM of its network.
    answered_by(host, "vm-1204", ADDRESSES[0], 22)
    answered_by(host, "vm-120", ADDRESSES[1], 22)
    assert max(map(len, host.links())) == names.LINK_NAME_MAX
    done(host.call("126", "shutdown-network", registration=LARGE, network_id="999999999", vlan="120"))
    answered_by(host, "vm-1204", ADDRESSES[0], 22)
    assert answer_from(host, ADDRESSES[1], 22) == ""
    done(host.call("131", "destroy-network", registration=LARGE, network_id="9999999999", vlan=""))
    for vlan in TWINS.values():
        unplug(host, f"vm-{vlan}")
    host.kill()
    host.start()
    nothing_is_left(host, before)


def test_a_vpc_with_the_longest_ids_and_highest_vlans(host: AgentHost) -> None:
    """Highest VLAN tags and ids on the guest side and the public side."""
    for link in ("eth1.4094", "eth1.4093", "eth2.4094"):
        host.add_vlan(link)
    for change, link in (("del", "sw-eth2.101"), ("add", "sw-eth2.4094")):
        host.run("ip", "addr", change, GATEWAY, "dev", link, pid=host.fabric)
    before = host.inventory()
    vpc = {"vpc_id": "9999999999", **PUBLIC, "public_vlan": "vlan://4094", "public_ip": ADDRESSES[0]}
    tiers = {
        "9999999998": {"vlan": "4094", "gateway": "10.20.1.1", "cidr": "10.20.1.0/24"},
        "9999999997": {"vlan": "4093", "gateway": "10.20.2.1", "cidr": "10.20.2.0/24"},
    }
    done(host.call("202", "implement-vpc", **vpc))
    for number, told in tiers.items():
        fields = {**vpc, **told, "network_id": number, "extension_ip": told["gateway"]}
        done(host.call("210", "implement-network", **fields))
        done(host.call("213", "apply-network-acl", **fields))
        vm, guest = f"vm-{told['vlan']}", told["gateway"][:-1] + "45"
        forwarded = {"public_port": told["vlan"], "private_ip": guest, "private_port": "22", "protocol": "tcp"}
        done(host.call("226", "add-port-forward", **fields, **forwarded))
        host.plug(vm, names.bridge("eth1", told["vlan"]), MAC, f"{guest}/24")
        host.ip("-n", vm, "route", "add", "default", "via", told["gateway"])
        listen(host, vm, 22)
    for port in (4094, 4093):
        answered_by(host, f"vm-{port}", ADDRESSES[0], port)
    unplug(host, "vm-4094")
    done(host.call("233", "destroy-network", vpc_id="9999999999", network_id="9999999998"))
    answered_by(host, "vm-4093", ADDRESSES[0], 4093)
    unplug(host, "vm-4093")
    done(host.call("235", "shutdown-vpc", vpc_id="9999999999"))
    nothing_is_left(host, before)


def test_a_thousand_rules_and_a_thousand_forwards_on_sixty_four_addresses(host: AgentHost) -> None:
    """The agent restores most of them from the state file at its start and gets the rest by calls."""
    forwards = [(ADDRESSES[at % 64], 2000 + at) for at in range(1000)]
    closed = forwards[500]
    calls: list[tuple[str, str, dict[str, Any]]] = [("020", "implement-network", {})]
    for at, address in enumerate(ADDRESSES):
        calls.append(("021", "assign-ip", {**PUBLIC, "public_ip": address, "source_nat": str(at == 0).lower()}))
    for address, port in forwards:
        ports = {"public_port": str(port), "private_port": str(port), "private_ip": VM_IP}
        calls.append(("053", "add-port-forward", {**PUBLIC, "public_ip": address, **ports}))
    rules = [
        {"id": at, "type": "ingress", "protocol": "tcp", "portStart": port, "publicIp": address}
        for at, (address, port) in enumerate(forwards)
        if (address, port) != closed
    ]
    rules.append({"id": 1000, "type": "egress", "protocol": "udp", "portStart": 53})

    host.kill()
    scope: Scope | None = None
    for fixture, command, changes in calls[:-20]:
        told = make_call(fixture, command, **changes)
        context = Context(scope_id=told.scope_id, registration=told.registration)
        scope = apply(command, scope, decode(command, told.payload), context).scope
    host.path(FILE).write_bytes(msgspec.json.encode(scope))
    host.start()
    with host.client() as client:
        for fixture, command, changes in calls[-20:]:
            done(client.call(fixture, command, **changes))
        done(client.call("070", "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": rules}))
    state = json.loads(host.path(FILE).read_text())
    assert [len(state[it]) for it in ("public_ips", "port_forwards")] == [64, 1000]
    assert len(state["networks"]["204"]["firewall"]["rules"]) == 1000
    host.plug("web", "breth1-1204", MAC, f"{VM_IP}/24")
    host.ip("-n", "web", "route", "add", "default", "via", "10.10.1.1")
    picked = [forwards[at] for at in (0, 63, 64, 999)]
    listen(host, "web", *(port for _, port in [*picked, closed]))
    for address, port in picked:
        answered_by(host, "web", address, port)
    assert answer_from(host, *closed) == ""
    assert answer_from(host, ADDRESSES[1], forwards[0][1]) == ""  # the port belongs to another address
    # The next agent has nothing to do.
    host.kill()
    host.start()
    assert steps(host) == 0
