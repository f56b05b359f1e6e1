"""The choice of a host for a scope, as a table of the hosts' answers."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.errors import HostUnreachable, NetloomError
from netloom.extension.placement import (
    AllTold,
    Ask,
    AskAgain,
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
from netloom.wire import StandbyReply

HOLDS, HAS_NOT = HostAnswer(holds=True), HostAnswer()
DRAINED = HostAnswer(drained=True)


def claims(epoch: int, gate: str = "open", *, proven: bool = True) -> HostAnswer:
    """A host says that it has the scope. By default it has a proof."""
    return HostAnswer(
        holds=True, epoch=epoch, gate=gate, is_proven=proven, why="h9 answers" if gate == "passive" else ""
    )


def moved(to: str, epoch: int) -> HostAnswer:
    return HostAnswer(moved_to=to, epoch=epoch)


def stands_by(active: str, epoch: int, *, proven: bool = True) -> HostAnswer:
    """A host says that it stands by for the scope. By default it has a proof."""
    return HostAnswer(moved_to=active, epoch=epoch, gate="standby", is_proven=proven)


def leases(epoch: int, gate: str = "open", *, proven: bool = True) -> HostAnswer:
    """A host says that it is the active one of a group, and has its lease."""
    group = StandbyReply(group_id="1a2b3c4d", host="h1", witness="h3", serving=True)
    return replace(claims(epoch, gate, proven=proven), standby=group)


def may_take(*hosts: str, holds: int = 0, gate: str = "open", drained: bool = False) -> HostAnswer:
    """A host with the record that these hosts are dead. ``holds``: the epoch of the scope, if it has the scope."""
    return HostAnswer(bool(holds), epoch=holds, gate=gate if holds else "", drained=drained, evacuated=frozenset(hosts))


def down(host: str) -> HostAnswer:
    return HostAnswer(failure=f"{host}: connection refused")


def situation(
    stored: str = "",
    asked: str = "",
    over: str = "",
    reached: str = "",
    epoch: int = 0,
    previous: tuple[str, ...] = (),
    standby: str = "",
    removes: bool = False,
    **given: HostAnswer,
) -> Situation:
    """A situation with the candidates h1, h2 and h3. ``h4`` is a host that is no candidate any more."""
    return Situation(
        scope_id="net-42",
        order=("h1", "h2", "h3"),
        stored=stored,
        asked=frozenset((*asked.split(), *given)),
        answers=given,
        over=frozenset(over.split()),  # type: ignore[arg-type]
        reached=frozenset(reached.split()),
        epoch=epoch,
        previous=previous,
        standby=standby,
        removes=removes,
    )


CASES: dict[str, tuple[Situation, object]] = {
    # The stored host.
    "only the stored host is asked": (situation("h2"), Ask(("h2",))),
    "only the stored host is waited for": (situation("h2", asked="h2"), Wait()),
    "the stored host answers and holds the scope": (situation("h2", h2=HOLDS), Use("h2")),
    "the stored host answers and has nothing yet": (situation("h2", h2=HAS_NOT, h1=HOLDS, h3=HAS_NOT), Use("h2")),
    "a stored host outside the candidates holds the scope": (situation("h4", h4=HOLDS), Use("h4")),
    "a stored host outside the candidates has nothing: all are asked": (
        situation("h4", h4=HAS_NOT),
        Ask(("h1", "h2", "h3")),
    ),
    "no candidate holds the scope either": (
        situation("h4", h4=HAS_NOT, h1=HAS_NOT, h2=HAS_NOT, h3=HAS_NOT),
        Unplaced("h1"),
    ),
    "a candidate holds the scope": (situation("h4", "h1 h2", "stragglers", h4=HAS_NOT, h3=HOLDS), Use("h3")),
    # No stored host.
    "no stored host: all are asked": (situation(), Ask(("h1", "h2", "h3"))),
    "no host has answered": (situation(asked="h1 h2 h3"), Wait()),
    "only failures so far": (situation(asked="h1 h2 h3", h1=down("h1")), Wait()),
    "one holds the scope, the others get a grace period": (situation(asked="h1 h2", h3=HOLDS), Wait("stragglers")),
    "one holds the scope, the others may be silent": (situation("", "h1 h2", "stragglers", h3=HOLDS), Use("h3")),
    "two hold the scope: the preferred one": (situation(h1=HAS_NOT, h2=HOLDS, h3=HOLDS), Use("h2")),
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


DOWN1, DOWN2, DOWN3 = (down(host) for host in ("h1", "h2", "h3"))

# The scope has moved, or is being moved. The stored host is h1, with the epoch 3, unless a row says otherwise.
MOVES: dict[str, tuple[Situation, object]] = {
    # The stored host serves.
    "the epoch is the host's": (situation("h1", epoch=3, h1=claims(5)), Use("h1", 5)),
    "or the stored one, if the host has an older copy": (situation("h1", epoch=3, h1=claims(2)), Use("h1", 3)),
    "a drained stored host keeps its scopes": (
        situation("h1", epoch=3, h1=HostAnswer(holds=True, epoch=3, gate="open", drained=True)),
        Use("h1", 3),
    ),
    "also one that has nothing yet": (situation("h1", epoch=3, h1=DRAINED, h2=HAS_NOT, h3=HAS_NOT), Use("h1", 3)),
    "the stored host has nothing: did it lose it?": (situation("h1", epoch=3, h1=HAS_NOT), Ask(("h2", "h3"))),
    "its scopes were evacuated before it was installed anew": (
        situation("h1", epoch=3, h1=HAS_NOT, h2=claims(4), h3=HAS_NOT),
        Use("h2", 4),
    ),
    "it has nothing yet, and another one has an old proof": (
        situation("h1", epoch=3, h1=HAS_NOT, h2=claims(3), h3=claims(9, proven=False)),
        Use("h1", 3),
    ),
    # The stored host says where the scope went.
    "the next host is asked": (situation("h1", epoch=3, h1=moved("h2", 4)), Ask(("h2",))),
    "and waited for": (situation("h1", "h2", epoch=3, h1=moved("h2", 4)), Wait()),
    "and needs no proof": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=claims(4, proven=False)),
        Use("h2", 4),
    ),
    "the registration's spelling counts": (situation("h1", epoch=3, h1=moved("H2", 4)), Ask(("h2",))),
    "the next host has the next placement": (situation("h1", epoch=3, h1=moved("h2", 4), h2=claims(3)), Ask(("h3",))),
    "it moved again": (situation("h1", epoch=3, h1=moved("h2", 4), h2=moved("h3", 5)), Ask(("h3",))),
    "and is there": (situation("h1", epoch=3, h1=moved("h2", 4), h2=moved("h3", 5), h3=claims(5)), Use("h3", 5)),
    "the next host is being opened": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=claims(4, "incoming"), h3=HAS_NOT),
        AskAgain(("h2",)),
    ),
    "it came back, and CloudStack never knew": (
        situation("h1", epoch=3, h1=claims(5, "incoming"), h2=claims(4), h3=HAS_NOT),
        Use("h2", 4, ("h1",)),
    ),
    "the next host is silent: the others are asked": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=DOWN2),
        Ask(("h3",)),
    ),
    "it was moved away from the next host, which is dead": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=DOWN2, h3=claims(5)),
        Use("h3", 5, ("h2",)),
    ),
    # The last step of a move.
    "the gate is closed for a moment": (situation("h1", epoch=3, h1=claims(3, "closed")), AskAgain(("h1",))),
    "it stays closed: the others are asked": (
        situation("h1", over="moves", epoch=3, h1=claims(3, "closed")),
        Ask(("h2", "h3")),
    ),
    # The stored host is silent.
    "others are asked for a proof": (situation("h1", epoch=3, h1=DOWN1), Ask(("h2", "h3"))),
    "they are waited for": (situation("h1", "h2 h3", epoch=3, h1=DOWN1), Wait()),
    "one has a proof, another may have a newer one": (
        situation("h1", "h3", epoch=3, h1=DOWN1, h2=claims(4)),
        Wait("stragglers"),
    ),
    "the grace period is over": (
        situation("h1", "h3", "stragglers", epoch=3, h1=DOWN1, h2=claims(4)),
        Use("h2", 4, ("h1",)),
    ),
    "the newest proof counts": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4), h3=claims(5)),
        Use("h3", 5, ("h1",)),
    ),
    "an authorised host is about to open": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4, "incoming"), h3=may_take("h1")),
        AskAgain(("h2",)),
    ),
    # The stored host is passive.
    "a passive host: the others are asked": (situation("h1", epoch=3, h1=claims(3, "passive")), Ask(("h2", "h3"))),
    "a passive host, and a proof": (
        situation("h1", epoch=3, h1=claims(3, "passive"), h2=HAS_NOT, h3=claims(4)),
        Use("h3", 4, ("h1",)),
    ),
    # The stored host is declared dead.
    "a host that may take the scopes of a dead one": (
        situation("h1", epoch=3, h1=DOWN1, h2=HAS_NOT, h3=may_take("h1")),
        Use("h3", 4, ("h1",)),
    ),
    "the preferred one of them": (
        situation("h3", epoch=3, h1=may_take("h3"), h2=may_take("h3"), h3=DOWN3),
        Use("h1", 4, ("h3",)),
    ),
    "the one that has it already": (
        situation("h3", epoch=3, h1=may_take("h3"), h2=may_take("h3", holds=4), h3=DOWN3),
        Use("h2", 4, ("h3",)),
    ),
    "a proof comes first": (
        situation("h3", epoch=3, h1=may_take("h3"), h2=claims(7), h3=DOWN3),
        Use("h2", 7, ("h3",)),
    ),
    "a drained one takes nothing": (
        situation("h3", epoch=3, h1=may_take("h3", drained=True), h2=may_take("h3"), h3=DOWN3),
        Use("h2", 4, ("h3",)),
    ),
    "a host that the scope left takes nothing": (
        situation(
            "h3", epoch=3, h1=HostAnswer(moved_to="h9", evacuated=frozenset({"h3"})), h2=may_take("h3"), h3=DOWN3
        ),
        Use("h2", 4, ("h3",)),
    ),
    "two hosts are dead": (
        situation("h1", epoch=3, h1=DOWN1, h2=DOWN2, h3=may_take("h1", "h2")),
        Use("h3", 4, ("h1",)),
    ),
    "it was moved to a host that died, too": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=DOWN2, h3=may_take("h2")),
        Use("h3", 5, ("h2",)),
    ),
    # Nothing is stored.
    "a proof is better than a claim": (situation(h1=claims(9, proven=False), h2=claims(2), h3=HAS_NOT), Use("h2", 2)),
    "the newest proof": (situation(h1=claims(1), h2=claims(2), h3=HAS_NOT), Use("h2", 2)),
    "a number without a proof is no reason": (
        situation(h1=HOLDS, h2=claims(9, proven=False), h3=HAS_NOT),
        Use("h1", 0),
    ),
    "one is open, the other one is not yet": (
        situation(h1=HOLDS, h2=claims(1, "incoming"), h3=HAS_NOT),
        Use("h1", 0),
    ),
    "one is passive": (situation(h1=claims(1, "passive"), h2=claims(2), h3=HAS_NOT), Use("h2", 2)),
    "one is closed, the other one is not yet open": (
        situation(h1=claims(0, "closed"), h2=claims(1, "incoming"), h3=HAS_NOT),
        AskAgain(("h1", "h2")),
    ),
    "somebody claims a network in the last step of its move": (
        situation(h1=claims(0, "closed"), h2=claims(1, "incoming"), h3=claims(7, proven=False)),
        AskAgain(("h1", "h2")),
    ),
    "a scope that was moved and has ended gets a new epoch": (
        situation(h1=moved("h2", 1), h2=HAS_NOT, h3=HAS_NOT),
        Unplaced("h1", 2),
    ),
    "an absurd epoch is ignored": (situation(h1=moved("h2", 1 << 50), h2=HAS_NOT, h3=HAS_NOT), Unplaced("h1", 0)),
    "a drained host gets no new scope": (situation(h1=DRAINED, h2=HAS_NOT, h3=HAS_NOT), Unplaced("h2")),
    "to remove nothing, any host will do": (
        situation(removes=True, h1=DRAINED, h2=DRAINED, h3=DRAINED),
        Unplaced("h1"),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_decide_about_moves(name: str) -> None:
    now, expected = MOVES[name]
    assert decide(now) == expected


# The scope has a standby. Its group is h1, h2, and h3 as the witness.
STANDBY: dict[str, tuple[Situation, object]] = {
    "the active host serves: no other is asked": (situation("h1", epoch=3, h1=claims(3)), Use("h1", 3)),
    "the other one took over": (situation("h1", epoch=3, h1=stands_by("h2", 4)), Ask(("h2",))),
    "and serves": (situation("h1", epoch=3, h1=stands_by("h2", 4), h2=claims(4, proven=False)), Use("h2", 4)),
    "it gave way again since": (situation("h1", epoch=3, h1=claims(5)), Use("h1", 5)),
    "the active host is dead, and the other one took over": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4), h3=HAS_NOT),
        Use("h2", 4, ("h1",)),
    ),
    "it has not taken over yet": (
        situation("h1", epoch=3, h1=DOWN1, h2=stands_by("h1", 3), h3=HAS_NOT),
        AskAgain(("h2",)),
    ),
    "the active host has no lease: the others are asked": (
        situation("h1", epoch=3, h1=claims(3, "standby")),
        Ask(("h2", "h3")),
    ),
    "one of the two will serve soon": (
        situation("h1", epoch=3, h1=claims(3, "standby"), h2=stands_by("h1", 3), h3=HAS_NOT),
        AskAgain(("h1", "h2")),
    ),
    "the active host is cut off from its group, and does not know that the other one serves": (
        situation("h1", epoch=3, h1=claims(3, "standby"), h2=claims(4), h3=HAS_NOT),
        Use("h2", 4, ("h1",)),
    ),
    "both say that the other one is active, for a moment": (
        situation("h1", epoch=3, h1=stands_by("h2", 4), h2=stands_by("h1", 4)),
        AskAgain(("h1", "h2")),
    ),
    "the host that took over is dead: the stored host will be active again": (
        situation("h1", epoch=3, h1=stands_by("h2", 4), h2=DOWN2, h3=HAS_NOT),
        AskAgain(("h1",)),
    ),
    "the stored host was installed anew": (
        situation("h1", epoch=3, h1=HAS_NOT, h2=stands_by("h1", 3), h3=HAS_NOT),
        AskAgain(("h2",)),
    ),
    "nothing is stored": (situation(h1=claims(3), h2=stands_by("h1", 3), h3=HAS_NOT), Use("h1", 3)),
    "nothing is stored, and it has not taken over yet": (
        situation(h1=DOWN1, h2=stands_by("h1", 3), h3=HAS_NOT),
        AskAgain(("h2",)),
    ),
    "nothing is stored, and no host has a lease yet": (
        situation(h1=claims(3, "standby"), h2=stands_by("h1", 3), h3=HAS_NOT),
        AskAgain(("h1", "h2")),
    ),
}


# The same while the active host has not answered, and CloudStack knows of the standby.
SILENT: dict[str, tuple[Situation, object]] = {
    "it gets a moment": (situation("h1", "h1", epoch=3, standby="h2"), Wait("host")),
    "the others are asked, too": (situation("h1", "h1", "host", epoch=3, standby="h2"), Ask(("h2", "h3"))),
    "nobody has answered": (situation("h1", "h1 h2 h3", "host", epoch=3, standby="h2"), Wait()),
    "the standby has taken over": (
        situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=leases(4)),
        Use("h2", 4, ("h1",)),
    ),
    "it will": (
        situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=stands_by("h1", 3)),
        AskAgain(("h2",)),
    ),
    "it does not": (situation("h1", "h1 h3", "host moves", epoch=3, standby="h2", h2=stands_by("h1", 3)), Wait()),
    "another host is the standby now": (
        situation("h1", "h1", "host", epoch=3, standby="h2", h2=HAS_NOT, h3=leases(5)),
        Use("h3", 5, ("h1",)),
    ),
    "no proof": (situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=leases(4, proven=False)), Wait()),
    "an old lease": (situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=leases(3)), Wait()),
    "no lease": (situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=leases(4, "standby")), Wait()),
    "a placement without a lease": (situation("h1", "h1 h3", "host", epoch=3, standby="h2", h2=claims(4)), Wait()),
    "the active host answers after all": (
        situation("h1", "h3", "host", epoch=3, standby="h2", h1=claims(3), h2=stands_by("h1", 3)),
        Use("h1", 3),
    ),
    "the active host is given up: its witness is not waited for": (
        situation("h1", "h3", epoch=3, standby="h2", h1=DOWN1, h2=leases(4)),
        Use("h2", 4, ("h1",)),
    ),
    "the host that took over is silent, and the stored host stands by for it": (
        situation("h1", "h2 h3", "host", epoch=3, standby="h2", h1=stands_by("h2", 4)),
        AskAgain(("h1",)),
    ),
    "CloudStack knows of no standby": (situation("h1", "h1", "host", epoch=3), Wait()),
}


@pytest.mark.parametrize("name", SILENT)
def test_decide_while_the_active_host_is_silent(name: str) -> None:
    now, expected = SILENT[name]
    assert decide(now) == expected


@pytest.mark.mutation("a-placement-without-a-lease-waits-for-all-answers")
def test_a_placement_without_a_lease_waits_for_all_answers() -> None:
    assert decide(SILENT["a placement without a lease"][0]) == Wait()


@pytest.mark.mutation("a-take-over-needs-a-proof")
def test_a_take_over_needs_a_proof() -> None:
    assert decide(SILENT["no proof"][0]) == Wait()


@pytest.mark.mutation("an-old-lease-is-no-take-over")
def test_an_old_lease_is_no_take_over() -> None:
    assert decide(SILENT["an old lease"][0]) == Wait()


@pytest.mark.parametrize("name", STANDBY)
def test_decide_about_a_standby(name: str) -> None:
    now, expected = STANDBY[name]
    assert decide(now) == expected


NO = "lives on h1 and was not moved: bring that host back; if it is dead: netloom evacuate h1"
REFUSED: dict[str, tuple[Situation, str]] = {
    "no proof": (situation("h1", epoch=3, h1=DOWN1, h2=claims(4, proven=False), h3=HAS_NOT), NO),
    "an old proof": (situation("h1", epoch=3, h1=DOWN1, h2=claims(3), h3=HAS_NOT), NO),
    "a record for another host": (situation("h1", epoch=3, h1=DOWN1, h2=may_take("h3"), h3=HAS_NOT), NO),
    "a host that is not the stored one says where it went": (
        situation("h1", epoch=3, h1=DOWN1, h2=moved("h2", 9), h3=moved("h2", 9)),
        NO,
    ),
    "a host that may take it, and another silent one": (
        situation("h1", epoch=3, h1=DOWN1, h2=DOWN2, h3=may_take("h1")),
        "may be on h2 by now: bring h2 back; if it is dead: netloom evacuate h2",
    ),
    "the same, and late": (
        situation("h1", "h2", "stragglers", epoch=3, h1=DOWN1, h3=may_take("h1")),
        "h2: no answer in time (net-42 lived on h1, which is declared dead, and may be on h2 by now",
    ),
    "all that may take it are drained": (
        situation("h1", epoch=3, h1=DOWN1, h2=may_take("h1", drained=True), h3=HAS_NOT),
        "every host that could take it is drained: h2 (netloom undrain h2)",
    ),
    "the addresses of a dead host are still answered": (
        situation("h1", epoch=3, h1=DOWN1, h2=may_take("h1", holds=4, gate="passive"), h3=may_take("h1")),
        "h2: net-42 is not served there",
    ),
    "an authorised host does not serve": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4, "passive"), h3=may_take("h1")),
        "h2: net-42 is not served there: h9 answers",
    ),
    "a passive stored host": (
        situation("h1", epoch=3, h1=claims(3, "passive"), h2=may_take("h1"), h3=HAS_NOT),
        "h1: net-42 is not served there: h9 answers (look: netloom where net-42)",
    ),
    "a passive stored host, and an old proof": (
        situation("h1", epoch=3, h1=claims(5, "passive"), h2=claims(5), h3=claims(4)),
        "h1: net-42 is not served there: h9 answers",
    ),
    "a stored host that stays closed": (
        situation("h1", over="moves", epoch=3, h1=claims(3, "closed"), h2=HAS_NOT, h3=HAS_NOT),
        "h1: net-42 is not served there: its move from this host is not finished",
    ),
    "moved to a host that is not registered": (
        situation("h1", epoch=3, h1=moved("h9", 4)),
        "h1: net-42 was moved to h9, which is not registered (add that host to the registration detail hosts)",
    ),
    "moved to a host that is no candidate any more": (
        situation("h1", epoch=3, previous=("h4",), h1=moved("h4", 4)),
        "h1: net-42 was moved to h4, which is not registered",
    ),
    "moved to a silent host": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=DOWN2, h3=HOLDS),
        "h2: connection refused (net-42 was moved to h2: bring that host back; if it is dead: netloom evacuate h2)",
    ),
    "moved to a host that has nothing": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=HAS_NOT, h3=HOLDS),
        "h2: net-42 is not there, but h1 says that it was moved there",
    ),
    "moved to a host that has an older copy": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=claims(3), h3=HAS_NOT),
        "h2: net-42 is not served there: it has an older copy",
    ),
    "moved to itself": (situation("h1", epoch=3, h1=moved("h1", 4)), "net-42: h1 say"),
    "moved in a circle": (situation("h1", epoch=3, h1=moved("h2", 4), h2=moved("h1", 5)), "h1 and h2 say"),
    "nothing stored, and moved to a silent host": (
        situation(h1=moved("h3", 1), h2=HAS_NOT, h3=DOWN3),
        "h3: connection refused (net-42 was moved from h1 to h3: bring that host back)",
    ),
    "nothing stored, and a passive copy": (
        situation(h1=HAS_NOT, h2=claims(1, "passive"), h3=HAS_NOT),
        "h2: net-42 is not served there: h9 answers",
    ),
    "nothing stored, and a copy that never opens": (
        situation(over="moves", h1=HAS_NOT, h2=claims(1, "incoming"), h3=HAS_NOT),
        "h2: net-42 is not served there: its move to this host is not finished",
    ),
    "a standby that does not take over": (
        situation("h1", over="moves", epoch=3, h1=DOWN1, h2=stands_by("h1", 3), h3=may_take("h1")),
        "h1: connection refused (h2 stands by for net-42 and has not taken over: bring h1 or the witness back; if h1 "
        "is dead: netloom evacuate h1)",
    ),
    "somebody says that it stands by": (
        situation("h1", epoch=3, h1=DOWN1, h2=stands_by("h1", 3, proven=False), h3=HAS_NOT),
        NO,
    ),
    "a standby of an earlier group": (situation("h1", epoch=3, h1=DOWN1, h2=stands_by("h1", 2), h3=HAS_NOT), NO),
    "an active host that gets no lease": (
        situation("h1", over="moves", epoch=3, h1=claims(3, "standby"), h2=HAS_NOT, h3=HAS_NOT),
        "h1: net-42 is not served there: that host is the active one of its group, but has no lease",
    ),
    "nothing stored, and a standby that does not take over": (
        situation(over="moves", h1=HAS_NOT, h2=stands_by("h1", 3), h3=HAS_NOT),
        "h1: net-42 is not served there (h2 stands by for net-42 and has not taken over",
    ),
    "nothing stored, and all are drained": (
        situation(h1=DOWN1, h2=DRAINED, h3=DRAINED),
        "net-42 is on no host, and every host that could take it is drained: h2, h3 (netloom undrain h2)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_is_not_given_to_a_host_that_nobody_has_authorised(name: str) -> None:
    now, text = REFUSED[name]
    decision = decide(now)
    assert isinstance(decision, Fail)
    assert text in str(decision.error)


@pytest.mark.mutation("an-old-proof-proves-nothing")
def test_an_old_proof_proves_nothing() -> None:
    assert isinstance(decide(REFUSED["an old proof"][0]), Fail)


@pytest.mark.mutation("the-next-host-has-the-new-placement")
def test_the_next_host_has_the_new_placement() -> None:
    assert isinstance(decide(REFUSED["moved to a host that has an older copy"][0]), Fail)


@pytest.mark.mutation("a-drained-host-gets-no-new-network")
def test_a_drained_host_gets_no_new_network() -> None:
    assert decide(situation(h1=DRAINED, h2=HAS_NOT, h3=HAS_NOT)) == Unplaced("h2")


@pytest.mark.mutation("a-silent-host-may-have-taken-the-network")
def test_a_dead_hosts_network_is_not_created_while_another_host_may_have_it() -> None:
    assert isinstance(decide(REFUSED["a host that may take it, and another silent one"][0]), Fail)


@pytest.mark.mutation("a-network-is-not-created-beside-a-copy")
def test_a_network_is_not_created_beside_a_passive_copy() -> None:
    assert isinstance(decide(REFUSED["nothing stored, and a passive copy"][0]), Fail)


@pytest.mark.mutation("a-moved-network-is-not-created-again")
def test_a_network_is_not_created_while_the_host_it_was_moved_to_is_silent() -> None:
    assert isinstance(decide(REFUSED["nothing stored, and moved to a silent host"][0]), Fail)


@pytest.mark.mutation("a-network-is-not-created-beside-its-standby")
def test_a_network_is_not_created_beside_its_standby() -> None:
    """Its host was declared dead, so another host may build it."""
    assert isinstance(decide(REFUSED["a standby that does not take over"][0]), Fail)


@pytest.mark.mutation("a-standby-needs-a-proof")
def test_no_call_waits_for_a_host_that_only_says_that_it_stands_by() -> None:
    assert isinstance(decide(REFUSED["somebody says that it stands by"][0]), Fail)


def failed(decision: object) -> str:
    assert isinstance(decision, Fail)
    assert isinstance(decision.error, HostUnreachable)
    return str(decision.error)


def test_a_scope_whose_host_is_down_is_not_moved() -> None:
    for now in (
        situation("h2", h2=down("h2"), h1=HAS_NOT, h3=HOLDS),
        situation("h2", h2=down("h2"), h1=down("h1"), h3=down("h3")),
    ):
        assert failed(decide(now)) == (
            "h2: connection refused (net-42 lives on h2 and was not moved: bring that host back; "
            "if it is dead: netloom evacuate h2)"
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
    "hosts that the scope left are told too": (situation("h1", previous=("h5",)), Ask(("h1", "h2", "h3", "h5"))),
    "they may be down": (
        situation("h1", previous=("h5",), h1=HOLDS, h2=HAS_NOT, h3=HAS_NOT, h5=down("h5")),
        AllTold(("h1", "h2", "h3"), ("h5",)),
    ),
    "the stored host is down, and another one is authorised": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4), h3=HAS_NOT),
        AllTold(("h2", "h3"), ("h1",)),
    ),
    "the stored host is declared dead": (
        situation("h1", epoch=3, h1=DOWN1, h2=may_take("h1"), h3=HAS_NOT),
        AllTold(("h2", "h3"), ("h1",)),
    ),
    "the host to which it went was told": (
        situation("h1", epoch=3, h1=moved("h2", 4), h2=claims(4), h3=DOWN3),
        AllTold(("h1", "h2")),
    ),
    "that host has time to finish": (situation("h1", "h2 h3", epoch=3, h1=moved("h2", 4)), Wait()),
    "the host that stands by was told": (
        situation("h1", epoch=3, h1=claims(3), h2=stands_by("h1", 3), h3=HAS_NOT),
        AllTold(("h1", "h2", "h3")),
    ),
    "the stored host stands by by now": (
        situation("h1", epoch=3, h1=stands_by("h2", 4), h2=claims(4), h3=HAS_NOT),
        AllTold(("h1", "h2", "h3")),
    ),
    "the stored host is dead, and its standby took over": (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4), h3=HAS_NOT),
        AllTold(("h2", "h3"), ("h1",)),
    ),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_decide_everywhere(name: str) -> None:
    now, expected = EVERYWHERE[name]
    assert decide_everywhere(now) == expected


def test_everywhere_needs_the_stored_host_and_at_least_one_host() -> None:
    assert failed(decide_everywhere(situation("h2", h1=HAS_NOT, h2=down("h2"), h3=HAS_NOT))).startswith("h2: ")
    assert failed(decide_everywhere(situation(h1=down("h1"), h2=down("h2"), h3=down("h3")))).startswith("none of")
    for now in (
        situation("h1", epoch=3, h1=DOWN1, h2=claims(4, proven=False), h3=HAS_NOT),
        situation("h1", epoch=3, h1=DOWN1, h2=claims(3), h3=may_take("h2")),
    ):
        assert NO in failed(decide_everywhere(now))


def test_everywhere_needs_the_host_to_which_the_network_was_moved() -> None:
    gone = situation("h1", epoch=3, h1=moved("h2", 4), h2=DOWN2, h3=HAS_NOT)
    assert failed(decide_everywhere(gone)).startswith("h2: connection refused (net-42 was moved to h2")
    unknown = situation(h1=moved("h2", 4), h2=DOWN2, h3=HAS_NOT)
    assert failed(decide_everywhere(unknown)).startswith("h2: connection refused (net-42 was moved from h1 to h2")
    foreign = decide_everywhere(situation("h1", epoch=3, h1=moved("h9", 4), h2=HAS_NOT, h3=HAS_NOT))
    assert isinstance(foreign, Fail)
    assert "h9, which is not registered" in str(foreign.error)


GATE = st.sampled_from(["", "open", "closed", "incoming", "passive", "standby", "nonsense"])
ANY_ANSWER = st.builds(
    HostAnswer,
    holds=st.booleans(),
    failure=st.sampled_from(["", "", "", "x: down"]),
    epoch=st.integers(0, 6),
    gate=GATE,
    moved_to=st.sampled_from(["", "", "h1", "H2", "h3", "h4", "h9"]),
    drained=st.booleans(),
    is_proven=st.booleans(),
    evacuated=st.frozensets(st.sampled_from(["h1", "h2", "h3", "h4"]), max_size=2),
).map(lambda it: replace(it, holds=False, is_proven=it.is_proven and it.stands_by) if it.moved_to else it)
UNPROVEN = ANY_ANSWER.map(lambda it: replace(it, is_proven=False, evacuated=frozenset()))
HOSTS = ("h1", "h2", "h3", "h4")


def play(now: Situation, answers: dict[str, HostAnswer], order: list[str], grace: int, everywhere: bool) -> Situation:
    """The situation of the decision, when the hosts answer in this order. ``grace``: when patience is at its end."""
    for step in range(80):
        decision = (decide_everywhere if everywhere else decide)(now)
        if isinstance(decision, Ask):
            assert not set(decision.hosts) & now.asked
            assert set(decision.hosts) <= {*now.order, now.stored, *now.previous}  # nobody else gets a login
            now = replace(now, asked=now.asked | set(decision.hosts))
        elif isinstance(decision, AskAgain):
            assert set(decision.hosts) <= set(now.answers)
            now = replace(now, over=now.over | {"moves"})
        elif isinstance(decision, Wait):
            if decision.patience and step >= grace:
                now = replace(now, over=now.over | {decision.patience})
            else:
                host = next(host for host in order if host in now.asked and host not in now.answers)
                now = replace(now, answers={**now.answers, host: answers[host]})
        else:
            return now
    raise AssertionError("no decision")


@pytest.mark.mutation("a-claim-needs-a-proof")
@given(
    stored=st.sampled_from(HOSTS),
    epoch=st.integers(0, 6),
    stored_answer=st.sampled_from([down("x"), claims(3, "passive"), claims(0, "passive"), claims(3, "incoming")]),
    answers=st.fixed_dictionaries(dict.fromkeys(HOSTS, UNPROVEN)),
    order=st.permutations(HOSTS),
    grace=st.integers(0, 20),
)
def test_no_answer_without_a_proof_takes_the_network_of_a_silent_host(
    stored: str,
    epoch: int,
    stored_answer: HostAnswer,
    answers: dict[str, HostAnswer],
    order: list[str],
    grace: int,
) -> None:
    now = play(situation(stored, epoch=epoch), {**answers, stored: stored_answer}, order, grace, everywhere=False)
    assert isinstance(decide(now), Fail)


@given(
    stored=st.sampled_from(["", *HOSTS]),
    epoch=st.integers(0, 6),
    previous=st.sampled_from([(), ("h4",)]),
    answers=st.fixed_dictionaries(dict.fromkeys(HOSTS, ANY_ANSWER)),
    order=st.permutations(HOSTS),
    grace=st.integers(0, 20),
    everywhere=st.booleans(),
)
def test_every_decision_about_moves_has_a_reason(
    stored: str,
    epoch: int,
    previous: tuple[str, ...],
    answers: dict[str, HostAnswer],
    order: list[str],
    grace: int,
    everywhere: bool,
) -> None:
    """In any order of any answers there is a decision, and who gets the network was authorised or named."""
    now = play(situation(stored, epoch=epoch, previous=previous), answers, order, grace, everywhere)
    decision = (decide_everywhere if everywhere else decide)(now)
    match decision:
        case Use(host, number):
            chosen = now.answers[host]
            assert chosen.answered
            assert not chosen.moved_to
            named = [it.moved_to.lower() for it in now.answers.values() if it.answered]
            assert host == stored or chosen.serves or (chosen.evacuated and number > epoch)
            if stored and now.answers[stored].failure:
                assert chosen.is_proven or stored in chosen.evacuated
                assert number > epoch
            elif stored and host != stored and stored in now.order:
                assert chosen.is_proven or chosen.evacuated or host in named
                assert number > epoch or host in named
        case Unplaced(host):
            assert not now.answers[host].drained
            others = [it for name, it in now.answers.items() if name in now.order and it.answered]
            assert not any(it.holds or it.stands_by for it in others)
        case AllTold(hosts):
            assert hosts
            assert all(now.answers[host].answered for host in hosts)
        case Fail(error):
            assert isinstance(error, NetloomError)
            assert "\n" not in str(error)


@given(
    terms=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)).map(sorted),
    has_lease=st.booleans(),
    silent=st.sets(st.sampled_from(["h1", "h2", "h3"])),
    is_stored=st.booleans(),
    order=st.permutations(["h1", "h2", "h3"]),
    grace=st.integers(0, 20),
    evacuated=st.booleans(),
)
def test_a_network_with_a_standby_is_used_on_its_active_host_only(
    terms: list[int], has_lease: bool, silent: set[str], is_stored: bool, order: list[str], grace: int, evacuated: bool
) -> None:
    """h1 is active in even terms, h2 in odd ones. CloudStack, and the host that is not active, know an older term."""
    stored, known, term = terms
    active, other = ("h1", "h2") if term % 2 == 0 else ("h2", "h1")
    other_view = claims(10 + known, "standby") if (known - term) % 2 else stands_by(active, 10 + known)
    answers = {
        active: claims(10 + term, "open" if has_lease else "standby"),
        other: other_view,
        "h3": may_take("h1", "h2") if evacuated else HAS_NOT,
        **{host: down(host) for host in silent},
    }
    before = situation(("h1", "h2")[stored % 2], epoch=10 + stored) if is_stored else situation()
    now = play(before, answers, order, grace, everywhere=False)
    decision = decide(now)
    heard = {host for host in (active, other) if now.answer(host)}
    if isinstance(decision, Unplaced):
        assert not is_stored and not heard
    elif isinstance(decision, Use) and decision.host == "h3":
        assert evacuated and not heard  # an operator said that they are dead
    elif isinstance(decision, Use):
        assert (decision.host, decision.epoch) == (active, 10 + term)
        assert has_lease and active in heard
    else:
        assert active not in heard or not has_lease


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
    """In any order of answers and grace periods there is a decision, for a host that answered."""
    now = play(situation(stored), answers, order, grace, everywhere)
    decision = (decide_everywhere if everywhere else decide)(now)
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
