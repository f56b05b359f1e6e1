"""A DHCP server for static leases (RFC 2131, RFC 2132): ``parse`` a packet, then ``respond`` from the table.

The table is the lease database. A NIC keeps its address whether it requests, renews, declines or releases it, so the
server stores nothing between packets. A MAC address that is not in the table gets no reply, not even a DHCPNAK, because
another DHCP server on the same segment may serve it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from netloom.guest.table import SUBNET_MASK, GuestTable, TableRow, encoded_option

CLIENT_PORT = 68
BROADCAST_IP = "255.255.255.255"

_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_MAGIC = b"\x63\x82\x53\x63"
_NO_ADDRESS = b"\0\0\0\0"
_BOOTREQUEST, _BOOTREPLY = 1, 2
_ETHERNET = 1

_PAD, _END = 0, 255
_REQUESTED_IP, _OVERLOAD, _TYPE, _SERVER_ID, _PARAMETER_LIST, _MESSAGE_TEXT, _MAX_SIZE, _CLIENT_ID = (
    *(50, 52, 53, 54, 55, 56, 57, 61),
)

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


_TYPES = {kind: encoded_option(_TYPE, bytes([kind])) for kind in MessageType}
_NOT_YOUR_ADDRESS = encoded_option(_MESSAGE_TEXT, b"this is not your address")
_END_OPTION = bytes([_END])


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
    # Unicast only to a client that already has the address. Otherwise broadcast, which every client accepts; unicast
    # would need a packet socket (RFC 2131 section 4.1).
    renews = kind is MessageType.ACK and request.ciaddr == row.ip
    ciaddr = row.ip if renews else _NO_ADDRESS
    packet = _packet(kind, request, table, ciaddr, row.ip, table.lease, _options_for(request, row))
    return DhcpReply(packet, row.nic.ip if renews else BROADCAST_IP)


def _ack_inform(request: DhcpRequest, row: TableRow, table: GuestTable) -> DhcpReply | None:
    # Answer a DHCPINFORM only from the NIC's own address; otherwise the reply would go to another machine.
    if request.ciaddr != row.ip:
        return None
    packet = _packet(MessageType.ACK, request, table, row.ip, _NO_ADDRESS, [], _options_for(request, row))
    return DhcpReply(packet, row.nic.ip)


def _nak(request: DhcpRequest, table: GuestTable) -> DhcpReply:
    return DhcpReply(
        _packet(MessageType.NAK, request, table, _NO_ADDRESS, _NO_ADDRESS, [_NOT_YOUR_ADDRESS], []), BROADCAST_IP
    )


def _packet(
    kind: MessageType,
    request: DhcpRequest,
    table: GuestTable,
    ciaddr: bytes,
    yiaddr: bytes,
    ours: list[bytes],
    asked: list[bytes],
) -> bytes:
    """A reply with as many of the encoded options as fit: those that the protocol needs first."""
    options = [_TYPES[kind], table.server_id, *ours]
    # RFC 6842: return the client identifier, so that clients with the same MAC recognise their own reply.
    if (client_id := request.options.get(_CLIENT_ID)) is not None:
        options.append(encoded_option(_CLIENT_ID, client_id))
    options += asked

    announced = request.options.get(_MAX_SIZE, b"")
    datagram = int.from_bytes(announced, "big") if len(announced) == 2 else 0
    room = min(max(datagram, _DATAGRAM_BYTES_MIN), table.network.mtu or _DATAGRAM_BYTES_MAX)
    room -= _IP_UDP_BYTES + _HEADER.size + 1  # the end option
    encoded = b"".join(options)
    if len(encoded) > room:
        encoded = _that_fit(options, room)
    header = _HEADER.pack(
        *(_BOOTREPLY, _ETHERNET, 6, 0, request.xid, 0, request.flags),
        *(ciaddr, yiaddr, _NO_ADDRESS, _NO_ADDRESS, request.chaddr, b"", b"", _MAGIC),
    )
    return (header + encoded + _END_OPTION).ljust(_PACKET_BYTES_MIN, b"\0")


def _that_fit(options: list[bytes], room: int) -> bytes:
    """The options, without each that does not fit into what the ones before it have left."""
    kept = b""
    for option in options:
        if len(kept) + len(option) <= room:
            kept += option
    return kept


def _options_for(request: DhcpRequest, row: TableRow) -> list[bytes]:
    """The options for a client in the order of its request, with the mask before the router (RFC 2132 section 3.3).

    The mask, the MTU of the network, and the options of the NIC itself are sent even if they were not requested.
    """
    wanted = request.options.get(_PARAMETER_LIST) or row.options
    codes = dict.fromkeys((SUBNET_MASK, *wanted, *row.always))
    return [row.options[code] for code in codes if code in row.options]


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
