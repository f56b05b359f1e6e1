"""What changes in a namespace, as it happens: links, addresses and routes (rtnetlink multicast groups)."""

from __future__ import annotations

import errno
import socket
from types import TracebackType
from typing import Literal, Self

import msgspec

from netloom.agent.kernel import links, netlink
from netloom.agent.kernel.links import AddressRow, Link, RouteRow
from netloom.agent.kernel.netlink import NetlinkError

_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE = 16, 17, 20, 21, 24, 25

# RTNLGRP_*, linux/rtnetlink.h: IPv4 and IPv6 have groups of their own.
_GROUPS = {"link": (1,), "address": (5, 9), "route": (7, 11)}

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_RECEIVE_BYTES = 256 << 10


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something came or changed (``gone`` False), or went. ``row``: as it is, or was.

    ``overrun``: the kernel dropped events, nobody knows which; look again. Its ``row`` is None.
    """

    kind: Literal["link", "address", "route", "overrun"]
    gone: bool = False
    row: Link | AddressRow | RouteRow | None = None


class Watch:
    """The events of one namespace since it was made. ``fileno`` becomes readable when there are some.

    The kernel reports no change of the alias of a link that is down.
    Keeping it open keeps a deleted namespace alive. One user at a time.
    """

    def __init__(self, namespace: str | None, *kinds: Literal["link", "address", "route"]) -> None:
        """``kinds``: all three when none is named. Raises NamespaceError, NetlinkError."""
        self._wanted = frozenset(kinds or _GROUPS)
        self._socket = netlink.open_socket(netlink.NETLINK_ROUTE, namespace)
        try:
            self._socket.setblocking(False)
            # The kernel speaks to the sockets whose port is not its own, 0: without this, to none that asked nothing.
            self._socket.bind((0, 0))
            # Links in any case: the other rows name theirs.
            for kind in self._wanted | {"link"}:
                for group in _GROUPS[kind]:
                    self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
            self._names = {link.index: link.name for link in links.list_links(namespace)}
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor to wait on, for ``loop.add_reader``."""
        return self._socket.fileno()

    def read(self) -> list[Event]:
        """The events that are there now, oldest first; none when there are none. Never waits.

        Raises NetlinkError when the kernel says something that cannot be read.
        """
        events: list[Event] = []
        while True:
            try:
                data, _, _, sender = self._socket.recvmsg(_RECEIVE_BYTES)
            except BlockingIOError:
                return events
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, "watch links") from error
                events.append(Event(kind="overrun"))
                continue
            if sender[0] == 0:
                for message in netlink.decode(data):
                    events += self._events(message.type, message.payload)

    def _events(self, kind: int, payload: bytes) -> list[Event]:
        event = None
        if kind in (_NEWLINK, _DELLINK):
            # A bridge reports its ports in messages of its own family: changes of its tables, not of the link.
            if not payload or payload[0] == socket.AF_BRIDGE:
                return []
            link = links.decode_link(payload)
            if kind == _NEWLINK:
                self._names[link.index] = link.name
            event = Event(kind="link", gone=kind == _DELLINK, row=link)
        elif kind in (_NEWADDR, _DELADDR):
            row = links.decode_address(payload, self._names)
            event = Event(kind="address", gone=kind == _DELADDR, row=row)
        elif kind in (_NEWROUTE, _DELROUTE):
            route = links.decode_route(payload, self._names)
            event = Event(kind="route", gone=kind == _DELROUTE, row=route)
        return [event] if event and event.kind in self._wanted else []
