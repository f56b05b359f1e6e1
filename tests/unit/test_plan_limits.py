"""The host's own limits, by the number of links of networks."""

from __future__ import annotations

import pytest

from netloom.plan.limits import NEIGHBOUR_LIMITS, neighbour_limits

DEFAULTS = dict(zip(NEIGHBOUR_LIMITS, ["1024", "512", "128"] * 2, strict=True))


def by_name(limits: dict[str, str]) -> dict[str, int]:
    return {name.rpartition("/")[2]: int(value) for name, value in limits.items() if "ipv4" in name}


def test_the_neighbour_tables_hold_the_share_of_each_link() -> None:
    for links in (1, 10, 2000):
        found = by_name(neighbour_limits(links, dict(DEFAULTS)))
        assert found["gc_thresh3"] >= 1024 + links * 512
        assert found["gc_thresh1"] < found["gc_thresh2"] < found["gc_thresh3"] < 4 * (1024 + links * 512)
    assert by_name(neighbour_limits(2000, dict(DEFAULTS))) == {
        "gc_thresh1": 131072,
        "gc_thresh2": 524288,
        "gc_thresh3": 1048576,
    }


def test_no_threshold_changes_without_a_network() -> None:
    assert neighbour_limits(0, dict(DEFAULTS)) == {}


@pytest.mark.mutation("an-operators-limit-is-not-lowered", instead="value is not None")
def test_a_limit_of_the_operator_is_not_lowered() -> None:
    present: dict[str, str | None] = dict.fromkeys(NEIGHBOUR_LIMITS, str(1 << 30))
    assert neighbour_limits(1000, present) == {}
    assert neighbour_limits(1000, dict.fromkeys(NEIGHBOUR_LIMITS)) == {}
