"""``netloom helper``: a resident process on the management server that runs the calls of its user.

It caches what is expensive to create: the loaded program and open SSH channels to the agents. It stores no state, so it
can be killed at any time. A call starts it (helper_client.py). It accepts connections of its own user and of root only,
and keeps their credentials in memory, never on disk.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from netloom import program
from netloom.errors import ascii_only
from netloom.extension import helper_client
from netloom.extension.deadline import Deadline
from netloom.extension.helper_client import ANSWER, BEAT, BEAT_S, DOING, SETTING, pack, unpack
from netloom.extension.log import write_down
from netloom.extension.record import CallRecord, failure
from netloom.sockets import peer_credentials

if TYPE_CHECKING:
    from netloom.extension.pool import Pool

# The helper exits when it had no call for this long, and closes a channel that no call used for this long.
IDLE_S = 300.0

# A client sends its request at once; a gigabyte takes seconds. One that has not sent it by then is disconnected.
REQUEST_S_MAX = 30.0
# A call's own timer ends it at its deadline. A client that stays longer than this after it does not read its answer.
_LEAVING_S_MAX = 10.0
# CloudStack makes a few hundred calls at once. A call that is not admitted does its work itself.
CLIENTS_MAX = 512
# The largest payload file (call.py), and room for the other fields.
_REQUEST_BYTES_MAX = (1 << 30) + (1 << 20)

# A call that takes less does not report to the caller what it is doing.
REPORT_AFTER_S = 0.02

# The descriptors that the helper inherits from the call that starts it: its socket and the socket's directory.
_LISTENER, _DIRECTORY = 0, 3


def main() -> int:
    """Serves until it is idle, its program is replaced, or SIGTERM. Exit status 1 when it was not started by a call."""
    try:
        listener = socket.socket(fileno=os.dup(_LISTENER))
        os.fstat(_DIRECTORY)
    except OSError:
        sys.stderr.write("netloom helper: only CloudStack's calls start it; there is no need to start it by hand\n")
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file with credentials
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # exit at once
    asyncio.run(Helper(listener, idle_s(os.environ.get(SETTING, ""))).serve())
    os._exit(0)  # does not wait for a resolver thread that hangs


def idle_s(setting: str) -> float:
    """The seconds of NETLOOM_HELPER; ``IDLE_S`` when it is not a number."""
    try:
        return float(setting)
    except ValueError:
        return IDLE_S


class Helper:
    """The running calls, the pool of channels that they share, and the conditions for exiting."""

    def __init__(self, listener: socket.socket, idle_s: float) -> None:
        self._listener = listener
        self._idle_s = idle_s
        self._inode = helper_client.inode(_DIRECTORY)
        self._stamp = program.stamp()
        self._last_call = time.monotonic()
        self.calls: set[HelperCall] = set()  # all clients, also those whose request has not arrived

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        # In a thread, so that the first calls get heartbeats while the modules are loaded.
        self.pool = asyncio.create_task(_load_pool())
        accepting = asyncio.create_task(self._accept(loop))
        while not self._is_over():
            await self._beat()
        accepting.cancel()
        self._listener.close()  # a call still in the backlog sees it close and starts a new helper
        while self.calls:
            await self._beat()

    async def _accept(self, loop: asyncio.AbstractEventLoop) -> None:
        self._listener.setblocking(False)
        while True:
            try:
                peer, _ = await loop.sock_accept(self._listener)
            except OSError:  # out of descriptors: waiting calls time out and do the work themselves
                await asyncio.sleep(BEAT_S)
                continue
            await loop.connect_accepted_socket(lambda: HelperCall(self), peer)

    async def _beat(self) -> None:
        await asyncio.sleep(BEAT_S)
        now = time.monotonic()
        for call in list(self.calls):
            if now > call.ends:  # guard: a-silent-client-leaves
                call.abort()
            elif call.is_running:
                call.send(BEAT)
                self._last_call = now
        if self.pool.done() and not self.pool.exception():
            self.pool.result().drop_idle(self._idle_s)

    def _is_over(self) -> bool:
        """Whether to exit: another helper has the socket's name, or we are idle or outdated and removed our socket."""
        if helper_client.inode(_DIRECTORY) != self._inode:
            return True
        if self.pool.done() and not self.pool.exception() and self.pool.result().is_installing:
            self._last_call = time.monotonic()
        is_idle = not any(call.is_running for call in self.calls)
        idle = is_idle and time.monotonic() - self._last_call > self._idle_s
        return (idle or program.stamp() != self._stamp) and self._removed_socket()

    def _removed_socket(self) -> bool:
        lock = helper_client.locked(_DIRECTORY, 0)
        if lock is None:  # a call is about to connect
            return False
        try:
            if helper_client.inode(_DIRECTORY) == self._inode:
                os.unlink(helper_client.socket_name(), dir_fd=_DIRECTORY)
        finally:
            os.close(lock)
        return True


