"""Three engines in three namespaces: who serves after a power cut, partitions, restarts, and a VM that lies."""

from __future__ import annotations

import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from kernel.scratch import joined, scratch, tool
from kernel.standby_agent import Agent
from kernel.standby_hosts import TAG, Bed, Host, now, standby_bed
from netloom.agent.kernel import links
from netloom.agent.kernel.arp_probe import SignsOfLife, Wire
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.standby.sockets import AT_ONCE, HeartbeatSockets
from netloom.ethernet import ethernet_frame
from netloom.heartbeatwire import HEARTBEAT_BYTES, in_ethernet, key_of, pack, unpack
from netloom.secret import Secret
from netloom.standby.decision import Local
from netns import inside
from unit.standby_group import Lines

LONG_MS = 4000  # where nothing may happen: a busy machine stops for less


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with standby_bed(tmp_path) as it:
        yield it


@pytest.fixture
def slow_bed(tmp_path: Path) -> Iterator[Bed]:
    with standby_bed(tmp_path, LONG_MS) as it:
        yield it


def test_a_power_cut_of_the_first_host(bed: Bed) -> None:
    bed.start()
    bed.goes_on(5)
    assert bed.first.changes > 0
    bed.first.cut_power()
    bed.until(lambda: bed.second.view.serves)
    last = bed.second.view.last
    assert last is not None and last.outage_s is not None
    assert last.outage_s >= 2.0, last  # a promise lasts 2.2 s
    assert last.reason.endswith("kvm3 voted")
    assert bed.second.view.term == 1
    bed.until(lambda: bed.witness.view.active == "kvm2")
    bed.goes_on(1, "kvm2")
    for link in ("mgmt", "vlan"):
        tool(bed.first.namespace, "ip", "link", "set", link, "up")
    bed.first.start()
    bed.until(lambda: bed.first.view.term == 1 and bed.second.view.partner_ready)
    bed.goes_on(2, "kvm2")
    assert not bed.first.view.serves


def test_a_host_that_is_cut_off_from_everything_gives_way_and_stays_so(bed: Bed) -> None:
    bed.start()
    for link in ("mgmt", "vlan"):
        bed.link(bed.first, link, "down")
    bed.until(lambda: bed.second.view.serves)
    assert not bed.first.view.serves
    for link in ("mgmt", "vlan"):
        bed.link(bed.first, link, "up")
    bed.until(lambda: bed.first.view.term == 1)
    bed.goes_on(2, "kvm2")


@pytest.mark.parametrize("link", ["mgmt", "vlan"])
def test_one_path_suffices(slow_bed: Bed, link: str) -> None:
    slow_bed.start()
    for it in slow_bed.hosts:
        slow_bed.link(it, link, "down")
    slow_bed.goes_on(LONG_MS / 1000 * 1.5)
    assert max(s for it in slow_bed.hosts for s in it.view.heard.values()) < 3
    for it in slow_bed.hosts:
        slow_bed.link(it, link, "up")
    slow_bed.goes_on(1)


@pytest.mark.long
def test_an_agent_that_is_killed_and_started_again_goes_on(slow_bed: Bed) -> None:
    slow_bed.start()
    for _ in range(3):
        slow_bed.first.stop()
        slow_bed.first.start()
        slow_bed.until(lambda: slow_bed.first.view.serves)
        slow_bed.goes_on(1)
        slow_bed.until(lambda: max(slow_bed.first.view.heard.values()) < 1)
    slow_bed.goes_on(LONG_MS / 1000 * 1.5)
    assert slow_bed.first.view.term == 0
    assert slow_bed.second.log.with_("begins term") == []


@pytest.mark.long
def test_a_dead_witness_or_a_dead_standby_changes_nothing(slow_bed: Bed) -> None:
    slow_bed.start()
    slow_bed.witness.cut_power()
    slow_bed.goes_on(LONG_MS / 1000 * 1.5)
    for link in ("mgmt", "vlan"):
        tool(slow_bed.witness.namespace, "ip", "link", "set", link, "up")
    slow_bed.witness.start()
    slow_bed.until(lambda: slow_bed.first.view.heard["kvm3"] < 1)
    slow_bed.second.cut_power()
    slow_bed.goes_on(LONG_MS / 1000 * 1.5)
    assert len(slow_bed.first.log.with_("no heartbeat of kvm2")) == 1


def test_without_standby_and_witness_the_lease_runs_out_and_comes_back(bed: Bed) -> None:
    bed.start()
    bed.second.stop()
    bed.witness.stop()
    bed.until(lambda: not bed.first.view.serves)
    bed.until(lambda: bed.first.log.with_("the lease of this host has run out") != [])
    bed.witness.start()
    bed.until(lambda: bed.first.view.serves)
    assert bed.first.view.term == 0


