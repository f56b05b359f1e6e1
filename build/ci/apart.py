"""Run a command apart from the rest of the machine: in network, mount and process namespaces of its own.

    .venv/bin/python build/ci/apart.py LEFT COMMAND...

Tests that give their network namespaces, links and files the same names can so run at the same time. /run is empty, and
there is only the loopback link. What the command leaves of these is written to the file LEFT, one line each. Processes
that it leaves are killed. The exit status is the command's; 128 + N if signal N ended it. SIGINT and SIGTERM are passed
on.
"""

from __future__ import annotations

import ctypes
import glob
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

NEW_NETWORK, NEW_MOUNTS, NEW_PROCESSES = 0x40000000, 0x00020000, 0x20000000  # CLONE_NEW*, linux/sched.h
# Files that tests of networks might leave.
TRACES = ("/run/netloom*", "/run/netns/*")
TRACES_GO_WITHIN_S = 10.0  # the kernel deletes namespaces asynchronously


class PassOn:
    """Passes SIGINT and SIGTERM on to a process, also those that arrive before the process is known."""

    def __init__(self) -> None:
        self._pid = 0
        self._early: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def to(self, pid: int) -> None:
        self._pid = pid
        for number in self._early:
            os.kill(pid, number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._pid:
            os.kill(self._pid, number)
        else:
            self._early.append(number)


def main(arguments: Sequence[str]) -> int:
    """The exit status. Raises OSError without root."""
    left, *command = arguments
    pass_on = PassOn()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NETWORK | NEW_MOUNTS | NEW_PROCESSES):
        raise OSError(ctypes.get_errno(), "unshare: namespaces cannot be made")
    init = os.fork()
    if init == 0:
        status = 1
        try:
            status = _run(Path(left), command)
        except Exception:  # noqa: BLE001, this process must not return to the caller
            traceback.print_exc()
        finally:
            os._exit(status)  # the kernel kills what is left in the process namespace
    pass_on.to(init)
    return os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])


def _run(left: Path, command: Sequence[str]) -> int:
    """As the first process of its namespace: run the command, and reap all processes until it has ended."""
    pass_on = PassOn()
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    links = set(_links())
    program = subprocess.Popen(command)
    pass_on.to(program.pid)
    status = None
    while status is None:
        pid, ended = os.wait()  # also of orphans
        status = os.waitstatus_to_exitcode(ended) if pid == program.pid else None
    until = time.monotonic() + TRACES_GO_WITHIN_S
    while (traces := _traces(links)) and time.monotonic() < until:
        time.sleep(0.1)
    left.write_text("".join(f"{it}\n" for it in traces))
    return status if status >= 0 else 128 - status


def _traces(links: set[str]) -> list[str]:
    files = [path for pattern in TRACES for path in glob.glob(pattern)]
    return sorted([*files, *(f"link {it}" for it in _links() if it not in links)])


def _links() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
