"""Neighbours of IPv4 and IPv6 (rtnetlink): list, replace, delete. Message layout: linux/neighbour.h."""

from __future__ import annotations

import ipaddress
import socket
import struct

import msgspec

from netloom.agent.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, Message, Socket, attribute, attribute_map
from netloom.agent.kernel.rtnetlink import (
    RTM_DELNEIGH,
    RTM_GETNEIGH,
    RTM_NEWNEIGH,
    address_text,
    family_of,
    fixed_part,
    mac_text,
    packed_mac,
)
from netloom.netobjects import Neighbour

NUD_FAILED, NUD_PERMANENT = 0x20, 0x80  # states, linux/neighbour.h

_NTF_USE = 0x01

_HEAD = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_LINK_INDEX_AT = 4
_NDA_DST, _NDA_LLADDR = 1, 2


class NeighbourRow(msgspec.Struct, frozen=True, kw_only=True):
    """A neighbour as the kernel lists it; False ``permanent``: learned by ARP or NDP, or being looked for."""

    neighbour: Neighbour
    permanent: bool
    link_index: int = 0


def list_neighbours_over(rtnetlink: Socket, names: dict[int, str], family: int = socket.AF_INET) -> list[NeighbourRow]:
    """All neighbours of the family, learned ones too. ``names``: the links' names by index. Raises NetlinkError."""
    head = _HEAD.pack(family, 0, 0, 0, 0)
    found = rtnetlink.dump(Message(RTM_GETNEIGH, payload=head, what="list neighbours"))
    return [decode_neighbour(payload, names) for kind, payload in found if kind == RTM_NEWNEIGH]


def decode_neighbour(payload: bytes, names: dict[int, str]) -> NeighbourRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ndmsg with attributes."""
    family, index, state, _flags, _type = fixed_part(_HEAD, payload, "neighbour")
    values = attribute_map(payload, _HEAD.size)
    return NeighbourRow(
        neighbour=Neighbour(
            link=names.get(index, f"#{index}"),
            address=address_text(family, values.get(_NDA_DST, b"")),
            mac=mac_text(values.get(_NDA_LLADDR, b"")),
        ),
        permanent=bool(state & NUD_PERMANENT),
        link_index=index,
    )


def replace_neighbour(neighbour: Neighbour) -> Message:
    """Add a permanent neighbour, or replace the entry for its address, learned ones too.

    Permanent entries are exempt from the kernel's limits (net.ipv4.neigh.default.gc_thresh3, and that of IPv6, since
    Linux 5.0). The kernel deletes all of a link's entries when the link goes down or its MAC address changes.
    """
    payload = _address(neighbour, NUD_PERMANENT) + attribute(_NDA_LLADDR, packed_mac(neighbour.mac))
    return _message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, neighbour, payload, f"replace neighbour {neighbour}")


def look_for_neighbour(link: str, address: str) -> Message:
    """Let the kernel look for a neighbour now, as a packet to it would.

    Not for a permanent one: since Linux 5.16 it would be permanent no more (``__neigh_update``).
    """
    family = family_of(ipaddress.ip_address(address).version)
    payload = _HEAD.pack(family, 0, 0, _NTF_USE, 0) + attribute(_NDA_DST, ipaddress.ip_address(address).packed)
    what = f"look for neighbour {address} dev {link}"
    return Message(RTM_NEWNEIGH, NLM_F_CREATE, payload, what=what, links=((_LINK_INDEX_AT, link),))


def delete_neighbour(neighbour: Neighbour) -> Message:
    """Delete the entry for the neighbour's address, whatever its MAC address. ENOENT when there is none."""
    what = f"delete neighbour {neighbour.address} dev {neighbour.link}"
    return _message(RTM_DELNEIGH, 0, neighbour, _address(neighbour, 0), what)


def _address(neighbour: Neighbour, state: int) -> bytes:
    address = ipaddress.ip_address(neighbour.address)
    return _HEAD.pack(family_of(address.version), 0, state, 0, 0) + attribute(_NDA_DST, address.packed)


def _message(kind: int, flags: int, neighbour: Neighbour, payload: bytes, what: str) -> Message:
    return Message(kind, flags, payload, what=what, links=((_LINK_INDEX_AT, neighbour.link),))
