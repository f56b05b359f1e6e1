"""A standby has the connections of the active host all the time: reports of the kernel, and copies made from them."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from kernel.open_flows import (
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
from kernel.replica import Replica, eventually, table
from kernel.ruleset_lab import PATIENCE_S, Lab, run
from kernel.scratch import scratch, tool
from kernel.second_device import SecondDevice
from kernel.vpc_lab import HOMES, VpcLab
from netloom.agent.kernel import conntrack, conntrack_copy, namespaces, sysctl
from netloom.agent.kernel.conntrack_changes import list_records
from netloom.agent.kernel.conntrack_copy import Record, key_of, timeout_of
from netloom.agent.kernel.conntrack_events import REPLICATED, ConntrackEvents, connection_socket
from netloom.agent.kernel.nft import Nft
from netloom.agent.log import Log
from netloom.agent.standby import flows as standby_flows
from netloom.agent.standby.flows import KEPT_S, SETTLED_S, FlowSink
from netloom.render.marks import REVOKED
from netns import inside
from unit.scopes import A1

TRACK = (
    "table inet t {\n chain n { type nat hook postrouting priority 100; }\n"
    " chain c { type filter hook output priority 0; ct state new counter; }\n}\n"
)
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@contextlib.contextmanager
def tracking() -> Iterator[str]:
    """A namespace that tracks connections."""
    with scratch() as name:
        track(name)
        yield name


def track(name: str) -> None:
    with Nft(name) as nft:
        nft.run(TRACK)
    # Entries of closed connections stay until the test has looked at them.
    sysctl.write(name, {"net.netfilter.nf_conntrack_tcp_timeout_close": "120"})


class Ends:
    """Both ends of a TCP connection of a namespace with itself."""

    def __init__(self, namespace: str, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(namespace), socket.create_server((address, 0), family=family) as server:
            self.client = socket.create_connection(server.getsockname()[:2])
            self.server = server.accept()[0]
        self.port = self.client.getsockname()[1]

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Each end closes, so the kernel keeps the entry for a while."""
        self.client.close()
        self.server.close()

    def reset(self) -> None:
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        self.close()


def conversation(namespace: str) -> None:
    """An UDP conversation that has had a reply, and is too young to be assured."""
    with inside(namespace):
        ends = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for it in ends:
        it.bind(("127.0.0.1", 0))
        it.settimeout(PATIENCE_S)
    for one, other in (ends, ends[::-1]):
        one.sendto(b"x", other.getsockname())
        other.recv(10)
    for it in ends:
        it.close()


def ports(records: Iterator[Record] | list[Record]) -> list[int]:
    """The source ports of IPv4 and IPv6 connections that are not translated."""
    return sorted(int.from_bytes(it[-18:-16], "big") for it in records)


def read(events: ConntrackEvents) -> dict[str, tuple[list[int], list[int]]]:
    """The source ports of the connections that were opened, and of those that have ended, by namespace."""
    found = events.read().by_namespace
    return {
        name: (ports(list(create.values())), ports(list(delete.values()))) for name, (delete, create) in found.items()
    }


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """The namespace that listens: it does not hear what else happens on the machine."""
    with scratch() as name:
        yield name


@pytest.fixture
def events(host: str) -> Iterator[ConntrackEvents]:
    events = ConntrackEvents(marked=REVOKED, host=host)
    yield events
    events.close()


def follow(events: ConntrackEvents, *wanted: str) -> frozenset[str]:
    """Follow them; returns those that are new."""
    events.follow(wanted)
    return events.read().started


# ---------------------------------------------------------------------------------------------------------- reports


@pytest.mark.mutation("connections-are-reported-in-each-namespace")
def test_namespaces_are_told_apart(events: ConntrackEvents) -> None:
    with tracking() as one, tracking() as other, tracking() as foreign:
        for name in (one, other):
            sysctl.write(name, {"net.netfilter.nf_conntrack_events": "0"})
        assert follow(events, one, other, "no-such-namespace") == {one, other}
        assert events.missing([one, "no-such-namespace"]) == {"no-such-namespace"}
        with Ends(one) as first, Ends(other, "::1") as second, Ends(one) as third, Ends(foreign):
            assert read(events) == {one: (sorted([first.port, third.port]), []), other: ([second.port], [])}
            assert follow(events, other, foreign) == {foreign}
            with Ends(one), Ends(foreign) as fourth:
                assert read(events) == {foreign: ([fourth.port], [])}


