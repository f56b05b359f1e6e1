"""The scopes of groups: the standby keeps what the active host has, and begins a turn with it.

``agent/standby/engine.py`` decides whose turn it is, and holds the lease. Here is what follows for the scopes:

- The active host sends each state that it saves to the standby, while it applies it itself. A call is answered when the
  standby has the state on its disk, or has not answered within ``STORED_WITHIN_S``; then the standby is *behind*
  (``standby_sender.py``).
- The standby asks which scopes and revisions the active host has: when they connect, when a turn has begun, and from
  time to time. It asks for the states that it lacks, and removes what the active host does not have
  (``standby_receiver.py``).
- It builds each scope as its host does. No frame passes, because it has no lease. So at the begin of a turn nothing is
  to be built: the lease lets frames pass, and the addresses are announced.
- The standby wants the open connections of each scope that it has built: all, and from then on the changes
  (``flow_copies.py``).
- The management side makes groups, and scopes join and leave them (``standby_commands.py``). A group whose standby is
  dead, or that has no scopes, ends (``standby_end.py``).
"""

from __future__ import annotations

import asyncio
from functools import partial

from netloom import pairwire as wire
from netloom.agent.clock import Clock
from netloom.agent.host.changes import Announcement
from netloom.agent.log import Log
from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.interfaces import Host, ScopeServices, ScopeStore
from netloom.agent.scopes.roles import Roles
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_commands import GroupCommands
from netloom.agent.scopes.standby_end import GroupEnd
from netloom.agent.scopes.standby_groups import COMPARE_EVERY_S, WIRES_EVERY_S, Group, Groups, Pairs, Turns
from netloom.agent.scopes.standby_receiver import StateReceiver
from netloom.agent.scopes.standby_report import GroupReports
from netloom.agent.scopes.standby_sender import StateSender
from netloom.agent.scopes.upkeep import Upkeep
from netloom.agent.scopes.upstream import Upstreams, upstream
from netloom.agent.scopes.wire_questions import WireQuestions
from netloom.agent.standby.member import GroupView
from netloom.errors import NetloomError
from netloom.render.want import Want
from netloom.standby.decision import Local
from netloom.state import Scope
from netloom.wire import Call, Reply

LOOK_EVERY_S = 0.25


