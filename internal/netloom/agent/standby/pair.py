"""The connections between the two hosts of each group that can serve: states, acknowledgements and flows.

``pairwire`` has the messages, and how both ends prove that they know the group's secret. The second host of a group
connects to the first, again and again, so there are never two connections that mean the same.

Control messages are never dropped while the connection exists. They overtake flow messages, so that a call need not
wait until a host has worked through a flood of flows. Flow messages that nobody reads are dropped, and ``pair_gap``
says when it is of use to send all flows again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from ipaddress import ip_address
from typing import Any, Protocol

from netloom import pairwire
from netloom.agent.backoff import Backoff
from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.log import Log
from netloom.agent.standby.pair_listener import BUFFER_BYTES, PairListener, set_options
from netloom.agent.standby.sealing import AesGcm, Agreement
from netloom.pairwire import (
    ANSWER_BYTES,
    FLOW_MESSAGES,
    MESSAGE_BYTES_MAX,
    Keys,
    PairError,
    PairMessage,
    Ping,
    Reader,
    Sealer,
)
from netloom.standbywire import GroupHost, GroupSpec

CONNECT_S_MAX = 2.0  # for one attempt: TCP and the authentication
RETRY = Backoff.doubling(0.2, 2.0)._replace(settled_s=5.0)
TICK_S = 0.5
PING_S = 1.0
SILENT_S_MAX = 3.0
FLOW_BYTES_MAX = 8 << 20  # flow messages that wait
FLOW_BYTES_LOW = 1 << 20  # there is room again
_WRITE_BYTES = 64 << 10
_WRITES_AT_ONCE = 16


class PairHandler(Protocol):
    """What the owner of the connections does. Called on the event loop, never from within a method of ``Pairs``."""

    def pair_connected(self, group_id: str) -> None:
        """The other host is there, and has proved the secret."""

    def pair_lost(self, group_id: str) -> None:
        """The connection has ended. Nobody knows which of the last messages have arrived."""

    def pair_received(self, group_id: str, message: PairMessage) -> None:
        """A message of the other host, in the order in which control messages and flow messages were sent."""

    def pair_gap(self, group_id: str) -> None:
        """Flow messages were dropped, and all that came after the first one. Now there is room again."""


class Pairs:
    """The connections of all groups in which this host is the first or the second. Used on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log, handler: PairHandler) -> None:
        self._loop = loop
        self._log = log
        self._handler = handler
        self._pairs: dict[str, _Pair] = {}
        self._listeners: dict[int, PairListener] = {}  # by port: those of this host in groups in which it is the first
        self._timer: asyncio.TimerHandle | None = None

    def set_groups(self, specs: Iterable[tuple[GroupSpec, str]]) -> None:
        """These groups exist, and no others, each with the name of this host in it. A witness has no connections.

        A group that has changed is connected anew. Raises ValueError for a group with a wrong secret.
        """
        wanted = {spec.group_id: (spec, me) for spec, me in specs if me in (spec.first.name, spec.second.name)}
        for group_id, (spec, me) in wanted.items():
            known = self._pairs.get(group_id)
            if known is None or (known.spec, known.me) != (spec, me):
                pair = _Pair(self._loop, self._log, self._handler, spec, me)
                if known is not None:
                    known.close("the group has changed")
                self._pairs[group_id] = pair
                pair.start()
        for group_id in self._pairs.keys() - wanted.keys():
            self._pairs.pop(group_id).close("the group has ended")
        self._listen()
        if self._pairs and self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def close(self) -> None:
        """Close all connections."""
        self.set_groups(())

    def connected(self, group_id: str) -> bool:
        """Whether the other host of the group is there."""
        pair = self._pairs.get(group_id)
        return pair is not None and pair.connection is not None

    def send(self, group_id: str, message: PairMessage) -> bool:
        """Send the message, or queue it. False: there is no connection, or too many flow messages wait for it.

        True does not say that the message arrives: the connection may end before.
        """
        pair = self._pairs.get(group_id)
        return pair is not None and pair.connection is not None and pair.connection.send(message)

    async def drained(self, group_id: str) -> bool:
        """Wait until few flow messages wait. To be called before each message of a long table, so that none is dropped.

        False: there is no connection, or it has ended meanwhile.
        """
        pair = self._pairs.get(group_id)
        return pair is not None and pair.connection is not None and await pair.connection.drained()

    def _secret_of(self, group: int) -> bytes | None:
        pair = self._pairs.get(f"{group:08x}")
        return pair.secret if pair is not None and pair.listens else None

    def _known_sources(self) -> set[bytes]:
        """The packed addresses of the second hosts; empty if that of a host is unknown, because it has a name."""
        sources = [it.sources for it in self._pairs.values() if it.listens]
        return set().union(*sources) if all(sources) else set()

    def _admitted(self, group: int, sock: socket.socket, keys: Keys) -> None:
        self._pairs[f"{group:08x}"].take(sock, own=keys.of_first, others=keys.of_second)

    def _listen(self) -> None:
        """Listen where the second hosts of groups connect, and nowhere else."""
        ports = {it.spec.first.port for it in self._pairs.values() if it.listens}
        for port in ports:
            if port not in self._listeners:
                self._listeners[port] = PairListener(
                    self._loop, self._log, port, self._secret_of, self._known_sources, self._admitted
                )
            self._listeners[port].open()
        for port in self._listeners.keys() - ports:
            self._listeners.pop(port).close()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick) if self._pairs else None
        self._listen()
        for pair in self._pairs.values():
            if pair.connection is not None:
                pair.connection.tick()


