"""A guest process that tries to break out of its sandbox: the program ``netloom guest`` with attempts inside.

    python intruder.py [--without-filter] <arguments of netloom guest>

On SIGUSR1 the process makes each attempt and writes the results to stdout, as one line of JSON: the name of the attempt
and the name of its errno, or ``possible``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable

from netloom.guest import sandbox
from netloom.guest.main import main

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWUSER = 0x10000000
_PTRACE_ATTACH = 16


def attempts(parent: int) -> dict[str, str]:
    """Make each attempt; return the name of its errno, or ``possible``. ``parent``: a pid outside the sandbox."""
    outcomes: dict[str, str] = {}
    for name, attempt in _ATTEMPTS.items():
        try:
            attempt(parent)
        except OSError as error:
            outcomes[name] = errno.errorcode.get(error.errno or 0, str(error.errno))
        else:
            outcomes[name] = "possible"
    return outcomes


def _connect(_: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect(("127.0.0.1", 22))


def _raw(_: int) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def _fork(_: int) -> None:
    if os.fork() == 0:
        os._exit(0)


def _executable_memory(_: int) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def _by_libc(name: str, *arguments: int | bytes | None) -> Callable[[int], None]:
    def attempt(_: int) -> None:
        if getattr(_libc, name)(*arguments) == -1:
            raise OSError(ctypes.get_errno(), name)

    return attempt


def _ptrace(parent: int) -> None:
    if _libc.ptrace(_PTRACE_ATTACH, parent, None, None) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")


_ATTEMPTS: dict[str, Callable[[int], object]] = {
    "open a file": lambda _: os.open("/etc/passwd", os.O_RDONLY),
    "make a file": lambda _: os.open("/file", os.O_WRONLY | os.O_CREAT, 0o600),
    "list a directory": lambda _: os.listdir("/"),
    "connect out": _connect,
    "open a raw socket": _raw,
    "execute": lambda _: os.execv("/bin/true", ["true"]),
    "fork": _fork,
    "ptrace": _ptrace,
    "signal another process": lambda parent: os.kill(parent, signal.SIGCONT),
    "become root": lambda _: os.setuid(0),
    "leave the root directory": lambda _: os.chroot("."),
    "mount": _by_libc("mount", b"none", b"/", b"tmpfs", 0, None),
    "make a user namespace": _by_libc("unshare", _CLONE_NEWUSER),
    "get executable memory": _executable_memory,
}


def _report(*_: object) -> None:
    os.write(1, json.dumps(attempts(os.getppid())).encode() + b"\n")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--without-filter" in arguments:
        arguments.remove("--without-filter")
        sandbox.ARCHES.clear()  # as on a machine whose system call numbers are unknown
    signal.signal(signal.SIGUSR1, _report)
    sys.exit(main(arguments))
