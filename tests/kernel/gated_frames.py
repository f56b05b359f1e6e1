"""Frames to, from and past the ports of one scope, the golden scenario ip6, and sockets that see them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from kernel.agent_host import AgentHost
from kernel.raw_frames import received, wire

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
