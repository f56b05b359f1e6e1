"""The way from the objects that notice an event to the one that handles it."""

from __future__ import annotations

from typing import Protocol

from netloom.agent.host.changes import Announcement
from netloom.agent.host.watcher import WatchHandler
from netloom.agent.scopes.scopes import WorkHandler
from netloom.agent.scopes.slot import Slot
from netloom.guestwire import PasswordTaken


class EventHandler(WatchHandler, WorkHandler, Protocol):
    """Handles everything that happens without a call, on the event loop. ``Upkeep`` implements it."""

    def revive(self, scope_id: str, why: str) -> None: ...
    def password_taken(self, taken: PasswordTaken) -> None: ...


class UplinkFollower(Protocol):
    """Follows the carriers of uplinks. ``Isolation`` implements it."""

    def uplink_changed(self, link: str, running: bool) -> None: ...


class TurnFollower(Protocol):
    """Follows whose turn it is in each group. ``Standbys`` implements it."""

    def changed(self, group_id: str) -> None: ...
    def uplink_changed(self, link: str, running: bool) -> None: ...


class Events:
    """Passes each event to the handler.

    ``Upkeep`` uses ``Scopes``, which uses the watcher and the services. Those report events, so they exist before their
    handler does. They get this object instead. ``connect`` it before the event loop runs anything that reports events.
    """

    def __init__(self) -> None:
        self._handler: EventHandler | None = None
        self._follower: UplinkFollower | None = None
        self._turns: TurnFollower | None = None

    def connect(
        self, handler: EventHandler, follower: UplinkFollower | None = None, turns: TurnFollower | None = None
    ) -> None:
        self._handler, self._follower, self._turns = handler, follower, turns

    def busy(self, scope_id: str) -> bool:
        return self._connected().busy(scope_id)

    async def repair(self, scope_id: str, why: str) -> int | None:
        return await self._connected().repair(scope_id, why)

    def tidy_soon(self) -> None:
        self._connected().tidy_soon()

    def firewall_changed(self) -> None:
        self._connected().firewall_changed()

    def uplink_changed(self, link: str, running: bool) -> None:
        if self._follower is not None:
            self._follower.uplink_changed(link, running)
        if self._turns is not None:
            self._turns.uplink_changed(link, running)

    def turn_changed(self, group_id: str) -> None:
        """In the engine's thread. What changes before ``connect`` is noticed by the first look."""
        if self._turns is not None:
            self._turns.changed(group_id)

    def revive(self, scope_id: str, why: str) -> None:
        self._connected().revive(scope_id, why)

    def password_taken(self, taken: PasswordTaken) -> None:
        self._connected().password_taken(taken)

    def work_failed(self, slot: Slot) -> None:
        self._connected().work_failed(slot)

    def work_succeeded(self, slot: Slot, announcements: tuple[Announcement, ...]) -> None:
        self._connected().work_succeeded(slot, announcements)

    def _connected(self) -> EventHandler:
        assert self._handler is not None, "an event before connect"
        return self._handler
