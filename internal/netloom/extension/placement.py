"""Decides which host a scope lives on, from the answers of the hosts. Pure functions: they ask no host themselves.

``decide`` and ``decide_everywhere`` are called again after each answer, until they name a host. A scope that lives on
a host stays there until that host says where it went, or until somebody with the registration's credentials has
authorised another host (``proof``). While the host does not answer and nobody is authorised, the decision is a failure
and never another host.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from netloom.errors import HostRefused, HostUnreachable, NetloomError
from netloom.wire import StandbyReply

# What we wait for no longer. "stragglers": the late answers of slow candidates, for up to one grace period. "moves":
# the end of a move that is in its last step, or of a take-over. "host": the host of a scope that has a standby.
Patience = Literal["stragglers", "moves", "host"]


# The largest epoch of a move that a host remembers and that counts for a new placement.
_REMEMBERED_MAX = 1 << 31


@dataclass(frozen=True)
class HostAnswer:
    """The answer of one host to ``locate``. ``failure``: why it did not answer; empty when it did.

    ``epoch``, ``gate``, ``drained``: as in ``wire.Reply``; agents of releases without moves send no gate.
    ``moved_to``: the same; the host does not hold the scope then. ``why``: why the scope is not served.
    ``is_proven``: the epoch is authorised for this host. ``evacuated``: the hosts that are declared dead and whose
    scopes this host may take; authorised, and not expired. ``standby``, ``about_to_move``: as in ``wire.Reply``.
    """

    holds: bool = False
    failure: str = ""
    epoch: int = 0
    gate: str = ""
    why: str = ""
    moved_to: str = ""
    drained: bool = False
    is_proven: bool = False
    evacuated: frozenset[str] = frozenset()
    standby: StandbyReply | None = None
    about_to_move: bool = False

    @property
    def answered(self) -> bool:
        return not self.failure

    @property
    def serves(self) -> bool:
        """Whether the host has the scope, and says that its gate is open."""
        return self.holds and self.gate in ("", "open")

    @property
    def is_moving(self) -> bool:
        """Whether the scope is in the last step of a move from or to this host, or this active host has no lease."""
        return self.holds and self.gate in ("closed", "incoming", "standby")

    @property
    def stands_by(self) -> bool:
        """Whether the host stands by for the host ``moved_to``, and takes over when that one is dead."""
        return self.gate == "standby" and bool(self.moved_to)


@dataclass(frozen=True)
class Situation:
    """The input of a decision.

    ``order``: the candidates, the preferred one first. ``stored``: the host that CloudStack remembers, empty when
    unknown; ``epoch``: the number that it remembers; ``previous``: hosts that the scope left before; ``standby``: the
    one that stands by. ``removes``: the command creates nothing. ``asked``: hosts that were asked; ``answers``: their
    answers and failures so far.
    ``reached``: hosts whose agents said hello and are still working. ``over``: what we do not wait for any longer.
    """

    scope_id: str
    order: tuple[str, ...]
    stored: str = ""
    epoch: int = 0
    previous: tuple[str, ...] = ()
    standby: str = ""
    removes: bool = False
    asked: frozenset[str] = frozenset()
    answers: Mapping[str, HostAnswer] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    over: frozenset[Patience] = frozenset()

    def answer(self, host: str) -> HostAnswer | None:
        """The answer of the host; None when there is none, or a failure."""
        answer = self.answers.get(host)
        return answer if answer is not None and answer.answered else None

    def registered(self, name: str) -> str:
        """The candidate of this name, or the stored host, spelled as the registration has it; empty: there is none.

        The name is what a host says. Whoever it names would get a login, possibly with a password.
        """
        known = (*self.order, self.stored)
        return next((host for host in known if host and host.lower() == name.lower()), "")

    def answering(self) -> list[str]:
        return [host for host in self.order if self.answer(host)]

    def failures(self) -> list[str]:
        """One reason per candidate that did not answer."""
        return [
            self.answers[host].failure for host in self.order if host in self.answers and self.answers[host].failure
        ]

    def waits_for(self, hosts: Sequence[str]) -> Wait | None:
        """What to wait for until these hosts have answered, or have had their grace period; None: no longer."""
        if all(host in self.answers for host in hosts):
            return None
        if not any(self.answer(host) for host in hosts):
            return Wait()
        return None if "stragglers" in self.over else Wait("stragglers")


@dataclass(frozen=True)
class Ask:
    """Ask these hosts in parallel."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class AskAgain:
    """Ask these hosts again after a moment, for at most as long as the last step of a move, or a take-over, takes."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Wait for the next answer; with ``patience``, for at most one grace period; for "host", for a moment."""

    patience: Patience | None = None


