"""Two management servers, duplicate and simultaneous calls, moves and restarts: the end is that of some serial order.

The agents are real, their hosts are simulated, and time is virtual. Each call sets one part of a network: a port
forward or the firewall list. Of the calls that set a part, some are not over before another one begins. The part must
then be as one of the last of them says. So no update is lost, and none is undone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fakehost import PAYLOADS, REGISTRATION, Agent
from fakehosts import Hosts, in_virtual_time
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.ssh import ConnectionLost
from netloom.wire import Call, Reply

NETWORKS = ("204", "205")
HOSTS = ("h1", "h2", "h3")
PORTS = ("2222", "3333")
CALL_S_MAX = 60.0  # of virtual time, with all repetitions
_ids = itertools.count()

# Why a call may have to be repeated. Anything else is a fault.
_REPEATED = ("is being moved", "was moved to", "is passive")


@dataclass(frozen=True)
class Step:
    """One call, ``after_s`` seconds after the one before it. ``twice``: it is sent twice at the same time."""

    after_s: float
    network: str
    part: str  # a port, or "rules"
    value: str  # the address behind the port, empty for none; or the port that the list admits
    twice: bool


@dataclass(frozen=True)
class Event:
    """A move of the network to the host, or without a network a restart of the host's agent."""

    at_s: float
    host: str
    network: str


@dataclass(frozen=True)
class Done:
    """A call that was carried out, and when it began and ended."""

    part: tuple[str, str]
    value: str
    began: float
    ended: float


# A move takes half a second, and the work of a call a twentieth.
seconds = st.sampled_from((0.0, 0.0, 0.05, 0.1, 0.2, 2.0))
forwards = st.tuples(st.sampled_from(PORTS), st.sampled_from(("", "10.10.1.45", "10.10.1.162")))
lists = st.tuples(st.just("rules"), st.sampled_from(("", "22", "80", "443")))
steps = st.builds(
    lambda after_s, network, change, twice: Step(after_s, network, change[0], change[1], twice),
    seconds,
    st.sampled_from(NETWORKS),
    forwards | lists,
    st.booleans(),
)
events = st.builds(
    Event, st.sampled_from((0.0, 0.1, 0.2, 0.5, 1.0, 3.0)), st.sampled_from(HOSTS), st.sampled_from((*NETWORKS, ""))
)


def call_of(step: Step, epoch: int) -> Call:
    if step.part == "rules":
        ports = [int(step.value)] if step.value else []
        rules = [{"id": port, "type": "ingress", "protocol": "tcp", "portStart": port} for port in ports]
        named = [{**it, "publicIp": address_of(step.network), "sourceCidrs": ["0.0.0.0/0"]} for it in rules]
        return _call("070", "apply-fw-rules", step, epoch, fw_rules={"default_egress_allow": True, "rules": named})
    ports_of = {"public_port": step.part, "private_port": "22", "public_ip": address_of(step.network)}
    if step.value:
        return _call("053", "add-port-forward", step, epoch, **ports_of, private_ip=step.value)
    return _call("056", "delete-port-forward", step, epoch, **ports_of, private_ip="")


def _call(fixture: str, command: str, step: Step, epoch: int, **changes: Any) -> Call:
    (file,) = PAYLOADS.glob(f"{fixture}-*.json")
    payload = json.loads(file.read_bytes())["payload"] | changes
    payload |= {"network_id": step.network, "vlan": str(1204 + NETWORKS.index(step.network))}
    return Call(
        call_id=f"s{next(_ids)}",
        command=command,
        scope_id=f"net-{step.network}",
        registration=REGISTRATION,
        payload=json.dumps(payload).encode(),
        epoch=epoch,
    )


def address_of(network: str) -> str:
    return f"203.0.113.{20 + NETWORKS.index(network)}"


