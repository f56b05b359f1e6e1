"""DHCP for static leases: RFC 2131 and 2132, as one function from a packet and a table to a reply.

The table is the lease database: a NIC's address is its own whether it asks, renews, declines or releases, so nothing is
remembered between packets. MAC addresses that are not in the table are never answered, not even to refuse: their
server may be another one on the same segment.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from netloom.guest.table import MTU, SUBNET_MASK, GuestTable, Lease

SERVER_PORT, CLIENT_PORT = 67, 68
EVERYBODY = "255.255.255.255"

_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_MAGIC = b"\x63\x82\x53\x63"
_NOWHERE = b"\0\0\0\0"
_BOOTREQUEST, _BOOTREPLY = 1, 2
_ETHERNET = 1

_PAD, _END = 0, 255
_REQUESTED_IP, _LEASE_TIME, _OVERLOAD, _TYPE, _SERVER_ID, _WANTED, _TEXT = 50, 51, 52, 53, 54, 55, 56
_MAX_SIZE, _T1, _T2, _CLIENT_ID = 57, 58, 59, 61

# A client takes a datagram of 576 bytes at least (RFC 2131 section 2); ours never need fragments.
_DATAGRAM_LEAST, _DATAGRAM_MOST = 576, 1500
_IP_UDP_BYTES = 28
# What a BOOTP message has at least (RFC 951); some clients drop shorter ones.
_PACKET_LEAST = 300


class MessageType(IntEnum):
    """DHCP message types (RFC 2132 section 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class DhcpRequest(NamedTuple):
    """A client's message, as far as it matters."""

    type: int
    xid: int
    flags: int
    ciaddr: bytes
    chaddr: bytes  # 16 bytes, the MAC in the first six
    options: dict[int, bytes]

    @property
    def mac(self) -> bytes:
        return self.chaddr[:6]


class DhcpReply(NamedTuple):
    """A server's message and the address that it goes to, port 68."""

    packet: bytes
    to: str


def answer(packet: bytes, table: GuestTable) -> DhcpReply | None:
    """The reply to ``packet``, or None: whatever the bytes, never an exception."""
    request = parse(packet)
    return None if request is None else respond(request, table)


def parse(packet: bytes) -> DhcpRequest | None:
    """The request in ``packet``; None when it is none, or came through a relay, of which there are none here."""
    if len(packet) < _HEADER.size:
        return None
    op, htype, hlen, _, xid, _, flags, ciaddr, _, _, giaddr, chaddr, sname, file, magic = _HEADER.unpack_from(packet)
    if (op, htype, hlen, giaddr, magic) != (_BOOTREQUEST, _ETHERNET, 6, _NOWHERE, _MAGIC):
        return None
    options: dict[int, bytes] = {}
    _collect(packet[_HEADER.size :], options)
    overload = options.get(_OVERLOAD, b"\0")[:1]
    if overload in (b"\1", b"\3"):
        _collect(file, options)
    if overload in (b"\2", b"\3"):
        _collect(sname, options)
    kind = options.get(_TYPE, b"")
    if len(kind) != 1:
        return None
    return DhcpRequest(kind[0], xid, flags, ciaddr, chaddr, options)


def respond(request: DhcpRequest, table: GuestTable) -> DhcpReply | None:
    """The reply that RFC 2131 section 4.3 asks for, from a server whose leases are static."""
    lease = table.leases.get(request.mac)
    if lease is None or not lease.nic.dhcp:
        return None
    if request.type == MessageType.DISCOVER:
        return _grant(MessageType.OFFER, request, lease, table)
    if request.type == MessageType.INFORM:
        return _inform(request, lease, table)
    if request.type == MessageType.REQUEST:
        wanted = _wanted(request, table)
        if wanted is None:
            return None
        if wanted == lease.ip:
            return _grant(MessageType.ACK, request, lease, table)
        return _refuse(request, table)
    # DECLINE and RELEASE are not answered, and change nothing: the address stays the NIC's.
    return None


def _wanted(request: DhcpRequest, table: GuestTable) -> bytes | None:
    """The address that a DHCPREQUEST is about, None when it is not ours to judge (RFC 2131 section 4.3.2)."""
    server_id = request.options.get(_SERVER_ID)
    requested = request.options.get(_REQUESTED_IP)
    if server_id is not None and server_id != table.server_ip:
        return None  # SELECTING, and another server was selected
    if requested is not None:
        return requested if len(requested) == 4 else None  # SELECTING or INIT-REBOOT
    if request.ciaddr != _NOWHERE:
        return request.ciaddr  # RENEWING or REBINDING
    return None


def _grant(kind: MessageType, request: DhcpRequest, lease: Lease, table: GuestTable) -> DhcpReply:
    seconds = table.lease_s
    times = {_LEASE_TIME: seconds, _T1: seconds // 2, _T2: seconds * 7 // 8}
    fixed = {code: struct.pack("!I", value) for code, value in times.items()}
    # To the client's address only when it has that address; without one, broadcast is what every client understands,
    # and unicast would need a packet socket (RFC 2131 section 4.1).
    renews = kind is MessageType.ACK and request.ciaddr == lease.ip
    ciaddr = lease.ip if renews else _NOWHERE
    packet = _packet(kind, request, table, ciaddr=ciaddr, yiaddr=lease.ip, fixed=fixed, lease=lease)
    return DhcpReply(packet, lease.nic.ip if renews else EVERYBODY)


def _inform(request: DhcpRequest, lease: Lease, table: GuestTable) -> DhcpReply | None:
    # Its own address or none of our business: an answer to any other address would be a parcel for a stranger.
    if request.ciaddr != lease.ip:
        return None
    return DhcpReply(
        _packet(MessageType.ACK, request, table, ciaddr=lease.ip, yiaddr=_NOWHERE, fixed={}, lease=lease), lease.nic.ip
    )


def _refuse(request: DhcpRequest, table: GuestTable) -> DhcpReply:
    text = {_TEXT: b"this is not your address"}
    return DhcpReply(
        _packet(MessageType.NAK, request, table, ciaddr=_NOWHERE, yiaddr=_NOWHERE, fixed=text, lease=None), EVERYBODY
    )


def _packet(
    kind: MessageType,
    request: DhcpRequest,
    table: GuestTable,
    *,
    ciaddr: bytes,
    yiaddr: bytes,
    fixed: dict[int, bytes],
    lease: Lease | None,
) -> bytes:
    announced = request.options.get(_MAX_SIZE, b"")
    datagram = int.from_bytes(announced, "big") if len(announced) == 2 else 0
    room = min(max(datagram, _DATAGRAM_LEAST), table.network.mtu or _DATAGRAM_MOST) - _IP_UDP_BYTES

    packet = bytearray(
        _HEADER.pack(
            *(_BOOTREPLY, _ETHERNET, 6, 0, request.xid, 0, request.flags),
            *(ciaddr, yiaddr, _NOWHERE, _NOWHERE, request.chaddr, b"", b"", _MAGIC),
        )
    )
    ours = {_TYPE: bytes([kind]), _SERVER_ID: table.server_ip} | fixed
    # RFC 6842: said back, so that clients which share a MAC can tell whose answer it is.
    if _CLIENT_ID in request.options:
        ours[_CLIENT_ID] = request.options[_CLIENT_ID]
    for code, value in [*ours.items(), *_chosen(request, lease)]:
        encoded = _encode(code, value)
        if len(packet) + len(encoded) < room:  # one byte stays for the end mark
            packet += encoded
    packet.append(_END)
    return bytes(packet.ljust(_PACKET_LEAST, b"\0"))


def _chosen(request: DhcpRequest, lease: Lease | None) -> list[tuple[int, bytes]]:
    """The options a client gets, in the order it asked for them; the mask before the router (RFC 2132 section 3.3).

    Given unasked: the mask, an MTU that somebody told us, and what is set for the NIC in particular.
    """
    if lease is None:
        return []
    wanted = request.options.get(_WANTED, b"") or bytes(lease.options)
    unasked = (code for code in lease.options if code == MTU or code in lease.nic.options)
    codes = dict.fromkeys((SUBNET_MASK, *wanted, *unasked))
    return [(code, lease.options[code]) for code in codes if code in lease.options]


def _collect(area: bytes, options: dict[int, bytes]) -> None:
    """Read one option area. Pieces of one option are joined (RFC 3396); what is cut off at the end is left out."""
    at = 0
    while at < len(area) and area[at] != _END:
        if area[at] == _PAD:
            at += 1
            continue
        if at + 1 >= len(area):
            return
        code, start = area[at], at + 2
        at = start + area[at + 1]
        if at > len(area):
            return
        options[code] = options.get(code, b"") + area[start:at]


def _encode(code: int, value: bytes) -> bytes:
    if len(value) < 256:
        return bytes([code, len(value)]) + value
    pieces = [value[at : at + 255] for at in range(0, len(value), 255)]
    return b"".join(bytes([code, len(piece)]) + piece for piece in pieces)
