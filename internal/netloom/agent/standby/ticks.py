"""When this host has its ticks: ten a second, and soon at the same time as the other hosts of its groups.

Most of what a heartbeat costs is that a thread wakes up for it. Hosts that send at the same moment are heard at the
same moment, so a host wakes up twice for each tick, however many groups and paths it has.

Each tick may be a little earlier than it was due, when another host has just been heard. So the ticks of all hosts come
together after some seconds, right after those of the host whose clock is ahead. Nothing depends on it.
"""

from __future__ import annotations

TICK_S = 0.1
PULL_S = 0.002  # so much earlier at most, once in a tick: whoever repeats messages makes us 2 % faster


class Ticks:
    """``due``: when the next tick is due. Times in seconds."""

    def __init__(self, now: float) -> None:
        self.due = now
        self._is_pulled = False

    def heard(self, now: float) -> None:
        """Another host has sent something, probably because it has a tick."""
        if not self._is_pulled and now < self.due < now + TICK_S / 2:  # guard: ticks-stay-ten-a-second
            self._is_pulled = True
            self.due = max(now, self.due - PULL_S)

    def begin(self, now: float) -> bool:
        """Whether a tick is due; it counts as done then. Of those that were missed, one is made up for."""
        if now < self.due:
            return False
        self.due = max(self.due + TICK_S, now)
        self._is_pulled = False
        return True
