"""Prefixes of one length are one comparison with exact values."""

from __future__ import annotations

import pytest

from netloom.render.prefixes import by_length, is_in, is_not_in

ROWS: dict[str, tuple[list[str], list[str]]] = {
    "none": ([], []),
    "one address": (["192.0.2.1/32"], ["ip saddr 192.0.2.1"]),
    "one prefix": (["192.0.2.0/24"], ["ip saddr 192.0.2.0/24"]),
    "an IPv6 prefix of length 32": (["2001:db8::/32"], ["ip6 saddr 2001:db8::/32"]),
    "addresses": (["192.0.2.1/32", "192.0.2.9/32"], ["ip saddr { 192.0.2.1, 192.0.2.9 }"]),
    "prefixes of one length": (
        ["192.0.2.0/24", "198.51.100.0/24"],
        ["ip saddr & 255.255.255.0 { 192.0.2.0, 198.51.100.0 }"],
    ),
    "two lengths": (["10.0.0.0/8", "192.0.2.0/24"], ["ip saddr 10.0.0.0/8", "ip saddr 192.0.2.0/24"]),
    "both families": (["10.0.0.0/8", "2001:db8::1/128"], ["ip saddr 10.0.0.0/8", "ip6 saddr 2001:db8::1"]),
    "IPv6 prefixes": (
        ["2001:db8:1::/48", "2001:db8:2::/48"],
        ["ip6 saddr & ffff:ffff:ffff:: { 2001:db8:1::, 2001:db8:2:: }"],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_prefixes_of_one_length_are_one_expression(row: str) -> None:
    cidrs, expected = ROWS[row]
    assert [is_in("saddr", group) for group in by_length(cidrs).values()] == expected


def test_a_negated_comparison_has_the_same_form() -> None:
    assert is_not_in("daddr", ["10.1.1.0/24"]) == "ip daddr != 10.1.1.0/24"
    assert is_not_in("daddr", ["10.1.1.0/24", "10.1.2.0/24"]) == ("ip daddr & 255.255.255.0 != { 10.1.1.0, 10.1.2.0 }")
