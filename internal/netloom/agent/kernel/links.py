"""Links, addresses, routes, rules and neighbours of a namespace (rtnetlink): rows that are there, changes as values.

A change is built as a :class:`Message` and carried out by :func:`change`. Links are named, not numbered. The layout
of the messages is that of linux/rtnetlink.h, if_link.h, if_addr.h, fib_rules.h and neighbour.h.
"""

from __future__ import annotations

import errno
import ipaddress
import random
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkError,
    Socket,
    attribute,
    attribute_map,
    nested,
    number,
    string,
    text,
    u8,
    u16,
    u32,
)

MAIN_TABLE = 254
LOCAL_TABLE = 255

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE, _GETRULE = 32, 33, 34
_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 18, 20, 28, 29, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VLAN_ID = _IFLA_VXLAN_ID = 1
_IFLA_VXLAN_GROUP, _IFLA_VXLAN_LINK, _IFLA_VXLAN_TTL = 2, 3, 5
_IFLA_BR_FORWARD_DELAY, _IFLA_BR_STP_STATE, _IFLA_BR_MCAST_SNOOPING = 1, 5, 23
_VETH_INFO_PEER = 1
_SKIP_STATS = u32(_IFLA_EXT_MASK, 8)  # RTEXT_FILTER_SKIP_STATS: two thirds of each answer
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD, _IFA_F_PERMANENT = 0x02, 0x80

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 6, 7, 15, 18
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 1, 2, 3, 6, 10, 15, 16
_FR_ACT_TO_TBL = 1
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80

_RTPROT_STATIC = 4
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST, _SCOPE_NOWHERE = 0, 253, 254, 255
_RTNH_F_ONLINK = 4

