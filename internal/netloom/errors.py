"""Errors for people: one line, an exit status, and a remedy where one is known.

Every error that may leave the program derives from :class:`NetloomError`. The exit statuses are those of the Network
Extension Script Protocol: 1 usage or configuration, 2 SSH connection or login, 3 the host refused or failed the
operation. Every call loads this module, so it imports nothing.
"""

from __future__ import annotations


class NetloomError(Exception):
    """An error with an exit status and, where one is known, a remedy (``hint``).

    ``str(error)`` is always one line of printable ASCII: CloudStack decodes our output in its server's default
    character set, and an operator reads it in a log.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return one_line(f"{self.message} ({self.hint})" if self.hint else self.message)


class BadRequest(NetloomError):
    """The command line, the payload or the registration is wrong; nothing was changed."""

    exit_code = 1


class HostUnreachable(NetloomError):
    """A host, or its agent, did not answer in time."""

    exit_code = 2


class LoginRefused(HostUnreachable):
    """The host answered and refused the login, or its host key is not the known one."""


class HostRefused(NetloomError):
    """The host refused or failed the operation."""

    exit_code = 3  # guard: a-refusal-of-the-host-is-status-3


class ForeignScope(HostRefused):
    """The scope, or its namespace, belongs to another owner."""


def one_line(text: str, limit: int = 2000) -> str:
    """``text`` as one line of printable ASCII, cut to at most ``limit`` characters.

    Other characters become backslash escapes, so that a hostile value can neither start a new log line nor send
    control sequences to a terminal.
    """
    flat = " ".join(text.split())
    safe = flat.encode("ascii", "backslashreplace").decode("ascii")
    safe = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in safe)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def ascii_only(text: str) -> str:
    r"""``text`` in ASCII, because CloudStack decodes our output in its server's default character set.

    Other characters become ``\uXXXX``: inside JSON that is the same text.
    """
    return text if text.isascii() else "".join(it if it.isascii() else unicode_escape(it) for it in text)


def unicode_escape(character: str) -> str:
    r"""``character`` as in JSON: ``\uXXXX`` for each of its UTF-16 units."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
