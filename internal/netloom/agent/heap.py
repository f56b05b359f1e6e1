"""The memory that the C library keeps for later use (mallopt(3), malloc_trim(3)).

By default each worker thread has an arena, and keeps there what its largest ruleset once needed: after thirty networks
that was more than half of the agent's memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Awaitable, Callable

from netloom.agent.clock import Clock

TRIM_EVERY_S = 60.0

_M_ARENA_MAX = -8  # malloc.h

_libc = ctypes.CDLL(None)


def share_one_arena() -> None:
    """All threads that are started from now on allocate from the same arena."""
    _libc.mallopt(_M_ARENA_MAX, 1)  # guard: threads-share-their-memory


def trim() -> None:
    """Return unused pages to the host. Ten milliseconds for an agent with many networks."""
    _libc.malloc_trim(0)  # guard: unused-memory-is-returned


async def keep_trimmed(clock: Clock, work_done: Callable[[], int], trimmed: Callable[[], Awaitable[None]]) -> None:
    """Trim once in ``TRIM_EVERY_S``, if ``work_done`` has counted works since the last time."""
    done = 0
    while True:
        await clock.sleep(TRIM_EVERY_S)
        if work_done() != done:
            done = work_done()
            await trimmed()
