"""Which of the points a run of the tests tries: all of them, or the fixed sample of ``make test``."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

from crash.effects import Effect

# Set by `make test-long` (build/ci/groups.py).
EVERY = os.environ.get("NETLOOM_CRASH_POINTS") == "all"
SAMPLE = 8  # of a call of the management server


def chosen(effects: Sequence[Effect]) -> list[int]:
    """The numbers of effects after which to kill: all, or one of each kind and every n-th."""
    if EVERY:
        return list(range(len(effects) + 1))
    first = {effect.kind: number for number, effect in reversed(list(enumerate(effects)))}
    return sorted({*first.values(), *range(0, len(effects) + 1, max(1, len(effects) // SAMPLE))})


def point(name: str, count: int) -> int:
    """The point of one step that the sample tries. It depends on the name, so new steps change nothing for others."""
    return zlib.crc32(name.encode()) % (count + 1)
