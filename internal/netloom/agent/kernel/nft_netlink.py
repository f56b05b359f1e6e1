"""List the objects of an nftables table over netlink, without starting ``nft`` or taking the library's lock.

Also change sets of link names, and sets and maps with marks, the same way: within 0.1 ms, whatever other threads load
meanwhile (measured 2026-11; libnftables takes 1 ms and waits for its lock).

Numbers and attributes: linux/netfilter/nf_tables.h. Only names and what a digest needs are decoded. Numbers inside
attributes are big endian.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket

_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_SUBSYSTEM = _NFTABLES << 8
_DELTABLE, _NEWSETELEM, _DELSETELEM = _SUBSYSTEM | 2, _SUBSYSTEM | 12, _SUBSYSTEM | 14
_GETCHAIN, _GETRULE, _GETSET = _SUBSYSTEM | 4, _SUBSYSTEM | 7, _SUBSYSTEM | 10
_GETSETELEM, _GETGEN, _GETOBJ = _SUBSYSTEM | 13, _SUBSYSTEM | 16, _SUBSYSTEM | 19

_FAMILIES = {"inet": 1, "netdev": 5, "arp": 3, "bridge": 7}  # NFPROTO_*
_HEAD_BYTES = 4  # nfgenmsg

_NFTA_GEN_ID = 1
# Attribute 1 of chains, rules, sets, elements and objects is the name of their table.
_TABLE = 1
_NFTA_CHAIN_NAME, _NFTA_CHAIN_HOOK, _NFTA_CHAIN_POLICY = 3, 4, 5
_NFTA_RULE_CHAIN, _NFTA_RULE_EXPRESSIONS = 2, 4
_NFTA_SET_NAME, _NFTA_SET_FLAGS = 2, 3
_NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 2, 3
_NFTA_SET_ELEM_KEY = _NFTA_DATA_VALUE = _NFTA_LIST_ELEM = 1
_NFTA_SET_ELEM_DATA, _NFTA_SET_ELEM_TIMEOUT, _NFTA_SET_ELEM_EXPIRATION = 2, 4, 5
_IFNAMSIZ = 16  # a key of the type ifname is padded to this length
_ELEMENTS_MAX = 1000  # in one message: the length of a list is a number of 16 bits
_NFTA_OBJ_NAME, _NFTA_OBJ_TYPE = 2, 3
_LONG_MS = 60_000  # for an element that does not outlast its transaction

# Elements with a mark as their key, and with a timeout, too: leases are renewed ten times a second.
_ONE_MARK, _LIFE = struct.Struct("=HHHHHHI"), struct.Struct("=HHHHHHIHH8s")
_KEY = (
    *(_NFTA_LIST_ELEM | netlink.NLA_F_NESTED, 12),
    *(_NFTA_SET_ELEM_KEY | netlink.NLA_F_NESTED, 8),
    _NFTA_DATA_VALUE,
)

_NFT_SET_ANONYMOUS, _NFT_SET_MAP, _NFT_SET_EVAL = 0x1, 0x8, 0x20
_NFT_OBJECT_COUNTER = 1


class Chain(msgspec.Struct, frozen=True):
    """A chain; ``hook`` and ``policy`` as the kernel encodes them, empty for a chain without a hook."""

    name: str
    hook: bytes
    policy: bytes


class Rule(msgspec.Struct, frozen=True):
    """A rule of a chain; ``expressions`` as the kernel encodes them."""

    chain: bytes
    expressions: bytes


class Set(msgspec.Struct, frozen=True):
    """A set or a map. An ``anonymous`` one belongs to one rule; the kernel numbers its name (``__set3``)."""

    name: str
    flags: bytes

    @property
    def anonymous(self) -> bool:
        return bool(_big(self.flags) & _NFT_SET_ANONYMOUS)

    @property
    def dynamic(self) -> bool:
        """Whether packets add elements."""
        return bool(_big(self.flags) & _NFT_SET_EVAL)

    @property
    def map(self) -> bool:
        return bool(_big(self.flags) & _NFT_SET_MAP)


def generation(nfnetlink: Socket) -> int:
    """The kernel's counter of nftables transactions in the namespace. Raises NetlinkError."""
    (answer,) = nfnetlink.request([Message(_GETGEN, payload=bytes(_HEAD_BYTES), what="count transactions")])
    return _big(netlink.attribute_map(answer.payload, _HEAD_BYTES).get(_NFTA_GEN_ID))


