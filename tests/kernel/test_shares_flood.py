"""The neighbour tables of the host under a flood: another network and the host itself are still reached.

The limit of the tables is the kernel's default, which the floods exceed. The networks' own limits, which a host raises,
do not apply: an agent in a namespace cannot write them.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until
from kernel.raw_frames import checksum, one_cpu, wire
from meanwhile import meanwhile
from netloom.wire import Registration

THRESHOLDS = {"gc_thresh1": "128", "gc_thresh2": "512", "gc_thresh3": "1024"}  # the kernel's defaults
AT_ONCE, LATER = 1500, 100  # frames at the beginning, and then in each round
GATEWAY, GATEWAY6 = "10.50.1.1", "2001:db8:50:1::1"
WIDE = {"gateway": GATEWAY, "cidr": "10.50.0.0/16"}
MAC, VM_IP, VM_IP6 = "02:01:00:cc:05:03", "10.50.1.45", "2001:db8:50:1:1:ff:fecc:503"
PUBLIC = {"public_ip": "203.0.113.20", "public_cidr": "203.0.112.0/20", "public_gateway": "203.0.113.1"}
OURS = "2001:db8:99::520"
WAY_OUT = Registration(
    owner="test", guest_nic="eth1", public_nic="eth2", ip6_gateway="2001:db8:99::1", ip6_address=f"{OURS}/64"
)
MANAGEMENT, MANAGEMENT6 = "192.168.77.1", "fd00:77::1"
PORT = 8022

pytestmark = pytest.mark.machine

numbers = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def _thresholds() -> Iterator[None]:
    files = {
        Path(f"/proc/sys/net/{family}/neigh/default/{name}"): value
        for family in ("ipv4", "ipv6")
        for name, value in THRESHOLDS.items()
    }
    before = {file: file.read_text() for file in files}
    try:
        for file, value in files.items():
            file.write_text(value)
        yield
    finally:
        for file, value in before.items():
            file.write_text(value)


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    """Two networks with a VM each, 520 and 521, and a management link of the host."""
    with agent_host("eth1.1520", "eth1.1521", "eth2.101") as it:
        it.start()
        # The machines of the fabric have tables, too.
        for link in ("sw-eth1.1520", "sw-eth1.1521"):
            it.run("sysctl", "-qw", f"net/ipv6/conf/{link}/disable_ipv6=1", pid=it.fabric)
        for network in ("520", "521"):
            make_network(it, network)
        it.ip("link", "add", "mgmt", "type", "veth", "peer", "name", "sw-mgmt", "netns", str(it.fabric))
        it.run("ip", "link", "set", "sw-mgmt", "up", pid=it.fabric)
        for words in (["link", "set", "mgmt", "up"], ["addr", "add", f"{MANAGEMENT}/16", "dev", "mgmt"]):
            it.ip(*words)
        it.ip("addr", "add", f"{MANAGEMENT6}/64", "dev", "mgmt", "nodad")
        knows(it, "sw-mgmt", {MANAGEMENT, MANAGEMENT6}, it.links()["mgmt"]["address"], pid=it.fabric)
        yield it


def make_network(host: AgentHost, network: str) -> None:
    fields = {"network_id": network, "vlan": f"1{network}", **WIDE}
    for fixture, command in (("401", "implement-network"), ("021", "assign-ip"), ("402", "prepare-nic")):
        more = PUBLIC | {"public_ip": f"203.0.113.{network[1:]}"} if command == "assign-ip" else {}
        done(host.call(fixture, command, registration=WAY_OUT, **fields, **more))
    rules = {"default_egress_allow": True, "rules": []}
    done(host.call("070", "apply-fw-rules", registration=WAY_OUT, **fields, fw_rules=rules))
    host.plug(f"vm-{network}", f"breth1-1{network}", MAC, f"{VM_IP}/16")
    host.run("sysctl", "-qw", "net/ipv6/conf/all/disable_ipv6=0", namespace=f"vm-{network}")
    host.ip("addr", "add", f"{VM_IP6}/64", "dev", "eth0", "nodad", namespace=f"vm-{network}")
    mac = host.links(f"cs-net-{network}")[f"gst-{network}"]["address"]
    knows(host, "eth0", {GATEWAY, GATEWAY6}, mac, namespace=f"vm-{network}")


def knows(host: AgentHost, link: str, addresses: set[str], mac: str, namespace: str = "", pid: int = 0) -> None:
    """The clients' own tables are not under test."""
    for it in addresses:
        words = ["neigh", "replace", it, "lladdr", mac, "dev", link, "nud", "permanent"]
        host.run("ip", *words, namespace=namespace, pid=pid)


