"""The grammar of CloudStack's calls, as hypothesis strategies that are derived from the program's own types.

Commands come from ``commands.TABLE``. The fields of a payload and their types come from its msgspec struct in
``protocol/``. The valid values of a type are those of ``POOL`` that its ``parse`` accepts, and for patterns, numbers
and words also what the class itself says. So a new command, field or type needs no code here, unless the values of the
type are like none in ``POOL``; ``test_payloads.py`` fails then.

Values are few, so that the calls of a sequence concern the same networks, addresses and VMs.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from netloom.commands import TABLE
from netloom.commands.actions import BUILT_IN
from netloom.errors import NetloomError
from netloom.protocol.custom import Params
from netloom.protocol.dhcp import DhcpOptions
from netloom.protocol.firewall import FwRules
from netloom.protocol.reader import Items
from netloom.protocol.scalars import Choice, Content, Number, OptionValue, Pattern
from netloom.protocol.userdata import GivenItem
from netloom.secret import Secret
from netloom.wire import Registration

PAYLOADS = Path(__file__).parents[1] / "payloads"
REAL: list[tuple[str, dict[str, Any]]] = [
    (row["command"], json.loads((PAYLOADS / row["file"]).read_text()))
    for row in json.loads((PAYLOADS / "index.json").read_text())
]

# Every secret value contains this text, and no other value does.
SECRET_MARK = "FAKE-s3cret"
# Every value that tries to leave its place in a configuration file contains this text. No valid value does.
INTRUDER_MARK = "intruder7"


class Call(NamedTuple):
    """A command, and the text of its payload."""

    command: str
    payload: bytes


class Place(NamedTuple):
    """The ids of a network or VPC, and the fields that CloudStack sends with each call about it."""

    scope_id: str
    registration: Registration
    facts: dict[str, Any]


def words(text: str) -> list[str]:
    """The words of a text, which is shorter than a list of them."""
    return text.split()


# Addresses and prefixes that belong together, and values of each other kind.
POOL: tuple[Any, ...] = (
    *words("203.0.113.2 203.0.113.20 198.51.100.7 203.0.113.1 10.10.1.1 10.10.1.45 10.10.1.4 10.20.1.45 10.20.1.1"),
    *words("10.20.2.1 192.0.2.53 0.0.0.0 255.255.255.255 127.0.0.1 224.0.0.1 192.0.2.53,192.0.2.54 null"),
    *words("10.10.1.0/24 10.10.1.7/24 10.20.0.0/16 10.20.1.0/24 203.0.113.0/24 0.0.0.0/0 192.0.2.0/25 192.0.2.10/32"),
    *(" 10.10.1.0/024/ ", *words("10.10.1.0/31 10.0.0.0/8 10.10.1.0/24,10.10.9.0/24")),
    *words("255.255.255.0 255.255.0.0 255.255.255.254 255.255.255.255"),
    *words("2001:db8:50:1::/64 2001:db8:50:1::1 2001:db8:50:1::2a fe80::1 ::/0 ::ffff:192.0.2.1 2001:db8::1/64"),
    *words("02:01:00:cc:00:03 02:01:00:cc:00:04 02-01-00-CC-00-05 02:1:0:CC:0:6 06:00:00:00:00:01"),
    *words("vlan://101 102 1204 untagged vlan://untagged pvlan://1412-i2412 vxlan://5001 4094 16777215"),
    *words("22 80 8080-8090 8085 8000:8090 1-65535 0 65535 65536 8090-8080 204 310 7 5101"),
    *words("a b x-1 web-1 Web.1 cs1cloud.internal example.org h1,h2 [2001:db8::1] host_1.example. eth1 root"),
    *words("true false TRUE tcp udp icmp all tcp,udp t 47 gre \u0666 userdata metadata ftp,sip check pbr-add-route"),
    *words("instance-id local-ipv4 public-keys/0 implemented implementing allocated shutdown"),
    *("dns [udp]", "proxy [tcp-proxy]", '{"12":"x"}'),
    *(0, 1, 2, 22, 80, 100, 8080, 65535, 65536, -1, 8.0, 1000, 30_000, True, False),
)
# What almost fits, or tries to be something else: each part of the program that reads such a value must refuse it, or
# keep it as data.
INTRUDERS: tuple[str, ...] = tuple(
    form.format(INTRUDER_MARK)
    for form in (
        "{}\nserver=/#/192.0.2.66",
        "{}\r\n    bind *:1",
        "{}\0",
        'x"; {} "',
        "{} }} add rule inet filter input accept; {{",
        "x#{}",
        "$({})",
        "`{}`",
        "../../../etc/{}",
        "/etc/{}",
        "..\\{}",
        "--conf-file=/tmp/{}",
        "-o {}",
        "{},drop",
        "{}/24",
        "{};flush ruleset",
        "x\u2028{}",
        "\u202e{}",
        "\x1b[2J{}",
        "{}\x85",
        "%s%n{}",
        "{}\ud800",
        "@{}",
        "${{{}}}",
    )
)
HOSTILE: tuple[Any, ...] = (
    *(None, "", " ", "\0", "\n", "-", "--", ".", "..", "/", "a" * 64, "a" * 256, "x" * 5000, "9" * 50, "9" * 5000),
    *(-1, 1 << 16, 1 << 31, 1 << 63, 1 << 64, 10**25, -(1 << 63), 0.5, 1e300, True, False),
    # Digits of other scripts, and letters that look like others.
    *words("\uff11\uff10.10.1.4 10.10.1.\u0664 \u2170 \u00b2 8O \u0430llow"),
    *("10.10.1.4 ", "10.10.1.4\n", *words("010.10.1.4 10.10.1 10.10.1.256 0x0a0a0104")),
    *("80 - 90", *words("22- -22 80--90 +80 0022 65535-65536 0-0 1e3")),
    *words("10.10.1.0/33 10.10.1.0/-1 10.10.1.0/24/24 /24 ::/129 fe80::1%eth0 02:01:00:cc:00 g2:01:00:cc:00:03"),
    *("Untagged ", "TRUE ", "tcp;", *words("vlan:// vlan://0 vlan://4095 vxlan://0 lswitch://x 1412-i0")),
    *([], {}, [[]], [{}], [None], {"a": None}, {"": ""}, [1, "1", None, {}]),
    *INTRUDERS,
)

VPC_IDS = {"vpc_id": "7"}
_NETWORK = {"network_id": "204", "vlan": "1204", "gateway": "10.10.1.1", "cidr": "10.10.1.0/24"}
_TIERS = [
    {**VPC_IDS, "network_id": number, "vlan": f"1{number}", "gateway": f"10.20.{at}.1", "cidr": f"10.20.{at}.0/24"}
    for at, number in ((1, "310"), (2, "311"))
]
_IP6 = {"network_ip6_gateway": "2001:db8:50:1::1", "network_ip6_cidr": "2001:db8:50:1::/64"}
_PLAIN = Registration(owner="zone-a")
_OTHER = Registration(
    owner="zone-a", ingress_open=True, isolation="vxlan", ip6_gateway="fe80::1", ip6_address="2001:db8:99::/64"
)
PLACES: dict[str, list[Place]] = {
    "net-204": [
        Place("net-204", registration, {**_NETWORK, **more, "network_state": state})
        for registration, more, state in product(
            (_PLAIN, _OTHER), ({}, {"guest_type": "shared"}, _IP6), ("implemented", "implementing", "shutdown")
        )
    ],
    "vpc-7": [
        *(Place("vpc-7", _PLAIN, {**it, "network_state": "implemented"}) for it in _TIERS),
        Place("vpc-7", _OTHER, {**_TIERS[0], "network_state": "implementing", **_IP6}),
        Place("vpc-7", _PLAIN, {**VPC_IDS, "vpc_cidr": "10.20.0.0/16"}),
    ],
}
# The commands about a VPC as a whole have no network.
_OF_A_NETWORK = {name for name, row in TABLE.items() if "network_id" in row.payload.__struct_fields__}


# ---- the valid values of a type


def accepts(kind: Any, value: object) -> bool:
    """Whether the ``parse`` of a type accepts the value."""
    try:
        kind.parse(value)
    except (ValueError, NetloomError):
        return False
    return True


@functools.cache
def examples(kind: Any) -> tuple[Any, ...]:
    """The values of ``POOL`` that the type accepts."""
    return tuple(it for it in POOL if accepts(kind, it))


@functools.cache
def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values as JSON has them for a type of the protocol, nearly all of them valid."""
    if kind in _COMPOSED:
        composed: st.SearchStrategy[Any] = _COMPOSED[kind]()
        return composed
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*(values(it) for it in get_args(kind) if it is not type(None)))
    if origin in (tuple, list):
        return st.lists(values(get_args(kind)[0]), max_size=3)
    if origin is dict or kind is dict:
        return st.dictionaries(texts, st.sampled_from(POOL), max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return objects(kind)
    if isinstance(kind, type) and issubclass(kind, Items):
        return st.lists(objects(_item_of(kind)) | objects(_item_of(kind), more=REVOKED), max_size=4)
    if isinstance(kind, type) and issubclass(kind, Secret):
        return st.sampled_from([it for it in SECRETS if accepts(kind, it)])
    return _scalars(kind)


def _item_of(kind: Any) -> Any:
    """The struct ``T`` of a class that is derived from ``Items[T]``."""
    return next(get_args(base)[0] for base in kind.__orig_bases__ if get_origin(base) is Items)


def _scalars(kind: Any) -> st.SearchStrategy[Any]:
    found = [st.sampled_from(examples(kind))] if examples(kind) else []
    if isinstance(kind, type) and issubclass(kind, Choice):
        found.append(st.sampled_from(kind.WORDS))
    elif isinstance(kind, type) and issubclass(kind, Number):
        edges = (kind.LOW, kind.HIGH, str(kind.LOW), str(kind.HIGH))
        found.append(st.sampled_from([it for it in edges if accepts(kind, it)]))
    elif isinstance(kind, type) and issubclass(kind, Pattern):
        usual = examples(kind)[0] if examples(kind) else ""
        drawn = st.from_regex(kind.PATTERN, fullmatch=True)
        found.append(drawn.map(lambda it: it if accepts(kind, it) else usual))
    return st.one_of(*found) if found else texts


def objects(shape: Any, *, more: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the fields of a struct, under their names in JSON or an older one. Optional ones may be missing."""
    kinds = get_type_hints(shape)
    named = {it.encode_name: values(kinds[it.name]) for it in msgspec.structs.fields(shape)}
    required = {it.encode_name for it in msgspec.structs.fields(shape) if it.required}
    aliases: dict[str, str] = getattr(shape, "ALIASES", {})
    optional = {
        **{name: it for name, it in named.items() if name not in required},
        **{old: named[new] for old, new in aliases.items()},
        **(more or {}),
    }
    return _some({name: named[name] for name in required}, optional)


@st.composite
def _some(
    draw: st.DrawFn, required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]
) -> dict[str, Any]:
    """All required fields and some optional ones. One draw chooses them, because there may be thirty."""
    # Bits of bytes: hypothesis prefers small numbers, so the fields at the end would be rare.
    chosen = int.from_bytes(draw(st.binary(min_size=4, max_size=4)), "big")
    some = [it for at, it in enumerate(optional.items()) if chosen >> at & 1]
    return {name: draw(strategy) for name, strategy in (*required.items(), *some)}


texts = st.text(max_size=12) | st.sampled_from([it for it in POOL if isinstance(it, str)])
SECRETS = (
    "",
    SECRET_MARK,
    f"{SECRET_MARK} é",
    *(
        f"{before}{SECRET_MARK}{after}"
        for before, after in product(("#!/bin/sh\n", "\x1f\x8b\0"), ("", "\n", "x" * 5000))
    ),
)
_HOSTILE_SECRETS = (
    *SECRETS,
    [SECRET_MARK],
    {SECRET_MARK: SECRET_MARK},
    SECRET_MARK + "\ud800",
    "x" * 70_000 + SECRET_MARK,
)
REVOKED = {name: st.sampled_from([True, False, "true", "TRUE", 1]) for name in ("revoke", "revoked")}
_WORDS = (
    *words("default blackhole unreachable via dev src from to iif priority all fwmark 10.10.1.0/24 203.0.113.1"),
    *(*words("192.0.2.0/25 pub-101 gst-204 10001 20000"), *INTRUDERS[:4]),
)
_action_params = st.fixed_dictionaries(
    {},
    optional={
        "route": st.lists(st.sampled_from(_WORDS), max_size=7).map(" ".join),
        "rule": st.lists(st.sampled_from(_WORDS), max_size=7).map(" ".join),
        "table": st.sampled_from(["a", "101", "main", "253", "20000", *INTRUDERS]),
        **{name: st.sampled_from(["100", "101", "0", "253", "9" * 30, "²"]) for name in ("table-id", "id")},
        "table-name": st.sampled_from(["a", "b", "local", "A" * 33, *INTRUDERS]),
        "filter": texts,
        "skip": st.sampled_from(["0", "-1", "²", "9" * 10]),
        "x": texts,
    },
)
# Types whose ``parse`` takes an object that no struct describes.
_COMPOSED: dict[Any, Any] = {
    FwRules: lambda: st.fixed_dictionaries(
        {
            "default_egress_allow": st.sampled_from([True, False, "true"]),
            "rules": st.lists(objects(_item_of(FwRules)), max_size=4),
        }
    ),
    Params: lambda: _action_params,
    DhcpOptions: lambda: st.dictionaries(
        st.sampled_from(words("1 6 12 15 26 43 51 66 119 121 252")),
        values(OptionValue),
        max_size=4,
    ),
    # CloudStack's names of items are no secrets, though a tenant chooses some.
    GivenItem: lambda: st.fixed_dictionaries(
        {
            "dir": st.sampled_from(["userdata", "metadata", "password", "meta-data", "../x"]),
            "file": st.sampled_from([*words("user_data instance-id public-keys vm_password ../x a/b"), *INTRUDERS]),
            "content": values(Content),
        }
    ),
}


# ---- payloads


@st.composite
def payloads(draw: st.DrawFn, command: str, place: Place) -> dict[str, Any]:
    """A payload of the command about ``place``. Its own fields sometimes differ from the facts of the place."""
    payload: dict[str, Any] = draw(_drawn(command))
    facts = place.facts
    if command not in _OF_A_NETWORK:
        facts = {key: it for key, it in facts.items() if key.startswith("vpc")}
    own = draw(st.integers(0, (1 << len(facts)) - 1) | st.just(0) | st.just(0))
    payload |= {key: it for at, (key, it) in enumerate(facts.items()) if not own >> at & 1 or key not in payload}
    if command == "custom-action":
        payload["action"] = draw(
            st.sampled_from([it for it in BUILT_IN if it.startswith("pbr")]) | st.sampled_from(BUILT_IN)
        )
    return payload


@functools.cache
def _drawn(command: str) -> st.SearchStrategy[dict[str, Any]]:
    return objects(TABLE[command].payload)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value inside ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, it in inner for place in places_in(it, (*path, key)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    return _at(value[path[0]], path[1:]) if path else value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of ``value`` with ``new`` at the path."""
    if not path:
        return new
    if isinstance(value, dict):
        return {key: put(it, path[1:], new) if key == path[0] else it for key, it in value.items()}
    return [put(it, path[1:], new) if index == path[0] else it for index, it in enumerate(value)]


@st.composite
def spoilt(draw: st.DrawFn, payload: dict[str, Any]) -> dict[str, Any]:
    """The payload with one or two values replaced by hostile ones."""
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(places_in(payload)[1:] or [()]))
        if where:
            old = _at(payload, where)
            secret = isinstance(old, str) and SECRET_MARK in old
            payload = put(payload, where, draw(st.sampled_from(_HOSTILE_SECRETS if secret else HOSTILE)))
    return payload


def as_json(value: object, *, ascii_only: bool = True) -> bytes:
    """JSON text. Half surrogates are written as they are if not ``ascii_only``: that is not valid UTF-8."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def _damaged(text: bytes, how: int) -> bytes:
    """JSON that no program writes: a key twice, deep nesting, a huge number, text that goes on, a megabyte."""
    inside = text.rstrip(b"}")
    return (
        inside + b',"network_id":"205"}',
        inside + b',"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        inside + b',"x":1' + b"0" * 5000 + b"}",
        inside + b',"x":NaN}',
        inside + b',"hostname":"' + b"x" * 1_000_000 + b'"}',
        inside + b',"x":"\\ud800"}',
        text + b"{}",
        text[:-1],
        b"\xef\xbb\xbf" + text,
        b"[" + text + b"]",
        text.replace(b":", b": \x00", 1),
        text.replace(b'"', b"\xff", 1),
    )[how]


_DAMAGES = 12


@st.composite
def calls(draw: st.DrawFn, scope_id: str) -> tuple[Call, Place]:
    """A call about the scope: of five about three are valid, one has hostile values, one hostile JSON or real ones."""
    place = draw(st.sampled_from(PLACES[scope_id]))
    command = draw(st.sampled_from(COMMANDS))
    payload = draw(payloads(command, place))
    kind = draw(st.integers(0, 9))
    if kind in (6, 7, 8):
        payload = draw(spoilt(payload))
    text = as_json(payload, ascii_only=kind != 8)
    return Call(command, _damaged(text, draw(st.integers(0, _DAMAGES - 1))) if kind == 9 else text), place


COMMANDS = sorted(TABLE)
# Walks begin with a part of these calls: without networks, addresses and services there is little to change.
_PUBLIC = {"public_ip": "203.0.113.2", "public_vlan": "101", "public_gateway": "203.0.113.1", "source_nat": "true"}
_SERVED = {"nic_uuid": "a", "mac": "02:01:00:cc:00:03", "domain": "cs1cloud.internal", "hostname": "web-1"}


def _beginning(network: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    guest = network["gateway"][:-1] + "45"
    facts = {**network, "network_state": "implemented"}
    rule = {"id": 1, "publicIp": "203.0.113.2", "publicPort": 80, "backends": [{"ip": guest, "port": 80}]}
    return [
        ("implement-network", {**facts, "extension_ip": network["gateway"]}),
        ("assign-ip", {**facts, **_PUBLIC, "public_cidr": "203.0.113.0/24"}),
        ("add-dns-entry", {**facts, **_SERVED, "ip": guest, "netmask": "255.255.255.0"}),
        ("apply-lb-rules", {**facts, "lb_rules": [rule]}),
    ]


BEGINNINGS = {
    "net-204": _beginning(_NETWORK),
    "vpc-7": [
        ("implement-vpc", {**VPC_IDS, "vpc_cidr": "10.20.0.0/16"}),
        *_beginning(_TIERS[1]),
        *_beginning(_TIERS[0]),
    ],
}


@st.composite
def walks(draw: st.DrawFn, max_size: int = 8) -> tuple[str, list[tuple[Call, Place]]]:
    """A scope and a sequence of calls about it."""
    scope_id = draw(st.sampled_from(sorted(PLACES)))
    usual = BEGINNINGS[scope_id]
    begin = [Call(command, as_json(it)) for command, it in usual[: draw(st.integers(0, len(usual)))]]
    return scope_id, [
        *((call, PLACES[scope_id][0]) for call in begin),
        *draw(st.lists(calls(scope_id), min_size=1, max_size=max_size)),
    ]


def hostile_texts(payload: bytes) -> Iterable[str]:
    """The hostile texts that occur in a payload."""
    text = payload.decode("utf-8", "replace") if INTRUDER_MARK.encode() in payload else ""
    return [it for it in INTRUDERS if it in text or json.dumps(it)[1:-1] in text]


def scalar_types() -> set[Any]:
    """Every type with ``parse`` that a field of a payload has, at any depth."""
    found: set[Any] = set()

    def visit(kind: Any) -> None:
        if kind in found:
            return
        if hasattr(kind, "parse"):
            found.add(kind)
        if isinstance(kind, type) and issubclass(kind, Items):
            visit(_item_of(kind))
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            for it in get_type_hints(kind).values():
                visit(it)
        for it in get_args(kind):
            visit(it)

    for row in TABLE.values():
        visit(row.payload)
    return found
