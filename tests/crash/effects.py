"""Stop a program after any of its effects.

An effect is a system call that changes something outside the process: a file, a mount, a message to the kernel or to
another process, a new process, a signal. The kernel finds them (``launch.py``), so a new step of the program is an
effect without a line here. What remains is to name them, and to leave out what changes nothing: questions to the
kernel, lines of logs, bytes by which a process wakes itself.

A tracer is asked before each effect is carried out. To kill the process before effect N + 1 is to kill it right after
effect N.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import processes
from crash.system_calls import NAMED

LAUNCH = [sys.executable, "-S", "-E", str(Path(__file__).with_name("launch.py"))]
LISTENER_S_MAX = 30.0

# linux/seccomp.h: a notification is the id, the thread, flags, and the system call with its six arguments.
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1

MACHINE = os.uname().machine
_PIDFD_GETFD = 438  # on all machines
_libc = ctypes.CDLL(None, use_errno=True)
_NAMES = {number: name for name, number in NAMED[MACHINE].items()}

_CLONE_THREAD = 0x10000
_FILES = re.compile(
    "(?:creat|rename|unlink|rmdir|mkdir|link|symlink|mknod|truncate|ftruncate|fallocate|chmod|fchmod|chown|fchown"
    "|lchown|utime|utimes|futimes|utimens|[fl]?setxattr|[fl]?removexattr)(?:at2?)?"
)
_MOUNTS = {
    "mount",
    "umount2",
    "pivot_root",
    "move_mount",
    "open_tree",
    "fsmount",
    "fsopen",
    "fsconfig",
    "mount_setattr",
}
_STARTS = {"clone", "clone3", "fork", "vfork", "execve", "execveat"}
_FLUSHES = {"fsync", "fdatasync", "sync", "syncfs", "sync_file_range"}
# Requests of ioctl(2) that ask, or change the descriptor alone: of terminals, FIONBIO, FIOCLEX, SIOCGIFCONF and so on.
_IOCTLS = {
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
    *range(0x8910, 0x8914),
    0x8915,
    0x8921,
    0x8927,
    0x8933,
    0x894C,
}

# linux/netlink.h, linux/netfilter/nfnetlink.h
_HEADER = struct.Struct("=IHHII")
_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_RTM_FIRST, _RTM_GET = 16, 2  # from 16 on four types of message for each kind of object, the third of which asks
_BATCH_BEGIN, _SUBSYSTEM_CONNTRACK, _SUBSYSTEM_NFTABLES = 0x10, 1, 10
_CONNTRACK_CHANGES = {0, 2}  # IPCTNL_MSG_CT_NEW and _DELETE


class Effect(NamedTuple):
    """One effect. ``pid``: the process. ``kind``: ``file``, ``netlink`` and so on. ``what``: for people."""

    pid: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


class Tracer:
    """Follows programs that were started by ``command``. Its thread answers their system calls until ``close``.

    ``is_ours`` says for the path of an executable whether its effects count. A daemon that the program has started
    keeps the filter, so its calls are answered, too.
    """

    def __init__(self, is_ours: Callable[[str], bool] | None = None) -> None:
        interpreter = os.path.realpath(sys.executable)
        self._is_ours = is_ours or (lambda path: path == interpreter)
        self._lock = threading.Lock()
        self._strike: Callable[[Effect], bool] | None = None
        self._seen: list[Effect] = []
        self._sockets: dict[str, tuple[int, int]] = {}
        self._listeners: set[int] = set()
        self._poll = select.poll()
        self._wake, self._woken = os.pipe()
        self._poll.register(self._wake, select.POLLIN)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="tracer")
        self._thread.start()

    def start(self, argv: Sequence[str], *, before: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
        """Start a program with the filter. ``before``: a command that executes the rest, such as nsenter(1)."""
        process = subprocess.Popen([*before, *LAUNCH, *argv], **options)
        self.adopt(process)
        return process

    @contextlib.contextmanager
    def watching(self, strike: Callable[[Effect], bool]) -> Iterator[list[Effect]]:
        """Call ``strike`` before each effect of the block; the effects so far are the list that it yields.

        ``strike`` runs in the tracer's thread. True kills the process, and the effect does not happen.
        """
        seen: list[Effect] = []
        with self._lock:
            self._strike, self._seen = strike, seen
        try:
            yield seen
        finally:
            with self._lock:
                self._strike = None

    def close(self) -> None:
        """End the thread. End the programs before: from now on their effects fail with ENOSYS."""
        self._closing = True
        os.write(self._woken, b"x")
        self._thread.join()
        for descriptor in (self._wake, self._woken, *self._listeners):
            os.close(descriptor)

    # ------------------------------------------------------------------------------------------- in the own thread

    def adopt(self, process: subprocess.Popen[Any]) -> None:
        """Take the listener out of a program that waits in its first execve(2)."""
        until = time.monotonic() + LISTENER_S_MAX
        while (number := _listener_of(process.pid)) < 0:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"no listener: {process.args!r}")
            time.sleep(0.001)
        listener = _descriptor_of(process.pid, number)
        self._listeners.add(listener)
        self._poll.register(listener, select.POLLIN)
        os.write(self._woken, b"x")  # poll(2) does not notice a registration

    def _serve(self) -> None:
        while not self._closing:
            for descriptor, events in self._poll.poll():
                if descriptor == self._wake:
                    os.read(self._wake, 64)
                elif events & select.POLLIN:
                    self._answer(descriptor)
                else:  # POLLHUP: the last process with the filter has ended
                    self._poll.unregister(descriptor)
                    self._listeners.discard(descriptor)
                    os.close(descriptor)

    def _answer(self, listener: int) -> None:
        call = bytearray(_NOTIFICATION.size)
        with contextlib.suppress(FileNotFoundError, InterruptedError):  # the process was killed meanwhile
            fcntl.ioctl(listener, _RECEIVE, call)
            cookie, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(call)
            with self._lock:
                strike = self._strike
                if strike is not None:
                    with contextlib.suppress(OSError):
                        effect = self._effect(thread, number, arguments)
                        if effect is not None:
                            if strike(effect):
                                processes.kill(effect.pid)
                                return
                            self._seen.append(effect)
            fcntl.ioctl(listener, _SEND, array.array("B", _RESPONSE.pack(cookie, 0, 0, _CONTINUE)))

    # ------------------------------------------------------------------------------------------------- naming

    def _effect(self, thread: int, number: int, arguments: list[int]) -> Effect | None:
        """The effect of a system call; None: it has none, or the process is another program's. Raises OSError."""
        if not self._is_ours(os.readlink(f"/proc/{thread}/exe")):
            return None
        named = self._named(thread, number, arguments)
        return None if named is None else Effect(_process_of(thread), *named)

    def _named(self, thread: int, number: int, arguments: list[int]) -> tuple[str, str] | None:
        name = _NAMES.get(number, f"system call {number}")
        first, second, third, *_ = arguments
        if name in ("write", "writev", "pwrite64", "pwritev", "pwritev2", "sendfile"):
            return self._written(thread, first, third if name == "write" else -1)
        if name in ("sendto", "sendmsg", "sendmmsg"):
            return self._sent(thread, first, _data(thread, name, second, third))
        if name in ("open", "openat", "openat2"):
            path = _path(thread, first if name == "open" else second)
            return None if _is_log(path) or path.startswith("/dev/") else ("file", f"open {path}")
        if name in _STARTS:
            if name == "clone3" and int.from_bytes(_memory(thread, first, 8), sys.byteorder) & _CLONE_THREAD:
                return None
            return "process", f"{name} {_path(thread, first)}" if name == "execve" else name
        if name in _FLUSHES:
            return "flush", f"{name} {_opened(thread, first)}"
        if name in _MOUNTS or name == "unshare":
            return "namespace", name
        if name == "ioctl" and (second in _IOCTLS or second >> 8 & 0xFF == 0x21):
            return None
        if name in ("kill", "tkill", "tgkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            signal = third if name == "tgkill" else second
            own = name != "pidfd_send_signal" and first == _process_of(thread)
            return None if own or not signal else ("signal", f"{name} {signal}")
        if name == "bind":
            address = _memory(thread, second, min(third, 128))
            named_file = int.from_bytes(address[:2], sys.byteorder) == socket.AF_UNIX and address[2:3].strip(b"\0")
            return ("file", f"bind {address[2:].rstrip(bytes(1)).decode()}") if named_file else None
        if _FILES.fullmatch(name):
            by_descriptor = name.startswith("f") or name.endswith(("at", "at2"))
            pointer = second if by_descriptor else first
            own_file = name in ("fchmod", "fchown", "ftruncate", "fallocate")
            path = _opened(thread, first) if own_file else _path(thread, pointer)
            return None if "/memfd:" in path else ("file", f"{name} {path}")
        return "other", f"{name} {first:#x} {second:#x}"

    def _written(self, thread: int, descriptor: int, length: int) -> tuple[str, str] | None:
        path = _opened(thread, descriptor)
        if path.startswith("socket:"):
            return self._sent(thread, descriptor, b"\0" * (length if length >= 0 else 2))
        if path.startswith("pipe:"):
            return ("sent", "stdout") if descriptor == 1 else None
        if not path.startswith("/") or path.startswith(("/memfd:", "/dev/")) or _is_log(path):
            return None
        return ("sysctl" if path.startswith("/proc/sys/") else "file"), f"write {path}"

    def _sent(self, thread: int, descriptor: int, data: bytes) -> tuple[str, str] | None:
        path = _opened(thread, descriptor)
        family, protocol = self._sockets.get(path) or self._socket(thread, descriptor, path)
        if family != socket.AF_NETLINK:
            # One byte: an event loop wakes itself.
            return (
                None if len(data) <= 1 else ("packet" if family == socket.AF_PACKET else "sent", f"{len(data)} bytes")
            )
        types = list(_types(data))
        if protocol == _NETLINK_ROUTE:
            changes = [it for it in types if it >= _RTM_FIRST and (it - _RTM_FIRST) % 4 != _RTM_GET]
            return ("netlink", f"route {','.join(map(str, changes))}") if changes else None
        if protocol != _NETLINK_NETFILTER:
            return "netlink", f"protocol {protocol}"
        if types and types[0] == _BATCH_BEGIN:
            return "nft", f"{len(types)} messages"
        conntrack = [it & 0xFF for it in types if it >> 8 == _SUBSYSTEM_CONNTRACK]
        if conntrack:
            return ("conntrack", f"{len(conntrack)} entries") if _CONNTRACK_CHANGES & set(conntrack) else None
        return None if {it >> 8 for it in types} <= {_SUBSYSTEM_NFTABLES} else ("netlink", f"netfilter {types}")

    def _socket(self, thread: int, descriptor: int, path: str) -> tuple[int, int]:
        """The family and the protocol of a socket in another process."""
        with socket.socket(fileno=_descriptor_of(_process_of(thread), descriptor)) as copy:
            found = self._sockets[path] = int(copy.family), int(copy.proto)
        return found


def _listener_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}") == "anon_inode:seccomp notify":
                return int(name)
    return -1


