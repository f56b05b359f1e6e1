"""This host as a member of one group: what the decision says is done here, in the order that keeps it safe.

After each message and each tick: the file is written if what has to be kept has changed; then the lease in the kernel
ends or is renewed; then it is told to the other members. What cannot be written has not happened: the message counts as
lost, and the member is as it was before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from netloom.agent.log import Log
from netloom.agent.standby.boots import Boots
from netloom.agent.standby.group_file import Record
from netloom.agent.standby.wires import Wires
from netloom.errors import HostRefused
from netloom.files import NotFlushed
from netloom.heartbeatwire import NOBODY, Beat, key_of, pack
from netloom.standby.decision import MARGIN, Kept, Local, Member, Says, Timing
from netloom.standbywire import GroupSpec

NANOSECONDS = 1_000_000_000
RETRY_S = 1.0  # after a file could not be written
GATEWAY_WITHIN_S = 10.0  # after the start: until then a gateway may not be known
HURRY_S = 2.0  # for so long after a promise has ended the member looks more often
_NEVER = -math.inf
_WITNESS = 2


class TakeOver(msgspec.Struct, frozen=True, kw_only=True):
    """This host began a term. ``outage_s``: from the last heartbeat in which the other host said that it served to the
    begin of the lease; None: no such heartbeat was heard."""

    term: int
    reason: str
    when: datetime
    outage_s: float | None


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a group at one moment.

    ``serves``: this host is active and its lease lives. ``lease_s``: what is left of it; not positive: nothing.
    ``heard``: by member, the seconds since its last heartbeat; infinite: none yet. ``silent_s``: the same, and not
    longer than the agent runs. ``partner_ready``: the other host has just said that it can serve. ``last``: the last
    term that this host began since its agent started. ``dissolved``: only the active host serves, for ever; if this
    host is that one, it needs no other member.

    ``silent``: the segments on which heartbeats do not arrive in both directions, although the hosts hear each other.
    ``dead``: those of them where nobody answers this host, and somebody the other one.
    ``upstream_s``: the seconds since the upstream has answered this host; infinite: it never has. Only without a
    witness.
    """

    spec: GroupSpec
    me: str
    term: int
    active: str
    released: bool
    serves: bool
    lease_s: float
    heard: dict[str, float]
    partner_ready: bool
    last: TakeOver | None
    silent: frozenset[int] = frozenset()
    dead: frozenset[int] = frozenset()
    dissolved: bool = False
    silent_s: dict[str, float] = {}
    upstream_s: float = math.inf

    @property
    def alone(self) -> bool:
        """Whether this host serves for ever, as the group is dissolved."""
        return self.dissolved and self.active == self.me and not self.released


class LeaseTable(Protocol):
    """The leases in the kernel, see agent/host/lease.py. All raise HostRefused.

    ``renew``: the lease of a mark never lasts longer than so many seconds from ``at`` on (``time.monotonic``), however
    long the call takes. ``renew`` and ``end`` return False while no port of this host is guarded.
    """

    def renew(self, lives: Mapping[int, float], at: float) -> bool: ...
    def end(self, marks: Iterable[int]) -> bool: ...
    def alive(self) -> Mapping[int, float]: ...


class Surroundings(NamedTuple):
    """What all members of this host have in common. ``save``: raises OSError."""

    leases: LeaseTable
    log: Log
    save: Callable[[Record], None]


class _Snapshot(NamedTuple):
    kept: Kept
    lease_until: float
    heard_at: dict[str, float]
    partner_ready_at: float
    last: TakeOver | None
    silent: frozenset[int]
    dead: frozenset[int]
    upstream_at: float


