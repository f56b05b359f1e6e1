"""A whole nftables table as a value, and its text.

One table per namespace. ``fresh`` writes it from nothing; ``swap`` writes one transaction that turns the table
``have`` into the table ``want`` without an instant of half a ruleset; ``take_over`` does the same when only the names
of what stands are known. Every text carries a marker, an empty set named after the digest of the whole ruleset, so
that whoever finds the table can tell which ruleset stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

import msgspec


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain. ``hook`` is the head of a base chain (``type filter hook forward priority filter; policy drop;``)."""

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


# ("chain" | "set" | "map" | "counter", name)
Name = tuple[str, str]

MARKER_PREFIX = "applied_"
_MARKER_DIGITS = 12

_POLICY = re.compile(r"policy (?:accept|drop);")


def marker(ruleset: Ruleset) -> str:
    """The name of the empty set that says that exactly this ruleset stands: ``applied_1f0c93ab77de``."""
    return MARKER_PREFIX + hashlib.sha256("\n".join(_body(ruleset)).encode()).hexdigest()[:_MARKER_DIGITS]


def names(ruleset: Ruleset) -> frozenset[Name]:
    """Every named object in the table once ``ruleset`` is applied, the marker included."""
    return frozenset(
        [("chain", it.name) for it in ruleset.chains]
        + [(it.kind, it.name) for it in ruleset.sets]
        + [("counter", it) for it in ruleset.counters]
        + [("set", marker(ruleset))]
    )


def fresh(ruleset: Ruleset) -> str:
    """One transaction after which the table is ``ruleset``, whatever was in it before.

    For the first apply and for repair: packets that are under way while a live table is replaced like this
    may be dropped, and counters start at zero.
    """
    table = _table(ruleset)
    return _text(
        [f"add table {table}", f"delete table {table}", *_block(ruleset, [*_marker(ruleset), *_body(ruleset)])]
    )


def swap(have: Ruleset, want: Ruleset) -> str:
    """One transaction that turns ``have``, which stands, into ``want``; empty when they are equal.

    Where only elements differ it is those elements. Otherwise all rules are flushed and written again; base chains stay
    hooked, sets and maps keep the elements that both have (a flushed and refilled interval map loses packets on the
    way: tried, kernel 6.18), named counters keep their values, and what ``want`` does not have is deleted. A base chain
    whose type, hook or priority changed is made anew in the same transaction: until it is filled, packets meet
    its policy.

    Raises nothing; the kernel refuses the whole text, or takes it whole.
    """
    if have == want:
        return ""
    removed, added = _element_delta(have, want)
    if _shape(have) == _shape(want):
        return _text([*removed, *added, *_marker_delta(have, want)])
    heads = {it.name: _head(it) for it in have.chains}
    types = {it.name: it for it in have.sets}
    remade: set[Name] = {("chain", it.name) for it in want.chains if heads.get(it.name, _head(it)) != _head(it)}
    shared = [(types[it.name], it) for it in want.sets if it.name in types]
    remade |= {(old.kind, old.name) for old, new in shared if not _alike(old, new)}
    kept = {old.name for old, new in shared if _alike(old, new)}
    return _text(_refill(names(have), remade, want, kept, removed, added))  # guard: a-swap-keeps-what-both-have


def take_over(present: Collection[Name], want: Ruleset) -> str:
    """As :func:`swap`, from a table of which only the names of its objects are known (after an upgrade, say).

    All sets and maps are made anew, so packets under way may be dropped; named counters keep their values. Base chains
    are taken to be hooked as ``want`` has them: where they are not, the kernel refuses the text, nothing has
    changed, and :func:`fresh` is the remedy.
    """
    wanted = names(want)
    remade = {it for it in present if it[0] in ("set", "map") and it in wanted and it[1] != marker(want)}
    return _text(_refill(present, remade, want, frozenset(), [], []))


