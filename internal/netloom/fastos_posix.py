"""The subset of ``os`` that a call of CloudStack's needs, with the same names and meanings (see fastos.py)."""

from __future__ import annotations

import posix
from posix import *  # noqa: F403
from posix import _exit as _exit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

devnull = "/dev/null"


class _Environ(dict[str, str]):
    """The environment. Neither children nor ``os``, if it is loaded later, get a variable that was removed."""

    def __setitem__(self, key: str, value: str) -> None:
        posix.putenv(key, value)
        posix.environ[key.encode("utf-8", "surrogateescape")] = value.encode("utf-8", "surrogateescape")
        super().__setitem__(key, value)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            posix.unsetenv(key)
            posix.environ.pop(key.encode("utf-8", "surrogateescape"), None)
        return super().pop(key, *default)


environ = _Environ(  # type: ignore[assignment]
    (key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
    for key, value in posix.environ.items()
)


class path:  # noqa: N801  # named as in os
    """The subset of ``os.path``. It works on the text of paths and follows no symbolic links."""

    @staticmethod
    def join(first: str, *others: str) -> str:
        """The paths joined by slashes. An absolute path discards those before it."""
        joined = first
        for other in others:
            joined = (
                other
                if other.startswith("/")
                else f"{joined}{'' if joined.endswith('/') or not joined else '/'}{other}"
            )
        return joined

    @staticmethod
    def dirname(name: str) -> str:
        """The part before the last slash."""
        head = name[: name.rfind("/") + 1]
        return head.rstrip("/") or head

    @staticmethod
    def basename(name: str) -> str:
        """The part after the last slash."""
        return name[name.rfind("/") + 1 :]

    @staticmethod
    def abspath(name: str) -> str:
        """The absolute path, without ``.``, ``..`` and double slashes."""
        parts: list[str] = []
        for part in (name if name.startswith("/") else f"{posix.getcwd()}/{name}").split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return f"/{'/'.join(parts)}"


def makedirs(name: str, mode: int = 0o777, exist_ok: bool = False) -> None:
    """Create a directory, and those above it where they are missing. Raises OSError."""
    above = path.dirname(name)
    if above and above != name:
        try:
            posix.stat(above)
        except FileNotFoundError:
            makedirs(above, 0o777, True)
    try:
        posix.mkdir(name, mode)
    except FileExistsError:
        if not exist_ok:
            raise


def __getattr__(name: str) -> Any:
    import os  # loads the real module: for attributes that not every call needs

    return getattr(os, name)
