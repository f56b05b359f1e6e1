"""The client of one host's agent: runs many calls over one channel, and installs the agent for calls that build."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple

import msgspec

from netloom import __version__
from netloom.errors import HostRefused, HostUnreachable, NetloomError
from netloom.extension.deploy import CannotInstall, Deployment, install_shell
from netloom.extension.package import Package
from netloom.extension.progress import Progress
from netloom.extension.ssh import (
    INSTALL_IT,
    NAME_IN_HOSTS,
    AgentChannel,
    ConnectionLost,
    Login,
    NoAgent,
    SshConnection,
    why_no_agent,
)
from netloom.extension.step_shell import StepShell
from netloom.program import build_id, is_newer
from netloom.wire import PROTOCOL_VERSION, REPLY_BYTES_MAX, Call, FrameReader, Hello, Message, Reply, Signers, encode

HELLO = Hello(version=__version__, build=build_id())

# A Hello is short. A longer first frame is text that a login shell printed, read as a length.
_HELLO_BYTES_MAX = 1 << 16

# sudo and the agent answer within a second, unless sudo waits for a name server.
_SUDO_S_MAX = 5.0

# An installation goes on without the calls that waited for it. A slow upload is continued by the next call.
_INSTALLATION_S_MAX = 3600.0


# A host that has said within this time that it serves a scope is not asked again where the scope lives.
HEARD_S = 1.0
_SERVED_MAX = 4096


class _Served(NamedTuple):
    at: float  # on the monotonic clock
    reply: Reply


class OtherProtocol(HostUnreachable):
    """The agent and we have no protocol in common."""


class AgentClient:
    """A channel to the agent of ``host``. ``deployment``: the installation of the agent, while one runs.

    ``package``: what ``install`` and ``replace`` install. None: nothing is installed.
    """

    def __init__(
        self,
        host: str,
        login: Login,
        package: Package | None,
        progress: Progress,
        connection: SshConnection | None = None,
    ) -> None:
        """``connection``: one that is logged in, from ``hand_over``."""
        self.host = host
        self.connection = connection or SshConnection(host, login)
        self.outdated = False  # the host's build is older than the package, and may be replaced
        self.deployment: Deployment | None = None
        self.signers: dict[str, Signers] = {}  # by owner, what the agent gets to verify claims; as long as the login
        self._package = package
        self._shell: StepShell | None = None  # becomes the relay to the agent, or stays and installs it
        self._progress = progress
        self._reset()

    def _reset(self) -> None:
        """The state of a channel that is not open yet."""
        self._channel: AgentChannel | None = None
        self._frames = FrameReader(REPLY_BYTES_MAX)
        self._head: bytearray | None = bytearray()  # the first bytes, until the length of the first frame is known
        self._greeted: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._replies: dict[str, asyncio.Future[Reply]] = {}
        self._unanswered = 0  # calls that were sent without a reply so far
        self._watch: asyncio.Task[None] | None = None
        self._broken: HostUnreachable | None = None
        self._agent_ended = False
        self._served: OrderedDict[tuple[str, str], _Served] = OrderedDict()  # by owner and scope

    def remembered(self, owner: str, scope_id: str) -> Reply | None:
        """What the agent would reply to ``locate``, if it has just said that it serves the scope; else None.

        Whatever changes the placement makes the agent refuse the next command of the scope, and that command finds the
        other host.
        """
        served = self._served.get((owner, scope_id))
        if self.is_broken or served is None or time.monotonic() - served.at > HEARD_S:
            return None
        return served.reply

    def _remember(self, call: Call, reply: Reply) -> None:
        key = call.registration.owner, call.scope_id
        self._served.pop(key, None)
        if (
            reply.holds and reply.gate == "open" and not (reply.status or reply.moved_to or reply.about_to_move)
        ):  # guard: only-a-served-scope-is-remembered
            # A reply to locate has no output and no data, and no note is told twice.
            said = msgspec.structs.replace(reply, output="", data=b"", note="")
            self._served[key] = _Served(time.monotonic(), said)
            if len(self._served) > _SERVED_MAX:
                self._served.popitem(last=False)

    async def open(self) -> None:
        """Log in, start the agent's command and exchange hellos. Installs nothing.

        Raises HostUnreachable, or LoginRefused, with a remedy: NoAgent and OtherProtocol if ``install`` may help.
        """
        if self.connection.is_open:
            try:
                self._accept(await self._greet())
                return
            except HostUnreachable:
                if self.connection.is_open:
                    raise
            self.connection = SshConnection(self.host, self.connection.login)  # guard: a-lost-connection-is-replaced
        await self.connection.open()
        # A sudo that allows nothing but the agent's command allows no shell.
        if self._package is not None and not self.connection.login.by_sudo:
            self._shell = install_shell(self.connection, self._package)
        self._accept(await self._greet())

    @property
    def may_be_continued(self) -> bool:
        """Whether only the agent has ended, so that another one can be started over the same SSH connection."""
        return self._agent_ended and self.connection.is_open

    def hand_over(self) -> SshConnection | None:
        """The SSH connection if it ``may_be_continued``: the new client closes it."""
        if not self.may_be_continued:
            return None
        self._agent_ended = False
        connection, self.connection = self.connection, SshConnection(self.host, self.connection.login)
        return connection

    async def install(self, why: HostUnreachable) -> None:
        """Install our build after ``open`` failed by ``why``: the agent is missing, or its protocol is too old.

        Raises as ``open``, and CannotInstall.
        """
        if self._package is None:
            raise why
        if not isinstance(why, OtherProtocol):
            await self._deploy(only_if_missing=True)  # another call may have installed it meanwhile
            try:
                self._accept(await self._greet())
            except OtherProtocol as other:
                why = other
            else:
                return
        if not self._may_replace(self._greeted.result()):
            raise why
        await self._deploy()
        self._accept(await self._greet())

    def _accept(self, hello: Hello) -> None:
        if not hello.understands(HELLO):
            older = "the host" if hello.protocol < PROTOCOL_VERSION else "this server"
            raise OtherProtocol(
                f"{self.host}: its agent (netloom {hello.version}) speaks protocol {hello.protocol}, "
                f"this server (netloom {HELLO.version}) speaks {PROTOCOL_VERSION}",
                hint=f"bring netloom up to date on {older}",
            )
        self.outdated = self._may_replace(hello)
        self._log_difference(hello)

    async def replace(self) -> None:
        """Install our build in place of the older one that answers now.

        The channel breaks when the agents change places; no call is lost. A failure is logged and fails no call: the
        older agent goes on answering.
        """
        self.outdated = False
        try:
            await self._deploy()
        except HostUnreachable as error:
            self._progress.log(f"{error}; the older agent is used")
        finally:
            self._close_shell()

    def silence(self, waited_s: float) -> HostUnreachable:
        """The error when the host is not ready after ``waited_s`` seconds."""
        if self.deployment is not None:
            slow = f"; if every step is slow, {NAME_IN_HOSTS}" if self.connection.login.by_sudo else ""
            return HostUnreachable(str(self.deployment.now), hint=f"the next call goes on from there{slow}")
        return self.connection.silence(waited_s)

    async def _greet(self) -> Hello:
        self._reset()
        began = time.monotonic()
        if self._shell is None:
            channel = await self.connection.run(self._received)
        else:
            relay = await self._shell.connect(self._received)
            if relay is None:
                raise NoAgent(f"{self.host}: no agent at {self.connection.login.agent}", hint=INSTALL_IT)
            self._shell, channel = None, relay
            if relay.exit_status == 1:  # guard: a-login-shell-that-reads-no-script
                channel = await self.connection.run(self._received)  # csh wants one line
        self._channel = channel
        self._watch = asyncio.create_task(self._watch_channel(self._channel))
        self._send(HELLO)
        hello = await self._greeted
        waited_s = time.monotonic() - began
        if self._channel.sudo_looked_up or (self.connection.login.by_sudo and waited_s > _SUDO_S_MAX):
            self._progress.log(f"{self.host}: sudo needed {waited_s:.0f} s: {NAME_IN_HOSTS}")
        return hello

    async def _deploy(self, *, only_if_missing: bool = False) -> None:
        assert self._package is not None
        if self._shell is None or not self._shell.is_open:
            self._shell = install_shell(self.connection, self._package)
        self.deployment = Deployment(self.connection, self._package, self._progress, self._shell)
        try:
            async with asyncio.timeout(_INSTALLATION_S_MAX):
                await self.deployment.run(only_if_missing=only_if_missing)
        except TimeoutError:
            raise CannotInstall(f"{self.deployment.now}, for {_INSTALLATION_S_MAX / 60:.0f} minutes") from None
        except (CannotInstall, ConnectionLost) as error:
            self._progress.log(f"installing {self._package.build} failed: {error}")
            self._close_shell()
            raise
        finally:
            self.deployment = None

    def _log_difference(self, hello: Hello) -> None:
        """Log why an agent of another build is not replaced."""
        package = self._package
        if package is None or self.outdated or hello.build == package.build:
            return
        why = "which is not older: there is no automatic downgrade"
        if hello.held == package.build:
            why = "to which an operator of the host went back"
        self._progress.log(
            f"{self.host}: this server's {package.build} works with the agent {hello.build} there, {why}"
        )

    def _may_replace(self, hello: Hello) -> bool:
        package = self._package
        return package is not None and is_newer(package.build, than=hello.build) and hello.held != package.build

    async def call(self, call: Call) -> Reply:
        """The agent's reply to ``call``. Raises ConnectionLost when the channel breaks first."""
        if self._broken is not None:
            raise self._broken
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call.call_id] = reply
        try:
            self._send(call)
            self._unanswered += 1
            said = await reply
            self._remember(call, said)
            return said
        finally:
            del self._replies[call.call_id]

    @property
    def is_broken(self) -> bool:
        """Whether the channel has broken, so that no further call can be answered."""
        return self._broken is not None

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self.connection.close()

    def _close_shell(self) -> None:
        if self._shell is not None:
            self._shell.close()
            self._shell = None

    def _send(self, message: Message) -> None:
        assert self._channel is not None
        with suppress(OSError):  # a closed channel: _watch_channel reports the reason
            self._channel.write(encode(message))

    def _received(self, data: bytes) -> None:
        if self._broken is not None:
            return
        try:
            for message in self._cut(data):
                if isinstance(message, Hello) and not self._greeted.done():
                    self._greeted.set_result(message)
                elif isinstance(message, Reply) and self._unanswered:
                    self._unanswered -= 1
                    waiting = self._replies.get(message.call_id)  # none: that call has ended
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message)
                else:
                    raise HostRefused("its agent sends messages that nothing asked for")  # guard: a-host-only-answers
        except NetloomError as error:
            self._break(HostUnreachable(f"{self.host}: {error.message}", hint=error.hint))

    def _cut(self, data: bytes) -> list[Message]:
        if self._head is None:
            return self._frames.feed(data)
        self._head += data
        if len(self._head) < 4:
            return []
        if int.from_bytes(self._head[:4], "big") > _HELLO_BYTES_MAX:
            text = bytes(self._head[:80]).decode("utf-8", "replace").strip()
            raise HostUnreachable(
                f"the login shell prints text before the agent speaks: {text!r}",
                hint="no output from .bashrc and the like in sessions without a terminal",
            )
        data, self._head = bytes(self._head), None
        return self._frames.feed(data)

    async def _watch_channel(self, channel: AgentChannel) -> None:
        error = await channel.lost
        if not self._greeted.done():
            self._break(self._not_an_agent() or why_no_agent(self.host, self.connection.login, channel))
            return
        self._agent_ended = error is None
        why = channel.stderr or (str(error) if error else "the agent's end was closed")
        self._break(ConnectionLost(f"{self.host}: the connection to the agent broke: {why}"))

    def _not_an_agent(self) -> HostUnreachable | None:
        """The error when some bytes arrived, but no Hello."""
        if not self._head:
            return None
        return HostUnreachable(
            f"{self.host}: something else than the agent answered: {bytes(self._head[:80])!r}",
            hint="does the login shell print text, or is another command forced?",
        )

    def _break(self, error: HostUnreachable) -> None:
        if self._broken is None:
            self._broken = error
        self._frames = FrameReader(REPLY_BYTES_MAX)  # what has arrived is never completed: free its memory
        if not self._greeted.done():
            self._greeted.set_exception(error)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
