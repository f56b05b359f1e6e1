"""Signals to processes that may have ended by themselves."""

from __future__ import annotations

import contextlib
import os
import signal


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal. That the process has already ended is no error: between a list and a signal any of them can."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
