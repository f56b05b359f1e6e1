"""The management side's log: one line per call, in a file of our own that never grows past a bound."""

from __future__ import annotations

import time

from netloom.errors import NetloomError, one_line
from netloom.extension.directory import persistent
from netloom.fastos import os  # and nothing that a call has not loaded: it may be ended amid any import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from netloom.extension.call import Story

FILE = "netloom.log"
_BYTES_MAX = 4 << 20
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


def line(story: Story, status: int, error: str, *, now_s: float, took_ms: float) -> str:
    """One call in one line: when, call id, command, scope, host, status, milliseconds, and the error."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    words = [when, story.call_id, story.command, story.scope_id, story.host, f"status={status}", f"{took_ms:.0f}ms"]
    return one_line(" ".join([*words, *([error] if error else [])])) + "\n"


def write_down(story: Story, status: int, error: str, environ: Mapping[str, str]) -> None:
    """Append the call's line, and its traceback if it has one; a log that cannot be written fails no call."""
    try:
        _record(story, status, error, environ)
    except (OSError, NetloomError, ValueError):
        pass


def note(what: str, environ: Mapping[str, str]) -> None:
    """Append a line about what no single call does; a log that cannot be written fails nothing."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        _append(f"{when} {one_line(what)}\n", environ)
    except (OSError, NetloomError):
        pass


def _record(story: Story, status: int, error: str, environ: Mapping[str, str]) -> None:
    text = line(story, status, error, now_s=time.time(), took_ms=(time.monotonic() - story.started) * 1000)
    for trouble in story.trouble.splitlines():
        text += f"  {one_line(trouble)}\n"
    _append(text, environ)


def _append(text: str, environ: Mapping[str, str]) -> None:
    path = os.path.join(persistent(environ), FILE)
    fd = os.open(path, _FLAGS, 0o600)
    try:
        os.write(fd, text.encode("ascii"))  # one write: lines of calls at the same time do not mix
        if os.fstat(fd).st_size > _BYTES_MAX:
            _rotate(path)
    finally:
        os.close(fd)


def _rotate(path: str) -> None:
    import fcntl  # a C module, wanted once in some ten thousand calls

    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_size > _BYTES_MAX:  # nobody did it in between
            os.rename(path, path + ".1")
    except BlockingIOError:
        pass  # somebody does it just now
    finally:
        os.close(lock)
