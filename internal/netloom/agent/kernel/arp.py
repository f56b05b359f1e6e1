"""Gratuitous ARP: announce to the neighbours on a link that an address now has this MAC address."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from typing import Self

from netloom.agent.kernel.namespaces import inside
from netloom.agent.kernel.rtnetlink import packed_mac
from netloom.errors import HostRefused

ETHERTYPE_ARP = 0x0806
BROADCAST = b"\xff" * 6
# Ethernet: destination, source, type; ARP for IPv4 over Ethernet: formats, lengths, operation; sender and target.
FRAME = struct.Struct(">6s6sHHHBBH6s4s6s4s")
REQUEST, REPLY = 1, 2


class ArpError(HostRefused):
    """The frames could not be sent. ``errno`` is the kernel's."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(f"{message}: {os.strerror(errno)}")
        self.errno = errno


class Announcer:
    """Announces addresses on the links of one namespace.

    The kernel waits for all CPUs when it closes the socket (15 to 30 ms, measured 2026-11-30), so one announcer sends
    all frames of a namespace before it is closed.
    """

    def __init__(self, namespace: str | None) -> None:
        """Raises NamespaceError, OSError."""
        with inside(namespace):
            # Protocol 0: the socket receives no packets, so none fill its buffer.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def announce(self, link: str, address: str, mac: str) -> None:
        """Send the announcement once as a request and once as a reply, because some neighbours ignore either form.

        Raises ArpError (no such link, link down); ValueError for an invalid IPv4 or MAC address.
        """
        try:
            for frame in frames(address, mac):
                self._socket.sendto(frame, (link, 0))
        except OSError as error:
            raise ArpError(f"announce {address} on {link}", error.errno or 0) from error


def frames(address: str, mac: str) -> tuple[bytes, bytes]:
    """The announcement as a request (RFC 5227 section 3) and as a reply (RFC 5944 section 4.6), whole Ethernet frames.

    ValueError for an invalid IPv4 or MAC address.
    """
    ip = ipaddress.IPv4Address(address).packed
    sender = packed_mac(mac)
    head = (BROADCAST, sender, ETHERTYPE_ARP, 1, 0x0800, 6, 4)
    request = FRAME.pack(*head, REQUEST, sender, ip, bytes(6), ip)
    reply = FRAME.pack(*head, REPLY, sender, ip, sender, ip)
    return request, reply
