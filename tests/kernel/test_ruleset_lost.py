"""Connections whose conntrack entries are lost: each end gets a reset when it sends, and nobody else gets one."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from kernel.ip6_lab import FAR, HOMES, SixLab, tiers
from kernel.lost_connections import Connection, Listener, is_reset, opened
from kernel.raw_frames import checksum, one_cpu
from kernel.ruleset_lab import CLIENT, CLIENT2, NEIGHBOUR, PATIENCE_S, STRANGER, Lab, run
from kernel.vpc_lab import FORWARDED, NAT, STATIC, item
from kernel.vpc_lab import HOMES as HOMES4
from netloom.state import Backend, LbRule
from netns import inside
from unit.scopes import A1, A2, B1, GATEWAY, VM1, VM2, admit, forward, static, wish

BALANCED = 8000
SCOPE = replace(
    wish(
        *(admit(it, "tcp") for it in (A1, A2, B1)),
        held=(A1, A2, B1),
        static=[static(A2, VM2)],
        forwards=[forward(A1, "2200", VM1, "22"), forward(B1, "2201", VM1, "23")],
    ),
    lb_rules={
        "1": LbRule(
            rule_id=1, public_ip=B1.address, public_port=BALANCED, protocol="tcp", algorithm="roundrobin",
            backends=(Backend(ip=VM1, port=80),), network_id="204",
        )
    },
)  # fmt: skip
ALL = (item(1, "allow", "ingress"), item(2, "allow", "egress"))

# Where the client is, where it connects to, where that leads, and the address of the client.
Kind = tuple[str, str, int, Listener, str]
ISOLATED: dict[str, Kind] = {
    "source NAT": ("vm1", STRANGER, 700, Listener("inet", 700, STRANGER), ""),
    "static NAT, from its guest": ("vm2", STRANGER, 701, Listener("inet", 701, STRANGER), ""),
    "static NAT, from outside": ("inet", A2.address, 702, Listener("vm2", 702), CLIENT),
    "a forward of the source-NAT address": ("inet", A1.address, 2200, Listener("vm1", 22), CLIENT),
    "a forward on another exit": ("inet", B1.address, 2201, Listener("vm1", 23), CLIENT),
    "a forward, from a guest": ("vm3", B1.address, 2201, Listener("vm1", 23), ""),
    "a process of the device, from outside": ("inet", B1.address, BALANCED, Listener("dev", BALANCED), CLIENT),
    "a process of the device, to a guest": ("dev", VM1, 80, Listener("vm1", 80), ""),
}
TIERS: dict[str, Kind] = {
    "between tiers": ("a1", HOMES4["b1"], 800, Listener("b1", 800), ""),
    "source NAT": ("b1", STRANGER, 801, Listener("inet", 801, STRANGER), ""),
    "static NAT": ("inet", STATIC, 802, Listener("a2", 802), CLIENT),
    "a forward": ("inet", NAT, FORWARDED, Listener("a1", 22), CLIENT),
    "IPv6 between tiers": ("a1", HOMES["b1"], 803, Listener("b1", 803, "::"), ""),
    "IPv6 to the outside": ("a1", FAR, 804, Listener("inet", 804, FAR), ""),
    "IPv6 from outside": ("inet", HOMES["a2"], 805, Listener("a2", 805, "::"), FAR),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        for vm in ("vm1", "vm2"):
            lab.serve(vm, "tcp", 5000)
        lab.serve("inet", "tcp", 5000, STRANGER)
        yield lab


@pytest.fixture(scope="module")
def vpc_lab() -> Iterator[Lab]:
    with SixLab() as lab:
        yield lab


@contextlib.contextmanager
def all_opened(lab: Lab, kinds: dict[str, Kind]) -> Iterator[dict[str, Connection]]:
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(opened(lab, *kind)) for name, kind in kinds.items()}


def flush(lab: Lab) -> None:
    run("ip", "netns", "exec", lab.ns("dev"), "conntrack", "-F")


def delete_each(lab: Lab) -> None:
    for entry in lab.entries():
        lab.conntrack("-D", *entry.selector())


@pytest.mark.mutation("a-lost-connection-is-reset")
@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("lose", [flush, delete_each])
def test_both_ends_of_a_lost_connection_are_reset(lab: Lab, lose: Callable[[Lab], None], first: str) -> None:
    lab.renew(SCOPE)
    with all_opened(lab, ISOLATED) as connections:
        lose(lab)
        reset = {name: it.ends_are_reset(first) for name, it in connections.items()}
        assert reset == dict.fromkeys(ISOLATED, True)
    # What opens afterwards is not disturbed.
    with all_opened(lab, ISOLATED) as connections:
        assert all(it.works() for it in connections.values())


@pytest.mark.mutation("a-lost-connection-of-the-device-is-reset")
@pytest.mark.parametrize("kind", [it for it in ISOLATED if "process" in it])
def test_a_process_of_the_device_is_reset_although_the_other_end_is_silent(lab: Lab, kind: str) -> None:
    lab.renew(SCOPE)
    with opened(lab, *ISOLATED[kind]) as connection:
        other, own = connection if kind.endswith("outside") else reversed(connection)
        flush(lab)
        # The other end does not answer any more.
        space = ISOLATED[kind][0] if kind.endswith("outside") else "vm1"
        lab.nft(space, "table ip quiet { chain out { type filter hook output priority 0; meta l4proto tcp drop; }; }\n")
        try:
            assert is_reset(own)
        finally:
            lab.nft(space, "delete table ip quiet\n")
        assert is_reset(other)


@pytest.mark.mutation("a-reset-leaves-by-its-exit")
def test_a_reset_leaves_by_the_exit_of_its_address(lab: Lab) -> None:
    """Through the other exit it would not arrive."""
    lab.renew(SCOPE)
    with opened(lab, *ISOLATED["a forward on another exit"]) as connection:
        flush(lab)
        assert is_reset(connection.client)


@pytest.mark.parametrize("first", ["client", "server"])
def test_both_ends_of_a_lost_connection_of_a_tier_are_reset(vpc_lab: Lab, first: str) -> None:
    vpc_lab.renew(tiers(ALL, ALL, both=True))
    with all_opened(vpc_lab, TIERS) as connections:
        flush(vpc_lab)
        reset = {name: it.ends_are_reset(first) for name, it in connections.items()}
        assert reset == dict.fromkeys(TIERS, True)
    with all_opened(vpc_lab, TIERS) as connections:
        assert all(it.works() for it in connections.values())


# ------------------------------------------------------------------------------------------------------ who gets none

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
ETH_P_ALL, ETH_P_IP, SO_RCVBUFFORCE = 3, 0x0800, 33


class Segment(NamedTuple):
    """A TCP segment of no connection. Where it is sent, and its addresses, destination port and flags."""

    space: str
    source: str
    target: str
    port: int
    flags: int = ACK
    to_all: bool = False  # in a broadcast frame
    source_port: int = 40000

    def packet(self) -> bytes:
        addresses = socket.inet_aton(self.source) + socket.inet_aton(self.target)
        head = struct.pack("!HHIIBBHHH", self.source_port, self.port, 1000, 2000, 5 << 4, self.flags, 1024, 0, 0)
        head = head[:16] + struct.pack("!H", checksum(addresses + struct.pack("!HH", 6, 20) + head)) + head[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, 0) + addresses
        return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + head

    def send(self, lab: Lab, sender: socket.socket) -> None:
        """Send it to the device. ``sender``: a packet socket in ``space``."""
        sender.sendto(self.packet(), ("eth0", ETH_P_IP, 0, 0, b"\xff" * 6 if self.to_all else _next_hop(lab, self)))

    @property
    def reset(self) -> tuple[str, str, int]:
        """The reset for this segment: its source, its destination, its source port."""
        return self.target, self.source, self.port


def _next_hop(lab: Lab, it: Segment) -> bytes:
    port = next(port for port in lab.want.ports if port.link == ("gst-204" if it.space.startswith("vm") else "pub-101"))
    return bytes.fromhex(port.mac.replace(":", ""))


def resets(lab: Lab, segments: Iterable[Segment]) -> set[tuple[str, str, int]]:
    """Send these segments; the resets that the device sent by any link. Asserts that all segments arrived.

    The last segment is one that has an answer. One CPU handles all of them in their order.
    """
    sent = list(segments)
    last = Segment("nb", NEIGHBOUR, A1.address, 65000)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_cpu())
        with inside(lab.ns("dev")):
            seen = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)))
            seen.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)  # room for all packets of a flood
        senders = {}
        for space in {it.space for it in (*sent, last)}:
            with inside(lab.ns(space)):
                senders[space] = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        for it in (*sent, last):
            it.send(lab, senders[it.space])
        arrived: set[tuple[str, str, int, int]] = set()
        found: set[tuple[str, str, int]] = set()
        seen.settimeout(PATIENCE_S)
        while last.reset not in found:
            packet, where = seen.recvfrom(2048)
            if where[1] != ETH_P_IP or packet[9] != socket.IPPROTO_TCP:
                continue
            source, target = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
            sport, dport, flags = *struct.unpack_from("!HH", packet, 20), packet[33]
            if where[2] != socket.PACKET_OUTGOING:
                arrived.add((source, target, dport, flags))
            elif flags & RST:
                found.add((source, target, sport))
    assert {(it.source, it.target, it.port, it.flags) for it in sent} <= arrived
    return found - {last.reset}


CLOSED = replace(SCOPE, lb_rules={}, networks=wish(admit(B1, "tcp", "2201", f"{NEIGHBOUR}/32")).networks)


@pytest.mark.mutation("only-addresses-of-guests-answer", instead='f"iifname {PUBLIC_LINKS} goto reset_outside"')
def test_closed_addresses_and_ports_stay_silent(lab: Lab) -> None:
    """Only segments in the middle of a connection have an answer. It does not tell which ports are open."""
    lab.renew(replace(CLOSED, public_ips={it.address: replace(it, vlan="101", exit=1) for it in (A1, A2, B1)}))
    answered = [
        # The addresses with which guests open connections: open and closed ports alike.
        *(Segment("nb", NEIGHBOUR, it.address, port) for it in (A1, A2) for port in (22, 2200, 2201, 45000)),
        *(Segment("nb", NEIGHBOUR, A1.address, 100 + flags, flags) for flags in (FIN | ACK, PSH | ACK, URG | ACK)),
        # A port that is open to this host.
        Segment("nb", NEIGHBOUR, B1.address, 2201),
        Segment("vm1", VM1, STRANGER, 80),
        Segment("vm1", VM1, GATEWAY, 9999),
        Segment("vm1", VM1, B1.address, 2202),
    ]
    silent = [
        *(Segment("nb", NEIGHBOUR, A1.address, 200 + flags, flags) for flags in (0, SYN, FIN, FIN | PSH | URG)),
        *(Segment("nb", NEIGHBOUR, A1.address, 200 + it, it) for it in (SYN | ACK, RST, RST | ACK, SYN | FIN)),
        # No port of this address is open to this host, and only one to the other.
        *(Segment("nb", STRANGER, B1.address, port) for port in (22, 2201, 45000)),
        *(Segment("nb", NEIGHBOUR, B1.address, port) for port in (22, 2202, 45000)),
        # Addresses that are no public ones.
        Segment("nb", NEIGHBOUR, GATEWAY, 53),
        Segment("nb", NEIGHBOUR, VM1, 22),
        Segment("nb", NEIGHBOUR, "127.0.0.1", 22),
        Segment("nb", NEIGHBOUR, "203.0.113.77", 22),
    ]
    assert resets(lab, [*silent, *answered]) == {it.reset for it in answered}


@pytest.mark.mutation("a-reset-goes-to-one-machine")
def test_forged_sources_have_no_answer(lab: Lab) -> None:
    """Sources that the device does not accept on this link, its own addresses, and such that are of no machine."""
    lab.renew(SCOPE)
    of_vm = ("10.9.9.9", STRANGER, A1.address, GATEWAY, "10.1.1.255", "0.0.0.0", "127.0.0.1", "224.0.0.5")
    outside = (VM1, GATEWAY, A1.address, A2.address, "0.0.0.0", "127.0.0.1", "224.0.0.5", "255.255.255.255")
    forged = [Segment("vm1", it, STRANGER, 80) for it in of_vm]
    assert resets(lab, [*forged, *(Segment("nb", it, A1.address, 80) for it in outside)]) == set()


@pytest.mark.mutation("a-broadcast-has-no-answer")
def test_a_broadcast_frame_has_no_answer(lab: Lab) -> None:
    lab.renew(SCOPE)
    sent = [Segment("vm1", VM1, STRANGER, 81), Segment("nb", NEIGHBOUR, A1.address, 81)]
    assert resets(lab, [it._replace(to_all=True) for it in sent]) == set()
    assert resets(lab, sent) == {it.reset for it in sent}


@pytest.mark.mutation("a-broadcast-address-has-no-answer")
def test_a_broadcast_address_has_no_answer(lab: Lab) -> None:
    lab.renew(SCOPE)
    addresses = ("10.1.1.255", "255.255.255.255", "224.0.0.5")
    assert resets(lab, [Segment("vm1", VM1, it, 80) for it in addresses]) == set()


def test_segments_outside_the_window_of_an_open_connection_have_no_answer(lab: Lab) -> None:
    lab.renew(SCOPE)
    with opened(lab, "nb", A1.address, 2200, Listener("vm1", 22)) as connection:
        stray = Segment("nb", NEIGHBOUR, A1.address, 2200, source_port=connection.client.getsockname()[1])
        assert resets(lab, [stray._replace(flags=it) for it in (ACK, PSH | ACK, URG | ACK, 0, FIN)]) == set()
        assert connection.works()


@pytest.mark.mutation("resets-have-a-rate", instead="[_RESET]")
def test_resets_to_one_outside_address_have_a_rate_of_their_own(lab: Lab) -> None:
    lab.renew(SCOPE)
    began = time.monotonic()
    found = resets(lab, (Segment("nb", CLIENT2, A1.address, 1000 + it) for it in range(6000)))
    to_client = sum(target == CLIENT2 for _, target, _ in found)
    assert 1 <= to_client <= 500 + 200 * (time.monotonic() - began) + 1
