"""The agent of one host, as the management side talks to it: one channel, many calls at once."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from netloom import __version__
from netloom.errors import HostUnreachable, NetloomError
from netloom.extension.ssh import Channel, Connection, Login, why_no_agent
from netloom.wire import PROTOCOL_VERSION, Call, FrameReader, Hello, Message, Reply, encode

HELLO = Hello(version=__version__, build="source")

# A hello is two short words. A longer first frame is a login shell's greeting, read as a length.
_HELLO_BYTES_MAX = 1 << 16


class ConnectionLost(HostUnreachable):
    """The channel broke with a call under way: whether it was carried out is not known, and a repeat is safe."""


class Agent:
    """A channel to one host's agent over which hellos have been exchanged."""

    def __init__(self, host: str, login: Login) -> None:
        self.host = host
        self.connection = Connection(host, login)
        self._channel: Channel | None = None
        self._frames = FrameReader()
        self._head: bytearray | None = bytearray()  # until the first frame's length is known
        self._greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._replies: dict[str, asyncio.Future[Reply]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._broken: HostUnreachable | None = None

    async def open(self) -> Hello:
        """Log in, start the agent's end and exchange hellos; the agent's hello.

        Raises HostUnreachable, or LoginRefused, with what is to be done.
        """
        await self.connection.open()
        self._channel = await self.connection.run(self._received)
        self._watch = asyncio.create_task(self._watch_channel(self._channel))
        self._send(HELLO)
        hello = await self._greeted
        if hello.protocol != PROTOCOL_VERSION:
            older = "the host" if hello.protocol < PROTOCOL_VERSION else "this server"
            raise HostUnreachable(
                f"{self.host}: its agent (netloom {hello.version}) speaks protocol {hello.protocol}, "
                f"this server (netloom {HELLO.version}) speaks {PROTOCOL_VERSION}",
                hint=f"bring netloom up to date on {older}",
            )
        return hello

    async def call(self, call: Call) -> Reply:
        """The agent's reply to ``call``. Raises ConnectionLost when the channel breaks before it."""
        if self._broken is not None:
            raise self._broken
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call.call_id] = reply
        try:
            self._send(call)
            return await reply
        finally:
            del self._replies[call.call_id]

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self.connection.close()

    def _send(self, message: Message) -> None:
        assert self._channel is not None
        with suppress(OSError):  # of a closed channel: what watches it says why
            self._channel.write(encode(message))

    def _received(self, data: bytes) -> None:
        try:
            for message in self._cut(data):
                if isinstance(message, Hello) and not self._greeted.done():
                    self._greeted.set_result(message)
                elif isinstance(message, Reply):
                    waiting = self._replies.get(message.call_id)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message)
        except NetloomError as error:
            self._break(HostUnreachable(f"{self.host}: {error.message}", hint=error.hint))

    def _cut(self, data: bytes) -> list[Message]:
        if self._head is None:
            return self._frames.feed(data)
        self._head += data
        if len(self._head) < 4:
            return []
        if int.from_bytes(self._head[:4], "big") > _HELLO_BYTES_MAX:
            said = bytes(self._head[:80]).decode("utf-8", "replace").strip()
            raise HostUnreachable(
                f"the login shell prints text before the agent speaks: {said!r}",
                hint="no output from .bashrc and the like in sessions without a terminal",
            )
        data, self._head = bytes(self._head), None
        return self._frames.feed(data)

    async def _watch_channel(self, channel: Channel) -> None:
        error = await channel.lost
        if not self._greeted.done():
            self._break(self._said_nothing() or why_no_agent(self.host, self.connection.login, channel))
            return
        why = channel.stderr or (str(error) if error else "the agent's end was closed")
        self._break(ConnectionLost(f"{self.host}: the connection to the agent broke: {why}"))

    def _said_nothing(self) -> HostUnreachable | None:
        if not self._head:
            return None
        return HostUnreachable(
            f"{self.host}: something else than the agent answered: {bytes(self._head[:80])!r}",
            hint="does the login shell print text, or is another command forced?",
        )

    def _break(self, error: HostUnreachable) -> None:
        if self._broken is None:
            self._broken = error
        if not self._greeted.done():
            self._greeted.set_exception(error)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
