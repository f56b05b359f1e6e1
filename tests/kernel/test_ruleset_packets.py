"""Filtering and translation by the ruleset of an isolated network, tested with packets.

Each test describes a scope, configures the device with plain tools (``ruleset_lab``) and sends packets from guests,
from the internet behind two public VLANs and from a neighbour. Numbered tests are defects of the reference extension.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, CLIENT2, MACS, NEIGHBOUR, PATIENCE_S, QUIET_S, STRANGER, VMS, Lab, Try, run
from netloom.agent.host.observe_nft import table_digest
from netloom.render.scope import render
from netloom.state import Scope
from netns import inside
from unit.scopes import A1, A2, B1, C1, CIDR, GATEWAY, VM1, VM2, VM3, admit, egress, forward, static, wish, with_nics

ECHO, TIMESTAMP = 8 << 8, 13 << 8


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        for port in (22, 53, 80, 443, 5000, 5004, 8080, 8085, 8090, 9000, 9002):
            for protocol in ("tcp", "udp"):
                for vm in VMS:
                    lab.serve(vm, protocol, port)
                lab.serve("inet", protocol, port, STRANGER)
        for port in (22, 53, 67, 80, 8080, 9000):
            for protocol in ("tcp", "udp"):
                lab.serve("dev", protocol, port)
        yield lab


def tcp(target: str, port: int, space: str = "inet", source: str = CLIENT) -> Try:
    return Try(space, "tcp", target, port, source if space == "inet" else "")


def udp(target: str, port: int, space: str = "inet", source: str = CLIENT) -> Try:
    return Try(space, "udp", target, port, source if space == "inet" else "")


def ping(target: str, space: str = "inet", source: str = CLIENT, kind: int = ECHO) -> Try:
    return Try(space, "icmp", target, kind, source if space == "inet" else "")


# Ingress


def test_public_addresses_are_closed_without_a_rule(lab: Lab) -> None:
    wishes = {
        "before the first list": False,
        "with an empty list": True,
    }
    for firewall in wishes.values():
        lab.renew(
            wish(
                held=(A1, A2, B1),
                forwards=[forward(A1, "22", VM1), forward(A2, "80", VM2), forward(A2, "53", VM2, protocol="udp")],
                static=[static(B1, VM3)],
                firewall=firewall,
            )
        )
        lab.silent(
            tcp(A1.address, 22), tcp(A2.address, 80), udp(A2.address, 53), tcp(B1.address, 22), ping(B1.address),
            ping(A1.address), tcp(A1.address, 80), tcp(A1.address, 8080), udp(A1.address, 53), udp(A1.address, 67),
        )  # fmt: skip


@pytest.mark.mutation("an-address-is-closed-but-for-its-rules", instead='"accept"')
def test_defect_02_an_address_without_a_rule_is_closed_beside_one_with_rules(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "tcp", "22"), held=(A1, A2), forwards=[forward(A1, "22", VM1), forward(A2, "22", VM2)]))
    assert lab.answered(tcp(A1.address, 22))[0].startswith("vm1 ")
    lab.silent(tcp(A2.address, 22))


@pytest.mark.mutation("an-address-is-closed-but-for-its-rules", instead='"accept"')
def test_defect_03_static_nat_after_the_firewall_list_opens_nothing(lab: Lab) -> None:
    before = wish(admit(A1, "tcp", "22"), held=(A1, A2), forwards=[forward(A1, "22", VM1)])
    lab.renew(before)
    lab.apply(replace(before, static_nats={A2.address: static(A2, VM2)}))
    lab.silent(tcp(A2.address, 22), tcp(A2.address, 80), udp(A2.address, 53), ping(A2.address))
    lab.answered(tcp(A1.address, 22))


def test_rules_match_the_port_before_translation(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "tcp", "2222"), forwards=[forward(A1, "2222", VM1, "22"), forward(A1, "22", VM1, "80")]))
    lab.answered(tcp(A1.address, 2222))
    lab.silent(tcp(A1.address, 22))


def test_rules_match_source_prefixes_ports_and_protocols(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A2, "tcp", "22", f"{CLIENT}/32", "172.16.0.0/16"),
            admit(A2, "udp", "50-60"),
            admit(A2, "tcp", "443", "192.0.2.0/28", "172.20.0.0/28", "172.20.0.32/28", "10.9.9.9/32"),
            admit(B1, "all", "", f"{CLIENT2}/32"),
            held=(A1, A2, B1),
            static=[static(A2, VM2), static(B1, VM3)],
        )
    )
    lab.answered(
        tcp(A2.address, 22), udp(A2.address, 53), udp(A2.address, 53, source=CLIENT2), tcp(A2.address, 443),
        tcp(B1.address, 22, source=CLIENT2), udp(B1.address, 9000, source=CLIENT2), ping(B1.address, source=CLIENT2),
        ping(B1.address, source=CLIENT2, kind=TIMESTAMP),
    )  # fmt: skip
    lab.silent(
        tcp(A2.address, 22, source=CLIENT2), tcp(A2.address, 443, source=STRANGER), udp(A2.address, 22), tcp(A2.address, 53), udp(A2.address, 443),  # noqa: E501
        tcp(B1.address, 22), udp(B1.address, 53), ping(B1.address), ping(A2.address),
    )  # fmt: skip


def test_rules_match_icmp_types_and_codes(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A1, "icmp", type=8, code=0),
            admit(A2, "icmp", "", f"{CLIENT}/32", type=-1, code=-1),
            admit(B1, "icmp", type=13),
            held=(A1, A2, B1),
            static=[static(A2, VM2), static(B1, VM3)],
        )
    )
    lab.answered(ping(A1.address), ping(A2.address), ping(A2.address, kind=TIMESTAMP), ping(B1.address, kind=TIMESTAMP))
    lab.silent(
        ping(A1.address, kind=TIMESTAMP), ping(A1.address, kind=ECHO | 1), ping(A2.address, source=CLIENT2),
        ping(B1.address),
    )  # fmt: skip


def test_a_rule_with_only_ipv6_sources_admits_no_ipv4(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "tcp", "22", "::/0"), admit(A1, "tcp", "80", "::/0", f"{CLIENT}/32"),
                   forwards=[forward(A1, "22", VM1), forward(A1, "80", VM1)]))  # fmt: skip
    lab.answered(tcp(A1.address, 80))
    lab.silent(tcp(A1.address, 22), tcp(A1.address, 80, source=CLIENT2))


def test_without_a_firewall_service_translated_ingress_is_open(lab: Lab) -> None:
    lab.renew(wish(held=(A1, A2), forwards=[forward(A1, "22", VM1)], static=[static(A2, VM2)], firewall=False,
                   ingress_open=True))  # fmt: skip
    lab.answered(tcp(A1.address, 22), tcp(A2.address, 80), udp(A2.address, 53), ping(A1.address), ping(A2.address))
    lab.silent(tcp(A1.address, 80), tcp(A1.address, 8080), udp(A1.address, 53), tcp(A1.address, 53))


@pytest.mark.mutation("only-translated-packets-come-in", instead='"accept"')
@pytest.mark.mutation("only-held-addresses-leave", instead='"counter"')
@pytest.mark.mutation(
    "nothing-is-forwarded-without-a-rule", instead='"type filter hook forward priority filter; policy accept;"'
)
def test_defect_01_a_neighbour_with_a_route_reaches_neither_guests_nor_the_device(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A1, "tcp", "22"), admit(A1, "icmp"), held=(A1, A2), forwards=[forward(A1, "22", VM1)],
            static=[static(A2, VM2)],
        )
    )  # fmt: skip
    lab.answered(tcp(A1.address, 22, "nb"), ping(A1.address, "nb"))
    lab.silent(
        tcp(VM1, 22, "nb"), tcp(VM2, 22, "nb"), udp(VM1, 53, "nb"), ping(VM1, "nb"), ping(GATEWAY, "nb"),
        tcp(GATEWAY, 80, "nb"), tcp(GATEWAY, 8080, "nb"), udp(GATEWAY, 53, "nb"), tcp(A1.address, 80, "nb"),
        tcp(A1.address, 8080, "nb"), udp(A1.address, 67, "nb"), tcp(A2.address, 22, "nb"),
    )  # fmt: skip


def test_spoofed_guest_addresses_are_dropped(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "all"), forwards=[forward(A1, "53", VM1, protocol="udp")]))
    lab.ip("nb", "addr add 10.1.1.77/32 dev lo")
    watcher = lab.open_socket("vm1", socket.SOCK_DGRAM)
    try:
        watcher.settimeout(0.4)
        watcher.bind(("", 5354))
        lab.apply(wish(admit(A1, "all"), forwards=[forward(A1, "5354", VM1, protocol="udp")]))
        sender = lab.open_socket("nb", socket.SOCK_DGRAM)
        sender.bind((NEIGHBOUR, 0))
        sender.sendto(b"honest", (A1.address, 5354))
        watcher.settimeout(PATIENCE_S)
        assert watcher.recv(20) == b"honest"
        sender.close()
        sender = lab.open_socket("nb", socket.SOCK_DGRAM)
        sender.bind(("10.1.1.77", 0))
        sender.sendto(b"forged", (A1.address, 5354))
        sender.close()
        watcher.settimeout(0.4)
        with pytest.raises(TimeoutError):
            watcher.recv(20)
    finally:
        watcher.close()
        lab.ip("nb", "addr del 10.1.1.77/32 dev lo")


def test_a_guest_can_use_only_its_own_addresses(lab: Lab) -> None:
    lab.renew(wish())
    lab.ip("vm1", "addr add 192.0.2.77/32 dev lo", "addr add 203.0.113.20/32 dev lo")
    try:
        lab.answered(udp(STRANGER, 53, "vm1"))
        lab.silent(
            Try("vm1", "udp", STRANGER, 53, "192.0.2.77"), Try("vm1", "udp", GATEWAY, 53, "192.0.2.77"),
            Try("vm1", "udp", STRANGER, 53, A1.address), Try("vm1", "udp", GATEWAY, 53, A1.address),
        )  # fmt: skip
        assert not [it for it in lab.entries() if it.src in ("192.0.2.77", A1.address)]
    finally:
        lab.ip("vm1", "addr del 192.0.2.77/32 dev lo", "addr del 203.0.113.20/32 dev lo")


@pytest.mark.mutation("every-held-address-has-its-firewall", instead="[it for it in now.held if len(it.address) < 15]")
def test_defect_06_the_firewall_works_for_an_address_of_15_characters(lab: Lab) -> None:
    assert len(C1.address) == 15
    lab.renew(wish(admit(C1, "tcp", "22"), held=(A1, C1), static=[static(C1, VM1)]))
    lab.answered(tcp(C1.address, 22))
    lab.silent(tcp(C1.address, 80), udp(C1.address, 53), ping(C1.address))


def test_overlapping_rules_all_apply(lab: Lab) -> None:
    """Defect 07: elements that the kernel would reject as overlapping are merged, and no rule is left out."""
    lab.renew(
        wish(
            admit(A1, "tcp", "20-100"), admit(A1, "tcp", "80-5000"), admit(A1, "tcp", "80"), admit(A1, "tcp", "443"),
            admit(A1, "udp", "1-65535", "192.0.2.0/24", f"{CLIENT}/32", "192.0.2.0/25"),
            admit(A1, "udp", "53", "192.0.2.0/28"),
            held=(A1, A2), forwards=[forward(A1, "22-9000", VM1), forward(A1, "53", VM1, protocol="udp")],
        )
    )  # fmt: skip
    lab.answered(
        *(tcp(A1.address, it) for it in (22, 80, 443, 5000)), udp(A1.address, 53), udp(A1.address, 53, source=STRANGER)
    )
    lab.silent(tcp(A1.address, 8080))


def test_a_thousand_rules_admit_exactly_their_sources(lab: Lab) -> None:
    rules = [admit(A1, "tcp", str(10000 + at), f"10.9.{at // 250}.{at % 250}/32") for at in range(1000)]
    rules += [admit(A1, "tcp", "8080-8090", f"{CLIENT}/32"), admit(A1, "tcp", "8085", f"{CLIENT2}/32")]
    lab.renew(wish(*rules, forwards=[forward(A1, "8000-9000", VM1)]))
    lab.answered(tcp(A1.address, 8080), tcp(A1.address, 8085), tcp(A1.address, 8085, source=CLIENT2))
    lab.silent(
        tcp(A1.address, 8080, source=CLIENT2), tcp(A1.address, 8085, source=STRANGER), tcp(A1.address, 9000),
        udp(A1.address, 8085),
    )  # fmt: skip


def test_replies_and_related_icmp_errors_pass_regardless_of_rules(lab: Lab) -> None:
    lab.renew(wish(egress("icmp"), allow_egress=True))
    lab.answered(tcp(STRANGER, 22, "vm1"), udp(STRANGER, 53, "vm1"))
    # No server listens there, so the guest gets "port unreachable" from the internet.
    assert lab.ask([udp(STRANGER, 4444, "vm1")]) == ["refused"]


# Translations


def test_port_ranges_map_one_to_one_shifted_or_to_one_port(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A1, "tcp"), admit(A1, "udp"),
            forwards=[
                forward(A1, "8080-8090", VM1), forward(A1, "4000-4009", VM2, "5000-5009"),
                forward(A1, "3000-3009", VM3, "443"), forward(A1, "2000-2009", VM3, "9000-9009", protocol="udp"),
                forward(A1, "8085", VM3, "22"), forward(A1, "2222", VM1, "22"),
            ],
        )
    )  # fmt: skip
    asked = [
        tcp(A1.address, 8080), tcp(A1.address, 8085), tcp(A1.address, 8090), tcp(A1.address, 4000),
        tcp(A1.address, 4004), tcp(A1.address, 3000), tcp(A1.address, 3009), udp(A1.address, 2002),
        tcp(A1.address, 2222),
    ]  # fmt: skip
    answers = [it.split()[0] for it in lab.answered(*asked)]
    assert answers == ["vm1", "vm3", "vm1", "vm2", "vm2", "vm3", "vm3", "vm3", "vm1"]
    # Guests listen on 5000 and 5004 only, so 4001 reaches a closed port. A mapping to one port would be answered.
    assert lab.ask([tcp(A1.address, 4001)]) == ["refused"]
    lab.silent(udp(A1.address, 8080), tcp(A1.address, 2002))


def test_guests_leave_with_the_source_nat_address(lab: Lab) -> None:
    for held in ((A1,), (replace(A1, source_nat=False), replace(B1, source_nat=True)), (A2, B1, A1)):
        lab.renew(wish(held=held))
        expected = next(it.address for it in held if it.source_nat)
        seen = lab.answered(tcp(STRANGER, 22, "vm1"), udp(STRANGER, 53, "vm2"))
        assert [it.split()[1].split(":")[0] for it in seen] == [expected] * 2, held
        lab.answered(ping(STRANGER, "vm1"))


@pytest.mark.mutation("static-nat-sets-the-source")
def test_defect_30_static_nat_works_both_ways_and_overrides_source_nat(lab: Lab) -> None:
    lab.renew(wish(admit(A2, "tcp", "22"), held=(A1, A2), static=[static(A2, VM2)]))
    assert lab.answered(tcp(A2.address, 22))[0].startswith(f"vm2 {CLIENT}:")
    seen = lab.answered(tcp(STRANGER, 22, "vm2"), udp(STRANGER, 53, "vm2"), tcp(STRANGER, 22, "vm1"))
    assert [it.split()[1].split(":")[0] for it in seen] == [A2.address, A2.address, A1.address]


def test_without_a_source_nat_address_no_private_address_leaves(lab: Lab) -> None:
    lab.renew(wish(held=(replace(A1, source_nat=False), B1), static=[static(B1, VM2)]))
    strays = lab.foreign_source_packets()
    lab.silent(udp(STRANGER, 53, "vm1"), tcp(STRANGER, 22, "vm1"), ping(STRANGER, "vm1"))
    assert lab.foreign_source_packets() == strays
    assert lab.answered(udp(STRANGER, 53, "vm2"))[0].split()[1].startswith(B1.address)


@pytest.mark.mutation("hairpin-comes-from-the-device")
def test_defect_31_hairpin_reaches_port_forwards_and_static_nat(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A1, "tcp", "22"), admit(A2, "tcp", "22"), admit(A2, "udp", "53"), admit(A2, "icmp"),
            admit(B1, "tcp", "80", f"{VM1}/32"),
            held=(A1, A2, B1), forwards=[forward(A1, "22", VM1)], static=[static(A2, VM2), static(B1, VM3)],
        )
    )  # fmt: skip
    seen = lab.answered(
        tcp(A1.address, 22, "vm2"), tcp(A1.address, 22, "vm1"), tcp(A2.address, 22, "vm1"), tcp(A2.address, 22, "vm2"),
        udp(A2.address, 53, "vm3"), tcp(B1.address, 80, "vm1"),
    )  # fmt: skip
    assert [it.split(":")[0] for it in seen] == [f"{vm} {GATEWAY}" for vm in ("vm1", "vm1", "vm2", "vm2", "vm2", "vm3")]
    lab.answered(ping(A2.address, "vm1"), ping(A2.address, "vm2"))
    # The firewall of the address applies to guests too.
    lab.silent(
        tcp(A1.address, 80, "vm2"), tcp(A2.address, 80, "vm1"), tcp(B1.address, 80, "vm2"), ping(B1.address, "vm1"),
        ping(A1.address, "vm1"),
    )  # fmt: skip


def test_hairpin_works_for_udp_and_ranges_and_from_the_target_itself(lab: Lab) -> None:
    lab.renew(
        wish(
            admit(A1, "udp", "53"), admit(A1, "tcp", "3000-4009"),
            forwards=[
                forward(A1, "53", VM1, protocol="udp"), forward(A1, "3000-3009", VM3, "443"),
                forward(A1, "4000-4009", VM2, "5000-5009"),
            ],
        )
    )  # fmt: skip
    seen = lab.answered(
        udp(A1.address, 53, "vm1"), udp(A1.address, 53, "vm2"), tcp(A1.address, 3005, "vm1"),
        tcp(A1.address, 3005, "vm3"), tcp(A1.address, 4004, "vm2"), tcp(A1.address, 4000, "vm1"),
    )  # fmt: skip
    vms = ("vm1", "vm1", "vm3", "vm3", "vm2", "vm2")
    assert [it.split(":")[0] for it in seen] == [f"{vm} {GATEWAY}" for vm in vms]


def test_static_nat_guests_reach_each_other_by_public_address(lab: Lab) -> None:
    """On two VLANs and under any egress policy, which concerns only traffic that leaves the network."""
    nats = [static(A2, VM2), static(B1, VM3)]
    lab.renew(wish(admit(A2, "all"), admit(B1, "all"), held=(A1, A2, B1), static=nats, allow_egress=False))
    seen = lab.answered(
        udp(A2.address, 53, "vm3"), udp(B1.address, 53, "vm2"), tcp(A2.address, 22, "vm3"),
        tcp(B1.address, 22, "vm2"), tcp(B1.address, 22, "vm3"), udp(B1.address, 53, "vm3"),
    )  # fmt: skip
    assert [it.split(":")[0] for it in seen] == [f"{vm} {GATEWAY}" for vm in ("vm2", "vm3", "vm2", "vm3", "vm3", "vm3")]
    lab.answered(ping(A2.address, "vm3"), ping(B1.address, "vm2"))


GRE, ESP = (47, b"\x00\x00\x08\x00tunnelled"), (50, b"\x00\x00\x10\x01\x00\x00\x00\x01sealed")


@pytest.mark.parametrize("packet", [GRE, ESP], ids=["gre", "esp"])
def test_portless_protocols_pass_static_nat_when_all_is_allowed(lab: Lab, packet: tuple[int, bytes]) -> None:
    nats = [static(A2, VM2), static(B1, VM3)]
    lab.renew(wish(admit(A2, "all"), admit(B1, "tcp"), admit(B1, "udp"), held=(A1, A2, B1), static=nats))
    assert _heard_from(lab, "vm2", packet, "inet", CLIENT, A2.address, PATIENCE_S) == CLIENT
    assert _heard_from(lab, "inet", packet, "vm2", VM2, CLIENT, PATIENCE_S) == A2.address
    assert _heard_from(lab, "vm3", packet, "inet", CLIENT, B1.address) == ""
    # Outbound traffic of guests uses source NAT.
    assert _heard_from(lab, "inet", packet, "vm1", VM1, STRANGER, PATIENCE_S) == A1.address
    # After a revocation the flow ends, although the guest keeps sending.
    lab.apply(wish(admit(B1, "tcp"), held=(A1, A2, B1), static=nats))
    assert _heard_from(lab, "inet", packet, "vm2", VM2, CLIENT) == ""
    assert _heard_from(lab, "vm2", packet, "inet", CLIENT, A2.address) == ""


def _heard_from(
    lab: Lab, at: str, packet: tuple[int, bytes], space: str, source: str, target: str, patience_s: float = 3 * QUIET_S
) -> str:
    """Send a packet of any IP protocol; returns the source address with which it arrives, empty when it does not."""
    protocol, data = packet
    with (
        lab.open_socket(at, socket.SOCK_RAW, protocol) as ear,
        lab.open_socket(space, socket.SOCK_RAW, protocol) as mouth,
    ):
        ear.settimeout(QUIET_S)
        mouth.bind((source, 0))
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            mouth.sendto(data, (target, 0))
            with contextlib.suppress(TimeoutError):
                while (heard := ear.recvfrom(2048))[0][20:] != data:
                    pass
                return str(heard[1][0])
    return ""


def test_fragmented_datagrams_are_translated(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "udp", "53"), forwards=[forward(A1, "53", VM1, protocol="udp")]))
    for space, source, target, seen in (
        ("inet", CLIENT, A1.address, f"vm1 {CLIENT}:"),
        ("vm2", VM2, STRANGER, f"inet {A1.address}:"),
    ):
        with lab.open_socket(space, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
            client.bind((source, 0))
            client.connect((target, 53))
            client.settimeout(PATIENCE_S)
            client.send(bytes(2040))  # the maximum of the server: two fragments
            assert client.recv(100).decode().startswith(seen)


def test_traceroute_shows_only_the_public_address(lab: Lab) -> None:
    """The device's "time exceeded" comes from the requested address and leaves by the exit of that address."""
    nats = [static(A2, VM2), static(B1, VM3)]
    lab.renew(wish(admit(A2, "udp"), admit(B1, "udp"), held=(A1, A2, B1), static=nats))
    strays = lab.foreign_source_packets()
    for address in (A2.address, B1.address):
        assert [_hop(lab, "inet", CLIENT, address, ttl) for ttl in (2, 3)] == [(11, address), (3, address)]
    assert [_hop(lab, "vm3", VM3, STRANGER, ttl) for ttl in (1, 2, 3)] == [
        (11, GATEWAY), (11, B1.gateway), (3, STRANGER),
    ]  # fmt: skip
    assert lab.foreign_source_packets() == strays