def test_a_turn_is_given_away_and_back(bed: Bed) -> None:
    bed.start()
    bed.goes_on(2.5)  # whoever has just started cannot promise anything to another one
    for giver, taker in ((bed.first, bed.second), (bed.second, bed.first)):
        bed.until(lambda giver=giver: giver.view.serves and giver.view.partner_ready)  # type: ignore[misc]
        giver.local(Local(gives_way=True))
        bed.until(lambda taker=taker: taker.view.serves)  # type: ignore[misc]
        last = taker.view.last
        assert last is not None and last.reason == f"{giver.name} gave its turn away"
        giver.local(Local())
    bed.goes_on(1)


def test_a_host_that_cannot_write_does_not_take_over(bed: Bed) -> None:
    bed.start()
    away = bed.second.directory.with_name("away")
    bed.second.directory.rename(away)
    bed.first.cut_power()
    bed.until(lambda: bed.second.log.with_("its file cannot be written: No such file") != [])
    until = now() + 3
    while now() < until:
        assert bed.second.view.term == 0 and not bed.second.view.serves
        time.sleep(0.05)
    assert bed.witness.view.term == 0
    away.rename(bed.second.directory)
    bed.until(lambda: bed.second.view.serves)


def test_an_agent_that_is_frozen_has_no_lease_when_another_one_has(bed: Bed) -> None:
    agent = Agent(bed.first)
    try:
        for it in (bed.second, bed.witness):
            it.start()
        bed.until(lambda: len(agent.leases) > 30)
        agent.signal(signal.SIGSTOP)
        bed.until(lambda: bed.second.view.serves)
        (began,) = bed.second.leases.began
        assert max(until for _, until in agent.leases) <= began
        agent.signal(signal.SIGCONT)
        bed.until(lambda: bed.second.view.partner_ready)  # it is back, and it has heard who serves
        bed.goes_on(2, "kvm2")
    finally:
        agent.end()
    later = [until for clock, until in agent.leases if clock > began]
    assert max(later, default=0.0) <= began, later


# --- a dead VLAN


NEIGHBOUR = "10.8.0.9"


@pytest.fixture
def untagged_bed(bed: Bed) -> Bed:
    """The VM answers without VLAN tags."""
    for it in bed.hosts:
        it.wire = replace(it.wire, tag=0)
    bed.start()
    return bed


@contextmanager
def asking(bed: Bed, *, neighbour: bool = True) -> Iterator[None]:
    """Both hosts ask a VM on silent segments, as the agent does. ``neighbour``: it has the address."""
    if neighbour:
        tool(bed.vm, "ip", "addr", "add", f"{NEIGHBOUR}/24", "dev", "vlan")
    is_over = threading.Event()

    def ask(host: Host) -> None:
        with inside(host.namespace):
            while not is_over.wait(0.01):
                if host.engine is None:
                    continue
                for segment in host.view.silent:
                    with SignsOfLife() as signs:
                        answer = signs.any_answer({Wire(host.wire.link): [NEIGHBOUR]}, 0.25)
                    host.engine.answered(bed.spec.group_id, segment, answer)

    threads = [threading.Thread(target=ask, args=(it,)) for it in (bed.first, bed.second)]
    for it in threads:
        it.start()
    try:
        yield
    finally:
        is_over.set()
        for it in threads:
            it.join()


def test_a_host_whose_vlan_is_dead_gives_its_turn_away(untagged_bed: Bed) -> None:
    bed = untagged_bed
    with asking(bed):
        bed.until(lambda: bed.first.view.partner_ready)
        assert bed.first.view.silent == bed.second.view.silent == frozenset()
        bed.link(bed.first, "vlan", "down")
        bed.until(lambda: bed.second.view.serves)
        last = bed.second.view.last
        assert last is not None and last.reason == "kvm1 gave its turn away: nobody answers it on a VLAN"
        assert bed.first.view.dead and not bed.second.view.dead
        bed.link(bed.first, "vlan", "up")
        bed.until(lambda: not bed.first.view.silent and not bed.second.view.silent)
        bed.goes_on(1, "kvm2")
        bed.until(lambda: bed.second.view.partner_ready)
        bed.goes_on(1, "kvm2")


def test_a_standby_whose_vlan_is_dead_changes_nothing(untagged_bed: Bed) -> None:
    bed = untagged_bed
    with asking(bed):
        bed.until(lambda: bed.first.view.partner_ready)
        bed.link(bed.second, "vlan", "down")
        bed.until(lambda: bed.second.view.dead != frozenset())
        bed.until(lambda: not bed.first.view.partner_ready)
        bed.goes_on(2)


def test_on_a_vlan_without_neighbours_nothing_changes(untagged_bed: Bed) -> None:
    bed = untagged_bed
    with asking(bed, neighbour=False):
        bed.until(lambda: bed.first.view.partner_ready)
        bed.link(bed.first, "vlan", "down")
        bed.until(lambda: bed.first.view.silent != frozenset() and bed.second.view.silent != frozenset())
        bed.goes_on(3)


