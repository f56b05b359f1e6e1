"""What a host has run out of, as an error with a remedy: descriptors, processes, memory, space on a disk."""

from __future__ import annotations

import errno
import os

from netloom.errors import HostRefused

_REMEDIES = {
    errno.EMFILE: "the agent has too few file descriptors: raise LimitNOFILE of netloom-agent.service, and restart it",
    errno.ENFILE: "the host has too few file descriptors: raise fs.file-max",
    errno.EAGAIN: "the host has too few processes: raise kernel.pid_max, kernel.threads-max, or the unit's TasksMax",
    errno.ENOMEM: "the host, or the unit of the agent, has too little memory",
    errno.ENOSPC: "free space on the host's disk; for a namespace, raise user.max_net_namespaces",
    errno.EDQUOT: "free space on the host's disk",
    errno.EROFS: "make the host's disk writable; dmesg may tell why it is not",
    errno.EIO: "the host's disk fails: see dmesg",
}
_NO_THREAD = "can't start new thread"  # what CPython's threading module says


def remedy(error: BaseException) -> str:
    """What to do about the error, by its error number or that of its cause; empty when it names no scarce resource."""
    return _REMEDIES.get(_errno(error), "")


def refusal(error: BaseException, what: str) -> HostRefused | None:
    """The error as that of the command ``what``; None if it is a bug instead."""
    code = _errno(error)
    if code not in _REMEDIES or isinstance(error, HostRefused):
        return None
    return HostRefused(f"{what}: {os.strerror(code)}", hint=_REMEDIES[code])


def _errno(error: BaseException | None) -> int:
    while error is not None:
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
            return errno.EAGAIN
        code = getattr(error, "errno", None)
        if isinstance(code, int) and code in _REMEDIES:
            return code
        error = error.__cause__
    return 0
