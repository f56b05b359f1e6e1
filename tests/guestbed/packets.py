"""Frames of a VM, made by hand."""

from __future__ import annotations

import socket
import struct


def frame(to: str, mac: str, protocol: int, source: str, target: str, data: bytes) -> bytes:
    """An IPv4 packet in an Ethernet frame."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target))  # fmt: skip
    head = head[:10] + checksum(head) + head[12:]
    return bytes.fromhex((to + mac).replace(":", "")) + b"\x08\x00" + head + data


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return struct.pack("!H", ~total & 0xFFFF)


def broadcast_frame(mac: str, data: bytes) -> bytes:
    """A DHCP request of a client without an address."""
    datagram = struct.pack("!HHHH", 68, 67, 8 + len(data), 0) + data
    return frame("ff:ff:ff:ff:ff:ff", mac, socket.IPPROTO_UDP, "0.0.0.0", "255.255.255.255", datagram)
