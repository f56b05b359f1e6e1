"""Many networks on two hosts survive a random walk of commands, moves and faults, and leave nothing behind.

``make test`` walks over some networks for moments, ``make test-long`` over as many as ``NETLOOM_LOAD_NETWORKS`` says
for ten minutes. Other variables: ``NETLOOM_LOAD_S``, ``NETLOOM_LOAD_SEED``.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from load.accounts import (
    HostFigures,
    everything,
    fewest_descriptors,
    host_figures,
    left_behind,
    process_figures,
    unaccounted,
)
from load.cloud import FIRST_PUBLIC_VLAN, FIRST_VLAN, NETWORKS_MAX, CloudNetwork
from load.hosts import NAMES, Hosts, two_hosts
from load.walk import Walk
from netloom.agent.scopes.scopes import WORKERS

SEED = int(os.environ.get("NETLOOM_LOAD_SEED", "20261201"))
# Allocators keep what they once needed, each worker thread for itself: an agent that was just started grows to some
# 90 MiB in its first thousand calls, and to 0.12 MiB more for each network. Beyond that it may grow by a tenth.
WARM_KIB, WARM_KIB_PER_NETWORK = 100 * 1024, 128
GROWTH_KIB_MAX, GROWTH_MAX = 4096, 0.10
# The main thread, the workers, and those of the event loop, which are started when they are needed.
THREADS_MAX = 1 + WORKERS + min(32, (os.cpu_count() or 1) + 4)
PROBES = 20


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Size:
    """How many networks, how long the walk is, and which networks are in the samples: every so many."""

    networks: int
    walk_s: float
    resolved: int = 1
    balanced: int = 2
    with_vm: int = 3
    faults_per_s: float = 1.0
    measured_at: Sequence[int] = ()


@dataclass
class Cost:
    """What one command costs at some number of networks: the time, and the agent's CPU time."""

    networks: int
    ms: dict[str, float] = field(default_factory=dict)
    cpu_ms: dict[str, float] = field(default_factory=dict)
    idle_cpu: float = 0.0
    figures: HostFigures | None = None

    def row(self) -> str:
        """The row of the table in docs/operators/limits.md, with the CPU time of the agent in parentheses."""
        times = [f"{self.ms[name]:.0f} ms ({self.cpu_ms[name]:.0f})" for name in self.ms]
        figures = self.figures.row() if self.figures else ""
        return f"{self.networks} networks: {' | '.join(times)} | idle {self.idle_cpu:.1%} of a core | {figures}"


async def measured(walk: Walk, probe: CloudNetwork, *, idle_s: float) -> Cost:
    """Time commands on random networks of the first host, and a network that comes and goes."""
    host, chance = walk.hosts.first, random.Random(walk.seed)
    built = [it for it in walk.networks if it.exists]
    cost = Cost(len(built))
    assert host.agent is not None
    pid = host.agent.pid

    async def timed(name: str, works: Sequence[CloudNetwork], kind: str) -> None:
        taken, cpu = [], process_figures(pid).cpu_s
        for network in works:
            began = time.monotonic()
            if kind == "network":
                await walk.build(network)
                await walk.end(network)
            else:
                commands = network.toggle_forward(chance) if kind == "forward" else network.change_rules(chance)
                await walk.send_all(network, commands)
            taken.append((time.monotonic() - began) * 1000)
        cost.ms[name] = statistics.median(taken)
        cost.cpu_ms[name] = (process_figures(pid).cpu_s - cpu) * 1000 / len(works)

    picked = [chance.choice(built) for _ in range(PROBES)]
    await timed("port forward", picked, "forward")
    await timed("firewall list", picked, "rules")
    await timed("network built and destroyed", [probe] * 5, "network")
    cpu = process_figures(pid).cpu_s
    await asyncio.sleep(idle_s)
    cost.idle_cpu = (process_figures(pid).cpu_s - cpu) / idle_s
    cost.figures = host_figures(host)
    return cost


def assert_no_growth(before: HostFigures, after: HostFigures) -> None:
    """The agent and the guest process of a host have not grown, but for networks that came."""
    assert after.agent.threads <= THREADS_MAX
    warm = WARM_KIB + after.networks * WARM_KIB_PER_NETWORK
    more = max(1.0, after.networks / max(1, before.networks))
    for name, then, now, first in (
        ("agent", before.agent, after.agent, warm),
        ("guest process", before.guest, after.guest, 0),
    ):
        allowed = max(first, then.pss_kib * more * (1 + GROWTH_MAX) + GROWTH_KIB_MAX)
        assert now.pss_kib <= allowed, f"the {name} has grown from {then.pss_kib} to {now.pss_kib} KiB"


