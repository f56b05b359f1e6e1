"""Frames to, from and past the ports of one scope, the golden scenario ip6, and what sees them."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Self

from kernel.agent_host import AgentHost, wait_until
from kernel.raw_frames import checksum, received, wire

NS, GUEST, PUBLIC = "cs-net-520", "gst-520", "pub-101"
GUEST_MAC, PUBLIC_MAC = "0a:97:3e:a2:e0:51", "0a:1a:27:c8:5b:f9"
GATEWAY, ADDRESS, GATEWAY6 = "10.50.1.1", "203.0.113.20", "2001:db8:50:1::1"
PORTS = {GUEST: GUEST_MAC, PUBLIC: PUBLIC_MAC}
ENDS = ["vnetg520", "vnetpn520.101"]
BRIDGES = {GUEST: "breth1-1520", PUBLIC: "breth1-101"}
FABRIC = {GUEST: "sw-eth1.1520", PUBLIC: "sw-eth1.101"}

VM_MAC, FAR_MAC = "02:01:00:cc:00:03", "02:00:00:00:00:77"
ARP, IP, TEST, LOGIN = 0x0806, 0x0800, 0x88B6, 0x888E  # 0x88b6: for experiments (IEEE 802); 0x888e: 802.1X
EVERYBODY, ALL_NODES, LACP, LLDP = "ff" * 6, "333300000001", "0180c2000003", "0180c200000e"
NOBODY = "020000000099"  # a bridge floods frames to it


def frame(destination: str, source: str, kind: int, payload: bytes = b"") -> bytes:
    head = bytes.fromhex(destination) + bytes.fromhex(source.replace(":", "")) + struct.pack("!H", kind)
    return (head + payload).ljust(60, b"\0")


def arp_request(source: str, sender: str, target: str) -> bytes:
    mac = bytes.fromhex(source.replace(":", ""))
    ends = mac + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)
    return frame(EVERYBODY, source, ARP, struct.pack("!HHBBH", 1, IP, 6, 4, 1) + ends)


def of(source: str, frames: list[bytes]) -> list[bytes]:
    return [it for it in frames if it[6:12].hex(":") == source]


@contextlib.contextmanager
def taps(host: AgentHost, *places: tuple[str, str]) -> Iterator[list[socket.socket]]:
    """Packet sockets on links: in a namespace of the host, on the host (``-``), or in the fabric (empty)."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(wire(host, link, "" if it == "-" else it, fabric=not it)) for it, link in places]


def heard(tap: socket.socket) -> list[bytes]:
    return list(received(tap))


def broadcast_packet() -> bytes:
    """An empty UDP packet over IPv4 to 255.255.255.255."""
    ends = socket.inet_aton("10.50.1.1") + b"\xff" * 4
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0)
    return head[:10] + struct.pack("!H", checksum(head + ends)) + ends + struct.pack("!HHHH", 9, 9, 8, 0)


def learned(host: AgentHost, link: str) -> bool:
    """Whether the bridge of the port has learned its MAC address."""
    entries = json.loads(host.run("bridge", "-j", "fdb", "show", "br", BRIDGES[link]))
    return any(it["mac"] == PORTS[link] for it in entries)


class Traffic:
    """What passes the ports of the scope when everybody sends all kinds of frames."""

    def __init__(self, host: AgentHost) -> None:
        self.out: dict[str, list[bytes]] = {}
        self.into: dict[str, list[bytes]] = {}
        with taps(host, ("", FABRIC[GUEST]), ("", FABRIC[PUBLIC]), ("vm", "eth0"), (NS, GUEST), (NS, PUBLIC)) as open_:
            far_guest, far_public, vm, guest, public = open_
            for link, mine in ((GUEST, guest), (PUBLIC, public)):
                mine.send(arp_request(PORTS[link], "0.0.0.0", "10.50.1.77"))
                for destination in (EVERYBODY, ALL_NODES, LACP, LLDP, NOBODY):
                    mine.send(frame(destination, PORTS[link], TEST))
                mine.send(frame(EVERYBODY, PORTS[link], IP, broadcast_packet()))
            # What the kernel of the namespace sends itself: ARP, neighbour discovery, MLD.
            pings = (f"ping -W1 {it} &" for it in ("-c1 10.50.1.77", "-c1 203.0.113.1", f"-6 -c1 ff02::1%{GUEST}"))
            host.run("sh", "-c", f"{' '.join(pings)} wait", namespace=NS)
            for tap, source, sender, target in (
                (vm, VM_MAC, "10.50.1.5", GATEWAY),
                (far_guest, FAR_MAC, "10.50.1.6", GATEWAY),
                (far_public, FAR_MAC, "203.0.113.1", ADDRESS),
            ):
                tap.send(arp_request(source, sender, target))
                for destination in (EVERYBODY, ALL_NODES, NOBODY, *(it.replace(":", "") for it in PORTS.values())):
                    tap.send(frame(destination, source, TEST))
            for name, tap in (("wire", far_guest), ("public wire", far_public), ("vm", vm)):
                self.out[name] = [it for it in heard(tap) if it[6:12].hex(":") in PORTS.values()]
            for name, tap in ((GUEST, guest), (PUBLIC, public)):
                self.into[name] = [it for it in heard(tap) if it[6:12].hex(":") in (VM_MAC, FAR_MAC)]

    @property
    def none(self) -> bool:
        return not any((*self.out.values(), *self.into.values()))

    def kinds(self, place: str) -> set[str]:
        return {it[12:14].hex() for it in self.out[place]}


def sent_numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(it[14:18], "big") for it in of(PUBLIC_MAC, frames) if it[12:14] == b"\x88\xb6"]


class Stream:
    """Numbered broadcasts of the public port, about one each millisecond, within the block; ``sent`` counts them."""

    def __init__(self, tap: socket.socket) -> None:
        self._tap = tap
        self._stopped = threading.Event()
        self.sent = 0
        self.sent_at: list[float] = []  # by number, ``time.monotonic`` before it was sent
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.001):
            self.sent_at.append(time.monotonic())
            self._tap.send(frame(EVERYBODY, PUBLIC_MAC, TEST, self.sent.to_bytes(4, "big")))
            self.sent += 1

    def pass_on(self, frames: int = 20) -> None:
        """Wait until so many more are sent."""
        until = self.sent + frames
        wait_until(lambda: self.sent >= until)
