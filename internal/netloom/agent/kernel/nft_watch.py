"""Receive the events of nftables: who has changed the rulesets of a namespace, and which tables have lost something.

The kernel reports each transaction: a message for each object, several in one datagram, and then NFT_MSG_NEWGEN with
the thread that made the transaction (nf_tables_commit in net/netfilter/nf_tables_api.c). A ruleset may have thousands
of elements and change often, so only the messages about the tables of certain names are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.multicast import Multicast

# linux/netfilter/nfnetlink.h, nf_tables.h. Attribute 1 of every object is the name of its table.
_GROUP_NFTABLES = 7
_SUBSYSTEM = 10 << 8
_DELETIONS = {_SUBSYSTEM | it for it in (2, 5, 8, 11, 14, 20)}  # a table, chain, rule, set, element, named object
_ELEMENTS = {_SUBSYSTEM | it for it in (12, 14)}  # added, deleted
_NEWGEN = _SUBSYSTEM | 15
_NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 2, 3
_TABLE = 1
_NFTA_SET_ELEM_LIST_SET = 2
_HEAD_BYTES = 4  # nfgenmsg

_DATAGRAMS_AT_ONCE = 256  # the event loop has other work, too; the descriptor stays readable


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the rulesets of the namespace. ``lost``: a table of a watched name has lost an object.

    ``thread``, ``process``: the thread that made the change, and its name; 0 and empty on an overrun. The number is the
    one of the initial pid namespace.

    ``overrun``: the kernel dropped events, so everything may have changed.
    """

    lost: bool = False
    thread: int = 0
    process: str = ""
    overrun: bool = False

    @property
    def own(self) -> bool:
        """Whether a thread of this process made the change. False where pids of the kernel mean other processes."""
        return self.thread > 0 and os.path.exists(f"/proc/self/task/{self.thread}")


class NftWatch(Multicast):
    """The nftables transactions of one namespace since this was created. ``fileno`` is readable when there are some."""

    def __init__(self, namespace: str | None, *tables: str, without: Iterable[tuple[str, str]] = ()) -> None:
        """``tables``: the names of the tables, of any family, whose losses are reported.

        ``without``: sets of these tables, as table and set. Changes of their elements are no losses, and a transaction
        that consists of such changes is not reported.

        Raises NamespaceError, OSError.
        """
        self._names = [it.encode() + b"\0" for it in tables]
        self._without = {(table.encode() + b"\0", name.encode() + b"\0") for table, name in without}
        # So far in the transaction whose end has not come yet:
        self._lost = False
        self._ignored = False  # it changes elements of ``without``
        self._others = False  # it changes something else
        super().__init__(netlink.NETLINK_NETFILTER, namespace, [_GROUP_NFTABLES], what="watch nftables")

    def read(self) -> list[Transaction]:
        """The transactions that have been reported, oldest first; of many only the first. Does not wait.

        Raises NetlinkError when a message cannot be decoded.
        """
        found: list[Transaction] = []
        for data in self._datagrams(_DATAGRAMS_AT_ONCE):
            if data is None:
                self._lost = self._ignored = False
                self._others = True  # perhaps: what was dropped is not known
                found.append(Transaction(overrun=True))
            else:
                found += self._transactions(data)
        return found

    def _transactions(self, data: bytes) -> list[Transaction]:
        found = []
        ours = any(it in data for it in self._names)
        # The message that ends a transaction is the first of its datagram; the objects need no decoding then.
        if not ours and netlink.kind_of(data) != _NEWGEN:
            self._others = True
            return []
        for message in netlink.decode(data):
            if message.type == _NEWGEN:
                if self._others or not self._ignored:
                    values = netlink.attribute_map(message.payload, _HEAD_BYTES)
                    thread = int.from_bytes(values.get(_NFTA_GEN_PROC_PID, b""), "big")
                    name = netlink.string(values.get(_NFTA_GEN_PROC_NAME))
                    found.append(Transaction(lost=self._lost, thread=thread, process=name))
                self._lost = self._ignored = self._others = False
                continue
            values = netlink.attribute_map(message.payload, _HEAD_BYTES)
            table = values.get(_TABLE, b"")
            if message.type in _ELEMENTS and (table, values.get(_NFTA_SET_ELEM_LIST_SET)) in self._without:
                self._ignored = True  # guard: a-renewed-lease-is-no-loss
                continue
            self._others = True
            self._lost = self._lost or (message.type in _DELETIONS and table in self._names)
        return found
