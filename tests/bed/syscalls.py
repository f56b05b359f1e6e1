"""System calls that Python 3.11 does not offer: new namespaces, mounts, a change of the root, the host name."""

from __future__ import annotations

import ctypes
import os

import netns

MS_RDONLY = 0x1
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

# pivot_root(2) has no wrapper in libc: its number by machine.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(kinds: list[str]) -> None:
    """Move this process into new namespaces; for "pid" only its children. Raises OSError."""
    flags = 0
    for kind in kinds:
        flags |= netns.KINDS[kind]
    _checked(_libc.unshare(flags), f"unshare {' '.join(kinds)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    _checked(
        _libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None),
        f"mount {kind or 'bind'} on {target}",
    )


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Bind-mount a directory, with the mounts below it. Raises OSError."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def make_mounts_private() -> None:
    """Keep later mounts inside this mount namespace. Raises OSError."""
    mount("", "/", flags=MS_REC | MS_PRIVATE)


def change_root(new_root: str) -> None:
    """Make ``new_root`` the root and forget the old one. Raises OSError."""
    old = os.path.join(new_root, ".old")
    os.makedirs(old, exist_ok=True)
    _checked(_libc.syscall(_PIVOT_ROOT[os.uname().machine], new_root.encode(), old.encode()), "pivot_root")
    os.chdir("/")
    _checked(_libc.umount2(b"/.old", MNT_DETACH), "umount of the old root")
    os.rmdir("/.old")


def set_hostname(name: str) -> None:
    """sethostname(2). Raises OSError."""
    _checked(_libc.sethostname(name.encode(), len(name)), "sethostname")


def hash_password(password: str) -> str:
    """``password`` as /etc/shadow keeps it (crypt(3), SHA-512, few rounds). Raises OSError."""
    libcrypt = ctypes.CDLL("libcrypt.so.1", use_errno=True)
    libcrypt.crypt.restype = ctypes.c_char_p
    hashed: bytes | None = libcrypt.crypt(password.encode(), b"$6$rounds=1000$bedbedbed")
    if not hashed:
        raise OSError(ctypes.get_errno(), "crypt")
    return hashed.decode()
