"""Two hosts with real agents that share all VLANs, an internet behind the public ones, and connections to the agents.

A veth pair for each guest VLAN joins the hosts. The public VLANs end in bridges of a third namespace, the internet. It
has the gateway address of each, and a TCP server on ``ECHO_PORT`` that sends back what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kernel.agent_host import LOG, PROGRAM, REGISTRATION, AgentHost
from netloom.claimwire import Claim
from netloom.errors import HostUnreachable
from netloom.extension.moves.agents import Agents
from netloom.extension.moves.move import Mover
from netloom.extension.ssh import ConnectionLost
from netloom.wire import Call, FrameReader, Hello, Reply, encode

ECHO_PORT = 7
NAMES = ("h1", "h2")
PREFIX_LENGTH = 16  # of a public subnet
_PATH = os.environ["PATH"]
_FRAME = re.compile(r" \S+\.py:[0-9]+ in \S+$")  # of a traceback


def public_address(vlan: int, number: int) -> str:
    """Address ``number`` of the subnet of public VLAN ``vlan``, which is counted from 0."""
    return f"100.{64 + vlan}.{number // 250}.{number % 250 + 1}"


def public_gateway(vlan: int) -> str:
    return f"100.{64 + vlan}.255.254"


class Host(AgentHost):
    """A host whose agent can be killed and started at any moment, and whose log is read as it grows."""

    def __init__(self, name: str, lives_s: int) -> None:
        super().__init__((), lives_s)
        self.name = name
        self.bugs: list[str] = []  # lines of the agent's log
        self._read_from: tuple[int, int] = (0, 0)  # inode and offset
        for nic in ("eth1", "eth2"):
            self.ip("link", "add", nic, "type", "veth", "peer", "name", f"{nic}-x")

    def begin(self, *options: str) -> None:
        """Start the agent, without waiting for it."""
        self.agent = subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "-n", "-m", "--", *PROGRAM, "serve", "--log", LOG, *options],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": _PATH},
        )

    @property
    def socket_path(self) -> str:
        return str(self.path("/run/netloom/agent.sock"))

    def batch(self, program: Sequence[str], lines: Sequence[str]) -> None:
        """Let one ``ip -batch`` or ``nft -f`` execute all lines. Raises AssertionError."""
        with tempfile.NamedTemporaryFile("w", dir=self.path("/run"), delete=False) as file:
            file.write("\n".join(lines) + "\n")
        try:
            self.run(*program, f"/run/{Path(file.name).name}", timeout_s=600)
        finally:
            self.path(f"/run/{Path(file.name).name}").unlink()

    def read_log(self) -> None:
        """Note new lines of the agent's log that tell of a bug. Call it before 4 MiB more were written."""
        path = self.path(LOG)
        inode, offset = self._read_from
        with contextlib.suppress(FileNotFoundError):
            now = path.stat().st_ino
            if now != inode:
                older = path.with_name(path.name + ".1")
                if inode and older.exists() and older.stat().st_ino == inode:
                    self._note_bugs(older, offset)
                inode, offset = now, 0
            self._read_from = inode, self._note_bugs(path, offset)

    def _note_bugs(self, path: Path, offset: int) -> int:
        with path.open() as file:
            file.seek(offset)
            while (line := file.readline()).endswith("\n"):
                offset = file.tell()
                if " bug: " in line or _FRAME.search(line):
                    self.bugs.append(f"{self.name}: {line.strip()}")
        return offset


class Line:
    """A connection to one agent, for many calls at once. Implements ``Channel`` of ``extension/moves/agents.py``."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._frames = FrameReader()
        self._writer: asyncio.StreamWriter | None = None
        self._replies: dict[str, asyncio.Future[Reply]] = {}
        self._reading: asyncio.Task[None] | None = None
        self.is_broken = False

    async def open(self) -> None:
        """Connect and exchange hellos. Raises ConnectionLost."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(self._host.socket_path)
        except OSError as error:
            raise ConnectionLost(f"{self._host.name}: no agent: {error.strerror}") from error
        self._writer.write(encode(Hello(version="test", build="test")))
        self._reading = asyncio.create_task(self._read(reader))

    async def call(self, call: Call) -> Reply:
        """The agent's reply. Raises ConnectionLost."""
        if self.is_broken or self._writer is None:
            raise ConnectionLost(f"{self._host.name}: the connection is broken")
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[call.call_id] = reply
        try:
            self._writer.write(encode(call))
            return await reply
        finally:
            self._replies.pop(call.call_id, None)

    def silence(self, waited_s: float) -> HostUnreachable:
        return HostUnreachable(f"{self._host.name}: no agent within {waited_s:.0f} s")

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.transport.abort()
        self._break()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    for message in self._frames.feed(data):
                        waiting = self._replies.get(message.call_id) if isinstance(message, Reply) else None
                        if waiting is not None and not waiting.done():
                            assert isinstance(message, Reply)
                            waiting.set_result(message)
        finally:
            self._break()  # nobody waits for an answer that is not read any more

    def _break(self) -> None:
        self.is_broken = True
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ConnectionLost(f"{self._host.name}: the agent has ended"))


