"""The management side's log: one line per call, in a file of our own that never grows past a bound."""

from __future__ import annotations

import fcntl
import os
import time

from netloom.errors import one_line
from netloom.extension.directory import persistent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from netloom.extension.call import Story

FILE = "netloom.log"
_BYTES_MAX = 4 << 20
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


def line(story: Story, status: int, error: str, *, now_s: float, took_ms: float) -> str:
    """One call in one line: when, call id, command, scope, host, status, milliseconds, and the error."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    words = [when, story.call_id, story.command, story.scope_id, story.host, f"status={status}", f"{took_ms:.0f}ms"]
    return one_line(" ".join([*words, *([error] if error else [])])) + "\n"


def record(story: Story, status: int, error: str) -> None:
    """Append the call's line, and its traceback if it has one. Raises OSError or NoDirectory."""
    text = line(story, status, error, now_s=time.time(), took_ms=(time.monotonic() - story.started) * 1000)
    for trouble in story.trouble.splitlines():
        text += f"  {one_line(trouble)}\n"
    path = os.path.join(persistent(), FILE)
    fd = os.open(path, _FLAGS, 0o600)
    try:
        os.write(fd, text.encode("ascii"))  # one write: lines of calls at the same time do not mix
        if os.fstat(fd).st_size > _BYTES_MAX:
            _rotate(path)
    finally:
        os.close(fd)


def _rotate(path: str) -> None:
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_size > _BYTES_MAX:  # nobody did it in between
            os.rename(path, path + ".1")
    except BlockingIOError:
        pass  # somebody does it just now
    finally:
        os.close(lock)
