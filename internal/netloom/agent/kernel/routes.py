"""Routes (rtnetlink): list, replace, delete. Message layout: struct rtmsg in linux/rtnetlink.h."""

from __future__ import annotations

import ipaddress
import socket
import struct

import msgspec

from netloom.agent.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    Message,
    Socket,
    attribute,
    attribute_map,
    number,
    u32,
)
from netloom.agent.kernel.rtnetlink import (
    RTM_DELROUTE,
    RTM_GETROUTE,
    RTM_NEWROUTE,
    SCOPE_LINK,
    SCOPE_NOWHERE,
    SCOPE_UNIVERSE,
    address_text,
    family_of,
    fixed_part,
    scope_name,
    with_links,
)
from netloom.netobjects import Route

LOCAL_TABLE = 255

_HEAD = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 6, 7, 15, 18
_RTPROT_STATIC = 4
_RTNH_F_ONLINK = 4

_PROTOCOLS = {0: "unspec", 1: "redirect", 2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
_AUTOMATIC_PROTOCOLS = frozenset({"kernel", "redirect", "ra"})
_KINDS = {
    0: "unspec",
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}
_KIND_NUMBERS = {name: number for number, name in _KINDS.items()}


class RouteRow(msgspec.Struct, frozen=True, kw_only=True):
    """A route as the kernel lists it. ``destination`` of a default route is ``0.0.0.0/0`` or ``::/0``.

    ``protocol``: what added it, ``kernel`` for the routes that come with an address, ``static`` for ours. ``metric`` 0:
    none was given. Of a route with several next hops, ``via`` and ``link`` are empty; we add none of those.
    """

    route: Route
    protocol: str
    scope: str
    metric: int

    @property
    def automatic(self) -> bool:
        """Whether the kernel adds and deletes this route by itself."""
        return self.protocol in _AUTOMATIC_PROTOCOLS or self.route.table == LOCAL_TABLE


def list_routes_over(rtnetlink: Socket, names: dict[int, str], family: int = socket.AF_UNSPEC) -> list[RouteRow]:
    """All routes of all tables, automatic ones too. ``names``: the links' names by index. Raises NetlinkError."""
    head = bytes((family,)).ljust(_HEAD.size, b"\0")
    found = rtnetlink.dump(Message(RTM_GETROUTE, payload=head, what="list routes"))
    return [decode_route(payload, names) for kind, payload in found if kind == RTM_NEWROUTE]


def decode_route(payload: bytes, names: dict[int, str]) -> RouteRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no rtmsg with attributes."""
    family, length, _source_length, _tos, table, protocol, scope, kind, _flags = fixed_part(_HEAD, payload, "route")
    values = attribute_map(payload, _HEAD.size)
    out = number(values.get(_RTA_OIF))
    unspecified = "::" if family == socket.AF_INET6 else "0.0.0.0"
    destination = address_text(family, values[_RTA_DST]) if _RTA_DST in values else unspecified
    return RouteRow(
        route=Route(
            table=number(values.get(_RTA_TABLE), table),
            destination=f"{destination}/{length}",
            link=names.get(out, f"#{out}") if out else "",
            via=address_text(family, values.get(_RTA_GATEWAY, b"")) or _other_family(values.get(_RTA_VIA, b"")),
            source=address_text(family, values.get(_RTA_PREFSRC, b"")),
            kind=_KINDS.get(kind, str(kind)),
        ),
        protocol=_PROTOCOLS.get(protocol, str(protocol)),
        scope=scope_name(scope),
        metric=number(values.get(_RTA_PRIORITY)),
    )


def replace_route(route: Route) -> Message:
    """Add a static route, or replace the one to the same destination in the same table."""
    network = ipaddress.ip_network(route.destination)
    ip4 = network.version == 4
    scope = SCOPE_LINK if ip4 and route.link and not route.via else SCOPE_UNIVERSE
    # Accept the gateway on the route's link even if no other route leads to the gateway.
    flags = _RTNH_F_ONLINK if ip4 and route.link and route.via else 0
    head = (_RTPROT_STATIC, scope, _KIND_NUMBERS[route.kind], flags)
    return _message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route, head, f"replace route {route}")


def delete_route(route: Route) -> Message:
    """Delete the route that matches all fields that are not empty, whatever its kind. ESRCH when there is none."""
    return _message(RTM_DELROUTE, 0, route, (0, SCOPE_NOWHERE, 0, 0), f"delete route {route}")


def _message(message: int, flags: int, route: Route, head: tuple[int, int, int, int], what: str) -> Message:
    network = ipaddress.ip_network(route.destination)
    table = route.table if route.table < 256 else 0  # larger numbers fit only into the attribute
    payload = _HEAD.pack(family_of(network.version), network.prefixlen, 0, 0, table, *head)
    payload += attribute(_RTA_DST, network.network_address.packed) + u32(_RTA_TABLE, route.table)
    if route.via:
        payload += attribute(_RTA_GATEWAY, ipaddress.ip_address(route.via).packed)
    if route.source:
        payload += attribute(_RTA_PREFSRC, ipaddress.ip_address(route.source).packed)
    payload, links = with_links(payload, {_RTA_OIF: route.link} if route.link else {})
    return Message(message, flags, payload, what=what, links=links)


def _other_family(value: bytes) -> str:
    """The next hop in an RTA_VIA, which is of another family than the destination."""
    return address_text(number(value[:2]), value[2:])
