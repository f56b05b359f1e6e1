"""What VMs send to the guest process, and what it and the agent send to each other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h11

from fuzz.payload_grammar import SECRET_MARK
from fuzz.pieces import Bytes, stream
from fuzz.wire_targets import loop, run
from guestbed import network, nic
from guestbed.dhcp import check_reply, reply_to
from guestbed.http import converse
from netloom.agent.processes.guest_client import GuestClient
from netloom.errors import HostRefused
from netloom.guest import http, metadata, password
from netloom.guest.main import GuestServer
from netloom.guest.table import GuestTable, mac_bytes
from netloom.guestwire import GuestHello, Listener, Notice, PasswordTaken, Served, ServeNetwork
from netloom.guestwire.channel import ChannelError
from netloom.secret import Secret

WEB = nic(45, options={43: bytes(300), 66: b"boot"}, password=Secret(SECRET_MARK), metadata={"a": "1", "b/c": "2"})
OTHER = nic(46, default_nic=False, user_data=Secret("#!\n"))
TABLE = GuestTable(network(WEB, OTHER, mtu=1450))
NICS = {mac_bytes(it.mac): it for it in (WEB, OTHER)}
DATAGRAM_BYTES_MAX = 2048
_PIECES_MAX = 50
_TURNS_MAX = 10_000  # of the event loop


# ---- DHCP


def take_datagram(packet: bytes) -> None:
    """Any datagram gets a well-formed reply for its own NIC, or none."""
    packet = packet[:DATAGRAM_BYTES_MAX]
    reply = reply_to(packet, TABLE)
    if reply is not None:
        check_reply(packet, reply, NICS[packet[28:34]])


# ---- HTTP


def take_metadata_requests(data: bytes) -> None:
    """Any bytes in any pieces get answers of HTTP/1.1 without the password, or none."""
    _check_answers(_conversation(Bytes(data), lambda request: metadata.respond(request, WEB)))


def take_password_requests(data: bytes) -> None:
    """The password is sent for ``send_my_password`` alone."""
    asked: list[bytes] = []

    def site(request: h11.Request) -> http.HttpAnswer:
        asked.extend(value for name, value in request.headers if name == b"domu_request")
        return password.respond(request, WEB.password).answer

    said = _conversation(Bytes(data), site)
    if b"send_my_password" not in asked:
        _check_answers(said)


def _check_answers(said: bytes) -> None:
    assert not said or said.startswith(b"HTTP/1.1 ")
    assert SECRET_MARK.encode() not in said


def _conversation(data: Bytes, site: http.Site) -> bytes:
    size = data.number()
    whole = data.rest()
    size = size or len(whole) or 1

    return run(converse([whole[at : at + size] for at in range(0, len(whole), size)], site))


# ---- the agent's connection to the guest process, both ends


def take_guest_process(data: bytes) -> None:
    """A guest process that an attacker controls: the agent gets messages, or loses the connection. No descriptor stays.

    The first byte: how many descriptors come with each piece.
    """
    given = Bytes(data)
    descriptors = given.number() % 4
    loop()
    before = _open_descriptors()
    run(_answered(stream(given), descriptors))
    assert _open_descriptors() == before, "descriptors stay open"


async def _answered(pieces: list[bytes], descriptors: int) -> None:
    events: list[PasswordTaken | Notice] = []
    lost: list[ChannelError] = []
    with _listener() as (listening, path):
        client = GuestClient(loop(), path, lambda _, it: events.append(it), lambda _, it: lost.append(it))
        theirs, _ = listening.accept()
    client._hello.add_done_callback(lambda it: it.exception())
    requests = (client.ping(5.0), client.borrow("net-204", "204"), client.drop("net-204", "204"))
    asked = [asyncio.ensure_future(it) for it in requests]
    await asyncio.sleep(0)
    with theirs:
        await _send_all(theirs, pieces, descriptors)
    await _until(lambda: not client._open)
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(outcome, list):
            for sock in outcome:
                sock.close()
        else:
            assert outcome is None or isinstance(outcome, HostRefused), outcome
    assert len(lost) == 1


@contextlib.contextmanager
def _listener() -> Iterator[tuple[socket.socket, Path]]:
    """A unix socket that listens, and its path."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        path = Path(directory, "s")
        listening.bind(str(path))
        listening.listen(1)
        yield listening, path


async def _send_all(sock: socket.socket, pieces: list[bytes], descriptors: int) -> None:
    """Send the pieces, each with so many descriptors of a socket, and give the other end time to receive them."""
    spare, other = socket.socketpair()
    sock.setblocking(False)
    with spare, other, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces[:_PIECES_MAX]:
            with contextlib.suppress(BlockingIOError):
                socket.send_fds(sock, [piece], [spare.fileno()] * descriptors)
            await asyncio.sleep(0)
            await asyncio.sleep(0)


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(_TURNS_MAX):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the event loop runs, and nothing happens")


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def take_agent(data: bytes) -> None:
    """An agent that sends any bytes: the guest process serves, refuses or disconnects. No descriptor stays.

    The first byte: how many descriptors come with each piece.
    """
    given = Bytes(data)
    descriptors = given.number() % 4
    loop()
    before = _open_descriptors()
    run(_served(stream(given), descriptors))
    assert _open_descriptors() == before, "descriptors stay open"


async def _served(pieces: list[bytes], descriptors: int) -> None:
    with _listener() as (listening, path):
        server = GuestServer(loop(), listening, "build")
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(path))
            await _until(lambda: server._agent is not None)
            await _send_all(agent, pieces, descriptors)
        await _until(lambda: server._agent is None)
        loop().remove_reader(listening)
        for it in server.networks.served:
            server.networks.drop(0, (it.scope_id, it.network_id))


# Two messages as they are sent, for the seeds.
GUEST_HELLO = GuestHello(version="1", build="b", pid=1, served=(Served("net-204", "204", 1, (Listener("dhcp"),)),))
SERVE = ServeNetwork(seq=1, network=network(WEB, OTHER), listeners=(Listener("metadata", True),))
