"""Wait until the kernel has finished with the packets that it processed under an earlier ruleset."""

from __future__ import annotations

import ctypes
import platform

_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(platform.machine())
_CMD_GLOBAL = 1  # linux/membarrier.h

_libc = ctypes.CDLL(None, use_errno=True)


def settled() -> bool:
    """Wait until all packets that are in the netfilter hooks now have left them. False: this kernel cannot tell.

    The kernel processes a packet, from the first hook to the confirmation of its connection, inside one RCU read-side
    section. membarrier(2) with MEMBARRIER_CMD_GLOBAL returns after an RCU grace period, which takes milliseconds, on a
    busy host tens of milliseconds.
    """
    return _SYS_MEMBARRIER is not None and _libc.syscall(_SYS_MEMBARRIER, _CMD_GLOBAL, 0, 0) == 0
