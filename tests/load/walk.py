"""A random walk of commands, moves and faults over all networks, by several callers at the same time.

``Walk.run`` walks for some time. ``Walk.settle`` ends what the faults have left open, as an operator and CloudStack's
KVM agent do, and returns when every network says that nothing is to do. Calls that failed are counted by their reason
in ``Walk.reasons``; a reason that no fault of the walk explains is in ``Walk.wrong``.

The choices depend on ``seed`` alone, the moments do not: calls, moves and faults overlap as the machine is fast.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing, suppress

import processes
from kernel.agent_host import make_call
from load.accounts import guest_pid, service_pids, states
from load.cloud import GATEWAY, CloudNetwork, Command, vm_ip
from load.hosts import ECHO_PORT, NAMES, Host, Hosts, kill_agent, public_gateway
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.ssh import ConnectionLost
from netloom.wire import Call, Reply

CALLERS, MOVERS = 6, 2
CALL_S_MAX = 300.0  # with all repetitions
SETTLED_S_MAX = 600.0
HARMED_S = 30.0  # a call that began before the damage, on a slow machine
HARM = r"No such (file or directory|device)|is not a namespace|Cannot find device|Network is (down|unreachable)"
KILLED = r" ended (immediately|before)|keeps its old configuration|guest process does not answer"
_RIGHT = "nothing to do: all is as it should be"

# Why a call or a move may fail during the walk, and be repeated then: the pattern of the error, and who made it.
EXPECTED = {
    r"no agent: |the agent has ended|the connection is broken|did not answer|no agent within": "the agent was killed",
    r"was moved to h": "the network was moved",
    r"is being moved (here|to)": "the network is being moved",
    r"is passive on this host": "the network is being moved",
    r"has changed meanwhile|changes all the time|were? read anew": "the network changed during its move",
    r"was not opened in time|is not expected here|keeps net-\d+ closed": "the agent was killed during a move",
    r"waits behind a closed gate": "the agent was killed, and the namespace was deleted",
}


class Walk:
    """The networks of a zone, and what happens to them."""

    def __init__(self, hosts: Hosts, networks: list[CloudNetwork], seed: int) -> None:
        self.hosts = hosts
        self.networks = networks
        self.seed = seed
        self.done: Counter[str] = Counter()  # commands, moves and faults
        self.reasons: Counter[str] = Counter()
        self.failures: deque[str] = deque(maxlen=40)  # the last calls that failed, for a reader of a failed test
        self.wrong: list[str] = []
        self._harmed: dict[str, float] = {}  # by scope, when its objects were last damaged; "services": a kill
        self.gaps_ms: list[float] = []
        self._mover = hosts.mover()

    # ------------------------------------------------------------------------------------------------------- calls

    async def send(self, network: CloudNetwork, command: Command, where: str = "") -> Reply:
        """Send a command until it succeeds. It follows the network to another host, unless ``where`` is given."""
        fixture, name, changes = command

        def made() -> Call:
            return make_call(fixture, name, **{**network.fields(), **changes})

        call, ends = made(), time.monotonic() + CALL_S_MAX
        while True:
            host = where or network.where
            try:
                line = await self.hosts.line(host)
                reply = await asyncio.wait_for(line.call(call), 90)
            except ConnectionLost as error:
                self._failed(f"{name} {network.scope_id}", str(error), network)
            except TimeoutError:
                self.wrong.append(f"{name} of {network.scope_id} on {host} did not end before its deadline")
                raise
            else:
                if reply.moved_to and not where:
                    network.where = reply.moved_to
                if not reply.status:
                    self.done[name] += 1
                    return reply
                if not self._failed(f"{name} {network.scope_id} on {host}", reply.error, network):
                    raise AssertionError(self.wrong[-1])
                if not reply.elsewhere:
                    call = made()  # the agent remembers replies by the call's id
            if time.monotonic() > ends:
                self.wrong.append(f"{name} of {network.scope_id} did not succeed in {CALL_S_MAX:.0f} s")
                raise AssertionError(self.wrong[-1])
            await asyncio.sleep(0.2)

    def _failed(self, what: str, error: str, network: CloudNetwork) -> bool:
        """Note the failure; whether the walk explains it."""
        self.failures.append(f"{time.monotonic():.1f} {what}: {error}")
        for harmed, pattern, reason in (
            (network.scope_id, HARM, "objects of the network were deleted at that moment"),
            ("services", KILLED, "a service was killed at that moment"),
        ):
            if time.monotonic() - self._harmed.get(harmed, -math.inf) < HARMED_S and re.search(pattern, error):
                self.reasons[reason] += 1
                return True
        for pattern, reason in EXPECTED.items():
            if re.search(pattern, error):
                self.reasons[reason] += 1
                return True
        self.wrong.append(f"{what}: {error}")
        return False

    async def send_all(self, network: CloudNetwork, commands: Iterable[Command]) -> None:
        for it in commands:
            await self.send(network, it)

    async def build(self, network: CloudNetwork) -> None:
        network.renew()
        network.exists = True
        await self.send_all(network, network.build())

    async def end(self, network: CloudNetwork) -> None:
        """End the network. CloudStack sends the last command to all hosts."""
        shutdown, destroy = network.end()
        await self.send(network, shutdown)
        for name in NAMES:
            await self.send(network, destroy, where=name)
        network.exists = False

    # ---------------------------------------------------------------------------------------------------- one step

    async def command(self, chance: random.Random) -> None:
        network = chance.choice(self.networks)
        changes: dict[str, tuple[int, Callable[[random.Random], Iterator[Command]]]] = {
            "forwards": (30, network.toggle_forward),
            "static NATs": (12, network.toggle_static_nat),
            "firewall": (14, network.change_rules),
            "VMs": (16, network.replace_vm),
            "passwords": (8, network.save_password),
            "balancing": (8 if network.balances else 0, network.change_balancing),
            "restart": (3, lambda _: network.restart()),
        }
        (part,) = chance.choices([*changes], [weight for weight, _ in changes.values()])
        change = changes[part][1]
        own = random.Random(chance.random())
        if chance.random() < 0.02:
            async with network.life.alone():
                await self.end(network)
                await self.build(network)
            return
        # The parts of a network change independently of each other, but all of them are about its VMs and passwords.
        async with network.life.shared(), network.part("VMs" if part in ("passwords", "restart") else part):
            await self.send_all(network, change(own))

    async def move(self, chance: random.Random) -> None:
        network = chance.choice(self.networks)
        async with network.life.shared(), network.part("place"):
            # Most networks stay on the first host, or come back to it.
            to = NAMES[0] if network.where == NAMES[1] else NAMES[1]
            await self.move_to(network, to)

    async def move_to(self, network: CloudNetwork, to: str) -> bool:
        moved = await self._mover.move(network.scope_id, to, await take_inventory(self._mover.agents))
        if moved.error is None:
            network.where = to
            self.done["move"] += 1
            if moved.gap_ms is not None:
                self.gaps_ms.append(moved.gap_ms)
            return True
        self._failed(f"move of {network.scope_id} to {to}", str(moved.error), network)
        return False

    def faults(self, chance: random.Random, kill: tuple[str, ...]) -> None:
        """Do one kind of damage. ``kill``: the hosts whose agent may be killed. Blocks."""
        host = self.hosts.by_name[chance.choice(NAMES)]
        network = chance.choice(self.networks)
        inside, number = network.namespace, network.network_id
        service = "".join(sorted(service_pids(host))[:1])
        delete_address = ("ip", "addr", "del", f"{GATEWAY}/24", "dev", f"gst-{number}")
        faults: dict[str, tuple[int, Callable[[], object]]] = {
            "service killed": (10, lambda: self._kill_service(host, chance, service)),
            "guest process killed": (2, lambda: processes.kill(guest_pid(host)) if guest_pid(host) else None),
            "guest link deleted": (5, lambda: host.run("ip", "link", "del", f"vnetg{number}", check=False)),
            # Not "ip addr flush": it goes on as long as it finds an address, also one that was repaired meanwhile.
            "guest address deleted": (5, lambda: host.run(*delete_address, namespace=inside, check=False)),
            "ruleset flushed": (5, lambda: host.run("nft", "flush", "ruleset", namespace=inside, check=False)),
            "bridge deleted": (5, lambda: host.run("ip", "link", "del", network.bridge, check=False)),
            "namespace deleted": (3, lambda: host.run("ip", "netns", "del", inside, check=False)),
            "connections flushed": (5, lambda: host.run("conntrack", "-F", namespace=inside, check=False)),
        }
        if kill:
            faults["agent killed"] = (4, lambda: self._restart(self.hosts.by_name[chance.choice(kill)]))
        (name,) = chance.choices([*faults], [weight for weight, _ in faults.values()])
        self._harmed["services" if name.endswith("killed") else network.scope_id] = time.monotonic()
        faults[name][1]()
        self.failures.append(f"{time.monotonic():.1f} {name}: {host.name} {network.scope_id}")
        self.done[name] += 1

    @staticmethod
    def _kill_service(host: Host, chance: random.Random, first: str) -> None:
        pids = service_pids(host)
        if first in pids:
            processes.kill(chance.choice(sorted(pids.values())))

    @staticmethod
    def _restart(host: Host) -> None:
        kill_agent(host)
        host.begin()

    # -------------------------------------------------------------------------------------------------- the walk

    async def run(self, seconds: float, kill: tuple[str, ...], *, stage: str, faults_per_s: float) -> None:
        """Walk for some time. ``kill`` as in ``faults``. ``stage`` distinguishes the random choices of two walks."""
        ends = time.monotonic() + seconds

        async def repeat(name: str, step: Callable[[random.Random], Awaitable[None]], pause_s: float) -> None:
            chance = random.Random(f"{self.seed} {stage} {name}")
            while time.monotonic() < ends and not self.wrong:
                await step(chance)
                await asyncio.sleep(chance.uniform(0, 2 * pause_s))

        async def fault(chance: random.Random) -> None:
            await asyncio.to_thread(self.faults, chance, kill)

        async def talk(chance: random.Random) -> None:
            network = chance.choice(with_vms)
            await asyncio.to_thread(self.talks, network)

        async def watch(_: random.Random) -> None:
            for host in self.hosts.by_name.values():
                host.read_log()
                self.wrong += host.bugs

        with_vms = [it for it in self.networks if self.plugged(it)]
        works = [repeat(f"caller {it}", self.command, 0.02) for it in range(CALLERS)]
        works += [repeat(f"mover {it}", self.move, 0.1) for it in range(MOVERS)]
        works += [repeat("faults", fault, 1 / faults_per_s), repeat("log", watch, 1.0)]
        if with_vms:
            works += [repeat("VMs", talk, 0.1)]
        await asyncio.gather(*works)

    # ------------------------------------------------------------------------------------------------------ VMs

    def vm(self, network: CloudNetwork) -> str:
        return f"vm{network.number}"

    def plugged(self, network: CloudNetwork) -> bool:
        return self.hosts.first.path(f"/run/netns/{self.vm(network)}").exists()

    def plug(self, network: CloudNetwork) -> None:
        """Connect the first VM of a network to its bridge on the first host."""
        host, vm = self.hosts.first, self.vm(network)
        host.plug(vm, network.bridge, network.mac(0), f"{vm_ip(0)}/24")
        host.ip("-n", vm, "route", "add", "default", "via", GATEWAY)

    def unplug(self, network: CloudNetwork) -> None:
        host, vm = self.hosts.first, self.vm(network)
        host.ip("link", "del", f"tap-{vm}")
        host.ip("netns", "del", vm)

    def talks(self, network: CloudNetwork, timeout_s: float = 1.0) -> bool:
        """Whether the VM reaches the internet over TCP now. Blocks."""
        with suppress(OSError):
            with self.hosts.first.within(self.vm(network)):
                client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            with closing(client):
                client.settimeout(timeout_s)
                client.connect((public_gateway(network.number % network.public_vlans), ECHO_PORT))
                client.sendall(b"hello")
                if client.recv(100) == b"hello":
                    self.done["connection of a VM"] += 1
                    return True
        self.done["connection of a VM without success"] += 1
        return False

    # -------------------------------------------------------------------------------------------------- the end

    async def settle(self) -> list[str]:
        """What is still wrong when everything has had time to be repaired."""
        ends = time.monotonic() + SETTLED_S_MAX
        await self.hosts.serving()
        await asyncio.to_thread(self._replug)
        open_ones = await self._settle_moves(ends)
        self._mover.agents.close()  # its connections count as descriptors of the agents
        if open_ones:
            return open_ones
        waiting, found = list(self.networks), ""
        while waiting and time.monotonic() < ends:
            rest = []
            for at in range(0, len(waiting), CALLERS):
                some = waiting[at : at + CALLERS]
                for network, said in zip(some, await asyncio.gather(*map(self.check, some)), strict=True):
                    if said != _RIGHT:
                        rest.append(network)
                        found = f"{network.scope_id} on {network.where}: {said}"
            waiting = rest
            await asyncio.sleep(0.5 if waiting else 0)
        wrong = [f"{len(waiting)} networks are not as they should be, for example {found}"] if waiting else []
        for host in self.hosts.by_name.values():
            host.read_log()
            wrong += host.bugs
            held = states(host)
            mine = {it.scope_id: it for it in self.networks if it.exists and it.where == host.name}
            wrong += [f"{host.name} has {it}, and should not" for it in sorted(held.keys() - mine.keys())]
            wrong += [f"{host.name} has no {it}" for it in sorted(mine.keys() - held.keys())]
            wrong += [line for it in held.keys() & mine.keys() for line in mine[it].wrong(held[it])]
        bridges = await asyncio.to_thread(self.hosts.first.links)
        for network in self.networks:
            # A bridge that was deleted on a host without its network comes back with the next network or VM there.
            if self.plugged(network) and network.bridge in bridges:
                # The first tries may be the ones that bring the neighbours up to date.
                tries = [await asyncio.to_thread(self.talks, network, 3.0)]
                while not tries[-1] and len(tries) < 10:
                    tries.append(await asyncio.to_thread(self.talks, network, 3.0))
                wrong += [] if tries[-1] else [f"the VM of {network.scope_id} does not reach the internet"]
        return wrong

    async def check(self, network: CloudNetwork) -> str:
        reply = await self.send(network, ("020", "custom-action", {"action": "check", "action-params": {}}))
        return str(json.loads(reply.output)["message"])

    def _replug(self) -> None:
        """Put the links of VMs into their bridges again, as an operator does after somebody has deleted the bridge."""
        host = self.hosts.first
        links = host.links()
        for network in self.networks:
            tap = f"tap-{self.vm(network)}"
            if tap in links and links[tap].get("master") != network.bridge:
                host.run("ip", "link", "set", tap, "master", network.bridge, check=False)

    async def _settle_moves(self, ends: float) -> list[str]:
        """Complete moves that were interrupted. What is still open at the end."""
        while True:
            inventory = await take_inventory(self._mover.agents)
            unclear = []
            for network in self.networks:
                held = inventory.held_by(network.scope_id)
                serving = [host for host, it in held.items() if it.gate == "open"]
                if len(serving) == 1:
                    network.where = serving[0]
                if len(held) != 1 or len(serving) != 1:
                    unclear.append(f"{network.scope_id}: {held}")
                    await self.move_to(network, network.where)
            if not unclear or self.wrong:
                return self.wrong
            if time.monotonic() > ends:
                return unclear
            await asyncio.sleep(0.5)

    def report(self) -> list[str]:
        """What was done, and which calls were repeated why."""
        did = ", ".join(f"{count} {what}" for what, count in sorted(self.done.items()))
        why = ", ".join(f"{count} because {what}" for what, count in sorted(self.reasons.items()))
        gaps = sorted(self.gaps_ms)
        gap = f"; gap of a move: median {gaps[len(gaps) // 2]:.0f} ms, longest {gaps[-1]:.0f} ms" if gaps else ""
        return [f"seed {self.seed}: {did}", f"repeated: {why or 'nothing'}{gap}"]

    async def close(self) -> None:
        self._mover.agents.close()
        self.hosts.hang_up()
