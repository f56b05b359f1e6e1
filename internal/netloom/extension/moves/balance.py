"""Which scope goes to which host. Pure functions.

The load of a host is the sum of the loads of its scopes (``inventory.load``). Hosts are even when their loads differ by
at most a tenth of the mean load. Otherwise, they are as even as moves can make them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Up to so many placements all are compared, and the best one is found. With more scopes, moves are chosen one by one.
COMPARED_MAX = 20_000


@dataclass(frozen=True)
class Planned:
    """A scope that is to go from ``source`` to ``target``."""

    scope_id: str
    source: str
    target: str
    load: int


def spread(source: str, scopes: Mapping[str, int], loads: Mapping[str, int]) -> list[Planned]:
    """Where the scopes of ``source`` go: the largest first, each to the host with the lowest load then.

    ``scopes``: the load of each scope. ``loads``: the load of each host that takes scopes; there is at least one.
    """
    now = dict(loads)
    plan = []
    for scope_id, size in sorted(scopes.items(), key=lambda it: (-it[1], it[0])):
        target = min(now, key=lambda host: now[host])
        now[target] += size
        plan.append(Planned(scope_id, source, target, size))
    return plan


def difference(loads: Mapping[str, int]) -> int:
    """The difference of the highest and the lowest load."""
    return max(loads.values()) - min(loads.values())


def tolerance(loads: Mapping[str, int]) -> int:
    """How much the loads of even hosts may differ."""
    return sum(loads.values()) // len(loads) // 10


def balanced(hosts: Mapping[str, Mapping[str, int]]) -> list[Planned]:
    """The fewest moves that make the hosts even, the largest scopes first.

    ``hosts``: the scopes of each host that takes scopes, with their loads. Of plans with equally few moves, it is the
    one after which the loads differ least. If there are more than ``COMPARED_MAX`` possible placements, the plan may
    be longer than necessary by some moves; each of its moves makes the loads more even.
    """
    if len(hosts) < 2:
        return []
    count = sum(map(len, hosts.values()))
    plan = _best(hosts, count) if len(hosts) ** count <= COMPARED_MAX else one_by_one(hosts)
    return sorted(plan, key=lambda it: (-it.load, it.scope_id))


def _loads(hosts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {host: sum(scopes.values()) for host, scopes in hosts.items()}


def _best(hosts: Mapping[str, Mapping[str, int]], count: int) -> list[Planned]:
    """The best of all placements."""
    loads = _loads(hosts)
    allowed = tolerance(loads)
    best, best_value = list[Planned](), (max(allowed, difference(loads)), 0, difference(loads))
    for moves in range(1, count + 1):
        if best_value[0] <= allowed:  # more moves are not better
            break
        for plan in _plans(hosts, moves):
            rest = difference(after(loads, plan))
            value = (max(allowed, rest), moves, rest)
            if value < best_value:
                best, best_value = plan, value
    return best


def _plans(hosts: Mapping[str, Mapping[str, int]], moves: int) -> Iterator[list[Planned]]:
    """Every plan of so many moves of different scopes."""
    scopes = [(scope_id, host, size) for host, held in hosts.items() for scope_id, size in held.items()]
    for chosen in itertools.combinations(scopes, moves):
        others = [[host for host in hosts if host != source] for _, source, _ in chosen]
        for targets in itertools.product(*others):
            yield [Planned(*it[:2], to, it[2]) for it, to in zip(chosen, targets, strict=True)]


def one_by_one(hosts: Mapping[str, Mapping[str, int]]) -> list[Planned]:
    """Each move goes from the host with the highest load to the one with the lowest, and halves the difference best."""
    now = {host: dict(scopes) for host, scopes in hosts.items()}
    home = {scope_id: host for host, scopes in hosts.items() for scope_id in scopes}
    while True:
        loads = _loads(now)
        gap = difference(loads)
        if gap <= tolerance(loads):
            break
        high, low = max(loads, key=lambda host: loads[host]), min(loads, key=lambda host: loads[host])
        sizes = now[high]
        scope_id = min(sizes, key=lambda it: (abs(gap - 2 * sizes[it]), it))
        if abs(gap - 2 * sizes[scope_id]) >= gap:
            break
        now[low][scope_id] = now[high].pop(scope_id)
    return [
        Planned(scope_id, home[scope_id], host, size)
        for host, scopes in now.items()
        for scope_id, size in scopes.items()
        if home[scope_id] != host
    ]


def after(loads: Mapping[str, int], plan: Sequence[Planned]) -> dict[str, int]:
    """The loads of the hosts after the plan. Hosts that are not in ``loads`` are left out."""
    now = dict(loads)
    for it in plan:
        if it.source in now:
            now[it.source] -= it.load
        if it.target in now:
            now[it.target] += it.load
    return now
