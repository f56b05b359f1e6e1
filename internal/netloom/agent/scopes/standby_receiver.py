"""The standby of a group: it keeps the states of the active host's scopes, and builds them without a lease."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from netloom import pairwire as wire
from netloom.agent.clock import Clock
from netloom.agent.host.changes import HostChanges
from netloom.agent.log import Log
from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.interfaces import ScopeStore
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_commands import serve_alone
from netloom.agent.scopes.standby_groups import Groups, Key, key_of, run
from netloom.agent.scopes.standby_sender import digest_of
from netloom.agent.scopes.upkeep import Upkeep
from netloom.agent.standby.member import GroupView
from netloom.errors import HostRefused, NetloomError


class _NotHeld(msgspec.Struct, frozen=True):
    """The scope is not in the list of what the active host has."""

    scope_id: str


_Message = wire.State | wire.Gone | _NotHeld


class StateReceiver:
    """On the event loop. The messages about one scope are worked on one after the other, under its lock."""

    def __init__(
        self,
        groups: Groups,
        scopes: Scopes,
        upkeep: Upkeep,
        store: ScopeStore,
        log: Log,
        clock: Clock,
        flows: FlowCopies,
    ) -> None:
        self._groups = groups
        self._scopes = scopes
        self._upkeep = upkeep
        self._store = store
        self._log = log
        self._clock = clock
        self._flows = flows
        self._inbox: dict[str, tuple[str, _Message]] = {}  # by scope: a group, and its newest message about the scope
        self._working: set[str] = set()  # scopes whose inbox is being worked on
        self._forgetting: set[str] = set()  # scopes that the active host has this host forget, at this moment

    def compare(self, group_id: str) -> None:
        """Ask the active host what it has."""
        if self._groups.connected(group_id):
            group = self._groups.known[group_id]
            group.asked = self._clock.time()
            group.listing = {}
            self._groups.send(group_id, wire.HoldsWanted())

    def holds(self, group_id: str, message: wire.Holds) -> None:
        """What the active host has: ask for what is missing here, and forget what it has not."""
        group = self._groups.known[group_id]
        group.listing |= {it.scope_id: (it.epoch, it.joined, it.revision) for it in message.scopes}
        if message.more:
            return
        listing, group.listing = group.listing, {}
        slots = {it.scope_id: it for it in self._groups.slots(group_id)}
        gone = slots.keys() - listing.keys()
        if not message.complete:  # guard: an-unreadable-state-removes-no-copy
            gone = set()
        for scope_id in gone:
            self.take(group_id, _NotHeld(scope_id))
        group.missing = {it for it, key in listing.items() if it not in slots or _key(slots[it]) != key}
        for scope_id in listing.keys() - group.missing:
            self._acknowledge(group_id, scope_id, listing[scope_id][2])
        group.compared = True
        self.ask_for_flows(group_id)
        if group.missing:
            self._groups.send(group_id, wire.Wanted(scope_ids=tuple(sorted(group.missing))))

    def ask_for_flows(self, group_id: str) -> None:
        """Ask for the connections of all scopes that are built here, unless that was done, and tell what was built.

        After a start the other host says what it has before all scopes are built here. The agent may be another build
        than the one that got the state.
        """
        group = self._groups.known[group_id]
        if not group.compared or not self._groups.connected(group_id):
            return
        for slot in self._groups.slots(group_id):
            if slot.scope_id in group.missing or slot.unconverged:
                continue
            if self._flows.ask(group_id, slot.scope_id):
                self._tell_digest(group_id, slot)

    def forgets(self, scope_id: str) -> bool:
        """Whether the scope is being deleted because the active host says so. In any thread."""
        return scope_id in self._forgetting

    def take(self, group_id: str, message: _Message) -> None:
        """Do what the active host says about a scope, one message after the other; of several, the newest."""
        scope_id = message.scope_id
        self._inbox[scope_id] = group_id, message
        if scope_id not in self._working:
            self._working.add(scope_id)
            self._upkeep.start_task(self._work_on(scope_id))

    async def _work_on(self, scope_id: str) -> None:
        """Work on the inbox of a scope until it is empty."""
        slot = self._scopes.slot(scope_id)
        try:
            while scope_id in self._inbox:
                try:
                    async with self._scopes.turn(slot, "the state of the active host"):
                        if scope_id in self._inbox:
                            await self._work_on_one(slot, *self._inbox.pop(scope_id))
                except NetloomError as error:
                    self._log.line(f"scope={scope_id} standby: {error}")
                except Exception as error:  # noqa: BLE001, a bug must not end the agent
                    self._log.traceback(f"scope={scope_id} standby", error)
        finally:
            self._working.discard(scope_id)

    async def _work_on_one(self, slot: Slot, group_id: str, message: _Message) -> None:
        view = self._groups.views().get(group_id)
        if view is None or view.active == view.me:  # guard: an-active-host-takes-no-state
            return
        match message:
            case wire.State():
                await self._work_on_state(slot, view, message)
            case _NotHeld() if slot.scope is not None and slot.scope.placement.leaving:
                # This host was about to serve it alone, and the other host has forgotten it.
                await run(self._scopes, slot, lambda: serve_alone(self._scopes, slot))
            case _:
                await self._work_on_gone(slot, group_id)

    async def _work_on_gone(self, slot: Slot, group_id: str) -> None:
        await run(self._scopes, slot, lambda: self._forget(slot, group_id))
        self._flows.forget(slot.scope_id)
        self._groups.send(group_id, wire.GoneDone(scope_id=slot.scope_id))
        if slot.ending:
            await run(self._scopes, slot, lambda: self._scopes.converge(slot))

    async def _work_on_state(self, slot: Slot, view: GroupView, message: wire.State) -> None:
        group_id = view.spec.group_id
        try:
            await run(self._scopes, slot, lambda: self._store_copy(slot, view, message))
        except NetloomError as error:
            self._acknowledge(group_id, slot.scope_id, message.revision, f"{view.me}: {error.message}")
            raise
        self._acknowledge(group_id, slot.scope_id, message.revision)
        self._groups.known[group_id].missing.discard(slot.scope_id)
        if slot.scope_id not in self._inbox:
            await run(self._scopes, slot, lambda: self._scopes.converge(slot))
            self._tell_digest(group_id, slot)

    def _tell_digest(self, group_id: str, slot: Slot) -> None:
        """Tell what this host has made of the state, so that a difference shows."""
        if slot.rendered is None or slot.rendered[0] is None:
            return
        revision, want = slot.rendered[0].revision, slot.rendered[1]
        message = wire.Digest(scope_id=slot.scope_id, revision=revision, digest=digest_of(want))
        self._groups.send(group_id, message)

    def drop(self, scope_id: str) -> None:
        """What the other host has said about the scope has no meaning any more: it is this host's turn."""
        self._inbox.pop(scope_id, None)

    def _acknowledge(self, group_id: str, scope_id: str, revision: int, error: str = "") -> None:
        self._groups.send(group_id, wire.Stored(scope_id=scope_id, revision=revision, error=error))

    def _store_copy(self, slot: Slot, view: GroupView, message: wire.State) -> HostChanges:
        """Save the state of the active host as this host's own. In a worker thread."""
        sender = view.spec.names.partner(view.me)
        scope = self._store.decoded(slot.scope_id, message.data, f"the state of {slot.scope_id} from {sender}")
        placement = scope.placement
        if placement.group != view.spec.group_id or scope.owner != view.spec.owner:
            raise HostRefused(f"the state of {slot.scope_id} from {sender} is of another group or owner")
        self._scopes.read_state(slot)
        had = slot.scope
        if had is not None and had.placement.group != placement.group and had.placement.gate != "passive":
            raise HostRefused(  # guard: a-copy-replaces-nothing-that-is-served
                f"{slot.scope_id} is {slot.gate} here already", hint="netloom where shows what holds"
            )
        mine = replace(
            placement,
            host=view.me,
            proof=placement.partner_proof,
            partner_proof=placement.proof,
            leaving=False,
        )
        scope = replace(scope, placement=mine)
        if scope != had:
            self._store.save(scope)
            slot.scope, slot.ending, slot.unproved = scope, False, False
        slot.unconverged = True
        if slot.moved is not None:
            self._store.forget_moved(slot.scope_id)
            slot.moved = None
        return HostChanges()

    def _forget(self, slot: Slot, group_id: str) -> HostChanges:
        """Forget a scope of the group, for good. In a worker thread."""
        self._scopes.read_state(slot)
        if slot.scope is not None and slot.scope.placement.group == group_id:
            self._forgetting.add(slot.scope_id)
            try:
                self._scopes.placements.retire(slot)
            finally:
                self._forgetting.discard(slot.scope_id)
        return HostChanges()


def _key(slot: Slot) -> Key | None:
    """What to compare with the key of the active host's state. None: a state that it does not have."""
    if slot.scope is None or slot.scope.placement.leaving:  # guard: a-standby-is-not-about-to-leave
        return None
    return key_of(slot.scope)
