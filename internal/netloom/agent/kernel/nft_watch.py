"""Receive the events of nftables: who has changed the rulesets of a namespace, and which tables have lost something.

The kernel reports each transaction: a message for each object, several in one datagram, and then NFT_MSG_NEWGEN with
the thread that made the transaction (nf_tables_commit in net/netfilter/nf_tables_api.c). A ruleset may have thousands
of elements and change often, so only the messages about the tables of certain names are decoded.
"""

from __future__ import annotations

import os

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.multicast import Multicast

# linux/netfilter/nfnetlink.h, nf_tables.h. Attribute 1 of every object is the name of its table.
_GROUP_NFTABLES = 7
_SUBSYSTEM = 10 << 8
_DELETIONS = {_SUBSYSTEM | it for it in (2, 5, 8, 11, 14, 20)}  # a table, chain, rule, set, element, named object
_NEWGEN = _SUBSYSTEM | 15
_NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 2, 3
_TABLE = 1
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

    def __init__(self, namespace: str | None, *tables: str) -> None:
        """``tables``: the names of the tables, of any family, whose losses are reported.

        Raises NamespaceError, OSError.
        """
        self._names = [it.encode() + b"\0" for it in tables]
        self._lost = False  # so far in the transaction whose end has not come yet
        super().__init__(netlink.NETLINK_NETFILTER, namespace, [_GROUP_NFTABLES], what="watch nftables")

    def read(self) -> list[Transaction]:
        """The transactions that have been reported, oldest first; of many only the first. Does not wait.

        Raises NetlinkError when a message cannot be decoded.
        """
        found: list[Transaction] = []
        for data in self._datagrams(_DATAGRAMS_AT_ONCE):
            if data is None:
                self._lost = False
                found.append(Transaction(overrun=True))
            else:
                found += self._transactions(data)
        return found

    def _transactions(self, data: bytes) -> list[Transaction]:
        found = []
        ours = any(it in data for it in self._names)
        # The message that ends a transaction is the first of its datagram; the objects need no decoding then.
        for message in netlink.decode(data) if ours or netlink.kind_of(data) == _NEWGEN else ():
            if message.type in _DELETIONS:
                attributes = netlink.attributes(message.payload, _HEAD_BYTES)
                self._lost = self._lost or any((_TABLE, it) in attributes for it in self._names)
            elif message.type == _NEWGEN:
                values = netlink.attribute_map(message.payload, _HEAD_BYTES)
                thread = int.from_bytes(values.get(_NFTA_GEN_PROC_PID, b""), "big")
                name = netlink.string(values.get(_NFTA_GEN_PROC_NAME))
                found.append(Transaction(lost=self._lost, thread=thread, process=name))
                self._lost = False
        return found