class Standbys:
    """Created and used on the event loop, after ``Scopes.load``. ``run`` is one of the agent's loops.

    ``saved`` and ``retired`` are called in worker threads, for the store; ``changed`` in the engine's thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Turns,
        roles: Roles,
        scopes: Scopes,
        upkeep: Upkeep,
        host: Host,
        services: ScopeServices,
        store: ScopeStore,
        log: Log,
        clock: Clock,
        flows: FlowCopies,
    ) -> None:
        self._loop = loop
        self._engine = engine
        self._scopes = scopes
        self._upkeep = upkeep
        self._host = host
        self._services = services
        self._log = log
        self._clock = clock
        self._flows = flows
        self._questions = WireQuestions(engine, scopes, host, log, clock, upkeep.start_task)
        self._upstreams = Upstreams(engine, host, log)
        self._hides = False  # heartbeats from VMs
        self._hidden_at = -WIRES_EVERY_S
        self._groups = Groups(engine, roles, scopes)
        self._sender = StateSender(self._groups, roles, scopes, store, log, clock, flows)
        self._receiver = StateReceiver(self._groups, scopes, upkeep, store, log, clock, flows)
        self._commands = GroupCommands(self._groups, engine, roles, scopes, log, clock)
        self._end = GroupEnd(self._groups, engine, scopes, log, clock, upkeep.start_task)
        reports = GroupReports(self._groups, roles, self._sender, flows)
        scopes.replication = self._sender
        scopes.describe_group = reports.described
        scopes.placements.behind = self._sender.behind
        scopes.placements.in_group = reports.held

    def connect(self, pairs: Pairs) -> None:
        """Use these connections to the other hosts of the groups."""
        self._groups.pairs = self._flows.pairs = pairs
        self._groups.follow()

    # ------------------------------------------------------------------------------------ from other threads

    def changed(self, group_id: str) -> None:
        """The engine's view of a group has changed."""
        self._loop.call_soon_threadsafe(self._look_at, group_id)

    def uplink_changed(self, link: str, running: bool) -> None:
        """A port of a bridge has lost its carrier, or has it again. On the event loop."""
        self._questions.uplink_changed(link, running)

    def saved(self, scope: Scope, text: bytes) -> None:
        """The state of a scope was saved on this host: its standby gets it."""
        if scope.placement.group:
            self._loop.call_soon_threadsafe(self._sender.push, scope, text)

    def retired(self, scope_id: str) -> None:
        """The scope is being deleted on this host: its standby forgets it."""
        slot = self._scopes.get(scope_id)
        group_id = slot.scope.placement.group if slot is not None and slot.scope is not None else ""
        if group_id and not self._receiver.forgets(scope_id):
            self._loop.call_soon_threadsafe(self._sender.tell_gone, group_id, scope_id)

    # ------------------------------------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Look after all groups, for ever."""
        while True:
            try:
                self._groups.follow()
                await self._hide_heartbeats()
                for group_id in list(self._groups.views()):
                    await self._look(group_id)
            except Exception as error:  # noqa: BLE001, a bug here must not end the loop
                self._log.traceback("standby", error)
            await self._clock.sleep(LOOK_EVERY_S)

    async def _hide_heartbeats(self) -> None:
        """Hide heartbeats from VMs, also on the host of a witness, which has no port of a scope."""
        is_member, now = bool(self._groups.views()), self._clock.time()
        if is_member == self._hides and (not is_member or now - self._hidden_at < WIRES_EVERY_S):
            return
        self._hidden_at = now
        try:
            await self._scopes.in_worker_uncounted(partial(self._host.hide_heartbeats, is_member))
            self._hides = is_member
        except NetloomError as error:
            self._log.line(f"standby: {error}")

    async def _look(self, group_id: str) -> None:
        try:
            self._look_at(group_id)
            await self._look_after(group_id)
        except NetloomError as error:  # the other groups are looked after, too
            self._log.line(f"group={group_id} {error}")

    def _look_at(self, group_id: str) -> None:
        """Notice what has changed in a group since the last look."""
        view = self._groups.views().get(group_id)
        if view is None:
            return
        self._questions.look(view)
        group = self._groups.known.setdefault(group_id, Group())
        had, had_served = group.turn, group.served
        group.turn, group.served = (view.term, view.active, view.released), view.serves
        if (group.turn, group.served) == (had, had_served):
            return
        slots = self._groups.slots(group_id)
        for slot in slots:
            slot.decided.set()  # calls that wait look again
            slot.decided = asyncio.Event()
        active = view.active == view.me and not view.released
        if had is None:  # the agent has just started
            if active and slots:  # an earlier one may have ended in the middle of it
                self._flows.serve(it.scope_id for it in slots)
            return
        was_active = had[1] == view.me and not had[2]
        is_new = view.term != had[0]  # perhaps the other host had a turn in between, and nobody here looked
        if active and (is_new or not was_active):  # guard: each-turn-begins
            self._begin(group_id, slots)
        elif not active and (is_new or was_active) and view.me != view.spec.names.witness:
            self._stand_by(view, slots)
        elif view.serves and not had_served:
            self._appear(slots)  # behind a gate that was shut, neighbours may have learned another way

    async def _look_after(self, group_id: str) -> None:
        view, group = self._groups.views()[group_id], self._groups.known[group_id]
        now = self._clock.time()
        slots = self._groups.slots(group_id)
        witness = view.spec.names.witness
        lacks = slots and not (group.wires and (witness or self._upstreams.knows(group_id)))
        if now - group.looked > WIRES_EVERY_S or (lacks and now - group.looked > 1.0):
            group.looked = now
            wants = {it.scope_id: it.rendered[1] for it in slots if it.rendered is not None}
            group.wires = await self._questions.choose(group_id, wants)
            self._engine.set_wires(group_id, group.wires)
            if not witness:
                self._upstreams.follow(group_id, upstream(wants))
        standing_by = view.active != view.me and view.me != view.spec.names.witness
        if standing_by and now - group.asked > COMPARE_EVERY_S:
            self._receiver.compare(group_id)
        if standing_by:
            self._receiver.ask_for_flows(group_id)
        behind = bool(group.missing) or not group.compared
        partner_behind = self._sender.is_behind(slots)
        self._sender.compare_digests(slots)
        self._engine.set_local(group_id, Local(behind=standing_by and behind, partner_behind=partner_behind))
        await self._end.look(view, group, self._groups.slots(group_id))

    # ------------------------------------------------------------------------------------------------ turns

    def _begin(self, group_id: str, slots: list[Slot]) -> None:
        """This host's turn has begun: frames pass already."""
        self._log.line(f"group={group_id} this host serves {len(slots)} networks from now on")
        for slot in slots:
            self._receiver.drop(slot.scope_id)
            self._sender.start_anew(slot.scope_id)
        self._flows.lost(group_id)
        self._flows.serve(it.scope_id for it in slots)
        self._appear(slots)
        for slot in slots:
            slot.enforced_scope = None  # the flows are those of another host: check them all
            self._upkeep.revive(slot.scope_id, "a turn has begun")

    def _appear(self, slots: list[Slot]) -> None:
        """Frames of these scopes pass from now on: tell the neighbours, and open the balanced ports."""
        for slot in slots:
            self._upkeep.start_task(self._announce(slot))
        for slot in slots:  # later: an address that nobody knows does more harm
            if slot.scope is not None and slot.scope.lb_rules:
                self._upkeep.start_task(self._revive_backends(slot.scope))

    async def _announce(self, slot: Slot) -> None:
        """Tell the neighbours where the addresses are: at once, and some times again."""
        if slot.rendered is None:
            return
        want = slot.rendered[1]
        try:
            announcements = await self._scopes.in_worker_uncounted(partial(self._announce_now, slot.scope_id, want))
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} announce: {error}")
            return
        self._upkeep.announce(slot, announcements)

    async def _revive_backends(self, scope: Scope) -> None:
        """No frame has passed so far, so the checks of all balanced ports have failed."""
        try:
            await self._scopes.in_worker_uncounted(partial(self._services.revive_backends, scope))
        except NetloomError as error:
            self._log.line(f"scope={scope.scope_id} {error}")

    def _announce_now(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        announcements = self._host.announcements(scope_id, want)
        self._host.send_arp(announcements)
        try:
            self._host.look_for_gateways(want)  # guard: a-turn-begins-with-known-gateways
        except NetloomError as error:
            self._log.line(f"scope={scope_id} {error}")
        return announcements

    def _stand_by(self, view: GroupView, slots: list[Slot]) -> None:
        """This host has given its turn away, or lost it, or the turn of the other host has begun."""
        group_id = view.spec.group_id
        follows = f"{view.active} serves" if view.active != view.me else "it has given its turn away"
        self._log.line(f"group={group_id} this host stands by for {len(slots)} networks: {follows}")
        self._flows.drop(group_id)
        self._flows.lost(group_id)
        self._flows.flush(it.scope_id for it in slots)
        group = self._groups.known[group_id]
        group.compared = False
        group.missing.clear()
        for slot in slots:
            self._sender.start_anew(slot.scope_id)
        self._receiver.compare(group_id)

    # ------------------------------------------------------------------------- messages of the other host

    def pair_connected(self, group_id: str) -> None:
        """The other host of the group is there."""
        self._look_at(group_id)  # perhaps nobody has looked at it yet
        if group_id not in self._groups.known:
            return
        if self._groups.is_active(group_id):
            for slot in self._groups.slots(group_id):
                if slot.scope is not None and slot.scope.placement.leaving:
                    self._upkeep.start_task(self._commands.go_on_leaving(slot))
        else:
            self._receiver.compare(group_id)

    def pair_lost(self, group_id: str) -> None:
        """The other host of the group is not there any more, or cannot be reached."""
        for slot in self._groups.slots(group_id):
            self._sender.lost(slot.scope_id)
        self._flows.drop(group_id)
        self._flows.lost(group_id)

    def pair_gap(self, group_id: str) -> None:
        """Messages about connections were dropped."""
        self._flows.gap(group_id)

    def pair_received(self, group_id: str, message: wire.PairMessage) -> None:
        """A message of the other host of the group. It is believed only about what its turn allows.

        That the other host has forgotten a scope is true whoever's turn it is by now.
        """
        view = self._groups.views().get(group_id)
        if view is None:
            return
        if group_id not in self._groups.known:
            self._look_at(group_id)
        if isinstance(message, wire.GoneDone):
            self._commands.forgotten(group_id, message.scope_id)
            self._sender.forgotten(group_id, message.scope_id)
        elif view.active == view.me:
            self._receive_as_active(group_id, message)
        else:
            self._receive_as_standby(group_id, message)

    def _receive_as_active(self, group_id: str, message: wire.PairMessage) -> None:
        match message:
            case wire.HoldsWanted():
                self._sender.tell_what_is_held(group_id)
            case wire.Wanted():
                for scope_id in message.scope_ids:
                    self._sender.push_again(group_id, scope_id)
            case wire.Stored():
                slot = self._groups.slot(group_id, message.scope_id)
                if slot is not None:
                    self._sender.stored(slot, message)
            case wire.Digest():
                self._sender.receive_digest(group_id, message)
            case wire.FlowsWanted():
                if self._groups.slot(group_id, message.scope_id) is not None:
                    self._flows.wanted(group_id, message.scope_id)

    def _receive_as_standby(self, group_id: str, message: wire.PairMessage) -> None:
        match message:
            case wire.Holds():
                self._receiver.holds(group_id, message)
            case wire.State() | wire.Gone():
                self._receiver.take(group_id, message)
            case wire.Flows() | wire.FlowsBegin() | wire.FlowsEnd():
                if self._groups.slot(group_id, message.scope_id) is not None:
                    self._flows.received(message)

    # ------------------------------------------------------------------------------------------------ commands

    async def execute(self, call: Call) -> Reply:
        """Execute a command of ``standbywire`` and return its reply. Never raises: the reply has the error."""
        return await self._commands.execute(call)
