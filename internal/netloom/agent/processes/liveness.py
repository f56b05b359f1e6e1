"""A process that runs and does not answer is as good as dead: each is asked now and then, and ended when it is silent.

Silence has to last, and on a machine that had time: a process that is only slow is left alone. Whoever is ended here
is started again by those who start it again when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from functools import partial

from netloom.agent.kernel.namespaces import inside
from netloom.agent.log import Log
from netloom.agent.processes.guest_process import Guests
from netloom.agent.processes.supervisor import ProbeTarget, Supervisor
from netloom.errors import HostRefused

EVERY_S = 10.0  # each process
ANSWER_S = 2.0
PAUSE_S = 2.0  # after a question without an answer, before the next
SILENCES = 3  # in a row
LATE_S = 1.0  # our own timer was that late: the machine is busy, and silence means nothing

# "data-server A", recursion not desired: from the resolver's own files, whatever becomes of its forwarders.
_QUERY = b"\x6e\x6c\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x0bdata-server\x00\x00\x01\x00\x01"
_WORD = b"@1 show info\n"  # to the current worker, through the master

_GUEST = "guest process"


class LivenessProbes:
    """On the event loop. ``keep`` asks until it is cancelled.

    ``busy`` tells whether somebody works on a scope: a process that is being reloaded may be silent for as long.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        supervisor: Supervisor,
        guests: Guests,
        busy: Callable[[str], bool],
    ) -> None:
        self._loop = loop
        self._busy = busy
        self._log = log
        self._supervisor = supervisor
        self._guests = guests
        self._asking: dict[Hashable, asyncio.Task[None]] = {}

    async def keep(self, every_s: float = EVERY_S) -> None:
        """Asks every process in turn, again and again."""
        try:
            while True:
                running = self._supervisor.answering()
                for asked in running:
                    await asyncio.sleep(every_s / (len(running) + 1))
                    self._begin((asked.scope_id, asked.name), partial(self._look_at_service, asked))
                await asyncio.sleep(every_s / (len(running) + 1))
                self._begin(_GUEST, self._look_at_guests)
        finally:
            for task in list(self._asking.values()):
                task.cancel()

    def _begin(self, key: Hashable, look: Callable[[], Coroutine[object, object, None]]) -> None:
        if key not in self._asking:  # else it is being silent already
            self._asking[key] = self._loop.create_task(look())
            self._asking[key].add_done_callback(lambda done: self._done(key, done))

    def _done(self, key: Hashable, task: asyncio.Future[None]) -> None:
        del self._asking[key]
        if not task.cancelled() and (error := task.exception()):
            self._log.traceback(f"asking {key}", error)

    async def _look_at_service(self, asked: ProbeTarget) -> None:
        if not await silent(lambda: self._answers(asked), waits=len(_ways(asked))) or self._busy(asked.scope_id):
            return
        if self._supervisor.end_silent(asked):
            self._log.line(f"scope={asked.scope_id} {asked.name} (pid {asked.record.pid}) does not answer: ended")

    async def _look_at_guests(self) -> None:
        pid = self._guests.pid
        if await silent(lambda: self._guests.answers(ANSWER_S)) and self._guests.end_silent(pid):
            self._log.line(f"guest process (pid {pid}) does not answer: ended")

    async def _answers(self, asked: ProbeTarget) -> bool:
        """Whether anything came back. What cannot be asked at all is somebody else's care, and counts as an answer."""
        for kind, question in _ways(asked):
            try:
                sock = await self._loop.run_in_executor(None, _socket, asked, kind)
            except (OSError, HostRefused):
                return True
            with sock, contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    try:
                        await self._loop.sock_connect(sock, _address(asked))
                    except FileNotFoundError:
                        return True
                    await self._loop.sock_sendall(sock, question)
                    if await self._loop.sock_recv(sock, 512):
                        return True
        return False


async def silent(answers: Callable[[], Awaitable[bool]], waits: int = 1) -> bool:
    """Whether question after question had no answer, while the machine had time for us at least.

    ``waits``: how often one question may be waited for.
    """
    for turn in range(SILENCES):
        if turn:
            await asyncio.sleep(PAUSE_S)
        began = time.monotonic()
        if (
            await answers()
            or time.monotonic() - began > waits * ANSWER_S + LATE_S  # guard: a-late-prober-proves-nothing
        ):
            return False
    return True


def _ways(asked: ProbeTarget) -> tuple[tuple[socket.SocketKind, bytes], ...]:
    """How to ask, one way after the other. A resolver that a tenant drowns in datagrams still hears a connection."""
    if asked.probe.kind == "haproxy":
        return ((socket.SOCK_STREAM, _WORD),)
    return (
        (socket.SOCK_DGRAM, _QUERY),
        (socket.SOCK_STREAM, len(_QUERY).to_bytes(2, "big") + _QUERY),  # guard: resolver-is-also-asked-over-tcp
    )


def _address(asked: ProbeTarget) -> str | tuple[str, int]:
    return (asked.probe.at, 53) if asked.probe.kind == "dns" else asked.probe.at


def _socket(asked: ProbeTarget, kind: socket.SocketKind) -> socket.socket:
    """In a worker thread: a socket that does not block, in the namespace where the question is heard."""
    if asked.probe.kind == "haproxy":
        sock = socket.socket(socket.AF_UNIX, kind)
    else:
        with inside(asked.namespace):
            sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    return sock
