"""Addresses on links (rtnetlink): list, add, delete. Message layout: linux/if_addr.h."""

from __future__ import annotations

import ipaddress
import socket
import struct

import msgspec

from netloom.agent.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Socket, attribute, attribute_map
from netloom.agent.kernel.rtnetlink import (
    RTM_DELADDR,
    RTM_GETADDR,
    RTM_NEWADDR,
    address_text,
    family_of,
    fixed_part,
    scope_name,
)
from netloom.netobjects import Address

_HEAD = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefixlen, flags, scope, index
_LINK_INDEX_AT = 4

_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02


class AddressRow(msgspec.Struct, frozen=True, kw_only=True):
    """An address as the kernel lists it.

    ``link_local``: in fe80::/10, so the kernel added it with the link; False for IPv4. ``scope``: ``global``, ``link``,
    ``host``.
    """

    address: Address
    link_local: bool
    scope: str


def list_addresses_over(rtnetlink: Socket, names: dict[int, str], family: int = socket.AF_UNSPEC) -> list[AddressRow]:
    """All addresses, those of lo too. ``names``: the links' names by index. Raises NetlinkError."""
    found = rtnetlink.dump(Message(RTM_GETADDR, payload=_HEAD.pack(family, 0, 0, 0, 0), what="list addresses"))
    return [decode_address(payload, names) for kind, payload in found if kind == RTM_NEWADDR]


def decode_address(payload: bytes, names: dict[int, str]) -> AddressRow:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no ifaddrmsg with attributes."""
    family, length, _flags, scope, index = fixed_part(_HEAD, payload, "address")
    values = attribute_map(payload, _HEAD.size)
    # On a point-to-point link IFA_ADDRESS is the other side's address and IFA_LOCAL ours. IPv6 has no IFA_LOCAL.
    ip = address_text(family, values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS, b"")))
    return AddressRow(
        address=Address(link=names.get(index, f"#{index}"), cidr=f"{ip}/{length}"),
        link_local=":" in ip and ipaddress.ip_address(ip).is_link_local,
        scope=scope_name(scope),
    )


def add_address(address: Address) -> Message:
    """Add an address that is usable at once: IPv6 without duplicate address detection. EEXIST when it exists."""
    what = f"add address {address.cidr} to {address.link}"
    return _message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, address, what)


def delete_address(address: Address) -> Message:
    """Delete an address. EADDRNOTAVAIL when it does not exist.

    Deleting the first IPv4 address of a subnet deletes the link's other addresses of that subnet too, unless the sysctl
    promote_secondaries is set.
    """
    return _message(RTM_DELADDR, 0, address, f"delete address {address.cidr} from {address.link}")


def _message(kind: int, flags: int, address: Address, what: str) -> Message:
    interface = ipaddress.ip_interface(address.cidr)
    address_flags = _IFA_F_NODAD if interface.version == 6 else 0
    payload = _HEAD.pack(family_of(interface.version), interface.network.prefixlen, address_flags, 0, 0)
    packed = interface.ip.packed
    payload += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return Message(kind, flags, payload, what=what, links=((_LINK_INDEX_AT, address.link),))
