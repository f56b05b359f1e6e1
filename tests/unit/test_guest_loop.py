"""The event loop of the guest process, and what its HTTP connections do with it."""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h11
import pytest

from netloom.guest import http, limits
from netloom.guest.loop import Callback, EpollLoop

INTERNAL = Path(__file__).parents[2] / "internal"


class Bench:
    """A loop, pairs of sockets, and what the callbacks have noted."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.loop = EpollLoop(self.failures.append)
        self.noted: list[str] = []
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.pairs.append((ours, theirs))
        return ours, theirs

    def on_data(self, sock: socket.socket, callback: Callback) -> None:
        """Read what arrives, and call it."""

        def read() -> None:
            sock.recv(100)
            callback()

        self.loop.add_reader(sock.fileno(), read)

    def note(self, text: str) -> Callback:
        return lambda: self.noted.append(text)

    def both(self, *callbacks: Callback) -> Callback:
        """A callback that calls all of these."""
        return lambda: [it() for it in callbacks]

    def run(self, seconds: float = 0.05) -> list[str]:
        """Run the loop for this time; what was noted."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()
        return self.noted


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for ours, theirs in made.pairs:
        ours.close()
        theirs.close()


def test_a_callback_runs_when_its_descriptor_is_readable_and_not_after_its_removal(bench: Bench) -> None:
    ours, theirs = bench.pair()
    bench.on_data(ours, bench.note("read"))
    theirs.send(b"x")
    assert bench.run() == ["read"]
    assert bench.loop.remove_reader(ours.fileno())
    assert not bench.loop.remove_reader(ours.fileno())
    theirs.send(b"x")
    assert bench.run() == ["read"]


def test_a_descriptor_that_is_removed_in_the_same_turn_is_not_called(bench: Bench) -> None:
    (one, first), (other, second) = bench.pair(), bench.pair()
    bench.on_data(one, bench.both(bench.note("one"), lambda: bench.loop.remove_reader(other.fileno())))
    bench.on_data(other, bench.both(bench.note("other"), lambda: bench.loop.remove_reader(one.fileno())))
    first.send(b"x")
    second.send(b"x")
    assert len(bench.run()) == 1


def test_the_writer_of_a_descriptor_is_independent_of_its_reader(bench: Bench) -> None:
    ours, theirs = bench.pair()
    bench.on_data(ours, bench.note("read"))
    written = bench.both(bench.note("write"), lambda: bench.loop.remove_writer(ours.fileno()))
    bench.loop.add_writer(ours.fileno(), written)
    assert bench.run() == ["write"]
    theirs.send(b"x")
    assert bench.run() == ["write", "read"]


def test_the_end_of_a_connection_is_readable(bench: Bench) -> None:
    ours, theirs = bench.pair()
    ended = bench.both(bench.note("end"), lambda: bench.loop.remove_reader(ours.fileno()))
    bench.loop.add_reader(ours.fileno(), ended)
    theirs.close()
    assert bench.run() == ["end"]


def test_timers_run_in_the_order_of_their_times_and_cancelled_ones_do_not(bench: Bench) -> None:
    bench.loop.call_later(0.02, bench.note("second"))
    bench.loop.call_later(0.01, bench.note("first"))
    bench.loop.call_later(0.01, bench.note("cancelled")).cancel()
    bench.loop.call_soon(bench.note("soon"))
    bench.loop.call_soon(bench.note("cancelled")).cancel()
    assert bench.run() == ["soon", "first", "second"]


def test_a_callback_for_the_next_turn_runs_before_what_is_ready_then(bench: Bench) -> None:
    ours, theirs = bench.pair()
    theirs.send(b"x")
    bench.on_data(ours, bench.note("read"))
    bench.loop.call_soon(bench.note("soon"))
    assert bench.run() == ["soon", "read"]


@pytest.mark.mutation("a-failed-callback-is-named")
def test_a_callback_that_fails_does_not_end_the_loop(bench: Bench) -> None:
    ours, theirs = bench.pair()

    def fail() -> None:
        raise ValueError("a bug")

    bench.on_data(ours, fail)
    bench.loop.call_soon(fail)
    bench.loop.call_soon(bench.note("the next one"))
    theirs.send(b"x")
    assert bench.run() == ["the next one"]
    assert [str(it) for it in bench.failures] == ["a bug", "a bug"]


def test_a_signal_ends_the_wait(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        bench.loop.on_signal(signal.SIGUSR2, bench.loop.stop)
        bench.loop.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR2))
        bench.loop.run()
    finally:
        os.close(signal.set_wakeup_fd(-1))
        signal.signal(signal.SIGUSR2, before)


def test_the_guest_process_loads_no_asyncio() -> None:
    """Its event loop is small; asyncio would load TLS and threads into a process that has neither."""
    listed = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import netloom.guest.main; "
         "print(*sys.modules)", str(INTERNAL)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"asyncio", "ssl", "concurrent", "logging", "threading"} & set(listed.stdout.split())


# ---- connections


