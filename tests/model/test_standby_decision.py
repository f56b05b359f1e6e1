"""Two hosts never serve at once, and one serves soon after the last fault: the decision of a group in simulated time.

First any faults, then each fault alone, then the messages that show what each promise is for.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from model.standby_world import ASK_S, BEAT_S, GROUP, KINDS, PAIR, PAIR_KINDS, PATHS, TIMING, Fault, World, play
from netloom.standby.decision import Group, Kept, Local, Member, Says

LASTS_S = st.floats(0, 4) | st.sampled_from([0.3, 0.9, 1.0, 1.1, 1.2])  # a lease and a promise last about a second
FAULTS = st.lists(
    st.tuples(st.floats(0, 3), st.sampled_from(KINDS), st.integers(0, 30), LASTS_S), min_size=1, max_size=12
)
WORLDS = (FAULTS, st.integers(0, 1 << 32), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.002, 0.05, 0.3]))
A, B, W = range(3)  # where a fault is
SEEDS = range(15)
TAKES_OVER_WITHIN_S = TIMING.promise_s + 2 * BEAT_S


# ----------------------------------------------------------------------------------------------------------- any faults


def check(faults: list[Fault], seed: int, loss: float, delay_s: float, group: Group = GROUP) -> None:
    """Without a witness two hosts may serve if both reach the upstream and do not hear each other: ``World.split``."""
    world = play(faults, seed, loss, delay_s, group)
    assert not world.two
    assert all(world.hosts[it].alone for it in world.alone)
    assert len(world.serving) == 1, [(it.disk, it.member and it.member.wants) for it in world.hosts.values()]
    assert all(it.disk.term == world.term for it in world.hosts.values())


@given(*WORLDS)
@settings(max_examples=300, deadline=None)
def test_two_hosts_never_serve_at_once_and_one_serves_in_the_end(
    faults: list[Fault], seed: int, loss: float, delay_s: float
) -> None:
    check(faults, seed, loss, delay_s)


@pytest.mark.long
@given(*WORLDS)
@settings(max_examples=40_000, deadline=None)
def test_two_hosts_never_serve_at_once_in_many_thousand_runs(
    faults: list[Fault], seed: int, loss: float, delay_s: float
) -> None:
    check(faults, seed, loss, delay_s)


# -------------------------------------------------------------------------------------------------------- a fault alone


def world(seed: int, *, loss: float = 0.0, group: Group = GROUP) -> World:
    """All is well for some seconds, and the fault comes at any moment between two heartbeats."""
    it = World(seed, loss=loss, group=group)
    it.run(5 + it.chance.uniform(0, BEAT_S))
    assert it.serving == ["a"]
    it.gaps.clear()
    return it


both_groups = pytest.mark.parametrize("group", [GROUP, PAIR], ids=["witness", "upstream"])


@both_groups
@pytest.mark.parametrize("kind", ["power", "freeze", "cut off"])
def test_the_standby_takes_over_from_a_host_that_is_gone(kind: str, group: Group) -> None:
    for seed in SEEDS:
        it = world(seed, group=group)
        began = it.now
        it.fault(kind, A, 5.0)
        it.run_for(TAKES_OVER_WITHIN_S)
        assert it.serving == ["b"] and it.now - began < 1.31
        it.run_for(10)
        assert (it.serving, it.term, it.two, it.split) == (["b"], 1, [], [])  # the old host does not take it back


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *(("one way", path) for path in range(len(PATHS))),
        *(("between", path) for path in range(len(PATHS))),
        *((kind, where) for where in (B, W) for kind in ("power", "freeze", "cut off", "deaf")),
        *((kind, where) for where in (B, W) for kind in ("not ready", "behind", "gives way")),
        ("crash", A),
    ],
)
def test_the_active_host_serves_on_without_a_gap(kind: str, where: int) -> None:
    for seed in SEEDS:
        it = world(seed, loss=0.05)
        it.fault(kind, where, 0.5 if kind == "crash" else 5.0)
        it.run_for(10)
        assert (it.serving, it.term, it.gaps) == (["a"], 0, [])


def test_a_host_that_nobody_helps_stops_and_goes_on_later() -> None:
    for seed in SEEDS:
        it = world(seed)
        it.fault("power", B, 5.0)
        it.fault("power", W, 5.0)
        it.run_for(1.1)
        assert it.serving == []
        it.run_for(5)
        assert (it.serving, it.term) == (["a"], 0)


@pytest.mark.mutation("a-grant-has-a-promise", instead="term if asks else -1")
def test_an_active_host_that_hears_nobody_is_replaced() -> None:
    for seed in SEEDS:
        it = world(seed)
        it.fault("deaf", A, 10.0)
        it.run_for(2 * TIMING.promise_s + 2 * BEAT_S)
        assert it.serving == ["b"]
        it.run_for(12)
        assert (it.serving, it.term, it.two) == (["b"], 1, [])


def test_an_active_host_that_each_hears_but_none_answers_is_replaced() -> None:
    it = world(0)
    it.part([("a", "b"), ("w", "a")], 10.0)  # a hears only b, which does not hear a
    it.run_for(2 * TIMING.promise_s + 2 * BEAT_S)
    assert it.serving == ["b"]


@both_groups
@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("pause_s", [0.0, 1.0, 5.0])
def test_after_a_reboot_of_all_one_serves(first: str, pause_s: float, group: Group) -> None:
    for seed in SEEDS:
        it = world(seed, group=group)
        for name in it.hosts:
            it.power(name, False)
        it.run_for(3)
        for name in filter(None, (first, group.witness, group.partner(first))):
            it.power(name, True)
            it.run_for(pause_s)
        it.run_for(5)
        served = "a" if first == "a" or pause_s < 1.5 else "b"
        assert (it.serving, it.two, it.split) == ([served], [], [])


def test_after_a_reboot_of_both_hosts_the_active_one_needs_no_witness() -> None:
    it = world(0)
    for name in it.hosts:
        it.power(name, False)
    for name in ("b", "a"):
        it.run_for(1)
        it.power(name, True)
    it.run_for(1)
    assert (it.serving, it.term) == (["a"], 0)


@pytest.mark.parametrize("kind", ["gives way", "not ready"])
def test_a_turn_that_is_given_away_is_taken_at_once(kind: str) -> None:
    for seed in SEEDS:
        it = world(seed)
        it.fault(kind, A, 20.0)
        it.run_for(0.2)
        assert it.serving == ["b"]
        ((begins, ends, _),) = it.gaps
        assert ends - begins < 0.01  # three messages of at most 2 ms
        it.run_for(10)
        assert (it.serving, it.term) == (["b"], 1)


def test_a_host_whose_partner_died_takes_its_turn_back() -> None:
    it = world(0)
    it.fault("gives way", A, 3.0)
    it.fault("crash at an effect", B, 0.0)  # just before it takes the turn
    it.run_for(0.2)
    it.power("b", False)
    it.run_for(5)
    assert it.serving == ["a"]


def test_two_hosts_that_are_to_give_way_keep_their_turns() -> None:
    it = world(0)
    it.fault("gives way", A, 30.0)
    it.fault("gives way", B, 30.0)
    it.run_for(20)
    assert (it.serving, it.term) == (["a"], 0)
    it.fault("not ready", A, 30.0)  # better a host that is to give way than a dead network
    it.run_for(20)
    assert (it.serving, it.term) == (["b"], 1)


def test_a_turn_does_not_go_to_and_fro_between_two_flapping_networks() -> None:
    for seed in SEEDS:
        it = world(seed)
        for _ in range(60):
            it.fault("not ready", it.chance.choice([A, B]), it.chance.uniform(0, 1))
            it.run_for(it.chance.uniform(0, 1))
        assert it.term <= it.now / TIMING.steady_s / 2
        assert not it.two


def test_a_standby_that_is_behind_gets_no_turn_and_waits_longer() -> None:
    for seed in SEEDS:
        it = world(seed)
        it.fault("behind", B, 30.0)
        it.run_for(1)
        it.fault("gives way", A, 3.0)
        it.run_for(2)
        assert (it.serving, it.term) == (["a"], 0)
        it.power("a", False)
        it.run_for(TIMING.promise_s + TIMING.behind_s - 3 * BEAT_S)
        assert it.serving == []
        it.run_for(6 * BEAT_S)
        assert it.serving == ["b"]


@pytest.mark.parametrize("dead", ["b", "w"])
def test_a_dissolved_group_needs_one_other_member(dead: str) -> None:
    for seed in SEEDS:
        it = world(seed)
        it.power(dead, False)
        it.run_for(1)
        it.fault("dissolve", A, 0.0)
        it.run_for(0.5)
        assert it.alone == {"a"}
        for name in it.hosts:
            it.power(name, False)
        for name in ("b", "w"):
            it.power(name, True)
        it.run_for(10)
        assert it.serving == ["a"] and not it.two  # neither of the others serves, though they hear nothing of it
        it.power("a", True)
        it.run_for(10)
        assert (it.serving, it.term, it.two) == (["a"], 0, [])


@pytest.mark.mutation("a-wish-ends-with-the-turn")
def test_a_group_is_not_dissolved_while_nobody_knows() -> None:
    it = world(0)
    it.fault("cut off", A, 10.0)
    it.fault("dissolve", A, 0.0)
    it.run_for(8)
    assert (it.serving, it.alone) == (["b"], set())
    it.run_for(5)
    it.fault("gives way", B, 5.0)
    it.run_for(5)
    assert (it.serving, it.alone, it.two) == (["a"], set(), [])


# ------------------------------------------------------------------------------------------- what each promise is for

READY = Local()
SOON_S = 0.01


def member(name: str, now: float = 0.0, **kept: int | str | bool) -> Member:
    return Member(GROUP, name, TIMING, Kept(**{"active": "a"} | kept), now)  # type: ignore[arg-type]


def tell(now: float, sender: Member, receiver: Member, **changes: float) -> Says:
    """The sender has heard a message of this moment from the receiver, and is heard."""
    says = replace(sender.says(now, now), **changes)
    receiver.hear(now, sender.me, says)
    return says


def voted(now: float) -> tuple[Member, Member]:
    """The standby wants to begin, and the witness has just voted for it. They have heard nothing of ``a``."""
    b, w = member("b", now - 10), member("w", now - 10)
    b.tick(now, READY)
    tell(now, b, w)
    assert (w.kept.voted, w.kept.candidate) == (1, "b")
    return b, w


@pytest.mark.mutation("a-start-waits-for-its-promises", instead="now")
def test_a_witness_that_has_just_started_helps_only_the_host_on_its_disk() -> None:
    b, w = member("b"), member("w", 100)
    b.tick(100, READY)
    tell(100 + SOON_S, b, w)
    assert w.kept.voted == 0
    w.tick(100 + TIMING.promise_s, READY)  # the request is still fresh enough, or comes again
    b.tick(100 + TIMING.promise_s, READY)
    tell(100 + TIMING.promise_s, b, w)
    assert w.kept.candidate == "b"


@pytest.mark.mutation("a-witness-keeps-its-promise")
def test_a_witness_votes_when_its_promise_is_over() -> None:
    a, b, w = member("a"), member("b"), member("w")
    tell(10, a, w)
    b.tick(10 + TIMING.promise_s - SOON_S, READY)
    tell(10 + TIMING.promise_s - SOON_S, b, w)
    assert w.kept.voted == 0
    w.tick(10 + TIMING.promise_s, READY)  # without another message
    assert (w.kept.voted, w.kept.candidate, w.says(12, 12).grants) == (1, "b", "b")


@pytest.mark.mutation("a-candidate-keeps-its-promise")
def test_a_candidate_that_hears_the_active_host_does_not_begin() -> None:
    b, w = voted(10)
    tell(10, member("a"), b)
    assert b.says(10, 10).grants == "a"  # which may be sent before the next tick
    tell(10, w, b)
    assert b.kept.term == 0
    tell(10 + TIMING.promise_s, w, b, grants_term=1)
    assert b.kept.term == 0  # the witness grants no longer


@pytest.mark.mutation(
    "a-grant-has-a-promise", instead="term if asks and self._hears_us(now, sender) else self._renewed"
)
def test_a_witness_grants_nothing_for_a_message_that_renewed_no_promise() -> None:
    b, w = voted(10)
    assert tell(10, w, b).grants == "b"
    b = member("b", 0)
    b.tick(10.9, Local(ready=False))
    tell(10.9, b, w)
    # The promise of 10.0 is over at 11.1. A grant with the clock of this message would be a lease until 11.9.
    assert w.says(10.95, 10.9).grants == ""


@pytest.mark.mutation("a-lease-is-of-one-term", instead="self.may_serve")
def test_a_late_grant_of_an_earlier_term_is_no_lease() -> None:
    # The witness has forgotten this promise, if it heard of the later term and was restarted.
    a, w = member("a"), member("w")
    tell(10, a, w)
    late = w.says(10, 10)
    assert late.grants == "a"
    a = member("a", term=2)
    a.hear(10.5, "w", late)
    assert a.lease_until < 0


@pytest.mark.mutation("a-grant-names-a-message-of-this-boot", instead="says.grants == self.me")
def test_a_grant_for_a_message_of_another_boot_is_none() -> None:
    a, w = member("a"), member("w")
    tell(0, a, w)
    for clock in (-1.0, 1000.0):
        a.hear(0.1, "w", w.says(0.1, clock))
        assert a.lease_until < 0


@pytest.mark.mutation("a-host-serves-only-in-terms-that-it-remembers", instead="says.released")
def test_a_host_that_lost_its_disk_serves_again_only_by_a_vote() -> None:
    w, a = member("w", term=2), member("a", 10)
    tell(10, w, a)
    assert (a.kept.term, a.may_serve) == (2, False)
    b = member("b", term=1, active="b")
    b.tick(10, READY)
    tell(10, a, b)
    assert (b.kept.term, b.may_serve) == (3, True)


@pytest.mark.mutation("a-candidate-of-an-earlier-term-gives-up")
def test_a_candidate_that_hears_of_a_later_term_does_not_begin_an_earlier_one() -> None:
    b, w = voted(10)
    late = w.says(10, 10)
    tell(12, member("a", term=2), b, heard_at=-1.0)
    b.hear(12, "w", late)
    assert (b.kept.term, b.kept.active) == (2, "a")


@pytest.mark.mutation("a-new-term-has-no-lease-yet")
def test_a_new_term_does_not_begin_with_the_lease_of_an_earlier_one() -> None:
    a, w = member("a"), member("w")
    tell(10, a, w)
    tell(10, w, a)
    assert a.lease_until == 11
    a.tick(10, READY)
    tell(10.1, member("b", term=1, active="b", released=True), a)
    assert (a.kept.term, a.may_serve) == (2, True)
    assert a.lease_until < 0


@pytest.mark.mutation("a-dissolution-is-of-one-term", instead="says.dissolved and self._granted[1] == says.active")
def test_a_late_message_about_an_earlier_term_dissolves_nothing() -> None:
    # b made the promise for term 0. It may have been void before it heard of term 2.
    a = member("a", term=2)
    tell(10, member("b", dissolved=True), a)
    assert not a.alone


@pytest.mark.mutation("a-dissolved-witness-votes-for-no-other")
def test_a_dissolved_witness_votes_only_for_the_active_host() -> None:
    w = member("w", dissolved=True)
    b = member("b")
    b.tick(10, READY)
    tell(10, b, w, heard_at=0)
    assert w.kept.voted == 0
    tell(20, member("a"), w, wants=2)
    assert (w.kept.voted, w.kept.candidate) == (2, "a")


@pytest.mark.mutation("a-dissolved-standby-wants-nothing")
def test_a_dissolved_standby_wants_no_turn() -> None:
    a, b, w = member("a"), member("b"), member("w", voted=1, candidate="b")
    a.dissolve()
    tell(1, a, b)
    tell(1, b, a)
    assert a.alone
    b.tick(10, READY)
    tell(10, b, w)
    tell(10, w, b)
    assert not b.may_serve


@pytest.mark.mutation("a-host-that-is-heard-is-not-off")
def test_a_host_whose_partner_is_off_serves_alone_and_the_partner_stands_by_when_it_is_back() -> None:
    """An operator says that it is off. That counts only while nothing is heard of it."""
    for name, other, active in (("b", "a", "a"), ("a", "b", "a")):
        it, off = member(name, active=active), member(other, active=active)
        tell(10, off, it)
        it.continue_alone(10 + TIMING.promise_s / 2)
        assert not it.alone
        it.continue_alone(10 + TIMING.promise_s + SOON_S)
        assert it.alone and it.kept.term > 0
        tell(20, it, off, heard_at=-1.0)
        assert not off.may_serve
        off.tick(30, READY)
        assert off.wants == 0
        it.continue_alone(30)
        assert it.kept.term <= 2, "once is enough"


@pytest.mark.mutation("a-candidate-that-learns-of-the-end-gives-up")
def test_a_candidate_that_dissolves_the_group_does_not_begin() -> None:
    b, w = voted(10)
    a = member("a")
    a.dissolve()
    tell(10, a, b, heard_at=-1.0)  # a has not heard b for long, so b promises it no time
    tell(10, b, a)
    assert a.alone
    tell(10, w, b)
    assert not b.may_serve


@pytest.mark.mutation("a-host-that-is-alone-keeps-its-turn")
def test_a_host_that_is_alone_does_not_give_its_turn_away() -> None:
    a, b = member("a", dissolved=True), member("b", active="b", term=1)
    b.tick(10, READY)
    tell(10, replace_kept(b, Kept(active="a")), a)
    a.tick(10, Local(gives_way=True))
    assert a.alone


@pytest.mark.mutation("a-host-that-is-alone-wants-nothing", instead="self._voted_elsewhere > kept.term")
def test_a_host_that_is_alone_begins_no_term() -> None:
    _, w = voted(10)
    a = member("a", dissolved=True)
    tell(12, w, a)
    a.tick(12, READY)
    tell(12, a, w)
    tell(12, w, a)
    assert a.alone


def test_an_active_host_begins_a_new_term_after_a_vote_for_a_host_that_died() -> None:
    _, w = voted(10)
    a = member("a")
    tell(12, w, a)
    a.tick(12, READY)
    tell(12, a, w)
    tell(12, w, a)
    assert (a.kept.term, a.lease_until) == (2, 13)


def test_a_candidate_wants_a_term_above_a_vote_for_a_host_that_died() -> None:
    b, w = member("b"), member("w", voted=2, candidate="a")
    b.tick(10, READY)
    tell(10, w, b)
    b.tick(10, READY)
    tell(10, b, w)
    tell(10, w, b)
    assert (b.kept.term, b.lease_until) == (3, 11)


def replace_kept(it: Member, kept: Kept) -> Member:
    it.kept = kept
    return it


def test_a_host_takes_only_the_term_after_the_released_one() -> None:
    # The other one may have begun a later term by a vote: this one gets no lease of the term between.
    b, w = member("b"), member("w", voted=2, candidate="a")
    b.tick(1, READY)
    tell(1, w, b)
    tell(1, member("a", released=True), b)
    assert (b.kept.term, b.may_serve) == (1, True)
    tell(1, b, w)
    assert w.says(1, 1).grants == ""


# ------------------------------------------------------------------------------------------------ without a witness


PAIR_FAULTS = st.lists(
    st.tuples(st.floats(0, 3), st.sampled_from(PAIR_KINDS), st.integers(0, 30), LASTS_S), min_size=1, max_size=12
)


@given(PAIR_FAULTS, *WORLDS[1:])
@settings(max_examples=300, deadline=None)
def test_without_a_witness_two_hosts_serve_only_while_both_reach_the_upstream_and_not_each_other(
    faults: list[Fault], seed: int, loss: float, delay_s: float
) -> None:
    check(faults, seed, loss, delay_s, PAIR)


@pytest.mark.long
@given(PAIR_FAULTS, *WORLDS[1:])
@settings(max_examples=40_000, deadline=None)
def test_without_a_witness_many_thousand_runs(faults: list[Fault], seed: int, loss: float, delay_s: float) -> None:
    check(faults, seed, loss, delay_s, PAIR)


def test_without_a_witness_a_standby_that_the_upstream_does_not_answer_takes_nothing_over() -> None:
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.fault("no upstream for one", B, 10.0)
        it.power("a", False)
        it.run_for(8)
        assert (it.serving, it.term) == ([], 0)
        it.run_for(2 + TIMING.promise_s + 3 * ASK_S)
        assert (it.serving, it.term) == (["b"], 1)


@pytest.mark.parametrize("kind", ["power", "freeze", "cut off"])
def test_without_a_witness_the_active_host_serves_on_without_its_standby(kind: str) -> None:
    for seed in SEEDS:
        it = world(seed, loss=0.05, group=PAIR)
        it.fault(kind, B, 5.0)
        it.run_for(10)
        assert (it.serving, it.term, it.gaps) == (["a"], 0, [])


@pytest.mark.parametrize("kind", ["no upstream", "no upstream for one"])
def test_without_a_witness_the_upstream_is_not_missed_while_the_hosts_hear_each_other(kind: str) -> None:
    for seed in SEEDS:
        it = world(seed, loss=0.05, group=PAIR)
        it.fault(kind, A, 5.0)
        it.run_for(10)
        assert (it.serving, it.term, it.gaps) == (["a"], 0, [])


def test_without_a_witness_a_host_that_nobody_answers_stops_and_goes_on_later() -> None:
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.fault("power", B, 30.0)
        it.fault("no upstream", A, 5.0)
        it.run_for(1.1)
        assert it.serving == []
        it.run_for(7)
        assert (it.serving, it.term) == (["a"], 0)


@pytest.mark.mutation("silence-counts-while-the-upstream-answers")
def test_without_a_witness_one_serves_after_all_was_cut() -> None:
    """The upstream answers before the other host is heard."""
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.fault("cut off", A, 5.0)
        it.fault("no upstream", B, 5.0)
        it.run_for(2)
        assert it.serving == []
        it.run_for(6)
        assert (it.serving, it.term, it.two, it.split) == (["a"], 0, [], [])


def test_without_a_witness_one_serves_again_after_a_split() -> None:
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.fault("between", A, 5.0)
        it.run_for(4)
        assert it.serving == ["a", "b"] and it.split  # this is what cannot be prevented
        it.run_for(1 + 2 * BEAT_S)
        assert (it.serving, it.term) == (["b"], 1)
        it.run_for(5)
        assert (it.serving, it.term, it.two) == (["b"], 1, [])


@pytest.mark.mutation("the-upstream-decides-only-in-silence", instead="True")
def test_without_a_witness_an_active_host_that_is_not_heard_is_replaced() -> None:
    """It hears its standby, which does not hear it. Both reach the upstream."""
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.part([("a", "b")], 5.0)
        it.run_for(4)
        assert (it.serving, it.term, it.two, it.split) == (["b"], 1, [], [])
        it.run_for(5)
        assert (it.serving, it.term, it.two, it.split) == (["b"], 1, [], [])


def test_without_a_witness_an_active_host_that_does_not_hear_its_standby_serves_on() -> None:
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.part([("b", "a")], 5.0)
        it.run_for(10)
        assert (it.serving, it.term, it.gaps) == (["a"], 0, [])


def test_without_a_witness_a_turn_that_is_given_away_is_taken_at_once() -> None:
    for seed in SEEDS:
        it = world(seed, group=PAIR)
        it.fault("not ready", A, 20.0)
        it.run_for(0.2)
        assert (it.serving, it.term) == (["b"], 1)


def test_without_a_witness_a_group_is_dissolved_by_its_standby() -> None:
    it = world(0, group=PAIR)
    it.fault("dissolve", A, 0.0)
    it.run_for(0.5)
    assert it.alone == {"a"}
    it.power("a", False)
    it.run_for(10)
    assert it.serving == ["a"] and not it.two
    it = world(0, group=PAIR)
    it.power("b", False)
    it.fault("dissolve", A, 0.0)
    it.run_for(5)
    assert (it.serving, it.alone) == (["a"], set())  # nobody has promised anything


def pair_member(name: str, now: float = 0.0, **kept: int | str | bool) -> Member:
    return Member(PAIR, name, TIMING, Kept(**{"active": "a"} | kept), now)  # type: ignore[arg-type]


def answered(it: Member, begin: float, end: float, *, every_s: float = ASK_S) -> None:
    """The upstream answers each question at once, and a message is sent each time."""
    while begin <= end:
        it.says(begin, -1)
        it.answered(begin, begin)
        begin += every_s


@pytest.mark.mutation("a-candidate-hears-nobody", instead="self.wants")
def test_a_candidate_begins_when_the_upstream_has_answered_for_longer_than_a_promise() -> None:
    b = pair_member("b")
    b.tick(10, READY)
    assert b.wants == 1
    answered(b, 10, 10 + TIMING.promise_s - SOON_S)
    assert not b.may_serve
    b.tick(10 + TIMING.promise_s + SOON_S, READY)
    assert b.may_serve and b.lease_until == pytest.approx(12)  # from the last question on


@pytest.mark.mutation("a-lease-that-ended-needs-a-longer-silence", instead="is_silent")
def test_a_lease_that_has_ended_comes_back_only_after_a_long_silence() -> None:
    a = pair_member("a")
    answered(a, 10, 11)
    assert a.lease_until < 0
    answered(a, 11.1, 11.3)
    assert a.lease_until > 12


@pytest.mark.mutation("a-lease-of-the-upstream-ends-before-a-promise", instead="asked_at")
def test_a_lease_of_the_upstream_ends_before_the_other_host_may_begin() -> None:
    """The standby counts from the newest message. A host that dies now does not send another one."""
    a, b = pair_member("a"), pair_member("b")
    answered(a, 8, 10)
    assert a.lease_until == pytest.approx(11)
    tell(10, a, b)
    a.answered(10.4, 10.4)
    assert a.lease_until <= b.promised_until - TIMING.lease_s * 0.05


@pytest.mark.mutation("the-upstream-has-no-vote-with-a-witness", instead="False")
def test_an_old_answer_of_the_upstream_and_one_in_a_group_with_a_witness_count_nothing() -> None:
    with_witness, late = member("a"), pair_member("a")
    answered(with_witness, 8, 10)
    assert with_witness.lease_until < 0
    answered(late, 8, 8.9)
    late.tick(9.6, READY)
    assert late.lease_until < 0