# ------------------------------------------------------------------------------------------------------------- frames


def ethernet(destination: str, kind: int, payload: bytes, source: str = MAC) -> bytes:
    ends = bytes.fromhex((destination + source).replace(":", ""))
    return (ends + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def summed(protocol: int, ends: bytes, payload: bytes, at: int) -> bytes:
    """``payload`` with the checksum at this offset (RFC 9293 section 3.1, RFC 8200 section 8.1)."""
    pseudo = ends + struct.pack("!IHBB", len(payload), 0, 0, protocol) if ends else b""
    return payload[:at] + struct.pack("!H", checksum(pseudo + payload)) + payload[at + 2 :]


def ip4(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
    return summed(0, b"", head + ends, 10) + payload


def ip6(source: str, destination: str, protocol: int, payload: bytes, checksum_at: int, hops: int = 255) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops)
    return head + ends + summed(protocol, ends, payload, checksum_at)


SYN = struct.pack("!HHIIBBHHH", 5000, 81, 1, 0, 0x50, 2, 1000, 0, 0)
ECHO, ECHO6 = (struct.pack("!BBHHH", kind, 0, 0, 7, 7) + bytes(16) for kind in (8, 128))
DATAGRAM = struct.pack("!HHHH", 5000, 9, 12, 0) + b"data"
OPTION = b"\x01\x01" + bytes.fromhex(MAC.replace(":", ""))


def fresh4(start: str = "10.50.4.0", count: int = 60_000) -> str:
    return str(IPv4Address(start) + next(numbers) % count)


def fresh6(start: str = "2001:db8:50:1:4::") -> str:
    return str(IPv6Address(start) + (next(numbers) << 20) + next(numbers))


def syn4(mac: str) -> bytes:
    source = fresh4()
    ends = socket.inet_aton(source) + socket.inet_aton(GATEWAY)
    pseudo = ends + struct.pack("!HH", 6, 20)
    segment = SYN[:16] + struct.pack("!H", checksum(pseudo + SYN)) + SYN[18:]
    return ethernet(mac, 0x0800, ip4(source, GATEWAY, 6, segment))


def echo4(mac: str) -> bytes:
    return ethernet(mac, 0x0800, ip4(fresh4(), GATEWAY, 1, summed(0, b"", ECHO, 2)))


def arp(mac: str) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + bytes.fromhex(MAC.replace(":", ""))
    asked = bytes(6) + socket.inet_aton(GATEWAY)
    return ethernet("ff" * 6, 0x0806, head + socket.inet_aton(fresh4()) + asked)


def outside4(mac: str) -> bytes:
    return ethernet(mac, 0x0800, ip4(VM_IP, fresh4("203.0.114.0", 3000), 17, DATAGRAM))


def outside6(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, ip6(VM_IP6, fresh6("2001:db8:99:0:4::"), 17, DATAGRAM, 6, 64))


def syn6(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, ip6(fresh6(), GATEWAY6, 6, SYN, 16))


def echo6(mac: str, source: str = "") -> bytes:
    return ethernet(mac, 0x86DD, ip6(source or fresh6(), GATEWAY6, 58, ECHO6, 2))


def solicitation(source: str, target: str) -> bytes:
    body = struct.pack("!BBHI", 135, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, target) + OPTION
    return ip6(source, target, 58, body, 2)


def ns_of_the_prefix(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, solicitation(fresh6(), GATEWAY6))


def ns_of_the_link(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, solicitation(fresh6("fe80::"), GATEWAY6))


def ns_of_any_prefix(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, solicitation(fresh6("2001:db8:7777::"), GATEWAY6))


def ns_of_any_prefix_outside(mac: str) -> bytes:
    return ethernet(mac, 0x86DD, solicitation(fresh6("2001:db8:7777::"), OURS))


def rs6(mac: str) -> bytes:
    body = struct.pack("!BBHI", 133, 0, 0, 0) + OPTION
    return ethernet("33:33:00:00:00:02", 0x86DD, ip6(fresh6("fe80::"), "ff02::2", 58, body, 2))


def ra6(mac: str) -> bytes:
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + OPTION
    return ethernet("33:33:00:00:00:01", 0x86DD, ip6(fresh6("fe80::"), "ff02::1", 58, body, 2))


# -------------------------------------------------------------------------------------------------------------- checks


@contextlib.contextmanager
def flooded(host: AgentHost, *kinds: Callable[[str], bytes], public: bool = False) -> Iterator[None]:
    """A flood by the VM of network 520, or by a machine in the public network, as long as the block lasts."""
    link, namespace, device = ("sw-eth2.101", "", "pub-101") if public else ("eth0", "vm-520", "gst-520")
    mac = host.links("cs-net-520")[device]["address"]
    with wire(host, link, namespace, fabric=public) as sender:

        def burst(count: int) -> None:
            for make in kinds:
                for _ in range(count):
                    sender.send(make(mac))

        def go_on() -> None:
            time.sleep(0.02)
            burst(LATER)

        burst(AT_ONCE)
        with meanwhile(go_on):
            yield


def is_answered(place: contextlib.AbstractContextManager[None], source: str, target: str, port: int) -> bool:
    with place:
        opened = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_STREAM)
    with opened:
        opened.settimeout(10)
        if source:
            opened.bind((source, 0))
        try:
            opened.connect((target, port))
        except ConnectionRefusedError:
            return True
        except OSError:  # also "no buffer space": the client is on this machine, and has the same table
            return False
        return True


