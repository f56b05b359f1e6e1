"""A whole nftables table as a value, and its text.

One table per namespace. ``fresh`` writes it from nothing; ``swap`` writes one transaction that turns the table
``have`` into the table ``want`` without an instant of half a ruleset.
"""

from __future__ import annotations

import msgspec


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain. ``hook`` is the text of a base chain's head (``type filter hook forward priority filter; policy drop;``)."""

    name: str
    hook: str = ""
    rules: tuple[str, ...] = ()


class NftSet(msgspec.Struct, frozen=True, kw_only=True):
    """A named set or map. ``elements``: key text to value text; a set's values are empty."""

    name: str
    kind: str  # "set" or "map"
    type: str  # "ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"
    flags: str = ""
    elements: dict[str, str] = {}


class Ruleset(msgspec.Struct, frozen=True, kw_only=True):
    """A table: its chains and sets in the order in which they are declared. Same wish, same value."""

    family: str
    table: str
    chains: tuple[Chain, ...] = ()
    sets: tuple[NftSet, ...] = ()
    counters: tuple[str, ...] = ()
