"""Entering namespaces: the only calls of setns(2) in the tests.

A network namespace belongs to a thread. A socket stays in the namespace in which it was made, and a child process
starts in the namespace of the thread that started it. So make sockets and start programs in :func:`inside`, and use
them outside.

This module does not use the product's own ``agent/kernel/namespaces.py``, so that a fault there cannot hide from tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# The flags CLONE_NEW* (linux/sched.h) by the names of the files in /proc/<pid>/ns.
KINDS = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
NAMED = "/run/netns"  # ip-netns(8)

_libc = ctypes.CDLL(None, use_errno=True)


def enter(pid: int, kinds: Sequence[str]) -> None:
    """Move this thread into namespaces of process ``pid``, for good; "pid" applies to children only. Raises OSError."""
    # Open all files first: after a change of the mount namespace /proc shows other processes.
    descriptors = [(kind, os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)) for kind in kinds]
    for kind, descriptor in descriptors:
        _set(descriptor, kind, f"{kind} of {pid}")
        os.close(descriptor)


def enter_network(namespace: str | Path) -> None:
    """Move this thread into a network namespace, for good. See :func:`inside` for ``namespace``. Raises OSError."""
    descriptor = os.open(os.path.join(NAMED, namespace), os.O_RDONLY | os.O_CLOEXEC)
    _set(descriptor, "net", str(namespace))
    os.close(descriptor)


@contextlib.contextmanager
def inside(namespace: str | Path) -> Iterator[None]:
    """Within the block this thread is in a network namespace. Raises OSError when there is no such namespace.

    ``namespace`` is a name in /run/netns, or the absolute path of a namespace file (``/proc/<pid>/ns/net``).
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network(namespace)
        try:
            yield
        finally:
            try:
                _set(home, "net", "home")
            except OSError:
                os._exit(70)  # tests must not continue in a foreign namespace
    finally:
        os.close(home)


def _set(descriptor: int, kind: str, what: str) -> None:
    if _libc.setns(descriptor, KINDS[kind]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns {what}: {os.strerror(number)}")
