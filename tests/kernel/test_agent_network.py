"""Isolated networks through a real agent: the kernel objects after calls, restarts, crashes and manual changes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from kernel.agent_host import NO_CHECKS, AgentHost, agent_host, done, make_call, steps, wait_until
from kernel.isolated_network import FIRST_LIFE, NS, addresses, live, snapshot
from netloom import names
from netloom.agent.scopes.upkeep import ANNOUNCE_AFTER_S

LAST_WORDS = [
    ("121", "delete-port-forward"),
    ("123", "apply-fw-rules"),
    ("124", "delete-static-nat"),
    ("125", "release-ip"),
    ("126", "shutdown-network"),
    ("131", "destroy-network"),
]


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        yield it


@pytest.fixture(scope="module")
def module_host() -> Iterator[AgentHost]:
    """A host with the network. Tests that use it restore its state."""
    with agent_host() as it:
        it.start(*NO_CHECKS)
        live(it)
        yield it


@pytest.mark.mutation("an-unused-bridge-is-removed")
def test_defect_64_a_network_is_built_as_requested_and_removed_completely(host: AgentHost) -> None:
    before = host.inventory()
    live(host)
    links = host.links()
    assert links["vnetg204"]["master"] == "breth1-1204"
    assert links["eth1.1204"]["master"] == "breth1-1204"
    assert links["vnetpn204.101"]["master"] == "breth2-101"
    assert links["vnetg204"]["ifalias"] == "netloom net-204"
    inside = host.links(NS)
    assert inside["gst-204"]["address"] == names.mac("test", "net-204", "gst-204")
    assert "UP" in inside["pub-101"]["flags"]
    assert addresses(host) == {"10.10.1.1/24", "203.0.113.20/32", "203.0.113.21/32", "203.0.113.22/32"}
    assert "203.0.113.1 dev pub-101" in host.run("ip", "route", "show", "table", "20001", namespace=NS)
    assert "fwmark 0x1/0xffff lookup 20001" in host.run("ip", "rule", namespace=NS)
    assert "10.10.1.45" in host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
    own = ("breth1-1204", "breth2-101", "vnetg204", "vnetpn204.101")
    assert host.run("cat", *(f"/proc/sys/net/ipv6/conf/{it}/disable_ipv6" for it in own)).split() == ["1"] * 4

    with host.client() as client:
        for fixture, command in FIRST_LIFE * 2:
            done(client.call(fixture, command))
        for fixture, command in reversed(FIRST_LIFE):
            # In reverse order earlier firewall lists are applied again, which changes the network.
            done(client.call(fixture, command))
        for fixture, command in LAST_WORDS * 2:
            assert not done(client.call(fixture, command)).holds or command not in (
                "shutdown-network",
                "destroy-network",
            )
    assert host.inventory() == before


def test_repeated_commands_take_no_steps(host: AgentHost) -> None:
    live(host)
    # FIRST_LIFE has two firewall lists, and the last one is in force. Repeating the first (022) would be a change.
    for fixture, command in [it for it in FIRST_LIFE if it[0] != "022"]:
        done(host.call(fixture, command))
        assert steps(host) == 0, fixture


def test_a_restarted_agent_changes_nothing_in_the_kernel(host: AgentHost) -> None:
    live(host)
    wait_until(lambda: _is_settled(host))
    host.kill()
    state = host.path("/var/lib/netloom/scopes/net-204.json").read_bytes()
    watches = [
        subprocess.Popen(
            ["nsenter", "-t", str(host.pid), "-n", "-m", "--", *inner, *what],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for inner in ([], ["ip", "netns", "exec", NS])
        for what in (["ip", "monitor", "link", "address", "route", "rule"], ["stdbuf", "-oL", "nft", "monitor"])
    ]
    wait_until(lambda: all(_has_netlink_socket(watch.pid) for watch in watches))
    host.start()
    assert steps(host) == 0
    host.kill()
    for watch in watches:
        watch.terminate()
        seen, _ = watch.communicate(timeout=10)
        assert seen == ""
    assert host.path("/var/lib/netloom/scopes/net-204.json").read_bytes() == state
    host.start()
    assert steps(host) == 0


def _is_settled(host: AgentHost) -> bool:
    """Whether the links have their operational state, which the kernel sets, with an event, a moment later."""
    links = [*host.links().values(), *host.links(NS).values()]
    return all(
        it["operstate"] == "UP" for it in links if {"UP", "LOWER_UP"} <= set(it["flags"]) and it["ifname"] != "lo"
    )


def _has_netlink_socket(pid: int) -> bool:
    """Whether the process has opened its netlink socket. From then on it receives all events."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return any(it.startswith("socket:") for it in found)


