"""Links (rtnetlink): list, create, change, delete. Also: carry out changes to any rtnetlink object.

A change is a :class:`Message`; :func:`change` sends it. Messages name links, and :func:`change` fills in the indexes.
Message layout: linux/if_link.h.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
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
from netloom.agent.kernel.rtnetlink import (
    RTM_DELLINK,
    RTM_GETLINK,
    RTM_GETSTATS,
    RTM_NEWLINK,
    RTM_SETLINK,
    fixed_part,
    mac_text,
    packed_mac,
    with_links,
)

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 18, 20, 28, 29, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VLAN_ID = _IFLA_VXLAN_ID = 1
_IFLA_VXLAN_GROUP, _IFLA_VXLAN_LINK, _IFLA_VXLAN_TTL, _IFLA_VXLAN_LIMIT = 2, 3, 5, 9
_IFLA_BR_FORWARD_DELAY, _IFLA_BR_STP_STATE, _IFLA_BR_VLAN_FILTERING, _IFLA_BR_MCAST_SNOOPING = 1, 5, 7, 23
_IFLA_BR_GROUP_FWD_MASK, _IFLA_BR_FDB_MAX_LEARNED = 9, 49
_IFLA_BR_NF_CALL_IPTABLES, _IFLA_BR_NF_CALL_IP6TABLES = 36, 37
# Addresses that a bridge or a tunnel learns; frames to others are flooded in their segment. Kernels before 6.7 ignore
# the setting of bridges.
LEARNED_MAX = 4096  # guard: bridges-learn-a-bounded-number
# Bit 14: the bridge treats 01:80:c2:00:00:0e as any other group address. Otherwise it hands these frames to the host
# before any netfilter hook (br_handle_frame).
_FORWARD_LLDP = 1 << 14
_VETH_INFO_PEER = 1
_SKIP_STATS = u32(_IFLA_EXT_MASK, 8)  # RTEXT_FILTER_SKIP_STATS: statistics are two thirds of each answer
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000

_HEAD = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_STATS, _STATS_LINK_64 = struct.Struct("=BxxxII"), 1  # if_stats_msg: family, index, filter: a bit for each attribute


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link. ``kind``: as ip-link(8) names it (``bridge``, ``vlan``, ``veth``); empty for physical NICs and ``lo``.

    ``vlan_id``: the tag of a VLAN link, the VNI of a VXLAN. ``parent_index``: the link below a VLAN link, or the other
    end of a veth pair. If ``peer_netns`` is not None, that link is in the namespace with this id. ``running``: the link
    has a carrier.
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
    vlan_filtering: bool = False  # of a bridge
    calls_iptables: bool = False  # of a bridge: its own setting, whatever net.bridge.bridge-nf-call-iptables is
    calls_ip6tables: bool = False
    learned_max: int | None = None  # of a bridge; 0: no bound, None: the kernel knows none (Linux before 6.7)


def list_links(namespace: str | None) -> list[Link]:
    """All links of a namespace, by index. Raises NamespaceError, NetlinkError."""
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return list_links_over(rtnetlink)


def find_links(namespace: str | None, wanted: Iterable[str | int]) -> list[Link]:
    """The links with these names or indexes, in this order, without those that do not exist.

    The cost does not grow with the number of links in the namespace. Raises NamespaceError, NetlinkError.
    """
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return find_links_over(rtnetlink, wanted)


def find_links_over(rtnetlink: Socket, wanted: Iterable[str | int]) -> list[Link]:
    """As :func:`find_links`, over an open socket."""
    return list(_find(rtnetlink, wanted).values())


def list_links_over(rtnetlink: Socket, *, kind: str = "", master: int = 0) -> list[Link]:
    """All links, or those of a kind, or the ports of the bridge with the index ``master``. Raises NetlinkError.

    The kernel selects them. Kernels that are too old for that list all links, so the answer is selected again.
    """
    payload = _HEAD.pack(0, 0, 0, 0, 0) + _SKIP_STATS
    if kind:
        payload += nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind))
    if master:
        payload += u32(_IFLA_MASTER, master)
    found = rtnetlink.dump(Message(RTM_GETLINK, payload=payload, what="list links"))
    links = (decode_link(payload) for message, payload in found if message == RTM_NEWLINK)
    return [link for link in links if (not kind or link.kind == kind) and (not master or link.master_index == master)]


def received_packets(rtnetlink: Socket, index: int) -> int | None:
    """How many packets the link has received; None when there is no such link. Raises NetlinkError."""
    asked = Message(RTM_GETSTATS, payload=_STATS.pack(0, index, 1), what=f"read the counters of link {index}")
    (answer,) = rtnetlink.exchange([asked])
    if answer.errno == errno.ENODEV:
        return None
    if answer.errno:
        raise NetlinkError(answer.errno, asked.what, answer.ext_ack)
    (data,) = answer.data
    return _received(data.payload)


def all_received_packets(rtnetlink: Socket) -> dict[int, int]:
    """How many packets each link of the namespace has received, by its index. Raises NetlinkError."""
    found = rtnetlink.dump(Message(RTM_GETSTATS, payload=_STATS.pack(0, 0, 1), what="read the counters of the links"))
    return {_STATS.unpack_from(payload)[1]: _received(payload) for _, payload in found}


def _received(payload: bytes) -> int:
    return number(attribute_map(payload, _STATS.size).get(_STATS_LINK_64, b"")[:8])  # rtnl_link_stats64.rx_packets


def decode_link(payload: bytes) -> Link:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ifinfomsg with attributes."""
    _family, _type, index, flags, _change = fixed_part(_HEAD, payload, "link")
    values = attribute_map(payload, _HEAD.size)
    info = attribute_map(values.get(_IFLA_LINKINFO, b""))
    kind = string(info.get(_IFLA_INFO_KIND))
    vlan_id = None
    if kind in ("vlan", "vxlan"):
        vlan_id = number(attribute_map(info.get(_IFLA_INFO_DATA, b"")).get(_IFLA_VLAN_ID))
    bridge = attribute_map(info.get(_IFLA_INFO_DATA, b"")) if kind == "bridge" else {}
    return Link(
        index=index,
        name=string(values.get(_IFLA_IFNAME)),
        kind=kind,
        mac=mac_text(values.get(_IFLA_ADDRESS, b"")),
        up=bool(flags & _IFF_UP),
        master_index=number(values[_IFLA_MASTER]) if _IFLA_MASTER in values else None,
        mtu=number(values.get(_IFLA_MTU)),
        alias=string(values.get(_IFLA_IFALIAS)),
        vlan_id=vlan_id,
        parent_index=number(values[_IFLA_LINK]) if _IFLA_LINK in values else None,
        peer_netns=number(values[_IFLA_LINK_NETNSID]) if _IFLA_LINK_NETNSID in values else None,
        running=bool(flags & _IFF_LOWER_UP),
        vlan_filtering=any(bridge.get(_IFLA_BR_VLAN_FILTERING, b"")),
        calls_iptables=any(bridge.get(_IFLA_BR_NF_CALL_IPTABLES, b"")),
        calls_ip6tables=any(bridge.get(_IFLA_BR_NF_CALL_IP6TABLES, b"")),
        learned_max=number(bridge[_IFLA_BR_FDB_MAX_LEARNED]) if _IFLA_BR_FDB_MAX_LEARNED in bridge else None,
    )


