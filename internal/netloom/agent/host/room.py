"""The room for more networks on this host: descriptors of the agent, processes of the host, space below ``/run``.

And the room for more connections in a network.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from netloom.agent.kernel import sysctl
from netloom.errors import HostRefused

_SCARCE = 0.8  # the part in use from which a resource is named

_CONNECTIONS, _CONNECTIONS_MAX = "net/netfilter/nf_conntrack_count", "net/netfilter/nf_conntrack_max"

RUN = Path("/run")
PROC = Path("/proc")


def scarce() -> list[str]:
    """A sentence for each resource of the host of which 80 % are in use. What cannot be read is left out."""
    found = []
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = [
        ("descriptors of the agent", len(_listed(PROC / "self/fd")), descriptors, "raise LimitNOFILE of its unit"),
        ("processes and threads of the host", _tasks(), _tasks_max(), "raise kernel.pid_max and kernel.threads-max"),
        *_space(),
    ]
    for what, now, most, remedy in used:
        if most > 0 and now > _SCARCE * most:  # guard: a-scarce-resource-is-named
            found.append(f"host: {now} of {most} {what} are in use: {remedy} before more networks come")
    return found


def connections(namespace: str) -> list[str]:
    """A sentence if 80 % of the connections that the namespace may have are in use. Nothing for a missing one."""
    try:
        read = sysctl.read(namespace, [_CONNECTIONS, _CONNECTIONS_MAX])
    except HostRefused:
        return []
    now, most = int(read[_CONNECTIONS] or 0), int(read[_CONNECTIONS_MAX] or 0)
    if most == 0 or now <= _SCARCE * most:  # guard: a-full-conntrack-table-is-named
        return []
    return [
        f"{now} of {most} connections of {namespace} are in use, and new ones are dropped when all are: raise "
        "net.netfilter.nf_conntrack_max of the host, or conntrack -L in the namespace shows who has them"
    ]


def _listed(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _tasks() -> int:
    """All tasks of the host: the second number of the fourth field of loadavg (proc_loadavg(5))."""
    try:
        return int((PROC / "loadavg").read_text().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0


def _tasks_max() -> int:
    try:
        return min(int((PROC / "sys/kernel" / it).read_text()) for it in ("pid_max", "threads-max"))
    except (OSError, ValueError):
        return 0


def _space() -> list[tuple[str, int, int, str]]:
    try:
        # A part of the disk is no resource of netloom's.
        status = os.statvfs(RUN) if os.path.ismount(RUN) else None
    except OSError:
        status = None
    if status is None:
        return []
    remedy = f"make {RUN} larger"
    unit = status.f_frsize
    mib = 1 << 20
    return [
        (f"MiB of {RUN}", (status.f_blocks - status.f_bavail) * unit // mib, status.f_blocks * unit // mib, remedy),
        (f"inodes of {RUN}", status.f_files - status.f_ffree, status.f_files, remedy),
    ]