@pytest.mark.mutation("closed-connections-are-reported-once")
def test_a_closed_connection_is_reported_once(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        for end in (Ends.close, Ends.reset):
            ends = Ends(name)
            assert read(events) == {name: ([ends.port], [])}
            end(ends)
            assert read(events) == {name: ([], [ends.port])}
        assert conntrack.delete(name, conntrack.dump(name)) == 2
        assert read(events) == {}


def test_a_half_closed_connection_is_no_report(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        with Ends(name) as ends:
            read(events)
            ends.client.shutdown(socket.SHUT_WR)
            assert ends.server.recv(1) == b""
            assert read(events) == {}
            conntrack.delete(name, conntrack.dump(name))
            assert read(events) == {name: ([], [ends.port])}


@pytest.mark.mutation("only-assured-connections-are-reported")
def test_conversations_without_a_future_are_not_reported(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        conversation(name)
        tool(name, "ping", "-c1", "127.0.0.1")
        assert conntrack.delete(name, conntrack.dump(name)) == 2
        assert events.read().by_namespace == {}


def test_a_marked_connection_is_reported_in_all_states(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        conversation(name)
        tool(name, "ping", "-c1", "127.0.0.1")
        entries = conntrack.dump(name)
        conntrack.set_mark(name, entries, REVOKED, REVOKED)
        (port,) = (it.sport for it in entries if it.protocol == socket.IPPROTO_UDP)
        assert read(events) == {name: ([port], [])}
        assert conntrack.delete(name, entries) == 2
        assert read(events) == {name: ([], [port])}


@pytest.mark.mutation("own-changes-of-connections-are-not-reported")
def test_copies_are_not_reported(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        with Ends(name) as ends:
            ((_, created),) = events.read().by_namespace.values()
            with connection_socket(name) as ctnetlink:
                conntrack_copy.replicate(ctnetlink, list(created.values()), [])
                assert table(name) == set()
                conntrack_copy.replicate(ctnetlink, [], list(created.values()))
                conntrack_copy.set_timeouts(ctnetlink, list(created.values()), 77)
                assert [it.sport for it in conntrack.dump(name) if it.timeout <= 77] == [ends.port]
            assert read(events) == {}


def _with_number(host: str, name: str, number: int) -> None:
    run("ip", "-n", host, "netns", "set", name, str(number))


def _is_free(host: str, number: int) -> bool:
    return f"nsid {number} " not in run("ip", "-n", host, "netns", "list-id")


@pytest.mark.mutation("a-number-of-a-namespace-is-reused", instead="set()")
def test_a_namespace_that_gets_the_number_of_a_deleted_one_is_another_one(host: str, events: ConntrackEvents) -> None:
    with tracking() as other:
        with tracking() as name:
            _with_number(host, name, 7310)
            assert follow(events, name) == {name}
            with Ends(name) as ends:
                assert read(events) == {name: ([ends.port], [])}
        eventually(lambda: _is_free(host, 7310))
        _with_number(host, other, 7310)
        sysctl.write(other, {"net.netfilter.nf_conntrack_events": "1"})
        with Ends(other):
            changes = events.read()
            assert changes.by_namespace == {} and changes.gone == {name}
        assert events.missing([name]) == {name}


@pytest.mark.mutation("earlier-reports-are-of-another-namespace", instead="self._names.setdefault(nsid, name)")
def test_reports_that_came_before_a_namespace_is_followed_are_not_its_own(host: str, events: ConntrackEvents) -> None:
    with tracking() as other:
        with tracking() as name:
            _with_number(host, name, 7311)
            sysctl.write(name, {"net.netfilter.nf_conntrack_events": "1"})
            with Ends(name):
                pass
        eventually(lambda: _is_free(host, 7311))
        _with_number(host, other, 7311)
        events.follow([other])
        changes = events.read()
        assert changes.by_namespace == {} and changes.started == {other}
        with Ends(other) as ends:
            assert read(events) == {other: ([ends.port], [])}


@pytest.mark.mutation("a-namespace-made-anew-is-followed-anew")
def test_a_namespace_that_was_made_anew_is_followed_anew(events: ConntrackEvents) -> None:
    with tracking() as name:
        assert follow(events, name) == {name}
        with Ends(name) as old:
            read(events)
            namespaces.delete(name)
            namespaces.create(name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            track(name)
            assert follow(events, name) == {name}
            with Ends(name) as new:
                assert read(events) == {name: ([new.port], [])}
            old.reset()  # its namespace lives as long as it
            assert read(events) == {name: ([], [new.port])}


@pytest.mark.mutation("an-overrun-lasts-until-all-is-read", instead="self._is_overrun")
def test_an_overrun_is_reported_when_all_is_read(host: str) -> None:
    """Until then the kernel drops all reports, so a listing that began earlier would lack connections."""
    events = ConntrackEvents(buffer_bytes=1 << 17, host=host)
    with tracking() as name, contextlib.ExitStack() as stack:
        follow(events, name)
        for _ in range(600):
            stack.enter_context(Ends(name))
        changes = events.read(64)
        seen = 0
        while changes.more:
            assert not changes.overrun
            seen += sum(len(it) for _, it in changes.by_namespace.values())
            changes = events.read(64)
        assert changes.overrun and 64 <= seen < 600
        with Ends(name) as ends:
            assert read(events) == {name: ([ends.port], [])}
    events.close()


# ------------------------------------------------------------------------------------------- through the standby


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with VpcLab() as lab:
        give_ip6(lab)
        yield lab


@pytest.fixture
def other(lab: Lab) -> Iterator[SecondDevice]:
    with SecondDevice(lab) as other:
        yield other


@pytest.fixture
def connect(lab: Lab) -> Iterator[Open]:
    with opener(lab) as connect:
        yield connect


@pytest.fixture
def replica(lab: Lab, other: SecondDevice) -> Iterator[Replica]:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    with Replica({lab.ns("dev"): other.namespace}) as replica:
        yield replica


def _goes_on(replica: Replica, other: SecondDevice, goes_on: dict[str, Callable[[float], bool]]) -> None:
    """Assert that the connections are at the standby without another listing, and go on there."""
    assert table(next(iter(replica.pairs)))
    replica.await_equal()
    assert len(replica.gaps) == 1
    other.take_over()
    replica.sink.serve(other.namespace)
    assert asked(goes_on, PATIENCE_S) == dict.fromkeys(goes_on, True)


def test_open_connections_of_all_kinds_go_on_at_the_standby(
    replica: Replica, other: SecondDevice, connect: Open
) -> None:
    _goes_on(replica, other, open_all(connect, KINDS))


def test_connections_over_both_families_go_on_at_the_standby(lab: Lab, other: SecondDevice, connect: Open) -> None:
    scope = tiers({"310": PREFIX_A, "311": PREFIX_B})
    lab.renew(scope)
    other.apply(scope)
    kinds = {
        "over IPv4": Kind("a1", HOMES["b1"], "80{n}1", "b1", "80{n}1"),
        "over IPv6": Kind("b1", f"{PREFIX_A}31", "80{n}2", "a1", "80{n}2", bind="::"),
    }
    with Replica({lab.ns("dev"): other.namespace}) as replica:
        _goes_on(replica, other, open_all(connect, kinds))


def test_a_guest_is_reached_through_the_standby_when_its_conversation_is_assured(
    lab: Lab, replica: Replica, other: SecondDevice
) -> None:
    """UDP is assured after two seconds in both directions. ESP never is."""
    with contextlib.ExitStack() as stack:
        opened = {name: datagrams(lab, number, stack) for name, number in PROTOCOLS.items()}
        wanted = {number for name, number in PROTOCOLS.items() if name != "ESP"}

        def are_assured() -> bool:
            for it in opened.values():
                assert it.reaches_guest(PATIENCE_S)
                it.guest.send(b"\0\0\x08\0hello")
            entries = conntrack.dump(lab.ns("dev"))
            return {it.protocol for it in entries if it.status & conntrack.ASSURED} == wanted

        eventually(are_assured)
        replica.await_equal()
        records = list_records(other.namespace, marked=0, status=REPLICATED)
        assert {it[1] for it in records} == wanted
        assert all(timeout_of(it) > SETTLED_S for it in records)
        other.take_over()
        replica.sink.serve(other.namespace)
        assert replica.sink.settled(PATIENCE_S)
        assert all(0 < it.timeout <= SETTLED_S for it in conntrack.dump(other.namespace) if it.protocol in wanted)
        assert {name: opened[name].reaches_guest(PATIENCE_S) for name in ("UDP", "GRE")} == {"UDP": True, "GRE": True}


def test_ended_connections_disappear_from_the_standby(
    lab: Lab, replica: Replica, other: SecondDevice, connect: Open
) -> None:
    closed, reset, deleted, half = (connect(KINDS["port forward"], it) for it in range(4))
    stays = connect(KINDS["static NAT"], 0)
    replica.await_equal()
    assert len(table(other.namespace)) == 5
    for it in closed:
        it.close()
    reset[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    reset[0].close()
    port = deleted[0].getsockname()[1]
    conntrack.delete(lab.ns("dev"), [it for it in conntrack.dump(lab.ns("dev")) if it.sport == port])
    half[0].shutdown(socket.SHUT_WR)
    assert half[1].recv(1) == b""
    eventually(lambda: len(table(other.namespace)) == 2)
    replica.await_equal()
    other.take_over()
    assert delivers(*stays) and delivers(half[1], half[0])
    assert not delivers(*deleted, QUIET_S)


def test_connections_that_were_open_before_are_at_the_standby(lab: Lab, other: SecondDevice, connect: Open) -> None:
    lab.renew(SCOPE)
    other.apply(SCOPE)
    goes_on = open_all(connect, {"source NAT": KINDS["source NAT"]})
    with Replica({lab.ns("dev"): other.namespace}) as replica:
        _goes_on(replica, other, goes_on)


def test_a_host_that_returns_has_the_connections_of_the_one_that_serves(
    lab: Lab, replica: Replica, other: SecondDevice, connect: Open
) -> None:
    """The first device still has connections that have ended since. It stands by for the second one now."""
    first = lab.ns("dev")
    ended, ends_later, stays = (connect(KINDS["source NAT"], it) for it in range(3))
    replica.await_equal()
    replica.follow()
    other.take_over()
    replica.sink.serve(other.namespace)
    for it in ended:
        it.close()
    later = connect(KINDS["port forward"], 0)
    with Replica({other.namespace: first}) as back:
        assert len(table(first)) == 3
        back.await_equal()
        assert len(table(first)) == 3
        back.sink.flush(first)
        assert back.sink.settled(PATIENCE_S) and table(first) == set()
        back.on_loop(back.copy(other.namespace))
        back.await_equal()
        for it in ends_later:
            it.close()
        eventually(lambda: len(table(first)) == 2)
        back.await_equal()
    other.give_back()
    assert delivers(*stays) and delivers(*later)


# -------------------------------------------------------------------------------------------------- many, and losses


class Pause:
    """Stops the thread that reads the reports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go = threading.Event()
        self._go.set()
        read = ConntrackEvents.read

        def paused(events: ConntrackEvents, at_most: int) -> Any:
            self._go.wait(PATIENCE_S)
            return read(events, at_most)

        monkeypatch.setattr(ConntrackEvents, "read", paused)

    @contextlib.contextmanager
    def while_stopped(self) -> Iterator[None]:
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()


def _make(namespace: str, count: int, per_second: int, done: Any, go: Any) -> None:
    """Open so many connections and keep each fourth one until ``go``. The others are closed: two of three at once, and
    one after 500 more."""
    with inside(namespace):
        server = socket.create_server(("127.0.0.1", 0), backlog=1024)
        kept: list[socket.socket] = []
        later: list[socket.socket] = []
        begin = time.monotonic()
        for at in range(count):
            client = socket.socket()
            client.bind((f"127.0.{1 + at // 20000}.{1 + at // 100 % 200}", 0))
            client.connect(server.getsockname())
            ends = [client, server.accept()[0]]
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            if at % 4 == 0:
                kept += ends
            elif at % 4 == 1:
                later += ends
                if len(later) > 250:
                    for it in later[:2]:
                        it.close()
                    del later[:2]
            else:
                for it in ends:
                    it.close()
            if at % 50 == 0 and per_second:
                time.sleep(max(0.0, begin + at / per_second - time.monotonic()))
        for it in later:
            it.close()
    done.set()
    go.wait(60)


@contextlib.contextmanager
def _making(namespace: str, count: int, per_second: int = 0) -> Iterator[Callable[[], None]]:
    """In a process of its own; the block gets a function that waits until all were opened."""
    context = multiprocessing.get_context("fork")
    done, go = context.Event(), context.Event()
    process = context.Process(target=_make, args=(namespace, count, per_second, done, go))
    process.start()

    def finished() -> None:
        assert done.wait(120)

    try:
        yield finished
    finally:
        go.set()
        process.join(60)


def test_a_second_of_connections_waits_for_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch)
    with tracking() as one, tracking() as other, Replica({one: other}) as replica:
        with _making(one, 500):
            pass
        with pause.while_stopped(), _making(one, 5000) as finished:
            finished()
            replica.loop.call_soon_threadsafe(lambda: None)
            assert len(table(one)) == 1250
            threading.Thread(target=pause._go.set).start()
            replica.await_equal()
            assert len(table(other)) == 1250
            assert len(replica.gaps) == 1  # nothing was lost
        replica.await_equal()


@pytest.mark.parametrize(
    "count", [pytest.param(10_000, id="2 s"), pytest.param(25_000, id="5 s", marks=pytest.mark.long)]
)
def test_tables_are_equal_after_seconds_of_connections(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    pause = Pause(monkeypatch)
    with tracking() as one, tracking() as other, Replica({one: other}) as replica:
        with _making(one, count, 5000) as finished:
            with pause.while_stopped():
                time.sleep(1)
            finished()
            replica.await_equal()
            assert len(table(other)) == count // 4
        replica.await_equal()
        assert table(other) == set()


def test_lost_reports_are_made_good_by_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch)
    with tracking() as one, tracking() as other, tracking() as two, tracking() as other_two:
        with Replica({one: other, two: other_two}, buffer_bytes=1 << 17) as replica, Ends(two):
            ends = Ends(one)
            replica.await_equal()
            with pause.while_stopped():
                ends.reset()
                making = _making(one, 2000)
                with making as finished:
                    finished()
                    pause._go.set()
                    eventually(lambda: len(replica.gaps) > 1)
                    assert replica.gaps[1] == {one, two}
                    replica.await_equal()
                    assert len(table(other)) == 500
                    assert len(table(other_two)) == 1


@pytest.mark.mutation("other-namespaces-do-not-fill-the-buffer")
def test_other_namespaces_cost_no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(monkeypatch)
    with tracking() as one, tracking() as other, tracking() as foreign:
        run("ip", "netns", "set", foreign, "auto")
        sysctl.write(foreign, {"net.netfilter.nf_conntrack_events": "1"})
        with Replica({one: other}, buffer_bytes=1 << 17) as replica:
            with pause.while_stopped(), _making(foreign, 2000) as finished:
                finished()
            with Ends(one):
                eventually(lambda: len(table(other)) == 1)
            assert len(replica.gaps) == 1


@pytest.mark.mutation("a-listing-does-not-undo-a-change", instead="part")
def test_a_connection_that_ends_during_a_listing_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_flows, "PART", 1)
    with tracking() as one, tracking() as other, Replica({one: other}) as replica:
        with Ends(one) as first, Ends(one) as second:
            replica.await_equal()
            listing: AsyncIterator[list[Record]] = replica.source.listing(one)

            async def part() -> list[int]:
                return ports(await anext(listing))

            (shown,) = replica.on_loop(part())
            (ends,) = (it for it in (first, second) if it.port != shown)
            ends.reset()
            eventually(lambda: any(ports(deleted) == [ends.port] for _, _, deleted in replica.told))
            assert replica.on_loop(part()) == []


def test_a_namespace_that_was_made_anew_is_listed_by_itself() -> None:
    with tracking() as one, tracking() as other, Replica({one: other}) as replica:
        namespaces.delete(one)
        namespaces.create(one)
        run("ip", "-n", one, "link", "set", "lo", "up")
        track(one)
        eventually(lambda: len(replica.gaps) == 2)
        with Ends(one):
            replica.await_equal()
            assert len(table(other)) == 1


def test_all_is_listed_again_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_flows, "RELIST_S", 0.1)
    monkeypatch.setattr(standby_flows, "_TICK_S", 0.05)
    with tracking() as one, tracking() as other, Replica({one: other}) as replica, Ends(one):
        replica.await_equal()
        conntrack.delete(other, conntrack.dump(other))
        replica.await_equal()
        assert set(replica.gaps) == {frozenset({one})}


@pytest.mark.mutation("changes-do-not-pile-up")
def test_changes_do_not_pile_up_before_a_busy_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_flows, "_BATCHES_MAX", 2)
    with tracking() as one, tracking() as other, Replica({one: other}) as replica:
        free = threading.Event()
        replica.loop.call_soon_threadsafe(free.wait, PATIENCE_S)
        for _ in range(60):
            with Ends(one):
                time.sleep(0.01)
        free.set()
        with Ends(one):
            eventually(lambda: len(table(other)) == 1)
        assert len(replica.told) < 20


# ------------------------------------------------------------------------------------------------------------ the sink


def connection(port: int, *, to: str = "192.0.2.10", client: str = "10.1.1.11", mark: int = 0) -> Record:
    """An open TCP connection by source NAT to the port of that number."""
    at, remote, public = (socket.inet_aton(it) for it in (client, to, "203.0.113.20"))
    sport, dport = port.to_bytes(2, "big"), (80).to_bytes(2, "big")
    state = bytes((0x0E, 3, 7, 9, 3, 3)) + mark.to_bytes(4, "big") + (600).to_bytes(4, "big")
    tuples = at + remote + sport + dport + remote + public + dport + sport
    return Record(bytes((0x84, 6, 0, 0)) + tuples + state)


@pytest.fixture
def sink() -> Iterator[FlowSink]:
    sink = FlowSink(Log(), lambda _: None)
    sink.start()
    yield sink
    sink.stop()


def sources(namespace: str) -> list[tuple[str, int]]:
    """Source address and port of each connection."""
    return sorted((it.src, it.sport) for it in conntrack.dump(namespace))


def settled(sink: FlowSink) -> None:
    assert sink.settled(PATIENCE_S)


def test_a_changed_connection_is_replaced(sink: FlowSink) -> None:
    with tracking() as name:
        sink.change(name, [connection(1), connection(2)], [])
        sink.change(name, [connection(1, mark=5)], [])
        settled(sink)
        assert sorted((it.sport, it.mark) for it in conntrack.dump(name)) == [(1, 5), (2, 0)]
        assert all(KEPT_S - 60 < it.timeout <= KEPT_S for it in conntrack.dump(name))
        sink.change(name, [connection(2, mark=6)], [connection(1), connection(2), connection(3)])
        settled(sink)
        assert [(it.sport, it.mark) for it in conntrack.dump(name)] == [(2, 6)]


def test_a_connection_takes_the_place_of_an_ended_one_with_the_same_translation(sink: FlowSink) -> None:
    with tracking() as name:
        sink.change(name, [connection(1)], [])
        sink.change(name, [connection(1, client="10.1.1.12")], [])
        settled(sink)
        assert sources(name) == [("10.1.1.12", 1)]


@pytest.mark.mutation("only-a-whole-listing-ends-connections", instead="listing is None")
def test_a_listing_ends_what_it_lacks(sink: FlowSink) -> None:
    with tracking() as name:
        sink.change(name, [connection(it) for it in range(1, 7)], [])
        sink.begin(name, 1)
        sink.change(name, [connection(1), connection(2, mark=9)], [])
        sink.begin(name, 2)
        sink.end(name, 1)
        settled(sink)
        assert len(sources(name)) == 6
        sink.change(name, [connection(2), connection(8)], [])
        sink.change(name, [connection(7)], [connection(2)])
        sink.change(name, [connection(3)], [])
        sink.end(name, 2)
        settled(sink)
        assert [port for _, port in sources(name)] == [3, 7, 8]
        sink.end(name, 2)
        settled(sink)
        assert len(sources(name)) == 3


def test_a_listing_renews_timeouts(sink: FlowSink) -> None:
    with tracking() as name:
        conntrack_copy.create(name, [connection(1)])
        sink.begin(name, 1)
        sink.change(name, [connection(1)], [])
        sink.end(name, 1)
        settled(sink)
        assert [it.timeout > KEPT_S - 60 for it in conntrack.dump(name)] == [True]


@pytest.mark.mutation("a-serving-host-takes-no-changes")
def test_a_host_that_serves_takes_no_changes_until_it_is_flushed(sink: FlowSink) -> None:
    with tracking() as name:
        sink.change(name, [connection(1)], [])
        sink.begin(name, 1)
        sink.serve(name)
        sink.change(name, [connection(2)], [connection(1)])
        sink.end(name, 1)
        settled(sink)
        assert [port for _, port in sources(name)] == [1]
        sink.flush(name)
        sink.change(name, [connection(3)], [])
        settled(sink)
        assert [port for _, port in sources(name)] == [3]


@pytest.mark.mutation("a-namespace-made-anew-gets-its-own-connections", instead="known is not None")
def test_a_namespace_that_was_made_anew_gets_connections(sink: FlowSink) -> None:
    with tracking() as name:
        sink.change(name, [connection(1)], [])
        settled(sink)
        namespaces.delete(name)
        namespaces.create(name)
        track(name)
        sink.change(name, [connection(2)], [])
        settled(sink)
        assert [port for _, port in sources(name)] == [2]


@pytest.mark.mutation("the-queue-of-changes-is-bounded")
def test_what_is_too_much_is_dropped_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_flows, "QUEUED_MAX", 3)
    lost: list[str] = []
    sink = FlowSink(Log(), lost.append)
    with tracking() as name:
        for port in (1, 2, 3, 4, 5):
            sink.change(name, [connection(port)], [])
        assert lost == [name]
        sink.start()
        settled(sink)
        assert [port for _, port in sources(name)] == [1, 2, 3]
        sink.begin(name, 1)
        settled(sink)
        sink.change(name, [connection(it) for it in range(10, 20)], [])
        assert lost == [name, name]
    sink.stop()


def test_a_namespace_that_does_not_exist_is_told_once() -> None:
    lost: list[str] = []
    sink = FlowSink(Log(), lost.append)
    sink.start()
    for port in (1, 2):
        sink.change("no-such-namespace", [connection(port)], [])
    settled(sink)
    assert lost == ["no-such-namespace"]
    sink.stop()


def test_keys_of_ended_connections_are_those_of_open_ones(events: ConntrackEvents) -> None:
    with tracking() as name:
        follow(events, name)
        for address in ("127.0.0.1", "::1"):
            with Ends(name, address):
                ((_, created),) = events.read().by_namespace.values()
            ((deleted, _),) = events.read().by_namespace.values()
            assert [*deleted] == [*created] == [key_of(it) for it in deleted.values()]
            (record,) = deleted.values()
            assert conntrack_copy.decode(conntrack_copy.encode([record])[0]) == [record]


def test_the_active_host_of_a_forward_is_unchanged_by_its_standby(lab: Lab, replica: Replica, connect: Open) -> None:
    """The records have the translation as the active host has it."""
    connect(KINDS["port forward"], 0)
    replica.await_equal()
    (entry,) = (it for it in conntrack.dump(next(iter(replica.pairs.values()))) if it.protocol == 6)
    assert entry.dst == A1.address