@dataclass(frozen=True)
class Use:
    """The scope lives here, with this epoch. ``left``: hosts that may still have it, and do not serve it."""

    host: str
    epoch: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unplaced:
    """No host that answers has the scope; a new one would be created on ``host``."""

    host: str
    epoch: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class AllTold:
    """Every host that had to get the command has answered. ``left``: hosts that may still have the scope."""

    hosts: tuple[str, ...]
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fail:
    """The decision is an error."""

    error: NetloomError


@dataclass(frozen=True)
class _Named:
    """The host that the stored details name, by way of the hosts that the scope left.

    ``by``: the host that says so; empty for the stored host itself. ``epoch``: the number of this placement.
    """

    host: str
    epoch: int
    by: str = ""


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


def decide(situation: Situation) -> Ask | AskAgain | Wait | Use | Unplaced | Fail:
    """The next step to find the host of a scope.

    The stored host is believed, and so is the host to which it says that the scope went. If that host does not answer,
    does not serve the scope or knows nothing of it (perhaps its disk was replaced), another host is believed only with
    a proof: a host cannot make one, and would get the passwords of the VMs. Where nothing is stored, a host that serves
    the scope is believed, first one with a proof.

    A host that stands by for the scope says so as if the scope had moved away. While its active host is silent or has
    no lease, it is asked again until it has taken over. Where CloudStack knows of a standby, nobody waits until the
    named host is given up.
    """
    now = situation
    if not now.stored:
        return _anywhere(now)
    named = _followed(now)
    if not isinstance(named, _Named):
        return named
    if named.host not in now.answers:
        return _unanswered(now, named)
    answer = now.answer(named.host)
    if answer is not None:
        if (
            answer.serves
            and (not named.by or answer.epoch >= named.epoch)  # guard: the-next-host-has-the-new-placement
        ):
            return Use(named.host, max(answer.epoch, named.epoch))  # guard: a-host-off-the-list-keeps-its-networks
        if answer.holds and answer.gate == "closed" and "moves" not in now.over:
            return AskAgain((named.host,))
        if not answer.holds and not named.by and now.stored not in now.order:
            return _anywhere(now)
    return _successor(now, named)


def _followed(now: Situation) -> _Named | AskAgain | Fail:
    """The host that the stored details name. It may not have answered, or not been asked.

    A host that says where the scope went is asked no further question.
    """
    named = _Named(now.stored, now.epoch)
    seen: list[str] = []
    while True:
        answer = now.answer(named.host)
        if answer is None or not answer.moved_to:
            return named
        seen.append(named.host)
        to = now.registered(answer.moved_to)
        if not to:  # guard: only-registered-hosts-are-contacted
            return Fail(
                HostRefused(
                    f"{named.host}: {now.scope_id} was moved to {answer.moved_to[:255]}, which is not registered",
                    hint="add that host to the registration detail hosts",
                )
            )
        if to in seen:
            if answer.stands_by and "moves" not in now.over:  # a take-over of which one of the two has not heard yet
                return AskAgain(tuple(seen))
            return Fail(
                HostRefused(
                    f"{now.scope_id}: {' and '.join(seen)} say that it was moved away, and none of them has it",
                    hint=_where(now),
                )
            )
        named = _Named(to, max(named.epoch, answer.epoch), by=named.host)