class _Pair:
    """A group, and its connection if it has one."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, log: Log, handler: PairHandler, spec: GroupSpec, me: str
    ) -> None:
        self.spec = spec
        self.me = me
        self.secret = pairwire.secret_bytes(spec.secret)
        self.listens = me == spec.first.name
        # Packed addresses from which the other host may connect: the one in the group, and those that it has used.
        self.sources = {_packed(numeric[1][0])} if (numeric := _numeric(spec.second)) else set()
        self.connection: _Connection | None = None
        self._loop = loop
        self._log = log
        self._handler = handler
        self._other = spec.second.name if self.listens else spec.first.name
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()  # of the present connection
        self._reason = ""  # why the last attempt failed
        self._closed = False

    def start(self) -> None:
        if not self.listens:
            self._spawn(self._keep_connected())

    def close(self, reason: str) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self.connection is not None:
            self.connection.drop(reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def line(self, text: str) -> None:
        self._log.line(f"group={self.spec.group_id} {text}")

    # ----------------------------------------------------------------------------------------------- the second host

    async def _keep_connected(self) -> None:
        failures = 0
        while True:
            began = self._loop.time()
            try:
                await self._connect()
                began = self._loop.time()
                self._reason = ""
                await self._ended.wait()
            except (OSError, PairError, UnicodeError) as error:  # UnicodeError: a name that DNS cannot have
                self._failed(str(error) or type(error).__name__)
            except Exception as error:  # noqa: BLE001  # a bug must not leave the group without a connection for ever
                self._log.traceback(f"group={self.spec.group_id} connection", error)
            failures = RETRY.earlier(failures, self._loop.time() - began)
            await asyncio.sleep(RETRY.delay_s(failures) * random.uniform(0.5, 1.0))
            failures += 1

    def _failed(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            address = self.spec.first
            self.line(f"no connection to {self._other} ({address.address} port {address.port}): {reason}")

    async def _connect(self) -> None:
        """Connect to the first host and authenticate. Raises OSError, also when it takes too long; PairError."""
        host = self.spec.first
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                family, address = _numeric(host) or await self._resolved(host)
                sock = high_socket(socket.socket(family, socket.SOCK_STREAM))
                try:
                    sock.setblocking(False)
                    set_options(sock)
                    await self._loop.sock_connect(sock, address)
                    keys = await self._authenticate(sock)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise OSError(f"no answer within {CONNECT_S_MAX:.0f} s") from None
        await self._carry(sock, keys.of_second, keys.of_first)

    async def _resolved(self, host: GroupHost) -> tuple[int, Any]:
        found = await self._loop.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM)
        return found[0][0], found[0][4]

    async def _authenticate(self, sock: socket.socket) -> Keys:
        agreement = Agreement()
        hello = pairwire.hello(self.secret, self.spec.mark, agreement.nonce)
        await self._loop.sock_sendall(sock, hello)
        answer = b""
        while len(answer) < ANSWER_BYTES:
            data = await self._loop.sock_recv(sock, ANSWER_BYTES - len(answer))
            if not data:
                raise PairError("it does not know the group, or has another secret for it")
            answer += data
        if not pairwire.is_answer(self.secret, hello, answer):  # guard: the-first-host-is-authenticated
            raise PairError("its answer does not prove the secret of the group")
        agreed = agreement.agreed(pairwire.nonce_in(answer))
        await self._loop.sock_sendall(sock, pairwire.proof(self.secret, hello, answer))
        return pairwire.keys(self.secret, hello, answer, agreed)

    # ------------------------------------------------------------------------------------------------ the first host

    def take(self, sock: socket.socket, own: bytes, others: bytes) -> None:
        """A connection of the second host, which has proved the secret. It replaces an older one."""
        with contextlib.suppress(OSError):  # it has gone already
            self.sources.add(_packed(sock.getpeername()[0]))
        if self.connection is not None:
            self.connection.drop("it has connected anew")
        self._spawn(self._carry_accepted(sock, own, others))

    async def _carry_accepted(self, sock: socket.socket, own: bytes, others: bytes) -> None:
        try:
            await self._carry(sock, own, others)
        except OSError as error:
            self.line(f"no connection to {self._other}: {error.strerror}")

    # --------------------------------------------------------------------------------------------------------- of both

    async def _carry(self, sock: socket.socket, own: bytes, others: bytes) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENT_S_MAX * 1000))
            connection = _Connection(self, self._loop, self._handler, Sealer(AesGcm(own)), Reader(AesGcm(others)))
            await self._loop.create_connection(lambda: connection, sock=sock)
        except BaseException:
            sock.close()
            raise

    def opened(self, connection: _Connection) -> bool:
        """Whether the connection is of use."""
        if self._closed:
            return False
        if self.connection is not None:
            self.connection.drop("it has connected anew")
        self.connection = connection
        self._ended = asyncio.Event()
        self.line(f"connected to {self._other}")
        return True

    def dropped(self, connection: _Connection, reason: str) -> None:
        """The connection carries nothing any more."""
        if self.connection is connection:
            self.connection = None
            self._ended.set()
            self.line(f"connection to {self._other} lost: {reason}")

    def tell(self, event: Callable[..., None], *arguments: object) -> None:
        """Call the handler. A bug in it is logged, and the connection goes on."""
        try:
            event(self.spec.group_id, *arguments)
        except Exception as error:  # noqa: BLE001  # a bug with one message must not stop all the others
            self._log.traceback(f"group={self.spec.group_id} {event.__name__}", error)  # guard: a-bug-is-no-silence


def _numeric(host: GroupHost) -> tuple[int, Any] | None:
    """The family and the socket address of a host that has no name: no worker thread is needed for it."""
    try:
        found = socket.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return None
    return found[0][0], found[0][4]


def _packed(address: str) -> bytes:
    """The address of a socket as in a packet: 4 or 16 bytes."""
    found = ip_address(address.partition("%")[0])
    return (found.ipv4_mapped or found).packed if found.version == 6 else found.packed


class _Connection(asyncio.Protocol):
    """A connection whose both ends have proved the secret."""

    def __init__(
        self, pair: _Pair, loop: asyncio.AbstractEventLoop, handler: PairHandler, sealer: Sealer, reader: Reader
    ) -> None:
        self._pair = pair
        self._loop = loop
        self._handler = handler
        self._sealer = sealer
        self._reader = reader
        self._transport: asyncio.Transport | None = None
        self._open = False
        self._told = False  # the handler knows of it
        self._paused = False
        self._resumes: asyncio.Handle | None = None
        self._control: deque[bytes] = deque()
        self._control_bytes = 0
        self._flows: deque[bytes] = deque()
        self._flow_bytes = 0
        self._parts: Iterator[bytes] = iter(())  # what is left of the message that is being sent
        self._gap = False
        self._waiting: list[asyncio.Future[bool]] = []
        self._heard_at = self._sent_at = loop.time()

    # ------------------------------------------------------------------------------------------------ the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._open = self._pair.opened(self)
        if self._open:
            self._told = True
            self._pair.tell(self._handler.pair_connected)
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            messages = self._reader.feed(data)
        except PairError as error:
            self.drop(str(error))
            return
        for message in messages:
            if self._open and not isinstance(message, Ping):
                self._pair.tell(self._handler.pair_received, message)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write()

    def connection_lost(self, error: Exception | None) -> None:
        self.drop(str(error) if error else "closed by the other end")
        if self._told:
            self._pair.tell(self._handler.pair_lost)

    def drop(self, reason: str) -> None:
        """End the connection at once; ``pair_lost`` follows. Nothing happens if it has ended."""
        if self._open:
            self._open = False
            self._pair.dropped(self, reason)
            self._control.clear()
            self._flows.clear()
            self._parts = iter(())
            self._release(False)
        if self._transport is not None:
            self._transport.abort()

    def tick(self) -> None:
        """To be called each TICK_S: notice an end that is silent, and be heard by it."""
        now = self._loop.time()
        if now - self._heard_at >= SILENT_S_MAX:  # guard: a-silent-host-is-noticed
            self.drop(f"silent for {now - self._heard_at:.1f} s")
        elif now - self._sent_at >= PING_S and not self._control:
            self.send(Ping())

    # ------------------------------------------------------------------------------------------------------- sending

    def send(self, message: PairMessage) -> bool:
        data = pairwire.encode(message)
        if isinstance(message, FLOW_MESSAGES):
            if self._gap or self._flow_bytes + len(data) > FLOW_BYTES_MAX:  # guard: waiting-flows-are-bounded
                self._gap = True
                return False
            self._flows.append(data)
            self._flow_bytes += len(data)
        else:
            if self._control and self._control_bytes + len(data) > MESSAGE_BYTES_MAX:
                self.drop("the other end does not read")
                return False
            self._control.append(data)
            self._control_bytes += len(data)
        self._write()
        return True

    async def drained(self) -> bool:
        if self._open and (self._gap or self._flow_bytes > FLOW_BYTES_LOW):
            waiter: asyncio.Future[bool] = self._loop.create_future()
            self._waiting.append(waiter)
            return await waiter
        return self._open

    def _write(self) -> None:
        """Give the transport what it accepts now, but let other work of the agent have its turn, too."""
        for _ in range(_WRITES_AT_ONCE):
            data = b"" if self._paused or not self._open else self._records()
            if not data:
                return
            assert self._transport is not None
            self._sent_at = self._loop.time()
            self._transport.write(data)
        if self._resumes is None:
            self._resumes = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._resumes = None
        self._write()

    def _records(self) -> bytes:
        """The next records, some _WRITE_BYTES; empty: nothing waits. They are numbered, so they have to be sent now."""
        records, size = [], 0
        while size < _WRITE_BYTES:
            part = next(self._parts, None)
            if part is not None:
                records.append(self._sealer.seal(part))
                size += len(part)
            elif self._control:  # guard: control-overtakes-flows
                message = self._control.popleft()
                self._control_bytes -= len(message)
                self._parts = pairwire.parts(message)
            elif self._flows:
                message = self._flows.popleft()
                self._flow_bytes -= len(message)
                self._parts = pairwire.parts(message)
            else:
                break
        if self._flow_bytes <= FLOW_BYTES_LOW:
            if self._gap:
                self._gap = False
                self._loop.call_soon(self._tell_gap)
            self._release(True)
        return b"".join(records)

    def _tell_gap(self) -> None:
        if self._open:
            self._pair.tell(self._handler.pair_gap)

    def _release(self, connected: bool) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(connected)
        self._waiting.clear()
