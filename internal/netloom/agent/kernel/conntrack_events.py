"""Receive which connections of many namespaces have been opened, changed and closed, over one socket (ctnetlink).

The socket hears all namespaces that have a number (nsid) in its own namespace (``NETLINK_LISTEN_ALL_NSID``). A
namespace gets its number when it is followed. The number is free again when the namespace is gone, and another one may
get it; the kernel announces that (``RTNLGRP_NSID``).

**What is received.** A copy of the connection (``conntrack_copy``) needs only three reports of its life, and a filter
in the kernel drops the others:

* It is assured: TCP is open, or a conversation of another protocol goes on. This report has all that a copy needs.
* TCP is closed. The kernel deletes it later, at the end of a timeout and of a round through its table.
* It is deleted, and was not closed before.

The half-closed states of TCP are not reported. A copy that is still "established" goes on like one in that state. A
connection with a bit of ``marked`` is reported in all states.

Changes that :func:`connection_socket` makes are not reported. So a host that creates copies does not hear about them.

**Lost reports.** When the receive buffer is full, the kernel drops all reports until it has been read to its end. Only
a listing that begins after that knows all connections: see ``Changes.overrun``.

**Cost.** A system call reads up to 64 reports. It does not wait, and does not give up Python's lock (GIL): a thread
that gave it up for each report would get it back only every 5 ms while another thread computes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from netloom.agent.kernel import namespaces, netlink, sysctl
from netloom.agent.kernel.conntrack import ASSURED, SEEN_REPLY
from netloom.agent.kernel.conntrack_copy import Record, ended, has_closed, key_of, record_of
from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.kernel.multicast import MARK_AT, Filter, Multicast, attach_filter
from netloom.agent.kernel.namespaces import NamespaceError
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket
from netloom.errors import HostRefused

# A connection of the other end of a standby must have these bits of the status.
REPLICATED = SEEN_REPLY | ASSURED

BUFFER_BYTES = 8 << 20  # 16,000 reports: more than a second of 5,000 new connections per second

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_UPDATED, _DELETED = _SUBSYSTEM, _SUBSYSTEM | 2
# linux/netfilter/nfnetlink.h. Not group 1, new connections: they are not assured, and without a listener the kernel
# makes no report of them.
_GROUP_UPDATE, _GROUP_DESTROY = 2, 3
_CTA_STATUS, _CTA_PROTOINFO, _CTA_MARK, _CTA_PROTOINFO_TCP, _CTA_TCP_STATE = 3, 4, 8, 1, 1

_RTM_NEWNSID, _RTM_DELNSID, _RTM_GETNSID, _GROUP_NSID = 88, 89, 90, 28  # linux/rtnetlink.h
_NETNSA_NSID, _NETNSA_FD = 1, 3  # linux/net_namespace.h
_RTGENMSG = bytes(4)  # a family, padded
_NONE = -1

_SOL_NETLINK, _ADD_MEMBERSHIP, _LISTEN_ALL_NSID = 270, 1, 8
_SO_RCVBUFFORCE = 33  # not in the socket module of Python 3.11
_EVENTS = "net.netfilter.nf_conntrack_events"

_HEADER = struct.Struct("=IHHII")
_AT_ONCE = 64
_REPORT_BYTES = 4096  # room for one; the kernel's are below 700 bytes


class Changes(NamedTuple):
    """What :meth:`ConntrackEvents.read` has received.

    ``by_namespace``: to delete, and to create after that; both by ``conntrack_copy.key_of``. ``overrun``: reports of
    all namespaces were lost before; everything from now on is received. ``started``: everything of these namespaces is
    received from now on. ``gone``: namespaces that exist no more. ``more``: there may be more to read now.
    """

    by_namespace: dict[str, tuple[dict[bytes, Record], dict[bytes, Record]]]
    overrun: bool
    started: frozenset[str]
    gone: frozenset[str]
    more: bool


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MessageHeader(ctypes.Structure):
    """struct msghdr of recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Received(ctypes.Structure):
    """struct mmsghdr of recvmmsg(2)."""

    _fields_ = (("header", _MessageHeader), ("length", ctypes.c_uint32))


_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: keeps Python's lock
_libc.recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]