_SCOPES = {_SCOPE_UNIVERSE: "global", 200: "site", _SCOPE_LINK: "link", _SCOPE_HOST: "host", _SCOPE_NOWHERE: "nowhere"}
_PROTOCOLS = {0: "unspec", 1: "redirect", 2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
_ROUTE_KINDS = {
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
_ROUTE_KIND_NUMBERS = {name: number for number, name in _ROUTE_KINDS.items()}

_LINK_HEAD = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS_HEAD = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefixlen, flags, scope, index
_ROUTE_HEAD = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RULE_HEAD = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr: family, dst_len, src_len, tos, table, -, -, action, flags

_NEIGHBOUR_HEAD = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link. ``kind`` is the kernel's word (``bridge``, ``vlan``, ``veth``; empty for real NICs and ``lo``).

    ``vlan_id``: the tag of a VLAN link, the number of a VXLAN. ``parent_index``: what a VLAN stands on, or the other
    end of a veth; in another namespace when ``peer_netns``, the id that this namespace has for that one, is not None.
    ``running``: carrier is there.
    """

    index: int
    name: str
    kind: str
    mac: str
    up: bool
    master_index: int | None
    mtu: int
    alias: str
    vlan_id: int | None
    parent_index: int | None
    peer_netns: int | None
    running: bool


class AddressRow(msgspec.Struct, frozen=True, kw_only=True):
    """An address on a link, ``10.10.1.1/24``.

    ``link_local``: fe80::/10, which comes with the link (IPv4's are given as others are).
    ``scope``: ``global``, ``link``, ``host``.
    """

    link: str
    cidr: str
    link_local: bool
    scope: str


class RouteRow(msgspec.Struct, frozen=True, kw_only=True):
    """A route. Empty ``via``: on-link. ``destination`` of a default route is ``0.0.0.0/0`` or ``::/0``.

    ``protocol``: who made it, ``kernel`` for those that come with an address, ``static`` for ours. ``kind``:
    ``unicast``, ``local``, ``broadcast``, ``blackhole`` and so on. ``metric`` 0 where none was given.
    """

    table: int
    destination: str
    via: str
    link: str
    source: str
    protocol: str
    scope: str
    kind: str
    metric: int


class RuleRow(msgspec.Struct, frozen=True, kw_only=True):
    """A policy routing rule. ``mark`` and ``mask`` are 0 when it does not look at the mark; empty selectors: any."""

    priority: int
    mark: int
    mask: int
    table: int
    source: str = ""  # a prefix, as destination is
    destination: str = ""
    iif: str = ""


class NeighbourRow(msgspec.Struct, frozen=True, kw_only=True):
    """A neighbour on a link. ``permanent``: no ARP message changes it, and it is not counted as the others are."""

    link: str
    address: str
    mac: str
    permanent: bool


# What is there


def list_links(namespace: str | None) -> list[Link]:
    """All links of a namespace, by index. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_links_over(rtnetlink)


def find_links(namespace: str | None, wanted: Iterable[str | int]) -> list[Link]:
    """Those of the links, by name or index, that exist, in that order. Raises NamespaceError, NetlinkError.

    Its cost does not grow with the number of links that there are.
    """
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return find_links_over(rtnetlink, wanted)


def find_links_over(rtnetlink: Socket, wanted: Iterable[str | int]) -> list[Link]:
    """As :func:`find_links`, over a socket that is open already."""
    return list(_find(rtnetlink, wanted).values())


def list_links_over(rtnetlink: Socket, *, kind: str = "", master: int = 0) -> list[Link]:
    """All links, only those of a kind, or only the ports of the bridge with that index. Raises NetlinkError.

    The kernel leaves the others out; one that is too old to do so is helped.
    """
    payload = _LINK_HEAD.pack(0, 0, 0, 0, 0) + _SKIP_STATS
    if kind:
        payload += nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind))
    if master:
        payload += u32(_IFLA_MASTER, master)
    found = rtnetlink.dump(Message(_GETLINK, payload=payload, what="list links"))
    links = (decode_link(payload) for message, payload in found if message == _NEWLINK)
    return [link for link in links if (not kind or link.kind == kind) and (not master or link.master_index == master)]


def list_addresses(namespace: str | None) -> list[AddressRow]:
    """All addresses of a namespace, IPv4 and IPv6, lo's too. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_addresses_over(rtnetlink, _link_names(rtnetlink))


def list_addresses_over(rtnetlink: Socket, names: dict[int, str], family: int = socket.AF_UNSPEC) -> list[AddressRow]:
    """As :func:`list_addresses`, over a socket that is open already; ``names`` are those of the links, by index."""
    found = rtnetlink.dump(Message(_GETADDR, payload=_ADDRESS_HEAD.pack(family, 0, 0, 0, 0), what="list addresses"))
    return [decode_address(payload, names) for kind, payload in found if kind == _NEWADDR]


def list_routes(namespace: str | None) -> list[RouteRow]:
    """All routes of all tables, IPv4 and IPv6, those of the kernel too. Raises NamespaceError, NetlinkError.

    A route with several next hops, which we never make, is one row with the first of them missing (``via`` and
    ``link`` empty).
    """
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_routes_over(rtnetlink, _link_names(rtnetlink))


def list_routes_over(rtnetlink: Socket, names: dict[int, str], family: int = socket.AF_UNSPEC) -> list[RouteRow]:
    """As :func:`list_routes`, over a socket that is open already; ``names`` are those of the links, by index."""
    head = bytes((family,)).ljust(_ROUTE_HEAD.size, b"\0")
    found = rtnetlink.dump(Message(_GETROUTE, payload=head, what="list routes"))
    return [decode_route(payload, names) for kind, payload in found if kind == _NEWROUTE]


def list_rules(namespace: str | None) -> list[RuleRow]:
    """All policy rules of IPv4, by priority. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_rules_over(rtnetlink)


def list_rules_over(rtnetlink: Socket) -> list[RuleRow]:
    """As :func:`list_rules`, over a socket that is open already."""
    head = _RULE_HEAD.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    found = rtnetlink.dump(Message(_GETRULE, payload=head, what="list rules"))
    return [decode_rule(payload) for kind, payload in found if kind == _NEWRULE]


def list_neighbours(namespace: str | None) -> list[NeighbourRow]:
    """All IPv4 neighbours, those that the kernel learned too. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_neighbours_over(rtnetlink, _link_names(rtnetlink))


def list_neighbours_over(rtnetlink: Socket, names: dict[int, str]) -> list[NeighbourRow]:
    """As :func:`list_neighbours`, over a socket that is open already; ``names`` are those of the links, by index."""
    head = _NEIGHBOUR_HEAD.pack(socket.AF_INET, 0, 0, 0, 0)
    found = rtnetlink.dump(Message(_GETNEIGH, payload=head, what="list neighbours"))
    return [decode_neighbour(payload, names) for kind, payload in found if kind == _NEWNEIGH]


def decode_link(payload: bytes) -> Link:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ifinfomsg with attributes."""
    _family, _type, index, flags, _change = _head(_LINK_HEAD, payload, "link")
    told = attribute_map(payload, _LINK_HEAD.size)
    info = attribute_map(told.get(_IFLA_LINKINFO, b""))
    kind = string(info.get(_IFLA_INFO_KIND))
    vlan_id = None
    if kind in ("vlan", "vxlan"):
        vlan_id = number(attribute_map(info.get(_IFLA_INFO_DATA, b"")).get(_IFLA_VLAN_ID))
    return Link(
        index=index,
        name=string(told.get(_IFLA_IFNAME)),
        kind=kind,
        mac=":".join(f"{octet:02x}" for octet in told.get(_IFLA_ADDRESS, b"")),
        up=bool(flags & _IFF_UP),
        master_index=number(told[_IFLA_MASTER]) if _IFLA_MASTER in told else None,
        mtu=number(told.get(_IFLA_MTU)),
        alias=string(told.get(_IFLA_IFALIAS)),
        vlan_id=vlan_id,
        parent_index=number(told[_IFLA_LINK]) if _IFLA_LINK in told else None,
        peer_netns=number(told[_IFLA_LINK_NETNSID]) if _IFLA_LINK_NETNSID in told else None,
        running=bool(flags & _IFF_LOWER_UP),
    )


def decode_address(payload: bytes, names: dict[int, str]) -> AddressRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ifaddrmsg with attributes."""
    family, length, _flags, scope, index = _head(_ADDRESS_HEAD, payload, "address")
    told = attribute_map(payload, _ADDRESS_HEAD.size)
    # On a point-to-point link IFA_ADDRESS is the other side's; IFA_LOCAL, where there is one, is ours.
    address = _address(family, told.get(_IFA_LOCAL, told.get(_IFA_ADDRESS, b"")))
    return AddressRow(
        link=names.get(index, f"#{index}"),
        cidr=f"{address}/{length}",
        link_local=":" in address and ipaddress.ip_address(address).is_link_local,
        scope=_SCOPES.get(scope, str(scope)),
    )


def decode_route(payload: bytes, names: dict[int, str]) -> RouteRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no rtmsg with attributes."""
    head = _head(_ROUTE_HEAD, payload, "route")
    family, length, table, protocol, scope, kind = head[0], head[1], head[4], head[5], head[6], head[7]
    told = attribute_map(payload, _ROUTE_HEAD.size)
    out = number(told.get(_RTA_OIF))
    destination = _address(family, told[_RTA_DST]) if _RTA_DST in told else _unspecified(family)
    return RouteRow(
        table=number(told.get(_RTA_TABLE), table),
        destination=f"{destination}/{length}",
        via=_address(family, told.get(_RTA_GATEWAY, b"")) or _via(told.get(_RTA_VIA, b"")),
        link=names.get(out, f"#{out}") if out else "",
        source=_address(family, told.get(_RTA_PREFSRC, b"")),
        protocol=_PROTOCOLS.get(protocol, str(protocol)),
        scope=_SCOPES.get(scope, str(scope)),
        kind=_ROUTE_KINDS.get(kind, str(kind)),
        metric=number(told.get(_RTA_PRIORITY)),
    )


def decode_rule(payload: bytes) -> RuleRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no fib_rule_hdr with attributes."""
    head = _head(_RULE_HEAD, payload, "rule")
    family, to_length, from_length = head[0], head[1], head[2]
    told = attribute_map(payload, _RULE_HEAD.size)
    return RuleRow(
        priority=number(told.get(_FRA_PRIORITY)),
        mark=number(told.get(_FRA_FWMARK)),
        mask=number(told.get(_FRA_FWMASK)),
        table=number(told.get(_FRA_TABLE), head[4]),
        source=f"{_address(family, told[_FRA_SRC])}/{from_length}" if _FRA_SRC in told else "",
        destination=f"{_address(family, told[_FRA_DST])}/{to_length}" if _FRA_DST in told else "",
        iif=string(told.get(_FRA_IIFNAME)),
    )


def decode_neighbour(payload: bytes, names: dict[int, str]) -> NeighbourRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ndmsg with attributes."""
    family, index, state, _flags, _type = _head(_NEIGHBOUR_HEAD, payload, "neighbour")
    told = attribute_map(payload, _NEIGHBOUR_HEAD.size)
    return NeighbourRow(
        link=names.get(index, f"#{index}"),
        address=_address(family, told.get(_NDA_DST, b"")),
        mac=":".join(f"{octet:02x}" for octet in told.get(_NDA_LLADDR, b"")),
        permanent=bool(state & _NUD_PERMANENT),
    )


# Changes


def change(namespace: str | None, messages: Iterable[Message]) -> None:
    """Carry out changes in order, in one datagram as far as links need not be looked up that it makes itself.

    Each message stands for itself: one that fails does not keep the others of its datagram from happening.

    Raises NetlinkError that names the first message that failed in words, NamespaceError.
    """
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        change_over(rtnetlink, messages)


def change_over(rtnetlink: Socket, messages: Iterable[Message]) -> None:
    """As :func:`change`, over a socket that is open already."""
    flat = [part for message in messages for part in (message, *message.then)]
    known = _indexes(rtnetlink, {name for message in flat for _, name in message.links})
    batch: list[Message] = []
    for message in flat:
        missing = {name for _, name in message.links} - known.keys()
        if missing:
            # Perhaps a message before this one makes it.
            rtnetlink.request(batch)
            batch = []
            known |= _indexes(rtnetlink, missing)
            missing -= known.keys()
        if not missing:
            batch.append(_filled(message, known))
        elif errno.ENODEV not in message.harmless:
            raise NetlinkError(errno.ENODEV, message.what, f"there is no link {', '.join(sorted(missing))}")
    rtnetlink.request(batch)


def make_bridge(name: str, alias: str = "") -> Message:
    """A bridge that forwards from the first packet on: no spanning tree, no delay, no multicast snooping.

    EEXIST when a link has that name; its alias is then left alone, whoever made it.
    """
    data = (u32(_IFLA_BR_FORWARD_DELAY, 0), u32(_IFLA_BR_STP_STATE, 0), u8(_IFLA_BR_MCAST_SNOOPING, 0))
    return _make(name, "bridge", nested(_IFLA_INFO_DATA, *data), alias, f"make bridge {name}")


def make_vlan(name: str, parent: str, vlan_id: int, alias: str = "") -> Message:
    """An 802.1Q sub-interface of ``parent``. EEXIST when it is there, EOPNOTSUPP on a kernel without 8021q."""
    data = nested(_IFLA_INFO_DATA, u16(_IFLA_VLAN_ID, vlan_id))
    what = f"make VLAN link {name} with tag {vlan_id} on {parent}"
    return _make(name, "vlan", data, alias, what, links={_IFLA_LINK: parent})


def make_vxlan(name: str, parent: str, vni: int, group: str, ttl: int, alias: str = "") -> Message:
    """A VXLAN tunnel over ``parent`` to whoever joined the multicast group, at the kernel's own port (8472).

    EEXIST when it is there, or another tunnel has that number; EOPNOTSUPP on a kernel without vxlan.
    """
    data = (u32(_IFLA_VXLAN_ID, vni), attribute(_IFLA_VXLAN_GROUP, socket.inet_aton(group)), u8(_IFLA_VXLAN_TTL, ttl))
    what = f"make VXLAN link {name} with number {vni} over {parent}"
    made = _make(name, "vxlan", nested(_IFLA_INFO_DATA, *data, u32(_IFLA_VXLAN_LINK, 0)), alias, what)
    return replace(made, links=((len(made.payload) - 4, parent),))  # the last value of the innermost attribute


def make_veth(
    host_link: str, bridge: str, link: str, mac: str, mtu: int, namespace_fd: int, alias: str = ""
) -> Message:
    """A veth pair in one step: ``host_link`` as a port of ``bridge``, ``link`` with ``mac`` in the other namespace.

    Both ends get ``mtu`` (0: the kernel's 1500) and are down. An empty ``bridge``: no port of anything.
    ``namespace_fd`` must be open until the message was sent. EEXIST when either name is taken.
    """
    peer = [_LINK_HEAD.pack(0, 0, 0, 0, 0), text(_IFLA_IFNAME, link), u32(_IFLA_NET_NS_FD, namespace_fd)]
    if mac:
        peer.append(attribute(_IFLA_ADDRESS, _mac(mac)))
    if mtu:
        peer.append(u32(_IFLA_MTU, mtu))
    data = nested(_IFLA_INFO_DATA, nested(_VETH_INFO_PEER, *peer))
    what = f"make veth {host_link} with {link} at its other end" + (f" as a port of {bridge}" if bridge else "")
    more = (u32(_IFLA_MTU, mtu),) if mtu else ()
    return _make(host_link, "veth", data, alias, what, *more, links={_IFLA_MASTER: bridge} if bridge else {})


def set_up(name: str) -> Message:
    """Switch a link on."""
    return _set(name, f"set {name} up", flags=_IFF_UP, mask=_IFF_UP)


def set_down(name: str) -> Message:
    """Switch a link off; its routes go, its IPv4 addresses stay."""
    return _set(name, f"set {name} down", mask=_IFF_UP)


def set_master(name: str, bridge: str | None) -> Message:
    """Make ``name`` a port of ``bridge``; of nothing when None."""
    if not bridge:
        return _set(name, f"take {name} out of its bridge", u32(_IFLA_MASTER, 0))
    return _set(name, f"make {name} a port of {bridge}", links={_IFLA_MASTER: bridge})


def set_alias(name: str, alias: str) -> Message:
    """Write the link's alias (IFLA_IFALIAS), at most 255 bytes; empty takes it away."""
    # Without the zero byte: the kernel keeps what it gets, and takes an empty value as "none".
    return _set(name, f"set the alias of {name}", attribute(_IFLA_IFALIAS, alias.encode()))


def set_mac(name: str, mac: str) -> Message:
    """Give a link another MAC address. ValueError for what is none."""
    return _set(name, f"set the MAC address of {name} to {mac}", attribute(_IFLA_ADDRESS, _mac(mac)))


def set_mtu(name: str, mtu: int) -> Message:
    """Set the largest packet, in bytes without the Ethernet header."""
    return _set(name, f"set the MTU of {name} to {mtu}", u32(_IFLA_MTU, mtu))


def delete_link(name: str) -> Message:
    """ENODEV when there is none. A veth takes its other end along, a bridge lets its ports go."""
    payload = _LINK_HEAD.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name)
    return Message(_DELLINK, payload=payload, what=f"delete link {name}")


