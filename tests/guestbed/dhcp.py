"""DHCP messages: build those of a client, answer them as the guest process does, and describe them as text."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from guestbed import SERVER
from netloom.guest.dhcp import BROADCAST_IP, DhcpReply, MessageType, parse, respond
from netloom.guest.table import GuestTable
from netloom.guestwire import GuestNic

MAGIC = b"\x63\x82\x53\x63"
COMMON = bytes([1, 3, 6, 12, 15, 26, 28, 119])

NAMES = {
    1: "subnet mask", 3: "router", 6: "DNS", 12: "host name", 15: "domain", 26: "MTU", 28: "broadcast", 42: "NTP",
    50: "requested address", 51: "lease time", 53: "type", 54: "server", 55: "wanted", 56: "text", 57: "maximum size",
    58: "renewal", 59: "rebinding", 61: "client id", 66: "TFTP server", 119: "search", 121: "routes",
}  # fmt: skip
ADDRESSES = {1, 3, 6, 28, 42, 50, 54}
NUMBERS = {26, 51, 57, 58, 59}
TEXTS = {12, 15, 56, 66}


def option(code: int, value: bytes) -> bytes:
    return bytes([code, len(value)]) + value


def message(
    kind: MessageType,
    mac: str,
    options: Mapping[int, bytes] | None = None,
    *,
    ciaddr: str = "0.0.0.0",
    giaddr: str = "0.0.0.0",
    flags: int = 0,
    tail: bytes = b"\xff",
    sname: bytes = b"",
    file: bytes = b"",
) -> bytes:
    """A client's message. It requests the COMMON options, unless ``options`` has a parameter request list (55)."""
    nowhere = bytes(4)
    head = struct.pack(
        "!BBBBIHH4s4s4s4s16s64s128s4s", 1, 1, 6, 0, 0x12345678, 3, flags, socket.inet_aton(ciaddr), nowhere, nowhere,
        socket.inet_aton(giaddr), bytes.fromhex(mac.replace(":", "")), sname, file, MAGIC,
    )  # fmt: skip
    all_options = {55: COMMON} | dict(options or {})
    return head + option(53, bytes([kind])) + b"".join(option(*it) for it in all_options.items()) + tail


def reply_to(packet: bytes, table: GuestTable) -> DhcpReply | None:
    """The reply of the guest process to ``packet``, or None."""
    request = parse(packet)
    return None if request is None else respond(request, table)


def check_reply(packet: bytes, reply: DhcpReply, asked_by: GuestNic) -> None:
    """Assert that the reply to ``packet`` is well formed, and has nothing but what this NIC may get."""
    found: dict[int, bytes] = {}
    for code, value in options_of(reply.packet):
        found[code] = found.get(code, b"") + value
    assert (reply.packet[0], reply.packet[4:8], reply.packet[28:44]) == (2, packet[4:8], packet[28:44])
    assert found[53][0] in (MessageType.OFFER, MessageType.ACK, MessageType.NAK)
    assert found[54] == socket.inet_aton(SERVER)
    assert 300 <= len(reply.packet) <= 1472
    # The reply offers only the NIC's own address, and goes only to it or to the broadcast address.
    assert reply.packet[16:20] in (bytes(4), socket.inet_aton(asked_by.ip))
    assert reply.to in (BROADCAST_IP, asked_by.ip)
    if found[53][0] == MessageType.NAK:
        assert (reply.to, reply.packet[16:20], set(found) - {61}) == (BROADCAST_IP, bytes(4), {53, 54, 56})
    elif not asked_by.default_nic:
        assert not {3, 6, 15, 119} & set(found)
    if 51 in found:
        assert 0 < int.from_bytes(found[58], "big") < int.from_bytes(found[59], "big")
        assert int.from_bytes(found[59], "big") < int.from_bytes(found[51], "big") < 0xFFFFFFFF


def options_of(packet: bytes) -> list[tuple[int, bytes]]:
    """The options in their order. Raises AssertionError or IndexError if they are not well formed."""
    found, at = [], 240
    while packet[at] != 255:
        if packet[at] == 0:
            at += 1
            continue
        code, length = packet[at], packet[at + 1]
        assert at + 2 + length < len(packet), "an option is longer than the packet"
        found.append((code, packet[at + 2 : at + 2 + length]))
        at += 2 + length
    assert not packet[at + 1 :].strip(b"\0"), "there is data after the end option"
    return found


def describe(packet: bytes, to: str = "") -> str:
    """The message in lines, without the fields that are zero."""
    op, htype, hlen, hops, xid, _, flags = struct.unpack_from("!BBBBIHH", packet)
    assert (htype, hlen, hops, xid, packet[236:240]) == (1, 6, 0, 0x12345678, MAGIC)
    options = options_of(packet)
    kind = MessageType(dict(options)[53][0]).name
    mac = packet[28:34].hex(":")
    lines = [f"{kind} from {mac}" if op == 1 else f"{kind} to {to}, for {mac}"]
    for name, at in (("ciaddr", 12), ("yiaddr", 16), ("siaddr", 20), ("giaddr", 24)):
        if any(packet[at : at + 4]):
            lines.append(f"{name} {socket.inet_ntoa(packet[at : at + 4])}")
    lines += [f"flags {flags:#06x}"] if flags else []
    lines += [f"{code:3} {NAMES.get(code, '?')}: {_value(code, value)}" for code, value in options if code != 53]
    return "\n    ".join(lines)


def _value(code: int, value: bytes) -> str:
    if code in ADDRESSES and len(value) % 4 == 0:
        return " ".join(socket.inet_ntoa(value[at : at + 4]) for at in range(0, len(value), 4))
    if code in NUMBERS:
        return str(int.from_bytes(value, "big"))
    if code in TEXTS:
        return value.decode()
    if code == 119:
        return _names(value)
    if code == 55:
        return " ".join(map(str, value))
    return value.hex(":")


def _names(value: bytes) -> str:
    """Domain names in the encoding of RFC 3397, uncompressed."""
    names, labels, at = [], [], 0
    while at < len(value):
        length = value[at]
        if length:
            labels.append(value[at + 1 : at + 1 + length].decode())
        else:
            names.append(".".join(labels))
            labels = []
        at += 1 + length
    return " ".join(names)
