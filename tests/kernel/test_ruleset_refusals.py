"""Own guests of the device learn at once that a port of it is closed; other machines learn nothing."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, Lab, Try, run
from kernel.vpc_lab import GATEWAYS, HOMES, OTHER, VpcLab, item, vpc
from netloom.state import Nic
from unit.scopes import A1, A2, GATEWAY, admit, wish

CLOSED = 4444
OWN = "10.1.1.2"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def vpc_lab() -> Iterator[Lab]:
    with VpcLab() as lab:
        yield lab


def both(space: str, target: str, source: str = "") -> tuple[Try, Try]:
    return Try(space, "tcp", target, CLOSED, source), Try(space, "udp", target, CLOSED, source)


@pytest.mark.mutation("a-closed-port-of-the-device-is-refused", instead='f"{packets} meta l4proto tcp drop"')
def test_closed_ports_of_the_device_are_refused_to_its_guests_only(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "all"), held=(A1, A2)))
    guest = [*both("vm1", GATEWAY), *both("vm1", A1.address)]
    assert lab.ask(guest) == ["refused"] * len(guest)
    lab.silent(
        *both("inet", A1.address, CLIENT), *both("nb", A1.address), *both("nb", GATEWAY),
        # The firewall of the address drops what no rule allows, whoever sends it.
        *both("inet", A2.address, CLIENT), *both("vm1", A2.address),
    )  # fmt: skip
    assert not [it for it in lab.entries() if it.dport == CLOSED]


@pytest.mark.mutation("refusals-of-udp-are-limited", instead='""')
def test_refusals_of_udp_are_limited(lab: Lab) -> None:
    """The kernel alone would send six to each address of a NIC (``icmp_ratelimit``)."""
    addresses = [f"10.1.1.{100 + at}" for at in range(10)]
    nics = [Nic(mac=f"02:01:00:cc:00:{at:02x}", ip=address) for at, address in enumerate(addresses)]
    scope = wish()
    lab.renew(replace(scope, networks={"204": replace(scope.networks["204"], nics={it.key: it for it in nics})}))
    lab.ip("vm2", *(f"addr add {it}/24 dev eth0" for it in addresses))
    try:
        tries = [Try("vm2", "udp", GATEWAY, 5000 + at, address) for at in range(10) for address in addresses]
        began = time.monotonic()
        refused = lab.ask(tries, 1.0).count("refused")
        assert 10 <= refused <= 15 + 5 * (time.monotonic() - began)
        many = [Try("vm2", "tcp", GATEWAY, 5000 + at) for at in range(200)]
        assert lab.ask(many) == ["refused"] * len(many)
    finally:
        lab.ip("vm2", *(f"addr del {it}/24 dev eth0" for it in addresses))


def test_closed_ports_of_a_plain_network_are_refused(lab: Lab) -> None:
    scope = wish(held=())
    plain = replace(scope.networks["204"], guest_type="shared", extension_ip=OWN)
    lab.renew(replace(scope, networks={"204": plain}))
    assert lab.ask(both("vm1", OWN)) == ["refused"] * 2
    stranger = Try("vm1", "tcp", OWN, CLOSED, "10.9.9.9")
    lab.ip("vm1", "addr add 10.9.9.9/32 dev lo")
    try:
        lab.silent(stranger)
    finally:
        lab.ip("vm1", "addr del 10.9.9.9/32 dev lo")


def test_a_tier_is_refused_at_its_own_gateway_whatever_its_list_says(vpc_lab: Lab) -> None:
    nothing = (item(1, "deny", "egress"),)
    vpc_lab.renew(vpc(nothing, None))
    assert vpc_lab.ask(both("a1", GATEWAYS["a1"])) == ["refused"] * 2
    vpc_lab.silent(*both("a1", GATEWAYS["b1"]), *both("a1", OTHER))
    allowed = [*both("b1", GATEWAYS["b1"]), *both("b1", GATEWAYS["a1"]), *both("b1", OTHER)]
    assert vpc_lab.ask(allowed) == ["refused"] * len(allowed)
    vpc_lab.silent(*both("inet", OTHER, CLIENT))
    # A list's silence between tiers is not a refusal.
    vpc_lab.silent(*both("b1", HOMES["a1"]))


def test_refusals_reach_a_guest_while_others_to_silent_addresses_wait(lab: Lab) -> None:
    """A reset waits until the neighbour's MAC address is known. Those that wait must not use up a share of all."""
    lab.renew(wish(admit(A1, "all"), held=(A1, A2)))
    silent = [f"10.1.1.{at}" for at in range(50, 250)]
    with lab.open_socket("vm2", socket.SOCK_RAW, socket.IPPROTO_RAW) as forger:
        for port in range(4444, 4448):
            for source in silent:
                forger.sendto(syn(source, GATEWAY, port), (GATEWAY, 0))
        many = [Try("vm1", "tcp", GATEWAY, 5000 + at) for at in range(100)]
        assert lab.ask(many) == ["refused"] * len(many)
    waiting = run("ip", "-n", lab.ns("dev"), "neigh").split()
    assert len({*silent} & {*waiting}) > 100, "the device looked for those who sent"


def syn(source: str, target: str, port: int) -> bytes:
    """A SYN with an IPv4 header (RFC 9293, RFC 791), whose checksum the kernel fills in."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0) + ends
    tcp = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 1024, 0, 0)
    total = sum(struct.unpack("!16H", ends + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return ip + tcp[:16] + struct.pack("!HH", ~total & 0xFFFF, 0)