def _refill(
    present: Collection[Name],
    remade: set[Name],
    want: Ruleset,
    kept: Collection[str],
    removed: list[str],
    added: list[str],
) -> list[str]:
    table, wanted = _table(want), names(want)
    gone = {it for it in present if it not in wanted}
    anew = msgspec.structs.replace(want, sets=tuple(it for it in want.sets if it.name not in kept))
    return [
        # First of all, for a text that begins with a flush fails where there is no table.
        f"add table {table}",
        f"flush table {table}",
        *removed,
        # Maps first: their elements hold chains and counters in use.
        *(
            f"delete {kind} {table} {name}"
            for kind, name in sorted(it for it in gone | remade if it[0] in ("map", "set"))
        ),
        *(f"delete counter {table} {name}" for kind, name in sorted(gone) if kind == "counter"),
        *(f"delete chain {table} {name}" for _, name in sorted(it for it in remade if it[0] == "chain")),
        *_block(want, [*_marker(want), *_body(anew)]),
        *added,
        *(f"delete chain {table} {name}" for _, name in sorted(it for it in gone if it[0] == "chain")),
    ]


def _shape(ruleset: Ruleset) -> tuple[object, ...]:
    """All of a ruleset but its elements."""
    return (
        ruleset.family,
        ruleset.table,
        ruleset.chains,
        ruleset.counters,
        tuple((it.name, it.kind, it.type, it.flags) for it in ruleset.sets),
    )


def _element_delta(have: Ruleset, want: Ruleset) -> tuple[list[str], list[str]]:
    """The commands that take away and that add elements of the sets and maps that both have."""
    table = _table(want)
    removed: list[str] = []
    added: list[str] = []
    stands = {it.name: it for it in have.sets}
    for new in want.sets:
        old = stands.get(new.name)
        if old is None or not _alike(old, new):
            continue
        gone = {key for key, value in old.elements.items() if new.elements.get(key) != value}
        come = {key: value for key, value in new.elements.items() if old.elements.get(key) != value}
        if gone:
            removed += _elements(f"delete element {table} {old.name} {{", dict.fromkeys(gone, ""), "}")
        if come:
            added += _elements(f"add element {table} {new.name} {{", come, "}")
    return removed, added


def _alike(one: NftSet, other: NftSet) -> bool:
    """Whether two sets differ in their elements at most."""
    return (one.name, one.kind, one.type, one.flags) == (other.name, other.kind, other.type, other.flags)


def _marker_delta(have: Ruleset, want: Ruleset) -> list[str]:
    table = _table(want)
    return [
        f"add set {table} {marker(want)} {{ type mark; }}",
        f"delete set {table} {marker(have)}",
    ]


def _head(chain: Chain) -> str:
    """A base chain's head without its policy, which alone may change in place."""
    return _POLICY.sub("", chain.hook).strip()


def _table(ruleset: Ruleset) -> str:
    return f"{ruleset.family} {ruleset.table}"


def _block(ruleset: Ruleset, body: list[str]) -> list[str]:
    return [f"table {_table(ruleset)} {{", *("\t" + line if line else "" for line in body), "}"]


def _marker(ruleset: Ruleset) -> list[str]:
    return [f"set {marker(ruleset)} {{", "\ttype mark;", "}"]


def _body(ruleset: Ruleset) -> list[str]:
    lines: list[str] = []
    for counter in ruleset.counters:
        lines += [f"counter {counter} {{", "}"]
    for it in ruleset.sets:
        lines += ["", f"{it.kind} {it.name} {{", f"\ttype {it.type};"]
        if it.flags:
            lines.append(f"\tflags {it.flags};")
        if it.elements:
            lines += ["\t" + line for line in _elements("elements = {", it.elements, "};")]
        lines.append("}")
    for chain in ruleset.chains:
        lines += ["", f"chain {chain.name} {{"]
        if chain.hook:
            lines.append(f"\t{chain.hook}")
        lines += [f"\t{rule}" for rule in chain.rules]
        lines.append("}")
    return lines


def _elements(opening: str, elements: dict[str, str], closing: str) -> list[str]:
    each = [f"{key} : {value}" if value else key for key, value in sorted(elements.items())]
    if len(each) == 1:
        return [f"{opening} {each[0]} {closing}"]
    return [opening, *(f"\t{it}," for it in each[:-1]), f"\t{each[-1]}", closing]


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
