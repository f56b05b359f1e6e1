"""Read and write the sysctls of a namespace: ``/proc/sys/net`` shows those of the calling thread's namespace.

Names are written as in sysctl.d(5). If the first separator is a dot, dots separate and a slash stands for a literal dot
(``net.ipv4.conf.eth1/1204.rp_filter``); if it is a slash, slashes separate and dots are literal
(``net/ipv4/conf/eth1.1204/rp_filter``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from netloom.agent.kernel.namespaces import inside
from netloom.errors import HostRefused

_ROOT = "/proc/sys/"


class SysctlError(HostRefused):
    """A sysctl could not be read or written. ``errno`` is the kernel's."""

    def __init__(self, message: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{message}: {os.strerror(errno)}", hint=hint)
        self.errno = errno


def read(namespace: str | None, names: Iterable[str]) -> dict[str, str | None]:
    """The values without the newline; None for a sysctl that does not exist, e.g. one of a link that is gone.

    Raises SysctlError, NamespaceError; ValueError for an invalid name.
    """
    paths = {name: path(name) for name in names}
    values: dict[str, str | None] = {}
    with inside(namespace):
        for name, file in paths.items():
            try:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    values[name] = os.read(fd, 65536).decode("ascii", "replace").removesuffix("\n")
                finally:
                    os.close(fd)
            except (FileNotFoundError, NotADirectoryError):
                values[name] = None
            except OSError as error:
                raise SysctlError(f"read sysctl {name}", error.errno or 0) from error
    return values


def write(namespace: str | None, values: Mapping[str, str]) -> None:
    """Write the values in order. After a failure the rest is not written.

    Raises SysctlError, NamespaceError; ValueError for an invalid name.
    """
    paths = {name: path(name) for name in values}
    with inside(namespace):
        for name, file in paths.items():
            try:
                fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, values[name].encode() + b"\n")
                finally:
                    os.close(fd)
            except FileNotFoundError as error:
                hint = "the link does not exist, or the kernel module with this sysctl is not loaded"
                raise SysctlError(f"set sysctl {name}", error.errno or 0, hint=hint) from error
            except OSError as error:
                raise SysctlError(f"set sysctl {name} to {values[name]}", error.errno or 0) from error


def path(name: str) -> str:
    """The file of a sysctl. ValueError for an empty name, or one that leads out of ``/proc/sys``."""
    separator = next((c for c in name if c in "./"), ".")
    parts = name.split(separator)
    if separator == ".":
        parts = [part.replace("/", ".") for part in parts]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name!r} is not the name of a sysctl")
    return _ROOT + "/".join(parts)
