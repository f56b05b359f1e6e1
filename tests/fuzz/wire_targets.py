"""The wire in both directions: a hostile host, a hostile caller of the agent, and both ends of the helper."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar, cast

import asyncssh
import msgspec

from fuzz.payload_laws import check_refusal, done
from fuzz.pieces import Bytes, stream
from netloom import claimwire, heartbeatwire, pairwire, placementwire
from netloom.agent import signatures
from netloom.agent.log import Log
from netloom.agent.serve import SPOKEN, _Calls, _Peer
from netloom.agent.standby.boots import Boots
from netloom.errors import HostUnreachable
from netloom.ethernet import PAYLOAD_BYTES_MAX
from netloom.extension import helper_client
from netloom.extension.agent_client import AgentClient
from netloom.extension.deadline import Deadline
from netloom.extension.helper import Helper, HelperCall
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.outcome import error_in, printed
from netloom.extension.progress import Progress
from netloom.extension.record import CallRecord
from netloom.extension.request import Request
from netloom.extension.ssh import Login
from netloom.wire import REPLY_BYTES_MAX, Call, FrameReader, Registration, Reply

T = TypeVar("T")

CALL = Call(call_id="a", command="custom-action", scope_id="net-1", registration=Registration(owner="o"))


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """One event loop for all inputs: to make one takes longer than an input."""
    return asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run on the loop, and raise the first exception that reached it."""
    failures: list[BaseException] = []

    def failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failures.append(context.get("exception") or AssertionError(context["message"]))

    loop().set_exception_handler(failed)
    result = loop().run_until_complete(work)
    if failures:
        raise failures[0]
    return result


# ---- the management server: a hostile host


def take_host(data: bytes) -> None:
    """A host that sends any bytes to a management server that waits for the replies to two calls."""
    run(_received(stream(Bytes(data))))


async def _received(pieces: list[bytes]) -> None:
    client = AgentClient("h1", Login(trust=Trust((), KnownHosts("/nonexistent"))), None, Progress())
    client._send = lambda message: None  # type: ignore[method-assign]  # there is no channel
    client._greeted.add_done_callback(lambda it: it.exception())
    waiting = [
        asyncio.ensure_future(
            client.call(Call(call_id=it, command="show", scope_id="net-1", registration=CALL.registration))
        )
        for it in ("a", "b")
    ]
    await asyncio.sleep(0)
    for piece in pieces:
        client._received(piece)
        assert len(client._frames._frames._buffer) <= REPLY_BYTES_MAX + 4 + len(piece)
    await asyncio.sleep(0)
    if client._broken is not None:
        check_refusal(client._broken)
    for it in waiting:
        if it.done():
            _check_reply(it)
        it.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def _check_reply(waiting: asyncio.Future[Reply]) -> None:
    """A reply, or the error of a broken channel. What CloudStack would get of a reply is bounded and printable."""
    error = waiting.exception()
    if error is not None:
        assert isinstance(error, HostUnreachable)
        check_refusal(error)
        return
    reply = waiting.result()
    refused = error_in("h1", reply)
    if refused is not None:
        check_refusal(refused)
        return
    output = printed(cast(Request, _Asked()), reply)
    assert output.isascii() and output.replace("\n", "").replace("\t", "").isprintable() and len(output) < 100_000


class _Asked:
    """What ``printed`` reads of a request."""

    call = CALL


# ---- the agent: a hostile caller


def take_caller(data: bytes) -> None:
    """A caller that sends any bytes to an agent: calls are answered, anything else drops the connection."""
    run(_peered(stream(Bytes(data))))


class _Scopes:
    """Answers each call at once."""

    async def execute(self, call: Call) -> Reply:
        return Reply(call_id=call.call_id)

    async def learn(self, call: Call) -> None:
        """Who signs placements is of no interest here."""


class _Log(Log):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str, priority: int = 6) -> None:
        self.lines.append(text)


