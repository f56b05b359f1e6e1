"""What people and the management side learn about the group of a scope."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.roles import Role, Roles
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.standby_groups import Groups
from netloom.agent.scopes.standby_sender import StateSender
from netloom.agent.standby.member import GroupView, TakeOver
from netloom.placementwire import GATEWAY, HeldScope
from netloom.state import Scope


class GroupReports:
    """Only reads, so it may be used in any thread."""

    def __init__(self, groups: Groups, roles: Roles, sender: StateSender, flows: FlowCopies) -> None:
        self._groups = groups
        self._roles = roles
        self._sender = sender
        self._flows = flows

    def described(self, scope: Scope) -> list[str]:
        """The group of a scope, in lines for people; none for a scope without a group."""
        role = self._roles.of(scope.placement)
        view = self._groups.views().get(scope.placement.group)
        if role is None:
            return []
        if view is None:
            return [f"standby: group {scope.placement.group} is not known on this host: no frame passes"]
        lacks = self._lacks(scope, role, view)
        vote = f"{role.witness} is the witness" if role.witness else "the gateway has the second vote"
        lines = [
            f"standby: {'; '.join(lacks) if lacks else 'ready'}",
            f"group {view.spec.group_id}: {view.active} serves in term {view.term}, {role.standby} stands by, {vote}",
        ]
        if view.last is not None:
            lines.append(f"took over: {took_over(view.last)}")
        return lines

    def _lacks(self, scope: Scope, role: Role, view: GroupView) -> list[str]:
        """Why a take-over would not be complete now, or not possible."""
        if view.active != view.me:
            return [f"{view.active} serves"]
        if view.dissolved:
            return ["the group is dissolved"]
        lacks = []
        if not role.serves:
            lacks.append("this host has no lease")
        silent = [name for name, since_s in view.heard.items() if since_s > view.spec.lease_ms / 1000]
        if silent:
            lacks.append(f"no heartbeat of {' and '.join(sorted(silent))}")
        elif not role.witness and view.upstream_s > view.spec.lease_ms / 1000:
            lacks.append("no gateway answers this host")
        elif view.silent:
            lacks.append(f"no heartbeat of {role.standby} on a VLAN")
        behind = self._sender.behind(scope.scope_id, role)
        if behind:
            lacks.append(behind)
        elif not self._flows.is_wanted(scope.scope_id):
            lacks.append(f"{role.standby} has not asked for the open connections yet")
        if not view.partner_ready and role.standby not in silent:
            lacks.append(f"{role.standby} says that it cannot serve now")
        return lacks

    def held(self, slot: Slot, told: HeldScope) -> HeldScope:
        """What ``placements`` says of a scope, with its group."""
        scope = slot.scope
        role = self._roles.of(scope.placement) if scope is not None else None
        if scope is None or role is None:
            return told
        view = self._groups.views().get(scope.placement.group)
        return replace(
            told,
            epoch=slot.epoch,
            gate="open" if role.serves else "standby",
            peer="" if role.active else role.host,
            group=scope.placement.group,
            standby=role.standby,
            witness=role.witness or GATEWAY,
            term=role.term,
            behind=self._sender.behind(slot.scope_id, role) if role.active else "",
            took_over=took_over(view.last) if view is not None and view.last is not None else "",
        )


def took_over(last: TakeOver) -> str:
    """A take-over in one line."""
    outage = "" if last.outage_s is None else f", {last.outage_s:.2f} s after the other host was last heard serving"
    return f"{last.when:%Y-%m-%dT%H:%M:%SZ}, term {last.term}: {last.reason}{outage}"