# Changes


def change(namespace: str | None, messages: Iterable[Message]) -> None:
    """Send changes in order. A new datagram begins only where a message names a link that an earlier one creates.

    The kernel processes each message on its own: a failed one does not affect the others of its datagram.

    Raises NetlinkError that describes the first message that failed; NamespaceError.
    """
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        change_over(rtnetlink, messages)


def change_over(rtnetlink: Socket, messages: Iterable[Message]) -> None:
    """As :func:`change`, over an open socket."""
    flat = [part for message in messages for part in (message, *message.then)]
    known = _indexes(rtnetlink, {name for message in flat for _, name in message.links})
    batch: list[Message] = []
    for message in flat:
        missing = {name for _, name in message.links} - known.keys()
        if missing:
            # An earlier message may create it.
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
    """Create a bridge that forwards at once: no spanning tree, no forward delay, no multicast snooping.

    EEXIST when a link has that name; the alias of that link is not changed.
    """
    data = (u32(_IFLA_BR_FORWARD_DELAY, 0), u32(_IFLA_BR_STP_STATE, 0), u8(_IFLA_BR_MCAST_SNOOPING, 0))
    return _make(name, "bridge", nested(_IFLA_INFO_DATA, *data), alias, f"make bridge {name}")


def confine_bridge(name: str) -> Message:
    """Have the bridge pass frames to 01:80:c2:00:00:0e through netfilter, as it does with the other frames.

    Also bound the addresses that it learns.
    """
    return _bridge_settings(name, _FORWARD_LLDP, LEARNED_MAX)