def others_are_answered(host: AgentHost, *, over6: bool) -> tuple[bool, bool]:
    """Whether the VM of network 521, and a client of the host, get answers. The host has no entry for either."""
    gateway, management = (GATEWAY6, MANAGEMENT6) if over6 else (GATEWAY, MANAGEMENT)
    host.ip("neigh", "flush", "dev", "gst-521", "nud", "all", namespace="cs-net-521")
    client = fresh6("fd00:77::1:0:0:0") if over6 else fresh4("192.168.78.0", 40_000)
    more = ["nodad"] if over6 else []
    host.run("ip", "addr", "add", f"{client}/{64 if over6 else 16}", "dev", "sw-mgmt", *more, pid=host.fabric)
    return (
        is_answered(host.within("vm-521"), "", gateway, 81),
        is_answered(host.within(), client, management, PORT),
    )


def refused() -> dict[str, int]:
    """How many new neighbours the kernel has refused since its start, in all namespaces: a full table."""
    found = {}
    for table in ("arp_cache", "ndisc_cache"):
        head, *per_cpu = (it.split() for it in Path(f"/proc/net/stat/{table}").read_text().splitlines())
        found[table] = sum(int(it[head.index("table_fulls")], 16) for it in per_cpu)
    return found


ALL = (True, True)


@pytest.mark.mutation("arp-senders-have-a-bound")
def test_arp_requests_cut_nobody_off(host: AgentHost) -> None:
    before = refused()
    with flooded(host, arp):
        assert (others_are_answered(host, over6=False), refused()) == (ALL, before)


@pytest.mark.mutation("next-hops-have-a-bound")
def test_packets_to_fresh_addresses_outside_cut_nobody_off(host: AgentHost) -> None:
    before = refused()
    with flooded(host, outside4):
        assert (others_are_answered(host, over6=False), refused()) == (ALL, before)
    with flooded(host, outside6):
        assert (others_are_answered(host, over6=True), refused()) == (ALL, before)


