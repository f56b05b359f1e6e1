"""An nftables table as a value, and the transactions that create or replace it.

A namespace has one table. ``fresh`` creates it from nothing. ``swap`` is one transaction that turns the table ``have``
into ``want``; no packet ever meets half a ruleset. ``take_over`` does the same if only the names of the present objects
are known. Each text creates a marker, an empty set that is named after the digest of the ruleset. It shows which
ruleset a table has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from functools import cached_property, lru_cache

import msgspec
from msgspec.structs import force_setattr

_SHARED_RULES_MAX = 100  # of a chain; rules of tenants are rarely the same
_SHARED_MAX = 2048  # texts; a network has about 250, and most of them are the same for all


@lru_cache(_SHARED_MAX)
def _shared(text: str) -> str:
    """The same object for equal texts."""
    return text


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain. ``hook`` declares a base chain (``type filter hook forward priority filter; policy drop;``)."""

    name: str
    hook: str = ""
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Share the text of the rules with the other networks: most rules are the same for all. A long list is not."""
        if len(self.rules) <= _SHARED_RULES_MAX:
            force_setattr(self, "rules", tuple(map(_shared, self.rules)))  # guard: rules-are-shared


class NftSet(msgspec.Struct, frozen=True, kw_only=True):
    """A named set or map. ``elements``: keys and values as text; the values of a set are empty.

    Rules add the elements of a set with the flag ``dynamic``. It needs a ``size``: the kernel refuses more elements.
    ``timeout``: how long such an element stays without use, e.g. "1m".
    """

    name: str
    kind: str  # "set" or "map"
    type: str  # "ipv4_addr . inet_service : ipv4_addr . inet_service"
    flags: str = ""
    size: int = 0  # 0: the kernel's own
    timeout: str = ""  # of elements that packets add
    elements: dict[str, str] = {}

    def __post_init__(self) -> None:
        force_setattr(self, "name", _shared(self.name))
        force_setattr(self, "type", _shared(self.type))


class Helper(msgspec.Struct, frozen=True, kw_only=True):
    """A conntrack helper object: ``type`` is the kernel's name of the helper. It helps IPv4 and IPv6."""

    name: str
    type: str
    protocol: str