def release_bridge(name: str) -> Message:
    """Undo confine_bridge: the kernel's defaults."""
    return _bridge_settings(name, 0, 0)


def _bridge_settings(name: str, group_fwd_mask: int, learned_max: int) -> Message:
    data = nested(
        _IFLA_INFO_DATA,
        u16(_IFLA_BR_GROUP_FWD_MASK, group_fwd_mask),
        u32(_IFLA_BR_FDB_MAX_LEARNED, learned_max),
    )
    info = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"), data)
    payload = _HEAD.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name) + info
    # RTM_NEWLINK without NLM_F_CREATE: RTM_SETLINK ignores the settings of a kind.
    return Message(RTM_NEWLINK, payload=payload, what=f"set group_fwd_mask and fdb_max_learned of {name}")


def make_vlan(name: str, parent: str, vlan_id: int, alias: str = "") -> Message:
    """Create an 802.1Q sub-interface of ``parent``. EEXIST when it exists; EOPNOTSUPP without the 8021q module."""
    data = nested(_IFLA_INFO_DATA, u16(_IFLA_VLAN_ID, vlan_id))
    what = f"make VLAN link {name} with tag {vlan_id} on {parent}"
    return _make(name, "vlan", data, alias, what, links={_IFLA_LINK: parent})


def make_vxlan(name: str, parent: str, vni: int, group: str, ttl: int, alias: str = "") -> Message:
    """Create a VXLAN tunnel over ``parent`` to the members of a multicast group, on the kernel's default port 8472.

    EEXIST when it exists, or when another tunnel has that VNI; EOPNOTSUPP without the vxlan module.
    """
    data = (u32(_IFLA_VXLAN_ID, vni), attribute(_IFLA_VXLAN_GROUP, socket.inet_aton(group)), u8(_IFLA_VXLAN_TTL, ttl))
    limit = u32(_IFLA_VXLAN_LIMIT, LEARNED_MAX)  # the kernel accepts it only here
    what = f"make VXLAN link {name} with number {vni} over {parent}"
    made = _make(name, "vxlan", nested(_IFLA_INFO_DATA, *data, limit, u32(_IFLA_VXLAN_LINK, 0)), alias, what)
    return replace(made, links=((len(made.payload) - 4, parent),))  # the last value of the innermost attribute


def make_veth(
    host_link: str, bridge: str, link: str, mac: str, mtu: int, namespace_fd: int, alias: str = ""
) -> Message:
    """Create a veth pair: ``host_link`` as a port of ``bridge``, ``link`` with ``mac`` in the other namespace.

    Both ends have ``mtu`` (0: the kernel's default, 1500) and are down. Empty ``bridge``: a port of no bridge.
    ``namespace_fd`` must be open until the message is sent. EEXIST when either name is taken.
    """
    peer = [_HEAD.pack(0, 0, 0, 0, 0), text(_IFLA_IFNAME, link), u32(_IFLA_NET_NS_FD, namespace_fd)]
    if mac:
        peer.append(attribute(_IFLA_ADDRESS, packed_mac(mac)))
    if mtu:
        peer.append(u32(_IFLA_MTU, mtu))
    data = nested(_IFLA_INFO_DATA, nested(_VETH_INFO_PEER, *peer))
    what = f"make veth {host_link} with {link} at its other end" + (f" as a port of {bridge}" if bridge else "")
    more = (u32(_IFLA_MTU, mtu),) if mtu else ()
    return _make(host_link, "veth", data, alias, what, *more, links={_IFLA_MASTER: bridge} if bridge else {})


def set_up(name: str) -> Message:
    """Set a link up."""
    return _set(name, f"set {name} up", flags=_IFF_UP, mask=_IFF_UP)


