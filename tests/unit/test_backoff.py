"""Backoff: the delays between attempts."""

from __future__ import annotations

import pytest

from netloom.agent.backoff import Backoff


def test_the_last_delay_is_the_maximum() -> None:
    backoff = Backoff((0.0, 0.2, 3.0))
    assert [backoff.delay_s(failures) for failures in range(5)] == [0.0, 0.2, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("max_s", "delays_s"), [(30.0, (1, 2, 4, 8, 16, 30)), (16.0, (1, 2, 4, 8, 16)), (1.0, (1,)), (1.5, (1, 1.5))]
)
def test_delays_double_up_to_the_maximum(max_s: float, delays_s: tuple[float, ...]) -> None:
    assert Backoff.doubling(1.0, max_s).delays_s == delays_s


def test_a_process_that_ran_long_enough_has_no_earlier_failures() -> None:
    backoff = Backoff((0.1, 1.0), settled_s=60.0)
    assert backoff.earlier(3, ran_s=60.0) == 3
    assert backoff.earlier(3, ran_s=60.1) == 0
    assert Backoff((0.1,)).earlier(3, ran_s=1e9) == 3
