"""The commands about groups (``standbywire``): a host becomes a member, a scope joins a group or leaves it."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from netloom import pairwire as wire
from netloom import standbywire
from netloom.agent.clock import Clock
from netloom.agent.host.changes import HostChanges
from netloom.agent.log import Log
from netloom.agent.scopes.roles import Roles
from netloom.agent.scopes.scopes import SCOPE_ID, Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_groups import Groups, Turns, run
from netloom.agent.standby.member import GroupView
from netloom.errors import BadRequest, HostRefused, NetloomError
from netloom.state import Placement
from netloom.wire import Call, Reply

LEASE_WITHIN_S = 5.0
GONE_WITHIN_S = 3.0
SILENT_S = 5.0  # a standby that was not heard for so long does not answer
DISSOLVED_WITHIN_S = 2.0
FORGOTTEN_AFTER_S = 60.0  # longer than a call of CloudStack
MOVE_BEGINS_WITHIN_S = 60.0  # after its scope has left the group: the gate closes when the other host has the state


class GroupCommands:
    """On the event loop.

    A scope leaves its group only when the standby has forgotten it, or never serves again (``standby_end.py``).
    ``Placement.leaving`` is saved first, so an agent that is ended in between goes on with it.
    """

    def __init__(self, groups: Groups, engine: Turns, roles: Roles, scopes: Scopes, log: Log, clock: Clock) -> None:
        self._groups = groups
        self._engine = engine
        self._roles = roles
        self._scopes = scopes
        self._log = log
        self._clock = clock
        self._forgotten: dict[tuple[str, str], asyncio.Event] = {}  # by group and scope that leaves it: it is forgotten

    async def execute(self, call: Call) -> Reply:
        """Execute a command of ``standbywire`` and return its reply. Never raises: the reply has the error."""
        reply = await self._scopes.answered(call, self._dispatch(call))
        outcome = f" error={reply.error}" if reply.status else ""
        scope = call.scope_id or "-"
        self._log.line(f"call={call.call_id} command={call.command} scope={scope} status={reply.status}{outcome}")
        return self._scopes.placements.with_placement(reply, self._scopes.get(call.scope_id))

    async def _dispatch(self, call: Call) -> bytes:
        if call.command == standbywire.SET_GROUP:
            return await self._set_group(standbywire.unpacked(call.payload, standbywire.SetGroup))
        if not SCOPE_ID.match(call.scope_id):
            raise BadRequest(f"scope {call.scope_id!r} is not a scope id", hint="net-<id> or vpc-<id>")
        slot = self._scopes.slot(call.scope_id)
        within_s = call.remaining_ms / 1000
        match call.command:
            case standbywire.JOIN_GROUP:
                asked = standbywire.unpacked(call.payload, standbywire.JoinGroup)
                await self._lease(asked.group_id, min(within_s, LEASE_WITHIN_S))
                async with self._scopes.turn(slot, call.command, within_s=within_s):
                    await run(self._scopes, slot, lambda: self._join(slot, asked))
            case standbywire.LEAVE_GROUP:
                leaves = standbywire.unpacked(call.payload, standbywire.LeaveGroup)
                if leaves.moves:
                    self._expect_move(slot)
                await (self._continue_alone if leaves.fenced else self._leave)(slot, leaves, within_s)
            case _:
                raise BadRequest(f"{call.command} is not a command about groups")
        return b""

    async def _set_group(self, asked: standbywire.SetGroup) -> bytes:
        spec = asked.group
        if asked.reuses:
            for view in reversed(list(self._groups.views().values())):  # the newest: all its members may know it
                it = view.spec
                same = it.owner == spec.owner and it.hosts == spec.hosts and it.lease_ms == spec.lease_ms
                mine = view.me == asked.host and view.active == view.me
                if same and mine and not view.dissolved:  # guard: a-dissolved-group-is-not-used-again
                    if it.group_id in self._groups.known:
                        self._groups.known[it.group_id].empty_since = None
                    return standbywire.packed(standbywire.GroupAnswer(group=it))
        if asked.exists and spec.group_id not in self._groups.views():  # guard: a-member-that-forgot-votes-no-more
            raise HostRefused(f"group {spec.group_id} is not known here any more", hint="make another group")
        await self._scopes.in_worker(lambda: self._engine.set_group(spec, asked.host))
        self._groups.follow()
        return standbywire.packed(standbywire.GroupAnswer(group=spec))

    async def _lease(self, group_id: str, within_s: float) -> None:
        """Wait until this host has the lease of the group. Raises HostRefused."""
        ends = self._clock.time() + within_s
        while True:
            role = self._roles.of(Placement(group=group_id))
            if role is None or not role.host:
                raise HostRefused(f"group {group_id} is not known here", hint="set it first")
            if role.serves:
                return
            if self._clock.time() > ends:
                ports = sorted({it.port for it in self._groups.views()[group_id].spec.hosts})
                raise HostRefused(
                    f"this host has no lease in group {group_id}: it hears "
                    + (f"neither {role.standby} nor {role.witness}" if role.witness else f"nothing of {role.standby}"),
                    hint=f"do firewalls between the hosts let UDP and TCP of port {', '.join(map(str, ports))} pass?",
                )
            await self._clock.sleep(0.05)

    def _join(self, slot: Slot, asked: standbywire.JoinGroup) -> HostChanges:
        self._scopes.read_state(slot)
        scope = slot.scope
        if scope is None:
            raise HostRefused(f"{slot.scope_id} is not on this host")
        placement = scope.placement
        if placement.group == asked.group_id:
            return HostChanges()
        if slot.about_to_move is not None:  # guard: a-scope-that-is-about-to-move-joins-no-group
            raise HostRefused(f"{slot.scope_id} is about to move", hint="its new host gives it a standby")
        if placement.group or placement.gate != "open":
            what = f"belongs to group {placement.group}" if placement.group else f"is {placement.gate} here"
            raise HostRefused(f"{slot.scope_id} {what}")
        if placement.taken_from:
            hosts = " and ".join(placement.taken_from)
            raise HostRefused(f"{slot.scope_id} was taken from {hosts}", hint="netloom undrain it first, if it is back")
        if asked.epoch <= placement.epoch:
            raise HostRefused(f"{slot.scope_id} has epoch {placement.epoch} here already", hint="repeat the command")
        view = self._groups.views()[asked.group_id]
        if view.spec.owner != scope.owner:
            raise HostRefused(f"group {asked.group_id} is not one of the owner of {slot.scope_id}")
        if view.dissolved:  # guard: a-dissolved-group-takes-no-scope
            raise HostRefused(f"group {asked.group_id} is dissolved", hint="repeat the command")
        if not view.serves:  # guard: a-scope-joins-under-a-lease
            raise HostRefused(f"this host has no lease in group {asked.group_id} any more", hint="repeat the command")
        joined = replace(
            placement,
            epoch=asked.epoch,
            host=view.me,
            proof=asked.proof,
            proof_from=asked.epoch,
            group=asked.group_id,
            joined=view.term,
            partner_proof=asked.standby_proof,
        )
        self._scopes.placements.place(slot, joined)
        return self._scopes.converge(slot)

    def _expect_move(self, slot: Slot) -> None:
        """Else CloudStack's next call gives the scope a standby again, before the move has begun."""

        def end() -> None:
            if slot.about_to_move is timer:
                slot.about_to_move = None

        slot.about_to_move = timer = self._clock.call_later(MOVE_BEGINS_WITHIN_S, end)

    async def _leave(self, slot: Slot, asked: standbywire.LeaveGroup, within_s: float) -> None:
        async with self._scopes.turn(slot, standbywire.LEAVE_GROUP, within_s=within_s):
            scope = slot.scope
            if scope is None or scope.placement.group != asked.group_id:
                return
            if not self._groups.is_active(asked.group_id):
                raise HostRefused(f"{slot.scope_id} is not served by this host")
            placement = scope.placement
            await run(self._scopes, slot, lambda: self._place(slot, replace(placement, leaving=True)))
            is_over = await self._standby_forgets(slot, asked.group_id) or await self._dissolved(asked.group_id)
            if is_over or (asked.is_forgotten and self._cannot_have_it(asked.group_id)):
                await run(self._scopes, slot, lambda: serve_alone(self._scopes, slot))
                return
            if not self._groups.is_active(asked.group_id):  # guard: a-scope-that-leaves-is-not-lost
                # Perhaps the other host has forgotten it. The list of what it has decides when it comes.
                raise HostRefused(f"{slot.scope_id}: this host lost its turn", hint="CloudStack may repeat it")
            await run(self._scopes, slot, lambda: self._place(slot, replace(placement, leaving=False)))
            raise HostRefused(
                f"{slot.scope_id}: its standby does not answer, so the group stays",
                hint=self._remedy(asked.group_id),
            )

    def _remedy(self, group_id: str) -> str:
        view = self._groups.views().get(group_id)
        if view is None:
            return "repeat it when the standby answers"
        answers = "the standby, or the witness, answers" if view.spec.witness else "the standby answers"
        dead = view.spec.names.partner(view.me)
        return f"repeat it when {answers}; if {dead} is off for good: netloom evacuate {dead} --fenced"

    async def _continue_alone(self, slot: Slot, asked: standbywire.LeaveGroup, within_s: float) -> None:
        """Serve the scope, because an operator says that the other host of its group is off.

        The whole group is dissolved by this host, so that the other one stands by when it is back. All scopes of the
        group leave it then (standby_end.py).
        """
        async with self._scopes.turn(slot, standbywire.LEAVE_GROUP, within_s=within_s):
            scope = slot.scope
            if scope is None or scope.placement.group != asked.group_id:
                return
            view = self._groups.views().get(asked.group_id)
            if view is None or asked.fenced.lower() != view.spec.names.partner(view.me).lower():
                raise HostRefused(f"{slot.scope_id} has no group with {asked.fenced} on this host")
            if not view.alone:
                await self._dissolve_alone(slot, view, asked)
            await run(self._scopes, slot, lambda: serve_alone(self._scopes, slot))

    async def _dissolve_alone(self, slot: Slot, view: GroupView, asked: standbywire.LeaveGroup) -> None:
        """Raises HostRefused if the other host may serve, or if this one cannot write that it is off."""
        silent_s = view.silent_s.get(view.spec.names.partner(view.me), 0.0)
        if silent_s < SILENT_S or self._groups.connected(asked.group_id):  # guard: a-host-that-was-heard-is-not-off
            raise HostRefused(
                f"{asked.fenced} was heard here within the last {SILENT_S:.0f} s, or this agent has just started",
                hint="power it off, and repeat the command",
            )
        if asked.asks_first:
            want = self._scopes.placed_want(slot)
            found = await self._scopes.in_worker(lambda: self._scopes.placements.occupied(slot, want))
            if found.owners or found.probing or found.unknown:  # guard: a-standby-asks-before-it-continues-alone
                raise HostRefused(
                    f"{found}: {slot.scope_id} is not served here",
                    hint=f"switch {asked.fenced} off, and say so with --fenced",
                )
        self._engine.continue_alone(asked.group_id)
        if not await self._is_alone(asked.group_id):
            raise HostRefused(
                f"{slot.scope_id}: this host cannot serve it alone: it hears {asked.fenced}, or cannot write its file",
                hint="look at /var/log/netloom/agent.log there",
            )

    async def _is_alone(self, group_id: str) -> bool:
        """Wait until the group is dissolved, so that this host alone serves; whether it is, after some seconds."""
        ends = self._clock.time() + DISSOLVED_WITHIN_S
        while (view := self._groups.views().get(group_id)) is not None and not view.alone:
            if self._clock.time() > ends:
                break
            await self._clock.sleep(0.05)
        return view is not None and view.alone

    def _cannot_have_it(self, group_id: str) -> bool:
        """Whether the standby of a group without a witness cannot have got a scope during a call."""
        view = self._groups.views().get(group_id)
        if view is None or view.spec.witness is not None:
            return False
        silent_s = view.silent_s.get(view.spec.names.partner(view.me), 0.0)
        return silent_s >= FORGOTTEN_AFTER_S and not self._groups.connected(group_id)  # guard: a-standby-may-have-it

    async def go_on_leaving(self, slot: Slot) -> None:
        """Go on with what an agent before this one has begun."""
        try:
            async with self._scopes.turn(slot, standbywire.LEAVE_GROUP):
                scope = slot.scope
                if scope is None or not scope.placement.leaving:
                    return
                if await self._standby_forgets(slot, scope.placement.group):
                    await run(self._scopes, slot, lambda: serve_alone(self._scopes, slot))
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} standby: {error}")

    async def _dissolved(self, group_id: str) -> bool:
        """Whether the group is dissolved, so that the standby need not answer. Asks for it if the standby is silent."""
        view = self._groups.views().get(group_id)
        if view is None or view.alone:
            return view is not None
        silent_s = view.silent_s.get(view.spec.names.partner(view.me), 0.0)
        if silent_s < SILENT_S:  # guard: a-standby-that-is-heard-keeps-its-group
            return False
        self._engine.dissolve(group_id)
        return await self._is_alone(group_id)  # guard: a-silent-standby-that-may-serve-keeps-its-group

    async def _standby_forgets(self, slot: Slot, group_id: str) -> bool:
        """Whether the standby has said that it has forgotten the scope."""
        forgotten = self._forgotten[group_id, slot.scope_id] = asyncio.Event()
        try:
            if not self._groups.send(group_id, wire.Gone(scope_id=slot.scope_id)):
                return False
            async with self._clock.timeout(GONE_WITHIN_S):
                await forgotten.wait()
        except TimeoutError:
            return False
        finally:
            del self._forgotten[group_id, slot.scope_id]
        return True

    def _place(self, slot: Slot, placement: Placement) -> HostChanges:
        self._scopes.placements.place(slot, placement)
        return HostChanges()

    def forgotten(self, group_id: str, scope_id: str) -> None:
        """The other host of the group has forgotten the scope."""
        if (group_id, scope_id) in self._forgotten:
            self._forgotten[group_id, scope_id].set()


def serve_alone(scopes: Scopes, slot: Slot) -> HostChanges:
    """Serve the scope without a standby from now on. In a worker thread."""
    assert slot.scope is not None
    placement = slot.scope.placement
    alone = replace(placement, epoch=slot.epoch, group="", joined=0, partner_proof="", leaving=False)
    scopes.placements.place(slot, alone)
    return scopes.converge(slot)