def add_address(link: str, cidr: str) -> Message:
    """Put an address on a link, usable at once: IPv6 without duplicate address detection. EEXIST when it is there."""
    return _address_message(_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, link, cidr, f"add address {cidr} to {link}")


def delete_address(link: str, cidr: str) -> Message:
    """EADDRNOTAVAIL when it is not there.

    IPv4: deleting the first address of a prefix takes the others of that prefix along, unless the sysctl
    promote_secondaries is on.
    """
    return _address_message(_DELADDR, 0, link, cidr, f"delete address {cidr} from {link}")


def add_route(
    destination: str, link: str, via: str = "", source: str = "", table: int = MAIN_TABLE, metric: int = 0
) -> Message:
    """A static route: via a neighbour, or on-link when ``via`` is empty. EEXIST when one like it is there."""
    what = f"add {_route_words(destination, link, via, table)}"
    return _route_message(_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, destination, link, via, source, table, metric, what)


def replace_route(
    destination: str,
    link: str = "",
    via: str = "",
    source: str = "",
    table: int = MAIN_TABLE,
    metric: int = 0,
    kind: str = "unicast",
) -> Message:
    """As :func:`add_route`, instead of whatever route to that destination stands in the table with that metric.

    ``kind``: ``blackhole``, ``unreachable`` and ``prohibit`` have no link.
    """
    what = f"put {_route_words(destination, link, via, table, kind)}"
    return _route_message(
        _NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, destination, link, via, source, table, metric, what, kind
    )


