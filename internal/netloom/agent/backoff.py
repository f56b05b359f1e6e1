"""The delay before another attempt, which grows with the number of failures in a row."""

from __future__ import annotations

import math
from typing import NamedTuple


class Backoff(NamedTuple):
    """Delays in seconds, of which the last is the maximum. The caller counts the failures.

    ``settled_s``: a process that ran longer than this before it failed has no earlier failures.
    """

    delays_s: tuple[float, ...]
    settled_s: float = math.inf

    @classmethod
    def doubling(cls, first_s: float, max_s: float) -> Backoff:
        """``first_s``, twice that, and so on, up to ``max_s``."""
        doublings = math.ceil(math.log2(max_s / first_s))
        return cls((*(first_s * 2.0**n for n in range(doublings)), max_s))

    def delay_s(self, failures: int) -> float:
        """The delay after ``failures`` earlier failures; 0: this is the first one."""
        return self.delays_s[min(failures, len(self.delays_s) - 1)]

    def earlier(self, failures: int, ran_s: float) -> int:
        """``failures``, or 0 when the process ran for longer than ``settled_s`` before it failed now."""
        return 0 if ran_s > self.settled_s else failures
