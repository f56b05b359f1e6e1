"""The agent's watcher: manual changes to a network are repaired at once, without a command, and only once."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import processes
from kernel.agent_host import NO_CHECKS, AgentHost, agent_host, done, wait_until
from kernel.isolated_network import (
    BRIDGE,
    DEPLOY,
    NS,
    WEB,
    WEB_IP,
    WEB_MAC,
    get,
    lease,
    live,
    live_with_vm,
    lookup,
    running,
    snapshot,
)
from netloom.agent.host.observe_nft import RESERVED
from netloom.agent.scopes.upkeep import TIDY_EVERY_S

SCOPE = "net-204"
WITHIN_S = 20.0  # a second on an idle machine
REPAIRED = " (?:check|nftables changed): "  # what a periodic look has found, in the log


@pytest.fixture(scope="module")
def module_host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start(*NO_CHECKS)  # a check that finds the change first would leave nothing to the watcher
        live(it)
        with it.client() as client:
            for fixture, command in DEPLOY:
                done(client.call(fixture, command))
            done(client.call("020", "implement-network", network_id="205", vlan="1377"))
        wait_for_repairs(it)
        yield it


@pytest.mark.parametrize(
    "harm",
    [
        ["ip", "link", "del", "vnetg204"],
        ["ip", "link", "del", "breth1-1204"],
        ["ip", "link", "set", "vnetg204", "nomaster"],
        ["ip", "link", "set", "vnetg204", "down"],
        ["ip", "link", "set", "vnetg204", "alias", ""],
        ["ip", "link", "set", "breth1-1204", "down"],
        ["ip", "link", "set", "eth2.101", "nomaster"],
        ["ip", "netns", "del", NS],
        ["ip", "-n", NS, "link", "del", "pub-101"],
        ["ip", "-n", NS, "addr", "del", "203.0.113.21/32", "dev", "pub-101"],
        ["ip", "-n", NS, "addr", "add", "203.0.113.99/32", "dev", "pub-101"],
        ["ip", "-n", NS, "link", "set", "pub-101", "down"],
        ["ip", "-n", NS, "link", "set", "gst-204", "address", "02:00:00:00:00:99"],
        ["ip", "-n", NS, "route", "flush", "table", "20001"],
        ["ip", "-n", NS, "route", "flush", "table", "main"],
        ["ip", "-n", NS, "route", "del", "10.10.1.0/24"],
        ["ip", "-n", NS, "route", "flush", "table", "local", "dev", "pub-101"],
        ["ip", "-n", NS, "route", "add", "198.51.100.0/24", "dev", "gst-204"],
        ["ip", "-n", NS, "rule", "del", "priority", "20001"],
        ["ip", "-n", NS, "rule", "del", "priority", "32766"],
        ["ip", "-n", NS, "neigh", "del", WEB_IP, "dev", "gst-204"],
        ["ip", "-n", NS, "neigh", "replace", WEB_IP, "lladdr", "02:00:00:00:00:99", "dev", "gst-204"],
    ],
    ids=" ".join,
)
def test_manual_changes_are_repaired_once(module_host: AgentHost, harm: list[str]) -> None:
    host = module_host
    good = full_snapshot(host)
    before = len(host.log())
    host.run(*harm)
    wait_until(lambda: full_snapshot(host) == good, WITHIN_S)
    wait_for_repairs(host)
    assert full_snapshot(host) == good
    # There was one repair. Events caused by the repair did not start another, now or later.
    lines = [line for line in host.log()[before:].splitlines() if f"scope={SCOPE} " in line]
    assert sum(" watch: " in line for line in lines) == 1
    assert sum("next repair in" in line for line in lines) <= 1


def full_snapshot(host: AgentHost) -> list[object]:
    permanent = host.run("ip", "neigh", "show", "nud", "permanent", namespace=NS, check=False)
    alias = host.links().get("vnetg204", {}).get("ifalias", "")
    return [*snapshot(host), permanent, alias]


_markers = itertools.count(100)


def wait_for_repairs(host: AgentHost) -> None:
    """Return when all repairs that earlier events started are done.

    The agent handles events in their order, and every repair starts after the same time. So when a change of network
    205 is repaired, the repair of an earlier event has at least started, and the next call of network 204 waits for it.
    """
    address = f"203.0.113.{next(_markers)}/32"
    host.run("ip", "addr", "add", address, "dev", "gst-205", namespace="cs-net-205")
    wait_until(lambda: f"scope=net-205 watch: {address}: steps=1 " in host.log())
    assert "steps=0 " in logged(host, lambda: done(host.call("050", "assign-ip")))


def logged(host: AgentHost, work: Callable[[], object]) -> str:
    """The last line that the agent logged during ``work``."""
    before = len(host.log())
    work()
    return host.log()[before:].splitlines()[-1]


def wait_for_check(host: AgentHost) -> None:
    """Return when a periodic look at the network has begun after the call of this function, and is done.

    It finds a wrong sysctl, which nothing else would find. It does that one step and no other.
    """
    before = len(re.findall(REPAIRED, host.log()))
    host.run("sysctl", "-qw", "net.ipv4.conf.pub-101.rp_filter=1", namespace=NS)
    wait_until(lambda: len(re.findall(REPAIRED, host.log())) > before)
    assert re.search(f"{REPAIRED}steps=1 ", host.log().splitlines()[-1])


@pytest.fixture(scope="module")
def checked_host() -> Iterator[AgentHost]:
    """A host with the periodic check at every half second."""
    with agent_host() as it:
        it.start("--check-every", "0.5")
        live(it)
        yield it


@pytest.mark.parametrize(
    "harm",
    [
        ["ip", "netns", "exec", NS, "nft", "flush ruleset"],
        ["ip", "netns", "exec", NS, "nft", "flush chain inet netloom through"],
        ["ip", "netns", "exec", NS, "nft", "insert rule inet netloom through accept"],
        ["ip", "netns", "exec", NS, "nft", "flush map inet netloom held"],
        ["ip", "netns", "exec", NS, "nft", "add chain inet netloom theirs"],
        ["ip", "netns", "exec", NS, "sysctl", "-qw", "net.ipv4.conf.pub-101.rp_filter=1"],
        ["ip", "netns", "exec", NS, "sysctl", "-qw", "net.ipv4.ip_forward=0"],
    ],
    ids=" ".join,
)
def test_changes_without_events_are_found_by_the_periodic_looks(checked_host: AgentHost, harm: list[str]) -> None:
    host = checked_host
    wait_for_check(host)  # it has recorded the correct rules
    good = full_snapshot(host)
    logged_before = len(host.log())
    assert host.agent is not None
    host.agent.send_signal(signal.SIGSTOP)
    host.run(*harm)
    assert full_snapshot(host) != good
    host.agent.send_signal(signal.SIGCONT)
    wait_until(lambda: full_snapshot(host) == good)
    # The next case must not take the line of this check for its own.
    wait_until(lambda: re.search(REPAIRED, host.log()[logged_before:]))


def test_an_unmounted_namespace_name_is_restored(checked_host: AgentHost) -> None:
    good = full_snapshot(checked_host)
    logged_before = len(checked_host.log())
    checked_host.run("umount", f"/run/netns/{NS}")
    wait_until(lambda: checked_host.run("ip", "link", namespace=NS, check=False) != "")
    wait_until(lambda: full_snapshot(checked_host) == good)
    # The next check must not take the line of this one for its own.
    wait_until(lambda: re.search(REPAIRED, checked_host.log()[logged_before:]))
    wait_for_check(checked_host)
    assert full_snapshot(checked_host) == good


def test_a_deleted_bridge_is_restored_and_its_carrier_ends_down_as_before() -> None:
    with agent_host() as host:
        host.start()
        before = "UP" in host.links()["eth1.1204"]["flags"]
        assert not before
        live(host)
        host.ip("link", "del", BRIDGE)
        wait_until(lambda: host.links()["vnetg204"].get("master") == BRIDGE)
        wait_until(lambda: f"scope={SCOPE} watch: " in host.log())
        done(host.call("131", "destroy-network"))
        assert "UP" not in host.links()["eth1.1204"]["flags"]
        assert BRIDGE not in host.links()


def test_foreign_nftables_tables_are_left_alone(checked_host: AgentHost) -> None:
    wait_for_check(checked_host)
    before = len(checked_host.log())
    checked_host.run("nft", "add table inet theirs { chain a { accept; }; }", namespace=NS)
    wait_for_check(checked_host)
    lines = [line for line in checked_host.log()[before:].splitlines() if f"scope={SCOPE} " in line]
    assert len(lines) == 1, lines  # of wait_for_check itself
    assert "theirs" in checked_host.run("nft", "list", "tables", namespace=NS)
    checked_host.run("nft", "delete table inet theirs", namespace=NS)


GUARDS = [("netdev", BRIDGE), ("bridge", "forward"), ("inet", RESERVED), ("arp", RESERVED)]


def guard_of_the_host(host: AgentHost) -> list[str]:
    """The chains and rules of our tables on the host. Empty while one of them is missing."""
    listed = [host.run("nft", "-s", "list", "chain", family, "netloom", it, check=False) for family, it in GUARDS]
    return listed if all("drop" in it or "jump" in it for it in listed) else []


def test_the_guard_of_the_host_is_back_at_once_when_others_delete_it(module_host: AgentHost) -> None:
    wait_until(lambda: guard_of_the_host(module_host))
    before = guard_of_the_host(module_host)
    begun = time.monotonic()
    for harm in ("flush ruleset", "delete table bridge netloom", "flush table bridge netloom"):
        module_host.run("nft", harm)
        wait_until(lambda: guard_of_the_host(module_host) == before)
    # Without the events a tidy comes once in 30 seconds, so it would find one of the three.
    assert time.monotonic() - begun < TIDY_EVERY_S


def test_repeated_repairs_back_off_exponentially() -> None:
    with agent_host() as host:
        host.start(*NO_CHECKS)
        live(host)
        begun = time.monotonic()

        def repaired_with_longer_delays() -> bool:
            host.run("ip", "link", "set", "vnetg204", "nomaster", check=False)
            time.sleep(0.1)
            return re.search(r"next repair in ([2-9]|\d\d) s", host.log()) is not None

        wait_until(repaired_with_longer_delays, 60)
        passed_s = time.monotonic() - begun
        waits = re.findall(r"vnetg204: repaired (\d+) times, .* next repair in (\d+) s", host.log())
        # Two repairs may be counted at once, so the first delay may be left out. Each delay has passed before the next.
        assert all(int(delay) == 2 ** (int(times) - 5) for times, delay in waits)
        assert passed_s >= sum(int(delay) for _, delay in waits[:-1])
        # At most one more repair was scheduled before the fifth was counted.
        assert host.log().count(" watch: vnetg204: steps=") <= 6 + len(waits)
        # The agent keeps repairing.
        wait_until(lambda: host.links()["vnetg204"].get("master") == BRIDGE)


def test_a_deleted_namespace_is_restored_with_its_services() -> None:
    with agent_host() as host:
        host.start()
        live_with_vm(host)
        with host.client() as client:
            done(client.call("050", "assign-ip"))
            done(client.call("080", "apply-lb-rules"))
        lease(host, WEB)
        before = running(host)
        host.ip("netns", "del", NS)
        wait_until(lambda: not (running(host)["dnsmasq"] | running(host)["haproxy"]) & before["dnsmasq"])
        wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
        assert lease(host, WEB)["ip"] == WEB_IP
        assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
        wait_until(lambda: len(running(host)["haproxy"] - before["haproxy"]) == 2)
        after = running(host)
        assert after["--control"] == before["--control"]
        assert not (after["dnsmasq"] | after["haproxy"]) & (before["dnsmasq"] | before["haproxy"])
        assert len(after["dnsmasq"]) == 1


@pytest.mark.mutation(
    "the-agent-restores-at-its-start", instead="asyncio.ensure_future(asyncio.sleep(0, prepared.set()))"
)
def test_defect_61_after_a_power_cut_every_network_is_restored_from_its_state_file() -> None:
    vlans = [f"eth1.{2000 + number}" for number in range(8)]
    with agent_host("eth1.1204", "eth2.101", *vlans) as host:
        host.start()
        live_with_vm(host)
        with host.client() as client:
            for number in range(8):
                told = {"network_id": str(3000 + number), "vlan": str(2000 + number)}
                done(client.call("020", "implement-network", **told))
                done(client.call("033", "config-dns-subnet", **told))
        power_cut(host)
        assert host.run("ip", "netns", "list") == ""
        assert running(host) == {"dnsmasq": set(), "haproxy": set(), "--control": set()}
        host.plug(WEB, "", WEB_MAC)
        asking = threading.Thread(target=lambda: given.update(lease(host, WEB)))
        given: dict[str, str] = {}
        host.start()
        wait_until(lambda: BRIDGE in host.links())
        host.ip("link", "set", f"tap-{WEB}", "master", BRIDGE)
        asking.start()
        asking.join(60)
        assert given["ip"] == WEB_IP
        assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
        assert len(running(host)["dnsmasq"]) == 9
        assert sum(" restore: " in line for line in host.log().splitlines()) == 9


def power_cut(host: AgentHost) -> None:
    """Remove everything that is not on disk."""
    host.kill()
    for pid in host.processes():
        processes.kill(pid)
    wait_until(lambda: not host.processes())
    for line in host.run("ip", "netns", "list").splitlines():
        host.ip("netns", "del", line.split()[0])
    for name, link in host.links().items():
        if link.get("linkinfo", {}).get("info_kind") == "bridge" or name.startswith("vnet"):
            host.run("ip", "link", "del", name, check=False)
    host.run("nft", "flush", "ruleset")
    host.run("sh", "-c", "rm -rf /run/netloom")


# The commands of CloudStack's KVM agent when a VM's NIC is removed. It lists the ports of the bridge and stops when a
# name contains "vnet". Otherwise it deletes the VLAN link and the bridge. Here the VLAN link is a veth, which could
# not be created again, so it is kept.
KVM_AGENT = """
for port in $(ip -o link show master "$1" | cut -d: -f2 | cut -d@ -f1); do
    case $port in *vnet*) [ "$2" = forced ] || { echo kept; exit 0; } ;; esac
