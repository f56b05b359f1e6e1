"""How much a VM and a network may ask for."""

from __future__ import annotations

import time

import pytest

from netloom.guest import limits


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, which stands still until it is set."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def asks(vm: limits.Load, network: limits.Load, times: int) -> int:
    """How many of so many requests are answered."""
    return sum(limits.admitted(vm, network) for _ in range(times))


def test_a_vm_has_a_burst_and_then_its_rate(now: list[float]) -> None:
    vm, network = limits.vm_load(), limits.network_load()
    assert asks(vm, network, 1000) == limits.VM_REQUESTS_BURST
    now[0] += 2.0
    assert asks(vm, network, 1000) == 2 * limits.VM_REQUESTS_PER_S
    now[0] += 3600.0
    assert asks(vm, network, 1000) == limits.VM_REQUESTS_BURST


def test_a_network_has_its_own_and_a_vm_that_asks_for_little_is_answered_all_the_same(now: list[float]) -> None:
    network = limits.network_load()
    floods = [limits.vm_load() for _ in range(20)]
    answered = sum(asks(it, network, 1000) for it in floods)
    # The last ten of them had half a burst each before anybody asked what was left for all.
    assert (
        limits.NETWORK_REQUESTS_BURST <= answered <= limits.NETWORK_REQUESTS_BURST + 10 * limits.VM_REQUESTS_BURST / 2
    )
    assert asks(floods[0], network, 1000) == 0
    assert asks(limits.vm_load(), network, 30) == 30
    now[0] += 1.0
    assert sum(asks(it, network, 1000) for it in floods) == limits.NETWORK_REQUESTS_PER_S
