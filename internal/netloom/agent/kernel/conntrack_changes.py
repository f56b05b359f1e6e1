"""List the connections of a namespace for a copy, and find out quickly what has changed since.

The second reading is done while the network waits, so it does as little as possible:

* The kernel has one table for all namespaces, and walks through all of it to list one of them: at least 7 ms for
  262,144 buckets, more on a host with many connections. So the connections of a small listing are looked up one by one
  instead. That is enough if the namespace has no others: if their number is the number of its connections.
* A connection is decoded only if its message differs from the first one in more than the timeout.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from typing import NamedTuple

from netloom.agent.kernel import conntrack, netlink
from netloom.agent.kernel.conntrack_copy import SHORT_TIMEOUT_S, Difference, Record, difference, record_of, timeout_of
from netloom.agent.kernel.netlink import ATTRIBUTE, Message, Socket

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET = _SUBSYSTEM, _SUBSYSTEM | 1
_NFGENMSG_BYTES = 4
_EVERYTHING = bytes((socket.AF_UNSPEC, 0, 0, 0))

# linux/netfilter/nfnetlink_conntrack.h
_CTA_TUPLE_ORIG, _CTA_TIMEOUT, _CTA_ZONE = 1, 7, 18
_TIMEOUT_BYTES = 8  # of the attribute

# So much of a message has the original direction. With IPv4 and ports it has both directions, and nothing else.
_KEY_BYTES = 108
# 25 µs each (2026-11-30): half the time of the walk on a host without other connections.
_LOOKED_UP_MAX = 128


class _Seen(NamedTuple):
    """A message without its first ``_KEY_BYTES`` and its timeout. ``record``: None if the connection is not copied."""

    head: bytes
    tail: bytes
    record: Record | None


class Listing:
    """The connections of a namespace, from the kernel's messages. ``marked`` as in ``conntrack_copy.record_of``."""

    def __init__(self, messages: Iterable[bytes] = (), *, marked: int = 0) -> None:
        self.records: list[Record] = []
        self._marked = marked
        self._seen: dict[bytes, _Seen] = {}
        self._others: list[Record] = []  # whose messages cannot be compared
        self._lookups: list[Message] = []  # as long as there are few
        self._count = 0
        for message in messages:
            self._add(message)

    def _add(self, message: bytes) -> None:
        self._count += 1
        record = record_of(message, marked=self._marked)
        if record is not None:
            self.records.append(record)
        places = _places(message)
        if self._count <= _LOOKED_UP_MAX and (original := places.get(_CTA_TUPLE_ORIG)) is not None:
            zone = message[slice(*places[_CTA_ZONE])] if _CTA_ZONE in places else b""
            self._lookups.append(Message(_GET, payload=message[:_NFGENMSG_BYTES] + message[slice(*original)] + zone))
        begin, end = places.get(_CTA_TIMEOUT, (0, 0))
        key = message[:_KEY_BYTES]
        if begin >= _KEY_BYTES and end - begin == _TIMEOUT_BYTES and key not in self._seen:
            self._seen[key] = _Seen(message[_KEY_BYTES : begin + ATTRIBUTE.size], message[end:], record)
        elif record is not None:
            self._others.append(record)

    def looked_up(self, ctnetlink: Socket) -> list[bytes] | None:
        """The messages of those connections that still exist, if the namespace has no other ones, else None."""
        if self._count != len(self._lookups):
            return None
        # First, so that whatever ends from now on makes the numbers differ.
        count = conntrack.count_over(ctnetlink)
        if count > self._count:
            return None
        answers = ctnetlink.exchange(self._lookups)
        if any(it.errno not in (0, errno.ENOENT) for it in answers):
            return None
        found = [message.payload for answer in answers for message in answer.data if message.type == _NEW]
        # One connection may be found twice: by its original direction, and by the other one.
        distinct = {it[slice(*_places(it)[_CTA_TUPLE_ORIG])] for it in found}
        return found if len(distinct) == count else None  # guard: new-connections-are-listed

    def difference(self, messages: Iterable[bytes]) -> Difference:
        """What has changed until these messages came. Call it once: it forgets what it finds."""
        seen = self._seen
        before = self._others
        now: list[Record] = []
        for message in messages:
            earlier = seen.pop(message[:_KEY_BYTES], None)
            if earlier is not None:
                if earlier.record is None or timeout_of(earlier.record) >= SHORT_TIMEOUT_S:
                    timeout_at = _KEY_BYTES + len(earlier.head)
                    if message.startswith(earlier.head, _KEY_BYTES) and message[timeout_at + 4 :] == earlier.tail:
                        continue
                if earlier.record is not None:
                    before.append(earlier.record)
            record = record_of(message, marked=self._marked)
            if record is not None:
                now.append(record)
        before += [it.record for it in seen.values() if it.record is not None]
        return difference(before, now)


def listing(namespace: str, *, marked: int = 0) -> Listing:
    """The connections of a namespace. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_NETFILTER, namespace) as ctnetlink:
        return Listing(_messages(ctnetlink), marked=marked)


def list_records(namespace: str, *, marked: int, status: int) -> list[Record]:
    """The connections of a namespace that are copied; arguments as for ``conntrack_copy.record_of``.

    Raises NamespaceError, NetlinkError.
    """
    with Socket(netlink.NETLINK_NETFILTER, namespace) as ctnetlink:
        messages = _messages(ctnetlink)
    records = (record_of(it, marked=marked, status=status) for it in messages)
    return [it for it in records if it is not None]


def changes(namespace: str, before: Listing) -> Difference:
    """What has changed in a namespace since ``before``, which is used up. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_NETFILTER, namespace) as ctnetlink:
        found = before.looked_up(ctnetlink)
        return before.difference(_messages(ctnetlink) if found is None else found)


def _messages(ctnetlink: Socket) -> list[bytes]:
    found = ctnetlink.dump(Message(_GET, payload=_EVERYTHING, what="list connections"))
    return [payload for kind, payload in found if kind == _NEW]


def _places(message: bytes) -> dict[int, tuple[int, int]]:
    """Where the attributes begin and end, by type. ``record_of`` has checked the message."""
    places = {}
    at, end = _NFGENMSG_BYTES, len(message)
    while at + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(message, at)
        if length < ATTRIBUTE.size:
            break
        places[kind & netlink.NLA_TYPE_MASK] = at, at + length
        at += (length + 3) & ~3
    return places
