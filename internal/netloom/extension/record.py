"""The record of one call: the facts for its log line and for the message when the call is aborted.

Also the two conversions of a result: an exception to exit status and message, and output to ASCII. Every call loads
this module, so it imports only what the interpreter has loaded already (tests/unit/test_entry.py lists it).
"""

from __future__ import annotations

from netloom.errors import NetloomError
from netloom.fastos import os


class CallRecord:
    """The facts known of a call so far. ``doing`` completes the sentence "not done in time: still ..."."""

    __slots__ = ("call_id", "command", "doing", "host", "scope_id", "started", "traceback")

    def __init__(self, started: float) -> None:
        self.started = started  # on the monotonic clock, in seconds
        self.call_id = os.urandom(16).hex()
        self.command = "-"
        self.scope_id = "-"
        self.host = "-"
        self.doing = "starting"
        self.traceback = ""  # of an internal error; written to the log only


def failure(error: Exception, record: CallRecord) -> tuple[int, str]:
    """The exit status and the message for ``error``. If it is a bug, ``record`` gets its traceback."""
    if isinstance(error, NetloomError):
        return error.exit_code, str(error)
    import traceback  # loads linecache, tokenize and re, so only for an internal error

    record.traceback = "".join(traceback.format_exception(error))
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return 3, f"internal error: {type(error).__name__} at {place} while {record.doing}; the log has more"


def ascii_only(text: str) -> str:
    r"""``text`` in ASCII, because CloudStack decodes our output in its server's default character set.

    Other characters become ``\uXXXX``, one escape per UTF-16 unit: inside JSON that is the same text.
    """
    if text.isascii():
        return text
    units = (text[i].encode("utf-16-be", "surrogatepass") for i in range(len(text)))
    return "".join(
        chr(unit[1]) if len(unit) == 2 and unit[0] == 0 and unit[1] < 0x80 else _escaped(unit) for unit in units
    )


def _escaped(units: bytes) -> str:
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
