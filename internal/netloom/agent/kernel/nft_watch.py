"""Receive the events of nftables: who has changed the rulesets of a namespace, and which tables have lost something.

The kernel reports each transaction: a message for each object, several in one datagram, and then NFT_MSG_NEWGEN with
the thread that made the transaction (nf_tables_commit in net/netfilter/nf_tables_api.c). A ruleset may have thousands
of elements and change often, so only the messages about the tables of certain names are decoded.
"""

from __future__ import annotations

import os
import socket

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.multicast import MARK_AT, Filter, Multicast

# linux/netfilter/nfnetlink.h, nf_tables.h. Attribute 1 of every object is the name of its table.
_GROUP_NFTABLES = 7
_SUBSYSTEM = 10 << 8
_DELETIONS = {_SUBSYSTEM | it for it in (2, 5, 8, 11, 14, 20)}  # a table, chain, rule, set, element, named object
_NEWGEN = _SUBSYSTEM | 15
_NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 2, 3
_TABLE = 1
_HEAD_BYTES = 4  # nfgenmsg

# linux/filter.h. Loads are big endian; the header of netlink is in the host's byte order.
_RENEWALS: Filter = (
    (0x28, 0, 0, MARK_AT),  # ldh
    (0x15, 0, 1, socket.htons(netlink.OF_LEASES)),  # guard: a-renewed-lease-is-no-loss
    (0x06, 0, 0, 0),  # ret: nothing
    (0x06, 0, 0, 0xFFFFFFFF),  # ret: the whole datagram
)

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
    """The nftables transactions of one namespace since this was created. ``fileno`` is readable when there are some.

    Renewals of leases are left out, by a filter in the kernel: an active host makes 20 of them a second.
    """

    def __init__(self, namespace: str | None, *tables: str) -> None:
        """``tables``: the names of the tables, of any family, whose losses are reported.

        Raises NamespaceError, OSError.
        """
        self._names = [it.encode() + b"\0" for it in tables]
        self._lost = False  # so far in the transaction whose end has not come yet
        group, what = _GROUP_NFTABLES, "watch nftables"
        super().__init__(netlink.NETLINK_NETFILTER, namespace, [group], what=what, filtered=_RENEWALS)

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
        if not ours and netlink.kind_of(data) != _NEWGEN:
            return []
        for message in netlink.decode(data):
            if message.type == _NEWGEN:
                values = netlink.attribute_map(message.payload, _HEAD_BYTES)
                thread = int.from_bytes(values.get(_NFTA_GEN_PROC_PID, b""), "big")
                name = netlink.string(values.get(_NFTA_GEN_PROC_NAME))
                found.append(Transaction(lost=self._lost, thread=thread, process=name))
                self._lost = False
            elif message.type in _DELETIONS:
                table = netlink.attribute_map(message.payload, _HEAD_BYTES).get(_TABLE)
                self._lost = self._lost or table in self._names
        return found