# tests/crash kills the agent after each of its effects.
@pytest.mark.parametrize("after_ms", [5, 25, *(pytest.param(it, marks=pytest.mark.long) for it in (0, 12, 50))])
def test_a_command_interrupted_by_kill_is_completed_at_the_next_start(host: AgentHost, after_ms: int) -> None:
    before = host.inventory()
    for fixture, command in [*FIRST_LIFE[:2], LAST_WORDS[-1]]:
        with host.client() as client:
            client.send(make_call(fixture, command))
            threading.Event().wait(after_ms / 1000)
            host.kill()
        host.start()
        # If the state was saved, the start has built it. If not, the command had no effect. Both accept a repeat.
        done(host.call(fixture, command))
        done(host.call(fixture, command))
        assert steps(host) == 0
    assert host.inventory() == before


@pytest.mark.parametrize(
    "harm",
    [
        ["ip", "link", "del", "vnetg204"],
        ["ip", "link", "del", "vnetpn204.101"],
        ["ip", "link", "del", "breth1-1204"],
        ["ip", "link", "set", "vnetg204", "nomaster"],
        ["ip", "link", "set", "vnetg204", "down"],
        ["ip", "link", "set", "eth2.101", "nomaster"],
        ["ip", "netns", "del", NS],
        ["ip", "-n", NS, "addr", "del", "203.0.113.21/32", "dev", "pub-101"],
        ["ip", "-n", NS, "addr", "add", "203.0.113.99/32", "dev", "pub-101"],
        ["ip", "-n", NS, "link", "set", "pub-101", "down"],
        ["ip", "-n", NS, "link", "set", "gst-204", "address", "02:00:00:00:00:99"],
        ["ip", "-n", NS, "route", "flush", "table", "20001"],
        ["ip", "-n", NS, "rule", "del", "priority", "20001"],
        ["ip", "netns", "exec", NS, "nft", "flush", "ruleset"],
        ["ip", "netns", "exec", NS, "nft", "insert rule inet netloom through accept"],
        ["ip", "netns", "exec", NS, "nft", "flush map inet netloom held"],
        ["nft", "flush", "ruleset"],
    ],
    ids=" ".join,
)
def test_the_next_command_repairs_manual_changes(module_host: AgentHost, harm: list[str]) -> None:
    host = module_host
    good = snapshot(host)
    assert host.agent is not None
    host.agent.send_signal(signal.SIGSTOP)  # otherwise the watcher repairs before the command
    host.run(*harm)
    assert snapshot(host) != good
    host.agent.send_signal(signal.SIGCONT)
    if harm[0] == "nft":
        # A command does not check the table of the host itself. A start and the periodic tidying do.
        host.kill()
        host.start()
    done(host.call("021", "assign-ip"))
    assert snapshot(host) == good
    done(host.call("021", "assign-ip"))
    assert steps(host) == 0


WALK = [
    *FIRST_LIFE,
    ("052", "assign-ip"),
    ("054", "add-port-forward"),
    ("055", "add-port-forward"),
    ("056", "delete-port-forward"),
    ("059", "delete-static-nat"),
    ("060", "release-ip"),
    ("071", "apply-fw-rules"),
    ("072", "apply-fw-rules"),
    ("136", "implement-network"),
    *LAST_WORDS,
]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_after_random_commands_the_host_equals_a_rebuild_from_state(seed: int) -> None:
    """The kernel objects depend only on the stored state, not on the commands that led to it."""
    with agent_host("eth1.1204", "eth1.1377", "eth2.101") as host:
        before = host.inventory()
        host.start()
        host.ip("link", "set", "eth2", "up")
        walk = random.Random(seed)
        with host.client() as client:
            for _ in range(100):
                done(client.call(*walk.choice(WALK)))
            live(host)
        good = snapshot(host)
        host.kill()
        host.ip("netns", "del", NS)
        host.run("nft", "flush", "ruleset")
        host.start()
        assert snapshot(host) == good
        done(host.call("131", "destroy-network"))
        host.ip("link", "set", "eth2", "down")
        assert host.inventory() == before


