"""Receive events: changes of links, addresses, routes, rules and neighbours, and namespaces that lose their names.

The former are rtnetlink's multicast messages; the latter are inotify(7) events of the directory of named namespaces.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Literal

import msgspec

from netloom.agent.kernel import addresses, links, neighbours, netlink, routes, rules
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.multicast import Multicast
from netloom.agent.kernel.namespaces import NETNS_DIR, NamespaceError
from netloom.agent.kernel.neighbours import NUD_FAILED, NUD_PERMANENT, NeighbourRow
from netloom.agent.kernel.routes import RouteRow
from netloom.agent.kernel.rtnetlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
)
from netloom.netobjects import Rule

Kind = Literal["link", "address", "route", "rule", "neighbour"]

# RTNLGRP_*, linux/rtnetlink.h: IPv4 and IPv6 have groups of their own.
_GROUPS: dict[Kind, tuple[int, ...]] = {
    "link": (1,),
    "address": (5, 9),
    "route": (7, 11),
    "rule": (8, 19),
    "neighbour": (3,),
}

_IN_MOVED_FROM, _IN_DELETE, _IN_Q_OVERFLOW = 0x40, 0x200, 0x4000  # sys/inotify.h
_RECEIVE_BYTES = 256 << 10
_INOTIFY_HEAD = struct.Struct("=iIII")  # watch, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An object was added or changed, or deleted (``gone``). ``row``: the object as it is, or was.

    ``overrun``: the kernel dropped events, so everything has to be listed again; ``row`` is None.
    """

    kind: Literal[Kind, "overrun"]
    gone: bool = False
    row: Link | AddressRow | RouteRow | Rule | NeighbourRow | None = None


class Watch(Multicast):
    """The events of one namespace since this was created. ``fileno`` becomes readable when there are some.

    Events of neighbours are received only for entries that are permanent or failed: machines on the link can cause a
    hundred thousand other events per second. The kernel reports no change of the alias of a link that is down.
    """

    def __init__(self, namespace: str | None, *kinds: Kind) -> None:
        """``kinds``: none means all. Raises NamespaceError, NetlinkError."""
        self._wanted: frozenset[str] = frozenset(kinds or _GROUPS)
        # Always receive link events: the other events refer to links by index.
        groups = [it for kind, groups in _GROUPS.items() if kind in self._wanted or kind == "link" for it in groups]
        super().__init__(netlink.NETLINK_ROUTE, namespace, groups, what="watch links", filtered=_NEIGHBOURS)
        try:
            self.names = {link.index: link.name for link in links.list_links(namespace)}  # of links, by index
        except BaseException:
            self.close()
            raise

    def read(self) -> list[Event]:
        """The events that have arrived, oldest first. Does not wait.

        Raises NetlinkError when a message cannot be decoded.
        """
        events: list[Event] = []
        for data in self._datagrams():
            if data is None:
                events.append(Event(kind="overrun"))
                continue
            for message in netlink.decode(data):
                events += self._events(message.type, message.payload)
        return events

    def _events(self, kind: int, payload: bytes) -> list[Event]:
        event = None
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            # Messages of the bridge family report a port's bridge settings, not changes of the link.
            if not payload or payload[0] == socket.AF_BRIDGE:
                return []
            link = links.decode_link(payload)
            if kind == RTM_NEWLINK:
                self.names[link.index] = link.name
            event = Event(kind="link", gone=kind == RTM_DELLINK, row=link)
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            address = addresses.decode_address(payload, self.names)
            event = Event(kind="address", gone=kind == RTM_DELADDR, row=address)
        elif kind in (RTM_NEWROUTE, RTM_DELROUTE):
            route = routes.decode_route(payload, self.names)
            event = Event(kind="route", gone=kind == RTM_DELROUTE, row=route)
        elif kind in (RTM_NEWRULE, RTM_DELRULE):
            event = Event(kind="rule", gone=kind == RTM_DELRULE, row=rules.decode_rule(payload))
        elif kind in (RTM_NEWNEIGH, RTM_DELNEIGH) and payload[:1] != bytes((socket.AF_BRIDGE,)):
            neighbour = neighbours.decode_neighbour(payload, self.names)
            event = Event(kind="neighbour", gone=kind == RTM_DELNEIGH, row=neighbour)
        return [event] if event and event.kind in self._wanted else []


# Loads are big endian; netlink numbers are in the host's byte order. Drops events of neighbours that are neither failed
# nor permanent.
_LOAD_16, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x28, 0x15, 0x45, 0x06
_NEIGHBOURS = (
    (_LOAD_16, 0, 0, 4),  # nlmsghdr: type
    (_IF_EQUAL, 3, 0, socket.htons(RTM_DELNEIGH)),
    (_IF_EQUAL, 0, 3, socket.htons(RTM_NEWNEIGH)),
    (_LOAD_16, 0, 0, 24),  # ndmsg: state
    (_IF_ANY_BIT, 1, 0, socket.htons(NUD_FAILED | NUD_PERMANENT)),
    (_RETURN, 0, 0, 0),
    (_RETURN, 0, 0, 0xFFFFFFFF),
)


class NamesWatch:
    """The names of namespaces deleted since this was created. ``fileno`` becomes readable when there are some.

    The directory must exist. A name that is unmounted, but whose file stays, is not reported.
    """

    def __init__(self, directory: str = NETNS_DIR) -> None:
        """Raises NamespaceError."""
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise NamespaceError("watch the names of namespaces", errno=ctypes.get_errno())
        if _libc.inotify_add_watch(self._fd, directory.encode(), _IN_DELETE | _IN_MOVED_FROM) < 0:
            code = ctypes.get_errno()
            os.close(self._fd)
            raise NamespaceError(f"watch {directory}", errno=code)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)

    def fileno(self) -> int:
        """The descriptor to wait on, for ``loop.add_reader``."""
        return self._fd

    def read(self) -> frozenset[str] | None:
        """The deleted names; None when the kernel dropped events. Does not wait."""
        gone: set[str] = set()
        known = True
        while True:
            try:
                data = os.read(self._fd, _RECEIVE_BYTES)
            except BlockingIOError:
                return frozenset(gone) if known else None
            at = 0
            while at < len(data):
                _, mask, _, length = _INOTIFY_HEAD.unpack_from(data, at)
                name = data[at + _INOTIFY_HEAD.size : at + _INOTIFY_HEAD.size + length].rstrip(b"\0")
                at += _INOTIFY_HEAD.size + length
                known = known and not mask & _IN_Q_OVERFLOW
                gone.add(os.fsdecode(name))
