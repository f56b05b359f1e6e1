"""Which of the points a run of the tests tries: all of them, or the fixed sample of ``make test``."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

from crash.effects import Effect

# Set by `make test-long` (build/ci/groups.py).
EVERY = os.environ.get("NETLOOM_CRASH_POINTS") == "all"


def chosen(effects: Sequence[Effect], sample: int = 4) -> list[int]:
    """After how many effects of one piece of work to kill: after each number of them, or evenly spread ones."""
    every = max(1, len(effects) // sample)
    return list(range(0, len(effects) + 1, 1 if EVERY else every))


def one_of_each(steps: Sequence[tuple[str, Sequence[Effect]]]) -> dict[int, int]:
    """One number of effects for every fourth step of a sequence, so that a kill comes before each kind of effect.

    For a kind it is the first step that has it; for the other steps it depends on the name alone, so that a new step
    changes nothing for others.
    """
    numbers: dict[int, int] = {}
    for kind in sorted({it.kind for _, effects in steps for it in effects}):
        for step, (_, effects) in enumerate(steps):
            before = [number for number, it in enumerate(effects) if it.kind == kind]
            if before and step not in numbers:
                numbers[step] = before[0]
                break
    for step, (name, effects) in enumerate(steps):
        if step % 4 == 0:
            numbers.setdefault(step, zlib.crc32(name.encode()) % (len(effects) + 1))
    return numbers
