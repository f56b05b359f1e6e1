"""Firewall rules become few lines, in which nothing overlaps and nothing is an interval set."""

from __future__ import annotations

from typing import Literal

import pytest
from msgspec.structs import replace

from netloom.render import firewall
from netloom.render.firewall import LINES_MAX, cidrs, verdicts
from netloom.state import FirewallRule
from unit.scopes import A1, admit, egress

ROWS: dict[str, tuple[list[FirewallRule], list[str]]] = {
    "nothing": ([], []),
    "one port from everywhere": ([admit(A1, "tcp", "22", "0.0.0.0/0")], ["tcp dport 22 accept"]),
    "ports of one prefix": (
        [admit(A1, "tcp", "443", "10.0.0.0/8"), admit(A1, "tcp", "22", "10.0.0.0/8")],
        ["ip saddr 10.0.0.0/8 tcp dport { 22, 443 } accept"],
    ),
    "prefixes of one port": (
        [admit(A1, "tcp", "22", "10.0.0.1/32"), admit(A1, "tcp", "22", "10.0.0.9/32", "192.0.2.0/24")],
        ["ip saddr 192.0.2.0/24 tcp dport 22 accept", "ip saddr { 10.0.0.1, 10.0.0.9 } tcp dport 22 accept"],
    ),
    "prefixes of one length": (
        [admit(A1, "udp", "53", "10.1.0.0/16", "10.3.0.0/16")],
        ["ip saddr & 255.255.0.0 { 10.1.0.0, 10.3.0.0 } udp dport 53 accept"],
    ),
    "overlapping prefixes and ranges": (
        [admit(A1, "tcp", "20-30", "10.0.0.0/8"), admit(A1, "tcp", "25-40", "10.0.0.0/8", "10.9.0.0/16"),
         admit(A1, "tcp", "22", "10.0.0.0/8"), admit(A1, "tcp", "50", "10.0.0.0/8")],
        ["ip saddr 10.0.0.0/8 tcp dport 20-40 accept", "ip saddr 10.0.0.0/8 tcp dport 50 accept"],
    ),
    "every port": ([admit(A1, "tcp")], ["tcp dport 0-65535 accept"]),
    "everything": ([admit(A1, "all")], ["accept"]),
    "everything from somewhere": ([admit(A1, "all", "", "192.0.2.1/32")], ["ip saddr 192.0.2.1 accept"]),
    "icmp": (
        [admit(A1, "icmp", type=8, code=0), admit(A1, "icmp", type=13, code=-1)],
        ["icmp type 13 accept", "icmp type 8 icmp code 0 accept"],
    ),
    "any icmp": ([admit(A1, "icmp", type=-1, code=-1), admit(A1, "icmp")], ["meta l4proto icmp accept"]),
    "IPv6 prefixes only match no IPv4 packet": ([admit(A1, "tcp", "22", "::/0")], []),
    "IPv6 beside IPv4": ([admit(A1, "tcp", "22", "::/0", "10.0.0.0/8")], ["ip saddr 10.0.0.0/8 tcp dport 22 accept"]),
    "host bits are ignored": ([admit(A1, "tcp", "22", "10.1.2.3/8")], ["ip saddr 10.0.0.0/8 tcp dport 22 accept"]),
    "source and destination": (
        [egress("udp", "53", sources=("10.1.1.0/24",), dests=("192.0.2.1/32", "192.0.2.2/32"))],
        ["ip saddr 10.1.1.0/24 ip daddr { 192.0.2.1, 192.0.2.2 } udp dport 53 accept"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_lines(row: str) -> None:
    rules, expected = ROWS[row]
    lines, chains = verdicts(rules, "accept", "at")
    assert sorted(lines) == sorted(expected)
    assert chains == []


def test_many_lines_are_divided_into_chains_by_port() -> None:
    rules = [admit(A1, "tcp", f"{at}-{at + 5}" if at % 3 else str(at), f"10.0.{at % 250}.{at // 250}/32")
             for at in range(1, 1001)]  # fmt: skip
    lines, chains = verdicts(rules, "accept", "at")
    assert len(lines) <= LINES_MAX
    assert all(len(it.rules) <= LINES_MAX for it in chains)
    assert sum(len(it.rules) for it in chains) == 1000
    # A jump's span covers every port of its chain.
    for line, chain in zip(lines, chains, strict=True):
        span = [int(it) for it in line.split()[2].split("-")]
        for rule in chain.rules:
            ports = [int(it) for it in rule.split("dport ")[1].split()[0].split("-")]
            assert span[0] <= ports[0] <= ports[-1] <= span[-1]


def many(count: int) -> list[FirewallRule]:
    return [replace(admit(A1, "tcp", str(at), f"10.0.{at % 250}.{at // 250}/32"), rule_id=at) for at in range(count)]


def test_one_rule_more_changes_one_part() -> None:
    rules = many(1000)
    lines, chains = verdicts(rules, "accept", "at")
    for left_out in range(0, 1000, 97):
        fewer, others = verdicts([it for it in rules if it.rule_id != left_out], "accept", "at")
        # At the end of a part, two parts become one, or one has another name.
        assert len(set(chains) ^ set(others)) <= 4
        assert len(set(lines) ^ set(fewer)) <= 4


def test_a_rule_that_stays_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts(many(300), "accept", "at")
    rendered: list[tuple[str, ...]] = []

    def counted(given: tuple[str, ...], family: Literal[4, 6] = 4) -> tuple[str, ...] | None:
        rendered.append(given)
        return cidrs(given, family)

    monkeypatch.setattr(firewall, "cidrs", counted)
    verdicts([*many(300), replace(admit(A1, "tcp", "5000", "192.0.2.77/32"), rule_id=300)], "accept", "at")
    assert rendered == [("192.0.2.77/32",), ()]


def test_a_thousand_ports_open_to_all_are_one_line() -> None:
    lines, chains = verdicts([admit(A1, "tcp", str(2 * at)) for at in range(1, 1001)], "accept", "at")
    assert len(lines) == 1
    assert chains == []


def test_cidrs_collapse() -> None:
    assert cidrs(["10.0.0.0/25", "10.0.0.128/25", "10.0.0.7/32"]) == ("10.0.0.0/24",)
    assert cidrs(["0.0.0.0/0", "10.0.0.7/32"]) == ()
    assert cidrs([]) == ()
    assert cidrs(["::/0"]) is None
