"""When this host has its ticks: ten a second, and soon at the same time as the other hosts of its groups.

Most of what a heartbeat costs is that a thread wakes up for it. Hosts that send at the same moment are heard at the
same moment, so a host wakes up twice for each tick, however many groups and paths it has.

Each tick may be a little earlier than it was due, when another host has just been heard. So the ticks of all hosts come
together after some seconds, right after those of the host whose clock is ahead (R. Mirollo and S. Strogatz,
"Synchronization of pulse-coupled biological oscillators", 1990). Nothing depends on it.
"""

from __future__ import annotations

TICK_S = 0.1
PULL_S = 0.002  # so much earlier at most, in each tick: whoever repeats messages makes us 2 % faster


class Ticks:
    """``due``: when the next tick is due. Times in seconds."""

    def __init__(self, now: float) -> None:
        self.due = now
        self._pull_left_s = PULL_S

    def heard(self, now: float) -> None:
        """Another host has sent something, probably because it has a tick."""
        early_s = self.due - now
        if 0 < early_s < TICK_S / 2:
            # Less for one that is far away: else three hosts could run after each other for ever.
            pull_s = PULL_S * (1 - early_s / (TICK_S / 2))
            pull_s = min(pull_s, early_s, self._pull_left_s)  # guard: ticks-stay-ten-a-second
            self.due -= pull_s
            self._pull_left_s -= pull_s

    def begin(self, now: float) -> bool:
        """Whether a tick is due; it counts as done then. Of those that were missed, one is made up for."""
        if now < self.due:
            return False
        self.due = max(self.due + TICK_S, now)
        self._pull_left_s = PULL_S
        return True