done
ip link set "$1" down
ip link del "$1"
echo deleted
"""


def test_the_kvm_agent_does_not_delete_a_bridge_with_our_port() -> None:
    with agent_host() as host:
        host.start()
        live_with_vm(host)
        assert host.run("sh", "-c", KVM_AGENT, "sh", BRIDGE, "") == "kept\n"
        assert host.links()["vnetg204"]["master"] == BRIDGE
        assert lease(host, WEB)["ip"] == WEB_IP


@pytest.mark.mutation("an-adopted-bridge-is-ours")
@pytest.mark.parametrize("reason", ["", "a VM", "an address"])
def test_an_adopted_kvm_agent_bridge_is_removed_unless_it_is_in_use(reason: str) -> None:
    with agent_host() as host:
        for words in (f"add {BRIDGE} type bridge", f"set {BRIDGE} up", f"set eth1.1204 master {BRIDGE} up"):
            host.ip("link", *words.split())
        host.start()
        live_with_vm(host)
        assert host.links()[BRIDGE].get("ifalias") is None
        host.plug("other", BRIDGE, "02:01:00:cc:00:77")
        host.ip("link", "del", f"tap-{WEB}")
        assert host.run("sh", "-c", KVM_AGENT, "sh", BRIDGE, "") == "kept\n"
        if reason != "a VM":
            host.ip("link", "del", "tap-other")
        if reason == "an address":
            host.ip("addr", "add", "192.0.2.77/24", "dev", BRIDGE)
        done(host.call("126", "shutdown-network"))
        assert (BRIDGE in host.links()) == bool(reason)
        assert "eth1.1204" in host.links()


def test_a_forcibly_deleted_bridge_is_restored_with_its_vm_ports() -> None:
    with agent_host() as host:
        host.start()
        live_with_vm(host)
        lease(host, WEB)
        # The gateway answers only a few requests a second of addresses that no VM has.
        far = "02:01:00:cc:00:77"
        done(host.call("041", "prepare-nic", ip="10.10.1.77", mac=far))
        host.run("ip", "link", "set", "sw-eth1.1204", "address", far, pid=host.fabric)
        host.run("ip", "addr", "add", "10.10.1.77/24", "dev", "sw-eth1.1204", pid=host.fabric)
        words = ["ping", "-i", "0.1", "-c", "60", "-W", "1", "10.10.1.1"]
        pings = [
            subprocess.Popen(["nsenter", "-t", str(pid), "-n", "-m", *inner, *words], stdout=subprocess.PIPE, text=True)
            for pid, inner in ((host.fabric, []), (host.pid, ["nsenter", f"--net=/run/netns/{WEB}"]))
        ]
        neighbour = ("ip", "neigh", "show", "10.10.1.1")
        wait_until(lambda: "lladdr" in host.run(*neighbour, pid=host.fabric))
        wait_until(lambda: "lladdr" in host.run(*neighbour, namespace=WEB))
        without_bridge_s = 0.0
        for _ in range(2):
            begun = time.monotonic()
            assert host.run("sh", "-c", KVM_AGENT, "sh", BRIDGE, "forced") == "deleted\n"
            wait_until(lambda: host.links()[f"tap-{WEB}"].get("master") == BRIDGE)
            without_bridge_s += time.monotonic() - begun
        for ping in pings:
            said, _ = ping.communicate(timeout=60)
            received = int(said.partition(" packets transmitted, ")[2].split()[0])
            # Ten packets per second, and two interruptions: a second each, unless the machine is busy.
            assert received >= 60 - 10 * max(2, without_bridge_s + 1), said
        assert host.links()[f"tap-{WEB}"]["master"] == BRIDGE