def _unanswered(now: Situation, named: _Named) -> Ask | AskAgain | Wait | Use:
    """What to do while the named host has not answered: a standby may have taken over."""
    if named.host not in now.asked:
        return Ask((named.host,))
    if not now.standby:
        return Wait()
    if "host" not in now.over:
        return Wait("host")
    others = tuple(host for host in now.order if host != named.host)
    if missing := tuple(host for host in others if host not in now.asked):
        return Ask(missing)
    if taken_over := _taken_over(now, named):
        return taken_over
    standbys = _standbys(now, named)
    return AskAgain(tuple(standbys)) if standbys and "moves" not in now.over else Wait()


def _taken_over(now: Situation, named: _Named) -> Use | None:
    """The host that has taken over from the named one. It has the lease, so no other answer can change this."""
    for host in now.order:
        answer = now.answer(host)
        if (
            host != named.host
            and answer is not None
            and answer.serves
            and answer.standby is not None  # guard: a-placement-without-a-lease-waits-for-all-answers
            and answer.is_proven  # guard: a-take-over-needs-a-proof
            and answer.epoch > named.epoch  # guard: an-old-lease-is-no-take-over
        ):
            return Use(host, answer.epoch, (named.host,))
    return None


def _successor(now: Situation, named: _Named) -> Ask | AskAgain | Wait | Use | Fail:
    """The host that serves the scope although the named host does not: one that is authorised, and no other."""
    others = tuple(host for host in now.order if host != named.host)
    if missing := tuple(host for host in others if host not in now.asked):
        return Ask(missing)
    if not now.answers[named.host].answered and (taken_over := _taken_over(now, named)):
        return taken_over
    if wait := now.waits_for(others):
        return wait
    of_named = now.answers[named.host]
    # The number of a placement that has not begun is no reason to refuse the one before it.
    floor = named.epoch if of_named.gate == "incoming" else max(named.epoch, of_named.epoch)
    left = () if of_named.answered and not of_named.holds else (named.host,)
    authorised = [
        (host, answer)
        for host in others
        if (answer := now.answer(host)) is not None
        and answer.holds
        and answer.is_proven  # guard: a-claim-needs-a-proof
        and answer.epoch > floor  # guard: an-old-proof-proves-nothing
    ]
    if serving := [(host, answer) for host, answer in authorised if answer.serves]:
        host, answer = max(serving, key=lambda it: it[1].epoch)
        return Use(host, answer.epoch, left)
    moving = [host for host, answer in (*authorised, (named.host, of_named)) if answer.is_moving]
    standbys = _standbys(now, named)
    if (moving or standbys) and "moves" not in now.over:
        return AskAgain((*moving, *standbys))
    if authorised:
        host, answer = authorised[0]
        return Fail(_not_served(now, host, answer))
    if standbys:  # guard: a-network-is-not-created-beside-its-standby
        return Fail(_not_taken_over(now, named.host, standbys[0]))
    if not of_named.answered:
        return _evacuated(now, named, others, floor)
    if not of_named.holds and not named.by:
        return Use(named.host, named.epoch)  # it was chosen by the command before this one
    return Fail(_not_served(now, named.host, of_named, named.by))


def _standbys(now: Situation, named: _Named) -> list[str]:
    """The hosts that stand by for the scope while the named host does not serve it.

    A call waits for them, so a host that says so needs a proof, unless it is the stored one.
    """
    return [
        host
        for host in dict.fromkeys((*now.order, now.stored))
        if host != named.host
        and (answer := now.answer(host)) is not None
        and answer.stands_by
        and answer.moved_to.lower() == named.host.lower()
        and answer.epoch >= named.epoch
        and (answer.is_proven or host == now.stored)  # guard: a-standby-needs-a-proof
    ]


