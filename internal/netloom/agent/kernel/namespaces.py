"""Create, delete and enter named network namespaces.

Each thread of a process is in a network namespace of its own. Within :func:`inside`, create a socket, write a sysctl or
start a child process, and leave: a socket stays in the namespace that it was created in, and a child stays in that of
the thread that started it. A new thread would stay there too, so start none within it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from netloom.errors import HostRefused

# The directory of ip-netns(8), so that ``ip netns`` shows our namespaces and we see those of others.
NETNS_DIR = "/run/netns"

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000  # linux/sched.h
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x4000, 0x40000, 0x100000  # linux/mount.h
_MNT_DETACH = 2
_OWN = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]

_thread = threading.local()


class NamespaceError(HostRefused):
    """A namespace could not be created, entered, left or deleted. ``errno`` is the kernel's; 0: it gave none."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(f"{message}: {os.strerror(errno)}" if errno else message, hint=hint)
        self.errno = errno


@contextmanager
def inside(namespace: str | None) -> Iterator[None]:
    """Move the calling thread to ``namespace`` for the block; ``None`` and ``""`` change nothing. May be nested.

    Never hold it across an ``await``: the event loop would run other tasks in that namespace.

    Raises NamespaceError when there is no such namespace. If the thread cannot return, leaving the block raises, and so
    does each later use in that thread, because its namespace is the wrong one.
    """
    if getattr(_thread, "lost", ""):
        raise NamespaceError(f"this thread could not leave {_thread.lost}; it can no longer be used")
    if not namespace:
        yield
        return
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with descriptor(namespace) as there:
            if _libc.setns(there, _CLONE_NEWNET) != 0:
                raise NamespaceError(f"enter namespace {namespace}", errno=ctypes.get_errno())
        try:
            yield
        finally:
            _return(home, namespace)
    finally:
        os.close(home)


@contextmanager
def descriptor(namespace: str) -> Iterator[int]:
    """Open a file descriptor of a named namespace, as IFLA_NET_NS_FD expects one; it is closed after the block.

    Raises NamespaceError when there is no such namespace.
    """
    path = _path(namespace)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(f"namespace {namespace}", errno=error.errno or 0) from error
    try:
        if not _is_namespace(os.fstat(fd)):
            raise NamespaceError(
                f"namespace {namespace}: {path} is not a namespace",
                hint="its creation was interrupted; create it again",
            )
        yield fd
    finally:
        os.close(fd)


def exists(name: str) -> bool:
    """Whether ``name`` is a usable namespace, not just a plain file left by an interrupted creation."""
    try:
        return _is_namespace(os.stat(_path(name)))
    except FileNotFoundError:
        return False


def identity(name: str) -> int:
    """The namespace's inode number; a later namespace of the same name has another. Raises FileNotFoundError."""
    return os.stat(_path(name)).st_ino


def own_identity() -> int:
    """The inode number of the namespace that the calling thread is in."""
    return os.stat(_OWN).st_ino


def create(name: str) -> None:
    """Create a named namespace, which exists without a process in it; keep one that exists.

    The namespace is bound to its name as ``ip netns add`` does it. NETNS_DIR is a shared mount, so that the name is
    visible in all mount namespaces derived from this one. After a crash at any point, calling again completes the work.

    Raises NamespaceError.
    """
    path = _path(name)
    with _locked():
        if exists(name):
            return
        try:
            _share_directory()
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
            _bind_new(path, name)
        except OSError as error:
            raise NamespaceError(f"create namespace {name}", errno=error.errno or 0) from error


def delete(name: str) -> None:
    """Delete the name, if it exists.

    The kernel removes the namespace and its links with the last socket, process or descriptor in it. So first delete
    the links that have to disappear now, and close listening sockets.

    Raises NamespaceError.
    """
    path = _path(name)
    with _locked():
        try:
            # Two programs that created the same name at the same time leave one mount over the other.
            while _libc.umount2(path.encode(), _MNT_DETACH) == 0:
                pass
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOENT):  # not a mount; no such file
                raise OSError(code, os.strerror(code))
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise NamespaceError(f"delete namespace {name}", errno=error.errno or 0) from error


def clear(name: str) -> None:
    """Delete the plain file that an interrupted creation or deletion left under the name of no namespace.

    Raises NamespaceError.
    """
    path = _path(name)
    with _locked():
        if exists(name):
            return
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise NamespaceError(f"clear namespace {name}", errno=error.errno or 0) from error


def _bind_new(path: str, name: str) -> None:
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET))
        try:
            # thread-self: /proc/self is the main thread's, which did not move.
            _check(_libc.mount(_OWN.encode(), path.encode(), b"none", _MS_BIND, None))
        finally:
            _return(home, f"the new namespace {name}")
    finally:
        os.close(home)


def prepare() -> None:
    """Make the directory of named namespaces a shared mount, as ``ip netns`` does. Idempotent."""
    with _locked():
        _share_directory()


def _share_directory() -> None:
    os.makedirs(NETNS_DIR, mode=0o755, exist_ok=True)
    directory = NETNS_DIR.encode()
    if _libc.mount(b"", directory, b"none", _MS_SHARED | _MS_REC, None) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:  # EINVAL: not a mount point yet
        _check(-1)
    _check(_libc.mount(directory, directory, b"none", _MS_BIND | _MS_REC, None))
    _check(_libc.mount(b"", directory, b"none", _MS_SHARED | _MS_REC, None))


def release() -> None:
    """Undo :func:`prepare` if no named namespace is left; creating the next one prepares the directory again."""
    with _locked():
        if not os.listdir(NETNS_DIR):
            _libc.umount2(NETNS_DIR.encode(), _MNT_DETACH)


def enter_scratch() -> None:
    """Move this process, which must have one thread, to a new network namespace and an empty NETNS_DIR of its own.

    Other processes do not see what it creates there, and all of it is removed when the process ends. Raises OSError.
    """
    run = os.path.dirname(NETNS_DIR).encode()
    _check(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_libc.mount(b"netloom", run, b"tmpfs", 0, None))


def enter_private() -> None:
    """Move the calling thread to a new namespace without a name, which lasts as long as the thread and its sockets.

    Raises NamespaceError.
    """
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise NamespaceError("make a namespace for a thread", errno=ctypes.get_errno())


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of the directory, which ``ip netns add`` also takes while it prepares the directory."""
    os.makedirs(NETNS_DIR, mode=0o755, exist_ok=True)
    fd = os.open(NETNS_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _return(home: int, left: str) -> None:
    if _libc.setns(home, _CLONE_NEWNET) != 0:
        _thread.lost = left
        raise NamespaceError(f"leave {left}", errno=ctypes.get_errno(), hint="the agent must be restarted")


def _is_namespace(status: os.stat_result) -> bool:
    # All namespaces are files of one pseudo file system, nsfs; nothing else is.
    return status.st_dev == os.stat(_OWN).st_dev


def _path(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise NamespaceError(f"{name!r} cannot be the name of a namespace")
    return f"{NETNS_DIR}/{name}"


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
