"""The agents of all hosts of a registration, for an operator's commands about placements: one open channel per host."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import msgspec

from netloom.errors import HostRefused, HostUnreachable, NetloomError
from netloom.extension.agent_client import AgentClient
from netloom.extension.progress import Progress
from netloom.extension.proof import Credentials
from netloom.extension.ssh import LOOK_THERE, ConnectionLost, Login, NoAgent
from netloom.placementwire import packed, unpacked
from netloom.wire import Call, Registration, Reply, Signers

T = TypeVar("T")

REACH_S = 10.0  # to log in and to start the agent's command
ANSWER_S = 60.0
BUILD_S = 180.0  # to build a scope, after others on a busy host


class Channel(Protocol):
    """An open channel to one agent. ``AgentClient`` implements it and describes the methods."""

    @property
    def is_broken(self) -> bool: ...
    async def open(self) -> None: ...
    async def call(self, call: Call) -> Reply: ...
    def silence(self, waited_s: float) -> HostUnreachable: ...
    def close(self) -> None: ...


class Refused(HostRefused):
    """A host refused or failed ``command``. ``reply``: its whole answer."""

    def __init__(self, host: str, command: str, reply: Reply) -> None:
        super().__init__(f"{host}: {reply.error or f'{command}: status {reply.status}'}", hint=reply.hint)
        self.command = command
        self.reply = reply


class Agents:
    """Sends commands to the agents of ``hosts``. A channel is opened when it is first needed, and again when it broke.

    ``channel`` makes a channel to a host, which is not open yet. ``signers``: of an owner, for a host; a command that
    names an owner brings them.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        channel: Callable[[str], Channel],
        signers: Callable[[str, str], Awaitable[Signers | None]],
    ) -> None:
        self.hosts = tuple(hosts)
        self._make = channel
        self._signers = signers
        self._open: dict[str, Channel] = {}
        self._opening = {host: asyncio.Lock() for host in self.hosts}

    async def ask(
        self,
        host: str,
        command: str,
        message: msgspec.Struct,
        answer: type[T],
        *,
        scope_id: str = "",
        owner: str = "",
        within_s: float = ANSWER_S,
    ) -> T:
        """The host's answer. Raises Refused, or HostUnreachable: then it is unknown whether the host did it."""
        reply = await self._reply(host, command, message, scope_id, owner, within_s)
        try:
            return unpacked(reply.data, answer)
        except HostRefused as error:
            raise HostRefused(f"{host}: {error.message}", hint=error.hint) from error

    async def tell(
        self,
        host: str,
        command: str,
        message: msgspec.Struct,
        *,
        scope_id: str = "",
        owner: str = "",
        within_s: float = ANSWER_S,
    ) -> Reply:
        """:meth:`ask` for a command whose answer has no data; returns the whole reply."""
        return await self._reply(host, command, message, scope_id, owner, within_s)

    async def _reply(
        self, host: str, command: str, message: msgspec.Struct, scope_id: str, owner: str, within_s: float
    ) -> Reply:
        call = Call(
            call_id=uuid.uuid4().hex,
            command=command,
            scope_id=scope_id,
            registration=Registration(owner=owner),
            payload=packed(message),
            remaining_ms=int(within_s * 1000),
            signers=await self._signers(owner, host) if owner else None,
        )
        try:
            async with asyncio.timeout(within_s):
                try:
                    reply = await (await self._channel(host)).call(call)
                except ConnectionLost:  # the agent answers a repeated call from memory
                    reply = await (await self._channel(host)).call(call)
        except TimeoutError:
            raise HostUnreachable(
                f"{host}: its agent did not answer {command} within {within_s:.0f} s", hint=LOOK_THERE
            ) from None
        if reply.status:
            raise Refused(host, command, reply)
        return reply

    async def _channel(self, host: str) -> Channel:
        """The open channel to the host. Raises HostUnreachable."""
        async with self._opening[host]:
            channel = self._open.get(host)
            if channel is not None and not channel.is_broken:
                return channel
            if channel is not None:
                channel.close()
            channel = self._make(host)
            try:
                async with asyncio.timeout(REACH_S):
                    await channel.open()
            except TimeoutError:
                channel.close()
                raise channel.silence(REACH_S) from None
            except NoAgent as error:
                channel.close()
                missing = " no agent at " in error.message
                hint = f"netloom agent install --hosts {host}" if missing else error.hint
                raise NoAgent(error.message, hint=hint) from error
            except BaseException:
                channel.close()
                raise
            self._open[host] = channel
            return channel

    def close(self) -> None:
        for channel in self._open.values():
            channel.close()
        self._open.clear()


def agents_over_ssh(hosts: Iterable[str], login: Login) -> Agents:
    """The agents of these hosts. Nothing is installed on a host."""
    return Agents(hosts, lambda host: AgentClient(host, login, None, Progress()), Credentials(login).signers)


def reason(error: NetloomError, host: str) -> str:
    """The error without the name of its host, which the reader knows."""
    return str(error).removeprefix(f"{host}: ")
