"""Which heartbeats are accepted: each once, and only of a boot that has heard this one's own boot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.agent.standby.boots import ECHO_NS_MAX, Boots
from netloom.heartbeatwire import NOBODY, Beat, Echo

MINE = b"my boot!"
SECOND = 1_000_000_000
NOW = 1000 * SECOND


def beat(boot: bytes, seq: int, *, echo: int | None = None, of: bytes = MINE, greets: bool = False) -> Beat:
    """A message of host 1 to host 0. ``echo``: the clock of host 0 in it, of its boot ``of``."""
    it = None if echo is None else Echo(of, echo)
    return Beat(
        group_id="0000002a",
        sender=1,
        boot=boot,
        seq=seq,
        sent=seq * 10,
        heard=(None if greets else it, None, None),
        greeting=(it if greets else None, None, None),
        term=0,
        active=0,
        released=False,
        voted=0,
        grants=NOBODY,
        grants_term=0,
        wants=0,
        ready=True,
    )


def judge(boots: Boots, message: Beat, now: int = NOW) -> str:
    verdict = boots.judge(message, 0, MINE, now)
    if verdict == "accepted":
        boots.used(message, now / SECOND)
    return verdict


def proved(boot: bytes = b"boot one", seq: int = 1) -> Boots:
    boots = Boots()
    assert judge(boots, beat(boot, seq, echo=NOW - 100)) == "accepted"
    return boots


@pytest.mark.mutation("a-heartbeat-is-accepted-once")
def test_each_heartbeat_is_accepted_once_and_in_order() -> None:
    boots = proved(seq=5)
    verdicts = [judge(boots, beat(b"boot one", seq)) for seq in (5, 4, 6, 6, 9, 7, 10)]
    assert verdicts == ["dropped", "dropped", "accepted", "dropped", "accepted", "dropped", "accepted"]
    assert boots.heard == Echo(b"boot one", 100)


@pytest.mark.mutation("a-boot-has-to-be-proved")
@pytest.mark.parametrize(
    ("echo", "of"),
    [
        (None, MINE),
        (NOW - 100, b"another!"),
        (NOW - ECHO_NS_MAX - 1, MINE),
        (NOW + 1, MINE),
    ],
    ids=["no echo", "an earlier boot of ours", "too old", "from the future"],
)
@pytest.mark.parametrize("greets", [True, False])
def test_a_boot_without_a_recent_clock_of_ours_is_greeted_and_not_accepted(
    echo: int | None, of: bytes, greets: bool
) -> None:
    boots = Boots()
    assert judge(boots, beat(b"boot one", 3, echo=echo, of=of, greets=greets)) == "greeted"
    assert boots.heard is None
    assert boots.greeting(NOW) == Echo(b"boot one", 30)
    assert judge(boots, beat(b"boot one", 4, echo=NOW - 1, greets=greets)) == "accepted"
    assert boots.greeting(NOW) is None
    assert boots.heard == Echo(b"boot one", 40)


@pytest.mark.mutation("an-old-boot-never-comes-back")
def test_after_a_new_boot_no_message_of_the_old_one_is_accepted() -> None:
    boots = proved()
    assert judge(boots, beat(b"boot two", 1, echo=NOW - 50, greets=True)) == "accepted"
    # Recorded, but lost on its way to us: it repeats a later clock of ours than the new boot did so far.
    assert judge(boots, beat(b"boot one", 99, echo=NOW - 10)) == "dropped"
    assert judge(boots, beat(b"boot two", 2)) == "accepted"
    later = NOW + ECHO_NS_MAX * 3
    assert judge(boots, beat(b"boot one", 100, echo=NOW), later) == "greeted"
    assert boots.heard == Echo(b"boot two", 20)


def test_a_boot_that_ended_before_the_present_one_began_is_not_accepted() -> None:
    """Its messages were recorded, and none of them was heard here while it lived."""
    boots = proved()
    assert judge(boots, beat(b"boot 3rd", 1, echo=NOW - 20)) == "accepted"
    assert judge(boots, beat(b"boot 2nd", 7, echo=NOW - 30)) == "greeted"
    assert judge(boots, beat(b"boot 3rd", 2)) == "accepted"


def test_replayed_greetings_do_not_displace_that_of_the_living_boot() -> None:
    boots = Boots()
    for old in range(30):
        judge(boots, beat(b"old %04d" % old, 5))
    judge(boots, beat(b"living!!", 1))
    seen = set()
    for at in range(31):
        for old in range(30):  # the same messages again do not refresh theirs
            assert judge(boots, beat(b"old %04d" % old, 5), NOW + at * SECOND // 40) == "dropped"
        echo = boots.greeting(NOW + at * SECOND // 40)
        seen |= {echo.boot} if echo else set()
    assert b"living!!" in seen


@given(st.lists(st.tuples(st.binary(min_size=8, max_size=8).filter(any), st.integers(1, 50)), max_size=300))
def test_what_is_remembered_of_boots_that_are_not_proved_is_bounded(messages: list[tuple[bytes, int]]) -> None:
    boots = Boots()
    for at, (boot, seq) in enumerate(messages):
        judge(boots, beat(boot, seq), NOW + at)
    assert len(boots._unproved) <= 64
    assert boots.heard is None


@pytest.mark.mutation("an-old-heartbeat-proves-no-path", instead="beat.boot == self._boot")
def test_the_last_messages_show_a_path_on_which_they_come_again() -> None:
    boots = Boots()
    assert not boots.is_recent(beat(b"theirs!!", 1))
    for seq in range(1, 10):
        boots.judge(beat(b"theirs!!", seq, echo=NOW - 1), 0, MINE, NOW)
    assert [seq for seq in range(1, 10) if boots.is_recent(beat(b"theirs!!", seq))] == [6, 7, 8, 9]
    assert not boots.is_recent(beat(b"another!", 9))
