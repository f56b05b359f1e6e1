"""Jumbo frames: ports follow the MTU of their segment, and frames that are too large get an ICMP error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import pytest

from kernel.agent_host import AgentHost, done, wait_until
from netloom.wire import Registration

NS, BRIDGE, GATEWAY, OUTSIDE = "cs-net-204", "breth1-1204", "10.10.1.1", "198.51.100.9"
GUEST, PUBLIC = "eth1.1204", "eth2.101"
VM, VM_MAC, VM_IP = "jumbo", "02:01:00:cc:00:03", "10.10.1.45"


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """A host whose guest VLAN carries 9,000 bytes, and whose public VLAN carries 1,500."""
    with contextlib.closing(AgentHost((GUEST, PUBLIC))) as it:
        it.start()
        resize(it, GUEST, 9000)
        yield it


def resize(host: AgentHost, link: str, mtu: int) -> None:
    """Give both ends of a link to the fabric this MTU."""
    host.ip("link", "set", link, "mtu", str(mtu))
    host.run("ip", "link", "set", f"sw-{link}", "mtu", str(mtu), pid=host.fabric)


def build(host: AgentHost) -> None:
    """A network with source NAT, an outside host, and a VM that sends frames of 9,000 bytes."""
    for fixture, command in (("020", "implement-network"), ("021", "assign-ip"), ("022", "apply-fw-rules")):
        done(host.call(fixture, command))
    host.plug(VM, BRIDGE, VM_MAC, f"{VM_IP}/24")
    for words in (["-n", VM, "link", "set", "eth0", "mtu", "9000"], ["link", "set", f"tap-{VM}", "mtu", "9000"]):
        host.ip(*words)
    host.ip("-n", VM, "route", "add", "default", "via", GATEWAY)


def mtus(host: AgentHost) -> tuple[int, int, int]:
    """The MTU of the bridge, and of both ends of the guest port."""
    outside = host.links()
    return outside[BRIDGE]["mtu"], outside["vnetg204"]["mtu"], host.links(NS)["gst-204"]["mtu"]


def ping(host: AgentHost, address: str, size: int) -> str:
    """Ping from the VM with an IP packet of ``size`` bytes that must not be fragmented; what ping printed."""
    words = ["ping", "-c", "1", "-W", "20", "-M", "do", "-s", str(size - 28), address]
    return host.run(*words, namespace=VM, check=False)


def test_a_bridge_with_jumbo_frames_keeps_them(host: AgentHost) -> None:
    build(host)
    assert mtus(host) == (9000, 9000, 9000)
    for size in (1500, 4000, 9000):
        assert " 0% packet loss" in ping(host, GATEWAY, size)


@pytest.mark.mutation("ports-follow-the-mtu-of-their-segment", instead="False")
def test_ports_follow_a_change_while_the_network_runs(host: AgentHost) -> None:
    build(host)
    for mtu in (1400, 9000):
        resize(host, GUEST, mtu)
        wait_until(partial(lambda mtu: mtus(host)[1:] == (mtu, mtu), mtu))
        assert " 0% packet loss" in ping(host, GATEWAY, mtu)
    public = next(name for name in host.links(NS) if name.startswith("pub-"))
    resize(host, PUBLIC, 9000)
    wait_until(lambda: host.links(NS)[public]["mtu"] == 9000)


@pytest.mark.mutation("a-narrow-segment-has-no-ipv6")
def test_a_segment_that_is_too_small_for_ipv6_carries_ipv4(host: AgentHost) -> None:
    """The kernel has no sysctls of IPv6 for a link with less than 1,280 bytes (RFC 8200 section 5)."""
    resize(host, GUEST, 1200)
    build(host)
    assert mtus(host) == (1200, 1200, 1200)
    assert " 0% packet loss" in ping(host, GATEWAY, 1200)
    resize(host, GUEST, 9000)
    wait_until(lambda: mtus(host)[1:] == (9000, 9000))
    off = [f"net.ipv6.conf.{link}.disable_ipv6" for link in ("vnetg204", BRIDGE)]
    wait_until(lambda: host.run("sysctl", "-n", *off).split() == ["1", "1"])
    wait_until(lambda: host.run("sysctl", "-n", "net.ipv6.conf.gst-204.disable_ipv6", namespace=NS) == "1\n")


def test_a_packet_that_is_too_large_for_the_public_link_gets_an_icmp_error(host: AgentHost) -> None:
    build(host)
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", f"sw-{PUBLIC}", pid=host.fabric)
    host.run("ip", "addr", "add", f"{OUTSIDE}/32", "dev", "lo", pid=host.fabric)
    assert " 0% packet loss" in ping(host, OUTSIDE, 1500)
    assert "mtu = 1500" in ping(host, OUTSIDE, 4000)  # the device says so at the first, later the VM itself


def test_a_packet_that_is_too_large_for_the_guest_segment_gets_an_icmp_error_through_nat(host: AgentHost) -> None:
    resize(host, GUEST, 1400)
    build(host)
    for fixture, command in (("057", "assign-ip"), ("058", "add-static-nat"), ("070", "apply-fw-rules")):
        done(host.call(fixture, command))
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", f"sw-{PUBLIC}", pid=host.fabric)
    words = ["ping", "-c", "1", "-W", "20", "-M", "do", "-s", "1472", "203.0.113.22"]
    answer = host.run(*words, pid=host.fabric, check=False)
    assert "From 203.0.113.22 icmp_seq=1 Frag needed and DF set (mtu = 1400)" in answer


def test_an_operators_bridge_keeps_the_mtu_of_its_uplink(host: AgentHost) -> None:
    """Also when the uplink is resized, and when the bridge gets another uplink."""

    def resize_uplink(mtu: int) -> None:
        for link in ("eth1", "eth1-x"):
            host.ip("link", "set", link, "mtu", str(mtu), "up")

    def ports() -> set[int]:
        return {host.links()["vnetg204"]["mtu"], host.links(NS)["gst-204"]["mtu"]}

    host.ip("link", "add", "br0", "type", "bridge")
    host.ip("link", "set", "eth1", "master", "br0")
    host.ip("link", "set", "br0", "up")
    resize_uplink(9000)
    registration = Registration(owner="test", guest_nic="br0", public_nic="eth2")
    done(host.call("020", "implement-network", registration=registration, vlan="untagged"))
    assert host.links()["br0"]["mtu"] == 9000
    assert ports() == {9000}
    host.plug(VM, "br0", VM_MAC)  # with 1,500 bytes
    for mtu in (1400, 9000):
        resize_uplink(mtu)
        wait_until(partial(lambda mtu: ports() == {mtu}, mtu))
    host.ip("link", "set", "eth2", "mtu", "4000", "master", "br0")
    wait_until(lambda: ports() == {4000})
    host.ip("link", "set", "eth2", "nomaster")
    wait_until(lambda: ports() == {9000})


def test_a_small_public_link_is_told_to_a_vm_with_jumbo_frames(host: AgentHost) -> None:
    resize(host, PUBLIC, 1300)
    build(host)
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", f"sw-{PUBLIC}", pid=host.fabric)
    host.run("ip", "addr", "add", f"{OUTSIDE}/32", "dev", "lo", pid=host.fabric)
    assert " 0% packet loss" in ping(host, OUTSIDE, 1300)
    assert "mtu = 1300" in ping(host, OUTSIDE, 1400)


def test_tiers_of_different_size_are_told_in_both_families_and_directions() -> None:
    """The device says so at the first packet, later the VM itself. So each size has a first packet of its own."""
    tiers = {"310": ("1310", "10.20.1", "2001:db8:20:1"), "311": ("1311", "10.20.2", "2001:db8:20:2")}
    with contextlib.closing(AgentHost(("eth1.1310", "eth1.1311", PUBLIC))) as host:
        host.start()
        done(host.call("202", "implement-vpc"))
        for number, (network_id, (vlan, net, net6)) in enumerate(tiers.items(), 1):
            facts = {"network_id": network_id, "vlan": vlan, "gateway": f"{net}.1", "cidr": f"{net}.0/24"}
            facts |= {"network_ip6_gateway": f"{net6}::1", "network_ip6_cidr": f"{net6}::/64"}
            done(host.call("210", "implement-network", **facts, extension_ip=f"{net}.1"))
            allow = {"number": 1, "action": "allow", "protocol": "all", "sourceCidrs": ["0.0.0.0/0", "::/0"]}
            rules = [{**allow, "trafficType": "ingress"}, {**allow, "trafficType": "egress"}]
            done(host.call("213", "apply-network-acl", **facts, acl_rules=rules))
            vm = f"vm{number}"
            host.plug(vm, f"breth1-{vlan}", f"02:01:00:00:00:0{number}", f"{net}.31/24")
            # A router advertisement that was sent before a change would tell the VM the former MTU.
            for setting in ("eth0/accept_ra=0", "all/disable_ipv6=0", "eth0/disable_ipv6=0"):
                host.run("sysctl", "-qw", f"net/ipv6/conf/{setting}", namespace=vm)
            host.ip("-n", vm, "addr", "add", f"{net6}::31/64", "dev", "eth0", "nodad")
            host.ip("-n", vm, "route", "add", "default", "via", f"{net}.1")
            host.ip("-n", vm, "route", "add", "default", "via", f"{net6}::1")
            host.ip("link", "set", f"tap-{vm}", "mtu", "9000")
            host.ip("-n", vm, "link", "set", "eth0", "mtu", "9000")

        def ping_of(vm: str, address: str, size: int) -> str:
            words = ["ping", "-c", "1", "-W", "3", "-M", "do", "-s", str(size - (48 if ":" in address else 28))]
            return host.run(*words, address, namespace=vm, check=False)

        for large, small, mtu in (("1310", "1311", 1500), ("1311", "1310", 1400)):
            resize(host, f"eth1.{large}", 9000)
            resize(host, f"eth1.{small}", mtu)
            sender, net, net6 = ("vm1", "10.20.2", "2001:db8:20:2") if large == "1310" else (
                "vm2", "10.20.1", "2001:db8:20:1")  # fmt: skip
            inside = {f"gst-{key}": 9000 if vlan == large else mtu for key, (vlan, _, _) in tiers.items()}
            wait_until(partial(lambda inside: inside.items() <= {
                name: it["mtu"] for name, it in host.links("cs-vpc-7").items()}.items(), inside))  # fmt: skip
            for address, said in ((f"{net}.31", f"mtu = {mtu}"), (f"{net6}::31", f"mtu={mtu}")):
                wait_until(partial(lambda *it: " 0% packet loss" in ping_of(*it), sender, address, mtu))
                assert said in ping_of(sender, address, 4000)
