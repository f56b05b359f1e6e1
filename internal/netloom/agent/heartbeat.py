"""The proof that this agent answers calls, for systemd's watchdog (sd_watchdog_enabled(3)).

A beat is a round trip through the agent's own socket, and one through the worker threads. It is sent to systemd only
after the first, so it stops when the event loop hangs or the socket is gone.

Work may take long: with hundreds of networks every worker is busy for minutes. So the round trip through the workers
may be slow, as long as they end other works. When they end nothing, not even this round trip, for STUCK_S_MAX seconds,
the agent aborts itself. systemd starts it again; without systemd the next call does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from netloom.agent.clock import Clock
from netloom.agent.log import Log

EVERY_S = 5.0
WATCHDOG_S = 45  # without a beat for so long, systemd ends the agent
ANSWER_S_MAX = 20.0  # for our own socket
STUCK_S_MAX = 90.0  # longer than the time of any call
LATE_S = 5.0  # if our own timer is so late, the machine is overloaded, and the time does not count


class Heartbeat:
    """Runs on the event loop. ``greeted``: a connection to our own socket. ``work``: a work for a worker thread.

    ``works_done``: the number of works that have ended, of all kinds. ``status``: one line for ``systemctl status``.
    """

    def __init__(
        self,
        clock: Clock,
        log: Log,
        greeted: Callable[[], Awaitable[None]],
        work: Callable[[], Awaitable[None]],
        works_done: Callable[[], int],
        status: Callable[[], str],
        send: Callable[[str], None],
        abort: Callable[[], object] = os.abort,
    ) -> None:
        self._clock = clock
        self._log = log
        self._greeted = greeted
        self._work = work
        self._works_done = works_done
        self._status = status
        self._send = send
        self._abort = abort
        self._round_trip: asyncio.Future[None] | None = None
        self._seen_done = 0
        self._stuck_s = 0.0

    async def run(self) -> None:
        """Beat until cancelled."""
        every_s = interval_s(os.environ.get("WATCHDOG_USEC", ""))
        try:
            while True:
                started = self._clock.time()
                await self._clock.sleep(every_s)
                await self._beat(self._clock.time() - started, every_s)
        finally:
            if self._round_trip is not None:
                self._round_trip.cancel()

    async def _beat(self, passed_s: float, every_s: float) -> None:
        if self._workers_are_stuck(passed_s, every_s):
            self._log.line(f"the worker threads have ended no work for {self._stuck_s:.0f} s: the agent aborts")
            self._abort()
            return
        try:
            async with self._clock.timeout(ANSWER_S_MAX):
                await self._greeted()  # guard: a-beat-proves-that-the-agent-answers
        except (OSError, TimeoutError) as error:
            self._log.line(f"the agent does not answer on its own socket: {str(error) or 'no hello'}")
            return
        self._send(f"WATCHDOG=1\nSTATUS={self._status()}")

    def _workers_are_stuck(self, passed_s: float, every_s: float) -> bool:
        done = self._works_done()
        if self._round_trip is None or self._round_trip.done() or done != self._seen_done:  # guard: progress-is-life
            self._stuck_s = 0.0
        elif passed_s <= every_s + LATE_S:  # guard: a-late-heartbeat-proves-nothing
            self._stuck_s += passed_s
        if self._round_trip is None or self._round_trip.done():
            self._round_trip = asyncio.ensure_future(self._work())
            self._round_trip.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._seen_done = done
        return self._stuck_s >= STUCK_S_MAX


def interval_s(watchdog_usec: str) -> float:
    """The seconds between two beats: a quarter of systemd's watchdog, but at most EVERY_S."""
    if watchdog_usec.isdigit() and int(watchdog_usec):
        return min(int(watchdog_usec) / 4e6, EVERY_S)
    return EVERY_S


def ready(watchdog_usec: str) -> str:
    """The state READY, and our watchdog, unless the unit has one (``watchdog_usec``: its environment variable).

    The unit has none, because a rollback keeps the unit file, and older builds send no beats.
    """
    return "READY=1" if watchdog_usec else f"READY=1\nWATCHDOG_USEC={WATCHDOG_S * 1_000_000}"


def notify(text: str) -> None:
    """Send a state to systemd (sd_notify(3)), if systemd started the agent."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender, suppress(OSError):
        sender.setblocking(False)  # systemd may be busy; the next beat comes soon
        sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
