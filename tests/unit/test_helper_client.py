"""The client of the helper: whose helper it asks, and how it continues a call that the door in C has begun."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netloom.extension.call import Ending, _take_over
from netloom.extension.deadline import Deadline
from netloom.extension.helper_client import ANSWER, _connect, ask_helper, inode, pack, socket_name, unpack
from netloom.extension.record import CallRecord
from netloom.fastos import os as os_of_a_call


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """The directory of the helper's socket, which another process listens on."""
    path = tmp_path / "netloom"
    path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def listener(directory: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(f"/proc/self/fd/{directory}/{socket_name()}")
        it.listen(10)
        it.settimeout(20)
        yield it


@pytest.mark.mutation("a-helper-is-our-own")
def test_a_helper_of_another_user_is_not_asked(
    directory: int, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _connect(directory)
    assert own is not None
    own.close()
    monkeypatch.setattr(os_of_a_call, "geteuid", lambda: os.getuid() + 1)
    assert _connect(directory) is None


def ask(directory: int, *failed: str) -> tuple[int, str, str] | None:
    environ = {"NETLOOM_DIR": os.readlink(f"/proc/self/fd/{directory}")}
    record = CallRecord(time.monotonic())
    return ask_helper("implement-network", "x/y.sh", b"{}", Deadline(60, record.started), record, environ, failed)


def test_a_helper_that_has_died_is_asked_again(
    directory: int, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the first attempt, which the door in C has made."""
    requests = []

    def serve() -> None:
        for reply in (b"", pack(ANSWER, b"0", b"out", b"")):
            client, _ = listener.accept()
            with client, client.makefile("rb") as stream:
                requests.append(unpack(stream.read(int.from_bytes(stream.read(4), "big"))))
                client.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert ask(directory, "broken") == (0, "out", "")
    thread.join()
    assert pauses == [0.02, 0.2]
    assert [request[1].decode() for request in requests] == [os.path.abspath("x/y.sh")] * 2


def test_the_socket_of_a_hung_helper_is_removed(directory: int, listener: socket.socket) -> None:
    found = inode(directory)
    assert ask(directory, "hung", str(found + 1)) is None  # another call has replaced it meanwhile
    assert inode(directory) == found
    assert ask(directory, "hung", str(found)) is None
    assert inode(directory) == 0


class _Ended(Exception):
    """The arguments of ``Ending.end``."""


class _Ending(Ending):
    def __init__(self) -> None:
        self.record = CallRecord(1.0)

    def end(self, status: int, *, output: str = "", error: str = "", logged: bool = False) -> None:  # type: ignore[override]
        raise _Ended(status, output, error, logged)


@pytest.mark.parametrize(
    ("told", "failed"), [("broken", ("broken",)), ("hung 17", ("hung", "17")), ("hung 0", ("hung", "0"))]
)
def test_a_begun_call_keeps_its_id_and_its_start(told: str, failed: tuple[str, ...]) -> None:
    ending = _Ending()
    assert _take_over(f"{'ab' * 16} 12.5 {told}", ending) == failed
    assert (ending.record.call_id, ending.record.started) == ("ab" * 16, 12.5)


@pytest.mark.parametrize(
    ("told", "ended"),
    [
        ("output 0 a b\n", (0, "a b\n", "", True)),
        ("error 2 h1: no SSH", (2, "", "h1: no SSH", True)),
        ("error 1 x", (1, "", "x", True)),
    ],
)
def test_a_complete_answer_of_the_helper_is_printed(told: str, ended: tuple[int, str, str, bool]) -> None:
    with pytest.raises(_Ended) as raised:
        _take_over(f"{'ab' * 16} 12.5 {told}", _Ending())
    assert raised.value.args == ended


def test_a_call_that_nobody_has_begun_is_new() -> None:
    ending = _Ending()
    call_id = ending.record.call_id
    assert _take_over("", ending) == ()
    assert (ending.record.call_id, ending.record.started) == (call_id, 1.0)
