"""Firewall rules as text: which packets a list of equal verdicts is about, in few lines.

All ingress rules of an address allow, and all egress rules of a network have one verdict: their order means nothing.
So rules that differ in one thing only are merged, and ports and prefixes become sets without overlaps, which the
kernel would refuse. What is left above some dozens of lines is looked up by port instead of tried line by line.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import collapse_addresses
from itertools import pairwise
from typing import Literal

import msgspec

from netloom.render.live import subnet
from netloom.render.ruleset import Chain, NftSet
from netloom.state import FirewallRule

PORTS = (0, 65535)

# A linear chain of some dozens of lines costs a new flow under 10 us; a thousand cost 32 (measured 2026).
LINES_MAX = 32

Cidrs = tuple[str, ...]  # sorted, collapsed; empty: any
Ranges = tuple[tuple[int, int], ...]  # sorted, disjoint; empty: any


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """What a line is about. Empty and ``None`` mean any."""

    protocol: str
    ports: Ranges = ()
    icmp_type: int | None = None
    icmp_code: int | None = None
    sources: Cidrs = ()
    dests: Cidrs = ()

    def text(self) -> str:
        """The nftables expressions, without a verdict; empty: every packet."""
        words = [*_addresses("saddr", self.sources), *_addresses("daddr", self.dests)]
        match self.protocol:
            case "tcp" | "udp":
                words.append(f"{self.protocol} dport {_ports(self.ports)}")
            case "icmp" if self.icmp_type is None:
                words.append("meta l4proto icmp")
            case "icmp":
                words.append(f"icmp type {self.icmp_type}")
                if self.icmp_code is not None:
                    words.append(f"icmp code {self.icmp_code}")
        return " ".join(words)


def cidrs(given: Iterable[str]) -> Cidrs | None:
    """IPv4 prefixes without overlaps; empty for any, ``None`` for a list that no IPv4 packet is in (all IPv6)."""
    listed = tuple(given)
    four = [subnet(it) for it in listed if ":" not in it]
    if listed and not four:
        return None
    merged = tuple(str(it) for it in collapse_addresses(four))
    return () if merged == ("0.0.0.0/0",) else merged


def matches(rules: Iterable[FirewallRule]) -> list[Match]:
    """What ``rules`` are about, merged, in an order that depends on nothing but them."""
    found: list[Match] = []
    for rule in rules:
        sources, dests = cidrs(rule.source_cidrs), cidrs(rule.dest_cidrs)
        if sources is None or dests is None:
            continue
        if rule.protocol in ("tcp", "udp"):
            ports = (rule.ports.first, rule.ports.last) if rule.ports else PORTS
            found.append(Match(protocol=rule.protocol, ports=(ports,), sources=sources, dests=dests))
        elif rule.protocol == "icmp":
            # CloudStack's -1 is any; a code without a type says nothing.
            type_ = rule.icmp_type if rule.icmp_type is not None and rule.icmp_type >= 0 else None
            code = rule.icmp_code if type_ is not None and (rule.icmp_code or 0) >= 0 else None
            found.append(Match(protocol="icmp", icmp_type=type_, icmp_code=code, sources=sources, dests=dests))
        else:
            found.append(Match(protocol="all", sources=sources, dests=dests))
    found = _merge(found, "sources")
    found = _merge(found, "dests")
    found = _merge(found, "ports")
    return sorted(found, key=_order)


def verdicts(
    rules: Iterable[FirewallRule], verdict: str, prefix: str
) -> tuple[tuple[str, ...], list[Chain], list[NftSet]]:
    """The lines that give ``verdict`` to what ``rules`` are about, with the chains and maps that they look up.

    ``prefix`` begins the names of those. Other packets come out at the end of the lines.
    """
    wanted = matches(rules)
    lines: list[str] = []
    chains: list[Chain] = []
    maps: list[NftSet] = []
    for protocol in ("all", "icmp", "tcp", "udp"):
        mine = [it for it in wanted if it.protocol == protocol]
        dispatch = _by_port(mine, verdict, f"{prefix}_{protocol}") if len(mine) > LINES_MAX else None
        if dispatch is None or protocol not in ("tcp", "udp"):
            lines += [f"{it.text()} {verdict}".strip() for it in mine]
            continue
        lookup, behind = dispatch
        # A named map: its elements live through a swap, those of a map inside a rule would be missing for an instant.
        lines.append(f"{protocol} dport vmap @{lookup.name}")
        maps.append(lookup)
        chains += behind
    return tuple(lines), chains, maps


def _by_port(found: list[Match], verdict: str, name: str) -> tuple[NftSet, list[Chain]] | None:
    """One map from ports to chains that look at the addresses; ``None`` where it would be larger than the lines."""
    ranges = [(first, last, it) for it in found for first, last in it.ports]
    edges = sorted({it[0] for it in ranges} | {it[1] + 1 for it in ranges})
    size_max = 64 * len(found) + 1024
    elements: dict[str, str] = {}
    chains: dict[tuple[str, ...], Chain] = {}
    opening = sorted(ranges, key=lambda it: it[0])
    at = size = 0
    active: list[tuple[int, int, Match]] = []
    for first, after in pairwise(edges):
        active = [it for it in active if it[1] >= first]
        while at < len(opening) and opening[at][0] <= first:
            active.append(opening[at])
            at += 1
        if not active:
            continue
        size += len(active)
        if size > size_max:
            return None
        addressed = [Match(protocol="all", sources=it.sources, dests=it.dests) for _, _, it in active]
        addressed = sorted(_merge(_merge(addressed, "sources"), "dests"), key=_order)
        body = tuple(f"{it.text()} {verdict}".strip() for it in addressed)
        key = str(first) if after - 1 == first else f"{first}-{after - 1}"
        if body == (verdict,):
            elements[key] = verdict
            continue
        chain = chains.setdefault(body, Chain(name=f"{name}_{first}", rules=body))
        elements[key] = f"jump {chain.name}"
    return NftSet(name=name, kind="map", type="inet_service : verdict", flags="interval", elements=elements), [
        *chains.values()
    ]


def _merge(found: list[Match], field: Literal["sources", "dests", "ports"]) -> list[Match]:
    """Matches that differ in one field only become one match with the union of it."""
    groups: dict[Match, list[Match]] = {}
    for it in found:
        groups.setdefault(msgspec.structs.replace(it, **{field: ()}), []).append(it)
    union = _ports_of if field == "ports" else _prefixes_of
    return [
        msgspec.structs.replace(base, **{field: union([getattr(it, field) for it in group])})
        for base, group in groups.items()
    ]


def _prefixes_of(values: list[Cidrs]) -> Cidrs:
    if () in values:
        return ()
    return values[0] if len(values) == 1 else cidrs({it for value in values for it in value}) or ()


def _ports_of(values: list[Ranges]) -> Ranges:
    if () in values:
        return ()
    merged: list[tuple[int, int]] = []
    for first, last in sorted({it for value in values for it in value}):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def _order(match: Match) -> tuple[object, ...]:
    type_, code = match.icmp_type, match.icmp_code
    return (
        match.protocol,
        match.ports,
        -1 if type_ is None else type_,
        -1 if code is None else code,
        match.sources,
        match.dests,
    )


def _addresses(field: str, prefixes: Cidrs) -> list[str]:
    if not prefixes:
        return []
    shown = [it.removesuffix("/32") for it in prefixes]
    return [f"ip {field} {shown[0]}" if len(shown) == 1 else f"ip {field} {{ {', '.join(shown)} }}"]


def _ports(ranges: Ranges) -> str:
    each = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return each[0] if len(each) == 1 else f"{{ {', '.join(each)} }}"