def delete_route(
    destination: str, link: str = "", via: str = "", source: str = "", table: int = MAIN_TABLE, metric: int = 0
) -> Message:
    """The route that agrees with all that is given. ESRCH when there is none."""
    what = f"delete {_route_words(destination, link, via, table)}"
    return _route_message(_DELROUTE, 0, destination, link, via, source, table, metric, what)


def add_rule(
    priority: int,
    mark: int,
    mask: int,
    table: int,
    source: str = "",
    destination: str = "",
    iif: str = "",
    family: int = socket.AF_INET,
) -> Message:
    """Packets whose mark, under ``mask``, is ``mark`` look up ``table``: those from, to, and by what is not empty.

    EEXIST when that rule is there.
    """
    row = RuleRow(priority=priority, mark=mark, mask=mask, table=table, source=source, destination=destination, iif=iif)
    return _rule_message(_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, row, family, "add")


def delete_rule(
    priority: int,
    mark: int,
    mask: int,
    table: int,
    source: str = "",
    destination: str = "",
    iif: str = "",
    family: int = socket.AF_INET,
) -> Message:
    """ENOENT when that rule is not there."""
    row = RuleRow(priority=priority, mark=mark, mask=mask, table=table, source=source, destination=destination, iif=iif)
    return _rule_message(_DELRULE, 0, row, family, "delete")


