"""The choice of a host for a scope, as a table of the hosts' answers."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.errors import HostUnreachable
from netloom.extension.placement import (
    AllTold,
    Ask,
    Fail,
    HostAnswer,
    Situation,
    Unplaced,
    Use,
    Wait,
    cksum,
    decide,
    decide_everywhere,
    preferred_order,
)

HOLDS, HAS_NOT = HostAnswer(holds=True), HostAnswer()


def down(host: str) -> HostAnswer:
    return HostAnswer(failure=f"{host}: connection refused")


def situation(stored: str = "", asked: str = "", over: str = "", reached: str = "", **given: HostAnswer) -> Situation:
    """A situation with the candidates h1, h2 and h3. ``h4`` is a host that is no candidate any more."""
    return Situation(
        scope_id="net-42",
        order=("h1", "h2", "h3"),
        stored=stored,
        asked=frozenset((*asked.split(), *given)),
        answers=given,
        over=frozenset(over.split()),  # type: ignore[arg-type]
        reached=frozenset(reached.split()),
    )


CASES: dict[str, tuple[Situation, object]] = {
    # The stored host.
    "only the stored host is asked": (situation("h2"), Ask(("h2",))),
    "only the stored host is waited for": (situation("h2", asked="h2"), Wait()),
    "the stored host answers and holds the scope": (situation("h2", h2=HOLDS), Use("h2")),
    "the stored host answers and has nothing yet": (situation("h2", h2=HAS_NOT), Use("h2")),
    "a stored host outside the candidates holds the scope": (situation("h4", h4=HOLDS), Use("h4")),
    "a stored host outside the candidates has nothing: all are asked": (
        situation("h4", h4=HAS_NOT),
        Ask(("h1", "h2", "h3")),
    ),
    "no candidate holds the scope either": (
        situation("h4", h4=HAS_NOT, h1=HAS_NOT, h2=HAS_NOT, h3=HAS_NOT),
        Unplaced("h1"),
    ),
    "a candidate holds the scope": (situation("h4", "h1 h2", h4=HAS_NOT, h3=HOLDS), Use("h3")),
    # No stored host.
    "no stored host: all are asked": (situation(), Ask(("h1", "h2", "h3"))),
    "no host has answered": (situation(asked="h1 h2 h3"), Wait()),
    "only failures so far": (situation(asked="h1 h2 h3", h1=down("h1")), Wait()),
    "one holds the scope, the others may be silent": (situation(asked="h1 h2", h3=HOLDS), Use("h3")),
    "two hold the scope: the preferred one": (situation(asked="h1", h2=HOLDS, h3=HOLDS), Use("h2")),
    "one has nothing: the others get a grace period": (situation(asked="h1 h2", h3=HAS_NOT), Wait("stragglers")),
    "the grace period is over": (situation(asked="h1 h2", over="stragglers", h3=HAS_NOT), Unplaced("h3")),
    "the grace period is over, and no host has answered": (
        situation(asked="h1 h2", over="stragglers", h3=down("h3")),
        Wait(),
    ),
    "no host holds the scope: the preferred one": (situation(h1=HAS_NOT, h2=HAS_NOT, h3=HAS_NOT), Unplaced("h1")),
    "the preferred host is down": (situation(h1=down("h1"), h2=HAS_NOT, h3=HAS_NOT), Unplaced("h2")),
}


@pytest.mark.parametrize("name", CASES)
def test_decide(name: str) -> None:
    now, expected = CASES[name]
    assert decide(now) == expected


def failed(decision: object) -> str:
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, HostUnreachable)
    return str(decision.error)


def test_a_scope_whose_host_is_down_is_not_moved() -> None:
    for now in (
        situation("h2", h2=down("h2")),
        situation("h2", h2=down("h2"), h1=HAS_NOT, h3=HOLDS),
        situation("h2", h2=down("h2"), h1=down("h1"), h3=down("h3")),
    ):
        assert failed(decide(now)) == (
            "h2: connection refused (net-42 lives on h2 and was not moved: bring that host back)"
        )


def test_the_error_names_every_host_that_failed() -> None:
    text = failed(decide(situation(h1=down("h1"), h2=down("h2"), h3=down("h3"))))
    assert text == ("none of the hosts answers: h1: connection refused; h2: connection refused; h3: connection refused")


EVERYWHERE: dict[str, tuple[Situation, object]] = {
    "all hosts are asked": (situation(), Ask(("h1", "h2", "h3"))),
    "a stored host outside the candidates is asked too": (situation("h4"), Ask(("h4", "h1", "h2", "h3"))),
    "no host has answered": (situation(asked="h1 h2 h3"), Wait()),
    "one is done, the others get a grace period": (situation(asked="h1 h2", h3=HOLDS), Wait("stragglers")),
    "the grace period is over": (situation(asked="h1 h2", over="stragglers", h3=HOLDS), AllTold(("h3",))),
    "a host that was reached has time to finish": (
        situation(asked="h1 h2", over="stragglers", reached="h1", h3=HOLDS),
        Wait(),
    ),
    "the stored host has time to finish": (situation("h2", asked="h1 h2", over="stragglers", h3=HOLDS), Wait()),
    "all hosts are done": (situation("h1", h1=HOLDS, h2=HAS_NOT, h3=HAS_NOT), AllTold(("h1", "h2", "h3"))),
    "a candidate is down": (situation("h1", h1=HOLDS, h2=down("h2"), h3=HAS_NOT), AllTold(("h1", "h3"))),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_decide_everywhere(name: str) -> None:
    now, expected = EVERYWHERE[name]
    assert decide_everywhere(now) == expected


def test_everywhere_needs_the_stored_host_and_at_least_one_host() -> None:
    assert failed(decide_everywhere(situation("h2", h1=HAS_NOT, h2=down("h2"), h3=HAS_NOT))).startswith("h2: ")
    assert failed(decide_everywhere(situation(h1=down("h1"), h2=down("h2"), h3=down("h3")))).startswith("none of")


ANSWER = st.sampled_from([HOLDS, HAS_NOT, down("x")])


@given(
    stored=st.sampled_from(["", "h1", "h2", "h4"]),
    answers=st.fixed_dictionaries(dict.fromkeys(("h1", "h2", "h3", "h4"), ANSWER)),
    order=st.permutations(["h1", "h2", "h3", "h4"]),
    grace=st.integers(0, 4),
    everywhere=st.booleans(),
)
def test_every_enquiry_terminates_and_never_abandons_the_stored_host(
    stored: str, answers: dict[str, HostAnswer], order: list[str], grace: int, everywhere: bool
) -> None:
    """In any order of answers and grace periods there is a decision, for a host that answered. If the stored host does
    not answer, only a host that holds the scope replaces it."""
    now = situation(stored)
    decision: object = None
    for step in range(40):
        decision = (decide_everywhere if everywhere else decide)(now)
        if isinstance(decision, Ask):
            assert not set(decision.hosts) & now.asked
            now = situation(stored, " ".join((*now.asked, *decision.hosts)), " ".join(now.over), "", **now.answers)
        elif isinstance(decision, Wait):
            if decision.patience and step >= grace:
                now = situation(
                    stored, " ".join(now.asked), " ".join((*now.over, decision.patience)), "", **now.answers
                )
            else:
                host = next(host for host in order if host in now.asked and host not in now.answers)
                given = {**now.answers, host: answers[host]}
                now = situation(stored, " ".join(now.asked), " ".join(now.over), "", **given)
        else:
            break
    match decision:
        case Use(host):
            assert now.answers[host].answered
            assert host == stored or now.answers[host].holds
        case Unplaced(host):
            assert now.answers[host].answered
            assert not stored or (stored not in now.order and now.answers[stored].answered)
        case AllTold(hosts):
            assert hosts
            assert all(now.answers[host].answered for host in hosts)
        case _:
            assert isinstance(decision, Fail)


@given(st.binary(max_size=300))
def test_cksum_matches_the_posix_definition(data: bytes) -> None:
    """POSIX, cksum: the CRC of ISO 8802-3 over the octets and then the length, least significant octet first."""
    crc = 0
    length = len(data)
    tail = b""
    while length:
        tail += bytes([length & 0xFF])
        length >>= 8
    for octet in data + tail:
        crc ^= octet << 24
        for _ in range(8):
            crc = (crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1
        crc &= 0xFFFFFFFF
    assert cksum(data) == crc ^ 0xFFFFFFFF


def test_cksum_matches_the_tool() -> None:
    for text in ("", "1", "42", "204", "7", "1234567890", "x" * 300):
        printed = subprocess.run(["cksum"], input=text, capture_output=True, text=True, check=True).stdout
        assert cksum(text.encode()) == int(printed.split()[0])


def test_the_preferred_order_starts_at_the_crc_and_wraps_around() -> None:
    assert cksum(b"42") % 3 == 0
    assert preferred_order("42", ["a", "b", "c"]) == ("a", "b", "c")
    assert cksum(b"42") % 2 == 1
    assert preferred_order("42", ["a", "b"]) == ("b", "a")
    assert preferred_order("42", ["a", "b", "a"]) == ("b", "a")  # a host that is listed twice counts once
    assert preferred_order("42", []) == ()