class _Datagrams:
    """Buffers for many datagrams of a netlink socket and the numbers of their namespaces."""

    _CONTROL = struct.Struct("@Niii4x" if struct.calcsize("@N") == 8 else "@Niii")  # cmsghdr with a number
    _NAME_BYTES = 12  # sockaddr_nl: family, port, groups

    def __init__(self) -> None:
        self.data = bytearray(_AT_ONCE * _REPORT_BYTES)
        self._names = bytearray(_AT_ONCE * self._NAME_BYTES)
        self._no_control = self._CONTROL.pack(0, 0, 0, _NONE) * _AT_ONCE
        self._control = bytearray(self._no_control)
        self._headers = bytearray(_AT_ONCE * ctypes.sizeof(_Received))
        self._vectors = (_Vector * _AT_ONCE)()
        data, names, control = (
            ctypes.addressof(ctypes.c_char.from_buffer(it)) for it in (self.data, self._names, self._control)
        )
        headers = (_Received * _AT_ONCE).from_buffer(self._headers)
        self._headers_at = ctypes.addressof(headers)
        for at in range(_AT_ONCE):
            vector, header = self._vectors[at], headers[at].header
            vector.base, vector.length = data + at * _REPORT_BYTES, _REPORT_BYTES
            header.name, header.name_length = names + at * self._NAME_BYTES, self._NAME_BYTES
            header.vectors, header.vector_count = ctypes.addressof(vector), 1
            header.control, header.control_length = control + at * self._CONTROL.size, self._CONTROL.size
        self._fresh = bytes(self._headers)
        numbers = memoryview(self._headers).cast("I")
        size = ctypes.sizeof(_Received) // 4
        self.lengths = numbers[_Received.length.offset // 4 :: size]
        self.flags = numbers[_MessageHeader.flags.offset // 4 :: size]
        self.senders = memoryview(self._names).cast("I")[1 :: self._NAME_BYTES // 4]
        at = struct.calcsize("@Nii") // 4
        self.nsids = memoryview(self._control).cast("i")[at :: self._CONTROL.size // 4]

    def receive(self, descriptor: int) -> int:
        """How many there were; 0: none now. Raises OSError (ENOBUFS: some were dropped)."""
        # The kernel has written the lengths of the last ones there.
        self._headers[:] = self._fresh
        self._control[:] = self._no_control
        count: int = _libc.recvmmsg(descriptor, self._headers_at, _AT_ONCE, socket.MSG_DONTWAIT, None)
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EINTR):
            return 0
        raise OSError(code, os.strerror(code))


class ConntrackEvents:
    """The changes of connections in the followed namespaces since they are followed. Only one thread may use it."""

    def __init__(self, *, marked: int = 0, buffer_bytes: int = BUFFER_BYTES, host: str | None = None) -> None:
        """``host``: the namespace of the socket; None: that of the thread.

        Raises NamespaceError, NetlinkError, OSError.
        """
        self._marked = marked
        self._host = host
        self._names: dict[int, str] = {}  # by nsid
        self._waiting: dict[int, str] = {}  # those whose reports may still be about an earlier namespace
        self._followed: dict[str, tuple[int, int]] = {}  # inode number of the namespace, nsid
        self.refused: dict[str, str] = {}
        self._datagrams = _Datagrams()
        self._is_overrun = False
        self._numbers = _Numbers(host)
        try:
            self._socket = high_socket(netlink.open_socket(netlink.NETLINK_NETFILTER, host))
        except BaseException:
            self._numbers.close()
            raise
        try:
            self._socket.setblocking(False)
            with suppress(PermissionError):  # in a container: as much as open_socket could get
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
            attach_filter(self._socket, _filter(marked))
            self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
            self._socket.bind((0, 0))
            for group in (_GROUP_UPDATE, _GROUP_DESTROY):
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop receiving."""
        self._socket.close()
        self._numbers.close()

    def filenos(self) -> tuple[int, int]:
        """The descriptors to wait on: one is readable when there is something to read."""
        return self._socket.fileno(), self._numbers.fileno()

    def follow(self, wanted: Iterable[str]) -> None:
        """Follow exactly these namespaces. :meth:`read` says when it has ``started``.

        One that does not exist is not followed; ask again later. ``refused`` has the reasons why others are not.
        """
        self.refused = {}
        names = set(wanted)
        for name in self._followed.keys() - names:
            self._forget(name)
        for name in names:
            inode = _identity(name)
            known = self._followed.get(name)
            if known is not None and known[0] != inode:
                self._forget(name)  # guard: a-namespace-made-anew-is-followed-anew
            if inode == 0 or name in self._followed:
                continue
            try:
                nsid = _nsid_of(name, self._host)
                enable(name)
            except HostRefused as error:  # one namespace must not be the end of the others
                self.refused[name] = str(error)
                continue
            self._followed[name] = inode, nsid
            self._waiting[nsid] = name  # guard: earlier-reports-are-of-another-namespace

    def missing(self, wanted: Iterable[str]) -> frozenset[str]:
        """Those that are not followed, because they did not exist or exist no more."""
        return frozenset(it for it in wanted if it not in self._followed)

    def _forget(self, name: str) -> None:
        _, nsid = self._followed.pop(name)
        for names in (self._names, self._waiting):
            if names.get(nsid) == name:
                del names[nsid]

    def read(self, at_most: int = 4096) -> Changes:
        """The changes that have been reported. Does not wait.

        Raises NetlinkError when a report cannot be decoded or the socket has failed.
        """
        found: dict[str, tuple[dict[bytes, Record], dict[bytes, Record]]] = {}
        gone: set[str] = set()
        count = total = 0
        while total < at_most:
            try:
                count = self._datagrams.receive(self._socket.fileno())
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, "receive the changes of connections") from error
                self._is_overrun = True
                continue
            # Before the names are used, so that another namespace with the same number is not taken for the old one.
            gone |= self._renumbered()
            if not count:
                break
            total += count
            self._take(count, found)
            if count < _AT_ONCE and not self._is_overrun:
                count = 0  # there was no other one
                break
        emptied = not count
        overrun = self._is_overrun and emptied  # guard: an-overrun-lasts-until-all-is-read
        if overrun:
            self._is_overrun = False
        started = frozenset(self._waiting.values()) if emptied else frozenset()
        if emptied:
            # What was read so far may be about another namespace that had the number before.
            self._names |= self._waiting
            self._waiting = {}
        return Changes(found, overrun, started, frozenset(gone), not emptied)

    def _renumbered(self) -> set[str]:
        freed = self._numbers.freed()
        names = self._names | self._waiting
        asked = list(self._followed) if freed is None else [names[it] for it in freed if it in names]
        # The kernel frees the number before it says so: it may be about an earlier namespace with the same number.
        gone = {it for it in asked if not self._has_number(it)}  # guard: a-number-of-a-namespace-is-reused
        for name in gone:
            self._forget(name)
        return gone

    def _has_number(self, name: str) -> bool:
        """Whether the namespace that is followed still has its number."""
        inode, nsid = self._followed[name]
        try:
            return _identity(name) == inode and _nsid_of(name, self._host) == nsid
        except NamespaceError:  # it was deleted meanwhile
            return False

    def _take(self, count: int, found: dict[str, tuple[dict[bytes, Record], dict[bytes, Record]]]) -> None:
        datagrams, marked = self._datagrams, self._marked
        data, names, lengths, nsids = datagrams.data, self._names, datagrams.lengths, datagrams.nsids
        for at in range(count):
            name = names.get(nsids[at])
            if name is None or datagrams.senders[at]:
                continue
            begin = at * _REPORT_BYTES
            if datagrams.flags[at] & socket.MSG_TRUNC:
                raise NetlinkError(errno.EMSGSIZE, "receive the changes of connections")
            payload = bytes(data[begin + _HEADER.size : begin + lengths[at]])
            changed = found.get(name)
            if changed is None:
                changed = found[name] = {}, {}
            delete, create = changed
            if data[begin + _KIND_AT] == _UPDATED & 0xFF:
                record = record_of(payload, marked=marked, status=REPLICATED)
                if record is not None:
                    create[key_of(record)] = record
                    continue
                if not has_closed(payload):
                    continue
            record = ended(payload)
            if record is None:
                continue
            key = key_of(record)
            create.pop(key, None)
            delete[key] = record


class _Numbers(Multicast):
    """The numbers of namespaces that have become free."""

    def __init__(self, host: str | None) -> None:
        super().__init__(netlink.NETLINK_ROUTE, host, [_GROUP_NSID], what="watch the numbers of namespaces")
        self._poll = select.poll()
        self._poll.register(self.fileno(), select.POLLIN)

    def freed(self) -> list[int] | None:
        """Those since the last call; None: any may have. Does not wait. Raises NetlinkError."""
        found: list[int] = []
        if not self._poll.poll(0):
            return found
        known = True
        for data in self._datagrams():
            if data is None:
                known = False
                continue
            for message in netlink.decode(data):
                if message.type == _RTM_DELNSID:
                    found.append(_nsid_in(message.payload))
        return found if known else None


def _identity(name: str) -> int:
    """The inode number of a namespace; 0: it does not exist."""
    try:
        return namespaces.identity(name)
    except FileNotFoundError:
        return 0


def _nsid_of(name: str, host: str | None) -> int:
    """The number of a namespace at the host, which it gets if it has none. Raises NamespaceError, NetlinkError."""
    with namespaces.descriptor(name) as fd, Socket(netlink.NETLINK_ROUTE, host) as route:
        which = netlink.u32(_NETNSA_FD, fd)
        ask = Message(_RTM_GETNSID, payload=_RTGENMSG + which, what=f"ask for the number of namespace {name}")
        any_number = netlink.attribute(_NETNSA_NSID, _NONE.to_bytes(4, sys.byteorder, signed=True))
        give = Message(_RTM_NEWNSID, payload=_RTGENMSG + any_number + which, what=f"give namespace {name} a number")
        route.request([give.even_if_there()])
        for message in route.request([ask]):
            nsid = _nsid_in(message.payload)
            if nsid != _NONE:
                return nsid
    raise NetlinkError(errno.ENODATA, f"ask for the number of namespace {name}")


def _nsid_in(payload: bytes) -> int:
    value = netlink.attribute_map(payload, len(_RTGENMSG)).get(_NETNSA_NSID, b"\xff\xff\xff\xff")
    return int.from_bytes(value, sys.byteorder, signed=True)


def enable(namespace: str) -> None:
    """Make the kernel report the changes of connections in this namespace that are opened from now on.

    By default it does so only while somebody in the namespace itself listens. Raises NamespaceError, SysctlError.
    """
    if sysctl.read(namespace, [_EVENTS])[_EVENTS] != "1":
        sysctl.write(namespace, {_EVENTS: "1"})  # guard: connections-are-reported-in-each-namespace


def connection_socket(namespace: str) -> Socket:
    """A socket for changes of connections that are not reported. Raises NamespaceError, NetlinkError, OSError."""
    return netlink.marked_socket(netlink.NETLINK_NETFILTER, namespace, netlink.OF_CONNECTIONS)


# linux/filter.h. Loads are big endian; the header of netlink is in the host's byte order.
_LOAD_8, _LOAD_16, _LOAD_32 = 0x30, 0x28, 0x20
_LOAD_8_AT_X, _LOAD_32_AT_X = 0x50, 0x40
_SET_A, _SET_X, _A_TO_X, _X_TO_A = 0x00, 0x01, 0x07, 0x87
_EQUAL, _ANY_BIT, _RETURN = 0x15, 0x45, 0x06
_ATTRIBUTE_AT, _NESTED_AT = 0xFFFFF000 + 12, 0xFFFFF000 + 16  # SKF_AD_NLATTR, SKF_AD_NLATTR_NEST
_FIRST = 20  # the attributes begin after nlmsghdr and nfgenmsg
_KIND_AT = 4 if sys.byteorder == "little" else 5  # the message within its subsystem

# States of TCP, linux/netfilter/nf_conntrack_tcp.h.
_HALF_CLOSED = (4, 5, 6)  # FIN_WAIT, CLOSE_WAIT, LAST_ACK
_CLOSED = (7, 8)  # TIME_WAIT, CLOSE


def _filter(marked: int) -> Filter:
    """See the docstring of the module. The program is written with labels, which are resolved here."""
    keep, drop = "keep", "drop"
    lines: list[tuple[int, str, str, int]] = []
    labels: dict[str, int] = {}

    def add(code: int, constant: int, then: str = "", otherwise: str = "") -> None:
        lines.append((code, then, otherwise, constant))

    def look_up(kind: int, absent: str, *, nested: bool = False) -> None:
        """A: the offset of an attribute from ``_FIRST`` on, or nested in that at A."""
        if not nested:
            add(_SET_A, _FIRST)
        add(_SET_X, kind)
        add(_LOAD_32, _NESTED_AT if nested else _ATTRIBUTE_AT)
        add(_EQUAL, 0, absent)

    def label(name: str) -> None:
        labels[name] = len(lines)

    add(_LOAD_16, MARK_AT)
    add(_EQUAL, socket.htons(netlink.OF_CONNECTIONS), drop)  # guard: own-changes-of-connections-are-not-reported
    if marked:
        look_up(_CTA_MARK, "unmarked")
        add(_A_TO_X, 0)
        add(_LOAD_32_AT_X, 4)
        add(_ANY_BIT, marked, keep)
        label("unmarked")
    look_up(_CTA_STATUS, drop)
    add(_A_TO_X, 0)
    add(_LOAD_32_AT_X, 4)
    add(_ANY_BIT, ASSURED, "", drop)  # guard: only-assured-connections-are-reported
    look_up(_CTA_PROTOINFO, keep)
    look_up(_CTA_PROTOINFO_TCP, keep, nested=True)
    look_up(_CTA_TCP_STATE, keep, nested=True)
    add(_A_TO_X, 0)
    add(_LOAD_8_AT_X, 4)
    add(_A_TO_X, 0)  # the state
    add(_LOAD_8, _KIND_AT)
    add(_EQUAL, _DELETED & 0xFF, "deleted")
    add(_X_TO_A, 0)
    for state in _HALF_CLOSED:
        add(_EQUAL, state, drop)
    add(_RETURN, 0xFFFFFFFF)
    label("deleted")
    add(_X_TO_A, 0)
    for state in _CLOSED:
        add(_EQUAL, state, drop)  # guard: closed-connections-are-reported-once
    label(keep)
    add(_RETURN, 0xFFFFFFFF)
    label(drop)
    add(_RETURN, 0)

    def distance(at: int, name: str) -> int:
        return labels[name] - at - 1 if name else 0

    return tuple(
        (code, distance(at, then), distance(at, otherwise), constant)
        for at, (code, then, otherwise, constant) in enumerate(lines)
    )
