"""Several simulated hosts with real agents (fakehost.py), and an operator's channels to them, in virtual time.

The messages between the operator and the agents are the real frames, and the operator's end is the real client. Time
passes only while nothing can run, so a test that waits for minutes takes milliseconds::

    def test_a_scope_moves() -> None:
        async def scenario(hosts: Hosts) -> None:
            await hosts["h1"].live()
            moved = await hosts.operator().move("net-204", "h2", ...)

        in_virtual_time(scenario)

``Hosts.wrong`` has an entry for each moment at which two hosts served one scope.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncssh
import pytest

from fakehost import Agent, FakeClock, FakeHost, looks
from netloom import placementwire
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.host.occupied import Occupied
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.scopes import moves as agent_moves
from netloom.errors import HostUnreachable
from netloom.extension.agent_client import AgentClient
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.moves.agents import Agents
from netloom.extension.moves.move import Mover
from netloom.extension.progress import Progress
from netloom.extension.proof import Credentials
from netloom.extension.ssh import AgentChannel, Login, SshConnection
from netloom.render.ruleset import Ruleset
from netloom.render.want import Want
from netloom.secret import Secret
from netloom.wire import Call, FrameReader, Hello, Reply, encode

T = TypeVar("T")

_KEY = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
_LOGIN = Login(trust=Trust((), KnownHosts("/nonexistent")), sshkey=Secret(_KEY))
CREDENTIALS = Credentials(_LOGIN)
_TURNS_MAX = 2_000_000


class _NoIo(selectors.BaseSelector):
    """A selector without files. Instead of waiting it moves the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._turns = 0
        self._map: dict[Any, Any] = {}

    def select(self, timeout: float | None = None) -> list[Any]:
        self._turns += 1
        assert timeout is not None, "everything waits for ever"
        assert self._turns < _TURNS_MAX, "it does not come to an end"
        self.now += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return None  # the loop's own pipe for threads, which are not used

    def unregister(self, fileobj: Any) -> Any:
        return None

    def get_map(self) -> Any:
        return self._map


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = _NoIo()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


