"""The connection between two hosts when one of them, or the network between them, does nothing; and under a flood."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kernel import pair_host
from kernel.rtnetlink import add_address
from kernel.scratch import joined, readable, tool
from netloom.agent.kernel import links
from netloom.agent.standby.pair_listener import NEWCOMERS_MAX

PORT = 7788
IP4, IP6 = ("10.9.0.1", "10.9.0.2"), ("fd09::1", "fd09::2")  # what kernel.scratch.joined makes
STRANGER = "10.9.0.3"
PATIENTLY_S = 30.0

# Connects from an address again and again, as fast as it can, until its input ends.
FLOOD = """
import collections, select, socket, sys
kept = collections.deque()
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(500):
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((sys.argv[1], 0))
        try:
            sock.connect((sys.argv[2], int(sys.argv[3])))
        except BlockingIOError:
            kept.append(sock)
        if len(kept) > 500:
            kept.popleft().close()
    print("flooding", flush=True)
"""


class Host:
    """A program in a namespace that prints what happens to it."""

    def __init__(self, namespace: str, *argv: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, *argv],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        self._unread = b""

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENTLY_S
        while b"\n" not in self._unread:
            assert readable(self.process.stdout, deadline - time.monotonic()), "nothing happened"
            self._unread += os.read(self.process.stdout.fileno(), 1 << 16)
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n".encode())
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Two:
    """Two hosts with a cable between them."""

    def __init__(self, started: contextlib.ExitStack, namespaces: tuple[str, str]) -> None:
        self._started = started
        self.left, self.right = namespaces

    def start(self, namespace: str, *argv: str) -> Host:
        host = Host(namespace, *argv)
        self._started.callback(host.end)
        return host

    def host(self, name: str, addresses: tuple[str, str] = IP4) -> Host:
        namespace = self.left if name == "kvm1" else self.right
        return self.start(namespace, pair_host.__file__, name, *addresses, str(PORT))

    def connected(self, addresses: tuple[str, str] = IP4) -> tuple[Host, Host]:
        first, second = self.host("kvm1", addresses), self.host("kvm2", addresses)
        assert first.line() == second.line() == "connected"
        return first, second


@pytest.fixture
def two() -> Iterator[Two]:
    with joined() as namespaces, contextlib.ExitStack() as started:
        yield Two(started, namespaces)


def talk(first: Host, second: Host) -> None:
    """Both hear what the other one says."""
    first.say("question")
    assert second.line() == "question"
    second.say("answer")
    assert first.line() == "answer"


@pytest.mark.parametrize("addresses", [IP4, IP6], ids=["IPv4", "IPv6"])
def test_a_host_that_is_frozen_is_noticed_and_found_again(two: Two, addresses: tuple[str, str]) -> None:
    first, second = two.connected(addresses)
    for frozen, other in ((second, first), (first, second)):
        frozen.process.send_signal(signal.SIGSTOP)
        assert other.line() == "lost"
        frozen.process.send_signal(signal.SIGCONT)
        assert [frozen.line(), frozen.line(), other.line()] == ["lost", "connected", "connected"]
        talk(first, second)


def test_hosts_that_are_cut_off_notice_it_and_connect_when_the_network_is_back(two: Two) -> None:
    first, second = two.connected()
    links.change(two.left, [links.set_down("left")])
    assert first.line() == second.line() == "lost"
    links.change(two.left, [links.set_up("left")])
    assert first.line() == second.line() == "connected"
    talk(first, second)


@pytest.mark.long
@pytest.mark.parametrize("deaf", ["kvm1", "kvm2"])
def test_both_hosts_notice_when_one_of_them_hears_nothing(two: Two, deaf: str) -> None:
    first, second = two.connected()
    namespace = two.left if deaf == "kvm1" else two.right
    tool(namespace, "nft", "table ip cut { chain heard { type filter hook input priority 0; policy drop; }; }")
    assert first.line() == second.line() == "lost"
    tool(namespace, "nft", "delete table ip cut")
    assert first.line() == second.line() == "connected"
    talk(first, second)


@pytest.mark.parametrize("name", ["kvm1", "kvm2"])
def test_a_host_that_was_killed_comes_back(two: Two, name: str) -> None:
    first, second = two.connected()
    (second if name == "kvm2" else first).end()
    other = first if name == "kvm2" else second
    assert other.line() == "lost"
    back = two.host(name)
    assert back.line() == other.line() == "connected"
    talk(back, other)


def test_a_flood_of_connections_does_not_keep_the_other_host_out(two: Two) -> None:
    links.change(two.right, [add_address("right", f"{STRANGER}/24")])
    first, second = two.connected()
    second.end()
    assert first.line() == "lost"
    open_before = len(os.listdir(f"/proc/{first.process.pid}/fd"))
    flood = two.start(two.right, "-c", FLOOD, STRANGER, IP4[0], str(PORT))
    for _ in range(20):
        assert flood.line() == "flooding"
    for _ in range(3):
        second = two.host("kvm2")
        assert second.line() == first.line() == "connected"
        assert len(os.listdir(f"/proc/{first.process.pid}/fd")) <= open_before + NEWCOMERS_MAX + 2
        second.end()
        assert first.line() == "lost"
    assert flood.process.poll() is None
