"""The process that closes packet sockets after the agent: the agent waits for none of them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import processes
from kernel.agent_host import wait_until
from kernel.scratch import joined
from netloom.agent.kernel.keeper import TITLE, Keeper, start_keeper
from netloom.agent.kernel.packet_socket import open_packet_socket
from netns import inside

ALL = ((0x06, 0, 0, 0xFFFFFFFF),)


def keepers() -> set[int]:
    """The processes that are keepers now."""
    found = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with_words = directory / "cmdline"
            try:
                if with_words.read_bytes().rstrip(b"\0") == TITLE.replace(b" ", b"\0"):
                    found.add(int(directory.name))
            except OSError:
                continue
    return found


def packet_sockets() -> int:
    """How many packet sockets there are in this thread's namespace."""
    return len(Path("/proc/thread-self/net/packet").read_text().splitlines()) - 1


@pytest.fixture
def link() -> Iterator[str]:
    with joined() as (left, _), inside(left):
        yield "left"


@contextmanager
def kept() -> Iterator[tuple[Keeper, int]]:
    before = keepers()
    keeper = start_keeper()
    wait_until(lambda: keepers() - before)
    (pid,) = keepers() - before
    yield keeper, pid
    keeper.close()
    wait_until(lambda: pid not in keepers())


def test_a_kept_socket_is_open_until_it_is_dropped(link: str) -> None:
    with kept() as (keeper, _):
        opened = open_packet_socket(link, ALL)
        keeper.keep(opened.fileno())
        number = opened.fileno()
        other = open_packet_socket(link, ALL)
        keeper.keep(other.fileno())
        opened.close()
        wait_until(lambda: packet_sockets() == 2)
        keeper.drop(number)
        wait_until(lambda: packet_sockets() == 1)
        assert other.getsockname()[0] == link
        keeper.drop(other.fileno())
        other.close()
        wait_until(lambda: packet_sockets() == 0)


def test_all_are_closed_when_the_agent_has_ended(link: str) -> None:
    with kept() as (keeper, pid):
        opened = [open_packet_socket(link, ALL) for _ in range(3)]
        for it in opened:
            keeper.keep(it.fileno())
            it.close()
        wait_until(lambda: packet_sockets() == 3)
        os.kill(pid, signal.SIGTERM)  # as systemd sends it to all processes of a unit: it goes on
        os.kill(pid, signal.SIGHUP)
        assert packet_sockets() == 3
        keeper.close()
        wait_until(lambda: packet_sockets() == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_keeper_that_does_not_answer_is_given_up(link: str, number: signal.Signals) -> None:
    """The agent goes on, and closes its sockets itself."""
    with kept() as (keeper, pid):
        processes.kill(pid, number)
        opened = open_packet_socket(link, ALL)
        with opened:
            for _ in range(2000):  # more than fit into the socket of one that is stopped
                keeper.keep(opened.fileno())
                keeper.drop(opened.fileno())
        assert not keeper.is_there
        if number == signal.SIGSTOP:
            processes.kill(pid, signal.SIGCONT)
        wait_until(lambda: packet_sockets() == 0)


def test_the_keeper_has_nothing_else_of_the_agent(link: str) -> None:
    reader, writer = os.pipe()
    with kept() as (_, pid):
        os.close(writer)
        assert os.read(reader, 1) == b""  # the keeper does not hold the other end open
        numbers = sorted(int(it.name) for it in Path(f"/proc/{pid}/fd").iterdir())
        assert numbers == [0, 1, 2, 3]
        assert {os.readlink(f"/proc/{pid}/fd/{it}") for it in numbers[:3]} == {"/dev/null"}
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    os.close(reader)


def test_without_a_process_sockets_are_closed_as_usual(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refused)
    keeper = start_keeper()
    monkeypatch.undo()
    with open_packet_socket(link, ALL) as opened:
        assert isinstance(opened, socket.socket)
        keeper.keep(opened.fileno())
        keeper.drop(opened.fileno())
    assert not keeper.is_there
    assert packet_sockets() == 0
