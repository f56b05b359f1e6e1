"""Time for the agent: a clock and its timers. The tests have a clock that they advance by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Timer(Protocol):
    """A scheduled callback."""

    def when(self) -> float:
        """The time at which the callback runs, as ``Clock.time`` counts it."""

    def cancel(self) -> None:
        """Do not run the callback. No effect if it has run."""


class Clock(Protocol):
    """Seconds since some moment, and timers. For the event loop alone."""

    def time(self) -> float:
        """The monotonic time in seconds."""

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Run ``callback`` on the event loop after ``delay_s`` seconds."""

    async def sleep(self, delay_s: float) -> None:
        """Return after ``delay_s`` seconds."""

    def timeout(self, delay_s: float | None) -> AbstractAsyncContextManager[object]:
        """A context that raises TimeoutError after ``delay_s`` seconds; None: never."""


class LoopClock:
    """The clock of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return self._loop.time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._loop.call_later(delay_s, callback)

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    def timeout(self, delay_s: float | None) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(delay_s)
