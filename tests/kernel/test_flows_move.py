"""Open connections go on when a network moves to another host and its connection tracking was copied.

There are two devices with the same scope (:class:`SecondDevice`). Connections are opened through the first one, its
table is copied, and the VMs and the outside are connected to the second one.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from kernel.open_flows import (
    BULK,
    KINDS,
    PREFIX_A,
    PREFIX_B,
    PROTOCOLS,
    QUIET_S,
    SCOPE,
    Kind,
    Open,
    asked,
    datagrams,
    delivers,
    give_ip6,
    open_all,
    opener,
    tiers,
)
from kernel.ruleset_lab import CLIENT, CLIENT2, PATIENCE_S, STRANGER, Lab, echoes
from kernel.second_device import SecondDevice
from kernel.vpc_lab import BALANCED, HOMES, VpcLab
from netloom.agent.host import flows
from netloom.agent.kernel import conntrack, conntrack_copy, tcp_sockets
from netloom.render.flows import FlowPolicy
from netloom.render.marks import REVOKED, exit_of
from netloom.state import Backend, LbRule
from netns import inside
from unit.scopes import A1, A2, B1, GATEWAY, VM1


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with VpcLab() as lab:
        give_ip6(lab)
        lab.serve("dev", "tcp", 80)
        lab.serve("dev", "tcp", BALANCED)
        lab.serve("inet", "tcp", 22, STRANGER)
        yield lab


@pytest.fixture
def connect(lab: Lab) -> Iterator[Open]:
    with opener(lab) as connect:
        yield connect


@pytest.fixture
def other(lab: Lab) -> Iterator[SecondDevice]:
    with SecondDevice(lab) as other:
        yield other


class Transfers:
    """Connections whose ends both send and read without a pause, in a thread of their own."""

    ENOUGH = 8 << 20  # bytes that arrive after the move: more than the receive buffer can have held before

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._read: dict[socket.socket, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, one: socket.socket, other: socket.socket) -> None:
        for end in (one, other):
            end.setblocking(False)
            self._read[end] = 0
            self._selector.register(end, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def __enter__(self) -> Transfers:
        return self

    def start(self) -> None:
        self._thread.start()
        assert self.go_on(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._selector.close()

    def _run(self) -> None:
        block = bytes(1 << 16)
        while not self._stop.is_set():
            for key, events in self._selector.select(0.1):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                try:
                    if events & selectors.EVENT_READ:
                        self._read[end] += len(end.recv(1 << 20))
                    if events & selectors.EVENT_WRITE:
                        end.send(block)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    self._selector.unregister(end)  # it does not go on

    def go_on(self, patience_s: float) -> bool:
        """Whether each end receives ``ENOUGH`` bytes from now on."""
        until = time.monotonic() + patience_s
        wanted = {end: read + self.ENOUGH for end, read in self._read.items()}
        while any(self._read[end] < count for end, count in wanted.items()):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True


def copied(lab: Lab, other: SecondDevice) -> conntrack_copy.Created:
    """Copy the table of the first device, as two hosts do it."""
    chunks = conntrack_copy.encode(flows.listing(lab.ns("dev")).records)
    created = [conntrack_copy.create(other.namespace, conntrack_copy.decode(it)) for it in chunks]
    assert len(created) == 1
    return created[0]


# ----------------------------------------------------------------------------------------------------- translations


def _move(lab: Lab, other: SecondDevice, connect: Open, *names: str) -> None:
    """Assert that connections of these kinds go on at the other host."""
    lab.renew(SCOPE)
    other.apply(SCOPE)
    goes_on = open_all(connect, {it: KINDS[it] for it in names})
    assert copied(lab, other) == conntrack_copy.Created(standing=len(goes_on))
    strays = lab.foreign_source_packets()
    other.take_over()
    assert asked(goes_on, PATIENCE_S) == dict.fromkeys(goes_on, True)
    assert lab.foreign_source_packets() == strays
    # They are ordinary connections of the scope: the next check keeps them.
    assert flows.enforce(other.namespace, None, SCOPE).ended == 0


def test_open_connections_of_all_kinds_go_on_at_the_other_host(lab: Lab, other: SecondDevice, connect: Open) -> None:
    _move(lab, other, connect, *KINDS)


@pytest.mark.mutation("a-translated-source-is-copied")
def test_connections_of_guests_keep_their_source_address(lab: Lab, other: SecondDevice, connect: Open) -> None:
    _move(lab, other, connect, "source NAT", "outward by static NAT")


@pytest.mark.mutation("a-translated-destination-is-copied")
def test_connections_from_outside_keep_their_guest(lab: Lab, other: SecondDevice, connect: Open) -> None:
    _move(lab, other, connect, "static NAT", "port forward", "hairpin")


@pytest.mark.mutation("a-mark-is-copied")
def test_connections_keep_their_exit(lab: Lab, other: SecondDevice, connect: Open) -> None:
    _move(lab, other, connect, "port forward of another exit")


def test_connections_that_are_not_copied_do_not_go_on(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    goes_on = open_all(connect, KINDS)
    other.take_over()
    assert asked(goes_on, QUIET_S) == dict.fromkeys(goes_on, False)


@pytest.mark.mutation("windows-of-copied-connections-are-not-checked", instead="0")
@pytest.mark.mutation("window-scales-are-in-force", instead="0")
@pytest.mark.parametrize("liberal", ["0", "1"])
def test_transfers_under_way_go_on(lab: Lab, other: SecondDevice, connect: Open, liberal: str) -> None:
    """The segments that are lost in the move are sent again. Also where the sysctl tells conntrack to check windows."""
    lab.renew(SCOPE)
    other.apply(SCOPE)
    with inside(other.namespace):
        Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal").write_text(liberal)
    with Transfers() as transfers:
        for kind in KINDS.values():
            transfers.add(*connect(kind, BULK))
        transfers.start()
        other.close_first()
        assert not transfers.go_on(QUIET_S)
        copied(lab, other)
        other.take_over()
        assert transfers.go_on(PATIENCE_S)


def test_a_connection_that_the_client_has_closed_in_one_direction_goes_on(
    lab: Lab, other: SecondDevice, connect: Open
) -> None:
    """The client has sent its request and waits for the rest of the answer."""
    lab.renew(SCOPE)
    other.apply(SCOPE)
    client, server = connect(KINDS["port forward"], 0)
    client.shutdown(socket.SHUT_WR)
    server.settimeout(PATIENCE_S)
    assert server.recv(10) == b""
    copied(lab, other)
    other.take_over()
    assert delivers(server, client)
    server.close()
    assert client.recv(10) == b""


@pytest.mark.mutation("a-copied-connection-is-assured")
def test_copied_connections_are_kept_when_the_table_is_full(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    connect(KINDS["source NAT"], 0)
    copied(lab, other)
    there = [it for it in conntrack.dump(other.namespace) if it.protocol == 6]
    assert [it.status & 0xE for it in there] == [conntrack.SEEN_REPLY | conntrack.ASSURED | conntrack.CONFIRMED]


# ------------------------------------------------------------------------------------------------------------ tiers


def test_connections_betweentiers_go_on_over_both_families(lab: Lab, other: SecondDevice, connect: Open) -> None:
    scope = tiers({"310": PREFIX_A, "311": PREFIX_B})
    lab.renew(scope)
    other.apply(scope)
    over_ip4 = Kind("a1", HOMES["b1"], "80{n}1", "b1", "80{n}1")
    over_ip6 = Kind("b1", f"{PREFIX_A}31", "80{n}2", "a1", "80{n}2", bind="::")
    goes_on = open_all(connect, {"over IPv4": over_ip4, "over IPv6": over_ip6})
    listed = flows.listing(lab.ns("dev")).records
    assert sorted({len(it) for it in listed if it[1] == 6}) == [30, 54]
    copied(lab, other)
    other.take_over()
    assert asked(goes_on, PATIENCE_S) == dict.fromkeys(goes_on, True)


# -------------------------------------------------------------------------------------------------- other protocols


@pytest.mark.parametrize("copies", [True, False])
def test_the_outside_still_reaches_a_guest_that_has_had_a_reply(lab: Lab, other: SecondDevice, copies: bool) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    with contextlib.ExitStack() as stack:
        opened = {name: datagrams(lab, number, stack) for name, number in PROTOCOLS.items()}
        assert all(it.reaches_guest(PATIENCE_S) for it in opened.values())
        if copies:
            assert copied(lab, other).standing == len(opened)
        other.take_over()
        patience_s = PATIENCE_S if copies else QUIET_S
        assert {name: it.reaches_guest(patience_s) for name, it in opened.items()} == dict.fromkeys(opened, copies)


def test_a_server_answers_a_datagram_that_came_through_the_other_host(lab: Lab, other: SecondDevice) -> None:
    """Without the entry the answer would have another source address and port."""
    lab.renew(SCOPE)
    other.apply(SCOPE)
    with lab.open_socket("inet", socket.SOCK_DGRAM) as client, lab.open_socket("vm1", socket.SOCK_DGRAM) as server:
        client.bind((CLIENT, 0))
        client.connect((A1.address, 53))
        server.bind(("", 5300))
        for end in (client, server):
            end.settimeout(PATIENCE_S)
        client.send(b"first")
        data, peer = server.recvfrom(100)
        server.sendto(data, peer)
        assert client.recv(100) == b"first"
        client.send(b"second")
        assert server.recv(100) == b"second"
        copied(lab, other)
        other.take_over()
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"


def test_flows_that_cannot_go_on_are_not_copied(lab: Lab, other: SecondDevice, connect: Open) -> None:
    """Half-open and closed TCP, flows without a reply, pings, and connections with a conntrack helper."""
    scope = replace(SCOPE, helpers=("ftp",))
    lab.renew(scope)
    with contextlib.ExitStack() as stack:
        ping = stack.enter_context(lab.open_socket("vm1", socket.SOCK_DGRAM, socket.IPPROTO_ICMP))
        ping.settimeout(PATIENCE_S)
        ping.sendto(b"\x08" + bytes(15), (STRANGER, 0))
        assert ping.recv(100)
        unanswered = stack.enter_context(lab.open_socket("vm1", socket.SOCK_DGRAM))
        unanswered.sendto(b"?", (CLIENT2, 6001))
        half_open = stack.enter_context(lab.open_socket("vm1", socket.SOCK_STREAM))
        half_open.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            half_open.connect(("192.0.2.77", 9))  # nobody has this address
        closed = stack.enter_context(lab.open_socket("vm1", socket.SOCK_STREAM))
        with contextlib.suppress(ConnectionRefusedError):
            closed.connect((STRANGER, 9))
        connect(Kind("vm1", STRANGER, "21", "inet", "21", bind=STRANGER), 0)
        entries = conntrack.dump(lab.ns("dev"))
        assert {(it.protocol, it.dport) for it in entries} >= {(1, 0), (17, 6001), (6, 9), (6, 21)}
        assert flows.listing(lab.ns("dev")).records == []


# ------------------------------------------------------------------------------------------- what is not allowed


@pytest.mark.mutation("a-revoked-flow-stays-revoked-elsewhere", instead="conntrack_changes.listing(namespace)")
@pytest.mark.parametrize("answered", [True, False])
def test_a_revoked_flow_stays_revoked_at_the_other_host(lab: Lab, other: SecondDevice, answered: bool) -> None:
    """The guest continues a conversation whose port forward was removed. Its datagrams would open the flow again."""
    lab.renew(replace(SCOPE, static_nats={}))
    revoked = replace(SCOPE, static_nats={}, port_forwards={})
    with lab.open_socket("inet", socket.SOCK_DGRAM) as client, lab.open_socket("vm1", socket.SOCK_DGRAM) as guest:
        client.bind((CLIENT, 5301))
        client.connect((A1.address, 53))
        guest.bind(("", 5300))
        guest.settimeout(PATIENCE_S)
        client.send(b"hello")
        _, peer = guest.recvfrom(100)
        if answered:
            guest.sendto(b"hello", peer)
            client.settimeout(PATIENCE_S)
            assert client.recv(100) == b"hello"
        lab.apply(revoked)
        assert [it.mark & REVOKED for it in conntrack.dump(lab.ns("dev")) if it.protocol == 17] == [REVOKED]
        other.apply(revoked)
        assert copied(lab, other).standing == 1
        other.take_over()
        guest.sendto(b"more", peer)
        # Of another flow, in the same direction, so that the one before would have arrived by now.
        with lab.open_socket("inet", socket.SOCK_DGRAM) as witness:
            witness.bind((CLIENT, 5302))
            witness.settimeout(PATIENCE_S)
            guest.sendto(b"seen", (CLIENT, 5302))
            assert witness.recv(100) == b"seen"
        there = [it for it in conntrack.dump(other.namespace) if it.protocol == 17 and it.mark & REVOKED]
        assert [(it.src, it.dst, exit_of(it.mark)) for it in there] == [(CLIENT, A1.address, A1.exit)]
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(100)
        assert FlowPolicy(revoked).action(there[0]) == "keep"


def test_a_copied_flow_whose_rule_is_gone_ends_at_the_other_host(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    now = replace(
        SCOPE, port_forwards={key: it for key, it in SCOPE.port_forwards.items() if it.public_ip != A1.address}
    )
    other.apply(now)
    ends = connect(KINDS["port forward"], 0)
    stays = connect(KINDS["port forward of another exit"], 0)
    copied(lab, other)
    assert flows.enforce(other.namespace, SCOPE, now).ended == 1
    other.take_over()
    assert not delivers(*ends, QUIET_S)
    assert delivers(*stays)


@pytest.mark.parametrize(
    ("space", "target", "port", "source"),
    [("vm1", GATEWAY, 80, ""), ("inet", B1.address, BALANCED, CLIENT)],
    ids=["of a guest", "from outside"],
)
def test_a_connection_to_a_host_process_is_reset_at_the_other_host(
    lab: Lab, other: SecondDevice, space: str, target: str, port: int, source: str
) -> None:
    """A server on the device takes the place of haproxy. It has no socket on the other host."""
    rule = LbRule(rule_id=1, public_ip=B1.address, public_port=BALANCED, protocol="tcp", algorithm="roundrobin",
                  backends=(Backend(ip=VM1, port=80),), network_id="204")  # fmt: skip
    scope = replace(SCOPE, lb_rules={"1": rule})
    lab.renew(scope)
    other.apply(scope)
    with lab.connect(space, target, port, source) as client, lab.connect("vm1", STRANGER, 22) as through:
        copied(lab, other)
        other.take_over()
        client.settimeout(PATIENCE_S)
        client.sendall(b"more")
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        assert echoes(through)


def test_a_client_that_waits_for_a_host_process_is_reset_before_the_move(lab: Lab, other: SecondDevice) -> None:
    """It sends nothing to which the other host could answer."""
    lab.renew(SCOPE)
    other.apply(SCOPE)
    with lab.connect("vm1", GATEWAY, 80) as client, lab.connect("vm1", STRANGER, 22) as through:
        assert tcp_sockets.reset_connections(lab.ns("dev"))
        client.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        assert copied(lab, other).standing == 1
        other.take_over()
        assert echoes(through)


# ------------------------------------------------------------------------------------------------- the last copy


@pytest.mark.mutation("a-changed-connection-is-created-anew")
def test_the_last_copy_has_only_what_changed(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    stays, changes, ends = (connect(KINDS["port forward"], case) for case in range(3))
    before = flows.listing(lab.ns("dev")).records
    assert conntrack_copy.create(other.namespace, before).standing == 3
    opened = connect(KINDS["static NAT"], 0)
    changes[0].shutdown(socket.SHUT_WR)
    assert changes[1].recv(10) == b""
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
    other.close_first()
    now = flows.listing(lab.ns("dev")).records
    assert len(now) == 3
    missing = conntrack_copy.difference(before, now)
    assert (len(missing.delete), len(missing.create)) == (2, 2)
    assert conntrack_copy.delete(other.namespace, missing.delete) == 2
    assert conntrack_copy.create(other.namespace, missing.create) == conntrack_copy.Created(standing=2)
    there = flows.listing(other.namespace).records
    assert conntrack_copy.difference(now, there) == conntrack_copy.Difference(delete=[], create=[])
    other.take_over()
    assert delivers(*stays) and delivers(*opened) and delivers(changes[1], changes[0])


@pytest.mark.mutation("a-refused-connection-is-counted")
def test_a_refused_connection_does_not_stop_the_others(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    connect(KINDS["source NAT"], 0)
    connect(KINDS["static NAT"], 0)
    first, second = sorted(flows.listing(lab.ns("dev")).records, key=conntrack_copy.described)
    state = first[-14:]
    unconfirmed = conntrack_copy.Record(first[:-14] + bytes((state[0] & ~conntrack.CONFIRMED,)) + state[1:])
    created = conntrack_copy.create(other.namespace, [unconfirmed, second, second])
    assert (created.standing, created.refused) == (2, 1)
    assert created.reason == f"{conntrack_copy.described(first)}: Device or resource busy"
    assert created.reason.startswith(f"6 {VM1}:")
    assert [it.dst for it in conntrack.dump(other.namespace) if it.protocol == 6] == [A2.address]
    assert conntrack_copy.create(other.namespace, []) == conntrack_copy.Created(standing=0)
    assert conntrack_copy.delete(other.namespace, [first, second]) == 1
    assert conntrack_copy.delete(other.namespace, []) == 0


def test_a_large_table_is_copied_whole(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    connect(KINDS["static NAT"], 0)
    (one,) = flows.listing(lab.ns("dev")).records
    ports = slice(4 + 8, 4 + 10), slice(4 + 12 + 10, 4 + 12 + 12)  # of the client, in both tuples
    many = []
    for port in range(1024, 1024 + 15000):
        record = bytearray(one)
        for it in ports:
            record[it] = port.to_bytes(2, "big")
        many.append(conntrack_copy.Record(bytes(record)))
    assert conntrack_copy.create(other.namespace, many) == conntrack_copy.Created(standing=len(many))
    chunks = conntrack_copy.encode(flows.listing(other.namespace).records)
    assert len(chunks) == 2
    back = [record for it in chunks for record in conntrack_copy.decode(it)]
    assert {it[:-4] for it in back} == {it[:-4] for it in many}
    assert conntrack_copy.delete(other.namespace, back) == len(many)
