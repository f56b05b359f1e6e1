"""The pool of open channels to agents, shared by the calls of one process.

A call alone opens its channels and ends with them. The resident helper keeps them for the next calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from netloom.extension.agent_client import AgentClient, OtherProtocol
from netloom.extension.package import Package
from netloom.extension.progress import Installing, Progress
from netloom.extension.ssh import Login, NoAgent, SshConnection

# After an attempt to replace an older agent, the next attempt on the same host waits this long.
_REPLACE_AGAIN_S = 300.0
# The same for the standby of a scope, after an attempt that failed.
_STANDBY_AGAIN_S = 60.0
# And for a host that its active host did not hear, before it is in a group with that one again.
_LOST_S = 600.0

_Key = tuple[str, Login, Package | None]


class _Broadcast(Progress):
    """Passes the progress of an installation to all calls that wait for it, and log lines to the first call's log."""

    def __init__(self, first: Progress) -> None:
        self.listeners: set[Progress] = set()
        self._first = first

    def installing(self, now: Installing) -> None:
        for listener in self.listeners:
            listener.installing(now)

    def log(self, line: str) -> None:
        self._first.log(line)


class PooledChannel:
    """A channel to one agent, open or being opened. ``users``: how many calls use it; ``left``: when the last one left.

    ``opening`` installs nothing. A call that may install the agent starts ``install`` where it is missing. This goes on
    when the calls that waited for it have ended.
    """

    def __init__(
        self,
        host: str,
        login: Login,
        package: Package | None,
        progress: Progress,
        connection: SshConnection | None = None,
    ) -> None:
        self._broadcast = _Broadcast(progress)
        self.listeners = self._broadcast.listeners
        self.agent = AgentClient(host, login, package, self._broadcast, connection)
        self.opening = asyncio.create_task(self.agent.open())
        self.opening.add_done_callback(_retrieve_exception)
        self.installing: asyncio.Task[None] | None = None
        self.replacing: asyncio.Task[None] | None = None
        self.users = 0
        self.left = time.monotonic()

    @property
    def is_open(self) -> bool:
        done = self.installing or self.opening
        return done.done() and not done.cancelled() and done.exception() is None and not self.agent.is_broken

    @property
    def is_lost(self) -> bool:
        """Whether no call can use the channel any more. One without an agent is used: the agent may be installed."""
        if not self.opening.done() or self.is_open:
            return False
        if self.installing is not None:
            return self.installing.done()
        return not (self.users and self._may_be_installed)

    @property
    def is_of_use(self) -> bool:
        """Whether the channel is worth keeping while no call uses it."""
        return self.is_open or self.is_installing or self.agent.may_be_continued

    @property
    def _may_be_installed(self) -> bool:
        return not self.opening.cancelled() and isinstance(self.opening.exception(), NoAgent | OtherProtocol)

    @property
    def is_installing(self) -> bool:
        return any(task is not None and not task.done() for task in (self.installing, self.replacing))

    def install(self) -> asyncio.Task[None]:
        """Install the agent after ``opening`` found none that can be used. One attempt per channel."""
        if self.installing is None:
            why = self.opening.exception()
            assert isinstance(why, NoAgent | OtherProtocol)
            self.installing = asyncio.create_task(self.agent.install(why))
            self.installing.add_done_callback(_retrieve_exception)
        return self.installing

    def replace(self) -> asyncio.Task[None]:
        """Start to install our build in place of the host's older one, while calls go on. One attempt per channel."""
        if self.replacing is None:
            self.replacing = asyncio.create_task(self.agent.replace())
        return self.replacing

    def close(self) -> None:
        for task in (self.opening, self.installing, self.replacing):
            if task is not None:
                task.cancel()
        self.agent.close()


def _retrieve_exception(done: asyncio.Task[None]) -> None:
    """Take the exception out of a task, because asyncio reports it when all callers have ended."""
    if not done.cancelled():
        done.exception()