class Liar:
    """A VM on the VLAN that sends all heartbeats again that it hears, and changed ones."""

    def __init__(self, bed: Bed) -> None:
        with inside(bed.vm):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("vlan", 3))
        self._socket.settimeout(0.002)
        self.recorded: list[bytes] = []
        self.sent = 0
        self._key = key_of(Secret("00" * 32))
        self._spec = bed.spec
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        at = 0
        while not self._is_over.is_set():
            try:
                frame = self._socket.recv(2000)
            except TimeoutError:
                frame = b""
            start = frame.find(b"netloom\2")
            if start > 0:
                self.recorded.append(frame[start : start + 11 + HEARTBEAT_BYTES])
            if self.recorded:
                at += 1
                again = self.recorded[at * 7 % len(self.recorded)]
                self._send(again)
                self._send(
                    again[: at % len(again)] + bytes([again[at % len(again)] ^ 1]) + again[at % len(again) + 1 :]
                )
                beat = unpack(again[11:], key_of(self._spec.secret))
                if beat is not None:  # what it says, and more, with a proof of another key
                    self._send(in_ethernet(pack(beat, self._key)))

    def _send(self, payload: bytes) -> None:
        self._socket.send(ethernet_frame(b"\2\0\0\0\0\x66", TAG, payload))
        self.sent += 1


@contextmanager
def lying(bed: Bed) -> Iterator[Liar]:
    liar = Liar(bed)
    try:
        yield liar
    finally:
        liar.stop()


def test_a_vm_that_repeats_and_forges_heartbeats_changes_nothing(slow_bed: Bed) -> None:
    slow_bed.start()
    with lying(slow_bed) as liar:
        slow_bed.until(lambda: len(liar.recorded) > 20)
        slow_bed.goes_on(3)
        slow_bed.first.stop()
        slow_bed.first.start()  # a new boot is heard, whatever is repeated of the old one
        slow_bed.until(lambda: max(slow_bed.first.view.heard.values()) < 1)
        slow_bed.goes_on(LONG_MS / 1000 * 1.5)
        # Nor does it keep a dead host alive.
        slow_bed.first.cut_power()
        slow_bed.until(lambda: slow_bed.second.view.serves)
        slow_bed.goes_on(2, "kvm2")
        assert liar.sent > 200
    assert slow_bed.second.view.term == 1


def test_a_port_that_is_taken_and_a_link_that_comes_late_are_used_when_they_can_be(bed: Bed) -> None:
    with inside(bed.second.namespace):
        taken = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        taken.bind(("::", bed.spec.second.port))
    late = bed.witness.wire
    for it in bed.hosts:
        it.start(wires=False)
    engine = bed.witness.engine
    assert engine is not None
    engine.set_wires(bed.spec.group_id, {late: 1, ClaimWire("gone", 99, "02:00:00:00:00:01", TAG): 1})
    bed.until(lambda: bed.second.log.with_("heartbeats cannot be heard on port 7788") != [])
    bed.until(lambda: bed.witness.log.with_("heartbeats cannot be heard on gone: No such device") != [])
    bed.until(lambda: bed.first.view.serves)
    taken.close()
    bed.until(lambda: max(bed.second.view.heard.values()) < 1)
    assert len(bed.second.log.with_("heartbeats cannot be heard")) <= 2  # IPv4 and IPv6


def test_a_group_that_was_set_while_the_engine_runs_survives_a_restart(bed: Bed) -> None:
    bed.start()
    bed.first.stop()
    bed.first.start()
    assert bed.first.engine is not None
    bed.first.engine.forget_group(bed.spec.group_id)
    assert bed.first.engine.views() == {}
    bed.until(lambda: bed.second.view.serves)  # not before the lease is over


@pytest.mark.mutation("a-flood-of-heartbeats-costs-little")
def test_a_flood_leaves_time_for_other_groups() -> None:
    """After some frames a link is not read for a moment, and the kernel drops what comes meanwhile."""
    heard: list[bytes] = []
    with joined() as (left, right), selectors.DefaultSelector() as selector:
        (found,) = links.find_links(left, ["left"])
        wire = ClaimWire("left", found.index, found.mac, TAG)
        sockets = HeartbeatSockets(selector, lambda data, _: heard.append(data), Lines())
        with inside(left):
            sockets.follow([], [wire], 0.0)
        with inside(right):
            flood = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        with flood:
            flood.bind(("right", 3))
            for _ in range(AT_ONCE + 30):
                flood.send(ethernet_frame(b"\2\0\0\0\0\x66", TAG, in_ethernet(b"x")))
        for _ in range(10):
            for key, _ in selector.select(0):
                key.data(0.0)
            sockets.look(0.01)
        assert heard == [b"x"] * AT_ONCE
        sockets.look(0.02)
        for key, _ in selector.select(0):
            key.data(0.02)
        assert heard == [b"x"] * (AT_ONCE + 30)
        sockets.close()


def test_an_engine_without_groups_has_no_sockets_and_ends(tmp_path: Path) -> None:
    with scratch() as namespace, standby_bed(tmp_path) as bed:
        bed.first.namespace = namespace
        bed.first.start(wires=False)
        assert bed.first.engine is not None
        bed.first.engine.forget_group(bed.spec.group_id)
        assert tool(namespace, "ss", "-Hlun") == ""
