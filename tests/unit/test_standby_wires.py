"""Silent and dead segments: two hosts tell each other what they hear, and what their neighbours answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netloom.agent.standby.wires import ANSWER_S, SILENT_S, Wires
from netloom.heartbeatwire import WireSays

GUEST, PUBLIC = 11, 22
EACH_S = 0.1


class Pair:
    """Two hosts that send heartbeats. ``cut``: pairs of sender and segment (None: UDP) whose messages are lost."""

    def __init__(self, segments: tuple[int, ...] = (GUEST, PUBLIC)) -> None:
        self.now = 1000.0
        self.cut: set[tuple[int, int | None]] = set()
        self.segments = segments
        self.hosts = (Wires(), Wires())
        self.neighbours: list[Callable[[int], bool | None]] = [lambda _: True, lambda _: True]
        for it in self.hosts:
            it.follow(segments, self.now)

    def run(self, s: float) -> None:
        for _ in range(round(s / EACH_S)):
            self.now += EACH_S
            for at, it in enumerate(self.hosts):
                it.look(self.now)
                for segment in it.silent:
                    it.answered(segment, self.neighbours[at](segment), self.now)
                it.look(self.now)
            for at, it in enumerate(self.hosts):
                other = self.hosts[1 - at]
                paths = [path for path in (None, *self.segments) if (at, path) not in self.cut]
                for path in paths:
                    other.heard(path, self.now)
                if paths:
                    other.told(it.says(), self.now)

    @property
    def silent(self) -> list[set[int]]:
        return [set(it.silent) for it in self.hosts]

    @property
    def dead(self) -> list[set[int]]:
        return [set(it.dead) for it in self.hosts]


def test_nothing_is_silent_while_all_heartbeats_arrive() -> None:
    pair = Pair()
    for _ in range(30):
        pair.run(EACH_S)
        assert pair.silent == [set(), set()]


@pytest.mark.parametrize("sender", [0, 1])
def test_a_segment_that_fails_in_one_direction_is_silent_for_both(sender: int) -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(sender, GUEST)}
    pair.run(SILENT_S + 0.25)
    assert pair.silent == [{GUEST}, {GUEST}]
    assert pair.dead == [set(), set()]
    pair.cut = set()
    pair.run(0.3)
    assert pair.silent == [set(), set()]


@pytest.mark.parametrize("dead", [0, 1])
def test_the_link_of_the_host_that_nobody_answers_is_dead(dead: int) -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, PUBLIC), (1, PUBLIC)}
    pair.neighbours[dead] = lambda segment: segment != PUBLIC
    pair.run(SILENT_S + 0.25)
    assert pair.dead[dead] == {PUBLIC}
    assert pair.dead[1 - dead] == set()
    assert pair.hosts[1 - dead].is_dead_there and not pair.hosts[dead].is_dead_there
    pair.cut = set()
    pair.run(0.3)
    assert pair.dead == [set(), set()]
    assert not pair.hosts[1 - dead].is_dead_there


@pytest.mark.mutation("an-empty-vlan-is-not-dead")
@pytest.mark.parametrize("answer", [False, None])
def test_where_nobody_answers_either_host_no_link_is_dead(answer: bool | None) -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, GUEST), (1, GUEST)}
    pair.neighbours = [lambda _: False, lambda _: answer]
    for _ in range(20):
        pair.run(EACH_S)
        assert pair.dead == [set(), set()]
    assert pair.silent == [{GUEST}, {GUEST}]


def test_a_host_that_dies_leaves_no_silent_segment() -> None:
    """That is for the lease and the vote; and the standby must be ready then, whatever it knew before."""
    pair = Pair()
    pair.neighbours[1] = lambda _: False
    pair.run(1)
    pair.cut = {(0, None), (0, GUEST), (0, PUBLIC)}
    for _ in range(20):
        pair.run(EACH_S)
        assert pair.silent[1] == pair.dead[1] == set()


@pytest.mark.mutation("a-host-that-is-silent-everywhere-is-not-asked-about", instead="self._told")
def test_a_dead_link_is_forgotten_when_the_other_host_dies() -> None:
    pair = Pair()
    pair.run(1)
    pair.neighbours[1] = lambda _: False
    pair.cut = {(0, GUEST), (1, GUEST)}
    pair.run(1)
    assert pair.dead[1] == {GUEST}
    pair.cut |= {(0, None), (0, PUBLIC)}
    pair.run(1)
    assert pair.dead[1] == set()


def test_without_the_management_network_nothing_is_silent() -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, None), (1, None)}
    pair.run(2)
    pair.cut |= {(0, GUEST)}
    pair.run(2)
    assert pair.silent == [set(), set()]


def test_only_segments_that_both_hosts_have_are_compared() -> None:
    pair = Pair()
    pair.hosts[1].follow([GUEST], pair.now)
    pair.run(2)
    pair.cut = {(0, PUBLIC), (1, PUBLIC)}
    pair.run(2)
    assert pair.silent == [set(), set()]
    pair.cut = set()
    pair.hosts[1].follow([GUEST, PUBLIC], pair.now)
    for _ in range(10):  # nobody has listened before
        pair.run(EACH_S)
        assert pair.silent == [set(), set()]


def test_a_lost_carrier_is_silent_at_once_for_both() -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, GUEST), (1, GUEST)}
    pair.hosts[0].suspect(GUEST)
    pair.hosts[0].suspect(99)
    pair.neighbours[0] = lambda segment: segment != GUEST
    pair.run(2 * EACH_S)
    assert pair.silent == [{GUEST}, {GUEST}]
    pair.run(EACH_S)
    assert pair.dead == [{GUEST}, set()]


@pytest.mark.mutation("an-answer-holds-for-a-moment")
def test_an_answer_that_is_not_renewed_is_not_told() -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, GUEST), (1, GUEST)}
    pair.run(1)
    assert pair.hosts[0].says() == (WireSays(GUEST, False, True), WireSays(PUBLIC, True))
    pair.neighbours = [lambda _: None, lambda _: None]
    pair.hosts[0].look(pair.now + ANSWER_S)
    assert pair.hosts[0].says()[0].answered is None
    pair.run(EACH_S)
    assert pair.hosts[1].says()[0].answered is None, "there is nobody to ask any more"


def test_a_segment_that_is_left_is_forgotten() -> None:
    pair = Pair()
    pair.run(1)
    pair.cut = {(0, GUEST), (1, GUEST)}
    pair.run(1)
    for it in pair.hosts:
        it.follow([PUBLIC], pair.now)
        it.answered(GUEST, True, pair.now)
    pair.run(EACH_S)
    assert pair.silent == [set(), set()]
    assert pair.hosts[0].says() == (WireSays(PUBLIC, True),)