class Retries:
    """When something that failed may be tried again: ``after_s`` later. By key."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._failed: dict[object, float] = {}

    def may_try(self, *keys: object) -> bool:
        """Whether none of these has failed of late."""
        old = time.monotonic() - self._after_s
        self._failed = {key: at for key, at in self._failed.items() if at > old}
        return not any(key in self._failed for key in keys)

    def failed(self, key: object) -> None:
        self._failed[key] = time.monotonic()


class Pool:
    """Channels by host, login and package: a call with other credentials or other trusted keys gets its own channel.

    ``resident``: the pool outlives the calls. ``standby_retries``: of the standbys that could not be set up.
    ``standby_losses``: of the hosts that their active hosts did not hear.
    """

    def __init__(self, *, resident: bool = False) -> None:
        self.resident = resident
        self._channels: dict[_Key, PooledChannel] = {}
        self.standby_retries = Retries(_STANDBY_AGAIN_S)
        self.standby_losses = Retries(_LOST_S)
        self._replaced: dict[str, float] = {}  # host -> when replacing its older agent was last tried

    def is_open(self, host: str, login: Login, package: Package | None) -> bool:
        """Whether a call to ``host`` would find an open channel."""
        return self.client(host, login, package) is not None

    def client(self, host: str, login: Login, package: Package | None) -> AgentClient | None:
        """The client of an open channel to ``host``; None when there is none."""
        channel = self._channels.get((host, login, package))
        return channel.agent if channel is not None and channel.is_open else None

    def address(self, host: str, login: Login, package: Package | None) -> str:
        """The numeric address of the host at the other end of its open channel; empty when there is none."""
        client = self.client(host, login, package)
        return client.connection.address if client is not None else ""

    @property
    def is_installing(self) -> bool:
        """Whether an agent is being installed on some host."""
        return any(channel.is_installing for channel in self._channels.values())

    def may_replace(self, host: str) -> bool:
        """Whether to try to replace the older agent of ``host`` now. A failed attempt delays calls, so it is rare."""
        now = time.monotonic()
        if now - self._replaced.get(host, -_REPLACE_AGAIN_S) < _REPLACE_AGAIN_S:
            return False
        self._replaced[host] = now
        return True

    @contextmanager
    def channel(self, host: str, login: Login, package: Package | None, progress: Progress) -> Iterator[PooledChannel]:
        """The channel for the key, opened if necessary. A channel that is of no use at the end is dropped.

        If only the agent has ended, the next channel goes over the same SSH connection.
        """
        key = (host, login, package)
        channel = self._channels.get(key)
        if channel is None or channel.is_lost:
            connection = channel.agent.hand_over() if channel is not None else None
            channel = self._channels[key] = PooledChannel(host, login, package, progress, connection)
        channel.users += 1
        try:
            yield channel
        finally:
            channel.users -= 1
            channel.left = time.monotonic()
            if not channel.users and not channel.is_of_use:
                self._drop(key, channel)

    def abandon(self, channel: PooledChannel) -> None:
        """Remove the channel, so that later calls open one of their own.

        A new SYN is answered as soon as the host is back; a lost one is retransmitted with growing delays.
        """
        self._channels = {key: it for key, it in self._channels.items() if it is not channel}

    def drop_idle(self, idle_s: float) -> None:
        """Close the channels that are lost, or unused for ``idle_s`` seconds, and forget their credentials."""
        old = time.monotonic() - idle_s
        for key, channel in list(self._channels.items()):
            if not channel.users and (channel.left < old or not channel.is_of_use) and not channel.is_installing:
                self._drop(key, channel)

    def close(self) -> None:
        for key, channel in list(self._channels.items()):
            self._drop(key, channel)

    def _drop(self, key: _Key, channel: PooledChannel) -> None:
        channel.close()
        if self._channels.get(key) is channel:
            del self._channels[key]
