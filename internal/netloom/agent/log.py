"""The agent's log: one line per call, ids and counts, never a payload. Of bounded size."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback

from netloom.errors import one_line

BYTES_MAX = 4 << 20  # of the file; one older file of the same size is kept beside it


class Log:
    """Writes lines to ``path`` with the time in UTC, or to stderr, where a supervisor adds its own. Thread-safe."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fd = 2
        if path:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            self._open()

    def line(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) if self._path else ""
        self._write(f"{stamp}{one_line(text)}\n")

    def traceback(self, where: str, error: BaseException) -> None:
        """A bug with its traceback: where it was, and the names of its variables, not what they held."""
        self.line(f"{where} bug: {type(error).__name__}")
        for frame in traceback.extract_tb(error.__traceback__):
            self.line(f"{where}   {frame.filename}:{frame.lineno} in {frame.name}")

    def _write(self, text: str) -> None:
        # A full disk must not stop the data plane: a line that cannot be written is lost.
        with self._lock, contextlib.suppress(OSError):
            if self._path and os.fstat(self._fd).st_size > BYTES_MAX:  # guard: the-log-is-bounded
                with contextlib.suppress(OSError):
                    self._begin_anew()
            os.write(self._fd, text.encode())

    def _begin_anew(self) -> None:
        """A new file in the place of the full one. Where none can be had the old one is written on, under its new name:
        its descriptor is given back last, for the number would be somebody else's."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, f"{self._path}.1")
        full = self._fd
        self._open()
        os.close(full)

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def complain(text: str) -> None:
    """One line on stderr, for the one who started us by hand."""
    sys.stderr.write(f"netloom agent: {one_line(text)}\n")
