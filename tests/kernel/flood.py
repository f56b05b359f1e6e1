"""A stream of new UDP flows through the lab's device, with counts of the datagrams that arrived."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from kernel.ruleset_lab import PATIENCE_S, QUIET_S, Lab, Nft
from netloom.render import ruleset
from netloom.render.ruleset import Ruleset

# Sends datagrams to two ports, 2,000 a second to each, until its input ends; prints their number. Prints a line when
# 1,000 are sent. Uses 12,000 ports again and again: a long flood must not fill the kernel's connection tracking.
FLOOD = """
import select, socket, sys, time
sources, target, allowed, forbidden = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sent, port, began = 0, 10000, time.monotonic()
family = socket.AF_INET6 if ":" in target else socket.AF_INET
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(20):
        flow = socket.socket(family, socket.SOCK_DGRAM)
        flow.bind((sources[sent // 12000 % len(sources)], port + sent % 12000))
        number = sent.to_bytes(4, "big")
        flow.sendto(number, (target, allowed))
        flow.sendto(number, (target, forbidden))
        flow.close()
        sent += 1
        if sent == 1000:
            print("enough", flush=True)
    time.sleep(max(0, began + sent / 2000 - time.monotonic()))
print(sent)
"""


class Flood:
    """New flows from one namespace to an allowed port (6000) and a forbidden one (6001), counted at the receiver.

    ``at`` is the receiver's namespace and address. ``seen_as`` is the source address that it has to see.
    """

    def __init__(self, lab: Lab, space: str, source: str, target: str, at: tuple[str, str], seen_as: str) -> None:
        self._seen_as = seen_as
        self._ears = [self._ear(lab, *at, port) for port in (6000, 6001)]
        self._resolve(lab, space, source, target)
        self._sender = subprocess.Popen(
            ["ip", "netns", "exec", lab.ns(space), sys.executable, "-c", FLOOD, source, target, "6000", "6001"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @staticmethod
    def _ear(lab: Lab, space: str, address: str, port: int) -> socket.socket:
        ear = lab.open_socket(space, socket.SOCK_DGRAM, address=address)
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE: read only once the flood is over
        ear.bind((address, port))
        return ear

    def _resolve(self, lab: Lab, space: str, source: str, target: str) -> None:
        """Send datagrams until one arrives: then all neighbours are resolved, so that the flood loses nothing."""
        until = time.monotonic() + PATIENCE_S
        with lab.open_socket(space, socket.SOCK_DGRAM, address=target) as warm:
            warm.bind((source, 0))
            warm.sendto(b"", (target, 6000))
            while not _has_data(self._ears[0], QUIET_S):
                assert time.monotonic() < until, f"{target} is not reached"
                warm.sendto(b"", (target, 6000))

    def has_sent_enough(self) -> bool:
        """Whether the sender has sent 1,000 datagrams to each port. It starts later on a busy machine."""
        assert self._sender.stdout is not None
        return _has_data(self._sender.stdout, 0)

    def finish(self) -> Result:
        sent = int(self._sender.communicate("stop\n", timeout=60)[0].split()[-1])
        ear, closed = self._ears
        allowed, until = self._heard(ear), time.monotonic() + PATIENCE_S
        while len({number for number, _ in allowed}) < sent and time.monotonic() < until:
            time.sleep(0.02)
            allowed += self._heard(ear)
        time.sleep(QUIET_S)
        allowed, forbidden = allowed + self._heard(ear), self._heard(closed)
        return Result(
            sent,
            lost=sent - len({number for number, _ in allowed}),
            let_in=len(forbidden),
            strange=sum(peer != self._seen_as for _, peer in allowed),
        )

    def stop(self) -> None:
        if self._sender.poll() is None:
            self._sender.kill()
            self._sender.communicate()
        for it in self._ears:
            it.close()

    @staticmethod
    def _heard(ear: socket.socket) -> list[tuple[bytes, str]]:
        ear.setblocking(False)
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                number, peer = ear.recvfrom(10)
                if number:
                    heard.append((number, peer[0]))
        return heard


def swaps(device: Nft, tables: Sequence[Ruleset], floods: Sequence[Flood], at_least: int) -> Iterator[Ruleset]:
    """Swap the device's table for the next of ``tables`` until all floods have sent enough; yields what it then has.

    The device has ``tables[0]`` at first.
    """
    have, made, until = tables[0], 0, time.monotonic() + 60
    while made < at_least or not all(it.has_sent_enough() for it in floods):
        assert time.monotonic() < until, made
        made += 1
        want = tables[made % len(tables)]
        device.load(ruleset.swap(have, want))
        have = want
        yield have


def _has_data(file: socket.socket | IO[str], patience_s: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(patience_s * 1000))


class Result(NamedTuple):
    sent: int
    lost: int  # allowed, but did not arrive
    let_in: int  # forbidden, but arrived
    strange: int  # arrived from another address than expected
