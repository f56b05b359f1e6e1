"""Signals to processes that may already have ended."""

from __future__ import annotations

import contextlib
import os
import signal


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal. It is no error if the process has ended since its pid was looked up."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
