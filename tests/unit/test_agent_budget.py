"""Recurring checks on a budget."""

from __future__ import annotations

import pytest

from netloom.agent.budget import Budget


def test_a_small_host_checks_at_the_shortest_interval() -> None:
    budget = Budget(share=0.01)
    slow, quick = budget.checks(45.0, cpu_s=0.006), budget.checks(10.0, cpu_s=0.001)
    assert [slow.pause_s(1), quick.pause_s(2)] == [45.0, 5.0]
    assert [slow.pause_s(45), quick.pause_s(40)] == [1.0, 0.25]
    assert budget.factor == pytest.approx(1.0)


@pytest.mark.mutation("checks-keep-to-their-budget", instead="self._every_s / number")
@pytest.mark.parametrize("number", [100, 1000, 10_000])
def test_many_networks_use_no_more_than_the_budget(number: int) -> None:
    budget = Budget(share=0.01)
    slow, quick = budget.checks(45.0, cpu_s=0.006), budget.checks(10.0, cpu_s=0.001)
    for checks in (slow, quick):
        checks.pause_s(number)
    used = 0.006 / slow.pause_s(number) + 0.001 / quick.pause_s(number)
    assert used == pytest.approx(0.01)
    # Both kinds are stretched by the same factor.
    assert slow.pause_s(number) / quick.pause_s(number) == pytest.approx(4.5)


def test_dearer_checks_are_rarer_and_one_that_was_dear_does_not_count_for_long() -> None:
    budget = Budget(share=0.01)
    checks = budget.checks(45.0, cpu_s=0.0045)
    assert checks.pause_s(100) == pytest.approx(0.45)
    checks.used(1.0)
    assert checks.pause_s(100) > 5.0
    for _ in range(200):
        checks.used(0.009)
    assert checks.pause_s(100) == pytest.approx(0.9, rel=0.01)


def test_a_kind_of_checks_without_objects_leaves_the_budget_to_the_others() -> None:
    budget = Budget(share=0.01)
    budget.checks(10.0, cpu_s=0.001)
    other = budget.checks(45.0, cpu_s=0.0045)
    assert other.pause_s(100) == pytest.approx(0.45)