@pytest.mark.mutation("packet-sources-have-a-bound")
def test_neighbour_solicitations_cut_nobody_off(host: AgentHost) -> None:
    before = refused()
    with flooded(host, ns_of_the_prefix):
        assert (others_are_answered(host, over6=True), refused()) == (ALL, before)


@pytest.mark.mutation("solicitations-from-outside-have-a-bound")
def test_neighbour_solicitations_from_outside_cut_nobody_off(host: AgentHost) -> None:
    before = refused()
    with flooded(host, ns_of_any_prefix_outside, public=True):
        assert (others_are_answered(host, over6=True), refused()) == (ALL, before)


def test_packets_of_all_kinds_cut_nobody_off(host: AgentHost) -> None:
    before = refused()
    with flooded(host, syn4, echo4, arp):
        assert (others_are_answered(host, over6=False), refused()) == (ALL, before)
    with flooded(host, syn6, echo6, ns_of_the_prefix, ns_of_the_link, ns_of_any_prefix, rs6, ra6):
        assert (others_are_answered(host, over6=True), refused()) == (ALL, before)


# The kernel sends the ICMPv6 messages of all namespaces through one socket of each CPU.


def other_vm_has_its_pings(host: AgentHost) -> bool:
    words = ["ping", "-6", "-c", "2", "-i", "0.2", "-W", "3", GATEWAY6]
    return " 0% packet loss" in host.run(*words, namespace="vm-521", check=False)


@pytest.mark.mutation("icmp-to-unknown-addresses-has-a-bound", instead='"counter"')
def test_pings_from_fresh_ip6_addresses_do_not_stop_the_answers_to_others(host: AgentHost) -> None:
    with one_cpu(), flooded(host, echo6):
        assert other_vm_has_its_pings(host)


@pytest.mark.mutation("few-packets-wait-for-an-ip6-neighbour", instead='"212992"')
@pytest.mark.mutation("neighbours-with-ip6-are-permanent")
def test_a_vm_that_answers_no_solicitation_does_not_stop_the_answers_to_others(host: AgentHost) -> None:
    host.run("sysctl", "-qw", "net/ipv6/conf/all/disable_ipv6=1", namespace="vm-520")
    host.ip("neigh", "flush", "dev", "gst-520", "nud", "all", namespace="cs-net-520")
    with one_cpu(), flooded(host, lambda mac: echo6(mac, VM_IP6)):
        assert other_vm_has_its_pings(host)


@pytest.mark.mutation("icmp-errors-are-not-counted-for-all", instead='"6168", "0-1,3-127"')
def test_errors_over_ip6_use_nothing_of_what_all_namespaces_share() -> None:
    """Without an uplink each packet to the outside causes an error."""
    with agent_host("eth1.1520", "eth2.101") as host:
        host.start()
        for fixture, command in (("401", "implement-network"), ("402", "prepare-nic")):
            done(host.call(fixture, command))
        host.plug("vm", "breth1-1520", MAC)
        mac = host.links("cs-net-520")["gst-520"]["address"]
        with wire(host, "eth0", "vm") as sender:
            for _ in range(200):
                sender.send(ethernet(mac, 0x86DD, ip6(fresh6(), "2001:db8:7777::1", 17, DATAGRAM, 6, 64)))
        counted = ("snmp6", "Icmp6OutDestUnreachs"), ("snmp", "Icmp:OutRateLimitGlobal")
        wait_until(lambda: sum(counter(host, *it) for it in counted) >= 200)
        assert counter(host, "snmp6", "Icmp6OutDestUnreachs") == 200
        assert counter(host, "snmp", "Icmp:OutRateLimitGlobal") == 0


def counter(host: AgentHost, file: str, name: str) -> int:
    lines = host.run("cat", f"/proc/net/{file}", namespace="cs-net-520").splitlines()
    if file == "snmp6":
        return next(int(value) for found, value in map(str.split, lines) if found == name)
    group, name = name.split(":")
    names_of, values = (it.split()[1:] for it in lines if it.startswith(f"{group}:"))
    return int(dict(zip(names_of, values, strict=True))[name])
