"""Numbers of descriptors: those that stay open get high ones, so that the low ones are free for libnftables.

libnftables waits for the kernel with select(2). That knows the numbers below ``SELECTABLE`` only, and glibc aborts the
process for a higher one. An agent has four descriptors for each network, so with 250 networks there was no low one.
"""

from __future__ import annotations

import fcntl
import os
import socket

SELECTABLE = 1024  # FD_SETSIZE, sys/select.h
_MARGIN = 64  # the worker threads open some for moments


def high(descriptor: int) -> int:
    """Give the descriptor a number that select(2) does not know, and return it.

    It keeps its number if the process may not have such numbers.
    """
    try:
        higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, SELECTABLE)
    except OSError:
        return descriptor
    os.close(descriptor)
    return higher


def high_socket(sock: socket.socket) -> socket.socket:
    """:func:`high` for a socket, which is closed; returns the one with the new number.

    O_NONBLOCK belongs to the open file, which other processes may have, too.
    """
    timeout_s = sock.gettimeout()
    moved = socket.socket(fileno=high(sock.detach()))
    if timeout_s is not None:  # guard: a-lent-socket-does-not-block
        moved.settimeout(timeout_s)
    return moved


def low_is_free() -> bool:
    """Whether the next descriptors have numbers that select(2) knows. The kernel gives the lowest free ones."""
    lowest = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        return lowest < SELECTABLE - _MARGIN
    finally:
        os.close(lowest)