def _descriptor_of(pid: int, number: int) -> int:
    """A copy of a descriptor of another process (pidfd_getfd(2)), closed on execve(2). Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return copy


def _process_of(thread: int) -> int:
    status = Path(f"/proc/{thread}/status").read_text()
    return int(status.partition("\nTgid:")[2].split(maxsplit=1)[0])


def _opened(thread: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{descriptor & 0xFFFFFFFF}")
    except OSError:
        return f"descriptor {descriptor}"


def _is_log(path: str) -> bool:
    return path.endswith((".log", "/log"))


def _memory(thread: int, address: int, length: int) -> bytes:
    memory = os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(memory, length, address)
    finally:
        os.close(memory)


def _path(thread: int, address: int) -> str:
    """The text at an address. A path may end before a page that is not mapped, so it is read up to that page."""
    left = -address % 4096 or 4096
    text = _memory(thread, address, left)
    if b"\0" not in text:
        text += _memory(thread, address + left, 4096)
    return text.partition(b"\0")[0].decode("utf-8", "replace")


def _data(thread: int, name: str, pointer: int, length: int) -> bytes:
    """What a call sends: the bytes of sendto(2), or those of the first message of sendmsg(2) and sendmmsg(2)."""
    if name == "sendto":
        return _memory(thread, pointer, min(length, 1 << 20))
    _, _, vectors, count = struct.unpack("=QQQQ", _memory(thread, pointer, 32))
    pieces = struct.iter_unpack("=QQ", _memory(thread, vectors, 16 * min(count, 1024)))
    return b"".join(_memory(thread, address, min(size, 1 << 20)) for address, size in pieces)


def _types(data: bytes) -> Iterator[int]:
    """The types of the netlink messages in a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind
        at += max(_HEADER.size, (length + 3) & ~3)