def test_reimplementing_on_another_vlan_removes_the_old_segment(host: AgentHost) -> None:
    before = host.inventory()
    live(host)
    done(host.call("136", "implement-network"))
    links = host.links()
    assert links["vnetg204"]["master"] == "breth1-1377"
    assert "breth1-1204" not in links
    assert "UP" not in links["eth1.1204"]["flags"]
    done(host.call("131", "destroy-network"))
    assert host.inventory() == before


def test_a_bridge_with_a_vm_port_is_removed_after_the_vm(host: AgentHost) -> None:
    before = host.inventory()
    live(host)
    host.ip("tuntap", "add", "vnet7", "mode", "tap")
    host.ip("link", "set", "vnet7", "master", "breth1-1204")
    done(host.call("131", "destroy-network"))
    assert host.links()["vnet7"]["master"] == "breth1-1204"
    host.ip("link", "del", "vnet7")
    wait_until(lambda: host.inventory() == before)


def test_tenants_cannot_reach_the_host_over_our_bridges(host: AgentHost) -> None:
    live(host)
    host.ip("addr", "add", "198.51.100.9/32", "dev", "lo")
    mac = host.links()["breth1-1204"]["address"]
    host.run("ip", "addr", "add", "10.10.1.77/24", "dev", "sw-eth1.1204", pid=host.fabric)
    host.run("ip", "route", "add", "198.51.100.9/32", "dev", "sw-eth1.1204", pid=host.fabric)
    host.run("ip", "neigh", "add", "198.51.100.9", "lladdr", mac, "dev", "sw-eth1.1204", pid=host.fabric)
    host.ip("route", "add", "10.10.1.0/24", "dev", "breth1-1204")
    host.ip("neigh", "add", "10.10.1.77", "lladdr", fabric_mac(host), "dev", "breth1-1204")

    def answers(address: str, patience_s: int = 20) -> bool:
        words = ["ping", "-c1", f"-W{patience_s}", "-q", address]
        return "1 received" in host.run(*words, pid=host.fabric, check=False)

    assert answers("10.10.1.1")  # the device of the network is reachable over the same bridge
    assert not answers("198.51.100.9", 1)
    assert host.agent is not None
    host.agent.send_signal(signal.SIGSTOP)  # otherwise it may restore the table before the next packet
    host.run("nft", "delete", "table", "netdev", "netloom")
    assert answers("198.51.100.9")  # so the table had blocked it


def fabric_mac(host: AgentHost) -> str:
    found = json.loads(host.run("ip", "-j", "link", "show", "sw-eth1.1204", pid=host.fabric))
    address: str = found[0]["address"]
    return address


@pytest.mark.mutation("only-new-addresses-are-announced")
def test_defect_65_only_new_addresses_are_announced_three_times_each(host: AgentHost) -> None:
    host.run("nft", "add table netdev w", pid=host.fabric)
    hook = "type filter hook ingress device sw-eth2.101 priority 0;"
    host.run("nft", f"add chain netdev w c {{ {hook} }}", pid=host.fabric)
    for address in ("203.0.113.20", "203.0.113.21", "203.0.113.22"):
        rule = f'arp operation reply arp saddr ip {address} counter comment "{address}"'
        host.run("nft", f"add rule netdev w c {rule}", pid=host.fabric)

    def heard() -> dict[str, int]:
        found = json.loads(host.run("nft", "-j", "list", "ruleset", pid=host.fabric))["nftables"]
        told = [it["rule"] for it in found if "rule" in it]
        return {it["comment"]: it["expr"][-1]["counter"]["packets"] for it in told}

    for fixture, command in FIRST_LIFE[:2]:
        done(host.call(fixture, command))
    wait_until(lambda: heard() == {"203.0.113.20": 3, "203.0.113.21": 0, "203.0.113.22": 0})
    done(host.call("050", "assign-ip"))
    done(host.call("021", "assign-ip"))
    wait_until(lambda: heard() == {"203.0.113.20": 3, "203.0.113.21": 3, "203.0.113.22": 0})
    # An address that is released is not announced any more, because another machine may have it already.
    done(host.call("060", "release-ip"))
    begun = time.monotonic()
    done(host.call("050", "assign-ip"))
    done(host.call("060", "release-ip"))
    due = sum(after_s <= time.monotonic() - begun for after_s in ANNOUNCE_AFTER_S)  # before the release
    # The last announcement of a later address comes after all that the released one could have.
    done(host.call("050", "assign-ip", public_ip="203.0.113.22"))
    wait_until(lambda: heard()["203.0.113.22"] == 3)
    assert heard()["203.0.113.21"] <= 3 + due