def set_down(name: str) -> Message:
    """Set a link down. The kernel deletes its routes and keeps its IPv4 addresses."""
    return _set(name, f"set {name} down", mask=_IFF_UP)


def set_master(name: str, bridge: str | None) -> Message:
    """Make ``name`` a port of ``bridge``; None: remove it from its bridge."""
    if not bridge:
        return _set(name, f"take {name} out of its bridge", u32(_IFLA_MASTER, 0))
    return _set(name, f"make {name} a port of {bridge}", links={_IFLA_MASTER: bridge})


def set_alias(name: str, alias: str) -> Message:
    """Set the link's alias (IFLA_IFALIAS), at most 255 bytes; empty deletes it."""
    # Without the zero byte: the kernel stores the value as it is, and an empty value deletes the alias.
    return _set(name, f"set the alias of {name}", attribute(_IFLA_IFALIAS, alias.encode()))


def set_mac(name: str, mac: str) -> Message:
    """Set the MAC address of a link. ValueError for an invalid one."""
    return _set(name, f"set the MAC address of {name} to {mac}", attribute(_IFLA_ADDRESS, packed_mac(mac)))


def set_mtu(name: str, mtu: int) -> Message:
    """Set the MTU, in bytes without the Ethernet header."""
    return _set(name, f"set the MTU of {name} to {mtu}", u32(_IFLA_MTU, mtu))


def delete_link(name: str) -> Message:
    """Delete a link, and the other end of a veth pair; a bridge's ports stay. ENODEV when it does not exist."""
    payload = _HEAD.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, name)
    return Message(RTM_DELLINK, payload=payload, what=f"delete link {name}")


def _make(
    name: str, kind: str, data: bytes, alias: str, what: str, *more: bytes, links: dict[int, str] | None = None
) -> Message:
    index = 0
    then: tuple[Message, ...] = ()
    if alias:
        # The kernel accepts no alias when it creates a link, so a second message sets it. That message must not change
        # another program's link of the same name, because we delete links with our alias. So choose the index of the
        # new link here and name the link by it. Indexes above 2**24 are free, as the kernel counts up from 1.
        index = random.SystemRandom().randrange(1 << 24, 1 << 30)
        mark = _HEAD.pack(0, 0, index, 0, 0) + attribute(_IFLA_IFALIAS, alias.encode())
        then = (
            Message(RTM_SETLINK, payload=mark, what=f"set the alias of {name}", harmless=frozenset({errno.ENODEV})),
        )
    info = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, kind), data)
    payload, fills = with_links(
        _HEAD.pack(0, 0, index, 0, 0) + text(_IFLA_IFNAME, name) + b"".join(more) + info, links or {}
    )
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, payload, what=what, links=fills, then=then)


def _set(
    name: str, what: str, *more: bytes, flags: int = 0, mask: int = 0, links: dict[int, str] | None = None
) -> Message:
    head = _HEAD.pack(0, 0, 0, flags, mask) + text(_IFLA_IFNAME, name) + b"".join(more)
    payload, fills = with_links(head, links or {})
    return Message(RTM_SETLINK, 0, payload, what=what, links=fills)


def _indexes(rtnetlink: Socket, names: set[str]) -> dict[str, int]:
    """The indexes of the links that exist, by name."""
    return {str(name): link.index for name, link in _find(rtnetlink, sorted(names)).items()}


def _find(rtnetlink: Socket, wanted: Iterable[str | int]) -> dict[str | int, Link]:
    """The links that exist, by what was asked for, which may be an alternative name."""
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
        payload = _HEAD.pack(0, 0, link, 0, 0) + _SKIP_STATS
        return Message(RTM_GETLINK, payload=payload, what=f"find link number {link}")
    payload = _HEAD.pack(0, 0, 0, 0, 0) + text(_IFLA_IFNAME, link) + _SKIP_STATS
    return Message(RTM_GETLINK, payload=payload, what=f"find link {link}")


def _filled(message: Message, known: dict[str, int]) -> Message:
    if not message.links:
        return message
    payload = bytearray(message.payload)
    for offset, name in message.links:
        struct.pack_into("=I", payload, offset, known[name])
    return replace(message, payload=bytes(payload))
