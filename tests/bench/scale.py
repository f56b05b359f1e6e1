"""Rows that depend on the number of networks: one host grows from one network to 1,000."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bed import faults
from bench.rows import BY_NAME, Measured, Pair, Run, in_turns
from bench.stand import Stand, standing

POINTS = (1, 30, 60, 120, 241, 1000)
FIRST_OF_MEMORY = 30  # before, what a first network costs is too large a part
SETTLE_S = 5.0  # what the building of networks leaves to do is done
IDLE_ROUNDS = 2
EVENT_ROUNDS, RESTARTS = 10, 2


def scale(run: Run) -> Iterator[Measured]:
    """Events, idle CPU, memory and restarts, as far as the run lets the host grow."""
    with standing() as stand:
        single: list[Pair] = []
        before = (0, 0.0)  # networks, and the memory of the host
        for networks in [it for it in POINTS if it <= run.networks]:
            run.say(f"{networks} networks: building")
            stand.grow_to(networks)
            time.sleep(SETTLE_S)
            run.say(f"{networks} networks: events")
            found = event_costs(stand, EVENT_ROUNDS)
            yield f"event@{networks}", found
            single = single or found
            alone = sorted(ours / theirs for ours, theirs in single)[len(single) // 2]
            if f"event-{networks}" in BY_NAME:
                yield f"event-{networks}", [(ours / theirs, alone) for ours, theirs in found]
            if run.wants(*(f"idle-{it}" for it in POINTS)):
                run.say(f"{networks} networks: idle")
                percents = [(stand.agent_cpu(run.idle_s), 1.0) for _ in range(IDLE_ROUNDS)]
                yield f"idle@{networks}", percents
                if f"idle-{networks}" in BY_NAME:
                    yield f"idle-{networks}", percents
            memory = stand.memory_mb()
            if networks == FIRST_OF_MEMORY:
                before = networks, memory
            elif before[0]:
                each = (memory - before[1]) / (networks - before[0])
                yield f"memory@{networks}", [(each, 1.0)]
                two = stand.memory_mb(" agent serve", " guest ")
                for name, value in ((f"memory-{networks}", each), (f"memory-agent-{networks}", two)):
                    if name in BY_NAME:
                        yield name, [(value, 1.0)]
            if run.wants(f"restart-{networks}"):
                run.say(f"{networks} networks: restart")
                once = {f"restart-{networks}": lambda: restart_ms(stand)}
                yield from in_turns(RESTARTS, stand.ssh_ms, once).items()


def event_costs(stand: Stand, rounds: int) -> list[Pair]:
    """Events of one of the networks."""
    network = stand.networks[len(stand.networks) // 2]
    if network.stored == "{}" or not network.stored:
        network.ensure()
    stand.event_ms(network)  # the program that CloudStack executes has not asked for this network before
    found = in_turns(rounds, stand.ssh_ms, {"event": lambda: stand.event_ms(network)})["event"]
    stand.forget_forwards(network)
    return found


def restart_ms(stand: Stand) -> float:
    """Kill the agent, and let CloudStack change a network at once."""
    network = stand.networks[-1]
    faults.kill_agent(stand.host)
    took = stand.event_ms(network)
    stand.settle()
    stand.forget_forwards(network)
    return took
