"""The deadline of a call: CloudStack's timeout, less a margin. All waiting in a call is derived from it."""

from __future__ import annotations

import time

from netloom.errors import BadRequest
from netloom.fastos import os

# One day. A larger timeout is a mistake of the caller, and a timer could not represent every number.
TIMEOUT_S_MAX = 86_400

# An older process was a launcher first, which waited and then executed us; its age is not the age of this call.
_AGE_S_MAX = 5.0


class Deadline:
    """The time by which the answer must be written (``ends``), on the monotonic clock, in seconds."""

    __slots__ = ("ends", "margin_s", "timeout_s")

    def __init__(self, timeout_s: float, started: float) -> None:
        self.timeout_s = timeout_s
        self.margin_s = margin_s(timeout_s)
        self.ends = started + timeout_s - self.margin_s  # guard: a-call-ends-before-cloudstacks-limit

    def remaining_s(self) -> float:
        """The remaining seconds, never negative."""
        return max(0.0, self.ends - time.monotonic())

    def reach_s(self) -> float:
        """How long to wait for the first packet from a host: a third of the remaining time, but at least 5 s.

        Of CloudStack's 60 seconds that is 19, in which TCP sends five SYNs; 5 s allow three.
        """
        return max(5.0, self.remaining_s() / 3)

    def grace_s(self) -> float:
        """How long to wait for slow hosts once another one has answered: 5 s, or a third of the remaining time."""
        return min(5.0, self.remaining_s() / 3)


def margin_s(timeout_s: float) -> float:
    """The time reserved for exiting: 1 s or 5 %, whichever is more, but at most half of ``timeout_s``."""
    return min(max(1.0, timeout_s * 0.05), timeout_s / 2)


def parse_timeout(text: str) -> int:
    """Parses CloudStack's third argument, in seconds. Raises BadRequest unless it is a decimal number from 1 on."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= TIMEOUT_S_MAX:
        raise BadRequest(f"timeout {text[:40]!r} is not a number of seconds from 1 to {TIMEOUT_S_MAX}")
    return int(text)


def process_started() -> float:
    """The start of this process on the monotonic clock, in seconds; the present time when it cannot be determined.

    Starting the interpreter and unpacking the one file count towards the caller's timeout.
    Field 22 of /proc/self/stat (proc(5)) counts clock ticks since boot; the name in field 2 may contain spaces.
    """
    now = time.monotonic()
    try:
        with open("/proc/self/stat", "rb") as stat:
            ticks = int(stat.read().rpartition(b")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - age_s if 0 <= age_s <= _AGE_S_MAX else now
