"""What has changed in a namespace since its connections were listed: they are looked up one by one, or listed again."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kernel.scratch import scratch, tool
from netloom.agent.kernel import conntrack_changes, conntrack_copy, netlink
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Difference, Record
from netloom.agent.kernel.namespaces import inside
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.nft import Nft

TRACK = (
    "table inet t {\n chain n { type nat hook postrouting priority 100; }\n"
    " chain c { type filter hook output priority 0; ct state new counter; }\n}\n"
)


def connection(port: int, mark: int = 0, zone: int = 0) -> Record:
    """An open TCP connection of 10.1.1.11, by source NAT."""
    at, to, public = (socket.inet_aton(it) for it in ("10.1.1.11", "192.0.2.10", "203.0.113.20"))
    sport, dport = port.to_bytes(2, "big"), (80).to_bytes(2, "big")
    head = bytes((0x84, 6)) + zone.to_bytes(2, "big")
    state = bytes((0x0E, 3, 7, 9, 3, 3)) + mark.to_bytes(4, "big") + (432000).to_bytes(4, "big")
    return Record(head + at + to + sport + dport + to + public + dport + sport + state)


@pytest.fixture
def namespace() -> Iterator[str]:
    """Three open connections, a datagram without an answer and a ping, which are not copied."""
    with scratch() as name:
        with Nft(name) as nft:
            nft.run(TRACK)
        with inside(name), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            udp.sendto(b"x", udp.getsockname())
        tool(name, "ping", "-c1", "127.0.0.1")
        have(name, *map(connection, (1, 2, 3)))
        yield name


def have(namespace: str, *records: Record) -> None:
    assert conntrack_copy.create(namespace, records) == conntrack_copy.Created(len(records))


def looked_up(namespace: str, before: Listing) -> int | None:
    """How many connections are found without a listing; None: the namespace must be listed."""
    with Socket(netlink.NETLINK_NETFILTER, namespace) as ctnetlink:
        found = before.looked_up(ctnetlink)
    return None if found is None else len(found)


def ports(changed: Difference) -> tuple[list[int], list[int]]:
    """The ports of connections that a target must delete, and of those that it must create."""
    deleted, created = (
        sorted(int.from_bytes(it[12:14], "big") for it in records) for records in (changed.delete, changed.create)
    )
    return deleted, created


def test_connections_of_a_small_table_are_looked_up(namespace: str) -> None:
    before = conntrack_changes.listing(namespace)
    assert len(before.records) == 3
    assert looked_up(namespace, before) == 5
    conntrack_copy.delete(namespace, [connection(1), connection(2)])
    assert looked_up(namespace, before) == 3
    assert ports(conntrack_changes.changes(namespace, before)) == ([1, 2], [])


def test_a_changed_connection_is_found_by_its_lookup(namespace: str) -> None:
    before = conntrack_changes.listing(namespace)
    conntrack_copy.delete(namespace, [connection(2)])
    have(namespace, connection(2, mark=7))
    assert looked_up(namespace, before) == 5
    changed = conntrack_changes.changes(namespace, before)
    assert ports(changed) == ([2], [2])
    assert changed.create[0][:-4] == connection(2, mark=7)[:-4]


@pytest.mark.mutation("new-connections-are-listed", instead="found")
def test_a_new_connection_is_found_though_another_one_has_ended(namespace: str) -> None:
    before = conntrack_changes.listing(namespace)
    conntrack_copy.delete(namespace, [connection(1)])
    have(namespace, connection(9))
    assert looked_up(namespace, before) is None
    assert ports(conntrack_changes.changes(namespace, before)) == ([1], [9])


def test_more_connections_than_before_are_listed(namespace: str) -> None:
    before = conntrack_changes.listing(namespace)
    have(namespace, connection(9), connection(10, zone=5))
    assert looked_up(namespace, before) is None
    assert ports(conntrack_changes.changes(namespace, before)) == ([], [9, 10])


def test_zones_are_told_apart(namespace: str) -> None:
    have(namespace, connection(1, zone=5))
    before = conntrack_changes.listing(namespace)
    assert looked_up(namespace, before) is None, "two connections have the same original direction"
    conntrack_copy.delete(namespace, [connection(1, zone=5)])
    changed = conntrack_changes.changes(namespace, before)
    assert [it[:-4] for it in changed.delete] == [connection(1, zone=5)[:-4]]


def test_many_connections_are_listed(namespace: str) -> None:
    have(namespace, *map(connection, range(100, 1000)))
    before = conntrack_changes.listing(namespace)
    assert looked_up(namespace, before) is None
    conntrack_copy.delete(namespace, [connection(500)])
    have(namespace, connection(2000))
    assert ports(conntrack_changes.changes(namespace, before)) == ([500], [2000])


def test_without_an_earlier_listing_all_are_new(namespace: str) -> None:
    assert ports(conntrack_changes.changes(namespace, Listing())) == ([], [1, 2, 3])
    with scratch() as empty:
        assert conntrack_changes.changes(empty, Listing()) == Difference(delete=[], create=[])
