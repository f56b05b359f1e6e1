"""conntrack entries are listed, marked and deleted; the results are compared with the ``conntrack`` program."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import pytest

from kernel.scratch import descriptors, joined, scratch, tool
from netloom.agent.kernel import conntrack, kept
from netloom.agent.kernel.conntrack import Entry
from netloom.agent.kernel.namespaces import inside
from netloom.agent.kernel.nft import Nft

TRACK = "table inet t {\n chain c { type filter hook output priority 0; ct state new counter; }\n}\n"


@dataclass
class Link:
    """Two namespaces. ``left`` tracks its connections to ``right``, which listens on UDP 7 and TCP 7."""

    left: str
    right: str
    stack: ExitStack

    def udp(self, port: int, to: str = "10.9.0.2", dport: int = 7) -> socket.socket:
        """Send a datagram from ``port``; it is not answered."""
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        with inside(self.left):
            made = self.stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        made.bind(("", port))
        made.sendto(b"x", (to, dport))
        return made

    def tcp(self, port: int) -> socket.socket:
        with inside(self.left):
            made = self.stack.enter_context(socket.socket())
        made.bind(("10.9.0.1", port))
        made.settimeout(10)
        made.connect(("10.9.0.2", 7))
        return made


@pytest.fixture
def link() -> Iterator[Link]:
    with joined() as (left, right), ExitStack() as stack:
        with Nft(left) as nft:
            nft.run(TRACK)
        with inside(right):
            stack.enter_context(socket.create_server(("10.9.0.2", 7)))
            udp4 = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            udp6 = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        udp4.bind(("10.9.0.2", 7))
        udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        udp6.bind(("fd09::2", 7))
        yield Link(left, right, stack)


def by_port(namespace: str) -> dict[int, Entry]:
    return {entry.sport: entry for entry in conntrack.dump(namespace) if entry.sport}


def conntrack_marks(namespace: str) -> dict[str, int]:
    """Marks as the ``conntrack`` program lists them, by protocol and source port, for example "udp 1001"."""
    found = (re.match(r"(\w+) .*? sport=(\d+) .*mark=(\d+)", line) for line in _listed(namespace).splitlines())
    return {f"{it[1]} {it[2]}": int(it[3]) for it in found if it}


def _listed(namespace: str) -> str:
    # Some versions of conntrack list both families for each option -f, so entries may be listed twice.
    return "".join(tool(namespace, "conntrack", "-L", "-f", family, "-o", "id") for family in ("ipv4", "ipv6"))


def test_open_connections_are_listed_as_conntrack_lists_them(link: Link) -> None:
    link.udp(1001)
    link.udp(1002, "fd09::2")
    link.tcp(1003)
    tool(link.left, "ping", "-c", "1", "-W", "5", "10.9.0.2")
    tool(link.left, "ping", "-6", "-c", "1", "-W", "5", "fd09::2")
    entries = conntrack.dump(link.left)
    known = by_port(link.left)

    udp, udp6, tcp = known[1001], known[1002], known[1003]
    assert (udp.protocol, udp.src, udp.dst, udp.dport) == (17, "10.9.0.1", "10.9.0.2", 7)
    assert (udp.reply_src, udp.reply_dst, udp.reply_sport, udp.reply_dport) == ("10.9.0.2", "10.9.0.1", 7, 1001)
    assert not udp.status & conntrack.SEEN_REPLY
    assert (udp6.protocol, udp6.src, udp6.dst, udp6.family) == (17, "fd09::1", "fd09::2", socket.AF_INET6)
    assert (tcp.protocol, tcp.dport) == (6, 7)
    assert tcp.status & conntrack.SEEN_REPLY
    assert tcp.timeout > 3600
    icmp = [it for it in entries if it.protocol == 1]
    assert [(it.src, it.dst, it.icmp_type, it.icmp_code, it.sport) for it in icmp] == [
        ("10.9.0.1", "10.9.0.2", 8, 0, 0)
    ]
    # conntrack ignores neighbour discovery and tracks the echo.
    icmp6 = [it for it in entries if it.protocol == 58]
    assert [(it.dst, it.icmp_type) for it in icmp6] == [("fd09::2", 128)]

    assert conntrack_marks(link.left).keys() == {"udp 1001", "udp 1002", "tcp 1003"}
    ids = set(re.findall(r"use=\d+ id=(\d+)", _listed(link.left)))
    assert {str(it.id) for it in entries} == ids
    assert conntrack.count(link.left) == len(entries) == 5


def test_translated_addresses_appear_in_the_reply_direction(link: Link) -> None:
    with Nft(link.left) as nft:
        nft.run(
            "table ip nat {\n"
            " chain out { type nat hook output priority -100; ip daddr 192.0.2.1 udp dport 9 dnat to 10.9.0.2:7; }\n"
            " chain post { type nat hook postrouting priority 100; udp sport 1004 snat to 10.9.0.1:2004; }\n"
            "}\n"
        )
    tool(link.left, "ip", "route", "add", "192.0.2.1", "via", "10.9.0.2")
    link.udp(1004, "192.0.2.1", 9)
    entry = by_port(link.left)[1004]
    assert (entry.dst, entry.dport) == ("192.0.2.1", 9)
    assert (entry.reply_src, entry.reply_sport, entry.reply_dport) == ("10.9.0.2", 7, 2004)
    assert entry.status & conntrack.DST_NAT
    assert entry.status & conntrack.SRC_NAT
    assert conntrack.delete(link.left, [entry]) == 1


def test_only_the_given_connections_are_deleted(link: Link) -> None:
    for port in (1001, 1002):
        link.udp(port)
        link.udp(port + 1000, "fd09::2")
    link.tcp(1003)
    known = by_port(link.left)
    assert conntrack.delete(link.left, [known[1001], known[2002], known[1003]]) == 3
    assert conntrack_marks(link.left).keys() == {"udp 1002", "udp 2001"}
    assert conntrack.delete(link.left, [known[1001], known[1002], known[1003]]) == 1
    assert conntrack.delete(link.left, []) == 0


def test_a_connection_with_another_id_is_not_deleted(link: Link) -> None:
    link.udp(1001)
    entry = by_port(link.left)[1001]
    another = msgspec.structs.replace(entry, id=entry.id ^ 1)
    assert conntrack.delete(link.left, [another]) == 0
    assert conntrack.delete(link.left, [entry]) == 1


def test_icmp_echo_entries_are_deleted(link: Link) -> None:
    for address in ("10.9.0.2", "fd09::2"):
        tool(link.left, "ping", "-c", "1", "-W", "5", address)
    entries = conntrack.dump(link.left)
    assert conntrack.delete(link.left, entries) == len(entries) == 2
    assert conntrack.dump(link.left) == []


def test_marks_are_written_under_their_mask(link: Link) -> None:
    for port in (1001, 1002):
        link.udp(port)
    known = by_port(link.left)
    assert conntrack.set_mark(link.left, known.values(), 0x00010007, 0xFFFFFFFF) == 2
    assert conntrack.set_mark(link.left, [known[1001]], 0x80000000, 0x80000000) == 1
    assert {port: entry.mark for port, entry in by_port(link.left).items()} == {1001: 0x80010007, 1002: 0x00010007}
    assert conntrack_marks(link.left) == {"udp 1001": 0x80010007, "udp 1002": 0x00010007}
    assert conntrack.set_mark(link.left, [known[1001]], 0, 0x80000000) == 1
    assert by_port(link.left)[1001].mark == 0x00010007
    conntrack.delete(link.left, [known[1002]])
    assert conntrack.set_mark(link.left, known.values(), 1) == 1


def test_a_dump_may_be_filtered_by_mark(link: Link) -> None:
    for port in (1001, 1002, 1003):
        link.udp(port)
    known = by_port(link.left)
    conntrack.set_mark(link.left, [known[1001]], 0x00010007)
    conntrack.set_mark(link.left, [known[1002]], 0x00020007)
    assert [it.sport for it in conntrack.dump(link.left, mark=0x00010000, mask=0x00030000)] == [1001]
    assert {it.sport for it in conntrack.dump(link.left, mark=7, mask=0xFFFF)} == {1001, 1002}
    assert [it.sport for it in conntrack.dump(link.left, mark=0, mask=0xFFFF)] == [1003]


def test_the_same_tuple_in_another_zone_is_another_connection(link: Link) -> None:
    with Nft(link.left) as nft:
        nft.run("table inet z {\n chain c { type filter hook output priority -300; udp dport 8 ct zone set 5; }\n}\n")
    link.udp(1001, dport=8)
    entry = by_port(link.left)[1001]
    assert entry.zone == 5
    assert conntrack.delete(link.left, [msgspec.structs.replace(entry, zone=0)]) == 0
    assert conntrack.set_mark(link.left, [entry], 3) == 1
    assert conntrack.delete(link.left, [entry]) == 1


def test_deleting_entries_of_one_namespace_keeps_those_of_another(link: Link) -> None:
    with scratch() as other:
        made = "-I -p udp -s 192.0.2.1 -d 192.0.2.2 --sport 1 --dport 2 -t 99"
        tool(other, "conntrack", *made.split())
        link.udp(1001)
        link.udp(1002, "fd09::2")
        conntrack.delete(link.left, conntrack.dump(link.left))
        assert (conntrack.count(link.left), conntrack.count(other)) == (0, 1)
        assert conntrack.dump(link.left) == []


def test_thousands_of_connections_are_listed_and_deleted(link: Link) -> None:
    with inside(link.left):
        sender = link.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    for port in range(1, 5001):
        sender.sendto(b"", ("127.0.0.1", port))
    entries = conntrack.dump(link.left)
    assert {it.dport for it in entries} >= set(range(1, 5001))
    assert conntrack.delete(link.left, entries) == len(entries)
    assert conntrack.count(link.left) == 0


def test_no_file_descriptor_leaks(link: Link) -> None:
    link.udp(1001)
    time.sleep(2 * kept.KEPT_S)  # until no earlier test has left a socket
    before = descriptors()
    for _ in range(20):
        entries = conntrack.dump(link.left)
        conntrack.set_mark(link.left, entries, 1)
        conntrack.count(link.left)
    conntrack.delete(link.left, entries)
    kept.forget(link.left)
    assert descriptors() == before
