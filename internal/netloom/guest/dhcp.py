"""A DHCP server for static leases (RFC 2131, RFC 2132): ``parse`` a packet, then ``respond`` from the table.

The table is the lease database. A NIC keeps its address whether it requests, renews, declines or releases it, so the
server stores nothing between packets. A MAC address that is not in the table gets no reply, not even a DHCPNAK, because
another DHCP server on the same segment may serve it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from netloom.guest.table import MTU, SUBNET_MASK, GuestTable, TableRow

CLIENT_PORT = 68
BROADCAST_IP = "255.255.255.255"

_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_MAGIC = b"\x63\x82\x53\x63"
_NO_ADDRESS = b"\0\0\0\0"
_BOOTREQUEST, _BOOTREPLY = 1, 2
_ETHERNET = 1

_PAD, _END = 0, 255
_REQUESTED_IP, _LEASE_TIME, _OVERLOAD, _TYPE, _SERVER_ID, _PARAMETER_LIST, _MESSAGE_TEXT = 50, 51, 52, 53, 54, 55, 56
_MAX_SIZE, _T1, _T2, _CLIENT_ID = 57, 58, 59, 61

# Every client accepts datagrams of 576 bytes (RFC 2131 section 2). The maximum avoids IP fragments.
_DATAGRAM_BYTES_MIN, _DATAGRAM_BYTES_MAX = 576, 1500
_IP_UDP_BYTES = 28
# The size of a BOOTP message (RFC 951); some clients drop shorter messages.
_PACKET_BYTES_MIN = 300


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
    """The fields of a client's message that the server uses."""

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
    """A message of the server, and the destination address. The destination port is 68."""

    packet: bytes
    to: str


def parse(packet: bytes) -> DhcpRequest | None:
    """The request in ``packet``. None if it is no DHCP request, or came through a relay; our networks have no relays.

    The bytes come from a tenant: no input raises an exception.
    """
    if len(packet) < _HEADER.size:
        return None
    op, htype, hlen, _, xid, _, flags, ciaddr, _, _, giaddr, chaddr, sname, file, magic = _HEADER.unpack_from(packet)
    if (op, htype, hlen, giaddr, magic) != (_BOOTREQUEST, _ETHERNET, 6, _NO_ADDRESS, _MAGIC):
        return None
    options: dict[int, bytes] = {}
    _parse_options(packet[_HEADER.size :], options)
    overload = options.get(_OVERLOAD, b"\0")[:1]
    if overload in (b"\1", b"\3"):
        _parse_options(file, options)
    if overload in (b"\2", b"\3"):
        _parse_options(sname, options)
    kind = options.get(_TYPE, b"")
    if len(kind) != 1:
        return None
    return DhcpRequest(kind[0], xid, flags, ciaddr, chaddr, options)


def respond(request: DhcpRequest, table: GuestTable) -> DhcpReply | None:
    """The reply to ``request`` as in RFC 2131 section 4.3, or None if it gets no reply."""
    row = table.by_mac.get(request.mac)
    if row is None or not row.nic.dhcp:
        return None
    if request.type == MessageType.DISCOVER:
        return _offer_or_ack(MessageType.OFFER, request, row, table)
    if request.type == MessageType.INFORM:
        return _ack_inform(request, row, table)
    if request.type == MessageType.REQUEST:
        requested = _requested_ip(request, table)
        if requested is None:
            return None
        if requested == row.ip:
            return _offer_or_ack(MessageType.ACK, request, row, table)
        return _nak(request, table)
    # DHCPDECLINE and DHCPRELEASE get no reply and change nothing: the NIC keeps its address.
    return None


def _requested_ip(request: DhcpRequest, table: GuestTable) -> bytes | None:
    """The address that a DHCPREQUEST asks for (RFC 2131 section 4.3.2).

    None if the request is malformed, or another server has to answer it.
    """
    server_id = request.options.get(_SERVER_ID)
    requested = request.options.get(_REQUESTED_IP)
    if server_id is not None and server_id != table.server_ip:
        return None  # SELECTING, and the client selected another server
    if requested is not None:
        return requested if len(requested) == 4 else None  # SELECTING or INIT-REBOOT
    if request.ciaddr != _NO_ADDRESS:
        return request.ciaddr  # RENEWING or REBINDING
    return None


