"""Claims: a host that serves a scope of a dead host says so on the wire, and the dead host, if it lives, stops.

A host that is cut off from everything and runs on looks dead. When its links come back, two hosts serve its scopes:

- The host that took a scope broadcasts a claim once a second, on the uplinks of the scope's bridges: the proof of its
  placement, or of the evacuation under which the scope was built. It ends with ``netloom undrain`` of the dead host.
- The other host hears it. If the claim is newer than its own placement and the signature is right, it asks by ARP who
  answers for the scope's addresses. If somebody else does, the scope becomes passive here.

A claim changes nothing by itself, and neither does an answer to ARP. Whatever is heard, the number of verifications and
of questions is bounded. ``claimwire`` has the frames, and docs/operators/threat-model.md what an attacker can do.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from netloom.agent import signatures
from netloom.agent.budget import Checks
from netloom.agent.clock import Clock
from netloom.agent.host.changes import HostChanges
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.log import Log
from netloom.agent.scopes.interfaces import Host
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.store import HostRecord
from netloom.agent.scopes.upkeep import Upkeep
from netloom.claimwire import Claim, Claimed, EvacuationClaim, PlacementClaim, decode, payloads, signatures_in
from netloom.errors import NetloomError, one_line
from netloom.render.want import Want
from netloom.state import Scope
from netloom.wire import Call

EVERY_S = 1.0  # between two claims of a scope
_STEPS = 20  # in this time: the claims of a step are sent together
LOOK_EVERY_S = 300.0  # for the links of a scope, if nothing has changed and the budget suffices (agent/budget.py)
LOOK_CPU_S = 0.002  # of one look; the first guess, until some were measured
ASK_EVERY_S = 1.0  # for the addresses of a scope, while claims of it are heard
REMOVE_AFTER_S = 3.0  # behind the closed gate: until then the gates of other scopes are closed
LOG_EVERY_S = 60.0  # about one scope
_LOOKS_MIN, _LOOKS_IN_STEPS = 32, 10  # so many scopes are looked at in a second, or a tenth of all
_ASKING_AT_ONCE = 4  # the other worker threads are for calls
# Verifications in a second, at most: of a scope on one link, of a link, and of all together. A verification takes 0.1
# to 0.5 ms. A host that is back hears of all its scopes at once, so the last number is a large one.
OF_SCOPE, OF_LINK, OF_ALL = 8, 128, 512
_REMEMBERED_MAX = 1024  # claims that were verified
_OWNERS_MAX = 64


class Sockets(Protocol):
    """``kernel.claims_socket.ClaimSockets`` implements it and describes the methods."""

    def follow(self, wires: Iterable[ClaimWire]) -> list[str]: ...
    def send(self, wire: ClaimWire, payload: bytes) -> None: ...


class Claims:
    """Sends the claims of this host and hears those of others. Created and used on the event loop.

    ``sockets`` makes the sockets: it gets :meth:`heard` and :meth:`lost`.
    """

    def __init__(
        self,
        scopes: Scopes,
        upkeep: Upkeep,
        host: Host,
        log: Log,
        clock: Clock,
        sockets: Callable[[Callable[[ClaimWire, bytes], None], Callable[[ClaimWire], None]], Sockets],
    ) -> None:
        self._scopes = scopes
        self._upkeep = upkeep
        self._host = host
        self._log = log
        self._clock = clock
        self._sockets = sockets(self.heard, self.lost)
        self._links: dict[str, _Links] = {}  # by scope
        self._hears_all = False  # the links that were found last are all listened on
        self._own: dict[str, tuple[tuple[Scope, HostRecord], list[bytes]]] = {}  # by scope: what is claimed, the frames
        self._budget = Budget(clock)
        self._right: OrderedDict[bytes, None] = OrderedDict()  # digests of claims that were verified
        self._verifying: set[tuple[str, ClaimWire]] = set()  # one claim of a scope at a time, on each link
        self._asked: dict[str, float] = {}
        self._logged: dict[tuple[str, str], float] = {}
        self._asking = asyncio.Semaphore(_ASKING_AT_ONCE)

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self, looks: Checks) -> None:
        """Follow the links of the scopes, and claim those that were taken from a dead host. Never returns."""
        while True:
            try:
                await self._follow(looks)
                await self._claim_all()
            except NetloomError as error:
                self._log_rarely("", "loop", f"claims: {error}")
                await self._clock.sleep(EVERY_S)
            except Exception as error:  # noqa: BLE001, a bug here must not end the loop
                self._log.traceback("claims", error)
                await self._clock.sleep(EVERY_S)

    async def _follow(self, looks: Checks) -> None:
        """Listen on the links of all scopes that are served here.

        They are looked for when the scope has other ports, when a link was lost, and as the budget allows. If the scope
        was being built, they are looked for again.
        """
        now = self._clock.time()
        wants = {slot.scope_id: slot.rendered[1] for slot in self._scopes.slots() if _serves(slot) and slot.rendered}
        ended = self._links.keys() - wants.keys()
        for scope_id in ended:
            del self._links[scope_id]
            self._own.pop(scope_id, None)
            self._asked.pop(scope_id, None)
        every_s = looks.turn_s(len(wants))
        due = [it for it, want in wants.items() if it not in self._links or self._links[it].is_due(want, now, every_s)]
        if due:
            first = sorted(due, key=lambda it: self._links[it].looked if it in self._links else 0.0)
            some = first[: max(_LOOKS_MIN, len(wants) // _LOOKS_IN_STEPS)]
            built = {it for it in some if not self._scopes.busy(it)}
            found = await self._scopes.in_worker_uncounted(lambda: [self._look(it, wants[it], looks) for it in some])
            for scope_id, wires in zip(some, found, strict=True):
                had = self._links.get(scope_id)
                kept = had.wires if had is not None and wires is None else wires or frozenset()
                settled = wires is not None and scope_id in built  # guard: links-that-are-built-are-looked-for-again
                self._links[scope_id] = _Links(wants[scope_id], kept, now, settled=settled)
        if ended or due or not self._hears_all:  # otherwise the links are the same
            self._hears_all = False
            errors = self._sockets.follow(frozenset().union(*(it.wires for it in self._links.values())))
            self._hears_all = not errors  # guard: a-link-that-could-not-be-heard-is-tried-again
            for error in errors:
                self._log_rarely("", error, error)

    def _look(self, scope_id: str, want: Want, looks: Checks) -> frozenset[ClaimWire] | None:
        """In a worker thread: the links of the scope; None if they cannot be listed now."""
        began = time.thread_time()
        try:
            return self._host.claim_wires(scope_id, want)
        except NetloomError:
            return None  # the next look tells
        finally:
            looks.used(time.thread_time() - began)

    def lost(self, wire: ClaimWire) -> None:
        """A link has gone or is down."""
        for links in self._links.values():
            if wire in links.wires:
                links.looked = -math.inf

    async def _claim_all(self) -> None:
        """Send each claim once, spread over EVERY_S. Returns after that time."""
        began = self._clock.time()
        steps: dict[int, list[Slot]] = {}
        for slot in self._scopes.slots():
            if _claims(slot):
                steps.setdefault(zlib.crc32(slot.scope_id.encode()) % _STEPS, []).append(slot)
        for step in sorted(steps):
            await self._clock.sleep(max(0.0, began + step * EVERY_S / _STEPS - self._clock.time()))
            for slot in steps[step]:
                self._claim(slot)
        await self._clock.sleep(max(0.0, began + EVERY_S - self._clock.time()))

    def _claim(self, slot: Slot) -> None:
        links = self._links.get(slot.scope_id)
        if slot.scope is None or links is None or not _claims(slot):  # meanwhile
            return
        for payload in self._frames(slot.scope):
            for wire in links.wires:
                self._sockets.send(wire, payload)

    def _frames(self, scope: Scope) -> list[bytes]:
        """The payloads of the scope's claims. They are made once for each state."""
        record = self._scopes.placements.host_record
        had = self._own.get(scope.scope_id)
        if had is not None and had[0][0] is scope and had[0][1] is record:
            return had[1]
        frames, lost = [], 0
        for claim, proof in _own_claims(scope, record, time.time()):
            some, too_long = payloads(scope.scope_id, claim, signatures_in(proof))
            frames += some
            lost += too_long
        if lost and (had is None or not frames):
            self._log_rarely(
                scope.scope_id, "long", f"{lost} signatures do not fit into a frame; they are not broadcast"
            )
        self._own[scope.scope_id] = (scope, record), frames
        return frames

    # ------------------------------------------------------------------------------------------------- what is heard

    def heard(self, wire: ClaimWire, payload: bytes) -> None:
        """Any bytes, from anybody on this link. Most are ignored at once."""
        claimed = decode(payload)
        if claimed is None:
            return
        slot = self._scopes.get(claimed.scope_id)
        links = self._links.get(claimed.scope_id)
        if slot is None or links is None or wire not in links.wires:  # guard: a-claim-is-heard-on-its-own-networks
            return
        if (slot.scope_id, wire) in self._verifying or not self._concerns(slot, claimed.claim):
            return
        self._verifying.add((slot.scope_id, wire))
        self._upkeep.start_task(self._examine(slot, wire, claimed))

    def _concerns(self, slot: Slot, claim: Claim) -> bool:
        """Whether the claim, if it is true, is about the copy of the scope that is served here, and newer."""
        scope, record = slot.scope, self._scopes.placements.host_record
        if scope is None or not _serves(slot) or claim.owner != scope.owner:
            return False
        signers = record.signers.get(scope.owner)
        if signers is None:
            what = f"{_named(claim)} claims it, but no call has brought the keys to verify that"
            self._log_rarely(scope.scope_id, "keys", what)
            return False
        own = signers.host.lower()
        if claim.host.lower() == own:
            return False
        if isinstance(claim, PlacementClaim):
            return claim.epoch > scope.placement.epoch  # guard: an-older-claim-changes-nothing
        return (
            claim.dead.lower() == own  # guard: an-evacuation-claim-names-this-host
            and claim.until > time.time()  # guard: an-evacuation-claim-ends
            and claim.until > record.over  # guard: a-host-that-is-back-is-not-evacuated
        )

    async def _examine(self, slot: Slot, wire: ClaimWire, claimed: Claimed) -> None:
        """Verify the claim, and ask. Never raises."""
        try:
            try:
                if not await self._is_right(wire, claimed):  # guard: a-claim-without-a-signature-changes-nothing
                    return
            finally:
                self._verifying.discard((slot.scope_id, wire))
            now = self._clock.time()
            if now - self._asked.get(slot.scope_id, -ASK_EVERY_S) < ASK_EVERY_S:
                return  # guard: questions-after-claims-are-bounded
            self._asked[slot.scope_id] = math.inf
            try:
                async with self._asking, self._scopes.turn(slot, "a claim"):
                    yields, _ = await self._scopes.run_and_settle(slot, lambda: self._ask(slot, claimed.claim))
            finally:
                self._asked[slot.scope_id] = self._clock.time()
            if yields:
                remove = partial(self._upkeep.revive, slot.scope_id, "another host serves it")
                self._clock.call_later(REMOVE_AFTER_S, remove)
        except NetloomError as error:
            self._log_rarely(slot.scope_id, "failed", f"claimed by {_named(claimed.claim)}: {error}")
        # A bug must not end the agent.
        except Exception as error:  # noqa: BLE001
            self._log.traceback(f"scope={slot.scope_id} claim", error)

    async def _is_right(self, wire: ClaimWire, claimed: Claimed) -> bool:
        """Whether one of the signatures is right. Each check takes from the budget."""
        signers = self._scopes.placements.host_record.signers.get(claimed.claim.owner)
        text = claimed.claim.text
        if signers is None:
            return False

        def verify() -> bool:
            for key, signature in signatures.checks(signers.keys, claimed.signatures):
                digest = hashlib.sha256(b"\0".join((key, signature, text))).digest()
                if digest in self._right:
                    return True
                if not self._budget.takes(wire, claimed.scope_id):  # guard: verifications-are-bounded
                    return False
                if signatures.is_signed(key, signature, text):
                    self._right[digest] = None
                    while len(self._right) > _REMEMBERED_MAX:
                        self._right.popitem(last=False)
                    return True
            return False

        if await self._scopes.in_worker_uncounted(verify):
            return True
        what = f"{_named(claimed.claim)} claims it on {wire.link} without a valid signature; ignored"
        self._log_rarely(claimed.scope_id, "signature", what)
        return False

    def _ask(self, slot: Slot, claim: Claim) -> tuple[bool, HostChanges]:
        """In a worker thread, with the lock: stop serving the scope if another host serves it; whether that is so."""
        self._scopes.read_state(slot)
        if not self._concerns(slot, claim):
            return False, HostChanges()
        want = self._scopes.placed_want(slot)
        if not want.namespace:
            return False, HostChanges()
        found = self._scopes.placements.occupied(slot, want)
        who = _named(claim)
        if not found.owners:  # guard: a-claim-alone-changes-nothing
            what = f"{who} claims it with a proof, but nobody else answers for its addresses"
            self._log_rarely(slot.scope_id, "unanswered", f"{what} ({found})" if found.unknown else what)
            return False, HostChanges()
        slot.unconverged = slot.unproved = True  # if it cannot be saved, the gate stays closed
        self._host.close_gate(slot.scope_id, want)  # at once; the rest of the work takes longer
        self._scopes.placements.make_passive(slot, f"{found}; {who} has a proof that it serves {slot.scope_id} now")
        return True, HostChanges()

    def _log_rarely(self, scope_id: str, kind: str, what: str) -> None:
        """Log a line, unless there was one of this kind about the scope a moment ago."""
        now = self._clock.time()
        if now - self._logged.get((scope_id, kind), -LOG_EVERY_S) < LOG_EVERY_S:
            return
        self._logged = {it: at for it, at in self._logged.items() if now - at < LOG_EVERY_S}
        self._logged[scope_id, kind] = now
        self._log.line(f"scope={scope_id} {what}" if scope_id else what)

    # --------------------------------------------------------------------------------------------------- the keys

    async def learn(self, call: Call) -> None:
        """Remember who can sign placements of the call's owner. Never raises: a full disk must not fail the call."""
        owner, signers = call.registration.owner, call.signers
        if signers is None or not owner or self._scopes.placements.host_record.signers.get(owner) == signers:
            return

        def with_signers(record: HostRecord) -> HostRecord:
            others = [(it, known) for it, known in record.signers.items() if it != owner]
            return replace(record, signers={**dict(others[1 - _OWNERS_MAX :]), owner: signers})

        try:
            await self._scopes.change_record(with_signers)
        except NetloomError as error:
            self._log_rarely("", "learn", f"the keys of {owner} were not saved: {error}")