def _hop(lab: Lab, space: str, source: str, target: str, ttl: int) -> tuple[int, str]:
    """Send a datagram with this TTL; returns type and sender of the ICMP error."""
    with (
        lab.open_socket(space, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ear,
        lab.open_socket(space, socket.SOCK_DGRAM) as mouth,
    ):
        ear.settimeout(PATIENCE_S)
        mouth.bind((source, 0))
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        mouth.sendto(b"who is there?", (target, 33434))
        # The error has the head of its packet. Errors of earlier packets come seconds later.
        while (heard := ear.recvfrom(2048))[0][20] not in (3, 11) or heard[0][44:48] != socket.inet_aton(target):
            pass
        return heard[0][20], str(heard[1][0])


@pytest.mark.mutation("a-flow-is-bound-to-its-exit", instead='"counter"')
def test_defect_32_replies_leave_where_the_request_came_in(lab: Lab) -> None:
    lab.renew(
        wish(
            *(admit(it, "tcp", "22") for it in (A1, A2, B1, C1)), *(admit(it, "icmp") for it in (A1, A2, B1, C1)),
            admit(B1, "udp", "53"),
            held=(A1, A2, B1, C1),
            forwards=[forward(A1, "22", VM1), forward(B1, "22", VM1), forward(B1, "53", VM2, protocol="udp")],
            static=[static(C1, VM3)],
        )
    )  # fmt: skip
    strays = lab.foreign_source_packets()
    seen = lab.answered(
        tcp(A1.address, 22), tcp(B1.address, 22), tcp(C1.address, 22), udp(B1.address, 53), ping(A1.address),
        ping(B1.address), ping(C1.address), ping(A2.address), udp(STRANGER, 53, "vm1"), udp(STRANGER, 53, "vm3"),
    )  # fmt: skip
    assert [it.split()[1].split(":")[0] for it in seen if it != "pong"] == [
        *[CLIENT] * 4, A1.address, C1.address,
    ]  # fmt: skip
    assert lab.foreign_source_packets() == strays
    # Replies also go by the gateway of the exit, as the counters of the provider's two gateways show.
    marks = {(it.dst, it.dport): it.mark for it in lab.entries() if it.src == CLIENT and it.dport}
    assert marks[A1.address, 22] == 1
    assert marks[B1.address, 22] == 2
    assert marks[C1.address, 22] == 3


def test_a_static_nat_guest_leaves_by_the_exit_of_its_address(lab: Lab) -> None:
    lab.renew(wish(held=(A1, B1), static=[static(B1, VM2)]))
    strays = lab.foreign_source_packets()
    seen = lab.answered(tcp(STRANGER, 22, "vm2"), udp(STRANGER, 53, "vm2"), udp(STRANGER, 53, "vm1"))
    assert [it.split()[1].split(":")[0] for it in seen] == [B1.address, B1.address, A1.address]
    lab.answered(ping(STRANGER, "vm2"), ping("198.51.100.1", "vm1"), ping("203.0.113.1", "vm2"))
    assert lab.foreign_source_packets() == strays


def test_arp_requests_use_a_source_in_the_subnet_of_the_gateway(lab: Lab) -> None:
    """A strict gateway does not answer ARP requests with a source address outside its subnet."""
    lab.renew(wish(admit(C1, "tcp", "22"), admit(A1, "tcp", "22"), held=(A1, C1), static=[static(C1, VM2)],
                   forwards=[forward(A1, "22", VM1)]))  # fmt: skip
    with inside(lab.ns("gw1")):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
    try:
        wire.bind(("eth0", 0x0806))
        uses = (tcp(C1.address, 22), tcp(STRANGER, 22, "vm2"), tcp(A1.address, 22), tcp(STRANGER, 22, "vm1"))
        lab.answered(*uses)  # now the gateway has an entry of the device and sends no ARP requests
        lab.ip("dev", "neigh flush dev pub-101")
        lab.answered(*uses)
        wire.settimeout(0.2)
        asked: dict[str, set[str]] = {}
        with pytest.raises(TimeoutError):
            while True:
                frame = wire.recv(100)
                if struct.unpack("!H", frame[20:22])[0] == 1 and frame[6:7] == b"\x0a":
                    sender, target = socket.inet_ntoa(frame[28:32]), socket.inet_ntoa(frame[38:42])
                    asked.setdefault(target, set()).add(sender)
    finally:
        wire.close()
    assert asked == {"198.151.100.1": {C1.address}, "203.0.113.1": {A1.address}}


def test_the_device_answers_arp_only_on_the_link_of_the_address(lab: Lab) -> None:
    lab.renew(wish(held=(A1, B1)))
    lab.ip("nb", "neigh flush all")

    def arp(space: str, target: str, patience_s: int = 1) -> bool:
        done = run("ip", "netns", "exec", lab.ns(space), "sh", "-c",
                   f"arping -f -w {patience_s} -I eth0 {target} >/dev/null && echo yes || echo no")  # fmt: skip
        return done.strip() == "yes"

    assert arp("nb", A1.address, 20)
    assert not arp("nb", B1.address)
    assert not arp("nb", GATEWAY)
    assert not arp("vm1", A1.address)
    assert arp("vm1", GATEWAY, 20)


def test_the_untagged_public_vlan_works_like_a_tagged_one(lab: Lab) -> None:
    flat = replace(B1, vlan="untagged")
    want = render(wish(held=(A1, flat)))
    assert [(it.link, it.segment.bridge, it.segment.vlan_link) for it in want.ports][-1] == (
        "pub-untagged", "breth1-0", "",
    )  # fmt: skip
    lab.ip("sw", "link set xgw2-102 master breth1-0")
    try:
        lab.renew(wish(admit(flat, "tcp", "22"), held=(A1, flat), forwards=[forward(flat, "22", VM1)]))
        lab.answered(tcp(flat.address, 22))
    finally:
        lab.ip("sw", "link set xgw2-102 master breth1-102")


def test_defect_12_ipv6_is_closed(lab: Lab) -> None:
    """Packets of guests and neighbours are dropped even if IPv6 is enabled in the namespace by hand."""
    lab.renew(wish(admit(A1, "all"), ingress_open=True))
    spaces = {"vm1": "eth0", "nb": "eth0"}
    with inside(lab.ns("dev")):
        for key in ("default", "gst-204", "pub-101"):
            with open(f"/proc/sys/net/ipv6/conf/{key}/disable_ipv6") as file:
                assert file.read().strip() == "1"
        for key in ("gst-204", "pub-101"):
            with open(f"/proc/sys/net/ipv6/conf/{key}/disable_ipv6", "w") as file:
                file.write("0")
        with open("/proc/sys/net/ipv6/conf/all/forwarding", "w") as file:
            file.write("1")
    lab.ip("dev", "addr add fd00:1::1/64 dev gst-204 nodad", "addr add fd00:2::1/64 dev pub-101 nodad")
    listener = None
    try:
        for space in spaces:
            with inside(lab.ns(space)), open("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "w") as file:
                file.write("0")
        lab.ip("vm1", "addr add fd00:1::11/64 dev eth0 nodad", "route add fd00:2::/64 via fd00:1::1")
        lab.ip("nb", "addr add fd00:2::99/64 dev eth0 nodad", "route add fd00:1::/64 via fd00:2::1")
        macs = {link: run("ip", "netns", "exec", lab.ns("dev"), "cat", f"/sys/class/net/{link}/address").strip()
                for link in ("gst-204", "pub-101")}  # fmt: skip
        # Neighbour discovery is dropped too, so set the neighbour entries by hand.
        lab.ip("vm1", f"neigh replace fd00:1::1 lladdr {macs['gst-204']} dev eth0")
        lab.ip("nb", f"neigh replace fd00:2::1 lladdr {macs['pub-101']} dev eth0")
        with inside(lab.ns("dev")):
            listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listener.bind(("::", 5555))
        for space, target in (("vm1", "fd00:1::1"), ("nb", "fd00:2::1"), ("nb", "fd00:1::1"), ("nb", "fd00:1::11")):
            with inside(lab.ns(space)):
                sender = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            sender.sendto(b"?", (target, 5555))
            sender.close()
        listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            listener.recv(10)
    finally:
        if listener is not None:
            listener.close()
        for space in spaces:
            with inside(lab.ns(space)), open("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "w") as file:
                file.write("1")
        lab.apply(None)


# Egress


def test_egress_is_open_without_a_list_and_with_an_empty_default_allow_list(lab: Lab) -> None:
    for scope in (wish(firewall=False), wish(allow_egress=True)):
        lab.renew(scope)
        lab.answered(tcp(STRANGER, 22, "vm1"), udp(STRANGER, 53, "vm2"), ping(STRANGER, "vm3"))


def test_egress_rules_deny_when_the_default_is_allow(lab: Lab) -> None:
    lab.renew(
        wish(
            egress("tcp", "22", sources=(f"{VM1}/32",), dests=("0.0.0.0/0",)), egress("udp", "50-60"),
            egress("icmp", type=8), egress("tcp", "80", sources=(CIDR,), dests=(f"{STRANGER}/32",)),
            egress("all", sources=(f"{VM3}/32",)), allow_egress=True,
        )
    )  # fmt: skip
    lab.silent(
        tcp(STRANGER, 22, "vm1"), udp(STRANGER, 53, "vm1"), ping(STRANGER, "vm1"), tcp(STRANGER, 80, "vm2"),
        tcp(STRANGER, 443, "vm3"), udp(STRANGER, 443, "vm3"), ping(STRANGER, "vm3", kind=TIMESTAMP),
    )  # fmt: skip
    lab.answered(tcp(STRANGER, 22, "vm2"), tcp(STRANGER, 443, "vm1"), udp(STRANGER, 443, "vm1"),
                 ping(STRANGER, "vm1", kind=TIMESTAMP))  # fmt: skip


def test_egress_rules_allow_when_the_default_is_deny(lab: Lab) -> None:
    lab.renew(
        wish(
            egress("tcp", "22", sources=(f"{VM1}/32",), dests=("0.0.0.0/0",)), egress("udp", "50-60"),
            egress("icmp", type=-1, code=-1), egress("tcp", "80", sources=(CIDR,), dests=(f"{CLIENT}/32",)),
            egress("all", sources=(f"{VM3}/32",)), allow_egress=False,
        )
    )  # fmt: skip
    lab.answered(
        tcp(STRANGER, 22, "vm1"), udp(STRANGER, 53, "vm1"), ping(STRANGER, "vm1"),
        ping(STRANGER, "vm2", kind=TIMESTAMP), tcp(STRANGER, 443, "vm3"), udp(STRANGER, 443, "vm3"),
    )  # fmt: skip
    lab.silent(tcp(STRANGER, 22, "vm2"), tcp(STRANGER, 443, "vm1"), udp(STRANGER, 443, "vm1"),
               tcp(STRANGER, 80, "vm2"))  # fmt: skip


@pytest.mark.parametrize(
    "scope", [wish(allow_egress=False), wish(egress("all"), allow_egress=True), wish(firewall=False)]
)
def test_device_services_are_reachable_under_any_egress_policy(lab: Lab, scope: Scope) -> None:
    lab.renew(scope)
    lab.answered(
        ping(GATEWAY, "vm1"), udp(GATEWAY, 53, "vm1"), tcp(GATEWAY, 53, "vm1"), udp(GATEWAY, 67, "vm1"),
        tcp(GATEWAY, 80, "vm2"), tcp(GATEWAY, 8080, "vm2"),
    )  # fmt: skip
    closed = tcp(GATEWAY, 22, "vm1"), udp(GATEWAY, 80, "vm1"), tcp(GATEWAY, 9000, "vm1"), udp(GATEWAY, 9000, "vm1")
    assert lab.ask(closed) == ["refused"] * 4


@pytest.mark.mutation("dhcp-is-for-nics")
def test_metadata_and_dhcp_are_only_for_the_pair_of_mac_and_address_of_a_nic(lab: Lab) -> None:
    """The address of vm2 is a NIC's with another MAC; that of vm3 is nobody's until its entry comes."""
    nics = {VMS["vm1"]: MACS["vm1"], VMS["vm2"]: "02:00:00:00:00:77"}
    lab.renew(with_nics(wish(), nics))
    services = [("tcp", 80), ("tcp", 8080), ("udp", 67)]
    lab.answered(*(Try("vm1", protocol, GATEWAY, port) for protocol, port in services))
    lab.silent(*(Try(vm, protocol, GATEWAY, port) for protocol, port in services for vm in ("vm2", "vm3")))
    lab.answered(udp(GATEWAY, 53, "vm3"), tcp(GATEWAY, 53, "vm3"))
    lab.renew(with_nics(wish(), {**nics, VMS["vm3"]: MACS["vm3"]}))
    lab.answered(*(Try("vm3", protocol, GATEWAY, port) for protocol, port in services))


@pytest.mark.mutation("elements-of-packets-are-no-change")
def test_requests_do_not_change_the_digest_of_the_table(lab: Lab) -> None:
    lab.renew(with_nics(wish(), {VMS["vm1"]: MACS["vm1"]}))
    before = table_digest(lab.ns("dev"))
    lab.answered(tcp(GATEWAY, 80, "vm1"), udp(GATEWAY, 67, "vm1"))
    listed = run("ip", "netns", "exec", lab.ns("dev"), "nft", "list", "set", "inet", "netloom", "http_rate_204")
    assert VMS["vm1"] in listed
    assert table_digest(lab.ns("dev")) == before


@pytest.mark.mutation("strangers-share-the-resolver")
def test_the_resolver_of_a_shared_network_limits_senders_that_are_no_nic(lab: Lab) -> None:
    scope = wish()
    shared = replace(scope.networks["204"], guest_type="shared")
    lab.renew(with_nics(replace(scope, networks={"204": shared}), {VMS["vm1"]: MACS["vm1"]}))
    lab.answered(udp(GATEWAY, 53, "vm1"), tcp(GATEWAY, 53, "vm1"), udp(GATEWAY, 53, "vm2"))
    lab.silent(tcp(GATEWAY, 53, "vm2"))
    # All questions of a sender have one source port, so they are one connection for conntrack.
    for space in ("vm2", "vm1"):
        with lab.open_socket(space, socket.SOCK_DGRAM) as sender:
            sender.settimeout(PATIENCE_S)
            answers = 0
            began = time.monotonic()
            for _ in range(200):
                sender.sendto(b"question", (GATEWAY, 53))
            with contextlib.suppress(TimeoutError):
                while answers < 200:
                    answers += bool(sender.recv(100))
                    sender.settimeout(PATIENCE_S if space == "vm1" else 1)
            allowed = 50 + 6 * (time.monotonic() - began)
            assert answers == 200 if space == "vm1" else 1 <= answers <= allowed, (space, answers)


def test_device_services_are_reachable_only_by_guests_on_the_gateway_address(lab: Lab) -> None:
    services = [("udp", 53), ("tcp", 53), ("udp", 67), ("tcp", 80), ("tcp", 8080)]
    lab.renew(wish(admit(A1, "all"), admit(A2, "all"), held=(A1, A2)))
    for target in (A1.address, A2.address):
        lab.silent(
            *(Try("inet", protocol, target, port, CLIENT) for protocol, port in services),
            *(Try("nb", protocol, target, port) for protocol, port in services),
        )
        guest = [Try("vm1", protocol, target, port) for protocol, port in services]
        assert set(lab.ask(it for it in guest if it.protocol == "tcp")) == {"refused"}
        assert set(lab.ask((it for it in guest if it.protocol == "udp"), QUIET_S)) <= {"refused", ""}  # limited
    lab.silent(*(Try("nb", protocol, GATEWAY, port) for protocol, port in services))
    # The device answers pings that the rules of the address allow, also from guests.
    lab.answered(ping(A1.address), ping(A2.address, "nb"), ping(A1.address, "vm1"))


def test_a_broadcast_dhcp_request_reaches_the_device(lab: Lab) -> None:
    lab.renew(wish(allow_egress=False))
    with inside(lab.ns("vm3")):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind(("eth0", 0))
    server = lab.open_socket("dev", socket.SOCK_DGRAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"gst-204")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind(("", 67))
        server.settimeout(PATIENCE_S)
        wire.send(_broadcast("0.0.0.0", 68, 67, b"hello"))
        assert server.recvfrom(100) == (b"hello", ("0.0.0.0", 68))
        # A client that rebinds uses the address of its last network.
        wire.send(_broadcast("192.0.2.1", 68, 67, b"rebind"))
        assert server.recvfrom(100) == (b"rebind", ("192.0.2.1", 68))
        # The answer leaves by broadcast. Other ports are dropped.
        server.sendto(b"offer", ("255.255.255.255", 68))
        server.settimeout(0.3)
        wire.send(_broadcast("0.0.0.0", 69, 67, b"other"))
        wire.send(_broadcast("192.0.2.1", 68, 69, b"other"))
        with pytest.raises(TimeoutError):
            server.recvfrom(100)
    finally:
        server.close()
        wire.close()


def _broadcast(source: str, sport: int, dport: int, data: bytes) -> bytes:
    udp_part = struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp_part), 1, 0, 64, 17, 0,
                       socket.inet_aton(source), b"\xff" * 4)  # fmt: skip
    total = sum(struct.unpack("!10H", head))
    total = (total >> 16) + (total & 0xFFFF)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x03" + b"\x08\x00" + head + udp_part


# Addresses are added and released


@pytest.mark.mutation("every-held-address-has-its-firewall", instead="now.held[1:]")
def test_defects_33_34_35_releasing_an_address_keeps_those_with_the_same_prefix(lab: Lab) -> None:
    two, twenty = replace(A2, address="203.0.113.2"), A1
    twenty_one = replace(A2, address="203.0.113.21")
    full = wish(
        *(admit(it, "tcp", "22") for it in (two, twenty, twenty_one)),
        held=(two, twenty, twenty_one),
        forwards=[forward(two, "22", VM1), forward(twenty, "22", VM2), forward(twenty_one, "22", VM3)],
    )
    lab.renew(full)
    # 35: .2 is reachable while .20 is assigned too.
    seen = lab.answered(tcp(two.address, 22), tcp(twenty.address, 22), tcp(twenty_one.address, 22))
    assert [it.split()[0] for it in seen] == ["vm1", "vm2", "vm3"]
    # 33, 34: release removes only the objects of that address, without delete commands before it. Source NAT stays.
    lab.apply(replace(full, public_ips={it.address: it for it in (twenty, twenty_one)}))
    seen = lab.answered(tcp(twenty.address, 22), tcp(twenty_one.address, 22), tcp(STRANGER, 22, "vm1"))
    assert [it.split()[0] for it in seen] == ["vm2", "vm3", "inet"]
    lab.silent(tcp(two.address, 22))
    # 34: releasing an address removes its static NAT.
    both = wish(admit(A2, "tcp", "22"), held=(A1, A2), static=[static(A2, VM2)])
    lab.apply(both)
    lab.answered(tcp(A2.address, 22), tcp(STRANGER, 22, "vm2"))
    lab.apply(replace(both, public_ips={A1.address: A1}))
    lab.silent(tcp(A2.address, 22))
    assert lab.answered(tcp(STRANGER, 22, "vm2"))[0].split()[1].startswith(A1.address)


def test_tcp_mss_is_clamped_to_the_smaller_mtu_both_ways(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "tcp", "22"), forwards=[forward(A1, "22", VM1)]))
    lab.ip("dev", "link set pub-101 mtu 1400")
    try:
        for space, target, source in (("vm1", STRANGER, ""), ("inet", A1.address, CLIENT)):
            client = lab.connect(space, target, 22, source)
            with client:
                mss = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
                assert 1300 <= mss <= 1360, space
    finally:
        lab.ip("dev", "link set pub-101 mtu 1500")