def put_neighbour(link: str, address: str, mac: str) -> Message:
    """The address is at that MAC address, permanently, instead of whatever was known or learned of it.

    Permanent entries are exempt from the kernel's limits (net.ipv4.neigh.default.gc_thresh3, since Linux 5.0). The link
    going down, or getting another MAC address, takes them all away.
    """
    payload = _NEIGHBOUR_HEAD.pack(socket.AF_INET, 0, _NUD_PERMANENT, 0, 0)
    payload += attribute(_NDA_DST, ipaddress.IPv4Address(address).packed) + attribute(_NDA_LLADDR, _mac(mac))
    what = f"put neighbour {address} at {mac} on {link}"
    return Message(_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, payload, what=what, links=((4, link),))


def delete_neighbour(link: str, address: str) -> Message:
    """ENOENT when nothing is known of the address."""
    payload = _NEIGHBOUR_HEAD.pack(socket.AF_INET, 0, 0, 0, 0)
    payload += attribute(_NDA_DST, ipaddress.IPv4Address(address).packed)
    return Message(_DELNEIGH, 0, payload, what=f"delete neighbour {address} on {link}", links=((4, link),))


# Below the surface


def _make(
    name: str, kind: str, data: bytes, alias: str, what: str, *more: bytes, links: dict[int, str] | None = None
) -> Message:
    index = 0
    then: tuple[Message, ...] = ()
    if alias:
        # The kernel takes no alias with the creation. The second message must only ever meet the link that the
        # first one made, never a stranger's of the same name, for we delete what bears our alias: so the number of
        # the new link is chosen here. All numbers above 2**24 are free, as the kernel counts up from 1.
        index = random.SystemRandom().randrange(1 << 24, 1 << 30)
        mark = _LINK_HEAD.pack(0, 0, index, 0, 0) + attribute(_IFLA_IFALIAS, alias.encode())
        then = (Message(_SETLINK, payload=mark, what=f"set the alias of {name}", harmless=frozenset({errno.ENODEV})),)
    info = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind), data)
    payload, fills = _with_links(
        _LINK_HEAD.pack(0, 0, index, 0, 0) + text(_IFLA_IFNAME, name) + b"".join(more) + info, links or {}
    )
    return Message(_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload, what=what, links=fills, then=then)