class GroupMember:
    """The member of this host in the group of ``record``. For one thread; only ``view`` is for any thread.

    ``boot``: random bytes of this start of the agent. ``lease_s``: what the kernel says is left of the lease.
    ``latest``: the last message of each sender, so that its copies cost no proof. ``told``: what ``Engine.set_local``
    was last called with for this member.
    ``is_urgent``: there is something to send at once. ``is_changed``: who serves has changed, whether it
    serves, or which segments are silent.
    """

    def __init__(self, record: Record, boot: bytes, around: Surroundings, now: float, *, lease_s: float = 0.0) -> None:
        self.record = record
        self.spec = record.spec
        self.names = [it.name for it in record.spec.hosts]
        self.me = self.names.index(record.me)
        self.key = key_of(record.spec.secret)
        self.timing = Timing(lease_s=record.spec.lease_ms / 1000)
        self.is_urgent = True
        self.is_changed = False
        self.latest: dict[int, tuple[bytes, Beat]] = {}
        self.told: Local | None = None
        self._boot = boot
        self._around = around
        self._peers = {at: Boots() for at in range(len(self.names)) if at != self.me}
        self._local: Local | None = None
        self._wires = Wires()
        self._seq = 0
        self._member: Member | None = Member(record.spec.names, record.me, self.timing, record.kept, now)
        self._lease_until = now + lease_s if lease_s > 0 else _NEVER
        self._may_live_until = self._lease_until
        self._is_ended = lease_s <= 0
        self._served = False
        self._retry_at = _NEVER
        self._problems: set[str] = set()
        self._began_at = now
        self._silent: dict[int, float] = {}  # members that are not heard; since when they are heard again
        self._partner_served_at = self._partner_ready_at = _NEVER
        self._upstream_at = _NEVER  # when it answered last
        self._upstream_answers: bool | None = None  # as it was logged; None: it has not been asked for long enough
        self._released = -1  # the term in which the other host gave its turn away, as the newest message says
        self._begun: tuple[str, datetime] | None = None
        self._last: TakeOver | None = None
        self._snapshot()
        self._end_if_not_serving(now)

    @property
    def is_witness(self) -> bool:
        return self.me == _WITNESS

    @property
    def _partner(self) -> int:
        """The other one of the hosts that can serve. Not for the witness."""
        return 1 - self.me

    # ------------------------------------------------------------------------------------------------------ messages

    def hear(self, beat: Beat, now_ns: int, segment: int | None = None) -> None:
        """A message that a member has sent, new or not. ``segment``: where it came; 0: on another
        one; None: over UDP."""
        if beat.sender not in self._peers:
            return
        now, peer = now_ns / NANOSECONDS, self._peers[beat.sender]
        verdict = peer.judge(beat, self.me, self._boot, now_ns)
        self.hear_copy(beat, now, segment)
        if verdict == "greeted":
            self.is_urgent = True
        if verdict != "accepted" or self._member is None:
            return
        is_new = peer.heard is None
        says, name = self._says_of(beat), self.names[beat.sender]
        has_news = self._is_partner(beat) and self._wires.told(beat.wires, now)
        before = self.record.kept
        self._released = says.term if says.released else -1
        if not self._attempt(now, lambda it: it.hear(now, name, says)):  # guard: only-what-had-its-effect-is-confirmed
            return
        peer.used(beat, now)
        self.is_urgent |= is_new
        if self._is_partner(beat):
            if beat.ready:
                self._partner_ready_at = now
            if beat.active == beat.sender and not beat.released:
                self._partner_served_at = now
        if (self.record.kept != before or has_news) and not self.is_witness:
            self.tick(now)

    def hear_copy(self, beat: Beat, now: float, segment: int | None) -> None:
        """The message has come, perhaps not for the first time: its path works. ``segment``: as for ``hear``."""
        if self._is_partner(beat) and self._peers[beat.sender].is_recent(beat):
            self._wires.heard(segment, now)

    def _is_partner(self, beat: Beat) -> bool:
        return not self.is_witness and beat.sender == self._partner

    def _says_of(self, beat: Beat) -> Says:
        heard = beat.heard[self.me]
        is_mine = heard is not None and heard.boot == self._boot  # guard: a-confirmation-is-of-this-boot
        return Says(
            term=beat.term,
            active=self.names[beat.active],
            released=beat.released,
            voted=beat.voted,
            grants="" if beat.grants == NOBODY else self.names[beat.grants],
            grants_term=beat.grants_term,
            wants=beat.wants,
            ready=beat.ready,
            dissolved=beat.dissolved,
            gives_way=beat.gives_way,
            partner_behind=beat.partner_behind,
            heard_at=heard.sent / NANOSECONDS if heard is not None and is_mine else -1.0,
        )

    def message(self, now_ns: int) -> bytes | None:
        """The next message to both others; None: nothing may be said now."""
        member = self._member
        if member is None:
            return None
        if not member.may_serve and not self._is_ended:  # guard: a-turn-is-over-before-it-is-told
            return None
        says = member.says(now_ns / NANOSECONDS, -1.0)
        self._seq += 1
        self.is_urgent = False
        echoes = [self._peers.get(at) for at in range(3)]
        heard = [it.heard if it else None for it in echoes]
        greeting = [it.greeting(now_ns) if it else None for it in echoes]
        beat = Beat(
            group_id=self.spec.group_id,
            sender=self.me,
            boot=self._boot,
            seq=self._seq,
            sent=now_ns,
            heard=(heard[0], heard[1], heard[2]),
            greeting=(greeting[0], greeting[1], greeting[2]),
            term=says.term,
            active=self.names.index(says.active),
            released=says.released,
            voted=says.voted,
            grants=self.names.index(says.grants) if says.grants else NOBODY,
            grants_term=says.grants_term,
            wants=says.wants,
            ready=says.ready,
            dissolved=says.dissolved,
            gives_way=says.gives_way,
            partner_behind=says.partner_behind,
            wires=self._wires.says(),
        )
        return pack(beat, self.key)

    # -------------------------------------------------------------------------------------------------------- the time

    def set_spec(self, spec: GroupSpec) -> None:
        """The hosts of the group have these addresses now; it is in the file already."""
        self.spec, self.record = spec, replace(self.record, spec=spec)

    def set_local(self, local: Local, now: float) -> None:
        """What the host knows about itself has changed."""
        if local != self._local:
            self._local = local
            self.is_urgent = True
            self.tick(now)

    def set_segments(self, segments: Iterable[int], now: float) -> None:
        """The segments that carry heartbeats."""
        self._wires.follow(segments, now)

    def suspect(self, segment: int, now: float) -> None:
        """See ``Engine.suspect``."""
        self._wires.suspect(segment)
        self.tick(now)

    def answered(self, segment: int, answer: bool | None, now: float) -> None:
        """See ``Engine.answered``."""
        self._wires.answered(segment, answer, now)
        self.tick(now)

    def upstream_answered(self, asked_at: float, now: float) -> None:
        """See ``Engine.upstream_answered``."""
        self._upstream_at = now
        if self._member is not None:
            self._attempt(now, lambda it: it.answered(now, asked_at))

    def dissolve(self) -> None:
        """Ask the others to dissolve the group, if this host is the active one."""
        if self._member is not None:
            self._member.dissolve()
            self.is_urgent = True

    def continue_alone(self, now: float) -> None:
        """See ``Engine.continue_alone``."""
        if self._member is not None and not self.is_witness:
            self._attempt(now, lambda it: it.continue_alone(now))
            self.is_urgent = True

    def tick(self, now: float) -> None:
        """Look what is to do."""
        silent = self._wires.silent
        self.is_urgent |= self._wires.look(now)
        self.is_changed |= self._wires.silent != silent
        if self._member is None:
            self._recover(now)
            return
        # A start changes nothing: until this host knows itself, it goes on as it is.
        local = self._local or Local(ready=self._member.may_serve)  # guard: a-new-agent-keeps-its-turn
        if self._wires.dead:  # guard: a-host-with-a-dead-vlan-is-not-ready
            local = replace(local, ready=False)
        self._attempt(now, lambda it: it.tick(now, local))
        self._end_if_not_serving(now)
        self._watch(now)

    def is_hurried(self, now: float) -> bool:
        """Whether the other host may just have died: then it counts how soon this one looks again."""
        if self.is_witness or self._member is None or self._member.may_serve:
            return False
        silent_s = now - self._peers[self._partner].heard_at
        return 0.9 * self.timing.lease_s < silent_s < self.timing.promise_s + HURRY_S

    @property
    def wants(self) -> bool:
        """Whether this host asks for a vote."""
        return self._member is not None and self._member.wants > 0

    def _attempt(self, now: float, what: Callable[[Member], None]) -> bool:
        """Let the member decide; False: it cannot be written, so it has not happened."""
        member = self._member
        assert member is not None
        before = copy.copy(member)
        try:
            what(member)
        except BaseException:
            self._member = before
            raise
        if member.kept != before.kept:
            if now < self._retry_at or not self._saved(member.kept, now):
                # A promise that is not on disk is never made.
                if self._member is not None:
                    self._member = before  # guard: what-is-not-written-has-not-happened
                return False
            self._adopt(before.kept, member.kept, now)
        self._end_if_not_serving(now)
        return True

    def _saved(self, kept: Kept, now: float) -> bool:
        record = replace(self.record, kept=kept)
        try:
            self._around.save(record)
        except OSError as error:
            self._retry_at = now + RETRY_S
            self._report("file", f"its file cannot be written: {error.strerror}")
            if isinstance(error, NotFlushed):
                # A power failure may bring either back, so nothing is promised until the file is written.
                self._member = None  # guard: an-uncertain-file-promises-nothing
            return False
        self._settle("file", "its file can be written again")
        self.record = record
        return True

    def _recover(self, now: float) -> None:
        """Begin again as after a start, when the file can be written."""
        if now >= self._retry_at and self._saved(self.record.kept, now):
            self._member = Member(self.spec.names, self.record.me, self.timing, self.record.kept, now)

    # ------------------------------------------------------------------------------------------------------- the lease

    def wanted_until(self, now: float) -> float | None:
        """The time to which the lease in the kernel is to be renewed; None: it stays as it is."""
        member = self._member
        if self.is_witness or member is None or not member.may_serve:
            return None
        # Nobody else can serve any more.
        until = now + self.timing.lease_s if member.alone else member.lease_until  # guard: alone-needs-no-grant
        return until if until > max(now, self._lease_until) else None

    def is_short(self, now: float) -> bool:
        """Whether the lease in the kernel cannot wait for the next tick."""
        return self._lease_until < now + self.timing.lease_s / 2

    def renewing(self, until: float) -> None:
        """The lease is about to be renewed; whether that succeeds is not known yet."""
        self._is_ended = False
        self._may_live_until = max(self._may_live_until, until)

    def renewed(self, until: float, now: float) -> None:
        """The lease in the kernel lives until then."""
        self._settle("lease", "its lease is in the kernel again")
        self._lease_until = until
        if self._begun is not None:
            reason, when = self._begun
            served_at = self._partner_served_at
            outage_s = now - served_at if served_at > _NEVER else None
            term = self.record.kept.term
            self._last, self._begun = TakeOver(term=term, reason=reason, when=when, outage_s=outage_s), None
            lasted = "" if outage_s is None else f"; {outage_s:.3f} s after the other host was last heard serving"
            self._log(f"this host serves in term {term}: {reason}{lasted}")
            self._served = self.is_changed = True
        self._watch_lease(now)

    def not_renewed(self, error: HostRefused) -> None:
        """The lease in the kernel could not be renewed."""
        self._report("lease", f"its lease cannot be renewed: {error}")

    def _end_if_not_serving(self, now: float) -> None:
        """End the lease in the kernel if this host is not the active one."""
        member = self._member
        if self._is_ended or member is None or member.may_serve:
            return
        self._end(now)

    def _end(self, now: float) -> None:
        try:
            self._around.leases.end([self.spec.mark])
        except HostRefused as error:
            self._report("lease", f"its lease cannot be ended: {error}")
            if now < self._may_live_until + MARGIN * self.timing.lease_s:
                return
        self._is_ended = True
        self._lease_until = self._may_live_until = _NEVER
        self._watch_lease(now)

    # -------------------------------------------------------------------------------------------------- what is visible

    def view(self, now: float) -> GroupView:
        """What is known now. Safe in any thread."""
        it = self._seen
        lease_s = it.lease_until - now
        return GroupView(
            spec=self.spec,
            me=self.record.me,
            term=it.kept.term,
            active=it.kept.active,
            released=it.kept.released,
            serves=it.kept.active == self.record.me and not it.kept.released and lease_s > 0,
            lease_s=lease_s,
            heard={name: now - at for name, at in it.heard_at.items()},
            partner_ready=now - it.partner_ready_at < self.timing.lease_s / 2,
            last=it.last,
            silent=it.silent,
            dead=it.dead,
            dissolved=it.kept.dissolved,
            silent_s={name: now - max(at, self._began_at) for name, at in it.heard_at.items()},
            upstream_s=now - it.upstream_at,
        )

    def _snapshot(self) -> None:
        heard_at = {self.names[at]: peer.heard_at for at, peer in self._peers.items()}
        self._seen = _Snapshot(
            self.record.kept,
            self._lease_until,
            heard_at,
            self._partner_ready_at,
            self._last,
            self._wires.silent,
            self._wires.dead,
            self._upstream_at,
        )

    def _adopt(self, before: Kept, kept: Kept, now: float) -> None:
        """What is kept has changed: say so."""
        self.is_urgent = True
        if (before.term, before.active, before.released) != (kept.term, kept.active, kept.released):
            self.is_changed = True
        if kept.term > before.term:
            self._log(f"{kept.active} begins term {kept.term}" + (" and gives it away" if kept.released else ""))
            mine = kept.active == self.record.me
            self._begun = (self._reason(before, now), datetime.now(UTC)) if mine else None
        elif kept.released and not before.released:
            self._log(f"{kept.active} gives its turn away")
        elif kept.voted > before.voted:
            self._log(f"votes for {kept.candidate} in term {kept.voted}")
        if kept.dissolved and not before.dissolved:
            self.is_changed = True
            self._log(f"the group is dissolved: only {kept.active} serves from now on")
        self._snapshot()

    def _reason(self, before: Kept, now: float) -> str:
        partner, witness = self.names[self._partner], self.record.spec.names.witness
        if before.active == self.record.me and witness:
            return f"{witness} did not know the last term"
        if before.released or self._released >= before.term:
            why = ": nobody answers it on a VLAN" if self._wires.is_dead_there else ""
            return f"{partner} gave its turn away{why}"
        silent_s = now - self._peers[self._partner].heard_at
        since = f"no heartbeat of {partner} for {silent_s:.1f} s" if math.isfinite(silent_s) else f"{partner} is silent"
        return f"{since}, {f'{witness} voted' if witness else 'the gateway answers this host'}"

    def _watch(self, now: float) -> None:
        """Log who is silent and who is heard again, whether the upstream answers, and whether the lease lives."""
        for at, peer in self._peers.items():
            silent_s = now - max(peer.heard_at, self._began_at)
            if at not in self._silent:
                if silent_s > self.timing.promise_s:
                    self._silent[at] = math.inf
                    self._log(f"no heartbeat of {self.names[at]} for {silent_s:.1f} s")
            elif silent_s > self.timing.lease_s / 2:
                self._silent[at] = math.inf
            else:
                since = self._silent[at] = min(self._silent[at], now)
                if now - since > self.timing.lease_s:  # not one line for each gap
                    del self._silent[at]
                    self._log(f"heartbeats of {self.names[at]} again")
        if not self.record.spec.names.witness:
            self._watch_upstream(now)
        self._watch_lease(now)

    def _watch_upstream(self, now: float) -> None:
        answers = now - self._upstream_at < self.timing.lease_s
        if answers != self._upstream_answers and (answers or now - self._began_at > GATEWAY_WITHIN_S):
            self._upstream_answers = answers
            self._log("the gateway answers this host" if answers else "no gateway answers this host")

    def _watch_lease(self, now: float) -> None:
        kept = self.record.kept
        serves = kept.active == self.record.me and not kept.released and self._lease_until > now
        if serves != self._served:
            self._served, self.is_changed = serves, True
            if serves:
                self._log(f"this host has a lease and serves in term {kept.term}")
            elif kept.active == self.record.me and not kept.released:
                has_witness = bool(self.record.spec.names.witness)
                why = "no other member confirms its heartbeats" if has_witness else "nobody answers it"
                self._log(f"the lease of this host has run out: {why}")
                if not self._is_ended:
                    # While a machine sleeps, its kernel does not count the time of leases.
                    self._end(now)  # guard: a-lease-that-is-over-ends
            else:
                self._log("this host has no lease any more")
        self._snapshot()

    def _report(self, problem: str, text: str) -> None:
        """Log a problem once, until it is settled."""
        if problem not in self._problems:
            self._problems.add(problem)
            self._log(text)

    def _settle(self, problem: str, text: str) -> None:
        if problem in self._problems:
            self._problems.discard(problem)
            self._log(text)

    def _log(self, text: str) -> None:
        self._around.log.line(f"standby {self.spec.group_id}: {text}")