@pytest.mark.mutation("guests-get-no-redirects")
def test_the_device_sends_no_icmp_redirects(lab: Lab) -> None:
    """Hairpin traffic leaves by its inbound link. A guest that followed a redirect would bypass the translation."""
    lab.renew(wish(admit(A1, "tcp", "22"), forwards=[forward(A1, "22", VM1)]))
    before = _redirects(lab)
    lab.answered(tcp(A1.address, 22, "vm2"))
    assert _redirects(lab) == before


def _redirects(lab: Lab) -> int:
    """The number of redirects that the device's kernel has sent."""
    lines = run("ip", "netns", "exec", lab.ns("dev"), "cat", "/proc/net/snmp").splitlines()
    names, counts = (line.split() for line in lines if line.startswith("Icmp:"))
    return int(counts[names.index("OutRedirects")])


def test_packet_too_big_errors_leave_by_the_exit_of_the_connection(lab: Lab) -> None:
    """The device's ICMP error comes from the public address and leaves by the exit of the connection it concerns."""
    lab.renew(wish(admit(B1, "udp", "53"), held=(A1, B1), forwards=[forward(B1, "53", VM1, protocol="udp")]))
    strays = lab.foreign_source_packets()
    lab.answered(udp(B1.address, 53))
    lab.ip("dev", "link set gst-204 mtu 1300")
    try:
        client = lab.open_socket("inet", socket.SOCK_DGRAM)
        with client:
            client.bind((CLIENT, 0))
            client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: do
            client.connect((B1.address, 53))
            client.settimeout(PATIENCE_S)
            client.send(b"?")
            assert client.recv(100)
            client.send(bytes(1400))
            with pytest.raises(OSError):
                client.recv(100)
            assert client.getsockopt(socket.IPPROTO_IP, 14) == 1300  # IP_MTU
    finally:
        lab.ip("dev", "link set gst-204 mtu 1500")
    assert lab.foreign_source_packets() == strays


def test_a_guest_gets_packet_too_big_errors_for_the_public_link(lab: Lab) -> None:
    lab.renew(wish(held=(A1, B1), static=[static(B1, VM2)]))
    lab.ip("dev", "link set pub-102 mtu 1300")
    try:
        client = lab.open_socket("vm2", socket.SOCK_DGRAM)
        with client:
            client.setsockopt(socket.IPPROTO_IP, 10, 2)
            client.connect((STRANGER, 53))
            client.settimeout(PATIENCE_S)
            client.send(b"?")
            assert client.recv(100)
            client.send(bytes(1400))
            with pytest.raises(OSError):
                client.recv(100)
            assert client.getsockopt(socket.IPPROTO_IP, 14) == 1300
    finally:
        lab.ip("dev", "link set pub-102 mtu 1500")
