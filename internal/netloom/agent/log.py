"""The agent's log: one line per call, with ids and counts but no payload, in a file of bounded size and the journal."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback

from netloom.errors import one_line
from netloom.logfile import LogFile, timestamp

# Priorities of syslog(3), which the journal reads from "<6>" at the beginning of a line (sd-daemon(3)).
_ERROR, _INFO = 3, 6


class Log:
    """Writes lines to ``path``, with the time in UTC, or without a path to stderr. Thread-safe.

    If systemd has connected stderr to the journal, all lines go there, too. The constructor raises OSError.
    """

    def __init__(self, path: str = "") -> None:
        self._lock = threading.Lock()
        self._file: LogFile | None = None
        self._is_stderr = False  # as for an agent that was started without systemd (agent/connect.py)
        if path:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            self._file = LogFile(path)
            with contextlib.suppress(OSError):
                self._is_stderr = os.path.samestat(os.stat(path), os.fstat(2))
        self._journal = _journal()

    def line(self, text: str, priority: int = _INFO) -> None:
        line = one_line(text)
        with self._lock:
            if self._journal is not None:
                # Do not wait: a journal that hangs must not stop the agent.
                with contextlib.suppress(OSError):
                    flags = socket.MSG_DONTWAIT  # guard: a-hung-journal-does-not-stop-the-agent
                    self._journal.send(f"<{priority}>{line}\n".encode(), flags)
            # A full disk must not stop it either: a line that cannot be written is lost.
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._file.append(f"{timestamp()} {line}\n")
                elif self._journal is None:
                    os.write(2, f"{line}\n".encode())

    def traceback(self, where: str, error: BaseException) -> None:
        """Log a bug with its traceback: files, lines and functions, but no values, because they may be secret."""
        self.line(f"{where} bug: {type(error).__name__}", _ERROR)
        for frame in traceback.extract_tb(error.__traceback__):
            self.line(f"{where}   {frame.filename}:{frame.lineno} in {frame.name}", _ERROR)

    def fatal(self, what: str, error: Exception) -> None:
        """Log why the agent ends. The line goes to stderr, too, but once: the log may be our stderr already."""
        if self._file is not None or self._journal is not None:
            self.line(f"{what}: {error}", _ERROR)
        if self._journal is None and not self._is_stderr:
            complain(str(error))


def _journal() -> socket.socket | None:
    """The stream to the journal, if it is our stderr: systemd names it in JOURNAL_STREAM (systemd.exec(5))."""
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            return socket.socket(fileno=os.dup(2))
    return None


def complain(text: str) -> None:
    """Write one line to stderr: the terminal of an operator, the journal, or the log file of a detached agent."""
    sys.stderr.write(f"netloom agent: {one_line(text)}\n")
