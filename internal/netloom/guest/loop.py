"""The event loop of the guest process: readiness of file descriptors by epoll(7), timers, and one signal.

asyncio makes more objects and calls for each event. It also loads TLS, threads and processes, which the guest process
never uses.
"""

from __future__ import annotations

import heapq
import itertools
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol

Callback = Callable[[], object]

_EVENTS_AT_ONCE = 256
_READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


class Cancellable(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> None: ...


class Loop(Protocol):
    """What the services use of an event loop."""

    def time(self) -> float: ...
    def stop(self) -> None: ...
    def call_soon(self, callback: Callback, /) -> Cancellable: ...
    def call_later(self, seconds: float, callback: Callback, /) -> Cancellable: ...
    def add_reader(self, descriptor: int, callback: Callback, /) -> None: ...
    def remove_reader(self, descriptor: int, /) -> bool: ...
    def add_writer(self, descriptor: int, callback: Callback, /) -> None: ...
    def remove_writer(self, descriptor: int, /) -> bool: ...


class _Call:
    """A callback that runs once, unless it is cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class EpollLoop:
    """Calls the callbacks, one after the other. ``failed`` gets the exception of a callback; the loop goes on.

    A callback may be called although its descriptor is not ready, when another callback of the same turn has closed the
    descriptor and opened a new one with the same number. So the descriptors must not block.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._soon: list[_Call] = []
        self._timers: list[tuple[float, int, _Call]] = []
        self._numbers = itertools.count()
        self._running = False

    # ---- what the services use

    def time(self) -> float:
        return time.monotonic()

    def call_soon(self, callback: Callback, /) -> _Call:
        """Call it in the next turn, before the descriptors that are ready then."""
        call = _Call(callback)
        self._soon.append(call)
        return call

    def call_later(self, seconds: float, callback: Callback, /) -> _Call:
        call = _Call(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))
        return call

    def add_reader(self, descriptor: int, callback: Callback, /) -> None:
        self._change(descriptor, self._readers, callback)

    def remove_reader(self, descriptor: int, /) -> bool:
        return self._change(descriptor, self._readers, None)

    def add_writer(self, descriptor: int, callback: Callback, /) -> None:
        self._change(descriptor, self._writers, callback)

    def remove_writer(self, descriptor: int, /) -> bool:
        return self._change(descriptor, self._writers, None)

    def _change(self, descriptor: int, callbacks: dict[int, Callback], callback: Callback | None) -> bool:
        """Set or forget a callback; returns whether there was one. The kernel is told only what is new to it."""
        before = (descriptor in self._readers) | (descriptor in self._writers) << 1
        had = callbacks.pop(descriptor, None) is not None
        if callback is not None:
            callbacks[descriptor] = callback
        after = (descriptor in self._readers) | (descriptor in self._writers) << 1
        if before == after:
            return had
        events = (select.EPOLLIN if after & 1 else 0) | (select.EPOLLOUT if after & 2 else 0)
        if not before:
            self._epoll.register(descriptor, events)
        elif after:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.unregister(descriptor)
        return had

    # ---- what the process uses

    def on_signal(self, number: int, callback: Callback) -> None:
        """Call it in the loop when the signal arrives."""
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)
        arrived: list[int] = []
        signal.signal(number, lambda *_: arrived.append(number))
        # Python handles a signal between two calls and then waits on; only a readable descriptor ends the wait.
        signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)

        def wake() -> None:
            woken.recv(4096)
            if arrived:
                arrived.clear()
                callback()

        self.add_reader(woken.fileno(), wake)

    def run(self) -> None:
        """Run until ``stop``."""
        self._running = True
        while self._running:
            self._turn()

    def stop(self) -> None:
        """End ``run`` after this turn."""
        self._running = False

    def _turn(self) -> None:
        ready = self._epoll.poll(self._timeout_s(), _EVENTS_AT_ONCE)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            self._soon.append(heapq.heappop(self._timers)[2])
        soon, self._soon = self._soon, []
        for call in soon:
            if call.callback is not None:
                self._run(call.callback)
        for descriptor, events in ready:
            if events & _READABLE and (callback := self._readers.get(descriptor)):
                self._run(callback)
            if events & _WRITABLE and (callback := self._writers.get(descriptor)):
                self._run(callback)

    def _timeout_s(self) -> float:
        if self._soon:
            return 0.0
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        return max(0.0, timers[0][0] - time.monotonic()) if timers else -1.0

    def _run(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001, one packet or request failed; the others are served
            self._failed(error)  # guard: a-failed-callback-is-named
