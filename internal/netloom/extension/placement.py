"""Decides which host a scope lives on, from the answers of the hosts. Pure functions: they ask no host themselves.

``decide`` and ``decide_everywhere`` are called again after each answer, until they name a host. A scope that lives on
a host stays there: while that host does not answer, the decision is a failure and never another host.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from netloom.errors import HostUnreachable, NetloomError

# Which late answers we still wait for, up to one grace period: those of slow candidates.
Patience = Literal["stragglers"]


@dataclass(frozen=True)
class HostAnswer:
    """The answer of one host to ``locate``. ``failure``: why it did not answer; empty when it did."""

    holds: bool = False
    failure: str = ""

    @property
    def answered(self) -> bool:
        return not self.failure


@dataclass(frozen=True)
class Situation:
    """The input of a decision.

    ``order``: the candidates, the preferred one first. ``stored``: the host that CloudStack remembers, empty when
    unknown. ``asked``: hosts that were asked; ``answers``: their answers and failures so far. ``reached``: hosts whose
    agents said hello and are still working. ``over``: grace periods that have passed.
    """

    scope_id: str
    order: tuple[str, ...]
    stored: str = ""
    asked: frozenset[str] = frozenset()
    answers: Mapping[str, HostAnswer] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    over: frozenset[Patience] = frozenset()

    def holders(self) -> list[str]:
        return [host for host in self.order if host in self.answers and self.answers[host].holds]

    def answering(self) -> list[str]:
        return [host for host in self.order if host in self.answers and self.answers[host].answered]

    def failures(self) -> list[str]:
        """One reason per candidate that did not answer."""
        return [
            self.answers[host].failure for host in self.order if host in self.answers and self.answers[host].failure
        ]


@dataclass(frozen=True)
class Ask:
    """Ask these hosts in parallel."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Wait for the next answer; with ``patience``, for at most one grace period."""

    patience: Patience | None = None


@dataclass(frozen=True)
class Use:
    """The scope lives here."""

    host: str


@dataclass(frozen=True)
class Unplaced:
    """No host that answers has the scope; a new one would be created on ``host``."""

    host: str


@dataclass(frozen=True)
class AllTold:
    """Every host that had to get the command has answered."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Fail:
    """The decision is an error."""

    error: NetloomError


def cksum(data: bytes) -> int:
    """The checksum that POSIX cksum(1) prints for ``data``: Ethernet's CRC, not reflected, over data and length.

    The reference extension chooses hosts by it, so a zone that changes over to netloom keeps its distribution.
    """
    length = len(data)
    while length:
        data += bytes([length & 0xFF])
        length >>= 8
    # binascii computes the reflected form of the same polynomial: reverse the bits of each byte, and of the result.
    reflected = binascii.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2) ^ 0xFFFFFFFF


_REVERSED = bytes(int(f"{octet:08b}"[::-1], 2) for octet in range(256))


def preferred_order(key: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates, rotated so that number ``cksum(key) mod n`` is the first (protocol section 3)."""
    unique = tuple(dict.fromkeys(candidates))
    if not unique:
        return ()
    first = cksum(key.encode()) % len(unique)
    return unique[first:] + unique[:first]


def decide(situation: Situation) -> Ask | Wait | Use | Unplaced | Fail:
    """The next step to find the host of a scope.

    A stored host that does not answer is a failure, whatever other hosts claim: a host cannot prove that it has the
    scope, and it would get the passwords of the VMs. A stored host that answers is the decision if it is a candidate or
    has the scope. Otherwise it is a candidate that has the scope, else the first candidate in order that answers.
    """
    now = situation
    if now.stored:
        stored = now.answers.get(now.stored)
        if stored is None:
            return Wait() if now.stored in now.asked else Ask((now.stored,))
        if not stored.answered:
            return Fail(_stays(now, stored.failure))  # guard: a-network-of-a-silent-host-stays
        if (
            stored.holds  # guard: a-host-off-the-list-keeps-its-networks
            or now.stored in now.order
        ):
            return Use(now.stored)
    if missing := tuple(host for host in now.order if host not in now.asked):
        return Ask(missing)
    if holders := now.holders():
        return Use(holders[0])
    all_answered = all(host in now.answers for host in now.order)
    if not all_answered and ("stragglers" not in now.over or not now.answering()):
        return Wait("stragglers" if now.answering() else None)
    if answering := now.answering():
        return Unplaced(answering[0])
    return Fail(nobody_answers(now))


def decide_everywhere(situation: Situation) -> Ask | Wait | AllTold | Fail:
    """The next step to send a command to every candidate that answers. The stored host must answer.

    An answer is here the reply to the command itself. A host that was reached is waited for until it answers.
    """
    now = situation
    told = tuple(dict.fromkeys((*((now.stored,) if now.stored else ()), *now.order)))
    if missing := tuple(host for host in told if host not in now.asked):
        return Ask(missing)
    silent = [host for host in told if host not in now.answers]
    if any(host == now.stored or host in now.reached for host in silent):
        return Wait()
    if silent and ("stragglers" not in now.over or not now.answers):
        return Wait("stragglers" if now.answers else None)
    stored = now.answers.get(now.stored)
    if stored is not None and not stored.answered:
        return Fail(_stays(now, stored.failure))
    if done := tuple(host for host in told if host in now.answers and now.answers[host].answered):
        return AllTold(done)
    return Fail(nobody_answers(now))


def nobody_answers(situation: Situation) -> HostUnreachable:
    """The error (exit status 2) with each host's reason."""
    if len(situation.order) == 1:
        return HostUnreachable("; ".join(situation.failures()) or f"{situation.order[0]}: no answer in time")
    silent = [f"{host}: no answer in time" for host in situation.order if host not in situation.answers]
    return HostUnreachable("none of the hosts answers: " + "; ".join([*situation.failures(), *silent]))


def _stays(situation: Situation, failure: str) -> HostUnreachable:
    return HostUnreachable(
        failure,
        hint=f"{situation.scope_id} lives on {situation.stored} and was not moved: bring that host back",
    )
