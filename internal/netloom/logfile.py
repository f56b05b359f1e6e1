"""A log file of bounded size: a full file is renamed to ``<path>.1``, which replaces the previous one.

Several processes may write to the same file. Every call of CloudStack's loads this module at its end, so it imports
only modules that a call has loaded already.
"""

from __future__ import annotations

import time

from netloom.fastos import os

BYTES_MAX = 4 << 20  # a file is full when it is larger than this


class LogFile:
    """The open log at ``path``, with mode 0600. ``flags``: further flags of open(2). Raises OSError."""

    def __init__(self, path: str, flags: int = 0) -> None:
        self._path = path
        self._flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | flags
        self._fd = self._open()

    def append(self, text: str) -> None:
        """Append ``text`` by one write(2), so that lines of several processes do not mix. Raises OSError."""
        if os.fstat(self._fd).st_size > BYTES_MAX:  # guard: the-log-is-bounded
            self._rotate()
        os.write(self._fd, text.encode())

    def close(self) -> None:
        os.close(self._fd)

    def _rotate(self) -> None:
        """Rename the full file and open a new one. If none can be opened, go on with the full file.

        The descriptor of the full file is closed last: another thread would get its number at once.
        """
        import fcntl  # a C module, needed once in some ten thousand lines

        full = self._fd
        try:
            fcntl.flock(full, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self._path).st_ino == os.fstat(full).st_ino:  # else another process has renamed it already
                os.rename(self._path, f"{self._path}.1")
        except BlockingIOError:  # another process is renaming it
            return
        except FileNotFoundError:  # renamed already, and there is no new file yet
            pass
        except OSError:
            fcntl.flock(full, fcntl.LOCK_UN)
            return
        try:
            self._fd = self._open()
        except OSError:
            fcntl.flock(full, fcntl.LOCK_UN)
            return
        os.close(full)

    def _open(self) -> int:
        return os.open(self._path, self._flags, 0o600)


def timestamp(now_s: float | None = None) -> str:
    """``now_s`` in seconds since 1970, or the present time, as ``2026-01-31T23:59:59Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