def _set(
    name: str, what: str, *more: bytes, flags: int = 0, mask: int = 0, links: dict[int, str] | None = None
) -> Message:
    head = _LINK_HEAD.pack(0, 0, 0, flags, mask) + text(_IFLA_IFNAME, name) + b"".join(more)
    payload, fills = _with_links(head, links or {})
    return Message(_SETLINK, 0, payload, what=what, links=fills)


def _with_links(payload: bytes, links: dict[int, str]) -> tuple[bytes, tuple[tuple[int, str], ...]]:
    fills = []
    for kind, name in links.items():
        fills.append((len(payload) + 4, name))
        payload += u32(kind, 0)
    return payload, tuple(fills)


def _address_message(kind: int, flags: int, link: str, cidr: str, what: str) -> Message:
    interface = ipaddress.ip_interface(cidr)
    v6 = interface.version == 6
    family = socket.AF_INET6 if v6 else socket.AF_INET
    head = _ADDRESS_HEAD.pack(family, interface.network.prefixlen, _IFA_F_NODAD if v6 else 0, 0, 0)
    packed = interface.ip.packed
    payload = head + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return Message(kind, flags, payload, what=what, links=((4, link),))


def _route_message(
    message: int,
    flags: int,
    destination: str,
    link: str,
    via: str,
    source: str,
    table: int,
    metric: int,
    what: str,
    kind: str = "unicast",
) -> Message:
    network = ipaddress.ip_network(destination)
    family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
    scope = _SCOPE_LINK if link and not via and network.version == 4 else _SCOPE_UNIVERSE
    protocol, kind_number = _RTPROT_STATIC, _ROUTE_KIND_NUMBERS[kind]
    # A neighbour is on the link that is named with it, whether or not another route says so.
    on_link = _RTNH_F_ONLINK if link and via and network.version == 4 else 0
    if message == _DELROUTE:
        scope, protocol, kind_number, on_link = _SCOPE_NOWHERE, 0, 0, 0  # whatever it is
    payload = _ROUTE_HEAD.pack(
        family, network.prefixlen, 0, 0, table if table < 256 else 0, protocol, scope, kind_number, on_link
    )
    payload += attribute(_RTA_DST, network.network_address.packed) + u32(_RTA_TABLE, table)
    if via:
        payload += attribute(_RTA_GATEWAY, ipaddress.ip_address(via).packed)
    if source:
        payload += attribute(_RTA_PREFSRC, ipaddress.ip_address(source).packed)
    if metric:
        payload += u32(_RTA_PRIORITY, metric)
    payload, fills = _with_links(payload, {_RTA_OIF: link} if link else {})
    return Message(message, flags, payload, what=what, links=fills)


