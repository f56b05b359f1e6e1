"""The active host of a group: it sends the states of its scopes to the standby, and knows which of them that has."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from netloom import pairwire as wire
from netloom.agent.clock import Clock
from netloom.agent.log import Log
from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.interfaces import ScopeStore
from netloom.agent.scopes.roles import Role, Roles
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_groups import Groups, key_of
from netloom.errors import HostRefused
from netloom.render.want import Want
from netloom.state import Scope
from netloom.wire import Reply

STORED_WITHIN_S = 1.0


class StateSender:
    """On the event loop. A standby is *behind* from the first state that it does not store in time, until it has the
    newest one. ``behind`` alone may be called in any thread."""

    def __init__(
        self, groups: Groups, roles: Roles, scopes: Scopes, store: ScopeStore, log: Log, clock: Clock, flows: FlowCopies
    ) -> None:
        self._groups = groups
        self._roles = roles
        self._scopes = scopes
        self._store = store
        self._log = log
        self._clock = clock
        self._flows = flows
        self._has: dict[str, int] = {}  # by scope: the revision that its standby has on disk
        self._arrived: dict[str, asyncio.Event] = {}  # by scope: is set, and replaced, when that changes
        self._behind: dict[str, str] = {}  # by scope: why the standby has not the newest state
        self._ended: dict[str, tuple[str, asyncio.Event]] = {}  # by scope that was deleted: its group; it is forgotten
        self._digests: dict[str, wire.Digest] = {}  # by scope: of the standby, not compared yet
        self._differs: set[str] = set()  # scopes of which the standby makes something else

    def push(self, scope: Scope, text: bytes) -> None:
        """Send a state that was saved. ``text``: its file."""
        group_id = scope.placement.group
        if scope.placement.leaving or not self._groups.is_active(group_id):
            return
        self._groups.send(
            group_id,
            wire.State(
                scope_id=scope.scope_id,
                epoch=scope.placement.epoch,
                joined=scope.placement.joined,
                revision=scope.revision,
                data=text,
            ),
        )

    def push_again(self, group_id: str, scope_id: str) -> None:
        """The standby asks for the state of the scope."""
        slot = self._groups.slot(group_id, scope_id)
        if slot is not None and slot.scope is not None:
            self.push(slot.scope, self._store.encoded(slot.scope))

    def tell_gone(self, group_id: str, scope_id: str) -> None:
        """The scope was deleted here, with its state of this group."""
        self._has.pop(scope_id, None)
        self._behind.pop(scope_id, None)
        self._arrived.pop(scope_id, asyncio.Event()).set()
        self._digests.pop(scope_id, None)
        self._differs.discard(scope_id)
        self._flows.drop(group_id, scope_id)
        if self._groups.is_active(group_id):
            self._ended[scope_id] = group_id, asyncio.Event()
            self._groups.send(group_id, wire.Gone(scope_id=scope_id))

    def forgotten(self, group_id: str, scope_id: str) -> None:
        """The standby has forgotten the scope."""
        if scope_id in self._ended and self._ended[scope_id][0] == group_id:
            self._ended.pop(scope_id)[1].set()

    async def settled(self, scope_id: str, reply: Reply, within_s: float) -> Reply:
        """The reply, when the standby has what the call changed. ``Replication`` describes the method."""
        slot = self._scopes.get(scope_id)
        scope = slot.scope if slot is not None else None
        if scope is None:
            return await self._settled_end(scope_id, reply, within_s)
        if not scope.placement.group or reply.moved_to:
            return reply
        if scope_id in self._has and scope_id not in self._behind and self._groups.connected(scope.placement.group):
            ends = self._clock.time() + min(within_s, STORED_WITHIN_S)
            while self._has.get(scope_id, 0) < reply.revision and self._clock.time() < ends:
                arrived = self._arrived.setdefault(scope_id, asyncio.Event())
                try:
                    async with self._clock.timeout(ends - self._clock.time()):
                        await arrived.wait()
                except TimeoutError:
                    break
        role = self._roles.of(scope.placement)
        if self._has.get(scope_id, 0) >= reply.revision:
            return reply
        if role is None or not role.serves:
            raise _lost_turn(scope_id)
        if scope_id not in self._behind:
            why = "is behind: it lacks the newest state" if scope_id in self._has else "is behind: it has no state yet"
            self._behind[scope_id] = f"{role.standby} {why}"
            self._log.line(f"scope={scope_id} standby {self._behind[scope_id]}")
        return _noted(reply, self._behind[scope_id])

    async def _settled_end(self, scope_id: str, reply: Reply, within_s: float) -> Reply:
        """The reply to a call that has ended the scope."""
        group_id, forgotten = self._ended.get(scope_id, ("", None))
        if forgotten is None:
            return reply
        if self._groups.connected(group_id):
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(min(within_s, STORED_WITHIN_S)):
                    await forgotten.wait()
        self._ended.pop(scope_id, None)
        if forgotten.is_set():
            return reply
        if not self._groups.is_active(group_id):  # guard: an-end-that-the-active-host-does-not-know-is-no-success
            raise _lost_turn(scope_id)
        return _noted(reply, "it has not forgotten the scope yet")

    def stored(self, slot: Slot, message: wire.Stored) -> None:
        """The standby has this state on its disk, or says why not."""
        scope_id, scope = slot.scope_id, slot.scope
        if message.error:
            self._behind[scope_id] = message.error
            self._log.line(f"scope={scope_id} standby: {message.error}")
            return
        self._has[scope_id] = message.revision
        if scope is not None and message.revision >= scope.revision and self._behind.pop(scope_id, ""):
            self._log.line(f"scope={scope_id} standby has the newest state again")
        self._arrived.setdefault(scope_id, asyncio.Event()).set()
        self._arrived[scope_id] = asyncio.Event()

    def lost(self, scope_id: str) -> None:
        """What the standby has is not known any more: there is no connection to it."""
        self._has.pop(scope_id, None)

    def start_anew(self, scope_id: str) -> None:
        """A turn has begun, here or on the other host."""
        self._has.pop(scope_id, None)
        self._behind.pop(scope_id, None)

    def is_behind(self, slots: Iterable[Slot]) -> bool:
        """Whether the standby has not the newest state of one of these scopes."""
        return any(it.scope_id in self._behind for it in slots)

    def behind(self, scope_id: str, role: Role) -> str:
        """Why the standby of a scope has not the newest state; empty: it has. In any thread."""
        if scope_id in self._behind:
            return self._behind[scope_id]
        if scope_id not in self._has:
            return f"{role.standby} is behind: it has not said which state it has"
        return f"{role.standby} makes something else of the same state" if scope_id in self._differs else ""

    def tell_what_is_held(self, group_id: str) -> None:
        """Send which scopes of the group this host has, and in which state."""
        slots = [it for it in self._groups.slots(group_id) if it.scope is not None and not it.scope.placement.leaving]
        held = [wire.Held(it.scope_id, *key_of(it.scope)) for it in slots]
        complete = not any(it.unreadable or not it.state_read for it in self._scopes.slots())
        for message in wire.holds(held, complete=complete):
            self._groups.send(group_id, message)

    def receive_digest(self, group_id: str, message: wire.Digest) -> None:
        """What the standby has made of a state. This host may not have made anything of it yet."""
        slot = self._groups.slot(group_id, message.scope_id)
        if slot is not None:
            self._digests[message.scope_id] = message
            self.compare_digests([slot])

    def compare_digests(self, slots: Iterable[Slot]) -> None:
        """Compare what the standby has made of its states with what this host has made of them."""
        for slot in slots:
            if slot.scope_id in self._digests:
                self._compare_digest(slot, self._digests[slot.scope_id])

    def _compare_digest(self, slot: Slot, message: wire.Digest) -> None:
        scope = slot.scope
        if scope is None or scope.revision < message.revision:
            return
        if slot.rendered is None or slot.rendered[0] is not scope:
            return
        del self._digests[slot.scope_id]
        if scope.revision > message.revision:
            return
        if digest_of(slot.rendered[1]) != message.digest:
            self._log.line(f"scope={slot.scope_id} warning: the standby makes something else of the same state")
            self._differs.add(slot.scope_id)
        else:
            self._differs.discard(slot.scope_id)


def _lost_turn(scope_id: str) -> HostRefused:
    return HostRefused(
        f"{scope_id}: this host lost its turn while it executed the command", hint="CloudStack may repeat it"
    )


def _noted(reply: Reply, why: str) -> Reply:
    """The reply with a note about the standby."""
    return replace(reply, note="; ".join(filter(None, [reply.note, f"standby: {why}"])))


def digest_of(want: Want) -> bytes:
    """What tells two desired states of a host apart."""
    return hashlib.sha256(msgspec.msgpack.encode(want)).digest()[:16]