class _Clock(FakeClock):
    """The clock of the loop, for an agent."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._handles: list[asyncio.TimerHandle] = []
        self._ended = False

    def of_next_agent(self) -> _Clock:
        for handle in self._handles:
            handle.cancel()
        self._ended = True
        return _Clock(self._loop)

    def time(self) -> float:
        return self._loop.time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Any:
        self._handles = [it for it in self._handles if not it.cancelled() and it.when() >= self._loop.time()]
        handle = self._loop.call_later(delay_s, callback)
        self._handles.append(handle)
        if self._ended:
            handle.cancel()  # tasks of an ended process still run, to be cancelled
        return handle

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    @contextlib.asynccontextmanager
    async def timeout(self, delay_s: float | None) -> AsyncIterator[None]:
        async with asyncio.timeout(delay_s):
            yield

    async def advance(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Kernel(FakeHost):
    """A simulated kernel that hears the answers of the other hosts, and reports what it serves."""

    def __init__(self, hosts: Hosts, name: str, clock: FakeClock, did: list[str]) -> None:
        super().__init__(clock, did)
        self._hosts = hosts
        self._name = name

    def open_scopes(self) -> set[str]:
        return {scope_id for scope_id, want in self.present.items() if want.namespace and not want.gated}

    def converge(self, scope_id: str, want: Want, known: Ruleset | None, *, thorough: bool = False) -> HostChanges:
        try:
            return super().converge(scope_id, want, known, thorough=thorough)
        finally:
            self._hosts.check()

    def open_gate(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        try:
            return super().open_gate(scope_id, want)
        finally:
            self._hosts.check()

    def occupied(self, scope_id: str, want: Want, timeout_s: float, claim: bytes) -> Occupied:
        for name, other in self._hosts.agents.items():
            kernel = other.host
            assert isinstance(kernel, _Kernel)
            if name != self._name and name not in self._hosts.dead and scope_id in kernel.open_scopes():
                if {name, self._name} & self._hosts.blind:
                    continue
                return Occupied({it.ip: name for it in want.announce}, {}, {})
        return super().occupied(scope_id, want, timeout_s, claim)


@dataclass
class Cut:
    """What happens at the message with this number, counted over all hosts and directions from 1.

    "operator": the message is lost, and the operator's process with it. "connection": the message is lost, and the
    channel breaks. "agent": the same, and the agent of the host restarts. "management": as "connection", and from then
    on no operator can connect to the host.
    """

    at: int = 0
    what: str = "operator"


class Hosts:
    """The hosts h1, h2, ... and the network between them and the operator.

    ``slow``: seconds that messages take whose text begins so; others take a millisecond. ``dead``: hosts that answer
    nothing. ``blind``: hosts that hear no ARP and no claims of others. ``refusing``: hosts whose disk is
    full when they are told to ``open``.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, names: tuple[str, ...]) -> None:
        self.loop = loop
        self.agents: dict[str, Agent] = {}
        self.dead: set[str] = set()
        self.blind: set[str] = set()
        self.refusing: set[str] = set()
        self.unreachable: set[str] = set()  # no operator can connect to them
        self.claims = False
        self.wrong: list[str] = []
        self.messages: list[str] = []
        self.slow: dict[str, float] = {}
        self.cut = Cut()
        self.before_call: Callable[[str, Call], None] = lambda host, call: None
        self._replies: dict[tuple[str, str], asyncio.Task[Reply]] = {}  # by host and call, as in agent/serve.py
        self._channels: list[_Channel] = []
        self._killed: asyncio.Future[None] | None = None
        for name in names:
            self._add(name)

    def __getitem__(self, name: str) -> Agent:
        return self.agents[name]

    def _add(self, name: str) -> None:
        agent = Agent(_Clock(self.loop))
        agent.host = _Kernel(self, name, agent.clock, agent.did)
        self.agents[name] = agent
        self.restart(name)

    def restart(self, name: str) -> None:
        """A new agent on the same host."""
        for host, call_id in list(self._replies):
            if host == name:
                self._replies.pop((host, call_id)).cancel()
        agent = self.agents[name]
        agent.restart()
        agent._tasks.append(self.loop.create_task(agent.upkeep.restore()))
        agent.sockets.on_send = lambda wire, payload: self._broadcast(name, wire, payload)
        if self.claims:
            agent._tasks.append(self.loop.create_task(agent.claims.run(looks())))

    def with_claims(self) -> None:
        """From now on the hosts claim scopes, and hear each other's claims. It is some work for each second."""
        self.claims = True
        for agent in self.agents.values():
            agent._tasks.append(self.loop.create_task(agent.claims.run(looks())))

    def broadcast(self, wire: ClaimWire, payload: bytes) -> None:
        """Anybody sends a frame to all hosts."""
        self._broadcast("", wire, payload)

    def _broadcast(self, sender: str, wire: ClaimWire, payload: bytes) -> None:
        def arrive(name: str) -> None:
            if not {sender, name} & self.blind:
                self.agents[name].sockets.heard(wire, payload)

        for name in self.agents.keys() - {sender}:
            self.loop.call_later(0.001, arrive, name)

    def check(self) -> None:
        """Note the scopes that two hosts serve now."""
        served: dict[str, str] = {}
        for name, agent in self.agents.items():
            kernel = agent.host
            assert isinstance(kernel, _Kernel)
            for scope_id in kernel.open_scopes() if name not in self.dead else ():
                if scope_id in served:
                    self.wrong.append(f"{served[scope_id]} and {name} serve {scope_id} at {self.loop.time():.3f}")
                served[scope_id] = name

    def serving(self, scope_id: str) -> list[str]:
        """The hosts whose kernels serve the scope."""
        kernels = [(name, agent.host) for name, agent in self.agents.items() if name not in self.dead]
        return [name for name, it in kernels if isinstance(it, _Kernel) and scope_id in it.open_scopes()]

    def operator(self, *names: str) -> Mover:
        """An operator's process with no open channel yet, for these hosts or all."""
        return Mover(Agents(names or tuple(self.agents), self._client, CREDENTIALS.signers), CREDENTIALS)

    async def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Run the work of an operator's process. None: it was killed."""
        self.messages.clear()
        self._channels.clear()
        self._killed = self.loop.create_future()
        task = asyncio.ensure_future(work)
        waiting: list[asyncio.Future[Any]] = [task, self._killed]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._killed.done():
            task.cancel()  # what it still sends arrives nowhere
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            return None
        return task.result()

    def kill_operator(self) -> None:
        """End the operator's process that ``run`` runs: from now on nothing of it is sent or received."""
        for channel in self._channels:
            channel.broken = True
        if self._killed is not None and not self._killed.done():
            self._killed.set_result(None)

    # --- the network

    def _client(self, host: str) -> AgentClient:
        client = AgentClient(host, _LOGIN, None, Progress())
        client.connection = _Connection(self, host)
        return client

    def deliver(self, what: str, host: str, channel: _Channel, arrive: Callable[[], None]) -> None:
        """Let a message arrive later, or not at all."""
        if channel.broken:
            return
        self.messages.append(what)
        if len(self.messages) == self.cut.at:
            match self.cut.what:
                case "operator":
                    self.kill_operator()
                    return
                case "connection":
                    channel.break_off()
                    return
                case "management":
                    self.unreachable.add(host)
                    channel.break_off()
                    return
                case "agent":
                    channel.break_off()
                    self.restart(host)
                    return

        def now() -> None:
            if not channel.broken and host not in self.dead:
                arrive()

        # The messages of a channel arrive in their order.
        takes_s = next((seconds for start, seconds in self.slow.items() if what.startswith(start)), 0.001)
        channel.due = max(channel.due, self.loop.time() + takes_s)
        self.loop.call_at(channel.due, now)

    def answer(self, host: str, call: Call, channel: _Channel) -> None:
        """The agent of ``host`` receives a call."""
        self.before_call(host, call)

        async def execute() -> None:
            if (host, call.call_id) not in self._replies:
                agent = self.agents[host]
                agent.store.full = call.command == placementwire.OPEN and host in self.refusing
                await agent.claims.learn(call)
                about_placements = call.command in placementwire.COMMANDS
                task = self.loop.create_task((agent.moves if about_placements else agent.scopes).execute(call))
                self._replies[host, call.call_id] = task
            reply = await asyncio.shield(self._replies[host, call.call_id])
            if reply.elsewhere:
                self._replies.pop((host, call.call_id), None)
            self.deliver(f"{call.command} < {host}", host, channel, lambda: channel.arrived(encode(reply)))

        self.agents[host].start(execute())