def test_forty_networks_in_parallel_are_built_and_removed(host: AgentHost) -> None:
    before = host.inventory()
    for number in range(40):
        host.add_vlan(f"eth1.{2000 + number}")
    count = len(host.links())

    def life(number: int, words: str) -> None:
        with host.client() as client:
            told = {"network_id": str(3000 + number), "vlan": str(2000 + number)}
            if words == "build":
                done(client.call("020", "implement-network", **told))
                ip = {"public_ip": f"203.0.113.{100 + number}"}
                done(client.call("021", "assign-ip", **told, **ip))
            else:
                done(client.call("131", "destroy-network", **told))

    for words in ("build", "destroy"):
        threads = [threading.Thread(target=life, args=(number, words)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if words == "build":
            # A guest bridge and two ports for each network, and one public bridge for all.
            assert len(host.links()) == count + 40 * 3 + 1
            host.kill()
            host.start()
            restored = [line for line in host.log().splitlines() if " restore: " in line][-40:]
            assert all("steps=0" in line for line in restored)
    assert len(host.links()) == count
    assert host.inventory() | {"links": 0, "addresses": 0, "routes": 0} == before | {
        "links": 0,
        "addresses": 0,
        "routes": 0,
    }


def test_a_namespace_name_left_by_a_crash_is_removed_with_the_network(host: AgentHost) -> None:
    """The name is a plain file for a moment while a namespace is created or deleted."""
    before = host.inventory()
    host.run("touch", "/run/netns/cs-net-204")
    assert host.inventory() != before
    done(host.call("131", "destroy-network"))
    assert host.inventory() == before


def test_a_foreign_namespace_of_the_same_name_is_refused(host: AgentHost) -> None:
    host.ip("netns", "add", NS)
    host.run("ip", "link", "add", "theirs", "type", "veth", "peer", "name", "wan", namespace=NS)
    reply = host.call("020", "implement-network")
    assert reply.status == 3
    assert reply.error.startswith(f"namespace {NS} is there already and is not ours: link ")
    done(host.call("131", "destroy-network"))
    assert "theirs" in host.links(NS)


def test_a_missing_nic_is_reported_with_its_detail_and_retried(host: AgentHost) -> None:
    reply = host.call("020", "implement-network", vlan="1999")
    assert reply.status == 3
    assert "make VLAN link eth1.1999 with tag 1999 on eth1: this kernel has no 802.1Q" in reply.error
    before = len(host.log())
    host.add_vlan("eth1.1999")
    wait_until(lambda: re.search(r" steps=[1-9]", host.log()[before:]))  # the agent notices the new link
    done(host.call("020", "implement-network", vlan="1999"))
    host.ip("link", "del", "eth2.101")
    host.ip("link", "del", "eth2")
    reply = host.call("021", "assign-ip", vlan="1999")
    assert (reply.status, reply.error) == (3, "NIC eth2 does not exist on this host")
    assert reply.hint == "check the registration detail public.network.device"


def test_bad_input_changes_nothing(host: AgentHost) -> None:
    before = host.inventory()
    reply = host.call("020", "implement-network", cidr="10.10.1.0/240")
    assert reply.status == 1
    assert "cidr" in reply.error
    assert host.call("020", "implement-network", vlan="").status == 1
    assert host.call("020", "dance").status == 1
    assert host.inventory() == before
