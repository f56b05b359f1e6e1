"""Packets under way: whoever changed the rules may wait until those that met the old ones are through."""

from __future__ import annotations

import ctypes
import platform

_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(platform.machine())
_CMD_GLOBAL = 1  # linux/membarrier.h

_libc = ctypes.CDLL(None, use_errno=True)


def settled() -> bool:
    """Waits until no packet is under way that was under way at the call; whether the kernel could say so.

    A packet passes the hooks of netfilter, from the first to the confirmation of its connection, inside one read-side
    section of RCU, and membarrier(2) with MEMBARRIER_CMD_GLOBAL returns when a grace period is over: some milliseconds,
    some tens on a busy host.
    """
    return _SYS_MEMBARRIER is not None and _libc.syscall(_SYS_MEMBARRIER, _CMD_GLOBAL, 0, 0) == 0
