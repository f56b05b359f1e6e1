"""List the chains and rules of all tables of a namespace over netlink, those of other programs too.

Numbers and attributes: linux/netfilter/nf_tables.h. Numbers inside attributes are big endian.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket

PREROUTING, FORWARD = 0, 2  # NF_INET_*

_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GETTABLE = _SUBSYSTEM | 1
_GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = _SUBSYSTEM | 4, _SUBSYSTEM | 7, _SUBSYSTEM | 10, _SUBSYSTEM | 13
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}  # NFPROTO_*
_NUMBERS = {family: number for number, family in _FAMILIES.items()}
_HEAD_BYTES = 4  # nfgenmsg

_TABLE = 1  # of chains, rules, sets and elements
_TABLE_FLAGS, _TABLE_OWNED = 2, 0x2  # NFT_TABLE_F_OWNER
_CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 3, 4, 5, 7
_HOOK_NUMBER = 1
_RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 2, 3, 4
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_SET_NAME, _SET_KEY_LENGTH = 2, 5
_ELEMENTS_SET, _ELEMENTS = 2, 3
_ELEMENT_KEY = _DATA_VALUE = 1


class Table(NamedTuple):
    """A table: family and name."""

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain. ``hook``: NF_INET_* of a base chain, None for any other chain. ``kind``: filter, nat or route."""

    table: Table
    name: str
    hook: int | None
    drops: bool  # its policy
    kind: str


class Expression(msgspec.Struct, frozen=True):
    """A part of a rule: a match, a statement or a verdict, with its attributes."""

    name: str
    data: dict[int, bytes]


class Rule(msgspec.Struct, frozen=True):
    """A rule of a chain; ``raw``: its expressions as the kernel encodes them."""

    chain: str
    handle: int
    raw: bytes

    def expressions(self) -> list[Expression]:
        """The decoded expressions, in order. Raises NetlinkError."""
        found = []
        for _, element in netlink.attributes(self.raw):
            values = netlink.attribute_map(element)
            data = netlink.attribute_map(values.get(_EXPRESSION_DATA, b""))
            found.append(Expression(netlink.string(values.get(_EXPRESSION_NAME)), data))
        return found


def list_chains(nfnetlink: Socket) -> list[Chain]:
    """The chains of the families ip, ip6 and inet. Raises NetlinkError."""
    found = []
    for _, payload in nfnetlink.dump(Message(_GETCHAIN, payload=bytes(_HEAD_BYTES), what="list chains")):
        values = netlink.attribute_map(payload, _HEAD_BYTES)
        family = _family(payload)
        if not family:
            continue
        hook = netlink.attribute_map(values.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
        found.append(
            Chain(
                table=Table(family, netlink.string(values.get(_TABLE))),
                name=netlink.string(values.get(_CHAIN_NAME)),
                hook=None if hook is None else big(hook),
                drops=hook is not None and big(values.get(_CHAIN_POLICY, b"\1")) == 0,
                kind=netlink.string(values.get(_CHAIN_TYPE)),
            )
        )
    return found


def owned_tables(nfnetlink: Socket) -> frozenset[Table]:
    """The tables that only the process that made them may change (``flags owner``). Raises NetlinkError."""
    found = set()
    for _, payload in nfnetlink.dump(Message(_GETTABLE, payload=bytes(_HEAD_BYTES), what="list tables")):
        values = netlink.attribute_map(payload, _HEAD_BYTES)
        family = _family(payload)
        if family and big(values.get(_TABLE_FLAGS, b"")) & _TABLE_OWNED:
            found.add(Table(family, netlink.string(values.get(_TABLE))))
    return frozenset(found)


def list_rules(nfnetlink: Socket, table: Table) -> list[Rule]:
    """The rules of a table, in the order of each chain; none when there is no such table. Raises NetlinkError."""
    return [
        Rule(netlink.string(it.get(_RULE_CHAIN)), big(it.get(_RULE_HANDLE, b"")), it.get(_RULE_EXPRESSIONS, b""))
        for it in _listed(nfnetlink, _GETRULE, table)
        if netlink.string(it.get(_TABLE)) == table.name
    ]


def set_keys(nfnetlink: Socket, table: Table, name: str) -> tuple[int, frozenset[bytes]]:
    """The key length and the keys of a set or map; (0, none) when there is no such set. Raises NetlinkError."""
    length = 0
    for it in _listed(nfnetlink, _GETSET, table):
        if netlink.string(it.get(_SET_NAME)) == name:
            length = big(it.get(_SET_KEY_LENGTH, b""))
    keys = set()
    for listed in _listed(nfnetlink, _GETSETELEM, table, netlink.text(_ELEMENTS_SET, name)):
        for _, element in netlink.attributes(listed.get(_ELEMENTS, b"")):
            key = netlink.attribute_map(element).get(_ELEMENT_KEY, b"")
            keys.add(netlink.attribute_map(key).get(_DATA_VALUE, b""))
    return length, frozenset(keys)


def big(value: bytes) -> int:
    """A number inside an attribute."""
    return int.from_bytes(value, "big")


def _family(payload: bytes) -> str:
    """The family of an object; empty if it is none of ip, ip6 and inet. Raises NetlinkError (EBADMSG)."""
    if len(payload) < _HEAD_BYTES:  # guard: an-nftables-object-has-a-head
        raise NetlinkError(errno.EBADMSG, "nftables object", "cut short")
    return _FAMILIES.get(payload[0], "")


def _listed(nfnetlink: Socket, kind: int, table: Table, more: bytes = b"") -> list[dict[int, bytes]]:
    head = bytes((_NUMBERS[table.family], 0, 0, 0))
    payload = head + netlink.text(_TABLE, table.name) + more
    try:
        found = nfnetlink.dump(Message(kind, payload=payload, what=f"list {table}"))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    return [netlink.attribute_map(payload, len(head)) for _, payload in found]
