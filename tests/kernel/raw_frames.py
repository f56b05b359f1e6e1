"""Raw Ethernet frames of a VM on an :class:`AgentHost`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

from kernel.agent_host import AgentHost

VM, VM_MAC = "web", "02:01:00:cc:00:03"


def frame(destination: str, kind: int, payload: bytes) -> bytes:
    return bytes.fromhex(destination) + bytes.fromhex(VM_MAC.replace(":", "")) + struct.pack("!H", kind) + payload


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@contextlib.contextmanager
def wire(host: AgentHost, link: str, namespace: str = "", *, fabric: bool = False) -> Iterator[socket.socket]:
    """A packet socket on a link of the host, of one of its namespaces or of the fabric."""
    place = host.within(namespace) if namespace or fabric else host.inside_host()
    with place:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        opened.bind((link, 3))
    with opened:
        opened.settimeout(0.2)
        yield opened


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Within the block this thread and the programs that it starts use one CPU, which handles what they send."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def send(host: AgentHost, *frames: bytes) -> None:
    with wire(host, "eth0", VM) as it:
        for each in frames:
            it.send(each.ljust(60, b"\0"))


def received(listening: socket.socket) -> Iterator[bytes]:
    """What has arrived, until nothing comes for the socket's time-out; at most ten seconds."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(TimeoutError):
        while time.monotonic() < deadline:
            yield listening.recv(2048)