class _Links:
    """The links of a scope, as they were found at the time ``looked`` for ``want``.

    ``settled``: all could be listed, and nothing was being built.
    """

    def __init__(self, want: Want, wires: frozenset[ClaimWire], looked: float, *, settled: bool) -> None:
        self.want = want
        self.wires = wires
        self.looked = looked
        self.settled = settled

    def is_due(self, want: Want, now: float, every_s: float) -> bool:
        if want is not self.want and _ports(want) == _ports(self.want):
            self.want = want  # most changes are about rules
        changed = want is not self.want or not self.wires or not self.settled
        return now - self.looked >= (EVERY_S if changed else every_s)


def _ports(want: Want) -> tuple[object, ...]:
    return want.ports, {it.link for it in want.announce}


class Budget:
    """The verifications of the current second. Worker threads use it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._second = 0
        self._spent: Counter[object] = Counter()

    def takes(self, wire: ClaimWire, scope_id: str) -> bool:
        """Whether there is a verification left for this scope on this link; it is used up then."""
        if int(self._clock.time()) != self._second:
            self._second, self._spent = int(self._clock.time()), Counter()
        spent = self._spent
        if (
            spent[wire, scope_id] >= OF_SCOPE  # guard: a-scope-has-a-budget-of-its-own
            or spent[wire] >= OF_LINK
            or spent[None] >= OF_ALL
        ):
            return False
        spent.update(((wire, scope_id), wire, None))
        return True


def _serves(slot: Slot) -> bool:
    """Whether the scope is served here: the gate is open, and was not only meant to be."""
    return slot.gate == "open" and not slot.unproved


def _claims(slot: Slot) -> bool:
    """Whether the scope is served here because another host was declared dead."""
    taken = slot.scope is not None and slot.scope.placement.taken_from
    return bool(taken) and _serves(slot)  # guard: only-who-serves-claims


def _own_claims(scope: Scope, record: HostRecord, now: float) -> list[tuple[Claim, str]]:
    """What a host that serves the scope can claim, with the proofs."""
    placement, owner = scope.placement, scope.owner
    claims: list[tuple[Claim, str]] = []
    if placement.proof:
        claims.append((PlacementClaim(owner, scope.scope_id, placement.epoch, placement.host), placement.proof))
    signers = record.signers.get(owner)
    for it in record.evacuated:
        if signers is not None and it.host in placement.taken_from and it.owner == owner and it.until > now:
            claims.append((EvacuationClaim(owner, it.host, it.until, signers.host), it.proof))
    return claims


def _named(claim: Claim) -> str:
    """The name of the host for a log line: anybody may have sent it."""
    return one_line(claim.host, 100)


async def end_claims(scopes: Scopes, host: str, owner: str) -> None:
    """Claim no more scopes that were taken from ``host``. ``owner`` empty: of all owners. Raises HostRefused."""

    def end(slot: Slot) -> tuple[None, HostChanges]:
        scopes.read_state(slot)
        if slot.scope is not None:
            placement = slot.scope.placement
            rest = tuple(it for it in placement.taken_from if it != host)
            scopes.placements.place(slot, replace(placement, taken_from=rest))
        return None, HostChanges()

    for slot in scopes.slots():
        scope = slot.scope
        if scope is not None and host in scope.placement.taken_from and owner in ("", scope.owner):
            async with scopes.turn(slot, "the end of a claim"):
                await scopes.run_and_settle(slot, partial(end, slot))
