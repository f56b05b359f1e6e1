"""Message types and attribute values for the modules of links, addresses, routes, rules and neighbours.

Message layouts: rtnetlink(7), linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

from netloom.agent.kernel.netlink import NetlinkError, u32

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_GETSTATS = 94
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

# The scopes of addresses and routes, RT_SCOPE_*.
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_NOWHERE = 0, 253, 255
_SCOPES = {SCOPE_UNIVERSE: "global", 200: "site", SCOPE_LINK: "link", 254: "host", SCOPE_NOWHERE: "nowhere"}


def fixed_part(layout: struct.Struct, payload: bytes, what: str) -> Sequence[int]:
    """The fields before the attributes. Raises NetlinkError (EBADMSG) naming ``what`` when the payload is too short."""
    if len(payload) < layout.size:
        raise NetlinkError(errno.EBADMSG, f"netlink {what}", "cut short")
    return layout.unpack_from(payload)


def scope_name(number: int) -> str:
    """The scope as iproute2 names it, else the number."""
    return _SCOPES.get(number, str(number))


def address_text(family: int, packed: bytes) -> str:
    """An address of AF_INET or AF_INET6; empty when the length does not fit the family."""
    if (family, len(packed)) in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        return socket.inet_ntop(family, packed)
    return ""


def family_of(version: int) -> int:
    """The address family of IP version 4 or 6."""
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def mac_text(packed: bytes) -> str:
    """A MAC address with colons, in lower case."""
    return ":".join(f"{octet:02x}" for octet in packed)


def packed_mac(mac: str) -> bytes:
    """The six bytes of a MAC address. ValueError when ``mac`` is none."""
    try:
        packed = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        packed = b""
    if len(packed) != 6:
        raise ValueError(f"{mac!r} is no MAC address")
    return packed


def with_links(payload: bytes, links: dict[int, str]) -> tuple[bytes, tuple[tuple[int, str], ...]]:
    """The payload with one attribute per link name, and where the indexes go (``Message.links``)."""
    places = []
    for kind, name in links.items():
        places.append((len(payload) + 4, name))
        payload += u32(kind, 0)
    return payload, tuple(places)
