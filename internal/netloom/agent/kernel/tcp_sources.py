"""Let only some hosts connect to a listening TCP socket, by a filter in the kernel (linux/filter.h).

The packets of all other hosts are dropped before the socket sees them. So they cannot fill its queue.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable

from netloom.agent.kernel.multicast import Filter, attach_filter

_SO_DETACH_FILTER = 27  # asm-generic/socket.h
_PROTOCOL = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL: the EtherType
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF
_IP4_SOURCE, _IP6_SOURCE = _NETWORK_HEADER + 12, _NETWORK_HEADER + 8
_PASS, _DROP = (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)  # ret


def accept_only(sock: socket.socket, sources: Iterable[bytes]) -> None:
    """Drop the packets of all hosts but these: packed IPv4 and IPv6 addresses. Raises OSError.

    Sockets that the socket accepts have the same filter.
    """
    attach_filter(sock, program(sources))


def accept_all(sock: socket.socket) -> None:
    """Remove the filter. Succeeds if there is none."""
    with contextlib.suppress(FileNotFoundError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def program(sources: Iterable[bytes]) -> Filter:
    """The filter. A jump in it is short, however many addresses there are."""
    known = sorted(set(sources))
    ip4 = [_load(_IP4_SOURCE)]
    for source in known:
        if len(source) == 4:
            ip4 += [_unless(int.from_bytes(source, "big"), 1), _PASS]
    ip6 = []
    for source in known:
        if len(source) == 16:
            for at, word in enumerate(struct.unpack("!4I", source)):
                ip6 += [_load(_IP6_SOURCE + 4 * at), _unless(word, 7 - 2 * at)]
            ip6.append(_PASS)
    ip4.append(_DROP)
    ip6.append(_DROP)
    to_ip6 = (0x05, 0, 0, len(ip4))  # ja
    return (_load(_PROTOCOL), (0x15, 1, 0, 0x0800), to_ip6, *ip4, *ip6)


def _load(offset: int) -> tuple[int, int, int, int]:
    return 0x20, 0, 0, offset  # ld


def _unless(value: int, skipped: int) -> tuple[int, int, int, int]:
    """Go on if it is the value, else behind so many instructions."""
    return 0x15, 0, skipped, value  # jeq
