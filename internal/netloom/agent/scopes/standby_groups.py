"""What the agent knows of its groups, for the modules ``standby*.py`` of this folder. All is for the event loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from netloom import pairwire as wire
from netloom.agent.host.changes import HostChanges
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.scopes.roles import Roles
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.standby.member import GroupView
from netloom.standby.decision import Local
from netloom.standbywire import GroupSpec
from netloom.state import Placement, Scope

COMPARE_EVERY_S = 30.0
WIRES_EVERY_S = 30.0

Key = tuple[int, int, int]  # epoch, joined, revision: what tells two states of a scope apart


class Pairs(Protocol):
    """The connections to the other hosts of all groups. ``agent/standby/pair.py`` describes the methods."""

    def set_groups(self, specs: Iterable[tuple[GroupSpec, str]]) -> None: ...
    def connected(self, group_id: str) -> bool: ...
    def send(self, group_id: str, message: wire.PairMessage) -> bool: ...
    async def drained(self, group_id: str) -> bool: ...


class Turns(Protocol):
    """Decides whose turn it is. ``agent/standby/engine.py`` describes the methods."""

    def views(self) -> Mapping[str, GroupView]: ...
    def set_group(self, spec: GroupSpec, me: str) -> None: ...
    def dissolve(self, group_id: str) -> None: ...
    def continue_alone(self, group_id: str) -> None: ...
    def forget_group(self, group_id: str) -> None: ...
    def set_local(self, group_id: str, local: Local) -> None: ...
    def set_wires(self, group_id: str, wires: Mapping[ClaimWire, int]) -> None: ...
    def suspect(self, group_id: str, segment: int) -> None: ...
    def answered(self, group_id: str, segment: int, answer: bool | None) -> None: ...
    def upstream_answered(self, group_id: str, asked_at: float) -> None: ...
    def now(self) -> float: ...


class Group:
    """What this host knows of a group besides the engine's view."""

    def __init__(self) -> None:
        self.turn: tuple[int, str, bool] | None = None  # term, active host, released: as handled last
        self.served = False
        self.compared = False  # as standby: the active host has said what it has, since the turn began
        self.asked = -COMPARE_EVERY_S  # when it was asked last
        self.listing: dict[str, Key] = {}  # the parts of its answer
        self.missing: set[str] = set()  # asked for, and not stored yet
        self.wires: dict[ClaimWire, int] = {}
        self.looked = -WIRES_EVERY_S  # when the wires were looked for
        self.left = -math.inf  # when the scopes were told to leave, as the group is dissolved
        self.empty_since: float | None = None  # no scope of this host belongs to it since then
        self.told_since: float | None = None  # ... and the standby can know that since then


class Groups:
    """The groups of this host, their scopes, and the connections to their other hosts.

    ``known``: the groups that ``Standbys`` has looked at.
    """

    def __init__(self, engine: Turns, roles: Roles, scopes: Scopes) -> None:
        self.known: dict[str, Group] = {}
        self.pairs: Pairs | None = None  # until ``Standbys.connect``
        self._engine = engine
        self._roles = roles
        self._scopes = scopes
        self._followed: list[tuple[GroupSpec, str]] = []  # groups that are connected

    def views(self) -> Mapping[str, GroupView]:
        """What the engine knows of each group now."""
        return self._engine.views()

    def is_active(self, group_id: str) -> bool:
        """Whether it is this host's turn."""
        role = self._roles.of(Placement(group=group_id))
        return role is not None and role.active

    def slots(self, group_id: str) -> list[Slot]:
        """The scopes of the group that this host has."""
        return [it for it in self._scopes.slots() if it.scope is not None and it.scope.placement.group == group_id]

    def slot(self, group_id: str, scope_id: str) -> Slot | None:
        """The scope, if this host has it and it belongs to the group."""
        slot = self._scopes.get(scope_id)
        if slot is None or slot.scope is None:
            return None
        if slot.scope.placement.group != group_id:  # guard: a-host-speaks-for-scopes-of-its-group
            return None
        return slot

    def follow(self) -> None:
        """Connect to the other hosts of all groups."""
        groups = [(it.spec, it.me) for it in self.views().values()]
        if self.pairs is not None and groups != self._followed:
            self.pairs.set_groups(groups)
            self._followed = groups

    def connected(self, group_id: str) -> bool:
        """Whether there is a connection to the other host of the group."""
        return self.pairs is not None and self.pairs.connected(group_id)

    def send(self, group_id: str, message: wire.PairMessage) -> bool:
        """Send to the other host of the group. False: there is no connection to it."""
        return self.pairs is not None and self.pairs.send(group_id, message)


async def run(scopes: Scopes, slot: Slot, work: Callable[[], HostChanges]) -> None:
    """Run the work in a worker thread; the caller holds the lock of the slot."""
    await scopes.run_and_settle(slot, lambda: (None, work()))


def key_of(scope: Scope | None) -> Key:
    """What tells two states of a scope apart."""
    if scope is None:
        return (0, 0, 0)
    return scope.placement.epoch, scope.placement.joined, scope.revision
