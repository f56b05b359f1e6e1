"""The agent's log: one line per call, with ids and counts but no payload, in a file of bounded size."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback

from netloom.errors import one_line
from netloom.logfile import LogFile, timestamp


class Log:
    """Writes lines to ``path``, with the time in UTC, or without a path to stderr: systemd adds the time. Thread-safe.

    The constructor raises OSError.
    """

    def __init__(self, path: str = "") -> None:
        self._lock = threading.Lock()
        self._file: LogFile | None = None
        if path:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            self._file = LogFile(path)

    def line(self, text: str) -> None:
        stamp = f"{timestamp()} " if self._file is not None else ""
        self._write(f"{stamp}{one_line(text)}\n")

    def traceback(self, where: str, error: BaseException) -> None:
        """Log a bug with its traceback: files, lines and functions, but no values, because they may be secret."""
        self.line(f"{where} bug: {type(error).__name__}")
        for frame in traceback.extract_tb(error.__traceback__):
            self.line(f"{where}   {frame.filename}:{frame.lineno} in {frame.name}")

    def _write(self, text: str) -> None:
        # A full disk must not stop the agent: a line that cannot be written is lost.
        with self._lock, contextlib.suppress(OSError):
            if self._file is None:
                os.write(2, text.encode())
            else:
                self._file.append(text)


def complain(text: str) -> None:
    """Write one line to stderr: the terminal of an operator, the journal, or the log file of a detached agent."""
    sys.stderr.write(f"netloom agent: {one_line(text)}\n")
