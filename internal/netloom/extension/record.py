"""The record of one call: the facts for its log line and for the message when the call is aborted.

Also the conversion of an exception to exit status and message. Every call loads this module, so it imports only what
the interpreter has loaded already (tests/unit/test_entry.py lists it).
"""

from __future__ import annotations

from netloom.errors import NetloomError
from netloom.fastos import os

_NO_MEMORY = ("Cannot allocate memory", "failed to map segment")


class CallRecord:
    """The facts known of a call so far. ``doing`` completes the sentence "not done in time: still ...".

    ``note``: something that the call did not ask for, as a line of the log.
    """

    __slots__ = ("call_id", "command", "doing", "host", "note", "scope_id", "started", "traceback")

    def __init__(self, started: float) -> None:
        self.started = started  # on the monotonic clock, in seconds
        self.call_id = os.urandom(16).hex()
        self.command = "-"
        self.scope_id = "-"
        self.host = "-"
        self.doing = "starting"
        self.note = ""
        self.traceback = ""  # of an internal error; written to the log only


def failure(error: Exception, record: CallRecord) -> tuple[int, str]:
    """The exit status and the message for ``error``. If it is a bug, ``record`` gets its traceback."""
    if isinstance(error, NetloomError):
        return error.exit_code, str(error)
    import traceback  # loads linecache, tokenize and re, so only for an internal error

    record.traceback = "".join(traceback.format_exception(error))
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    if (scarce := _scarce(error)) is not None:
        return 3, f"the management server has too {scarce}: {type(error).__name__} at {place} while {record.doing}"
    return 3, f"internal error: {type(error).__name__} at {place} while {record.doing}; the log has more"


def _scarce(error: Exception) -> str | None:
    """What the error says that this machine has too few of; None if it does not say so."""
    import errno  # a C module, needed only for an internal error

    text = str(error)
    # An ImportError has only the words of the dynamic linker.
    if isinstance(error, MemoryError) or any(it in text for it in _NO_MEMORY):
        return "little memory for this call"
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return "few file descriptors for this call (raise LimitNOFILE of its service)"
    if getattr(error, "errno", None) == errno.EAGAIN or "can't start new thread" in text:
        return "few processes, or too little memory for a thread (raise TasksMax of its service, or kernel.pid_max)"
    return None
