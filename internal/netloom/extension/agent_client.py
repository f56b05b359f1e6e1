"""The agent of one host, as the management side talks to it: one channel, many calls at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from netloom import __version__
from netloom.errors import HostUnreachable, NetloomError
from netloom.extension.deploy import CannotInstall, Deployment
from netloom.extension.ssh import Channel, Connection, ConnectionLost, Login, NoAgent, why_no_agent
from netloom.program import build_id, is_newer
from netloom.wire import PROTOCOL_VERSION, Call, FrameReader, Hello, Message, Reply, encode

HELLO = Hello(version=__version__, build=build_id())

# A hello is two short words. A longer first frame is a login shell's greeting, read as a length.
_HELLO_BYTES_MAX = 1 << 16


class Agent:
    """A channel to one host's agent over which hellos have been exchanged."""

    def __init__(
        self,
        host: str,
        login: Login,
        tell: Callable[[str], None] = lambda what: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``tell`` hears what is being done to install the agent, ``note`` what the log should have of it."""
        self.host = host
        self.connection = Connection(host, login)
        self.outdated = False  # a build that is older than ours and may be replaced
        self._tell = tell
        self._note = note
        self._begin()

    def _begin(self) -> None:
        self._channel: Channel | None = None
        self._frames = FrameReader()
        self._head: bytearray | None = bytearray()  # until the first frame's length is known
        self._greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._replies: dict[str, asyncio.Future[Reply]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._broken: HostUnreachable | None = None

    async def open(self) -> Hello:
        """Log in, start the agent's end and exchange hellos; the agent's hello. Where there is no agent, or one that
        does not understand us, it is installed.

        Raises HostUnreachable, or LoginRefused, with what is to be done.
        """
        await self.connection.open()
        try:
            hello = await self._greet()
        except NoAgent as none:
            hello = await self._installed(none)
        if not hello.understands(HELLO) and self._may_replace(hello):
            await self._deploy()
            hello = await self._greet()
        if not hello.understands(HELLO):
            older = "the host" if hello.protocol < PROTOCOL_VERSION else "this server"
            raise HostUnreachable(
                f"{self.host}: its agent (netloom {hello.version}) speaks protocol {hello.protocol}, "
                f"this server (netloom {HELLO.version}) speaks {PROTOCOL_VERSION}",
                hint=f"bring netloom up to date on {older}",
            )
        self.outdated = self._may_replace(hello)
        self._remark(hello)
        return hello

    async def replace(self) -> None:
        """Install our build in the place of the older one that answers; its channel breaks in the end, and no call is
        lost. Failing is no failure of a call: the older one goes on answering."""
        self.outdated = False
        try:
            await self._deploy()
        except HostUnreachable as error:
            self._note(f"{error}; the older agent is used")

    async def _greet(self) -> Hello:
        self._begin()
        self._channel = await self.connection.run(self._received)
        self._watch = asyncio.create_task(self._watch_channel(self._channel))
        self._send(HELLO)
        return await self._greeted

    async def _installed(self, none: NoAgent) -> Hello:
        if self.connection.login.package is None:
            raise none
        await self._deploy(repair=True)  # does nothing where it is in use by now: somebody else was as quick
        return await self._greet()

    async def _deploy(self, *, repair: bool = False) -> None:
        package = self.connection.login.package
        assert package is not None
        self.connection.stage = "install"
        try:
            deployment = Deployment(self.connection, package, self._tell, self._note)
            await deployment.carry_out(repair=repair)
        except (CannotInstall, ConnectionLost) as error:
            self._note(f"installing {package.build} failed: {error}")
            raise
        finally:
            self.connection.stage = "agent"

    def _remark(self, hello: Hello) -> None:
        """Why an agent of another build is left as it is."""
        package = self.connection.login.package
        if package is None or self.outdated or hello.build == package.build:
            return
        why = "which is not older: there is no automatic downgrade"
        if hello.held == package.build:
            why = "to which an operator of the host went back"
        self._note(f"{self.host}: this server's {package.build} works with the agent {hello.build} there, {why}")

    def _may_replace(self, hello: Hello) -> bool:
        package = self.connection.login.package
        return package is not None and is_newer(package.build, than=hello.build) and hello.held != package.build

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

    @property
    def is_broken(self) -> bool:
        """Whether no call can be answered over it any more."""
        return self._broken is not None

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
