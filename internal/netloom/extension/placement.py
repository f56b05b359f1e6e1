"""Which host a scope lives on: a decision about what the hosts said, without asking them.

``decide`` and ``decide_everywhere`` are called again with everything heard so far, until they name a host. A scope
that lives somewhere stays there: while its host is silent the answer is a failure, never another host.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from netloom.errors import HostUnreachable, NetloomError

# Whose lateness is being waited for, at most for a grace: that of the stored host, or that of the slower candidates.
Patience = Literal["stored", "stragglers"]


@dataclass(frozen=True)
class Heard:
    """What one host said when it was asked for the scope. ``failure``: why it did not answer, empty if it did."""

    holds: bool = False
    failure: str = ""

    @property
    def answered(self) -> bool:
        return not self.failure


@dataclass(frozen=True)
class Situation:
    """All that the decision depends on.

    ``order``: the candidates, the preferred one first. ``stored``: the host that CloudStack remembers, empty when
    unknown. ``asked``: who has been asked; ``heard``: who has answered, or failed to. ``reached``: who is there
    and still at work. ``over``: the graces that have passed.
    """

    scope_id: str
    order: tuple[str, ...]
    stored: str = ""
    asked: frozenset[str] = frozenset()
    heard: Mapping[str, Heard] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    over: frozenset[Patience] = frozenset()

    def holders(self) -> list[str]:
        return [host for host in self.order if host in self.heard and self.heard[host].holds]

    def answering(self) -> list[str]:
        return [host for host in self.order if host in self.heard and self.heard[host].answered]

    def failures(self) -> list[str]:
        """One reason per candidate that did not answer."""
        return [self.heard[host].failure for host in self.order if host in self.heard and self.heard[host].failure]


@dataclass(frozen=True)
class Ask:
    """Ask these hosts, at the same time."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Wait for the next answer; with ``patience``, for a grace at most."""

    patience: Patience | None = None


@dataclass(frozen=True)
class Use:
    """The scope lives here."""

    host: str


@dataclass(frozen=True)
class Unplaced:
    """Nobody who answers holds the scope; a new one would go to ``host``."""

    host: str


@dataclass(frozen=True)
class Done:
    """Everybody who had to be told has been told."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Fail:
    """No host can be named; why."""

    error: NetloomError


def cksum(data: bytes) -> int:
    """The CRC that POSIX ``cksum`` prints for ``data``: that of Ethernet, unreflected, over the text and its length.

    The reference extension chooses hosts by it, so a zone that changes over keeps its spread.
    """
    length = len(data)
    while length:
        data += bytes([length & 0xFF])
        length >>= 8
    # binascii's CRC is the reflected form of the same polynomial: turn the bits of every byte in, and the result out.
    reflected = binascii.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2) ^ 0xFFFFFFFF


_REVERSED = bytes(int(f"{octet:08b}"[::-1], 2) for octet in range(256))


def preferred_order(key: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates from number ``cksum(key) mod n`` on, round to the one before it (protocol section 3)."""
    unique = tuple(dict.fromkeys(candidates))
    if not unique:
        return ()
    first = cksum(key.encode()) % len(unique)
    return unique[first:] + unique[:first]


def decide(situation: Situation) -> Ask | Wait | Use | Unplaced | Fail:
    """The next thing to do to find the host of a scope.

    The stored host, if it answers; else a candidate that says it holds the scope; else, if no host was stored, the
    first in order that answers. A stored host that is no candidate any more keeps a scope that it holds.
    """
    now = situation
    stored = now.heard.get(now.stored)
    if now.stored and stored is None:
        if now.stored not in now.asked:
            return Ask((now.stored,))
        if "stored" not in now.over:
            return Wait("stored")
    if (
        stored is not None
        and stored.answered
        and (
            stored.holds  # guard: a-host-off-the-list-keeps-its-networks
            or now.stored in now.order
        )
    ):
        return Use(now.stored)
    if missing := tuple(host for host in now.order if host not in now.asked):
        return Ask(missing)
    if holders := now.holders():
        return Use(holders[0])
    if now.stored and stored is None:
        return Wait()
    everybody_heard = all(host in now.heard for host in now.order)
    if stored is not None and not stored.answered:
        if not everybody_heard and "stragglers" not in now.over:
            return Wait("stragglers")
        return Fail(_stays(now, stored.failure))  # guard: a-network-of-a-silent-host-stays
    if not everybody_heard and ("stragglers" not in now.over or not now.answering()):
        return Wait("stragglers" if now.answering() else None)
    if answering := now.answering():
        return Unplaced(answering[0])
    return Fail(nobody_answers(now))


def decide_everywhere(situation: Situation) -> Ask | Wait | Done | Fail:
    """The next thing to do to tell every candidate that answers, and the stored host, who has to be among them.

    What is heard is here the outcome of the command itself. A host that was reached is waited for.
    """
    now = situation
    told = tuple(dict.fromkeys((*((now.stored,) if now.stored else ()), *now.order)))
    if missing := tuple(host for host in told if host not in now.asked):
        return Ask(missing)
    silent = [host for host in told if host not in now.heard]
    if any(host == now.stored or host in now.reached for host in silent):
        return Wait()
    if silent and ("stragglers" not in now.over or not now.heard):
        return Wait("stragglers" if now.heard else None)
    stored = now.heard.get(now.stored)
    if stored is not None and not stored.answered:
        return Fail(_stays(now, stored.failure))
    if done := tuple(host for host in told if host in now.heard and now.heard[host].answered):
        return Done(done)
    return Fail(nobody_answers(now))


def nobody_answers(situation: Situation) -> HostUnreachable:
    """Status 2, with every host's own reason."""
    if len(situation.order) == 1:
        return HostUnreachable("; ".join(situation.failures()) or f"{situation.order[0]}: no answer in time")
    silent = [f"{host}: no answer in time" for host in situation.order if host not in situation.heard]
    return HostUnreachable("none of the hosts answers: " + "; ".join([*situation.failures(), *silent]))


def _stays(situation: Situation, failure: str) -> HostUnreachable:
    return HostUnreachable(
        failure,
        hint=f"{situation.scope_id} lives on {situation.stored} and was not moved: bring that host back",
    )
