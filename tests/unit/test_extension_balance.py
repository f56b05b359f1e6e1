"""Which scope goes to which host."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from netloom.extension.moves.balance import (
    COMPARED_MAX,
    Planned,
    after,
    balanced,
    difference,
    one_by_one,
    spread,
    tolerance,
)

Scopes = Mapping[str, Mapping[str, int]]

HOSTS = st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=2, max_size=4).map(
    lambda sizes: {
        f"h{host}": {f"net-{host}{number}": size for number, size in enumerate(held)}
        for host, held in enumerate(sizes, 1)
    }
)
MANY = st.lists(st.lists(st.integers(1, 400), max_size=40), min_size=2, max_size=6).map(
    lambda sizes: {
        f"h{host}": {f"net-{host}{number:03}": size for number, size in enumerate(held)}
        for host, held in enumerate(sizes, 1)
    }
)


def loads_of(hosts: Scopes) -> dict[str, int]:
    return {host: sum(scopes.values()) for host, scopes in hosts.items()}


def assert_plan_fits(hosts: Scopes, plan: list[Planned]) -> None:
    """Each move takes a scope from where it is to another host, and no scope moves twice."""
    assert len({it.scope_id for it in plan}) == len(plan)
    for it in plan:
        assert it.target in hosts and it.target != it.source
        assert hosts[it.source][it.scope_id] == it.load


@settings(max_examples=100)
@given(HOSTS)
def test_no_other_placement_is_as_even_with_fewer_moves(hosts: Scopes) -> None:
    assume(len(hosts) ** sum(map(len, hosts.values())) <= COMPARED_MAX)
    plan = balanced(hosts)
    assert_plan_fits(hosts, plan)
    loads = loads_of(hosts)
    allowed = tolerance(loads)
    reached = difference(after(loads, plan))
    scopes = [(scope_id, host, size) for host, held in hosts.items() for scope_id, size in held.items()]
    for homes in itertools.product(hosts, repeat=len(scopes)):
        moves = sum(home != host for home, (_, host, _) in zip(homes, scopes, strict=True))
        now = dict.fromkeys(hosts, 0)
        for home, (_, _, size) in zip(homes, scopes, strict=True):
            now[home] += size
        other = difference(now)
        assert (max(allowed, reached), len(plan), reached) <= (max(allowed, other), moves, other)


@given(MANY)
def test_many_scopes_get_more_even_with_each_move(hosts: Scopes) -> None:
    plan = balanced(hosts)
    assert_plan_fits(hosts, plan)
    loads = loads_of(hosts)
    then = after(loads, plan)
    assert difference(then) <= difference(loads)
    if difference(loads) <= tolerance(loads):
        assert plan == []
    assert sum(then.values()) == sum(loads.values())


@given(st.lists(st.integers(0, 60), min_size=2, max_size=6), st.integers(1, 9))
def test_scopes_of_one_size_take_exactly_the_fewest_moves(counts: list[int], size: int) -> None:
    hosts = {f"h{host}": {f"net-{host}{n:02}": size for n in range(count)} for host, count in enumerate(counts)}
    plan = one_by_one(hosts)
    loads = loads_of(hosts)
    each, more = divmod(sum(counts), len(counts))
    fewest = sum(max(0, count - each - (place < more)) for place, count in enumerate(sorted(counts, reverse=True)))
    assert len(plan) <= fewest
    if tolerance(loads) < size:
        assert len(plan) == fewest
    assert difference(after(loads, plan)) <= max(size, tolerance(loads))


def test_a_new_host_takes_its_share() -> None:
    hosts = {host: {f"net-{number}{n}": 10 for n in range(6)} for number, host in enumerate(("h1", "h2"))}
    plan = balanced({**hosts, "h3": {}})
    assert {it.target for it in plan} == {"h3"}
    assert sorted(it.source for it in plan) == ["h1", "h1", "h2", "h2"]


@pytest.mark.parametrize("hosts", [{}, {"h1": {"net-1": 5}}, {"h1": {"net-1": 5}, "h2": {}}])
def test_what_no_move_makes_more_even_stays(hosts: Scopes) -> None:
    assert balanced(hosts) == []


def test_a_host_is_emptied_to_those_with_the_lowest_load() -> None:
    plan = spread("h1", {"net-1": 5, "net-2": 9, "net-3": 1}, {"h2": 10, "h3": 0})
    assert [(it.scope_id, it.target) for it in plan] == [("net-2", "h3"), ("net-1", "h3"), ("net-3", "h2")]
    assert after({"h2": 10, "h3": 0}, plan) == {"h2": 11, "h3": 14}
