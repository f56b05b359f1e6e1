"""Failures a person will read: one line, an exit status, a remedy.

Every error that may leave the program derives from :class:`NetloomError`. The exit statuses are those of the
Network Extension Script Protocol: 1 usage or configuration, 2 SSH connection or login, 3 the host refused or
failed the operation.
"""

from __future__ import annotations


class NetloomError(Exception):
    """A failure with an exit status and, where one is known, a remedy.

    ``str(error)`` is always one line of printable ASCII: CloudStack decodes our output in the
    server's default character set, and an operator reads it in a log.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return one_line(f"{self.message} ({self.hint})" if self.hint else self.message)


class BadRequest(NetloomError):
    """The command line, the payload or the registration is wrong; nothing was touched."""

    exit_code = 1


class HostUnreachable(NetloomError):
    """No answer from a host, or from its agent, in the time that was left."""

    exit_code = 2


class LoginRefused(HostUnreachable):
    """The host answered and did not let us in, or its key is not the one we know."""


class HostRefused(NetloomError):
    """The host answered and refused, or failed, the operation."""

    exit_code = 3  # guard: a-refusal-of-the-host-is-status-3


class ForeignScope(HostRefused):
    """The scope, or its namespace, belongs to somebody else."""


def one_line(text: str, limit: int = 2000) -> str:
    """``text`` as one line of printable ASCII of at most ``limit`` characters.

    Everything else is written as a backslash escape, so that a hostile value can neither start a new
    log line nor colour a terminal.
    """
    flat = " ".join(text.split())
    safe = flat.encode("ascii", "backslashreplace").decode("ascii")
    safe = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in safe)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
