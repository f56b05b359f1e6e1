"""Ticks: the hosts come together, and nobody makes a host much faster."""

from __future__ import annotations

import heapq
import random

import pytest

from netloom.agent.standby.ticks import PULL_S, TICK_S, Ticks

SECONDS = 60.0


def ticks_of(phases: list[float], rates: list[float], delay_s: float) -> list[list[float]]:
    """When the hosts have their ticks, if each one hears the ticks of all others. Their clocks have these rates."""
    hosts = [Ticks(phase) for phase in phases]
    done: list[list[float]] = [[] for _ in hosts]
    messages: list[tuple[float, int]] = []  # when it arrives, and at which host
    now = 0.0
    while now < SECONDS:
        for at, (host, rate) in enumerate(zip(hosts, rates, strict=True)):
            if host.begin(now * rate):
                done[at].append(now)
                for other in range(len(hosts)):
                    if other != at:
                        heapq.heappush(messages, (now + delay_s, other))
        wakes = [host.due / rate for host, rate in zip(hosts, rates, strict=True)]
        now = max(now, min([*wakes, *(arrives for arrives, _ in messages[:1])])) + 1e-6
        while messages and messages[0][0] <= now:
            _, at = heapq.heappop(messages)
            hosts[at].heard(now * rates[at])
    return done


@pytest.mark.parametrize("seed", range(40))
def test_ticks_of_all_hosts_come_together_and_stay_ten_a_second(seed: int) -> None:
    chance = random.Random(seed)
    count, delay_s = chance.randint(2, 5), chance.uniform(0.0001, 0.001)
    phases = [chance.uniform(0.0, TICK_S) for _ in range(count)]
    rates = [chance.uniform(0.9995, 1.0005) for _ in range(count)]
    done = ticks_of(phases, rates, delay_s)
    for at in done[0][-20:-1]:
        assert all(min(abs(it - at) for it in others) <= delay_s + 0.0001 for others in done)
    for it in done:
        assert 0.99 < len(it) / (SECONDS / TICK_S) < 1.025


@pytest.mark.mutation("ticks-stay-ten-a-second", instead="min(pull_s, early_s)")
def test_whoever_sends_all_the_time_makes_a_host_hardly_faster() -> None:
    ticks, count = Ticks(0.0), 0
    for ms in range(round(SECONDS * 1000)):
        ticks.heard(ms / 1000)
        count += ticks.begin(ms / 1000)
    assert count <= SECONDS / (TICK_S - PULL_S) + 2


def test_a_host_hears_others_without_effect_in_the_first_half_of_a_tick() -> None:
    """So two hosts with a slow network between them do not make each other faster and faster."""
    ticks = Ticks(0.0)
    assert ticks.begin(0.0)
    ticks.heard(0.04)
    assert ticks.due == pytest.approx(TICK_S)
    ticks.heard(0.075)
    assert ticks.due == pytest.approx(TICK_S - PULL_S / 2)
    for _ in range(10):
        ticks.heard(0.09)
    assert ticks.due == pytest.approx(TICK_S - PULL_S)
    assert not ticks.begin(0.0975) and ticks.begin(0.0981)
    ticks.heard(0.197)
    assert ticks.begin(0.197), "a tick that is due soon is done at once"


def test_of_ticks_that_were_missed_one_is_made_up_for() -> None:
    ticks = Ticks(0.0)
    assert ticks.begin(5.0) and ticks.begin(5.0) and not ticks.begin(5.0)
    assert ticks.due == pytest.approx(5.0 + TICK_S)
