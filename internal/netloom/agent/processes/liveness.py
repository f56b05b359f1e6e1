"""Liveness probes: kill processes that run but do not answer any more.

A process is killed only after several probes in a row went unanswered, and not while the machine itself is overloaded.
It is then restarted as after any crash: by the supervisor, or, the guest process, by ``GuestProcess``. A process that
ends needs no probe: its pidfd tells it at once. The logs of these processes are shortened here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from functools import partial

from netloom.agent.budget import Checks
from netloom.agent.host import room
from netloom.agent.kernel.namespaces import inside
from netloom.agent.log import Log
from netloom.agent.processes.guest_process import GuestProcess
from netloom.agent.processes.process import socket_inside
from netloom.agent.processes.supervisor import ProbeTarget, Supervisor
from netloom.errors import HostRefused

EVERY_S = 10.0  # between two probes of the same process, while the budget suffices (agent/budget.py)
PROBE_CPU_S = 0.0005  # of one probe that is answered: measured
AT_ONCE_S = 0.05  # a process that is well has answered after this time
ANSWER_S = 2.0
PAUSE_S = 2.0  # after a failed probe, before the next
FAILURES = 3  # so many failed probes in a row mean that the process hangs
LATE_S = 1.0  # if our own timer is so late, the machine is overloaded, and a failed probe proves nothing

# "data-server A", recursion not desired: dnsmasq answers it from its own files, even if no other resolver answers.
_DNS_QUERY = b"\x6e\x6c\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x0bdata-server\x00\x00\x01\x00\x01"
_HAPROXY_COMMAND = b"@1 show info\n"  # the master passes it on to the current worker

_GUEST_PROCESS = "guest process"
_LOGS = "logs"


class LivenessProbes:
    """Runs on the event loop. Probes every process until ``run`` is cancelled.

    ``busy`` says whether a command works on a scope: a process may not answer while it is reloaded.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        supervisor: Supervisor,
        guest_process: GuestProcess,
        busy: Callable[[str], bool],
    ) -> None:
        self._loop = loop
        self._busy = busy
        self._log = log
        self._supervisor = supervisor
        self._guest_process = guest_process
        self._probing: dict[Hashable, asyncio.Task[None]] = {}

    async def run(self, probes: Checks) -> None:
        """Probe the services in turn, evenly spread, and the guest process once in ``probes.every_s``."""
        try:
            await asyncio.gather(self._probe_services(probes), self._probe_the_rest(probes.every_s))
        finally:
            for task in list(self._probing.values()):
                task.cancel()

    async def _probe_services(self, probes: Checks) -> None:
        while True:
            await asyncio.sleep(probes.pause_s(max(1, self._supervisor.number)))
            target = self._supervisor.next_probe_target()
            if target is not None:
                self._start((target.scope_id, target.name), partial(self._probe_service, target))

    async def _probe_the_rest(self, every_s: float) -> None:
        """The guest process serves all networks, so it is probed as often as on a small host."""
        while True:
            await asyncio.sleep(every_s)
            self._start(_GUEST_PROCESS, self._probe_guest_process)
            self._start(_LOGS, self._bound_logs)

    def _start(self, key: Hashable, probe: Callable[[], Coroutine[object, object, None]]) -> None:
        if key not in self._probing:  # else an earlier probe still waits for an answer
            self._probing[key] = self._loop.create_task(probe())
            self._probing[key].add_done_callback(lambda done: self._done(key, done))

    def _done(self, key: Hashable, task: asyncio.Future[None]) -> None:
        del self._probing[key]
        if not task.cancelled() and (error := task.exception()):
            self._log.traceback(f"probe of {key}", error)

    async def _probe_service(self, target: ProbeTarget) -> None:
        if not await hung(lambda: self._answers(target), questions=len(_questions(target))):
            return
        if not self._busy(target.scope_id) and self._supervisor.kill_hung(target):
            self._log.line(f"scope={target.scope_id} {target.name} (pid {target.record.pid}) does not answer: killed")

    async def _probe_guest_process(self) -> None:
        pid = self._guest_process.pid
        if await hung(lambda: self._guest_process.answers(ANSWER_S)) and self._guest_process.kill_hung(pid):
            self._log.line(f"guest process (pid {pid}) does not answer: killed")

    async def _bound_logs(self) -> None:
        await self._loop.run_in_executor(None, self._supervisor.bound_logs)
        await self._loop.run_in_executor(None, self._guest_process.bound_log)

    async def _answers(self, target: ProbeTarget) -> bool:
        """Whether the process sent any reply.

        True as well when it cannot be asked, because its namespace or its socket is gone, or because the namespace has
        no room for the connection of a question: that does not prove that it hangs. The next repair of the scope
        restarts a process whose namespace was replaced.
        """
        if await self._loop.run_in_executor(None, _answers_at_once, target):
            return True
        for kind, question in _questions(target):
            try:
                sock = await self._loop.run_in_executor(None, _socket, target, kind)
            except (OSError, HostRefused):
                return True
            with sock, contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    try:
                        with _address(target) as address:
                            await self._loop.sock_connect(sock, address)
                    except FileNotFoundError:
                        return True
                    await self._loop.sock_sendall(sock, question)
                    if await self._loop.sock_recv(sock, 512):
                        return True
        if target.probe.kind == "haproxy":
            return False
        full = await self._loop.run_in_executor(None, room.connections, target.namespace)
        return bool(full)  # guard: a-full-conntrack-table-proves-no-hang