async def _load_pool() -> Pool:
    def load() -> None:
        from netloom.extension import dispatch, run  # noqa: F401  # msgspec and asyncssh: twenty bare start-ups

    await asyncio.to_thread(load)
    from netloom.extension.pool import Pool  # loaded by now
    from netloom.extension.run import resolve_in_threads  # the same

    resolve_in_threads(asyncio.get_running_loop())
    return Pool(resident=True)


class HelperCall(asyncio.Protocol):
    """One call, from its connection to its answer. It is cancelled when the caller disconnects."""

    def __init__(self, helper: Helper) -> None:
        self._helper = helper
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self.ends = time.monotonic() + REQUEST_S_MAX  # when to disconnect the client

    @property
    def is_running(self) -> bool:
        """Whether the request has arrived."""
        return self._task is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if (
            peer_credentials(transport.get_extra_info("socket")).uid not in (0, os.geteuid())
            or len(self._helper.calls) >= CLIENTS_MAX  # guard: the-number-of-clients-is-bounded
        ):
            transport.abort()
            return
        self._transport = transport
        self._helper.calls.add(self)

    def data_received(self, data: bytes) -> None:
        if self._task is not None:  # a client sends one request and nothing else
            self.abort()
            return
        self._data += data
        if len(self._data) < 4:
            return
        end = 4 + int.from_bytes(self._data[:4], "big")
        if end > _REQUEST_BYTES_MAX:  # guard: a-request-is-bounded
            self.abort()
        elif len(self._data) >= end:
            with memoryview(self._data) as view:
                request = bytes(view[4:end])
            self._data = bytearray()
            self._start(request)

    def _start(self, request: bytes) -> None:
        try:
            command, executable, call_id, times, *settings, _, payload_file = unpack(request)
            environ = dict(_text(setting).split("=", 1) for setting in settings)
            timeout_s, started = map(float, times.split())
            if not math.isfinite(timeout_s + started):  # guard: a-client-has-a-deadline
                raise ValueError("a deadline that never comes")
            record = _ReportingRecord(self, started, call_id.decode())
        except ValueError:
            self.abort()
            return
        record.command = _text(command)
        deadline = Deadline(timeout_s, started)
        self.ends = deadline.ends + deadline.margin_s + _LEAVING_S_MAX
        self._task = asyncio.create_task(self._run(payload_file, deadline, _text(executable), record, environ))

    def abort(self) -> None:
        """Disconnect the client, and free what it has sent and what it does not read."""
        self._data = bytearray()
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._helper.calls.discard(self)
        if self._task is not None:
            self._task.cancel()

    def send(self, *fields: bytes) -> None:
        if self._transport is not None:
            self._transport.write(pack(*fields))

    async def _run(
        self,
        payload_file: bytes,
        deadline: Deadline,
        executable: str,
        record: _ReportingRecord,
        environ: dict[str, str],
    ) -> None:
        status, output, error = 0, "", ""
        try:
            pool = await asyncio.shield(self._helper.pool)
            from netloom.extension.run import run  # loaded by now

            output = await run(record.command, payload_file, deadline, executable, record, environ, pool)
        except Exception as raised:  # noqa: BLE001  # as in call.py: the only place in a call that catches everything
            status, error = failure(raised, record)
        record.ended()
        write_down(record, status, error, environ)
        self.send(ANSWER, str(status).encode(), ascii_only(output).encode(), error.encode())
        if self._transport is not None:
            self._transport.close()


class _ReportingRecord(CallRecord):
    """A record that sends what it is ``doing`` to the caller, which needs it for its message about a timeout.

    It sends nothing in the first ``REPORT_AFTER_S`` seconds, in which most calls end, and then each change at once.
    """

    __slots__ = ("_call", "_doing", "_is_slow", "_report")

    def __init__(self, call: HelperCall, started: float, call_id: str) -> None:
        self._call = call
        self._report: asyncio.TimerHandle | None = None
        self._is_slow = False
        super().__init__(started)
        self.call_id = call_id

    @property
    def doing(self) -> str:
        return self._doing

    @doing.setter
    def doing(self, what: str) -> None:
        self._doing = what
        if self._report is None:
            self._report = asyncio.get_running_loop().call_later(REPORT_AFTER_S, self._send)
        elif self._is_slow:
            self._send()

    def _send(self) -> None:
        self._is_slow = True
        self._call.send(DOING, self._doing.encode())

    def ended(self) -> None:
        """Send nothing any more."""
        if self._report is not None:
            self._report.cancel()


def _text(field: bytes) -> str:
    return field.decode("utf-8", "surrogateescape")
