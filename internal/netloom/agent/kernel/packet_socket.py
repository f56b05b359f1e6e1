"""Packet sockets that receive the frames of one link of the host, below its bridge (packet(7))."""

from __future__ import annotations

import contextlib
import socket

from netloom.agent.kernel.multicast import Filter, attach_filter

# Of a received frame, in the address that ``recvfrom`` returns: this host sent it. Linux before 4.20 delivers such
# frames although ``open_packet_socket`` asks for none.
PACKET_OUTGOING = 4

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23  # linux/if_packet.h
_SO_RCVBUFFORCE = 33


def open_packet_socket(link: str, program: Filter, *, receive_bytes: int = 0) -> socket.socket:
    """A socket for the frames of ``link``, of all protocols, that pass the filter.

    ``receive_bytes``: the size of its buffer; 0: the kernel's default. Raises OSError: there is no such link.
    """
    # Protocol 0: the socket receives nothing until it is bound, with its filter.
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        with contextlib.suppress(OSError):  # before Linux 4.20
            opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        if receive_bytes:
            with contextlib.suppress(PermissionError):  # in a container: what the host allows each socket
                opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        attach_filter(opened, program)
        opened.bind((link, _ETH_P_ALL))
    except BaseException:
        opened.close()
        raise
    return opened
