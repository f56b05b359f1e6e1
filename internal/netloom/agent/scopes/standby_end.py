"""The end of a group: its scopes leave it, and its members forget it.

If the standby of a group is silent, a scope cannot wait for its answer. The group is dissolved then
(``standby/decision.py``): the standby never serves again, and all scopes leave the group. A standby that is back
removes its copies, because the active host does not have them in the group any more. A group without scopes is
dissolved, too, and forgotten by all.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from netloom import standbywire
from netloom.agent.clock import Clock
from netloom.agent.log import Log
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_commands import serve_alone
from netloom.agent.scopes.standby_groups import Group, Groups, Turns, run
from netloom.agent.standby.member import GroupView
from netloom.errors import NetloomError

LEAVE_AGAIN_S = 5.0  # after the scopes of a dissolved group could not leave it
EMPTY_S = 600.0  # a group that has no scope for so long is dissolved
FORGET_AFTER_S = 60.0  # a dissolved group that is empty, and of which the standby knows it
FORGET_AT_LAST_S = 86_400.0  # the same, if the standby never comes back


class GroupEnd:
    """On the event loop."""

    def __init__(
        self,
        groups: Groups,
        engine: Turns,
        scopes: Scopes,
        log: Log,
        clock: Clock,
        start_task: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._groups = groups
        self._engine = engine
        self._scopes = scopes
        self._log = log
        self._clock = clock
        self._start_task = start_task

    async def look(self, view: GroupView, group: Group, slots: list[Slot]) -> None:
        """Do what is due. ``slots``: the scopes of the group."""
        now, group_id = self._clock.time(), view.spec.group_id
        if view.alone and slots and now - group.left > LEAVE_AGAIN_S:
            group.left = now
            for slot in slots:
                self._start_task(self._leave(slot, group_id))
        if slots or self._may_have_scopes():  # guard: a-group-that-may-have-scopes-stays
            group.empty_since = group.told_since = None
            return
        group.empty_since = now if group.empty_since is None else group.empty_since
        if not view.dissolved:
            if view.active == view.me and now - group.empty_since > EMPTY_S:
                self._engine.dissolve(group_id)
        elif self._is_over(view, group, now, now - group.empty_since):
            await self._scopes.in_worker_uncounted(partial(self._engine.forget_group, group_id))
            self._groups.known.pop(group_id, None)
            self._log.line(f"group={group_id} is dissolved and has no networks: forgotten")

    def _may_have_scopes(self) -> bool:
        """Whether some scopes are not known well enough to say that they belong to no group."""
        return any(it.unreadable or not it.state_read or it.unconverged for it in self._scopes.slots())

    def _is_over(self, view: GroupView, group: Group, now: float, empty_s: float) -> bool:
        """Whether no other member needs to hear from this one any more."""
        if view.me == view.spec.names.witness:
            return view.silent_s.get(view.active, 0.0) > FORGET_AFTER_S
        if view.active != view.me:
            return empty_s > 2 * FORGET_AFTER_S  # the active host forgets it first
        partner_silent_s = view.silent_s.get(view.spec.names.partner(view.me), 0.0)
        if partner_silent_s > view.spec.lease_ms / 1000 or not self._groups.connected(view.spec.group_id):
            group.told_since = None
        elif group.told_since is None:
            group.told_since = now
        told_s = now - group.told_since if group.told_since is not None else 0.0
        return told_s > FORGET_AFTER_S or empty_s > FORGET_AT_LAST_S

    async def _leave(self, slot: Slot, group_id: str) -> None:
        """The scope leaves a group that is dissolved: its standby never serves."""
        try:
            async with self._scopes.turn(slot, standbywire.LEAVE_GROUP):
                view = self._groups.views().get(group_id)
                in_group = slot.scope is not None and slot.scope.placement.group == group_id
                if in_group and view is not None and view.alone:
                    await run(self._scopes, slot, lambda: serve_alone(self._scopes, slot))
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} standby: {error}")
