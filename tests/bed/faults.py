"""What can happen to a simulated host besides a power cut and a partition (bed/lab.py): its agent, its processes.

Processes are found and ended by their ids, and only those of this host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import processes
from bed.client import BedError
from bed.lab import Host, agent_command
from bed.machines import until

_AGENT = " agent serve"
_BED = "/bed/child.py"

What = Literal["the agent", "all"]


def processes_of(host: Host) -> dict[int, str]:
    """The command lines of the host's processes, by the process ids of the test, without those of the bed itself."""
    mine = os.readlink(f"/proc/{host.pid}/ns/pid")
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.readlink(entry / "ns/pid") == mine:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                if line and _BED not in line:
                    found[int(entry.name)] = line
    return found


def agents_of(host: Host) -> list[int]:
    """The process ids of the host's running agent; usually one, and none when it is dead."""
    return [pid for pid, line in processes_of(host).items() if _AGENT in line]


def start_agent(host: Host, *, wait: bool = True) -> float:
    """Start the agent as the first call does, unless one runs; returns the time. ``wait``: until it answers."""
    host.sh(f"{agent_command()} connect </dev/null >/dev/null 2>&1{'' if wait else ' &'}")
    return time.monotonic()


def kill_agent(host: Host) -> float:
    """Kill the agent, as a crash does; returns the time. A command of CloudStack may start another one at once."""
    killed = {*agents_of(host)}
    for pid in killed:
        processes.kill(pid)
    if not until(lambda: killed.isdisjoint(agents_of(host)), pause_s=0.005):
        raise BedError(f"{host.name}: the agent did not end")
    return time.monotonic()


def freeze(host: Host, what: What = "the agent") -> float:
    """Stop processes of the host until ``thaw``; returns the time when all have stopped. The kernel goes on.

    "all" leaves out those of the bed: the VMs, and what runs programs for the test.
    """
    frozen: set[int] = set()
    while new := set(agents_of(host) if what == "the agent" else processes_of(host)) - frozen:
        for pid in new:
            processes.kill(pid, signal.SIGSTOP)
        frozen |= new
    return time.monotonic()


def thaw(host: Host) -> float:
    """Let all processes of the host go on; returns the time."""
    for pid in processes_of(host):
        processes.kill(pid, signal.SIGCONT)
    return time.monotonic()


@contextlib.contextmanager
def frozen(host: Host, what: What = "the agent") -> Iterator[None]:
    """Stop processes within the block."""
    freeze(host, what)
    try:
        yield
    finally:
        thaw(host)


def boot(host: Host) -> None:
    """Power on, and start the agent. The kernel has no state; the disk has that of before the power cut."""
    host.boot()
    start_agent(host, wait=False)


def reboot(host: Host) -> None:
    """A power cut, and the return of the power."""
    host.power_cut()
    boot(host)