class _Transport(asyncio.Transport):
    """Both ends of a connection of root; keeps what the agent writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


async def _peered(pieces: list[bytes]) -> None:
    prepared = asyncio.Event()
    prepared.set()
    log, transport, others = _Log(), _Transport(), cast(Any, _Scopes())
    peer = _Peer(_Calls(others, others, others, others, prepared), log, lambda: SPOKEN)
    peer._transport = transport
    for piece in pieces:
        if transport.aborted:
            break
        peer.data_received(piece)
    while peer._tasks:
        await asyncio.wait(peer._tasks)
    assert transport.aborted == any(line.startswith("connection dropped: ") for line in log.lines)
    if not transport.aborted:
        assert all(isinstance(it, Reply) for it in FrameReader().feed(bytes(transport.written)))


# ---- placements: hostile agents and operators

MESSAGES: list[type[msgspec.Struct]] = [
    it
    for _, it in sorted(vars(placementwire).items())
    if isinstance(it, type) and issubclass(it, msgspec.Struct) and it.__module__ == placementwire.__name__
]


def take_placement(data: bytes) -> None:
    """A message about a placement. The first byte chooses its type."""
    given = Bytes(data)
    shape = MESSAGES[given.number() % len(MESSAGES)]
    body = given.rest()
    done(lambda: placementwire.unpacked(body, shape))


# ---- claims: hostile hosts and VMs on a VLAN


def take_claim(data: bytes) -> None:
    """What follows the Ethernet header of a frame: it is read or not, and its signatures are right or not."""
    claimed = claimwire.decode(data)
    if claimed is None:
        return
    assert len(data) <= PAYLOAD_BYTES_MAX
    text = claimed.claim.text
    for key, signature in signatures.checks(public_keys(), claimed.signatures):
        assert not signatures.is_signed(key, signature, text), "nobody has these private keys any more"
    again, _ = claimwire.payloads(claimed.scope_id, claimed.claim, claimed.signatures)
    read = [claimwire.decode(it) for it in again]
    assert all(it is not None and it.claim.text == text for it in read)


# ---- heartbeats: hostile hosts and VMs on a VLAN, and whoever sends to the port


HEARTBEAT_KEY = bytes(32)


def take_heartbeat(data: bytes) -> None:
    """Any bytes prove nothing. With a proof they are read or not; what is read is what is sent again."""
    assert heartbeatwire.unpack(data, HEARTBEAT_KEY) is None, "nobody has this key"
    heartbeatwire.from_ethernet(data)
    heartbeatwire.group_of(data)
    message = data + hmac.digest(HEARTBEAT_KEY, data, "sha256")[: heartbeatwire.PROOF_BYTES]
    beat = heartbeatwire.unpack(message, HEARTBEAT_KEY)
    if beat is None:
        return
    assert heartbeatwire.group_of(message) == beat.group_id
    again = heartbeatwire.pack(beat, HEARTBEAT_KEY)
    assert heartbeatwire.unpack(again, HEARTBEAT_KEY) == beat
    assert heartbeatwire.from_ethernet(heartbeatwire.in_ethernet(again)) == again
    boots, me = Boots(), (beat.sender + 1) % 3
    boots.judge(beat, me, b"12345678", (1 << 40) + 1)
    assert boots.judge(beat, me, b"12345678", (1 << 40) + 1) == "dropped"


@functools.cache
def public_keys() -> tuple[bytes, ...]:
    """A key of each kind."""
    kinds = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp521", "ssh-rsa")
    keys = (asyncssh.generate_private_key(kind).convert_to_public() for kind in kinds)
    return tuple(it.export_public_key("pkcs8-der") for it in keys)


# ---- the connection of two hosts: strangers, and a host of another build

SECRET = os.urandom(32)


class _NoCipher:
    """Nothing is encrypted, so that any record arrives."""

    def encrypt(self, number: int, text: bytes) -> bytes:
        return text

    def decrypt(self, number: int, sealed: memoryview) -> bytes | None:
        return bytes(sealed)


def take_pair(data: bytes) -> None:
    """Any bytes of a stranger prove nothing. Any records of a host that knows the secret are read or refused."""
    assert not pairwire.is_hello(SECRET, data), "nobody knows the secret"
    said = pairwire.hello(SECRET, 1, bytes(32))
    assert not pairwire.is_answer(SECRET, said, data)
    assert not pairwire.is_proof(SECRET, said, data, data[-pairwire.PROOF_BYTES :])
    reader = pairwire.Reader(_NoCipher())
    with contextlib.suppress(pairwire.PairError):
        for piece in stream(Bytes(data)):
            for message in reader.feed(piece):
                assert pairwire.decode(pairwire.encode(message)) == message


# ---- the helper: a hostile client, and a hostile helper


def take_helper_client(data: bytes) -> None:
    """A client of the helper that sends any bytes: its request is run, or it is disconnected."""
    run(_requested(stream(Bytes(data))))


async def _requested(pieces: list[bytes]) -> None:
    served = Helper.__new__(Helper)
    served.calls = set()
    call, transport = HelperCall(served), _Transport()
    call._transport = transport
    ran: list[tuple[Any, ...]] = []

    async def noted(*arguments: Any) -> None:
        ran.append(arguments)

    call._run = noted  # type: ignore[method-assign,assignment]  # what a request does is another matter
    for piece in pieces:
        if transport.aborted:
            break
        call.data_received(piece)
    if call._task is not None:
        await asyncio.wait([call._task])
        call._task.result()
        assert math.isfinite(call.ends), "a request that never ends"


def take_helper(data: bytes) -> None:
    """A helper that answers with any bytes: the call gets an answer, or does its work itself."""
    with _helper(stream(Bytes(data))) as directory:
        record = CallRecord(time.monotonic())
        try:
            answer = helper_client._attempt(directory, b"", Deadline(30.0, record.started), record, {})
        except helper_client._Broken:
            answer = None
        assert isinstance(record.doing, str)
        assert answer is None or isinstance(answer[0], int)


@contextlib.contextmanager
def _helper(pieces: list[bytes]) -> Iterator[int]:
    """A process that answers on the helper's socket; gives the descriptor of the socket's directory."""
    ours, theirs = socket.socketpair()
    descriptor = os.open(tempfile.gettempdir(), os.O_RDONLY)

    def answer() -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                theirs.sendall(piece)
        theirs.close()

    connected = helper_client._connect
    helper_client._connect = lambda _: ours  # type: ignore[assignment]
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield descriptor
    finally:
        helper_client._connect = connected
        ours.close()
        thread.join()
        os.close(descriptor)
