"""Does this host's link to a segment work? The two hosts that can serve find that out together, without a kernel here.

Heartbeats travel on some segments, beside UDP. While both hosts hear each other on them, all is fine. A segment is
*silent* when heartbeats do not arrive there in both directions although the other host is heard over UDP. One of the
two links may be dead then, and the silence does not tell which one. So both hosts ask neighbours there
(``agent/scopes/wire_questions.py``), and tell each other whether somebody has answered.

A link is *dead* when nobody answers this host and somebody answers the other one. If nobody answers either of them, the
segment may just be empty, and nothing follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from netloom.heartbeatwire import WireSays

SILENT_S = 0.35  # at ten heartbeats a second
TOLD_S = 0.5  # how long what the other host has said holds
ANSWER_S = 1.5  # how long an answer holds; while a segment is silent, it is renewed twice a second

_NEVER = -math.inf


class Wires:
    """The segments of one group, as one of the hosts that can serve sees them. For one thread; times in seconds.

    ``silent`` and ``dead`` (see above) and ``says`` are as of the last ``look``.
    """

    def __init__(self) -> None:
        self.silent: frozenset[int] = frozenset()
        self.dead: frozenset[int] = frozenset()
        self._since: dict[int, float] = {}  # when the other host was heard last; or when both had begun to listen
        self._over_udp = _NEVER  # when it was heard last
        self._told: dict[int, WireSays] = {}
        self._told_at = _NEVER
        self._answers: dict[int, tuple[bool, float]] = {}
        self._says: tuple[WireSays, ...] = ()

    def follow(self, segments: Iterable[int], now: float) -> None:
        """Heartbeats travel on these segments."""
        wanted = set(segments)
        self._since = {it: self._since.get(it, now) for it in sorted(wanted)}
        self._answers = {it: answer for it, answer in self._answers.items() if it in wanted}

    def heard(self, segment: int | None, now: float) -> None:
        """A heartbeat of the other host has come on this segment, or over UDP (None)."""
        if segment is None:
            self._over_udp = now
        elif segment in self._since:
            self._since[segment] = now

    def told(self, wires: Iterable[WireSays], now: float) -> bool:
        """What the other host says of its segments; whether that is news."""
        told = {it.segment: it for it in wires}
        for segment in told.keys() - self._told.keys():
            if segment in self._since:
                self._since[segment] = now
        is_news = told != self._told
        self._told, self._told_at = told, now
        return is_news

    def suspect(self, segment: int) -> None:
        """As if the other host had not been heard on this segment for long."""
        if segment in self._since:
            self._since[segment] = _NEVER

    def answered(self, segment: int, answer: bool | None, now: float) -> None:
        """Whether neighbours on the segment have answered; None: there is nobody to ask."""
        if answer is None:
            self._answers.pop(segment, None)
        elif segment in self._since:
            self._answers[segment] = answer, now

    def says(self) -> tuple[WireSays, ...]:
        """What the other host is told."""
        return self._says

    @property
    def is_dead_there(self) -> bool:
        """Whether the link of the other host is dead."""
        yes = {it for it, (answer, _) in self._answers.items() if answer}
        return any(it.answered is False and it.segment in yes for it in self._told.values())

    def look(self, now: float) -> bool:
        """Look what follows; whether there is news for the other host."""
        before = self._says
        is_there = now - self._over_udp < TOLD_S and now - self._told_at < TOLD_S
        told = self._told if is_there else {}  # guard: a-host-that-is-silent-everywhere-is-not-asked-about
        both = self._since.keys() & told.keys()
        deaf = {it for it in both if self._over_udp - self._since[it] > SILENT_S}
        self.silent = frozenset(it for it in both if it in deaf or not told[it].heard)
        self._answers = {
            it: (answer, at)
            for it, (answer, at) in self._answers.items()
            if it in self.silent and now - at < ANSWER_S  # guard: an-answer-holds-for-a-moment
        }
        mine = {it: answer for it, (answer, _) in self._answers.items()}
        self._says = tuple(WireSays(it, it not in deaf, mine.get(it)) for it in self._since)
        self.dead = frozenset(
            it
            for it in self.silent
            if mine.get(it) is False and told[it].answered is True  # guard: an-empty-vlan-is-not-dead
        )
        return before != self._says
