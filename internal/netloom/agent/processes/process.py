"""Start, inspect and stop processes that outlive the agent.

A process is identified by its pid and its start time: a pid alone may belong to another process later.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec

from netloom.agent import packages
from netloom.agent.environment import PATH
from netloom.agent.kernel.namespaces import inside
from netloom.agent.processes.launcher import Launcher
from netloom.confine import CAPABILITIES
from netloom.errors import HostRefused
from netloom.files import replace_bytes
from netloom.render.service import Service

TERMINATE_S = 2.0  # for SIGTERM, and again for SIGKILL
RUN_S_MAX = 20.0

_libc = ctypes.CDLL(None)
launcher = Launcher()


class Record(msgspec.Struct, frozen=True):
    """A process, as it is recorded in a file for the next agent.

    ``started``: field 22 of /proc/<pid>/stat, in clock ticks since boot (proc(5)). ``digest``: of the configuration
    that the process uses; empty: of an unknown one.
    """

    pid: int
    started: int
    digest: str = ""


def record_of(pid: int, digest: str = "") -> Record:
    """The record of a running process."""
    return Record(pid, start_time(pid) or 0, digest)


def read_record(path: Path) -> Record | None:
    """The record in the file; None when there is no file, or it is no record."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Replace the file atomically. Raises OSError."""
    replace_bytes(path, msgspec.json.encode(record), durable=False)  # no process survives a power failure either


def alive(record: Record) -> bool:
    """Whether this very process runs: a later process may have the same pid, but not the same start time."""
    return start_time(record.pid) == record.started  # guard: a-recycled-pid-is-another-process


# ------------------------------------------------------------------------------------------------ start and stop


def start(service: Service, namespace: str, uid: int, log: Path) -> int:
    """Start the process of a service in the namespace, as leader of a session of its own, and return its pid.

    ``netloom confine`` executes the program, as user and group ``uid``. stdout and stderr go to a new file ``log``.
    Raises HostRefused when the program is not installed.
    """
    program = _find_program(service.argv[0], f"{service.name}: ")
    capabilities, demanded = ",".join(service.capabilities), ",".join(service.demanded)
    places = ",".join(f"{name}={place}" for name, place in service.places.items())
    confined = [str(uid), service.directory, places, capabilities, demanded, str(service.data_mib_max)]
    log.unlink(missing_ok=True)  # an earlier process may still write to the old one
    output = open_log(log)
    try:
        return launcher.launch([*confined, program, *service.argv[1:]], namespace, output)
    finally:
        os.close(output)


def open_log(path: Path) -> int:
    """Open a log for the output of a process. Appended text has no gap before it after the file was shortened."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # guard: a-shortened-log-has-no-hole
    return os.open(path, flags, 0o600)


def run(namespace: str | None, argv: list[str], who: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with stdout and stderr together in ``stdout``. None: in the host's namespace.

    ``who``: the beginning of the error when the program is missing.
    Raises HostRefused when the program is not installed, or runs for longer than ``RUN_S_MAX``.
    """
    program = _find_program(argv[0], who)
    with inside(namespace):
        try:
            return subprocess.run(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": PATH, "LANG": "C"},
                text=True,
                errors="replace",
                timeout=RUN_S_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HostRefused(f"{argv[0]} {argv[1]} did not end within {RUN_S_MAX:.0f} s, and was killed") from None


def _find_program(name: str, who: str = "") -> str:
    program = shutil.which(name, path=PATH)
    if program is None:
        raise HostRefused(f"{who}{name} is not installed on this host", hint=packages.install_missing(name))
    return program


def terminate(leader: int) -> None:
    """Send SIGTERM to the process group of ``leader``, and SIGKILL after ``TERMINATE_S``; wait until it has ended.

    When the leader has ended, the rest of the group gets SIGKILL at once: an old haproxy worker would keep its sockets
    until its connections have ended. Returns after two times ``TERMINATE_S`` at the latest.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
        until = time.monotonic() + TERMINATE_S
        while time.monotonic() < until:
            if start_time(leader) is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(leader, signal.SIGKILL)
                if not group(leader):
                    return
            time.sleep(0.005)


def kill(record: Record) -> bool:
    """Send SIGKILL to the process. Return False if it has ended already."""
    if not alive(record):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGKILL)
    return True


def reap(pid: int) -> None:
    """Collect the exit status of a child that has ended. An adopted process is not our child: nothing to do."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# --------------------------------------------------------------------------------------------------------- /proc


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None when it has ended, also if it was not reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def owning_sockets(user: int) -> Iterator[None]:
    """Let the sockets that the calling thread opens in the block belong to ``user`` (setfsuid(2))."""
    _libc.setfsuid(user)  # guard: own-ports-are-not-taken
    try:
        yield
    finally:
        _libc.setfsuid(0)


@contextlib.contextmanager
def socket_inside(pid: int, path: str) -> Iterator[str]:
    """A path by which a socket in the root directory of the process can be connected to in the block. Raises OSError.

    The service can put a symbolic link there. From here, the link would lead to a socket of the host.
    """
    opened = os.open(f"/proc/{pid}/root{path}", os.O_PATH | os.O_NOFOLLOW)  # guard: sockets-of-services-are-no-links
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


def namespace_of(pid: int) -> int:
    """The inode of the network namespace that the process is in; 0 when it has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def user_of(pid: int) -> int:
    """The real user of the process; -1 when it has ended."""
    return int(_status(pid, "Uid") or "-1")


def has_capabilities(pid: int, names: Iterable[str]) -> bool:
    """Whether the process has one of these capabilities; False when it has ended."""
    effective = int(_status(pid, "CapEff") or "0", 16)
    return any(effective >> CAPABILITIES[it] & 1 for it in names)


def _status(pid: int, field: str) -> str:
    """The first value of a field of /proc/<pid>/status (proc(5)); empty when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    return status.partition(f"\n{field}:")[2].split(maxsplit=1)[0]


def group(leader: int) -> list[int]:
    """The running processes of the group (proc(5), /proc/<pid>/stat: field 3 is the state, field 5 the group)."""
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX" and int(fields[2]) == leader:
                    members.append(int(name))
    return members


def groups_with_arguments(arguments: tuple[str, ...], namespace: int) -> set[int]:
    """The groups of processes in the namespace (its inode) that were started with these arguments after argv[0]."""
    groups = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
            if tuple(argv[1:][-len(arguments) :]) == arguments and namespace_of(pid) == namespace:
                groups.add(os.getpgid(pid))
    return groups


def listening(
    pid: int, members: Iterable[int] | None = None, *, among: Collection[tuple[str, int]] | None = None
) -> set[tuple[str, int]]:
    """The protocols and ports on which a process of ``members`` listens; None: any process of the group of ``pid``.

    ``among``: only these count. Read from /proc/<pid>/net (proc(5)), which lists all sockets of the namespace. Sockets
    of other processes, for example of an older one of the same service, are left out.
    """
    open_: dict[str, tuple[str, int]] = {}  # by inode
    for protocol, state in (("tcp", "0A"), ("udp", "07")):
        with contextlib.suppress(OSError):
            for fields in map(str.split, Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]):
                at = protocol, int(fields[1].rpartition(":")[2], 16)
                if fields[3] == state and (among is None or at in among):
                    open_[fields[9]] = at
    found: set[tuple[str, int]] = set()
    # Most services are one process, and a look for the others of a group looks at all processes of the host.
    for those in ([pid], None) if members is None else (members,):
        if open_:
            for member in group(pid) if those is None else those:
                found |= {open_.pop(it) for it in _socket_inodes(member) & open_.keys()}
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found
