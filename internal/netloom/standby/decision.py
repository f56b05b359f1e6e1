"""One member of a group decides whether its host serves: a pure function of what was heard, with the time handed in.

A *group* has two hosts that can serve its scopes, and a witness. A *term* is a turn of one of the two, the *active*
host. The other one stands by. The active host serves as long as it has a *lease*. Two leases at once are impossible,
whatever is lost, repeated, delayed or cut off, and whoever crashes:

1. A lease ends ``lease_s`` after the active host *sent* the newest message that another member has heard and granted.
2. Whoever grants it promises, from the moment when it *heard* that message, and for a margin longer, to help nobody
   else. So on clocks with nearly the same rate each promise outlives the lease that it gave.
3. A host begins a term only when both members that could renew a lease of the other host have no promise to it left:
   itself, and the witness, which votes for it. Both refuse all earlier terms from then on, also after a crash: the term
   and the vote are on disk before anybody hears of them.
4. An active host that gives its turn away stops serving first, for good, and says so. The other one needs no vote then.
5. A member that has just started does not know its promises. It can have promised something only to the host that its
   disk names. So it helps only that one, until the longest promise would be over.
6. A group is dissolved when the witness or the standby has promised, on disk, to help only the active host until that
   gives its turn away. The active host then serves without a lease, and never gives its turn away. An operator who says
   that the other host is off dissolves the group, too (``continue_alone``).

A group may have no witness. The second vote is that of the *upstream* then, a machine outside of both hosts:

7. While the active host does not hear the other one, each answer of the upstream renews its lease: until ``lease_s``
   after the question, but not longer than ``lease_s`` after the newest message that this host sent.
8. A host begins a term, or goes on after its lease has ended, when the upstream has answered it for longer than a
   promise without a break, and it has heard nothing of the other one meanwhile.

The upstream promises nothing. So two hosts may serve while both reach it and do not hear each other.

docs/group-protocol.md has the reasons. Times are in seconds of this host's clock CLOCK_BOOTTIME, which also runs while
all processes are stopped.
"""

from __future__ import annotations

import math

import msgspec
from msgspec.structs import replace

# The clocks of two hosts may differ by this part of their rate, less what timers are late.
MARGIN = 0.1
_NEVER = -math.inf


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """``lease_s``: how long a lease lasts. ``start_s``: how much longer a host that has just started leaves a term to
    the other one, which may be starting, too. ``behind_s``: how much longer a standby waits that misses a state.
    ``steady_s``: a turn is given only to a host that has been ready for so long."""

    lease_s: float = 1.0
    start_s: float = 1.5
    behind_s: float = 2.0
    steady_s: float = 3.0

    @property
    def promise_s(self) -> float:
        """How long a promise lasts."""
        return self.lease_s * (1 + MARGIN)

    @property
    def silence_s(self) -> float:
        """After how long without a message an active host turns to the upstream: four heartbeats."""
        return 0.4 * self.lease_s


