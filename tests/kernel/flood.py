"""A stream of new UDP flows through the lab's device, with counts of the datagrams that arrived."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from kernel.ruleset_lab import Lab

# Sends datagrams of new flows to two ports, 2,000 per second, until its input ends; prints their number.
FLOOD = """
import select, socket, sys, time
sources, target, allowed, forbidden = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sent, port, began = 0, 10000, time.monotonic()
family = socket.AF_INET6 if ":" in target else socket.AF_INET
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(20):
        flow = socket.socket(family, socket.SOCK_DGRAM)
        flow.bind((sources[sent // 50000 % len(sources)], port + sent % 50000))
        number = sent.to_bytes(4, "big")
        flow.sendto(number, (target, allowed))
        flow.sendto(number, (target, forbidden))
        flow.close()
        sent += 1
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

    def finish(self) -> Result:
        sent = int(self._sender.communicate("stop\n", timeout=60)[0])
        allowed = self._heard(self._ears[0])
        until = time.monotonic() + 5
        while len({number for number, _ in allowed}) < sent and time.monotonic() < until:
            time.sleep(0.02)
            allowed += self._heard(self._ears[0])
        forbidden = self._heard(self._ears[1])
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
                heard.append((number, peer[0]))
        return heard


class Result(NamedTuple):
    sent: int
    lost: int  # allowed, but did not arrive
    let_in: int  # forbidden, but arrived
    strange: int  # arrived from another address than expected
