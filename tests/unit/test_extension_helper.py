"""The resident helper and its local clients: their number, size, time and memory are bounded."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netloom.extension import helper
from netloom.extension.helper import CLIENTS_MAX, Helper, HelperCall
from netloom.extension.helper_client import ANSWER, BEAT, DOING, pack, socket_name, unpack

MAIN = Path(__file__).resolve().parents[2] / "cmd" / "netloom" / "main.py"
LIMIT_S = 60.0


def request(payload: bytes, command: bytes = b"nonsense", directory: str = "/nowhere") -> bytes:
    """``directory``: where the call writes its log."""
    settings = [f"NETLOOM_DIR={directory}".encode()]
    return pack(command, b"/x", b"id", f"30 {time.monotonic()}".encode(), *settings, b"", payload)


class Resident:
    """A helper in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "helper.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(100)
            os.rename(self.path, directory / socket_name())
            self.path = str(directory / socket_name())
            descriptor = os.open(directory, os.O_RDONLY)
            as_started = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"
            self.process = subprocess.Popen(
                [sys.executable, "-c", as_started, str(descriptor), sys.executable, str(MAIN), "helper"],
                stdin=listener.fileno(),
                pass_fds=(descriptor,),
                env={"NETLOOM_DIR": str(directory), "NETLOOM_HELPER": "600"},
            )
            os.close(descriptor)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(LIMIT_S)
        client.connect(self.path)
        return client

    def ask(self, payload: bytes) -> tuple[int, str]:
        """The status and the error of a call."""
        with self.connect() as client:
            client.sendall(request(payload, b"prepare-nic", os.path.dirname(self.path)))
            return answered(client)

    def peak_mib(self) -> int:
        """The most memory that the process has had (VmHWM, proc(5))."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def answered(client: socket.socket) -> tuple[int, str]:
    with client.makefile("rb") as stream:
        while head := stream.read(4):
            kind, *fields = unpack(stream.read(int.from_bytes(head, "big")))
            assert kind in (BEAT, DOING, ANSWER)
            if kind == ANSWER:
                return int(fields[0]), fields[2].decode()
    raise AssertionError("no answer")


@pytest.fixture
def resident() -> Iterator[Resident]:
    with tempfile.TemporaryDirectory() as directory:
        it = Resident(Path(directory))
        yield it
        it.process.kill()
        it.process.wait()


@pytest.mark.mutation("a-request-is-bounded")
def test_hostile_requests_take_no_memory_and_stop_no_call(resident: Resident) -> None:
    """The lengths claim a gigabyte each, and the payloads have a million objects, keys and levels."""
    assert resident.ask(b"{}")[0] == 1
    before = resident.peak_mib()
    silent = [resident.connect() for _ in range(20)]
    for at, client in enumerate(silent):
        client.sendall((0x3FFFFFFF).to_bytes(4, "big") + b"x" * at)
    for garbage in (
        b"\xff" * 4,
        b"\0\0\0\0",
        pack(b"a"),
        pack(b"a", b"b", b"\xff", b"x y", b"", b""),
        request(b"")[:-2] * 2,
    ):
        with resident.connect() as client:
            client.sendall(garbage)
    with resident.connect() as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(b"\xff" * 4 + b"x" * (64 << 20))
    payloads = [
        b"{}" * 7_500_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"payload":[' + b"{}," * 1_000_000 + b"{}]}",
        b'{"payload":"' + b'\\"' * 2_000_000 + b"[" * 500_001,
        b'{"payload":' + b"9" * 15_000_000 + b"}",
        b"{" + b",".join(b'"k%d":1' % n for n in range(500_000)) + b"}",
        b'{"payload":"' + b"x" * 15_000_000 + b'"}',
    ]
    for payload in payloads:
        status, error = resident.ask(payload)
        assert status == 1, error[:200]
        assert len(error) < 2100
    assert resident.peak_mib() - before < 256
    for client in silent:
        client.close()
    assert resident.ask(b"{}")[0] == 1


def run_clients(clients: int, *, hears: int) -> None:
    """Connect silent clients to a helper in this process, and expect that ``hears`` of them stay connected."""

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{directory}/s")
            served = Helper.__new__(Helper)
            served.calls = set()
            server = await asyncio.get_running_loop().create_unix_server(lambda: HelperCall(served), sock=listener)
            streams = [await asyncio.open_unix_connection(f"{directory}/s") for _ in range(clients)]
            ends = time.monotonic() + 20
            while len(served.calls) != hears:
                assert time.monotonic() < ends
                served.pool = asyncio.create_task(asyncio.sleep(3600))  # type: ignore[arg-type]
                await served._beat()
                served.pool.cancel()
            for _, writer in streams:
                writer.close()
            server.close()

    asyncio.run(serve())


@pytest.mark.mutation("the-number-of-clients-is-bounded")
def test_the_number_of_clients_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CLIENTS_MAX >= 256
    monkeypatch.setattr(helper, "CLIENTS_MAX", 3)
    run_clients(5, hears=3)


@pytest.mark.mutation("a-silent-client-leaves")
def test_a_silent_client_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "REQUEST_S_MAX", 0.1)
    run_clients(5, hears=0)
