"""The parameters of the actions ``pbr-*``: which table, a route in ip-route(8)'s words, a rule in ip-rule(8)'s.

Only the words that are listed here are understood, and every value is a checked address, prefix, number or name: what
comes out is never a text to be run. All functions raise BadRequest with the parameter's path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, get_args

import msgspec

from netloom.errors import BadRequest
from netloom.netobjects import ANYWHERE
from netloom.protocol.scalars import IPv4, IPv4Prefix, LinkName, Number, quoted

_T = TypeVar("_T")

RouteKind = Literal["unicast", "blackhole", "unreachable", "prohibit"]

# Below the tables of the ways out (render.marks). The kernel's own are default, main and local.
TABLE_MAX = 19999
OF_THE_KERNEL = frozenset({253, 254, 255})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}\Z")
_NOT_NAMES = {"default", "main", "local", "all", "unspec"}

# Between the kernel's table of local addresses and the ways out by mark.
PRIORITY_MIN, PRIORITY_MAX = 10000, 19999

_KINDS: tuple[RouteKind, ...] = get_args(RouteKind)
_ROUTE_HINT = (
    "[blackhole|unreachable|prohibit] <prefix>|default [via <address>] [dev <link>] [src <address>], "
    "as in: default via 203.0.113.1 dev pub-101"
)
_RULE_HINT = "[from <prefix>] [to <prefix>] [iif <link>] [priority <number>], as in: from 10.10.1.0/24"


class TableParams(msgspec.Struct, frozen=True, kw_only=True):
    """A table by its number, its name, or both. 0 and empty: not told."""

    number: int = 0
    name: str = ""


class RouteParams(msgspec.Struct, frozen=True, kw_only=True):
    """A route as told; empty: not told. No ``kind``: an ordinary one."""

    destination: str
    kind: RouteKind | None = None
    via: str = ""
    link: str = ""
    source: str = ""


class RuleParams(msgspec.Struct, frozen=True, kw_only=True):
    """A rule as told. Empty: any; ``priority`` 0: not told."""

    source: str = ""
    destination: str = ""
    iif: str = ""
    priority: int = 0


class _TableNumber(Number):
    LOW = 1
    HIGH = TABLE_MAX
    WHAT = "the number of a table"


class _Priority(Number):
    LOW = PRIORITY_MIN
    HIGH = PRIORITY_MAX
    WHAT = "a priority of these rules"


def has_table_params(params: Mapping[str, str]) -> bool:
    """Whether any of a table's parameters says something."""
    return any(params.get(it, "").strip() for it in ("table-id", "id", "table-name", "table"))


def parse_table(params: Mapping[str, str]) -> TableParams:
    """From ``table-id`` (or ``id``) and ``table-name`` (or ``table``, which may be a number as well)."""
    either = params.get("table", "").strip().isdigit()
    number = _one(params, "table-id", "id", *(["table"] if either else []))
    name = _one(params, "table-name", *([] if either else ["table"]))
    if not number and not name:
        raise BadRequest("payload.action-params: no table is named", hint="give table-id or table-name")
    return TableParams(
        number=_parsed("table-id", _number, number) if number else 0,
        name=_parsed("table-name", _table_name, name) if name else "",
    )


def parse_route(params: Mapping[str, str]) -> RouteParams:
    """From ``route``."""
    words = _words(params, "route", _ROUTE_HINT)
    kind = next((it for it in _KINDS if it == words[0]), None)
    if kind is not None:
        words.pop(0)
    if not words:
        raise BadRequest("payload.action-params.route: it leads nowhere", hint=_ROUTE_HINT)
    destination = _parsed("route", _prefix, words.pop(0))
    options = {
        "via": IPv4.parse,  # guard: a-next-hop-is-an-address
        "dev": LinkName.parse,
        "src": IPv4.parse,
    }
    told = _options("route", words, options, _ROUTE_HINT)
    via, link, source = (str(told.get(it, "")) for it in options)
    if kind not in (None, "unicast") and told:
        raise BadRequest(f"payload.action-params.route: {kind} goes without {', '.join(told)}")
    return RouteParams(destination=destination, kind=kind, via=via, link=link, source=source)


def parse_rule(params: Mapping[str, str]) -> RuleParams:
    """From ``rule``."""
    words = _words(params, "rule", _RULE_HINT)
    alike = {"pref": "priority", "preference": "priority", "order": "priority"}
    words[::2] = [alike.get(it, it) for it in words[::2]]
    readers = {"from": _prefix, "to": _prefix, "iif": LinkName.parse, "priority": _Priority.parse}
    told = _options("rule", words, readers, _RULE_HINT)
    if not told.keys() - {"priority"}:
        raise BadRequest("payload.action-params.rule: it says nothing of which packets", hint=_RULE_HINT)
    source, destination = (str(told.get(it, "")) for it in ("from", "to"))
    return RuleParams(
        source="" if source == ANYWHERE else source,
        destination="" if destination == ANYWHERE else destination,
        iif=str(told.get("iif", "")),
        priority=int(str(told.get("priority", 0))),
    )


def _one(params: Mapping[str, str], *names: str) -> str:
    """What these parameters, which are names of the same, have for a value; empty when nothing."""
    told = {params.get(name, "").strip() for name in names} - {""}
    if len(told) > 1:
        raise BadRequest(f"payload.action-params: {' and '.join(names)} say different things")
    return told.pop() if told else ""


def _words(params: Mapping[str, str], param: str, hint: str) -> list[str]:
    words = params.get(param, "").split()
    if not words:
        raise BadRequest(f"payload.action-params.{param} is missing", hint=hint)
    return words


def _options(
    param: str, words: list[str], readers: Mapping[str, Callable[[str], object]], hint: str
) -> dict[str, object]:
    """Pairs of a word and its value, each word once."""
    told: dict[str, object] = {}
    for word, value in zip(words[::2], [*words[1::2], ""], strict=False):
        if word not in readers:
            raise BadRequest(f"payload.action-params.{param}: {quoted(word)} is not understood", hint=hint)
        if word in told or not value:
            why = "is there twice" if word in told else "lacks its value"
            raise BadRequest(f"payload.action-params.{param}: {word} {why}", hint=hint)
        told[word] = _parsed(param, readers[word], value)
    return told


def _parsed(param: str, reader: Callable[[str], _T], value: str) -> _T:
    try:
        return reader(value)
    except ValueError as error:
        raise BadRequest(f"payload.action-params.{param}: {error}") from error


def _number(value: str) -> int:
    number = int(_TableNumber.parse(value))
    if number in OF_THE_KERNEL:
        raise ValueError(f"{number} is a table of the kernel's (default, main, local)")
    return number


def _table_name(value: str) -> str:
    if not _NAME.match(value):  # guard: a-table-name-is-a-name
        raise ValueError(f"{quoted(value)} is not the name of a table (a letter, then letters, digits, dot, dash; 32)")
    if value in _NOT_NAMES:
        raise ValueError(f"{value} is a name of the kernel's")
    return value


def _prefix(value: str) -> str:
    if value in ("default", "all", "any"):
        return ANYWHERE
    if "/" not in value:
        return f"{IPv4.parse(value)}/32"
    prefix = IPv4Prefix.parse(value)
    if prefix.partition("/")[0] != value.partition("/")[0]:
        raise ValueError(f"{quoted(value)} is an address within {prefix}, not a network")
    return str(prefix)
