"""Address prefixes as nftables expressions without intervals.

An interval set can miss a lookup for an instant while it is replaced (README.md), so rules do not contain one. Prefixes
of the same length can be compared without intervals: the address is masked, and the result is looked up in a set of
exact values, as in ``ip saddr & 255.255.255.0 { 192.0.2.0, 198.51.100.0 }``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_network
from typing import Literal

Family = Literal[4, 6]
Field = Literal["saddr", "daddr"]


def by_length(cidrs: Iterable[str]) -> dict[tuple[Family, int], list[str]]:
    """Group prefixes by family and prefix length; each group fits into one comparison."""
    groups: dict[tuple[Family, int], list[str]] = {}
    for cidr in cidrs:
        groups.setdefault((_family(cidr), int(cidr.partition("/")[2])), []).append(cidr)
    return groups


def is_in(field: Field, group: Sequence[str]) -> str:
    """The expression for an address in one of these prefixes, a group of ``by_length``."""
    return _compared(field, "", group)


def is_not_in(field: Field, group: Sequence[str]) -> str:
    """The expression for an address of the same family that is in none of these prefixes, a group of ``by_length``."""
    return _compared(field, "!= ", group)


def _compared(field: Field, operator: str, group: Sequence[str]) -> str:
    family = _family(group[0])
    address = f"{'ip' if family == 4 else 'ip6'} {field}"
    longest = "/32" if family == 4 else "/128"
    if len(group) == 1:
        return f"{address} {operator}{group[0].removesuffix(longest)}"
    mask = "" if group[0].endswith(longest) else f" & {ip_network(group[0]).netmask}"
    values = ", ".join(cidr.partition("/")[0] for cidr in group)
    return f"{address}{mask} {operator}{{ {values} }}"


def _family(cidr: str) -> Family:
    return 6 if ":" in cidr else 4
