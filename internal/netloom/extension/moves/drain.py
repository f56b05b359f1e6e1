"""Move many scopes, several at once: empty a host, even the load of all hosts, let a host take scopes again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from netloom.errors import HostRefused, HostUnreachable
from netloom.extension.moves.agents import Agents, Refused
from netloom.extension.moves.balance import Planned, balanced, spread
from netloom.extension.moves.inventory import Inventory, leftovers, load, scope_order, serving_hosts
from netloom.extension.moves.move import Interrupted, Moved, Mover
from netloom.placementwire import RECORD_S, SET_DRAINED, SET_EVACUATED, SetDrained, SetEvacuated

AT_ONCE = 4
PER_TARGET = 2  # building a scope costs a target most of its time


async def run_plan(
    mover: Mover, plan: Sequence[Planned], inventory: Inventory, done: Callable[[Moved], None] = lambda moved: None
) -> list[Moved]:
    """Carry out the plan: the results in its order. ``done`` is called with each result.

    One failure does not stop the others. When ``mover.stopping`` is set, no further move begins.
    """
    waiting = list(range(len(plan)))
    results: dict[int, Moved] = {}
    running: dict[asyncio.Task[Moved], int] = {}
    busy: Counter[str] = Counter()
    try:
        while waiting or running:
            for number in list(waiting):
                it = plan[number]
                if mover.stopping.is_set():
                    waiting.remove(number)
                    error = Interrupted(f"{it.scope_id} was not moved")
                    results[number] = Moved(it.scope_id, it.source, it.target, error=error)
                elif len(running) < AT_ONCE and busy[it.target] < PER_TARGET:
                    waiting.remove(number)
                    busy[it.target] += 1
                    running[asyncio.create_task(_one(mover, it, inventory))] = number
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED) if running else (set(), None)
            for task in finished:
                number = running.pop(task)
                busy[plan[number].target] -= 1
                results[number] = task.result()
                done(results[number])
    except BaseException:
        for task in running:
            task.cancel()
        raise
    return [results[number] for number in range(len(plan))]


async def _one(mover: Mover, it: Planned, inventory: Inventory) -> Moved:
    moved = await mover.move(it.scope_id, it.target, inventory)
    if isinstance(moved.error, Refused) and not moved.error.reply.holds and moved.error.command == "read-state":
        return replace(moved, error=None, note="it was deleted meanwhile")
    return moved


def plan_drain(host: str, inventory: Inventory) -> list[Planned]:
    """Every scope that the host holds, and where it goes. Raises NetloomError when no other host takes scopes.

    Copies that stand by for another host stay.
    """
    if host in inventory.failures:
        raise inventory.failures[host]
    gone = ("moved", "standby")
    held = {it: scope for it, scope in inventory.views[host].scopes.items() if scope.gate not in gone}
    settled: list[Planned] = []
    moving: dict[str, int] = {}
    for scope_id in sorted(held, key=scope_order):
        served = serving_hosts(inventory.held_by(scope_id))
        if len(served) == 1 and served[0] != host:  # only what is left here is removed
            settled.append(Planned(scope_id, host, served[0], 0))
        else:
            moving[scope_id] = load(held[scope_id])
    loads = {it: load for it, load in inventory.loads().items() if it != host}
    if moving and not loads:
        why = "; ".join(map(str, inventory.failures.values())) or "the others are drained"
        raise HostRefused(f"no other host takes the scopes of {host}: {why}", hint="name all hosts in --hosts")
    return [*spread(host, moving, loads), *settled]


def plan_rebalance(inventory: Inventory) -> list[Planned]:
    """The fewest moves that even the load of the hosts that answer and are not drained.

    Scopes that more than one host holds stay where they are: ``where`` says what is wrong with them. A copy that
    stands by counts for nothing.
    """
    hosts: dict[str, dict[str, int]] = {host: {} for host in inventory.loads()}
    for scope_id in inventory.scope_ids():
        held = inventory.held_by(scope_id)
        copies = [(host, it) for host, it in held.items() if it.gate != "standby"]
        if len(copies) == 1 and copies[0][1].gate == "open" and copies[0][0] in hosts:
            hosts[copies[0][0]][scope_id] = load(copies[0][1])
    return balanced(hosts)


async def set_drained(agents: Agents, host: str, drained: bool) -> None:
    """Let ``host`` take no scope any more, or take them again. Raises NetloomError."""
    await agents.tell(host, SET_DRAINED, SetDrained(drained=drained))


async def undrain(mover: Mover, host: str, inventory: Inventory) -> list[str]:
    """Let ``host`` take scopes again: what was done, and what failed, in lines.

    Copies of scopes that others serve with a higher epoch are removed from it. Other hosts may not take its scopes any
    more, and do not claim them; not before the copies are removed. Raises NetloomError when the host does not answer,
    or cannot be told.
    """
    agents = mover.agents
    if host in inventory.failures:
        raise inventory.failures[host]
    lines: list[str] = []
    failed: list[str] = []
    for scope_id in inventory.scope_ids():
        for it in leftovers(scope_id, inventory):
            if it.host == host:
                remark = await mover.clear(scope_id, it)
                (failed if remark else lines).append(remark or f"{scope_id}: {it.by} serves it; removed here")
    if failed:
        raise HostRefused(f"{host} stays drained: {'; '.join(failed)}")
    for other, view in inventory.views.items():
        if host in view.evacuated:
            await agents.tell(other, SET_EVACUATED, SetEvacuated(host=host))
            lines.append(f"{other} may not take its scopes any more")
    over = int(time.time()) + RECORD_S  # guard: records-about-a-host-that-is-back-are-over
    await agents.tell(host, SET_DRAINED, SetDrained(drained=False, over=over))
    silent = [it for it in inventory.failures if it != host]
    if silent:
        raise HostUnreachable(
            f"{host} takes scopes again, but {', '.join(silent)} did not answer and may still take its scopes",
            hint=f"netloom undrain {host} again, when all hosts answer",
        )
    return [*lines, f"{host} takes scopes again"]