def _evacuated(now: Situation, named: _Named, others: Sequence[str], floor: int) -> Use | Fail:
    """A host that may take the scopes of the named one, which is dead; no host has a copy of this scope."""
    takers = [
        (host, answer)
        for host in others
        if (answer := now.answer(host)) is not None and named.host in answer.evacuated and not answer.moved_to
    ]
    if not takers:
        return Fail(_stays(now, named))  # guard: a-network-of-a-silent-host-stays
    for host, answer in takers:
        if answer.holds and answer.epoch > floor:  # an earlier command has created it there
            return Use(host, answer.epoch, (named.host,)) if answer.serves else Fail(_not_served(now, host, answer))
    dead = {host for _, answer in takers for host in answer.evacuated}
    for host in others:
        if now.answer(host) is None and host not in dead:  # guard: a-silent-host-may-have-taken-the-network
            return Fail(_may_be_there(now, named, host))
    if free := [host for host, answer in takers if now.removes or not answer.drained]:
        return Use(free[0], floor + 1, (named.host,))
    return Fail(_all_drained(now, [host for host, _ in takers]))


def _anywhere(now: Situation) -> Ask | AskAgain | Wait | Use | Unplaced | Fail:
    """Nothing is stored, or the stored host is no candidate and has nothing."""
    if missing := tuple(host for host in now.order if host not in now.asked):
        return Ask(missing)
    if wait := now.waits_for(now.order):
        return wait
    holding = [(host, it) for host in now.order if (it := now.answer(host)) is not None and it.holds]
    serving = [(host, answer) for host, answer in holding if answer.serves]
    moving = [host for host, answer in holding if answer.is_moving]
    # A claim without a proof counts as never moved: any host can say any number.
    best = max(serving, key=lambda it: it[1].epoch if it[1].is_proven else 0, default=None)
    is_settled = best is not None and (best[1].is_proven or all(it.gate != "closed" for _, it in holding))
    standbys = [host for host in now.answering() if now.answers[host].stands_by] if best is None else []
    if (moving or standbys) and not is_settled and "moves" not in now.over:
        return AskAgain((*moving, *standbys))
    if best is not None:
        return Use(best[0], best[1].epoch)
    if holding:  # guard: a-network-is-not-created-beside-a-copy
        return Fail(_not_served(now, *holding[0]))
    for host in now.answering():
        to = now.registered(now.answers[host].moved_to)
        if to and now.answer(to) is None:  # guard: a-moved-network-is-not-created-again
            return Fail(_moved_to_a_silent_host(now, host, to))
    if standbys:
        active = now.registered(now.answers[standbys[0]].moved_to)
        return Fail(_not_taken_over(now, active or now.answers[standbys[0]].moved_to[:255], standbys[0]))
    answering = now.answering()
    if not answering:
        return Fail(nobody_answers(now))
    if free := [
        host
        for host in answering
        if now.removes or not now.answers[host].drained  # guard: a-drained-host-gets-no-new-network
    ]:
        return Unplaced(free[0], max([now.epoch, *_next_epochs(now)]))
    return Fail(_all_drained(now, answering))


def _next_epochs(now: Situation) -> list[int]:
    """The numbers that follow those of the moves that hosts remember. With a new one, the proofs of old moves are old.

    A host can say any number; a very large one is ignored, so that the scope can always be moved.
    """
    told = (now.answers[host] for host in now.answering() if now.answers[host].moved_to)
    return [it.epoch + 1 for it in told if it.epoch < _REMEMBERED_MAX]


def decide_everywhere(situation: Situation) -> Ask | Wait | AllTold | Fail:
    """The next step to send a command to every candidate that answers, and to the hosts that the scope left.

    The stored host must answer, or the host to which it says that the scope went, unless another host is authorised or
    somebody has declared that host dead. An answer is here the reply to the command itself, with what the host said
    about the scope before. A host that was reached is waited for until it answers.
    """
    now = situation
    told = tuple(dict.fromkeys((*((now.stored,) if now.stored else ()), *now.order, *now.previous)))
    if missing := tuple(host for host in told if host not in now.asked):
        return Ask(missing)
    # A host that stands by is told as well: there is nothing to wait for.
    named = _followed(replace(now, over=now.over | {"moves"})) if now.stored else _Named("", 0)
    assert not isinstance(named, AskAgain)
    if isinstance(named, _Named) and named.host and named.host not in now.answers:
        return Wait() if named.host in now.asked else Ask((named.host,))
    silent = [host for host in told if host not in now.answers]
    if any(host in now.reached for host in silent):
        return Wait()
    if silent and ("stragglers" not in now.over or not now.answers):
        return Wait("stragglers" if now.answers else None)
    if isinstance(named, Fail):
        return named
    done = tuple(host for host in told if now.answer(host))
    left = tuple(host for host in told if host in (named.host, *now.previous) and host not in done)
    if named.host and named.host not in done and not _is_replaced(now, named):
        return Fail(_stays(now, named))
    if not now.stored:
        for host in done:
            to = now.registered(now.answers[host].moved_to)
            if to and to not in done:
                return Fail(_moved_to_a_silent_host(now, host, to))
    return AllTold(done, left) if done else Fail(nobody_answers(now))


