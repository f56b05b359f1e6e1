"""The agent's connection to the guest process: requests with their answers, and events. Runs on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.processes.guest_sockets import LISTENERS, lengthen_queues
from netloom.errors import HostRefused
from netloom.guestwire import (
    Ack,
    DropNetwork,
    GuestHello,
    GuestMessage,
    GuestNetwork,
    LendSockets,
    LentSockets,
    Notice,
    PasswordTaken,
    Ping,
    ServeNetwork,
    UpdateNetwork,
)
from netloom.guestwire.channel import Channel, ChannelError

_A = TypeVar("_A", Ack, LentSockets)

ANSWER_S = 10.0
# The longest message of a guest process is its GuestHello: about 100 bytes for each network that it serves.
_MESSAGE_BYTES_MAX = 16 << 20


class GuestClient:
    """A connection that is open until it is lost or closed.

    Callbacks, with this client: ``event`` for each PasswordTaken and Notice; ``lost``, once, when the process has
    closed the connection or sent something that is no message. Requests that wait for an answer fail then.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        path: Path,
        event: Callable[[GuestClient, PasswordTaken | Notice], None],
        lost: Callable[[GuestClient, ChannelError], None],
    ) -> None:
        """Connect to the socket ``path``. Raises FileNotFoundError or ConnectionRefusedError: no process listens."""
        self._loop = loop
        self._event = event
        self._lost = lost
        self._seq = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[GuestMessage, list[int]]]] = {}
        self._hello: asyncio.Future[GuestHello] = loop.create_future()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # This does not wait: the socket listens since before the process was started.
            sock.connect(str(path))
        except OSError:
            sock.close()
            raise
        self._channel = Channel(sock, message_bytes_max=_MESSAGE_BYTES_MAX)  # guard: guest-messages-are-bounded
        self._open = True
        loop.add_reader(sock, self._readable)

    async def hello(self, wait_s: float) -> GuestHello:
        """The first message of the process. Raises ChannelError, or TimeoutError after ``wait_s``."""
        return await asyncio.wait_for(self._hello, wait_s)

    @property
    def greeted(self) -> bool:
        """Whether the process has sent its first message."""
        return self._hello.done() and not self._hello.cancelled() and self._hello.exception() is None

    # ---------------------------------------------------------------- requests; all raise HostRefused when they fail

    async def serve(self, table: GuestNetwork, sockets: Sequence[socket.socket]) -> None:
        """Serve a network on these sockets, which are those of ``LISTENERS``."""
        request = ServeNetwork(seq=next(self._seq), network=table, listeners=LISTENERS)
        await self._request(request, Ack, [sock.fileno() for sock in sockets])

    async def update(self, table: GuestNetwork) -> None:
        """Replace the table of a network that is served."""
        await self._request(UpdateNetwork(seq=next(self._seq), network=table), Ack)

    async def drop(self, scope_id: str, network_id: str) -> None:
        """Stop serving a network."""
        await self._request(DropNetwork(seq=next(self._seq), scope_id=scope_id, network_id=network_id), Ack)

    async def borrow(self, scope_id: str, network_id: str) -> list[socket.socket]:
        """Copies of the sockets of a network that is served; none if they are others than those of ``LISTENERS``."""
        request = LendSockets(seq=next(self._seq), scope_id=scope_id, network_id=network_id)
        lent, descriptors = await self._request(request, LentSockets)
        sockets = [high_socket(socket.socket(fileno=it)) for it in descriptors]
        if lent.listeners == LISTENERS:
            lengthen_queues(sockets)  # guard: queues-of-an-earlier-version-are-lengthened
            return sockets
        for sock in sockets:
            sock.close()
        return []

    async def ping(self, wait_s: float) -> None:
        """Return when the process has answered within ``wait_s``."""
        await self._request(Ping(seq=next(self._seq)), Ack, wait_s=wait_s)

    async def _request(
        self,
        message: ServeNetwork | UpdateNetwork | DropNetwork | LendSockets | Ping,
        kind: type[_A],
        descriptors: Sequence[int] = (),
        wait_s: float = ANSWER_S,
    ) -> tuple[_A, list[int]]:
        answer: asyncio.Future[tuple[GuestMessage, list[int]]] = self._loop.create_future()
        self._answers[message.seq] = answer
        try:
            self._channel.queue(message, descriptors)
            self._flush()
            reply, received = await asyncio.wait_for(answer, wait_s)
        except (ChannelError, TimeoutError) as error:
            raise HostRefused(f"the guest process does not answer: {error!s}") from error
        finally:
            self._answers.pop(message.seq, None)
        if isinstance(reply, Ack) and reply.error:
            raise HostRefused(f"the guest process refuses: {reply.error}")
        if not isinstance(reply, kind):
            raise HostRefused(f"the guest process answers {type(reply).__name__} to {type(message).__name__}")
        return reply, received

    # ---------------------------------------------------------------------------------------------------- the channel

    def close(self) -> None:
        """Close the connection, without a call of ``lost``."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._channel.close()

    def _readable(self) -> None:
        try:
            arrived = self._channel.receive()
        except ChannelError as error:
            self._fail(error)
            return
        for message, descriptors in arrived:
            if isinstance(message, GuestHello):
                if not self._hello.done():
                    self._hello.set_result(message)
            elif isinstance(message, PasswordTaken | Notice):
                self._event(self, message)
            elif (
                isinstance(message, Ack | LentSockets)
                and (answer := self._answers.get(message.seq)) is not None
                and not answer.done()
            ):
                answer.set_result((message, descriptors))
            else:  # nobody waits for it any more, or it is none that a guest process sends
                for descriptor in descriptors:
                    os.close(descriptor)  # guard: unwanted-descriptors-are-closed

    def _flush(self) -> None:
        if not self._open:
            return
        try:
            self._channel.flush()
        except ChannelError as error:
            self._fail(error)
            return
        if self._channel.pending:
            self._loop.add_writer(self._channel.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._channel.fileno())

    def _fail(self, error: ChannelError) -> None:
        self.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        if not self._hello.done():
            self._hello.set_exception(error)
        self._lost(self, error)