def _route_words(destination: str, link: str, via: str, table: int, kind: str = "unicast") -> str:
    words = f"{'route' if kind == 'unicast' else kind} to {destination}"
    if via:
        words += f" via {via}"
    if link:
        words += f" on {link}"
    return words if table == MAIN_TABLE else f"{words} in table {table}"


def _rule_message(message: int, flags: int, row: RuleRow, family: int, verb: str) -> Message:
    of, to = (ipaddress.ip_network(it) if it else None for it in (row.source, row.destination))
    lengths = to.prefixlen if to else 0, of.prefixlen if of else 0
    payload = _RULE_HEAD.pack(family, *lengths, 0, row.table if row.table < 256 else 0, 0, 0, _FR_ACT_TO_TBL, 0)
    payload += u32(_FRA_PRIORITY, row.priority) + u32(_FRA_TABLE, row.table)
    for kind, network in ((_FRA_SRC, of), (_FRA_DST, to)):
        payload += attribute(kind, network.network_address.packed) if network else b""
    if row.mask:
        payload += u32(_FRA_FWMARK, row.mark) + u32(_FRA_FWMASK, row.mask)
    if row.iif:
        payload += text(_FRA_IIFNAME, row.iif)
    what = f"{verb} rule {row.priority} for mark {row.mark:#x}/{row.mask:#x} to table {row.table}"
    return Message(message, flags, payload, what=what)


