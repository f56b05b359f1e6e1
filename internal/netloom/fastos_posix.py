"""As much of ``os`` as a call of CloudStack's needs (``netloom.fastos``), with the same names and meanings."""

from __future__ import annotations

import posix
from posix import *  # noqa: F403
from posix import _exit as _exit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

devnull = "/dev/null"


class _Environ(dict[str, str]):
    """The environment. What is taken out reaches no child, nor the whole module when it is loaded later."""

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


class path:  # noqa: N801  # the name that it stands for
    """``os.path``, of paths as they are: nothing here follows a link."""

    @staticmethod
    def join(first: str, *others: str) -> str:
        """The paths one after the other; an absolute one begins anew."""
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
        """What stands before the last slash."""
        head = name[: name.rfind("/") + 1]
        return head.rstrip("/") or head

    @staticmethod
    def basename(name: str) -> str:
        """What stands after the last slash."""
        return name[name.rfind("/") + 1 :]

    @staticmethod
    def abspath(name: str) -> str:
        """The path from the root, without ``.``, ``..`` and doubled slashes."""
        parts: list[str] = []
        for part in (name if name.startswith("/") else f"{posix.getcwd()}/{name}").split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return f"/{'/'.join(parts)}"


def makedirs(name: str, mode: int = 0o777, exist_ok: bool = False) -> None:
    """The directory and those above it. Raises OSError."""
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
    import os  # the whole module: for what is no part of every call

    return getattr(os, name)