async def no_signers(owner: str, host: str) -> None:
    """The agents of this test verify nothing."""


class _Signer:
    """Signs without a key: these agents believe their operator."""

    async def sign(self, claim: Claim) -> str:
        return str(claim)


class Hosts:
    """The two hosts, by name."""

    def __init__(self, guest_vlans: Sequence[int], public_vlans: Sequence[int], lives_s: int) -> None:
        self.by_name = {name: Host(name, lives_s) for name in NAMES}
        self.first = self.by_name[NAMES[0]]
        self._lines: dict[str, Line] = {}
        self._opening = {name: asyncio.Lock() for name in NAMES}
        self._closing = threading.Event()
        self._echo: threading.Thread | None = None
        try:
            self._connect(guest_vlans, public_vlans)
        except BaseException:
            self.close()
            raise

    def _connect(self, guest_vlans: Sequence[int], public_vlans: Sequence[int]) -> None:
        first, second = self.by_name.values()
        internet = first.fabric
        for host in (first, second):
            host.run("sysctl", "-qw", "net/ipv6/conf/default/disable_ipv6=1")
        first.batch(
            ("ip", "-batch"),
            [f"link add eth1.{vlan} type veth peer name eth1.{vlan} netns {second.pid}" for vlan in guest_vlans],
        )
        # Otherwise a VLAN would have no carrier while no network of the other host uses it.
        for host in (first, second):
            host.batch(("ip", "-batch"), [f"link set eth1.{vlan} up" for vlan in guest_vlans])
        first.run("sysctl", "-qw", "net/ipv6/conf/default/disable_ipv6=1", pid=internet)
        for number, vlan in enumerate(public_vlans):
            bridge = f"sw{vlan}"
            first.run("ip", "link", "add", bridge, "type", "bridge", pid=internet)
            for host in (first, second):
                end = f"sw{vlan}-{host.name}"
                host.ip("link", "add", f"eth2.{vlan}", "type", "veth", "peer", "name", end, "netns", str(internet))
                first.run("ip", "link", "set", end, "master", bridge, "up", pid=internet)
            gateway = f"{public_gateway(number)}/{PREFIX_LENGTH}"
            first.run("ip", "addr", "add", gateway, "dev", bridge, pid=internet)
            first.run("ip", "link", "set", bridge, "up", pid=internet)
        first.run("ip", "link", "set", "lo", "up", pid=internet)
        for host in (first, second):
            host.run("sysctl", "-qw", "net/ipv6/conf/default/disable_ipv6=0")
        self._listen()

    def _listen(self) -> None:
        """Start the server of the internet."""
        with self.first.within():
            server = socket.create_server(("", ECHO_PORT), backlog=64)
        server.settimeout(0.2)

        def serve() -> None:
            with server:
                while not self._closing.is_set():
                    with contextlib.suppress(OSError):
                        connection, _ = server.accept()
                        with connection:
                            connection.settimeout(2)
                            connection.sendall(connection.recv(100))

        self._echo = threading.Thread(target=serve)
        self._echo.start()

    def close(self) -> None:
        self._closing.set()
        if self._echo is not None:
            self._echo.join()
        for host in self.by_name.values():
            host.close()

    async def line(self, name: str) -> Line:
        """The open connection to the agent of a host. Raises ConnectionLost."""
        async with self._opening[name]:
            line = self._lines.get(name)
            if line is None or line.is_broken:
                line = Line(self.by_name[name])
                await line.open()
                self._lines[name] = line
            return line

    def hang_up(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    def mover(self) -> Mover:
        """An operator's moves. The operator of the test does not log in: the agents are reached directly."""
        return Mover(Agents(NAMES, lambda name: Line(self.by_name[name]), no_signers), _Signer())

    async def serving(self, within_s: float = 600) -> None:
        """Return when both agents answer."""
        ends = asyncio.get_running_loop().time() + within_s
        for name in NAMES:
            while True:
                try:
                    call = Call(
                        call_id=os.urandom(8).hex(), command="locate", scope_id="net-1", registration=REGISTRATION
                    )
                    await (await self.line(name)).call(call)
                    break
                except ConnectionLost:
                    assert asyncio.get_running_loop().time() < ends, f"{name} does not answer"
                    await asyncio.sleep(0.1)


def kill_agent(host: Host) -> None:
    """End the agent as ``kill -9`` does."""
    host.kill(signal.SIGKILL)


@contextlib.contextmanager
def two_hosts(guest_vlans: Sequence[int], public_vlans: Sequence[int], lives_s: int) -> Iterator[Hosts]:
    hosts = Hosts(guest_vlans, public_vlans, lives_s)
    try:
        yield hosts
    finally:
        hosts.close()