class _Connection(SshConnection):
    """A connection of an operator to a simulated host."""

    def __init__(self, hosts: Hosts, host: str) -> None:
        super().__init__(host, _LOGIN)
        self._hosts = hosts

    async def open(self) -> None:
        self.stage = "connect"
        if self.host in self._hosts.unreachable:
            raise HostUnreachable(f"{self.host}: connection refused")
        if self.host in self._hosts.dead:
            await asyncio.Event().wait()

    async def run(self, received: Callable[[bytes], None], argv: Sequence[str] = ()) -> AgentChannel:
        self.stage = "agent"
        channel = _Channel(self._hosts, self.host, received)
        self._hosts._channels.append(channel)
        return channel


class _Channel(AgentChannel):
    """A channel to a simulated agent."""

    def __init__(self, hosts: Hosts, host: str, received: Callable[[bytes], None]) -> None:
        super().__init__(received)
        self._hosts = hosts
        self._host = host
        self._reader = FrameReader()
        self.due = 0.0
        self.broken = False
        hosts.loop.call_soon(self.arrived, encode(Hello(version="1", build="1-1-a")))

    def write(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            if isinstance(message, Call):
                call = message
                self._hosts.deliver(
                    f"{call.command} > {self._host}",
                    self._host,
                    self,
                    lambda call=call: self._hosts.answer(self._host, call, self),  # type: ignore[misc]
                )

    def arrived(self, data: bytes) -> None:
        if not self.broken:
            self.received(data)

    def break_off(self) -> None:
        self.broken = True
        if not self.lost.done():
            self.lost.set_result(ConnectionResetError("reset"))


@contextlib.contextmanager
def virtual_hosts(names: tuple[str, ...] = ("h1", "h2", "h3")) -> Iterator[tuple[asyncio.Runner, Hosts]]:
    """New hosts, and what runs coroutines in their time."""
    loop = _VirtualLoop()
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=lambda: loop) as runner:
        patch.setattr(agent_moves, "_now", lambda: f"boot {int(loop.time() * 1e9)}")

        async def made() -> Hosts:
            return Hosts(loop, names)

        hosts = runner.run(made())
        yield runner, hosts
        for agent in hosts.agents.values():
            agent.close()


def in_virtual_time(
    scenario: Callable[[Hosts], Coroutine[Any, Any, T]], names: tuple[str, ...] = ("h1", "h2", "h3")
) -> T:
    """Run the scenario with new hosts."""
    with virtual_hosts(names) as (runner, hosts):
        return runner.run(scenario(hosts))