async def load(hosts: Hosts, size: Size) -> list[Cost]:
    """The life of all networks. Raises AssertionError."""
    public_vlans = max(1, size.networks // 250)
    networks = [
        CloudNetwork(
            number,
            public_vlans,
            resolves=number % size.resolved == 0,
            balances=number % size.balanced == 0,
            where=NAMES[0],
        )
        for number in range(size.networks)
    ]
    probe = CloudNetwork(size.networks, public_vlans, resolves=True, balances=False, where=NAMES[0])
    walk = Walk(hosts, networks, SEED)
    try:
        return await live(hosts, size, walk, probe)
    except BaseException:
        say("\n".join(walk.failures))
        raise


async def live(hosts: Hosts, size: Size, walk: Walk, probe: CloudNetwork) -> list[Cost]:
    """All networks of the walk are built, live and end. Raises AssertionError."""
    networks = walk.networks
    for host in hosts.by_name.values():
        host.begin()
    await hosts.serving()
    hosts.hang_up()  # a connection is a descriptor of the agent
    before = {name: await asyncio.to_thread(everything, host) for name, host in hosts.by_name.items()}
    descriptors = {
        name: await asyncio.to_thread(fewest_descriptors, host.agent.pid)
        for name, host in hosts.by_name.items()
        if host.agent
    }

    began, costs = time.monotonic(), []
    waiting = list(reversed(networks))
    for goal in sorted({*size.measured_at, size.networks}):

        async def build_some(goal: int = goal) -> None:
            while waiting and waiting[-1].number < goal:
                await walk.build(waiting.pop())

        await asyncio.gather(*(build_some() for _ in range(4)))
        if goal in size.measured_at:
            costs.append(await measured(walk, probe, idle_s=50))
            say(costs[-1].row())
    say(f"{size.networks} networks built in {time.monotonic() - began:.0f} s")
    for network in networks[:: size.with_vm]:
        await asyncio.to_thread(walk.plug, network)

    async def account(stage: str) -> dict[str, HostFigures]:
        wrong = await walk.settle()
        hosts.hang_up()
        own = {name: set(before[name]["links"]) for name in NAMES}
        for host in hosts.by_name.values():
            links = {it.split(": ")[1].partition("@")[0] for it in own[host.name]}
            vms = {walk.vm(it) for it in networks if host is hosts.first and walk.plugged(it)}
            own_links = links | {f"tap-{it}" for it in vms}
            wrong += await asyncio.to_thread(unaccounted, host, own_links, vms, descriptors[host.name])
        for line in walk.report():
            say(f"{stage}: {line}")
        assert wrong == [], "\n".join(wrong[:40])
        return {name: host_figures(host) for name, host in hosts.by_name.items()}

    await walk.run(size.walk_s / 4, NAMES, stage="first", faults_per_s=size.faults_per_s)
    # The first host's agent lives from now on, so that its memory can be compared.
    await walk.run(size.walk_s / 4, NAMES[1:], stage="warm", faults_per_s=size.faults_per_s)
    half = await account("first half")
    await walk.run(size.walk_s / 2, NAMES[1:], stage="second", faults_per_s=size.faults_per_s)
    end = await account("second half")
    say(f"at half time: {half['h1'].row()}")
    say(f"at the end:   {end['h1'].row()}")
    assert_no_growth(half["h1"], end["h1"])

    for network in networks:
        if walk.plugged(network):
            await asyncio.to_thread(walk.unplug, network)
    began = time.monotonic()
    ending = list(networks)

    async def end_some() -> None:
        while ending:
            await walk.end(ending.pop())

    await asyncio.gather(*(end_some() for _ in range(4)))
    say(f"destroyed in {time.monotonic() - began:.0f} s")
    await walk.close()
    left: list[str] = []
    for _ in range(60):
        left = []
        for name, host in hosts.by_name.items():
            now = await asyncio.to_thread(everything, host)
            left += [f"{name}: {it}" for it in left_behind(before[name], now)]
            assert host.agent is not None
            have = process_figures(host.agent.pid).descriptors
            if have != descriptors[name]:
                left.append(f"{name}: descriptors of the agent: {have} instead of {descriptors[name]}")
        if not left:
            break
        await asyncio.sleep(1)
    assert left == [], "\n".join(left)
    return costs


def run(size: Size, lives_s: int) -> list[Cost]:
    say(f"NETLOOM_LOAD_SEED={SEED}, {size}")
    guest_vlans = range(FIRST_VLAN, FIRST_VLAN + size.networks + 1)
    public_vlans = range(FIRST_PUBLIC_VLAN, FIRST_PUBLIC_VLAN + max(1, size.networks // 250))
    with two_hosts(guest_vlans, public_vlans, lives_s) as hosts:
        return asyncio.run(load(hosts, size))


def test_a_random_walk_over_some_networks_leaves_nothing_behind() -> None:
    run(Size(networks=12, walk_s=float(os.environ.get("NETLOOM_LOAD_S", "24"))), lives_s=1000)


@pytest.mark.long
def test_a_random_walk_over_many_networks_leaves_nothing_behind() -> None:
    networks = min(int(os.environ.get("NETLOOM_LOAD_NETWORKS", "1000")), NETWORKS_MAX - 1)
    size = Size(
        networks=networks,
        walk_s=float(os.environ.get("NETLOOM_LOAD_S", "600")),
        resolved=2,
        balanced=10,
        with_vm=20,
        measured_at=[it for it in (10, 100, 1000) if it <= networks],
    )
    costs = run(size, lives_s=4 * 3600)
    for cost in costs:
        say(cost.row())