def chains(nfnetlink: Socket, family: str, table: str) -> list[Chain]:
    """The table's chains; none when there is no table. Raises NetlinkError."""
    return [
        Chain(
            netlink.string(it.get(_NFTA_CHAIN_NAME)),
            it.get(_NFTA_CHAIN_HOOK, b""),
            it.get(_NFTA_CHAIN_POLICY, b""),
        )
        for it in _listed(nfnetlink, _GETCHAIN, family, table) or ()
        if _is_of(it, table)
    ]


def rules(nfnetlink: Socket, family: str, table: str) -> list[Rule]:
    """The table's rules in order; none when there is no table. Raises NetlinkError."""
    return [
        Rule(it.get(_NFTA_RULE_CHAIN, b""), it.get(_NFTA_RULE_EXPRESSIONS, b""))
        for it in _listed(nfnetlink, _GETRULE, family, table) or ()
    ]


def sets(nfnetlink: Socket, family: str, table: str) -> list[Set] | None:
    """The table's sets and maps, anonymous ones too; None when there is no table. Raises NetlinkError."""
    found = _listed(nfnetlink, _GETSET, family, table)
    if found is None:
        return None
    return [Set(netlink.string(it.get(_NFTA_SET_NAME)), it.get(_NFTA_SET_FLAGS, b"")) for it in found]


def elements(nfnetlink: Socket, family: str, table: str, name: str) -> list[bytes]:
    """The elements of a set as the kernel encodes them; none when there is no set. Raises NetlinkError."""
    found = _listed(nfnetlink, _GETSETELEM, family, table, netlink.text(_NFTA_SET_ELEM_LIST_SET, name)) or ()
    return [element for it in found for _, element in netlink.attributes(it.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b""))]


def link_names(nfnetlink: Socket, family: str, table: str, name: str) -> frozenset[str]:
    """The elements of a set of the type ``ifname``; none when there is no set. Raises NetlinkError."""
    found = map(netlink.attribute_map, elements(nfnetlink, family, table, name))
    return frozenset(netlink.string(_value(it.get(_NFTA_SET_ELEM_KEY))) for it in found)


def link_marks(nfnetlink: Socket, family: str, table: str, name: str) -> dict[str, int]:
    """The elements of a map of the type ``ifname : mark``; none when there is no map. Raises NetlinkError."""
    found = map(netlink.attribute_map, elements(nfnetlink, family, table, name))
    return {
        netlink.string(_value(it.get(_NFTA_SET_ELEM_KEY))): netlink.number(_value(it.get(_NFTA_SET_ELEM_DATA)))
        for it in found
    }


def lives(nfnetlink: Socket, family: str, table: str, name: str) -> dict[int, int]:
    """The elements of a set of the type ``mark`` with the flag ``timeout``: the milliseconds until each one expires.

    None when there is no set. Raises NetlinkError.
    """
    found = map(netlink.attribute_map, elements(nfnetlink, family, table, name))
    return {netlink.number(_value(it.get(_NFTA_SET_ELEM_KEY))): _big(it.get(_NFTA_SET_ELEM_EXPIRATION)) for it in found}


def add_link_names(family: str, table: str, name: str, links: Iterable[str]) -> list[Message]:
    """The changes that add elements to a set of the type ``ifname``; those that are there stay."""
    return _elements_messages(_NEWSETELEM, netlink.NLM_F_CREATE, family, table, name, map(_link_key, links))


def delete_link_names(family: str, table: str, name: str, links: Iterable[str]) -> list[Message]:
    """The changes that delete elements of a set or map by their link names; refused if one of them is missing."""
    return _elements_messages(_DELSETELEM, 0, family, table, name, map(_link_key, links))


def add_link_marks(family: str, table: str, name: str, marks: Mapping[str, int]) -> list[Message]:
    """The changes that add elements to a map of the type ``ifname : mark``; those that are there stay.

    Refused (EBUSY) if one of them is there with another mark.
    """
    added = (_link_key(it) + _data(_NFTA_SET_ELEM_DATA, _mark(mark)) for it, mark in marks.items())
    return _elements_messages(_NEWSETELEM, netlink.NLM_F_CREATE, family, table, name, added)


def put_lives(family: str, table: str, name: str, lives_ms: Mapping[int, int]) -> list[Message]:
    """The changes after which these elements of a set of marks expire in so many milliseconds, at least 1, from now.

    Linux before 6.12 does not change the timeout of an element that exists, and one that has expired cannot be deleted.
    So each is added, if it is not there, deleted, and added.
    """
    return [*end_lives(family, table, name, lives_ms), *_add_lives(family, table, name, lives_ms)]