def _offer_or_ack(kind: MessageType, request: DhcpRequest, row: TableRow, table: GuestTable) -> DhcpReply:
    seconds = table.lease_s
    times = {_LEASE_TIME: seconds, _T1: seconds // 2, _T2: seconds * 7 // 8}
    fixed = {code: struct.pack("!I", value) for code, value in times.items()}
    # Unicast only to a client that already has the address. Otherwise broadcast, which every client accepts; unicast
    # would need a packet socket (RFC 2131 section 4.1).
    renews = kind is MessageType.ACK and request.ciaddr == row.ip
    ciaddr = row.ip if renews else _NO_ADDRESS
    packet = _packet(kind, request, table, ciaddr=ciaddr, yiaddr=row.ip, fixed=fixed, row=row)
    return DhcpReply(packet, row.nic.ip if renews else BROADCAST_IP)


def _ack_inform(request: DhcpRequest, row: TableRow, table: GuestTable) -> DhcpReply | None:
    # Answer a DHCPINFORM only from the NIC's own address; otherwise the reply would go to another machine.
    if request.ciaddr != row.ip:
        return None
    return DhcpReply(
        _packet(MessageType.ACK, request, table, ciaddr=row.ip, yiaddr=_NO_ADDRESS, fixed={}, row=row), row.nic.ip
    )


def _nak(request: DhcpRequest, table: GuestTable) -> DhcpReply:
    text = {_MESSAGE_TEXT: b"this is not your address"}
    return DhcpReply(
        _packet(MessageType.NAK, request, table, ciaddr=_NO_ADDRESS, yiaddr=_NO_ADDRESS, fixed=text, row=None),
        BROADCAST_IP,
    )


def _packet(
    kind: MessageType,
    request: DhcpRequest,
    table: GuestTable,
    *,
    ciaddr: bytes,
    yiaddr: bytes,
    fixed: dict[int, bytes],
    row: TableRow | None,
) -> bytes:
    announced = request.options.get(_MAX_SIZE, b"")
    datagram = int.from_bytes(announced, "big") if len(announced) == 2 else 0
    room = min(max(datagram, _DATAGRAM_BYTES_MIN), table.network.mtu or _DATAGRAM_BYTES_MAX) - _IP_UDP_BYTES

    packet = bytearray(
        _HEADER.pack(
            *(_BOOTREPLY, _ETHERNET, 6, 0, request.xid, 0, request.flags),
            *(ciaddr, yiaddr, _NO_ADDRESS, _NO_ADDRESS, request.chaddr, b"", b"", _MAGIC),
        )
    )
    ours = {_TYPE: bytes([kind]), _SERVER_ID: table.server_ip} | fixed
    # RFC 6842: return the client identifier, so that clients with the same MAC recognise their own reply.
    if _CLIENT_ID in request.options:
        ours[_CLIENT_ID] = request.options[_CLIENT_ID]
    for code, value in [*ours.items(), *_options_for(request, row)]:
        encoded = _encode(code, value)
        if len(packet) + len(encoded) < room:  # leaves one byte for the end option
            packet += encoded
    packet.append(_END)
    return bytes(packet.ljust(_PACKET_BYTES_MIN, b"\0"))


def _options_for(request: DhcpRequest, row: TableRow | None) -> list[tuple[int, bytes]]:
    """The options for a client in the order of its request, with the mask before the router (RFC 2132 section 3.3).

    The mask, the MTU of the network, and the options of the NIC itself are sent even if they were not requested.
    """
    if row is None:
        return []
    wanted = request.options.get(_PARAMETER_LIST, b"") or bytes(row.options)
    unasked = (code for code in row.options if code == MTU or code in row.nic.options)
    codes = dict.fromkeys((SUBNET_MASK, *wanted, *unasked))
    return [(code, row.options[code]) for code in codes if code in row.options]


def _parse_options(area: bytes, options: dict[int, bytes]) -> None:
    """Add the options in ``area``. Parts of a split option are joined (RFC 3396); a truncated option is ignored."""
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