def slow_down(agent: Agent, loop: asyncio.AbstractEventLoop) -> None:
    """Let each work of a worker thread take some time, so that calls wait for each other."""
    workers = agent.workers
    at_once = workers.submit

    def submit(work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if agent.workers is not workers or not future.set_running_or_notify_cancel():
                return  # the process has ended, or the work was cancelled
            ended = at_once(work, *args, **kwargs)
            error = ended.exception()
            if error is None:
                future.set_result(ended.result())
            else:
                future.set_exception(error)

        loop.call_later(0.05, run)
        return future

    workers.submit = submit  # type: ignore[method-assign]


class Server:
    """A management server: where it believes each network is, and its channels."""

    def __init__(self, hosts: Hosts) -> None:
        self.agents = hosts.operator().agents
        self.loop = hosts.loop
        self.where = dict.fromkeys(NETWORKS, "h1")
        self.epochs = dict.fromkeys(NETWORKS, 0)
        self.done: list[Done] = []

    async def work(self, walk: list[Step]) -> None:
        calls: list[asyncio.Task[None]] = []
        for step in walk:
            await asyncio.sleep(step.after_s)
            for _ in range(1 + step.twice):
                calls.append(asyncio.ensure_future(self.send(step)))
        await asyncio.gather(*calls)

    async def send(self, step: Step) -> None:
        """Send a call until it is carried out; the same call id, as a helper does."""
        call = call_of(step, self.epochs[step.network])
        began = self.loop.time()
        async with asyncio.timeout(CALL_S_MAX):
            while (reply := await self._once(step.network, call)) is None or reply.status:
                if reply is not None:
                    assert any(it in reply.error for it in _REPEATED), reply
                    if not reply.elsewhere:  # CloudStack's next call is another one
                        call = call_of(step, self.epochs[step.network])
                await asyncio.sleep(0.2)
        self.done.append(Done((step.network, step.part), step.value, began, self.loop.time()))

    async def _once(self, network: str, call: Call) -> Reply | None:
        try:
            channel = await self.agents._channel(self.where[network])
            async with asyncio.timeout(5):
                reply = await channel.call(call)
        except (ConnectionLost, TimeoutError):
            return None
        if reply.moved_to:
            self.where[network], self.epochs[network] = reply.moved_to, reply.epoch
        return reply


def allowed(part: tuple[str, str], done: list[Done]) -> set[str]:
    """What the part may be at the end: what a call says after which no other one began."""
    mine = [it for it in done if it.part == part]
    return {it.value for it in mine if not any(other.began > it.ended for other in mine)} or {""}


def parts_of(hosts: Hosts, network: str) -> dict[str, str]:
    """The parts of a network in the state of the host that serves it."""
    (host,) = hosts.serving(f"net-{network}")
    scope = hosts[host].store.files[f"net-{network}"]
    firewall = scope.networks[network].firewall
    rules = firewall.rules if firewall else ()
    found = {str(it.public_ports.first): it.private_ip for it in scope.port_forwards.values()}
    return {**dict.fromkeys(PORTS, ""), **found, "rules": ",".join(str(it.ports.first) for it in rules if it.ports)}


@settings(max_examples=120)
@given(
    walks=st.tuples(*(st.lists(steps, min_size=4, max_size=10) for _ in range(2))),
    happenings=st.lists(events, min_size=1, max_size=4),
)
def test_simultaneous_calls_and_moves_end_as_some_serial_order(
    walks: tuple[list[Step], list[Step]], happenings: list[Event]
) -> None:
    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live(*NETWORKS)
        for agent in hosts.agents.values():
            slow_down(agent, hosts.loop)
        servers = [Server(hosts) for _ in walks]
        operator = hosts.operator()

        async def happen(event: Event) -> None:
            await asyncio.sleep(event.at_s)
            if event.network:
                inventory = await take_inventory(operator.agents)
                await operator.move(f"net-{event.network}", event.host, inventory)
            else:
                for channel in [it for it in hosts._channels if it._host == event.host]:
                    channel.break_off()
                hosts.restart(event.host)
                slow_down(hosts[event.host], hosts.loop)

        async with asyncio.timeout(CALL_S_MAX * 10):
            await asyncio.gather(
                *(server.work(walk) for server, walk in zip(servers, walks, strict=True)), *map(happen, happenings)
            )
        await asyncio.sleep(120)  # moves that were interrupted are decided
        assert hosts.wrong == []
        done = [it for server in servers for it in server.done]
        for network in NETWORKS:
            for part, value in parts_of(hosts, network).items():
                assert value in allowed((network, part), done), (network, part, value, done)
        for agents in (operator.agents, *(it.agents for it in servers)):
            agents.close()

    in_virtual_time(scenario, HOSTS)
