"""The commands of operators about placements, on one host: a scope leaves, a scope comes, what the host holds.

``placementwire`` describes the messages and their order. Two hosts never serve one scope at once:

- The old host saves "closed" before it closes the gate. It opens again by itself only when ``CLOSED_S`` have passed
  and nobody answers for the addresses. Whoever answers is then the new host, and the scope becomes passive here.
- The new host opens only within ``OPEN_WITHIN_S`` after it was ready, which was before the old one closed. Both times
  are measured on a host's own clock. It saves "open" before it opens the gate.
- The old host opens earlier when it is told that the new one has forgotten the scope, by the operator's command that
  closed it last. An ``open`` that comes to the new host after that, on its way for long, is of an earlier ``receive``.

An agent that restarts finds the gate in the state, and the gate itself in the kernel, where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from netloom import placementwire as wire
from netloom.agent.clock import Clock
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.kernel import conntrack_copy
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Created, Record
from netloom.agent.log import Log
from netloom.agent.scopes.claims import end_claims
from netloom.agent.scopes.handover import Copy, Handover
from netloom.agent.scopes.interfaces import Host, ScopeStore
from netloom.agent.scopes.placements import placed
from netloom.agent.scopes.scopes import SCOPE_ID, Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.store import HostRecord, Moved
from netloom.agent.scopes.upkeep import Upkeep
from netloom.errors import BadRequest, ForeignScope, HostRefused, NetloomError
from netloom.render.want import Want
from netloom.state import Placement, Scope
from netloom.wire import Call, Evacuated, Reply

_T = TypeVar("_T", bound=msgspec.Struct)

_LISTED_MAX = 1000  # scopes in one reply
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Moves:
    """Executes the commands of ``placementwire``. Created and used on the event loop, after ``Scopes.load``."""

    def __init__(self, scopes: Scopes, upkeep: Upkeep, host: Host, store: ScopeStore, log: Log, clock: Clock) -> None:
        self._scopes = scopes
        self._upkeep = upkeep
        self._host = host
        self._store = store
        self._log = log
        self._clock = clock

    def resume(self) -> None:
        """Decide about moves that an earlier agent was in the middle of, in the usual time."""
        for slot in self._scopes.slots():
            self._decide_later(slot)

    async def execute(self, call: Call) -> Reply:
        """Execute the call and return its reply. Never raises: the reply has the error."""
        reply = await self._scopes.answered(call, self._dispatch(call))
        slot = self._scopes.get(call.scope_id)
        revision = slot.scope.revision if slot is not None and slot.scope is not None else 0
        reply = replace(reply, holds=bool(slot is not None and slot.scope is not None), revision=revision)
        outcome = f" error={reply.error}" if reply.status else ""
        if reply.status or call.command not in wire.READING:
            scope = call.scope_id or "-"
            self._log.line(f"call={call.call_id} command={call.command} scope={scope} status={reply.status}{outcome}")
        return self._scopes.placements.with_placement(reply, slot)

    async def _dispatch(self, call: Call) -> bytes:
        match call.command:
            case wire.PLACEMENTS:
                return wire.packed(self._placements(wire.unpacked(call.payload, wire.ListPlacements)))
            case wire.SET_DRAINED:
                await self._set_drained(wire.unpacked(call.payload, wire.SetDrained))
                return b""
            case wire.SET_EVACUATED:
                await self._set_evacuated(wire.unpacked(call.payload, wire.SetEvacuated))
                return b""
        if not SCOPE_ID.match(call.scope_id):
            raise BadRequest(f"scope {call.scope_id!r} is not a scope id", hint="net-<id> or vpc-<id>")
        match call.command:
            case wire.READ_STATE:
                return await self._in_turn(call, wire.ReadPart, self._read_state)
            case wire.READ_FLOWS:
                return await self._in_turn(call, wire.ReadPart, self._read_flows)
            case wire.RECEIVE:
                return await self._in_turn(call, wire.Receive, self._receive)
            case wire.ADD_FLOWS:
                return await self._in_turn(call, wire.AddFlows, self._add_flows)
            case wire.CLOSE:
                return await self._in_turn(call, wire.Close, self._close)
            case wire.REOPEN:
                return await self._in_turn(call, wire.Reopen, self._reopen)
            case wire.OPEN:
                return await self._in_turn(call, wire.Open, self._open)
            case wire.FINISH:
                return await self._in_turn(call, wire.Finish, self._finish)
            case wire.DROP:
                return await self._in_turn(call, wire.Drop, self._drop)
        raise BadRequest(f"{call.command} is not a command about placements")

    async def _in_turn(
        self, call: Call, shape: type[_T], work: Callable[[Slot, _T], tuple[bytes, HostChanges]]
    ) -> bytes:
        """Run the work in a worker thread when the earlier calls of the scope are done."""
        asked = wire.unpacked(call.payload, shape)
        slot = self._scopes.slot(call.scope_id)
        async with self._scopes.turn(slot, call.command, within_s=call.remaining_ms / 1000):
            return await self._run(slot, lambda: work(slot, asked))

    async def _run(self, slot: Slot, work: Callable[[], tuple[bytes, HostChanges]]) -> bytes:
        """Run the work, and tell those who wait for the end of a move. The lock of the slot is held."""

        def with_state() -> tuple[bytes, HostChanges]:
            self._scopes.read_state(slot)
            return work()

        was = slot.gate
        try:
            data, _ = await self._scopes.run_and_settle(slot, with_state)
        finally:
            if slot.handover.rest is not None:
                self._upkeep.start_task(self._scopes.in_worker(slot.handover.rest))
                slot.handover.rest = None
            if slot.scope is None:
                slot.handover = Handover()
            if was == "closed" != slot.gate:
                slot.decided.set()
                slot.decided = asyncio.Event()
            self._decide_later(slot)
        if was in ("incoming", "closed") and slot.gate == "open":
            self._upkeep.revive(slot.scope_id, "opened")  # the rest: it must not delay the opening
        return data

    # ---------------------------------------------------------------------------------------------- about the host

    def _placements(self, asked: wire.ListPlacements) -> wire.Placements:
        slots = sorted(
            (it for it in self._scopes.slots() if it.scope is not None or it.moved is not None or it.unreadable),
            key=lambda it: it.scope_id,
        )
        rest = [it for it in slots if it.scope_id > asked.after]
        record = self._scopes.placements.host_record
        return wire.Placements(
            scopes=tuple(self._scopes.placements.in_group(it, _held(it)) for it in rest[:_LISTED_MAX]),
            more=len(rest) > _LISTED_MAX,
            drained=record.drained,
            evacuated=tuple(dict.fromkeys((*(it.host for it in record.evacuated), *_taken_from(slots)))),
        )

    async def _set_drained(self, asked: wire.SetDrained) -> None:
        await self._scopes.change_record(
            lambda record: replace(record, drained=asked.drained, over=max(record.over, asked.over))
        )

    async def _set_evacuated(self, asked: wire.SetEvacuated) -> None:
        def changed(record: HostRecord) -> HostRecord:
            kept = [it for it in record.evacuated if it.host != asked.host or (asked.owner and it.owner != asked.owner)]
            if asked.proof:
                kept.append(Evacuated(host=asked.host, until=asked.until, proof=asked.proof, owner=asked.owner))
            return replace(record, evacuated=tuple(kept))

        await self._scopes.change_record(changed)
        if not asked.proof:
            await end_claims(self._scopes, asked.host, asked.owner)

    # --------------------------------------------------------------- on the old host; in a worker, the lock is held

    def _read_state(self, slot: Slot, asked: wire.ReadPart) -> tuple[bytes, HostChanges]:
        scope = slot.scope
        if scope is None:
            raise HostRefused(f"{slot.scope_id} is not on this host")
        if asked.number == 0:
            text, size = self._store.encoded(scope), wire.PART_BYTES_MAX
            slot.handover.state = Copy(
                [
                    wire.Part(
                        data=text[at : at + size],
                        revision=scope.revision,
                        epoch=scope.placement.epoch,
                        owner=scope.owner,
                    )
                    for at in range(0, len(text), size)
                ]
            )
        return wire.packed(slot.handover.state.part(asked, f"the state of {slot.scope_id}")), HostChanges()

    def _read_flows(self, slot: Slot, asked: wire.ReadPart) -> tuple[bytes, HostChanges]:
        _served(slot)
        handover = slot.handover
        if asked.number == 0:
            want = self._scopes.placed_want(slot)
            handover.before = self._host.read_flows(want.namespace) if want.namespace else Listing()
            handover.flows = Copy([wire.Part(data=it) for it in conntrack_copy.encode(handover.before.records)])
        return wire.packed(handover.flows.part(asked, f"the connections of {slot.scope_id}")), HostChanges()

    def _close(self, slot: Slot, asked: wire.Close) -> tuple[bytes, HostChanges]:
        scope = _served(slot)
        placement = scope.placement
        if placement.gate == "closed" and placement.peer != asked.to:
            raise HostRefused(f"{slot.scope_id} is being moved to {placement.peer}", hint="finish that move first")
        if placement.group:
            raise HostRefused(f"{slot.scope_id} has a standby", hint="netloom move ends that first")
        if scope.revision != asked.revision:
            raise HostRefused(f"{slot.scope_id} has changed meanwhile", hint="repeat the command")
        if asked.epoch <= placement.epoch:
            raise HostRefused(f"{slot.scope_id} has epoch {placement.epoch} here already", hint="repeat the command")
        want = self._scopes.placed_want(slot)
        self._scopes.placements.place(slot, replace(placement, gate="closed", peer=asked.to))
        handover, slot.handover = slot.handover, Handover()
        slot.handover.closing = asked
        slot.about_to_move = None
        if not want.namespace:
            return wire.packed(wire.Closed()), HostChanges()
        try:
            self._host.reset_connections(want.namespace)  # those of haproxy end with the move: tell both ends
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} move: {error}")
        self._host.close_gate(slot.scope_id, want)
        before = handover.before if asked.token == handover.flows.token else Listing()
        changed = self._host.changed_flows(want.namespace, before)
        portions = conntrack_copy.encode_difference(changed)
        what = f"the connections of {slot.scope_id}"
        slot.handover.flows = rest = Copy([wire.Part(data=it.create, gone=it.delete) for it in portions])
        first = rest.part(wire.ReadPart(), what)
        counts = tuple(it.created for it in portions)
        return wire.packed(
            wire.Closed(flows=first.data, gone=first.gone, counts=counts, token=first.token)
        ), HostChanges()

    def _reopen(self, slot: Slot, asked: wire.Reopen) -> tuple[bytes, HostChanges]:
        scope = _served(slot)
        if scope.placement.gate == "open":
            return b"", HostChanges()
        closing = slot.handover.closing
        if (
            closing is None
            or not asked.token
            or (closing.epoch, closing.to, closing.token) != (asked.epoch, asked.to, asked.token)
        ):  # guard: a-host-that-closed-for-another-move-stays-closed
            raise HostRefused(f"{slot.scope_id} was closed for another move, or by an earlier agent")
        return self._opened_again(slot)

    def _finish(self, slot: Slot, asked: wire.Finish) -> tuple[bytes, HostChanges]:
        scope = slot.scope
        if scope is not None and slot.gate not in ("closed", "passive", "standby"):
            raise HostRefused(f"{slot.scope_id} is {slot.gate} here", hint="move it away first")
        if scope is not None and slot.epoch >= asked.epoch:
            raise HostRefused(f"{slot.scope_id} has epoch {slot.epoch} here, not older than {asked.epoch}")
        self._scopes.placements.retire(slot, Moved(to=asked.to, epoch=asked.epoch))
        return b"", self._scopes.converge(slot) if slot.ending else HostChanges()

    # --------------------------------------------------------------- on the new host; in a worker, the lock is held

    def _receive(self, slot: Slot, asked: wire.Receive) -> tuple[bytes, HostChanges]:
        scope = self._store.decoded(slot.scope_id, asked.state, f"the state of {slot.scope_id} from {asked.peer}")
        had = slot.scope
        if had is not None:
            if had.owner != scope.owner:
                raise ForeignScope(f"{slot.scope_id} belongs to {had.owner} on this host, not to {scope.owner}")
            if slot.gate in ("open", "closed"):
                raise HostRefused(f"{slot.scope_id} is {slot.gate} here with epoch {slot.epoch}")
        known = max(slot.epoch, slot.moved.epoch if slot.moved else 0, scope.placement.epoch)
        if asked.epoch <= known and not (had and had.placement.gate == "incoming" and had.placement.epoch == known):
            raise HostRefused(f"{slot.scope_id} has epoch {known} already, so {asked.epoch} is not a new one")
        # A copy that was here before is not forgotten if the scope is not opened: perhaps it is the only one.
        was_passive = had.placement.was_passive if had else ""
        if had and slot.gate == "standby":
            was_passive = "this host stood by for it before"
        if had and had.placement.gate == "passive":
            was_passive = had.placement.why or "it was passive before"
        placement = Placement(
            epoch=asked.epoch,
            host=asked.host,
            proof=asked.proof,
            gate="incoming",
            peer=asked.peer,
            was_passive=was_passive,
            from_dead=scope.placement.from_dead,
            taken_from=tuple(it for it in scope.placement.taken_from if it.lower() != asked.host.lower()),
        )
        scope = placed(scope, placement)
        self._store.save(scope)
        slot.scope, slot.ending, slot.unproved = scope, False, False
        slot.handover = Handover()
        changes = self._scopes.converge(slot)
        if slot.failed:
            failed = "; ".join(map(str, slot.failed))
            self._not_opened(slot)
            raise HostRefused(f"{slot.scope_id} cannot be served here: {failed}", hint="its host serves it as before")
        namespace = self._scopes.placed_want(slot).namespace
        if namespace and had and had.placement.gate == "incoming":  # guard: a-repeated-move-begins-with-an-empty-table
            self._host.copy_flows(namespace, [], self._host.read_flows(namespace).records)
        return wire.packed(wire.Received(ready=_ready(slot))), changes

    def _add_flows(self, slot: Slot, asked: wire.AddFlows) -> tuple[bytes, HostChanges]:
        _incoming(slot, asked.epoch)
        created = self._copy_flows(self._scopes.placed_want(slot).namespace, asked.flows, asked.gone)
        return wire.packed(_received(created, ready=_ready(slot))), HostChanges()

    def _open(self, slot: Slot, asked: wire.Open) -> tuple[bytes, HostChanges]:
        if slot.scope is not None and slot.scope.placement.gate == "open":
            if slot.scope.placement.epoch == asked.epoch:
                return wire.packed(wire.Received()), HostChanges()  # the reply was lost
            raise HostRefused(f"{slot.scope_id} is open here with epoch {slot.scope.placement.epoch}")
        placement = _incoming(slot, asked.epoch)
        want = self._scopes.placed_want(slot)
        if asked.dead and not asked.fenced and want.namespace:
            found = self._scopes.placements.occupied(slot, want)
            if found.owners or found.probing or found.unknown:
                raise HostRefused(
                    f"{found}: {slot.scope_id} is not opened here",
                    hint="switch the dead host off, and say so with --fenced",
                )
        created = self._copy_flows(want.namespace, asked.flows, asked.gone)
        at, _, reception = asked.ready.rpartition(" ")
        if not asked.dead and reception != slot.handover.reception:  # guard: no-opening-by-an-earlier-reception
            raise HostRefused(f"{slot.scope_id} was received anew, or the agent restarted", hint="repeat the command")
        if not asked.dead and not _within(at, wire.OPEN_WITHIN_S):  # guard: no-opening-after-its-time
            raise HostRefused(f"{slot.scope_id} was not opened in time", hint="repeat the command")
        from_dead = placement.from_dead or (asked.dead and not asked.fenced)
        taken_from = tuple(dict.fromkeys((*placement.taken_from, *filter(None, [asked.taken_from]))))
        opened = replace(placement, gate="open", peer="", was_passive="", from_dead=from_dead, taken_from=taken_from)
        self._scopes.placements.place(slot, opened)
        reply = wire.packed(_received(created))
        if not want.namespace:
            return reply, HostChanges()
        try:
            announcements = self._open_gate(slot, want)
        except BaseException:
            # The state says open, and this host tries again. Meanwhile the old host may have opened.
            slot.unconverged = True
            slot.unproved = True  # guard: a-gate-that-did-not-open-is-asked-about
            raise
        if slot.moved is not None:
            self._store.forget_moved(slot.scope_id)
            slot.moved = None
        slot.enforced_scope = None  # the flows are those of another host: check them all
        return reply, HostChanges(announcements=announcements)

    def _drop(self, slot: Slot, asked: wire.Drop) -> tuple[bytes, HostChanges]:
        if slot.scope is None:
            if slot.moved and slot.moved.epoch >= asked.epoch:  # guard: an-opened-scope-is-not-dropped
                raise HostRefused(f"{slot.scope_id} was opened here, and moved to {slot.moved.to}")
            return b"", HostChanges()
        _incoming(slot, asked.epoch)
        return b"", self._not_opened(slot)

    def _copy_flows(self, namespace: str, flows: bytes, gone: bytes) -> Created:
        create: list[Record] = conntrack_copy.decode(flows) if flows else []
        delete: list[Record] = conntrack_copy.decode(gone) if gone else []
        if not namespace or not (create or delete):
            return Created(0)
        return self._host.copy_flows(namespace, create, delete)

    # ------------------------------------------------------------------------------------- a move without an end

    def _decide_later(self, slot: Slot) -> None:
        """Start the time after which this host decides by itself, if the scope is in the middle of a move."""
        if slot.undecided is not None:
            slot.undecided.cancel()
            slot.undecided = None
        after_s = {"closed": wire.CLOSED_S, "incoming": wire.INCOMING_S}.get(slot.gate)
        if after_s is not None:
            slot.undecided = self._clock.call_later(after_s, lambda: self._upkeep.start_task(self._decide(slot)))

    async def _decide(self, slot: Slot) -> None:
        """Open again, become passive, or forget the scope."""
        slot.undecided = None
        try:
            async with self._scopes.turn(slot, "the end of a move"):
                work = {"closed": self._decide_closed, "incoming": self._forget_incoming}.get(slot.gate)
                if work is not None:
                    await self._run(slot, partial(work, slot))
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} move: {error}")
            self._decide_later(slot)
        # A bug must not end the agent.
        except Exception as error:  # noqa: BLE001
            self._log.traceback(f"scope={slot.scope_id} move", error)
            self._decide_later(slot)

    def _decide_closed(self, slot: Slot) -> tuple[bytes, HostChanges]:
        """Nobody finished the move. If the new host did not open, nobody answers for the addresses."""
        assert slot.scope is not None
        placement = slot.scope.placement
        want = self._scopes.placed_want(slot)
        if want.namespace:
            found = self._scopes.placements.occupied(slot, want)
            if found.owners:
                self._scopes.placements.make_passive(slot, f"{found}: {placement.peer} has probably taken it over")
                return b"", self._scopes.converge(slot)
            if found.probing or found.unknown:
                raise HostRefused(f"{found}, so whether {placement.peer} has opened is not known")
        return self._opened_again(slot)

    def _opened_again(self, slot: Slot) -> tuple[bytes, HostChanges]:
        """Open the gate of a scope that was closed for a move."""
        assert slot.scope is not None
        placement, want = slot.scope.placement, self._scopes.placed_want(slot)
        self._scopes.placements.place(slot, replace(placement, gate="open", peer=""))
        self._log.line(f"scope={slot.scope_id} the move to {placement.peer} was not finished; it is served here again")
        if not want.namespace:
            return b"", HostChanges()
        return b"", HostChanges(announcements=self._open_gate(slot, want))

    def _open_gate(self, slot: Slot, want: Want) -> tuple[Announcement, ...]:
        """Open the gate and announce the addresses; returns the announcements, to be repeated."""
        announcements = self._host.open_gate(slot.scope_id, want)
        # At once, before any other work: until then the frames for this host go to the other one.
        slot.handover.rest = self._host.announce(announcements)  # guard: an-open-gate-is-announced-at-once
        return announcements

    def _forget_incoming(self, slot: Slot) -> tuple[bytes, HostChanges]:
        self._log.line(f"scope={slot.scope_id} the move to this host was not finished; it is forgotten here")
        return b"", self._not_opened(slot)

    def _not_opened(self, slot: Slot) -> HostChanges:
        """Forget an incoming scope, or make it passive again if it was that before."""
        assert slot.scope is not None
        placement = slot.scope.placement
        if placement.was_passive:  # guard: a-passive-copy-outlives-an-attempt-to-open-it
            self._scopes.placements.place(
                slot, replace(placement, gate="passive", why=placement.was_passive, was_passive="")
            )
            return self._scopes.converge(slot)
        self._scopes.placements.retire(slot)
        return self._scopes.converge(slot)


def _served(slot: Slot) -> Scope:
    """The state of a scope that this host serves, or is about to hand over. Raises HostRefused."""
    if slot.scope is None:
        if slot.moved is not None:
            raise HostRefused(f"{slot.scope_id} was moved to {slot.moved.to}")
        raise HostRefused(f"{slot.scope_id} is not on this host")
    gate = slot.scope.placement.gate
    if gate not in ("open", "closed"):
        raise HostRefused(f"{slot.scope_id} is {gate} on this host, so another one serves it")
    return slot.scope


def _incoming(slot: Slot, epoch: int) -> Placement:
    """The placement of a scope that is about to come here with this epoch. Raises HostRefused."""
    placement = slot.scope.placement if slot.scope is not None else None
    if placement is None or placement.gate != "incoming" or placement.epoch != epoch:
        raise HostRefused(f"{slot.scope_id} is not expected here with epoch {epoch}", hint="repeat the command")
    return placement


def _received(created: Created, ready: str = "") -> wire.Received:
    return wire.Received(ready=ready, flows=created.standing, refused=created.refused, why=created.reason)


def _held(slot: Slot) -> wire.HeldScope:
    scope = slot.scope
    if scope is None:
        if slot.moved is not None:
            return wire.HeldScope(scope_id=slot.scope_id, epoch=slot.moved.epoch, gate="moved", peer=slot.moved.to)
        return wire.HeldScope(scope_id=slot.scope_id, gate="unreadable", why="its state file cannot be read")
    it = scope.placement
    return wire.HeldScope(
        scope_id=slot.scope_id,
        owner=scope.owner,
        epoch=it.epoch,
        revision=scope.revision,
        gate=it.gate,
        peer=it.peer,
        networks=len(scope.networks),
        nics=sum(len(network.nics) for network in scope.networks.values()),
        public_ips=len(scope.public_ips),
        why=it.why or "; ".join(map(str, slot.failed)),
    )


def _ready(slot: Slot) -> str:
    """What ``open`` must bring: this moment, and the name of the last ``receive``."""
    return f"{_now()} {slot.handover.reception}"


def _taken_from(slots: Iterable[Slot]) -> list[str]:
    """The dead hosts from which these scopes were taken."""
    return [it for slot in slots if slot.scope is not None for it in slot.scope.placement.taken_from]


def _now() -> str:
    """This moment on the clock of this boot, which also runs while the machine is suspended."""
    return f"{_BOOT_ID.read_text().strip()} {time.clock_gettime_ns(time.CLOCK_BOOTTIME)}"


def _within(moment: str, seconds: float) -> bool:
    """Whether the moment, from :func:`_now`, was in this boot and at most so many seconds ago."""
    boot, _, at = moment.partition(" ")
    now_boot, _, now = _now().partition(" ")
    return boot == now_boot and at.isdigit() and 0 <= int(now) - int(at) <= seconds * 1e9