def end_lives(family: str, table: str, name: str, marks: Iterable[int]) -> list[Message]:
    """The changes after which a set of marks with timeouts has none of these elements, which need not be there."""
    ended = dict.fromkeys(marks, _LONG_MS)
    return [*_add_lives(family, table, name, ended), *_delete_marks(family, table, name, ended)]


def _add_lives(family: str, table: str, name: str, lives_ms: Mapping[int, int]) -> list[Message]:
    added = [
        _LIFE.pack(_LIFE.size, *_KEY, mark, 12, _NFTA_SET_ELEM_TIMEOUT, ms.to_bytes(8, "big"))
        for mark, ms in lives_ms.items()
    ]
    return _list_messages(_NEWSETELEM, netlink.NLM_F_CREATE, family, table, name, added)


def _delete_marks(family: str, table: str, name: str, marks: Iterable[int]) -> list[Message]:
    keys = [_ONE_MARK.pack(_ONE_MARK.size, *_KEY, it) for it in marks]
    return _list_messages(_DELSETELEM, 0, family, table, name, keys)


def delete_table(family: str, table: str) -> Message:
    """The change that deletes a table with all that is in it; refused if there is none."""
    payload = bytes((_FAMILIES[family], 0, 0, 0)) + netlink.text(_TABLE, table)
    return Message(_DELTABLE, payload=payload, what=f"delete table {family} {table}")


def change(nfnetlink: Socket, messages: Sequence[Message]) -> None:
    """Carry the changes out as one transaction. Raises NetlinkError; then nothing has changed."""
    nfnetlink.transaction(_NFTABLES, messages)


def _link_key(link: str) -> bytes:
    return _data(_NFTA_SET_ELEM_KEY, link.encode().ljust(_IFNAMSIZ, b"\0"))


def _mark(mark: int) -> bytes:
    return mark.to_bytes(4, sys.byteorder)


def _data(kind: int, value: bytes) -> bytes:
    return netlink.nested(kind, netlink.attribute(_NFTA_DATA_VALUE, value))


def _value(data: bytes | None) -> bytes:
    return netlink.attribute_map(data or b"").get(_NFTA_DATA_VALUE, b"")


def _elements_messages(
    kind: int, flags: int, family: str, table: str, name: str, elements: Iterable[bytes]
) -> list[Message]:
    """``elements``: the encoded attributes of each."""
    nested = [netlink.nested(_NFTA_LIST_ELEM, it) for it in elements]
    return _list_messages(kind, flags, family, table, name, nested)


def _list_messages(kind: int, flags: int, family: str, table: str, name: str, nested: Sequence[bytes]) -> list[Message]:
    """``nested``: the encoded elements."""
    head = bytes((_FAMILIES[family], 0, 0, 0)) + netlink.text(_TABLE, table)
    head += netlink.text(_NFTA_SET_ELEM_LIST_SET, name)
    listed = (nested[at : at + _ELEMENTS_MAX] for at in range(0, len(nested), _ELEMENTS_MAX))
    what = f"change set {name} of table {family} {table}"
    return [
        Message(kind, flags, head + netlink.nested(_NFTA_SET_ELEM_LIST_ELEMENTS, *some), what=what) for some in listed
    ]


def counters(nfnetlink: Socket, family: str, table: str) -> list[str]:
    """The names of the table's counters; none when there is no table. Raises NetlinkError."""
    return [
        netlink.string(it.get(_NFTA_OBJ_NAME))
        for it in _listed(nfnetlink, _GETOBJ, family, table) or ()
        if _is_of(it, table) and _big(it.get(_NFTA_OBJ_TYPE)) == _NFT_OBJECT_COUNTER
    ]


def _listed(nfnetlink: Socket, kind: int, family: str, table: str, more: bytes = b"") -> list[dict[int, bytes]] | None:
    """The attributes of each object; None when the table or the set does not exist."""
    head = bytes((_FAMILIES[family], 0, 0, 0))
    payload = head + netlink.text(_TABLE, table) + more
    try:
        found = nfnetlink.dump(Message(kind, payload=payload, what=f"list {family} {table}"))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return [netlink.attribute_map(payload, len(head)) for _, payload in found]


def _is_of(attributes: dict[int, bytes], table: str) -> bool:
    # The kernel may list the chains and objects of the other tables of the family too.
    return netlink.string(attributes.get(_TABLE)) == table


def _big(value: bytes | None) -> int:
    return 0 if value is None else int.from_bytes(value, "big")
