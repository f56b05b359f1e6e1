"""Answers that VMs do not receive: the memory that they take is bounded, and other VMs get theirs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from guestbed import SERVER as DEVICE
from guestbed import Segment, guest_process, network, nic, segment
from kernel.agent_host import wait_until
from netloom.guest import limits
from netloom.guest.serve import Networks
from netloom.guestwire import GuestNetwork, Listener, ServeNetwork
from netloom.secret import Secret
from netns import inside

MB = 1 << 20


def private_bytes(pid: int) -> int:
    """The private memory of the process (proc(5), /proc/<pid>/status: RssAnon in kB)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def ask(client: socket.socket, path: str = "/latest/user-data") -> bytes:
    """Send a request, and receive no more than the beginning of its answer."""
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client.recv(64)


@pytest.mark.mutation("freed-answers-are-returned")
@pytest.mark.mutation("equal-answers-share-their-memory", instead="(bytes(bytearray(body)), 0)")
def test_eight_unread_answers_of_15_mb_take_the_memory_of_one() -> None:
    big = nic(49, user_data=Secret("x" * 15 * MB))
    with guest_process() as process, segment() as on:
        agent = process.connect()
        assert agent.serve(network(big), on.sockets()).error == ""
        vm = on.vm(big, ip=big.ip)
        clients = [connected(on, vm) for _ in range(8)]
        assert ask(clients[0]).startswith(b"HTTP/1.1 200")
        before = private_bytes(agent.hello.pid)
        for client in clients[1:]:
            assert ask(client).startswith(b"HTTP/1.1 200")
        # There is one more while an answer is made.
        assert private_bytes(agent.hello.pid) - before < 20 * MB
        for client in clients:
            client.close()
        wait_until(lambda: private_bytes(agent.hello.pid) < before - 10 * MB)


def connected(on: Segment, vm: str) -> socket.socket:
    with inside(vm):
        client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((DEVICE, 80))
    return client


class Served:
    """Networks with one metadata service each, in this process, on loopback."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.networks = Networks(loop, lambda message: None)
        self.ports: dict[str, int] = {}

    def serve(self, network_id: str, **user_data: int) -> None:
        """Serve a network, whose VMs have the addresses 127.0.0.<number> and user data of so many bytes."""
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.ports[network_id] = listener.getsockname()[1]
        nics = tuple(
            nic(int(name[2:]), ip=f"127.0.0.{name[2:]}", user_data=Secret(name[2:].zfill(3) * (size // 3)))
            for name, size in user_data.items()
        )
        table = GuestNetwork(
            scope_id=f"net-{network_id}",
            network_id=network_id,
            revision=1,
            server_ip="127.0.0.1",
            nics=nics,
        )
        request = ServeNetwork(seq=1, network=table, listeners=(Listener("metadata", macs_checked=True),))
        assert self.networks.serve(request, [listener.detach()]).error == ""

    async def ask(self, network_id: str, vm: int) -> tuple[socket.socket, bytes]:
        """The connection of a VM that reads only the first bytes of its answer, and these bytes."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.bind((f"127.0.0.{vm}", 0))
        client.setblocking(False)
        await self.loop.sock_connect(client, ("127.0.0.1", self.ports[network_id]))
        await self.loop.sock_sendall(client, b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(30):
            return client, await self.loop.sock_recv(client, 12)

    async def whole(self, client: socket.socket, size: int = MB) -> bool:
        """Whether the rest of an answer with a body of ``size`` bytes arrives."""
        received = 0
        try:
            async with asyncio.timeout(30):
                while data := await self.loop.sock_recv(client, 65536):
                    received += len(data)
        except ConnectionResetError:
            pass
        return received > size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NETWORK_UNREAD_BYTES_MAX", 3 * MB)
    monkeypatch.setattr(limits, "UNREAD_BYTES_MAX", 5 * MB)


OK, BUSY = b"HTTP/1.1 200", b"HTTP/1.1 503"


def run(scenario: Callable[[Served], Coroutine[None, None, None]]) -> None:
    async def go() -> None:
        await scenario(Served(asyncio.get_running_loop()))

    asyncio.run(go())


@pytest.mark.usefixtures("small")
@pytest.mark.mutation("unread-of-a-network")
@pytest.mark.mutation("a-sent-answer-is-released")
def test_unread_answers_of_a_network_are_bounded_and_later_ones_wait() -> None:
    async def scenario(it: Served) -> None:
        it.serve("1", vm2=MB, vm3=MB, vm4=MB, vm5=MB)
        asked = [await it.ask("1", vm) for vm in (2, 3, 4, 5)]
        assert [said for _, said in asked] == [OK, OK, OK, BUSY]
        assert await it.whole(asked[0][0])
        client, said = await it.ask("1", 5)
        assert said == OK
        assert await it.whole(client)

    run(scenario)


@pytest.mark.usefixtures("small")
@pytest.mark.mutation("unread-of-all-networks")
def test_the_network_with_most_unread_answers_makes_room_for_another_one() -> None:
    async def scenario(it: Served) -> None:
        it.serve("1", vm2=MB, vm3=MB, vm4=MB)
        it.serve("2", vm5=MB, vm6=MB)
        it.serve("3", vm7=MB)
        asked = [await it.ask("1", vm) for vm in (2, 3, 4)]
        others = [await it.ask("2", vm) for vm in (5, 6)]
        last, said = await it.ask("3", 7)
        assert {said, *(said for _, said in (*asked, *others))} == {OK}
        assert await it.whole(last)
        for client, _ in (*others, asked[1], asked[2]):
            assert await it.whole(client)
        assert not await it.whole(asked[0][0])  # the oldest one of network 1

    run(scenario)


@pytest.mark.usefixtures("small")
def test_the_vm_with_most_unread_answers_makes_room_for_another_one() -> None:
    async def scenario(it: Served) -> None:
        it.serve("1", vm2=3 * MB, vm3=MB)
        large, _ = await it.ask("1", 2)
        client, said = await it.ask("1", 3)
        assert said == OK
        assert await it.whole(client)
        assert not await it.whole(large, 3 * MB)

    run(scenario)
