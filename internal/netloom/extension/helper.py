"""``netloom helper``: the resident process of the management side, started by a call for the calls to come.

It holds what is dear to make: the loaded program, and open channels to the agents. It keeps no truth, so it may end at
any moment. It serves its own user and root; what they bring, credentials included, is in its memory and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

from netloom import program
from netloom.extension import helper_client
from netloom.extension.call import Story, ascii_only, failure
from netloom.extension.deadline import Deadline
from netloom.extension.helper_client import ANSWER, BEAT, BEAT_S, DOING, SETTING, pack, unpack
from netloom.extension.log import write_down

if TYPE_CHECKING:
    from netloom.extension.hosts import Pool

# Without a call for so long it ends; a channel that no call used for so long is closed.
IDLE_S = 300.0

# What the call that starts a helper leaves it (helper_client.py): the socket to serve, and the directory of its name.
_LISTENER, _DIRECTORY = 0, 3


def main() -> int:
    """Serves until it is idle, replaced, or told to end. Exit status 0, or 1 where no call has started it."""
    try:
        listener = socket.socket(fileno=os.dup(_LISTENER))
        os.fstat(_DIRECTORY)
    except OSError:
        sys.stderr.write("netloom helper: CloudStack's calls start it, nobody else needs to\n")
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # credentials are in no core file
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # who stops the service does not wait for us
    asyncio.run(_Helper(listener, idle_s(os.environ.get(SETTING, ""))).serve())
    os._exit(0)  # a resolver that hangs in its thread keeps nobody


def idle_s(setting: str) -> float:
    """The seconds of NETLOOM_HELPER; without it, or if it says something else, five minutes."""
    try:
        return float(setting)
    except ValueError:
        return IDLE_S


class _Helper:
    """The calls of the moment, the channels that they share, and when to end."""

    def __init__(self, listener: socket.socket, idle_s: float) -> None:
        self._listener = listener
        self._idle_s = idle_s
        self._inode = helper_client.inode(_DIRECTORY)
        self._stamp = program.stamp()
        self._last_call = time.monotonic()
        self.calls: set[_Call] = set()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        # Beside the loop, so that the first calls hear from us while they wait for it.
        self.pool = asyncio.create_task(_loaded())
        accepting = asyncio.create_task(self._accept(loop))
        while not self._is_over():
            await self._beat()
        accepting.cancel()
        self._listener.close()  # whoever is still in the queue finds another helper, or starts it
        while self.calls:
            await self._beat()

    async def _accept(self, loop: asyncio.AbstractEventLoop) -> None:
        self._listener.setblocking(False)
        while True:
            try:
                peer, _ = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor left: those that wait do their work themselves
                await asyncio.sleep(BEAT_S)
                continue
            await loop.connect_accepted_socket(lambda: _Call(self), peer)

    async def _beat(self) -> None:
        await asyncio.sleep(BEAT_S)
        for call in self.calls:
            call.tell(BEAT)
            self._last_call = time.monotonic()
        if self.pool.done() and not self.pool.exception():
            self.pool.result().drop_idle(self._idle_s)

    def _is_over(self) -> bool:
        """Another has the name; or the program was replaced, or is not needed any more, and the name is given up."""
        if helper_client.inode(_DIRECTORY) != self._inode:
            return True
        if self.pool.done() and not self.pool.exception() and self.pool.result().is_installing:
            self._last_call = time.monotonic()
        idle = not self.calls and time.monotonic() - self._last_call > self._idle_s
        return (idle or program.stamp() != self._stamp) and self._gave_up_the_name()

    def _gave_up_the_name(self) -> bool:
        lock = helper_client.locked(_DIRECTORY, 0)
        if lock is None:  # somebody is about to come
            return False
        try:
            if helper_client.inode(_DIRECTORY) == self._inode:
                os.unlink(helper_client.socket_name(), dir_fd=_DIRECTORY)
        finally:
            os.close(lock)
        return True


async def _loaded() -> Pool:
    def load() -> None:
        from netloom.extension import hosts, work  # noqa: F401  # msgspec and asyncssh: twenty bare start-ups

    await asyncio.to_thread(load)
    from netloom.extension.hosts import Pool  # loaded by now
    from netloom.extension.work import resolve_in_threads  # the same

    resolve_in_threads(asyncio.get_running_loop())
    return Pool(resident=True)


class _Call(asyncio.Protocol):
    """One call, from the connection to the answer. When the caller goes away, its work here ends."""

    def __init__(self, helper: _Helper) -> None:
        self._helper = helper
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        self._work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if _uid_of(transport.get_extra_info("socket")) not in (0, os.geteuid()):
            transport.abort()
            return
        self._transport = transport
        self._helper.calls.add(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._work is None and len(self._data) >= 4:
            end = 4 + int.from_bytes(self._data[:4], "big")
            if len(self._data) >= end:
                request = bytes(self._data[4:end])
                self._data.clear()
                self._work = asyncio.create_task(self._carry_out(request))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._helper.calls.discard(self)
        if self._work is not None:
            self._work.cancel()

    def tell(self, *said: bytes) -> None:
        if self._transport is not None:
            self._transport.write(pack(*said))

    async def _carry_out(self, request: bytes) -> None:
        command, executable, call_id, times, *settings, _, payload = unpack(request)
        environ = dict(_text(setting).split("=", 1) for setting in settings)
        timeout_s, started = map(float, times.split())
        story = _ToldStory(self, started, call_id.decode())
        story.command = _text(command)
        status, output, error = 0, "", ""
        try:
            pool = await asyncio.shield(self._helper.pool)
            from netloom.extension.work import carried_out  # loaded by now

            output = await carried_out(
                story.command, payload, Deadline(timeout_s, started), _text(executable), story, environ, pool
            )
        except Exception as raised:  # noqa: BLE001  # the same one place, for a call in here
            status, error = failure(raised, story)
        write_down(story, status, error, environ)
        self.tell(ANSWER, str(status).encode(), ascii_only(output).encode(), error.encode())
        if self._transport is not None:
            self._transport.close()


class _ToldStory(Story):
    """A story whose caller hears what is being done, for its last words."""

    __slots__ = ("_call", "_doing")

    def __init__(self, call: _Call, started: float, call_id: str) -> None:
        self._call = call
        super().__init__(started)
        self.call_id = call_id

    @property
    def doing(self) -> str:
        return self._doing

    @doing.setter
    def doing(self, what: str) -> None:
        self._doing = what
        self._call.tell(DOING, what.encode())


def _text(field: bytes) -> str:
    return field.decode("utf-8", "surrogateescape")


def _uid_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