async def hung(answers: Callable[[], Awaitable[bool]], questions: int = 1) -> bool:
    """Whether ``FAILURES`` probes in a row failed on a machine that was not overloaded.

    ``questions``: one probe consists of this many, each of which may wait ``ANSWER_S`` for its answer.
    """
    for turn in range(FAILURES):
        if turn:
            await asyncio.sleep(PAUSE_S)
        started = time.monotonic()
        if (
            await answers()
            or time.monotonic() - started > questions * ANSWER_S + LATE_S  # guard: a-late-prober-proves-nothing
        ):
            return False
    return True


def _questions(target: ProbeTarget) -> tuple[tuple[socket.SocketKind, bytes], ...]:
    """The questions of one probe, sent one after the other until one is answered.

    A resolver that a tenant floods with datagrams may lose the probe's datagram, but still answers over TCP.
    """
    if target.probe.kind == "haproxy":
        return ((socket.SOCK_STREAM, _HAPROXY_COMMAND),)
    return (
        (socket.SOCK_DGRAM, _DNS_QUERY),
        (socket.SOCK_STREAM, len(_DNS_QUERY).to_bytes(2, "big") + _DNS_QUERY),  # guard: resolver-is-also-asked-over-tcp
    )


@contextlib.contextmanager
def _address(target: ProbeTarget) -> Iterator[str | tuple[str, int]]:
    """The address to connect to in the block. Raises OSError."""
    at = target.probe.at
    if target.probe.kind == "dns":
        yield at, 53
    else:
        with socket_inside(target.record.pid, at) as path:
            yield path


def _answers_at_once(target: ProbeTarget) -> bool:
    """Whether the process answers the first question within moments. Blocks for these.

    It takes less CPU time than a question that waits on the event loop.
    """
    kind, question = _questions(target)[0]
    with contextlib.suppress(OSError, HostRefused), _socket(target, kind) as sock, _address(target) as address:
        sock.settimeout(AT_ONCE_S)
        sock.connect(address)
        sock.sendall(question)
        return bool(sock.recv(512))
    return False


def _socket(target: ProbeTarget, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket from which the target can be reached. Changes the namespace of its thread meanwhile."""
    if target.probe.kind == "haproxy":
        sock = socket.socket(socket.AF_UNIX, kind)
    else:
        with inside(target.namespace):
            sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    return sock
