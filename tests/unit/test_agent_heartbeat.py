"""The heartbeat for systemd's watchdog: it proves that calls are answered. Time is simulated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from fakehost import FakeClock, FakeLog
from netloom.agent.heartbeat import ANSWER_S_MAX, EVERY_S, STUCK_S_MAX, Heartbeat, interval_s


class Watched:
    """An agent whose socket and workers a test can stop. ``sent``: the beats, each with its time."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.log = FakeLog()
        self.sent: list[tuple[float, str]] = []
        self.aborted: list[float] = []
        self.answers = self.working = True
        self.done = 0
        self.heartbeat = Heartbeat(
            self.clock,
            self.log,
            self._greeted,
            self._work,
            lambda: self.done,
            lambda: "50 networks",
            lambda text: self.sent.append((self.clock.time(), text)),
            lambda: self.aborted.append(self.clock.time()),
        )

    async def _greeted(self) -> None:
        while not self.answers:
            await self.clock.sleep(1.0)

    async def _work(self) -> None:
        while not self.working:
            await self.clock.sleep(1.0)

    def beats(self, since: float) -> int:
        return sum(at > since for at, _ in self.sent)


def run(test: Coroutine[Any, Any, None], watched: Watched) -> None:
    async def both() -> None:
        beating = asyncio.ensure_future(watched.heartbeat.run())
        async with asyncio.timeout(20):
            await test
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating

    asyncio.run(both())


def test_a_healthy_agent_beats_and_tells_its_status() -> None:
    it = Watched()

    async def test() -> None:
        await it.clock.advance(5 * EVERY_S)

    run(test(), it)
    assert [at for at, _ in it.sent] == [EVERY_S * number for number in range(1, 6)]
    assert {text for _, text in it.sent} == {"WATCHDOG=1\nSTATUS=50 networks"}


@pytest.mark.mutation("a-beat-proves-that-the-agent-answers")
def test_an_agent_that_does_not_answer_on_its_socket_does_not_beat() -> None:
    it = Watched()

    async def test() -> None:
        it.answers = False
        await it.clock.advance(2 * ANSWER_S_MAX + 3 * EVERY_S)
        assert it.sent == []
        it.answers = True
        await it.clock.advance(ANSWER_S_MAX + 2 * EVERY_S)

    run(test(), it)
    assert it.sent
    assert it.aborted == []
    assert it.log.lines[0] == "the agent does not answer on its own socket: no hello"


def test_an_agent_whose_workers_hang_aborts() -> None:
    it = Watched()

    async def test() -> None:
        it.working = False
        await it.clock.advance(STUCK_S_MAX)
        assert it.aborted == []
        await it.clock.advance(2 * EVERY_S)

    run(test(), it)
    assert it.aborted[0] == STUCK_S_MAX + EVERY_S
    assert it.beats(it.aborted[0] - EVERY_S / 2) == 0
    assert it.log.lines[0] == "the worker threads have ended no work for 90 s: the agent aborts"


@pytest.mark.mutation("progress-is-life", instead="self._round_trip is None or self._round_trip.done()")
def test_an_agent_whose_workers_are_busy_for_minutes_beats() -> None:
    """A restore of hundreds of networks keeps every worker busy; each work takes a minute on a slow machine."""
    it = Watched()

    async def test() -> None:
        it.working = False
        for _ in range(20):
            await it.clock.advance(60.0)
            it.done += 1

    run(test(), it)
    assert it.aborted == []
    assert it.beats(0.0) == 20 * 60 / EVERY_S


@pytest.mark.mutation("a-late-heartbeat-proves-nothing", instead="True")
def test_an_overloaded_machine_is_no_proof_that_workers_hang() -> None:
    it = Watched()
    slow = it.clock.sleep

    async def late(delay_s: float) -> None:
        await slow(delay_s + (30.0 if delay_s == EVERY_S else 0.0))

    it.clock.sleep = late  # type: ignore[method-assign]

    async def test() -> None:
        it.working = False
        await it.clock.advance(10 * STUCK_S_MAX)

    run(test(), it)
    assert it.aborted == []
    assert it.sent


def test_the_interval_is_a_quarter_of_the_watchdog() -> None:
    assert [interval_s(it) for it in ("", "0", "x", "4000000", "30000000")] == [EVERY_S, EVERY_S, EVERY_S, 1.0, EVERY_S]