class Group(msgspec.Struct, frozen=True):
    """The names of the hosts. ``first`` is active in term 0. ``witness``: empty if the upstream has the second vote."""

    first: str
    second: str
    witness: str = ""

    def partner(self, host: str) -> str:
        """The other one of the two hosts that can serve."""
        return self.second if host == self.first else self.first

    def next_term(self, host: str, after: int) -> int:
        """The lowest term above ``after`` that ``host`` can begin: ``first`` has the even ones, ``second`` the odd."""
        return after + 1 + (after + 1 + (host == self.second)) % 2


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a member keeps on disk.

    ``active``: who may serve in ``term``. ``released``: it has given that up. ``voted``: the witness grants nothing in
    an earlier term than that; its vote went to ``candidate``. ``dissolved``: this member helps only ``active`` until
    that releases the term; if that is its own host, it never does, and serves without a lease.
    """

    term: int = 0
    active: str
    released: bool = False
    voted: int = 0
    candidate: str = ""
    dissolved: bool = False


class Says(msgspec.Struct, frozen=True, kw_only=True):
    """What one member tells another about a group.

    ``term``, ``active``, ``released``, ``voted``: as in ``Kept``. ``dissolved``: so, too; of the active host also the
    wish. ``grants``, ``grants_term``: who is granted a lease; empty: nobody now. ``wants``: the term that the sender
    wants to begin; 0: none. ``ready``: the sender can be given the turn. ``gives_way``, ``partner_behind``: as in
    ``Local``. ``heard_at``:
    the clock of the receiver in its newest message that the sender has passed to ``hear``; negative: none since the
    receiver's boot.
    """

    term: int
    active: str
    released: bool
    voted: int
    dissolved: bool
    grants: str
    grants_term: int
    wants: int
    ready: bool
    gives_way: bool
    partner_behind: bool
    heard_at: float


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """What a host knows about itself. ``ready``: its network is alive. ``behind``: it misses a state of the active
    host. ``gives_way``: it is to give its turn away when the other one can take it. ``partner_behind``: the active host
    knows that the other one misses a state."""

    ready: bool = True
    behind: bool = False
    gives_way: bool = False
    partner_behind: bool = False


class Member:
    """What one member knows now.

    After the start and after each ``hear`` and ``tick`` the caller does, in this order: write ``kept`` to disk if it
    has changed; if ``alone``, serve without a lease; else, unless ``may_serve``, end the lease in the kernel; else set
    it to end at ``lease_until`` if that is later; send, at once if ``kept`` has changed.
    """

    def __init__(self, group: Group, me: str, timing: Timing, kept: Kept, now: float) -> None:
        self.group = group
        self.me = me
        self.kept = kept
        self.wants = 0
        self.lease_until = _NEVER
        # The promise to the host that is granted a lease. A tick is due at that time, too: it speeds up a take-over.
        self.promised_until = now + timing.promise_s  # guard: a-start-waits-for-its-promises
        self._renewed = -1  # the term in which the newest message of its host has renewed the promise
        self._timing = timing
        self._local = Local(ready=False)
        self._dissolves = False
        self._patient_until = now + timing.promise_s + timing.start_s
        self._unready_at = _NEVER
        self._heard: dict[str, tuple[float, Says]] = {}  # the newest message of each member, and when it was heard
        self._heard_by = {group.first: now, group.second: now, group.witness: now}  # our newest that they have heard
        self._voted_elsewhere = 0  # the highest vote of another member
        # For groups without a witness:
        self._silent_since = now  # nobody was heard from then on, though the upstream has answered all the time
        self._said_at = _NEVER  # when the newest message was sent
        self._asked_at = _NEVER  # the newest question that the upstream has answered

    @property
    def may_serve(self) -> bool:
        """Whether this host is the active one, so that it may serve while its lease lasts."""
        return self.kept.active == self.me and not self.kept.released

    @property
    def alone(self) -> bool:
        """Whether this host serves without a lease for ever."""
        return self.may_serve and self.kept.dissolved

    def dissolve(self) -> None:
        """Ask the others to dissolve the group. Nothing happens unless this host is the active one."""
        self._dissolves = self.may_serve

    def continue_alone(self, now: float) -> None:
        """An operator says that the other host is off: begin a term, and serve without a lease for ever.

        A later term, also if this host is active: so the other host stands by when it is back. Nothing happens while
        it is heard.
        """
        heard, _ = self._heard.get(self.group.partner(self.me), (_NEVER, None))
        if now - heard >= self._timing.promise_s and not self.alone:  # guard: a-host-that-is-heard-is-not-off
            self._begin(self.group.next_term(self.me, max(self.kept.term, self._voted_elsewhere)))
            self.kept = replace(self.kept, dissolved=True)

    @property
    def _granted(self) -> tuple[int, str]:
        """The term and the host that this member grants a lease; an empty name: nobody."""
        kept = self.kept
        if kept.voted > kept.term:
            return kept.voted, kept.candidate
        return kept.term, "" if kept.released else kept.active

    @property
    def _is_behind(self) -> bool:
        """Whether this host misses a state of the active one, as far as one of the two knows."""
        _, says = self._heard.get(self.group.partner(self.me), (_NEVER, None))
        told = says is not None and says.partner_behind and says.term == self.kept.term
        return self._local.behind or told

    def _hears_us(self, now: float, sender: str) -> bool:
        """Whether a promise to this member is of use. Else nobody could replace an active host that hears nobody."""
        return now - self._heard_by[sender] < self._timing.promise_s

    # ------------------------------------------------------------------------------------------------------ messages

    def says(self, now: float, heard_at: float) -> Says:
        """The message to a member. ``heard_at``: see ``Says``."""
        kept, local, (term, host) = self.kept, self._local, self._granted
        self._said_at = now
        grants = host != self.me and self._renewed == term and now < self.promised_until
        steady = local.ready and now - self._unready_at >= self._timing.steady_s
        return Says(
            term=kept.term,
            active=kept.active,
            released=kept.released,
            voted=kept.voted,
            dissolved=kept.dissolved or (self._dissolves and self.may_serve),
            grants=host if grants else "",
            grants_term=term if grants else 0,
            wants=self.wants,
            ready=steady and not self._is_behind,
            gives_way=local.gives_way,
            partner_behind=local.partner_behind,
            heard_at=heard_at,
        )

    def hear(self, now: float, sender: str, says: Says) -> None:
        """A message of another member, which is no repetition."""
        self._heard[sender] = now, says
        self._silent_since = now
        self._heard_by[sender] = max(self._heard_by[sender], says.heard_at)
        self._voted_elsewhere = max(self._voted_elsewhere, says.voted)
        self._adopt(says)
        if says.grants == self.me and 0 <= says.heard_at <= now:  # guard: a-grant-names-a-message-of-this-boot
            self._granted_by(now, says)
        if self.me == self.group.witness:
            self._vote(now, sender, says)
        else:
            self._take_released()
        self._promise(now, sender, says)

    def answered(self, now: float, asked_at: float) -> None:
        """The upstream has answered a question that this host asked then."""
        if now - self._asked_at > self._timing.lease_s / 2:
            # Perhaps nobody could be heard meanwhile, and the other host is about to be.
            self._silent_since = now  # guard: silence-counts-while-the-upstream-answers
        self._asked_at = max(self._asked_at, asked_at)
        self._take_upstream(now)

    def _adopt(self, says: Says) -> None:
        """Learn of a later term, of the end of this one, or of the end of the group."""
        kept = self.kept
        if says.term > kept.term:
            self.kept = replace(
                kept,
                term=says.term,
                active=says.active,
                # A host that does not remember a term of its own has lost its disk, and with it perhaps a release.
                released=says.released
                or says.active == self.me,  # guard: a-host-serves-only-in-terms-that-it-remembers
                dissolved=False,
            )
            self.wants = 0  # guard: a-candidate-of-an-earlier-term-gives-up
            self._dissolves = False  # guard: a-wish-ends-with-the-turn
        elif says.term == kept.term and says.released and not kept.released:
            self.kept = replace(kept, released=True, dissolved=False)
        if says.dissolved and self._granted == (says.term, says.active):  # guard: a-dissolution-is-of-one-term
            self.kept = replace(self.kept, dissolved=True)
            self.wants = 0  # guard: a-candidate-that-learns-of-the-end-gives-up

    def _granted_by(self, now: float, says: Says) -> None:
        """Another member grants this host a lease: of the present term, or of the one that it wants to begin."""
        if (
            self.wants
            and says.grants_term == self.wants  # only the witness grants a term that has not begun
            and now >= self.promised_until  # guard: a-candidate-keeps-its-promise
        ):
            self._begin(self.wants)
        if self.may_serve and says.grants_term == self.kept.term:  # guard: a-lease-is-of-one-term
            self.lease_until = max(self.lease_until, says.heard_at + self._timing.lease_s)

    def _vote(self, now: float, sender: str, says: Says) -> None:
        """The witness votes for a host that wants to begin a term."""
        kept = self.kept
        if (
            says.wants > max(kept.term, kept.voted)
            and (not kept.dissolved or sender == kept.active)  # guard: a-dissolved-witness-votes-for-no-other
            and now >= self.promised_until  # guard: a-witness-keeps-its-promise
        ):
            self.kept = replace(kept, voted=says.wants, candidate=sender)

    def _promise(self, now: float, sender: str, says: Says) -> None:
        """Renew the promise to the host that is granted a lease, when it asks for it."""
        term, host = self._granted
        if sender == host:
            asks = says.wants == term or (says.term == term and says.active == sender)
            # The next message tells the host that this one was heard. Without a promise that must be no grant.
            self._renewed = term if asks and self._hears_us(now, sender) else -1  # guard: a-grant-has-a-promise
            if self._renewed == term:
                self.promised_until = now + self._timing.promise_s

    # -------------------------------------------------------------------------------------------------------- the time

    def tick(self, now: float, local: Local) -> None:
        """Look what is to do. To be called before each round of messages, and at ``promised_until``."""
        self._local = local
        if not local.ready:
            self._unready_at = now
        kept, partner = self.kept, self.group.partner(self.me)
        if self.me == self.group.witness:
            for sender, (heard, says) in self._heard.items():
                if says.wants > max(kept.term, kept.voted) and now - heard < self._timing.lease_s / 2:
                    self._vote(now, sender, says)
                    self._promise(now, sender, says)
        elif self.may_serve:
            # A vote for the other one came to nothing. It is too late for a grant of the present term.
            refused = (
                not kept.dissolved and self._voted_elsewhere > kept.term
            )  # guard: a-host-that-is-alone-wants-nothing
            self.wants = self.group.next_term(self.me, self._voted_elsewhere) if refused else 0
            if self._gives_way(now):
                self.kept = replace(kept, released=True)
                self.wants = 0
        elif kept.dissolved and kept.active == partner:  # guard: a-dissolved-standby-wants-nothing
            self.wants = 0
        elif not self._take_released():
            free_at = self.promised_until + (self._timing.behind_s if self._is_behind else 0)
            if not local.ready or now < max(free_at, self._patient_until):
                self.wants = 0
            elif self.wants <= kept.term or self.wants < self._voted_elsewhere:
                self.wants = self.group.next_term(self.me, max(kept.term, self._voted_elsewhere))
        self._take_upstream(now)

    def _take_upstream(self, now: float) -> None:
        """Begin the wanted term, or renew the lease, if the vote of the upstream suffices."""
        timing, asked_at = self._timing, self._asked_at
        if self.group.witness or now - asked_at >= timing.lease_s / 2:  # guard: the-upstream-has-no-vote-with-a-witness
            return
        is_alone = now - self._silent_since >= timing.promise_s
        if self.wants and is_alone:  # guard: a-candidate-hears-nobody
            self._begin(self.wants)
        # While it hears the other host, that one decides. It may have begun a term because it does not hear this one.
        is_silent = asked_at - self._silent_since >= timing.silence_s  # guard: the-upstream-decides-only-in-silence
        lives = self.lease_until > now
        if self.may_serve and (is_silent if lives else is_alone):  # guard: a-lease-that-ended-needs-a-longer-silence
            # Until the newest message that the other host may have heard: its promise counts from there.
            newest = min(asked_at, self._said_at)  # guard: a-lease-of-the-upstream-ends-before-a-promise
            self.lease_until = max(self.lease_until, newest + timing.lease_s)

    def _gives_way(self, now: float) -> bool:
        """Whether the active host gives its turn away: it is to, or its network is dead, and the other one can serve.

        A turn goes only to a host that has been ready for some seconds, and for ``gives_way`` only to one that keeps
        it. So it does not go to and fro.
        """
        heard, partner = self._heard.get(self.group.partner(self.me), (_NEVER, None))
        if partner is None or not partner.ready or now - heard >= self._timing.lease_s / 2:
            return False
        if self._dissolves or self.kept.dissolved:  # guard: a-host-that-is-alone-keeps-its-turn
            return False
        return not self._local.ready or (self._local.gives_way and not partner.gives_way)

    def _take_released(self) -> bool:
        """Begin the term after one that the other host has released. No vote is needed."""
        kept, local = self.kept, self._local
        released = kept.released and kept.active == self.group.partner(self.me)
        takes = released and local.ready and not self._is_behind
        if takes:
            # No later term: the other host may have begun one again, by a vote.
            self._begin(kept.term + 1)
        return takes

    def _begin(self, term: int) -> None:
        self.kept = replace(self.kept, term=term, active=self.me, released=False, dissolved=False)
        self.wants = 0
        self.lease_until = _NEVER  # guard: a-new-term-has-no-lease-yet
