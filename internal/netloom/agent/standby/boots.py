"""Which heartbeats of another member are accepted: no repetition, and none of an earlier start of its agent.

A *boot* is one start of the agent of a member. Within a boot each message has a higher number than the one before. Each
message travels on several paths, so most of those that are not accepted are ordinary duplicates.

Whoever has recorded messages can send them again. A member that has just started knows no numbers, so it accepts a boot
only when it is *proved*: a message of it repeats a recent clock of this boot of ours. Only a member that has heard us
since our own start can do that. Until then our messages greet it: they repeat its clock, so that it can do the same.
"""

from __future__ import annotations

import math
from typing import Literal

from netloom.heartbeatwire import Beat, Echo

ECHO_NS_MAX = 5_000_000_000  # how old our clock may be that a message repeats
_OLD_NS = 2 * ECHO_NS_MAX  # later no message of an old boot repeats a recent clock of ours
_GREETED_NS = 1_000_000_000
_UNPROVED_MAX = 64
_RECENT = 4

Verdict = Literal["accepted", "greeted", "dropped"]


class Boots:
    """The boots of another member, as this one knows them.

    ``heard``: what of its messages was accepted and used last; for the answers. ``heard_at``: when, in seconds.
    """

    def __init__(self) -> None:
        self.heard: Echo | None = None
        self.heard_at = -math.inf
        self._boot = b""
        self._seq = 0
        self._echoed = -1  # the newest clock of ours in an accepted message
        self._old: dict[bytes, int] = {}  # until when
        self._unproved: dict[bytes, tuple[int, int, int]] = {}  # seq, sent, and when it came
        self._greetings = 0

    def judge(self, beat: Beat, me: int, boot: bytes, now_ns: int) -> Verdict:
        """What to do with a message of the member. ``me``: our own number. ``boot``: our own boot.

        "greeted": the message is of a boot that is not proved; that is the first one of it.
        """
        echoed = max((it.sent for it in (beat.heard[me], beat.greeting[me]) if it and it.boot == boot), default=-1)
        if beat.boot != self._boot:
            if self._old.get(beat.boot, now_ns) > now_ns:  # guard: an-old-boot-never-comes-back
                return "dropped"
            is_recent = now_ns - ECHO_NS_MAX <= echoed <= now_ns
            # A later boot has heard later messages of ours.
            if not (is_recent and echoed > self._echoed):  # guard: a-boot-has-to-be-proved
                return self._greet(beat, now_ns)
            self._begin(beat.boot, now_ns)
        if beat.seq <= self._seq:  # guard: a-heartbeat-is-accepted-once
            return "dropped"
        self._seq, self._echoed = beat.seq, max(self._echoed, echoed)
        return "accepted"

    def used(self, beat: Beat, now: float) -> None:
        """An accepted message had its effect: the next answers may confirm it."""
        self.heard, self.heard_at = Echo(beat.boot, beat.sent), now

    def is_recent(self, beat: Beat) -> bool:
        """Whether the message is one of the last ones that were accepted: it may have come on another path again."""
        return beat.boot == self._boot and beat.seq > self._seq - _RECENT  # guard: an-old-heartbeat-proves-no-path

    def greeting(self, now_ns: int) -> Echo | None:
        """A message whose boot is not proved, for the next message of ours: each of them in turn."""
        recent = [it for it, (_, _, at) in self._unproved.items() if now_ns - at < _GREETED_NS]
        if not recent:
            return None
        self._greetings += 1
        boot = recent[self._greetings % len(recent)]
        return Echo(boot, self._unproved[boot][1])

    def _greet(self, beat: Beat, now_ns: int) -> Verdict:
        seq, _, _ = self._unproved.get(beat.boot, (0, 0, 0))
        if beat.seq <= seq:
            return "dropped"
        self._unproved[beat.boot] = beat.seq, beat.sent, now_ns
        if len(self._unproved) > _UNPROVED_MAX:
            del self._unproved[min(self._unproved, key=lambda it: self._unproved[it][2])]
        return "greeted" if seq == 0 else "dropped"

    def _begin(self, boot: bytes, now_ns: int) -> None:
        self._old = {it: until for it, until in self._old.items() if until > now_ns}
        if self._boot:
            self._old[self._boot] = now_ns + _OLD_NS
        self._unproved.pop(boot, None)
        self._boot, self._seq, self.heard = boot, 0, None
