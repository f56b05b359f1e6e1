"""Messages as the kernel lists connections with them."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

from netloom.agent.kernel import conntrack, conntrack_copy
from netloom.agent.kernel.conntrack_copy import Record
from netloom.agent.kernel.netlink import attribute, be16, be32, nested, u8

REPLIED = conntrack.SEEN_REPLY | conntrack.ASSURED | conntrack.CONFIRMED
SRC_NAT, HELPER = conntrack.SRC_NAT, 0x2000
ESTABLISHED, TIME_WAIT = 3, 7
TCP, UDP, ESP, ICMP = 6, 17, 50, 1
GUEST, SERVER, PUBLIC = "10.1.1.11", "192.0.2.10", "203.0.113.20"


def direction(kind: int, protocol: int, source: str, destination: str, sport: int, dport: int) -> bytes:
    at = 1 if "." in source else 3
    addresses = [attribute(at + n, ip_address(it).packed) for n, it in enumerate((source, destination))]
    proto = [u8(1, protocol), *((be16(2, sport), be16(3, dport)) if protocol in (TCP, UDP) else ())]
    return nested(kind, nested(1, *addresses), nested(2, *proto))


def listing(
    protocol: int = TCP,
    *,
    source: str = GUEST,
    destination: str = SERVER,
    translated: str = "",
    status: int = REPLIED,
    state: int = ESTABLISHED,
    scales: tuple[int, int] = (7, 9),
    flags: int = 0x23,
    mark: int = 0,
    timeout_s: int = 432000,
    zone: int = 0,
    sport: int = 40001,
) -> bytes:
    """A connection as the kernel lists it."""
    family = socket.AF_INET if "." in source else socket.AF_INET6
    scaled = (u8(2, scales[0]), u8(3, scales[1]))
    tcp = nested(4, nested(1, u8(1, state), *scaled, attribute(4, bytes((flags, 0))), attribute(5, b"\3\0")))
    return b"".join((
        struct.pack(">BBH", family, 0, 0),
        direction(1, protocol, source, destination, sport, 80),
        direction(2, protocol, destination, translated or source, 80, sport),
        be32(3, status), be32(8, mark), be32(12, 4711), be32(7, timeout_s),
        be16(18, zone) if zone else b"",
        tcp if protocol == TCP else b"",
    ))  # fmt: skip


def record(protocol: int = TCP, **fields: object) -> Record:
    made = conntrack_copy.record_of(listing(protocol, **fields))  # type: ignore[arg-type]
    assert made is not None
    return made