def _link_names(rtnetlink: Socket) -> dict[int, str]:
    return {link.index: link.name for link in list_links_over(rtnetlink)}


def _indexes(rtnetlink: Socket, names: set[str]) -> dict[str, int]:
    """The indexes of those of the links that exist."""
    return {str(name): link.index for name, link in _find(rtnetlink, sorted(names)).items()}


def _find(rtnetlink: Socket, wanted: Iterable[str | int]) -> dict[str | int, Link]:
    """By what was asked for, which may be another name than the link's own (an alternative name)."""
    messages = {it: _ask(it) for it in wanted}
    found: dict[str | int, Link] = {}
    for (it, message), answer in zip(messages.items(), rtnetlink.exchange([*messages.values()]), strict=True):
        if answer.errno not in (0, errno.ENODEV):
            raise NetlinkError(answer.errno, message.what, answer.ext_ack)
        for data in answer.data:
            found[it] = decode_link(data.payload)
    return found


def _ask(link: str | int) -> Message:
    if isinstance(link, int):
        payload = _LINK_HEAD.pack(0, 0, link, 0, 0) + _SKIP_STATS
        return Message(_GETLINK, payload=payload, what=f"find link number {link}")
    payload = _LINK_HEAD.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, link) + _SKIP_STATS
    return Message(_GETLINK, payload=payload, what=f"find link {link}")


def _filled(message: Message, known: dict[str, int]) -> Message:
    if not message.links:
        return message
    payload = bytearray(message.payload)
    for offset, name in message.links:
        struct.pack_into("=I", payload, offset, known[name])
    return replace(message, payload=bytes(payload))


def _head(layout: struct.Struct, payload: bytes, what: str) -> Sequence[int]:
    if len(payload) < layout.size:
        raise NetlinkError(errno.EBADMSG, f"netlink {what}", "cut short")
    return layout.unpack_from(payload)


def _address(family: int, packed: bytes) -> str:
    if (family, len(packed)) in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        return socket.inet_ntop(family, packed)
    return ""


def _unspecified(family: int) -> str:
    return "::" if family == socket.AF_INET6 else "0.0.0.0"


def _via(value: bytes) -> str:
    """RTA_VIA: a next hop of another family than the destination's."""
    return _address(number(value[:2]), value[2:])


def _mac(mac: str) -> bytes:
    try:
        packed = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        packed = b""
    if len(packed) != 6:
        raise ValueError(f"{mac!r} is no MAC address")
    return packed