class Clock:
    """A loop whose time passes only when the test says so."""

    class Timer:
        def __init__(self, callback: Callback) -> None:
            self.callback: Callback | None = callback

        def cancel(self) -> None:
            self.callback = None

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, int, Clock.Timer]] = []
        self.readers: dict[int, Callback] = {}
        self.writers: dict[int, Callback] = {}
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def stop(self) -> None:
        raise AssertionError

    def call_soon(self, callback: Callback, /) -> Timer:
        return self.call_later(0.0, callback)

    def call_later(self, seconds: float, callback: Callback, /) -> Timer:
        timer = Clock.Timer(callback)
        heapq.heappush(self.timers, (self.now + seconds, next(self._numbers), timer))
        return timer

    def add_reader(self, descriptor: int, callback: Callback, /) -> None:
        self.readers[descriptor] = callback

    def remove_reader(self, descriptor: int, /) -> bool:
        return self.readers.pop(descriptor, None) is not None

    def add_writer(self, descriptor: int, callback: Callback, /) -> None:
        self.writers[descriptor] = callback

    def remove_writer(self, descriptor: int, /) -> bool:
        return self.writers.pop(descriptor, None) is not None

    def pass_to(self, at: float) -> None:
        while self.timers and self.timers[0][0] <= at:
            self.now, _, timer = heapq.heappop(self.timers)
            if timer.callback is not None:
                timer.callback()
        self.now = at


class Recorded(socket.socket):
    """A socket that notes the flags of its messages."""

    flags: list[int]

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, address: Any = None, /) -> int:
        self.flags.append(flags)
        return super().sendmsg(buffers, ancillary, flags)


class Visit:
    """A client, and its connection to a site that answers every request with ``body``."""

    def __init__(self, body: bytes = b"answer") -> None:
        self.clock = Clock()
        ours, self.theirs = socket.socketpair()
        self.ours = Recorded(fileno=ours.detach())
        self.ours.flags = []
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.ended_at = -1.0
        self.connection = http.HttpConnection(self.clock, self.ours, self._site(body), self._ended, limits.Unread())

    @staticmethod
    def _site(body: bytes) -> http.Site:
        def site(_: h11.Request) -> http.HttpAnswer:
            return http.HttpAnswer(200, body)

        return site

    def _ended(self, _: http.HttpConnection) -> None:
        self.ended_at = self.clock.now

    def ask(self, more: str = "") -> None:
        self.theirs.send(f"GET / HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
        self.clock.readers[self.ours.fileno()]()

    def read(self) -> bytes:
        said = b""
        with suppress(BlockingIOError):
            while more := self.theirs.recv(1 << 20):
                said += more
        return said


@pytest.fixture
def visit() -> Iterator[Visit]:
    made = Visit()
    yield made
    made.connection.close()
    made.theirs.close()


def test_the_time_for_a_request_begins_anew_after_each_answer(visit: Visit) -> None:
    for second in (4.0, 8.0, 12.0):
        visit.clock.pass_to(second)
        visit.ask()
        assert visit.read().endswith(b"answer")
    visit.clock.pass_to(60.0)
    assert visit.ended_at == 12.0 + http.REQUEST_S


def test_a_client_that_says_nothing_is_closed_after_the_time_for_a_request(visit: Visit) -> None:
    visit.clock.pass_to(60.0)
    assert visit.ended_at == http.REQUEST_S


def test_a_client_that_does_not_close_is_closed_after_the_linger(visit: Visit) -> None:
    visit.clock.pass_to(2.0)
    visit.ask("Connection: close\r\n")
    visit.clock.pass_to(60.0)
    assert visit.ended_at == 2.0 + http.LINGER_S


def test_a_connection_has_one_timer_however_many_requests_it_sends(visit: Visit) -> None:
    for _ in range(http.REQUESTS_MAX - 1):
        visit.ask()
    assert len(visit.clock.timers) == 1


@pytest.mark.mutation("the-end-travels-with-the-answer", instead="socket.MSG_NOSIGNAL")
def test_only_the_last_answer_waits_for_the_end_of_the_connection(visit: Visit) -> None:
    for more in ("", "", "Connection: close\r\n"):
        visit.ask(more)
    assert [bool(it & socket.MSG_MORE) for it in visit.ours.flags] == [False, False, True]
    assert visit.read().count(b"answer") == 3


def test_an_unread_answer_is_written_when_the_client_reads_and_ends_after_its_time() -> None:
    body = bytes(4 << 20)
    visit = Visit(body)
    visit.clock.pass_to(3.0)
    visit.ask()
    descriptor = visit.ours.fileno()
    assert (descriptor in visit.clock.readers, descriptor in visit.clock.writers) == (False, True)
    said = visit.read()
    while descriptor in visit.clock.writers:
        visit.clock.writers[descriptor]()
        said += visit.read()
    assert len(said) > len(body)
    assert descriptor in visit.clock.readers
    visit.ask()
    visit.clock.pass_to(60.0)
    assert visit.ended_at == 3.0 + http.ANSWER_S
    visit.theirs.close()