def _is_replaced(now: Situation, named: _Named) -> bool:
    """Whether a host is authorised in place of the named one, or an operator has declared the named one dead."""
    others = [it for host, it in now.answers.items() if host != named.host and it.answered]
    return any((it.holds and it.is_proven and it.epoch > named.epoch) or named.host in it.evacuated for it in others)


def nobody_answers(situation: Situation) -> HostUnreachable:
    """The error (exit status 2) with each host's reason."""
    if len(situation.order) == 1:
        return HostUnreachable("; ".join(situation.failures()) or f"{situation.order[0]}: no answer in time")
    silent = [f"{host}: no answer in time" for host in situation.order if host not in situation.answers]
    return HostUnreachable("none of the hosts answers: " + "; ".join([*situation.failures(), *silent]))


def _stays(now: Situation, named: _Named) -> HostUnreachable:
    lives = f"was moved to {named.host}" if named.by else f"lives on {named.host} and was not moved"
    return HostUnreachable(
        now.answers[named.host].failure,
        hint=f"{now.scope_id} {lives}: bring that host back; if it is dead: netloom evacuate {named.host}",
    )


def _may_be_there(now: Situation, named: _Named, host: str) -> HostUnreachable:
    failure = now.answers[host].failure if host in now.answers else f"{host}: no answer in time"
    return HostUnreachable(
        failure,
        hint=f"{now.scope_id} lived on {named.host}, which is declared dead, and may be on {host} by now: "
        f"bring {host} back; if it is dead: netloom evacuate {host}",
    )


def _moved_to_a_silent_host(now: Situation, host: str, to: str) -> HostUnreachable:
    failure = now.answers[to].failure if to in now.answers else f"{to}: no answer in time"
    return HostUnreachable(failure, hint=f"{now.scope_id} was moved from {host} to {to}: bring that host back")


def _not_served(now: Situation, host: str, answer: HostAnswer, by: str = "") -> HostRefused:
    """The host answers, and does not serve the scope."""
    if not answer.holds:
        return HostRefused(
            f"{host}: {now.scope_id} is not there, but {by} says that it was moved there", hint=_where(now)
        )
    reason = answer.why[:300] or {
        "incoming": "its move to this host is not finished",
        "closed": "its move from this host is not finished",
        "passive": "it is passive there",
        "standby": "that host is the active one of its group, but has no lease: nobody else of the group answers it",
    }.get(answer.gate, "it has an older copy")
    return HostRefused(f"{host}: {now.scope_id} is not served there: {reason}", hint=_where(now))


def _not_taken_over(now: Situation, active: str, standby: str) -> HostUnreachable:
    answer = now.answer(active)
    failure = f"{active}: {now.scope_id} is not served there"
    if answer is None:
        failure = now.answers[active].failure if active in now.answers else f"{active}: no answer in time"
    return HostUnreachable(
        failure,
        hint=f"{standby} stands by for {now.scope_id} and has not taken over: bring {active} or the witness back; "
        f"if {active} is dead: netloom evacuate {active}",
    )


def _all_drained(now: Situation, hosts: Sequence[str]) -> HostRefused:
    return HostRefused(
        f"{now.scope_id} is on no host, and every host that could take it is drained: {', '.join(hosts)}",
        hint=f"netloom undrain {hosts[0]}",
    )


def _where(now: Situation) -> str:
    return f"look: netloom where {now.scope_id}"
