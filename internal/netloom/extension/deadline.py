"""One deadline per call: CloudStack gave us so many seconds, and nobody invents their own."""

from __future__ import annotations

import time

from netloom.errors import BadRequest
from netloom.fastos import os

# More than any caller means; past it a number is a mistake, and a timer could not hold it.
TIMEOUT_S_MAX = 86_400

# A process that says it is older than this was something else first (a launcher that waited and then exec'ed us).
_AGE_S_MAX = 5.0


class Deadline:
    """When the answer has to be out, on the monotonic clock: a clock that is set does not move it."""

    __slots__ = ("ends", "margin_s", "timeout_s")

    def __init__(self, timeout_s: float, started: float) -> None:
        self.timeout_s = timeout_s
        self.margin_s = margin_s(timeout_s)
        self.ends = started + timeout_s - self.margin_s  # guard: a-call-ends-before-cloudstacks-limit

    def remaining_s(self) -> float:
        """Seconds that are left, never negative."""
        return max(0.0, self.ends - time.monotonic())

    def reach_s(self) -> float:
        """How long a host may leave a first packet unanswered: a third of what is left, but 5 s at least.

        Of CloudStack's 60 seconds that is 19, in which TCP asks five times; of 5, three times.
        """
        return max(5.0, self.remaining_s() / 3)

    def grace_s(self) -> float:
        """How long stragglers are waited for when somebody else has answered: 5 s, or a third of what is left."""
        return min(5.0, self.remaining_s() / 3)


def margin_s(timeout_s: float) -> float:
    """What is kept for ending in time: 1 s or 5 %, whichever is more, but at most half of ``timeout_s``."""
    return min(max(1.0, timeout_s * 0.05), timeout_s / 2)


def parse_timeout(text: str) -> int:
    """The seconds of CloudStack's third argument. Raises BadRequest for anything but a decimal number from 1 on."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= TIMEOUT_S_MAX:
        raise BadRequest(f"timeout {text[:40]!r} is not a number of seconds from 1 to {TIMEOUT_S_MAX}")
    return int(text)


def process_started() -> float:
    """When this process was started, on the monotonic clock; now, where that cannot be known.

    The interpreter's own start, and the unpacking of a compiled file, are part of the caller's time.
    Field 22 of /proc/self/stat (proc(5)) counts clock ticks since boot; the name in field 2 may hold spaces.
    """
    now = time.monotonic()
    try:
        with open("/proc/self/stat", "rb") as stat:
            ticks = int(stat.read().rpartition(b")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - age_s if 0 <= age_s <= _AGE_S_MAX else now
