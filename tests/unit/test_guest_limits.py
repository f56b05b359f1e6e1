"""The limits on the requests of a VM and of a network."""

from __future__ import annotations

import time

import pytest

from netloom.guest import limits


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clock; a test changes it."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def asks(vm: limits.Load, network: limits.Load, times: int) -> int:
    """Send ``times`` requests; returns how many of them are answered."""
    return sum(limits.admitted(vm, network) for _ in range(times))


def test_a_vm_may_send_a_burst_of_requests_and_then_a_fixed_rate(now: list[float]) -> None:
    vm, network = limits.vm_load(), limits.network_load()
    assert asks(vm, network, 1000) == limits.VM_REQUESTS_BURST
    now[0] += 2.0
    assert asks(vm, network, 1000) == 2 * limits.VM_REQUESTS_PER_S
    now[0] += 3600.0
    assert asks(vm, network, 1000) == limits.VM_REQUESTS_BURST


def test_a_vm_that_asks_rarely_is_answered_when_its_network_has_reached_its_limit(now: list[float]) -> None:
    network = limits.network_load()
    floods = [limits.vm_load() for _ in range(20)]
    answered = sum(asks(it, network, 1000) for it in floods)
    # When the network's burst is used up, each of the last ten VMs may still send half of its own burst.
    assert (
        limits.NETWORK_REQUESTS_BURST <= answered <= limits.NETWORK_REQUESTS_BURST + 10 * limits.VM_REQUESTS_BURST / 2
    )
    assert asks(floods[0], network, 1000) == 0
    assert asks(limits.vm_load(), network, 30) == 30
    now[0] += 1.0
    assert sum(asks(it, network, 1000) for it in floods) == limits.NETWORK_REQUESTS_PER_S
