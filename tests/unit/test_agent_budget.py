"""Recurring checks on a budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from netloom.agent.budget import SHARE, Budget
from netloom.agent.processes import liveness
from netloom.agent.scopes.claims import LOOK_CPU_S, LOOK_EVERY_S
from netloom.agent.scopes.upkeep import (
    CHECK_CPU_S,
    CHECK_EVERY_S,
    COUNT_CPU_S,
    COUNTED_AT_ONCE,
    COUNTS_PER_CHECK,
    TIDY_CPU_S,
    TIDY_EVERY_S,
)

LIMITS = (Path(__file__).parents[2] / "docs" / "operators" / "limits.md").read_text()
SIZES = (10, 100, 1000)
LOOK_CPU_S_PER_NETWORK = 0.00001  # to list the ports of a bridge the kernel looks at all links


def test_a_small_host_checks_at_the_shortest_interval() -> None:
    budget = Budget(share=0.01)
    slow, quick = budget.checks(45.0, cpu_s=0.006), budget.checks(10.0, cpu_s=0.001)
    assert [slow.pause_s(1), quick.pause_s(2)] == [45.0, 5.0]
    assert [slow.pause_s(45), quick.pause_s(40)] == [1.0, 0.25]
    assert budget.factor == pytest.approx(1.0)


@pytest.mark.mutation("checks-keep-to-their-budget", instead="self.every_s")
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


def told(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def test_the_documented_times_until_a_fault_is_noticed_follow_from_the_budget() -> None:
    kinds = ("dnsmasq", "haproxy", "ruleset", "setting", "iptables-legacy", "uplink,")
    times: dict[str, list[str]] = {it: [] for it in kinds}
    for number in SIZES:
        budget = Budget()
        checks = budget.checks(CHECK_EVERY_S, CHECK_CPU_S)
        counts = budget.checks(CHECK_EVERY_S / COUNTS_PER_CHECK, COUNT_CPU_S)
        probes = budget.checks(liveness.EVERY_S, liveness.PROBE_CPU_S)
        tidies = budget.checks(TIDY_EVERY_S, TIDY_CPU_S * number)
        looks = budget.checks(LOOK_EVERY_S, LOOK_CPU_S + LOOK_CPU_S_PER_NETWORK * number)
        for kind, objects in ((checks, number), (counts, number), (probes, number), (tidies, 1), (looks, number)):
            kind.pause_s(objects)
        probed_s = probes.pause_s(number) * number + (liveness.FAILURES - 1) * liveness.PAUSE_S
        times["dnsmasq"].append(told(probed_s + liveness.FAILURES * 2 * liveness.ANSWER_S))
        times["haproxy"].append(told(probed_s + liveness.FAILURES * liveness.ANSWER_S))
        times["ruleset"].append(told(counts.turn_s(number) + counts.pause_s(number) * min(number, COUNTED_AT_ONCE)))
        times["setting"].append(told(checks.pause_s(number) * number))
        times["iptables-legacy"].append(told(tidies.pause_s(1)))
        times["uplink,"].append(told(looks.turn_s(number)))
    section = LIMITS.partition("## How soon a fault is noticed")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("|")]
    found = {it: next(row[-len(SIZES) :] for row in rows if it in row[0]) for it in times}
    assert found == times
    costs = re.findall(r"([\d.]+) ms", section)
    assert [float(it) / 1000 for it in costs] == pytest.approx(
        [CHECK_CPU_S, COUNT_CPU_S, liveness.PROBE_CPU_S, TIDY_CPU_S, LOOK_CPU_S, LOOK_CPU_S_PER_NETWORK]
    )
    assert f"{SHARE:.1%}" in section
