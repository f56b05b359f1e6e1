"""The log of the management server: one line per call, in a file of bounded size."""

from __future__ import annotations

import time

from netloom.errors import NetloomError, one_line
from netloom.extension.directory import persistent
from netloom.fastos import os
from netloom.logfile import LogFile, timestamp  # a signal may end the call during any import, so import little here

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from netloom.extension.record import CallRecord

FILE = "netloom.log"


def line(record: CallRecord, status: int, error: str, *, now_s: float, took_ms: float) -> str:
    """One call in one line: time, call id, command, scope, host, status, milliseconds, the error, and the note."""
    fields = [timestamp(now_s), record.call_id, record.command, record.scope_id, record.host]
    fields += [f"status={status}", f"{took_ms:.0f}ms", *([error] if error else [])]
    fields += [f"note: {record.note}"] if record.note else []  # guard: the-log-has-what-else-is-wrong
    return one_line(" ".join(fields)) + "\n"


def write_down(record: CallRecord, status: int, error: str, environ: Mapping[str, str]) -> None:
    """Append the line of a call, and its traceback if it has one. A log that cannot be written fails no call."""
    try:
        text = line(record, status, error, now_s=time.time(), took_ms=(time.monotonic() - record.started) * 1000)
        for frame in record.traceback.splitlines():
            text += f"  {one_line(frame)}\n"
        _append(text, environ)
    except (OSError, NetloomError, ValueError):
        pass


def note(text: str, environ: Mapping[str, str]) -> None:
    """Append a line that belongs to no single call. A log that cannot be written fails nothing."""
    try:
        _append(f"{timestamp()} {one_line(text)}\n", environ)
    except (OSError, NetloomError):
        pass


def _append(text: str, environ: Mapping[str, str]) -> None:
    file = LogFile(os.path.join(persistent(environ), FILE), os.O_NOFOLLOW)
    try:
        file.append(text)
    finally:
        file.close()
