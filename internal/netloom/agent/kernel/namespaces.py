"""Network namespaces by name, and being inside one for a moment.

A network namespace belongs to a thread, not to a process. Inside :func:`inside` make the socket, write the sysctl or
start the child, and leave: a socket stays in the namespace it was made in, and a child inherits the namespace of the
thread that started it. So does a thread, for good: start none inside.
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

# Where iproute2 keeps them (ip-netns(8)), so that ``ip netns`` and we see the same names.
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
    """A namespace could not be made, entered, left or removed. ``errno`` is the kernel's, 0 where it said nothing."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(f"{message}: {os.strerror(errno)}" if errno else message, hint=hint)
        self.errno = errno


@contextmanager
def inside(namespace: str | None) -> Iterator[None]:
    """Within the block the calling thread is in ``namespace``; ``None`` and ``""`` change nothing. May be nested.

    Never hold it across an ``await``: the event loop's thread would serve everybody else from there.

    Raises NamespaceError when there is no such namespace. A thread that cannot come back is poisoned: the way back
    raises, and so does every later ``inside`` of that thread, whatever it asks for, because nobody knows where it is.
    """
    if getattr(_thread, "lost", ""):
        raise NamespaceError(f"this thread could not leave {_thread.lost} and must not be used any more")
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
    """A descriptor of a named namespace, closed after the block; what IFLA_NET_NS_FD takes.

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
                f"namespace {namespace}: {path} is no namespace", hint="a half-made one; create it again"
            )
        yield fd
    finally:
        os.close(fd)


def exists(name: str) -> bool:
    """Whether ``name`` is a usable namespace. A plain file that a crash left behind is none."""
    try:
        return _is_namespace(os.stat(_path(name)))
    except FileNotFoundError:
        return False


def identity(name: str) -> int:
    """The namespace's inode number: another one under the same name has another. Raises FileNotFoundError."""
    return os.stat(_path(name)).st_ino


def names() -> frozenset[str]:
    """The names of all usable namespaces."""
    try:
        found = os.listdir(NETNS_DIR)
    except FileNotFoundError:
        return frozenset()
    return frozenset(name for name in found if exists(name))


def create(name: str) -> None:
    """Make a namespace that lives without a process; one that is there already stays as it is.

    A new namespace, bound to its name as ``ip netns add`` does it: NETNS_DIR is a shared mount, so that the name
    means the same in every mount namespace that was made from this one. After a crash at any point, calling
    again completes it.

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
    """Take the name away; one that is not there is fine.

    The namespace and its links end with the last socket, process or descriptor in it, which is now unless somebody
    holds one: delete links that must be gone, and close listeners, before.

    Raises NamespaceError.
    """
    path = _path(name)
    with _locked():
        try:
            # More than one when two programs made the same name at once: the mounts lie on one another.
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
    """Nothing is left of a name that no namespace has: a crash may leave the plain file that it was bound to.

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
            # thread-self: /proc/self is the main thread's, which is still where it was.
            _check(_libc.mount(_OWN.encode(), path.encode(), b"none", _MS_BIND, None))
        finally:
            _return(home, f"the new namespace {name}")
    finally:
        os.close(home)


def prepare() -> None:
    """The directory of named namespaces is a shared mount, as ``ip netns`` makes it. Idempotent."""
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
    """Undoes ``prepare`` where no namespace has a name: whoever makes one next prepares the directory again."""
    with _locked():
        if not os.listdir(NETNS_DIR):
            _libc.umount2(NETNS_DIR.encode(), _MNT_DETACH)


def enter_scratch() -> None:
    """This process, of one thread, goes on in a network of its own with no link and no named namespace.

    What it makes there nobody else sees, and it ends with the process, however that ends. Raises NamespaceError.
    """
    run = os.path.dirname(NETNS_DIR).encode()
    _check(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_libc.mount(b"netloom", run, b"tmpfs", 0, None))


@contextmanager
def _locked() -> Iterator[None]:
    """One at a time, in all processes: the lock that ``ip netns add`` takes too while it prepares the directory."""
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