class Ruleset(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A table: its chains and sets in the order of their declarations. The same state gives the same value.

    ``beside``: a table of another family that is loaded in the same transaction. It is replaced as a whole.
    """

    family: str
    table: str
    chains: tuple[Chain, ...] = ()
    sets: tuple[NftSet, ...] = ()
    counters: tuple[str, ...] = ()
    helpers: tuple[Helper, ...] = ()
    beside: Ruleset | None = None

    @cached_property
    def marker(self) -> str:
        """The name of the marker of this ruleset: ``applied_1f0c93ab77de``. 10,000 forwards take 6 ms."""
        return MARKER_PREFIX + hashlib.sha256(_encoder.encode(self)).hexdigest()[:_MARKER_DIGITS]


_encoder = msgspec.msgpack.Encoder(order="deterministic")

# ("chain" | "set" | "map" | "counter" | "ct helper", name)
Name = tuple[str, str]

MARKER_PREFIX = "applied_"
_MARKER_DIGITS = 12

_POLICY = re.compile(r"policy (?:accept|drop);")


def names(ruleset: Ruleset) -> frozenset[Name]:
    """All named objects of the table, including the marker."""
    return frozenset(
        [("chain", it.name) for it in ruleset.chains]
        + [(it.kind, it.name) for it in ruleset.sets]
        + [("counter", it) for it in ruleset.counters]
        + [("ct helper", it.name) for it in ruleset.helpers]
        + [("set", ruleset.marker)]
    )


def fresh(ruleset: Ruleset) -> str:
    """One transaction after which the table is ``ruleset``, whatever it was before.

    It is used for a new table and for repair. It may drop packets that pass at this moment, and it resets the counters.
    """
    table = _table(ruleset)
    return _text(
        [
            f"add table {table}",
            f"delete table {table}",
            *_block(ruleset, [*_marker(ruleset), *_body(ruleset)]),
            *_replaced(ruleset.beside),
        ]
    )


def swap(have: Ruleset, want: Ruleset) -> str:
    """One transaction that turns the present table ``have`` into ``want``; empty if they are equal.

    If only elements differ, only these elements are changed. Otherwise the chains that differ are flushed and written
    again, or all of them if a set or a base chain is created again. Base chains stay hooked, sets and maps keep common
    elements, named counters keep their values, and objects that ``want`` does not have are deleted. Elements are not
    flushed, because an interval map that is flushed and refilled loses
    packets (tried, kernel 6.18). A base chain with another type, hook or priority is created again in the same
    transaction; until it has rules, its policy applies.

    The kernel accepts or refuses the text as a whole.
    """
    if have == want:
        return ""
    return _text(_changes(have, want))  # guard: a-swap-keeps-what-both-have


def _changes(have: Ruleset, want: Ruleset) -> list[str]:
    removed, added = _element_delta(have, want)
    beside = _replaced(want.beside) if have.beside != want.beside else []
    if _shape(have) == _shape(want):
        return [*removed, *added, *_marker_delta(have, want), *beside]
    declared = {it.name: _declaration(it) for it in have.chains}
    present_sets = {it.name: it for it in have.sets}
    created_again: set[Name] = {
        ("chain", it.name) for it in want.chains if declared.get(it.name, _declaration(it)) != _declaration(it)
    }
    in_both = [(present_sets[it.name], it) for it in want.sets if it.name in present_sets]
    created_again |= {(old.kind, old.name) for old, new in in_both if not _same_set(old, new)}
    kept = {old.name for old, new in in_both if _same_set(old, new)}
    present = {it.name: it for it in have.chains}
    # What is created again may be in use by rules that stay the same.
    changed = {it.name for it in want.chains if created_again or present.get(it.name) != it}
    return [*_refill(names(have), created_again, want, kept, changed, removed, added), *beside]


def take_over(present: Collection[Name], want: Ruleset) -> str:
    """Like :func:`swap`, but from a table of which only the names of the objects are known, e.g. after an upgrade.

    All sets and maps are created again, so packets that pass at this moment may be dropped. Named counters keep their
    values. Base chains must have the hooks that ``want`` has. Otherwise the kernel refuses the text and nothing
    changes; use :func:`fresh` then.
    """
    wanted = names(want)
    created_again = {it for it in present if it[0] in ("set", "map") and it in wanted and it[1] != want.marker}
    chains = {it.name for it in want.chains}
    return _text([*_refill(present, created_again, want, frozenset(), chains, [], []), *_replaced(want.beside)])


def _refill(
    present: Collection[Name],
    created_again: set[Name],
    want: Ruleset,
    kept: Collection[str],
    changed: Collection[str],
    removed: list[str],
    added: list[str],
) -> list[str]:
    table, wanted = _table(want), names(want)
    gone = {it for it in present if it not in wanted}
    refilled = msgspec.structs.replace(
        want,
        counters=tuple(it for it in want.counters if ("counter", it) not in present),
        sets=tuple(it for it in want.sets if it.name not in kept),
        chains=tuple(it for it in want.chains if it.name in changed),  # guard: unchanged-chains-keep-their-rules
    )
    declared = _commands(refilled, want.marker)  # guard: sets-are-declared-by-commands
    return [
        # First, because the flush fails if there is no table.
        f"add table {table}",
        *(
            [f"flush table {table}"]
            if len(changed) == len(want.chains)
            else (
                f"flush chain {table} {name}"
                for kind, name in sorted(present)
                if kind == "chain" and (name in changed or (kind, name) in gone)
            )
        ),
        *removed,
        # Maps first: their elements refer to chains and counters, which cannot be deleted while in use.
        *(
            f"delete {kind} {table} {name}"
            for kind, name in sorted(it for it in gone | created_again if it[0] in ("map", "set"))
        ),
        *(f"delete {kind} {table} {name}" for kind, name in sorted(gone) if kind in ("counter", "ct helper")),
        *(f"delete chain {table} {name}" for _, name in sorted(it for it in created_again if it[0] == "chain")),
        *declared,
        *added,
        *(f"delete chain {table} {name}" for _, name in sorted(it for it in gone if it[0] == "chain")),
    ]


def _shape(ruleset: Ruleset) -> tuple[object, ...]:
    """Everything of a ruleset except the elements."""
    return (
        ruleset.family,
        ruleset.table,
        ruleset.chains,
        ruleset.counters,
        ruleset.helpers,
        tuple(_set_shape(it) for it in ruleset.sets),
    )


def _element_delta(have: Ruleset, want: Ruleset) -> tuple[list[str], list[str]]:
    """The commands that delete and that add elements in the sets and maps of both."""
    table = _table(want)
    removed: list[str] = []
    added: list[str] = []
    present = {it.name: it for it in have.sets}
    for new in want.sets:
        old = present.get(new.name)
        if old is None or not _same_set(old, new) or old.elements == new.elements:
            continue
        gone = {key for key, value in old.elements.items() if new.elements.get(key) != value}
        come = {key: value for key, value in new.elements.items() if old.elements.get(key) != value}
        if gone:
            removed += _elements(f"delete element {table} {old.name} {{", dict.fromkeys(gone, ""), "}")
        if come:
            added += _elements(f"add element {table} {new.name} {{", come, "}")
    return removed, added


def _same_set(one: NftSet, other: NftSet) -> bool:
    """Whether two sets are equal except for their elements."""
    return _set_shape(one) == _set_shape(other)


def _set_shape(it: NftSet) -> tuple[object, ...]:
    return it.name, it.kind, it.type, it.flags, it.size, it.timeout


def _replaced(ruleset: Ruleset | None) -> list[str]:
    """The commands that replace a table as a whole."""
    if ruleset is None:
        return []
    table = _table(ruleset)
    return [f"add table {table}", f"delete table {table}", *_block(ruleset, _body(ruleset))]


def _marker_delta(have: Ruleset, want: Ruleset) -> list[str]:
    table = _table(want)
    return [
        f"add set {table} {want.marker} {{ type mark; }}",
        f"delete set {table} {have.marker}",
    ]


def _declaration(chain: Chain) -> str:
    """A base chain's declaration without the policy. The policy can be changed without creating the chain again."""
    return _POLICY.sub("", chain.hook).strip()


def _table(ruleset: Ruleset) -> str:
    return f"{ruleset.family} {ruleset.table}"


def _commands(ruleset: Ruleset, its_marker: str) -> list[str]:
    """The commands that declare the objects of a table, and write the rules of its chains.

    Sets are declared by commands, because nft 0.9.8 crashes if a text deletes a set and declares another one in a block
    ``table { }``. The order is that of the references: maps to chains and counters, then rules to maps.
    """
    table = _table(ruleset)
    lines = [f"add counter {table} {it}" for it in ruleset.counters]
    for helper in ruleset.helpers:
        lines += [f"add ct helper {table} {helper.name} {{", *_helper(helper), "}"]
    for chain in ruleset.chains:
        lines.append(f"add chain {table} {chain.name}" + (f" {{ {chain.hook} }}" if chain.hook else ""))
    lines.append(f"add set {table} {its_marker} {{ type mark; }}")
    for it in ruleset.sets:
        lines += [f"add {it.kind} {table} {it.name} {{", *_set(it), "}"]
    return [*lines, *_block(ruleset, _chains(ruleset))]


def _block(ruleset: Ruleset, body: list[str]) -> list[str]:
    return [f"table {_table(ruleset)} {{", *("\t" + line if line else "" for line in body), "}"]


def _marker(ruleset: Ruleset) -> list[str]:
    return [f"set {ruleset.marker} {{", "\ttype mark;", "}"]


def _body(ruleset: Ruleset) -> list[str]:
    lines: list[str] = []
    for counter in ruleset.counters:
        lines += [f"counter {counter} {{", "}"]
    for helper in ruleset.helpers:
        lines += [f"ct helper {helper.name} {{", *_helper(helper), "}"]
    for it in ruleset.sets:
        lines += ["", f"{it.kind} {it.name} {{", *_set(it), "}"]
    return [*lines, *_chains(ruleset)]


def _helper(helper: Helper) -> list[str]:
    return [f'\ttype "{helper.type}" protocol {helper.protocol};']


def _set(it: NftSet) -> list[str]:
    lines = [f"\ttype {it.type};"]
    if it.size:
        lines.append(f"\tsize {it.size};")
    if it.flags:
        lines.append(f"\tflags {it.flags};")
    if it.timeout:
        lines.append(f"\ttimeout {it.timeout};")
    if it.elements:
        lines += ["\t" + line for line in _elements("elements = {", it.elements, "};")]
    return lines


def _chains(ruleset: Ruleset) -> list[str]:
    lines: list[str] = []
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
