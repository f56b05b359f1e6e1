"""Filtering and translation by the ruleset of a VPC, tested with packets and compared with a truth table.

The lab has two tiers, two VMs in the first and one in the second, and public addresses with a static NAT, a port
forward and a balanced port into the first. Sockets of the device take the place of its services and of haproxy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernel.flood import Flood, swaps
from kernel.flow_policy_check import agree
from kernel.ruleset_lab import CLIENT, PATIENCE_S, QUIET_S, STRANGER, Lab, Nft, Try, echoes
from kernel.vpc_lab import (
    BALANCED,
    FORWARDED,
    GATEWAYS,
    HOMES,
    NAT,
    OTHER,
    STATIC,
    TIERS,
    A,
    B,
    VpcLab,
    forward,
    item,
    lists,
    public,
    vpc,
)
from netloom.render import nft
from netloom.state import AclItem, Firewall
from netloom.wire import Registration
from unit.payload_player import call
from unit.scopes import admit, egress

ECHO = 8 << 8
OWNER = Registration(owner="test")
PORTS = (22, 53, 80, 8080)


ALL_IN = item(1, "allow", "ingress")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with VpcLab() as lab:
        for port in PORTS:
            for protocol in ("tcp", "udp"):
                for vm in HOMES:
                    lab.serve(vm, protocol, port)
                lab.serve("inet", protocol, port, STRANGER)
                lab.serve("dev", protocol, port)
        lab.serve("dev", "tcp", BALANCED)
        yield lab


# ------------------------------------------------------------------------------------------------- the truth table


def lets(acl: tuple[AclItem, ...] | None, direction: str, protocol: str, port: int, far: str) -> bool:
    """An independent implementation of ACLs."""
    if acl is None:
        return direction == "egress"
    mine = [it for it in sorted(acl, key=lambda it: it.number) if it.direction == direction]
    for it in mine:
        about = it.protocol in ("all", protocol) and (it.ports is None or it.ports.first <= port <= it.ports.last)
        about &= it.protocol != "icmp" or it.icmp_type in (None, ECHO >> 8)
        if about and (not it.cidrs or any(ip_address(far) in ip_network(cidr) for cidr in it.cidrs)):
            return it.action == "allow"
    return direction == "egress" and not mine


def table(acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None) -> dict[Try, bool]:
    """The truth table: each attempt, and whether it must be answered."""
    acls = {"310": acl_a, "311": acl_b}
    tried: dict[Try, bool] = {}

    def out(vm: str, protocol: str, port: int, target: str) -> bool:
        return lets(acls[TIERS[vm]], "egress", protocol, port, target)

    def into(vm: str, protocol: str, port: int, source: str) -> bool:
        return lets(acls[TIERS[vm]], "ingress", protocol, port, source)

    kinds = [(protocol, port) for protocol in ("tcp", "udp") for port in PORTS] + [("icmp", ECHO)]
    for protocol, port in kinds:
        number = 0 if protocol == "icmp" else port
        for one, other in (("a1", "b1"), ("b1", "a1"), ("b1", "a2")):
            between = out(one, protocol, number, HOMES[other]) and into(other, protocol, number, HOMES[one])
            tried[Try(one, protocol, HOMES[other], port)] = between
        for vm in ("a1", "a2", "b1"):
            tried[Try(vm, protocol, STRANGER, port)] = out(vm, protocol, number, STRANGER)
        for vm in ("a1", "b1"):
            served = protocol == "icmp" or (protocol, port) in {("udp", 53), ("tcp", 53), ("tcp", 80), ("tcp", 8080)}
            tried[Try(vm, protocol, GATEWAYS[vm], port)] = served
            tried[Try(vm, protocol, GATEWAYS["b1" if vm == "a1" else "a1"], port)] = False
        tried[Try("inet", protocol, STATIC, port, CLIENT)] = into("a2", protocol, number, CLIENT)
        for vm in ("a1", "b1"):
            through = out(vm, protocol, number, HOMES["a2"]) and into("a2", protocol, number, HOMES[vm])
            tried[Try(vm, protocol, STATIC, port)] = through
            tried[Try(vm, protocol, OTHER, port)] = False
        # No rule leads from these to a server.
        tried[Try("inet", protocol, NAT, port, CLIENT)] = False
        tried[Try("inet", protocol, OTHER, port, CLIENT)] = False
        tried[Try("nb", protocol, HOMES["a1"], port)] = False
        tried[Try("nb", protocol, GATEWAYS["b1"], port)] = False
    for protocol in ("tcp", "udp"):
        tried[Try("inet", protocol, NAT, FORWARDED, CLIENT)] = into("a1", protocol, 22, CLIENT)
        for vm in ("a2", "b1"):
            through = out(vm, protocol, 22, HOMES["a1"]) and into("a1", protocol, 22, HOMES[vm])
            tried[Try(vm, protocol, NAT, FORWARDED)] = through
    tried[Try("inet", "tcp", NAT, FORWARDED + 1, CLIENT)] = into("b1", "tcp", 22, CLIENT)
    through = out("a1", "tcp", 22, HOMES["b1"]) and into("b1", "tcp", 22, HOMES["a1"])
    tried[Try("a1", "tcp", NAT, FORWARDED + 1)] = through
    tried[Try("inet", "tcp", NAT, BALANCED, CLIENT)] = into("a1", "tcp", 80, CLIENT)
    for vm in ("a2", "b1"):
        balanced = out(vm, "tcp", BALANCED, NAT) and into("a1", "tcp", 80, HOMES[vm])
        tried[Try(vm, "tcp", NAT, BALANCED)] = balanced
    return tried


CIDRS = st.lists(
    st.sampled_from([A, B, "10.20.0.0/16", "0.0.0.0/0", f"{CLIENT}/32", f"{STRANGER}/32", "192.0.2.0/24",
                     "2001:db8::/32", f"{HOMES['b1']}/32", "198.51.100.0/24"]),
    max_size=3,
)  # fmt: skip


LISTS = lists(CIDRS, number="47", icmp_type=8, other_type=13) | st.just((ALL_IN,))


@pytest.mark.mutation("the-source-tiers-list-is-asked")
@settings(max_examples=15)
@given(LISTS, LISTS)
def test_packets_follow_the_acls(
    lab: Lab, acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None
) -> None:
    """All pairs of VM, gateway, internet and public address, for each protocol and port."""
    lab.renew(vpc(acl_a, acl_b))
    told = table(acl_a, acl_b)
    lab.assert_answers(told)
    # Packets of the neighbour are dropped because of their inbound link, which the flow policy does not know.
    agree(lab, {it: it.source or HOMES[it.space] for it in told if it.space != "nb"})


# ------------------------------------------------------------------------------------------------- defects by name


@pytest.mark.mutation("a-list-has-its-own-end", instead='"accept"')
def test_defect_10_the_default_deny_of_an_acl_affects_only_its_tier(lab: Lab) -> None:
    lab.renew(vpc((ALL_IN,), None))
    lab.answered(Try("b1", "tcp", HOMES["a1"], 22), Try("inet", "tcp", NAT, FORWARDED, CLIENT))
    lab.answered(Try("a1", "tcp", STRANGER, 22), Try("b1", "tcp", STRANGER, 22))
    lab.silent(Try("a1", "tcp", HOMES["b1"], 22), Try("inet", "tcp", NAT, FORWARDED + 1, CLIENT))
    lab.renew(vpc((ALL_IN,), (ALL_IN,)))
    lab.answered(Try("a1", "tcp", HOMES["b1"], 22), Try("b1", "tcp", HOMES["a1"], 22), Try("a1", "tcp", STRANGER, 22))


@pytest.mark.mutation("the-source-tiers-list-is-asked")
def test_defect_11_traffic_between_tiers_passes_the_egress_acl_of_the_source(lab: Lab) -> None:
    shut = (ALL_IN, item(2, "deny", "egress"))
    lab.renew(vpc(shut, (ALL_IN,)))
    lab.silent(Try("a1", "icmp", HOMES["b1"]), Try("a1", "tcp", HOMES["b1"], 22), Try("a1", "tcp", STRANGER, 22))
    lab.answered(Try("b1", "icmp", HOMES["a1"]), Try("b1", "tcp", HOMES["a1"], 22))


@pytest.mark.mutation("a-balanced-port-is-judged-by-its-list", instead='rules.append("tcp dport 8000 accept")')
def test_acls_see_the_client_address_of_balanced_traffic(lab: Lab) -> None:
    """apache/cloudstack #9054: the load balancer of the virtual router bypassed the ACLs."""
    lab.renew(vpc((item(1, "allow", "ingress", "tcp", "80", f"{CLIENT}/32"),), None))
    lab.answered(Try("inet", "tcp", NAT, BALANCED, CLIENT))
    lab.silent(Try("inet", "tcp", NAT, BALANCED, STRANGER), Try("b1", "tcp", NAT, BALANCED))


@pytest.mark.mutation("a-tiers-firewall-is-asked-too", instead="not scope.is_vpc")
def test_a_tier_may_have_a_firewall_in_addition_to_its_acl(lab: Lab) -> None:
    """The firewall covers the tier's addresses and egress of its guests, but not the VPC's own address."""
    base = vpc((ALL_IN,), (ALL_IN,))
    forwards = [forward(OTHER, FORWARDED, "a1", 22, "tcp"), forward(OTHER, FORWARDED + 1, "a1", 80, "tcp")]
    admitted = replace(admit(public(OTHER), "tcp", str(FORWARDED), f"{CLIENT}/32"), rule_id=1)
    firewall = Firewall(default_egress_allow=True, rules=(admitted, replace(egress("udp", "53"), rule_id=2)))
    scope = replace(
        base,
        networks=base.networks | {"310": replace(base.networks["310"], firewall=firewall)},
        public_ips=base.public_ips | {OTHER: public(OTHER, network_id="310")},
        port_forwards=base.port_forwards | {it.key: it for it in forwards},
    )
    lab.renew(scope)
    tried = {
        Try("inet", "tcp", OTHER, FORWARDED, CLIENT): True,
        Try("inet", "tcp", OTHER, FORWARDED, STRANGER): False,
        Try("inet", "tcp", OTHER, FORWARDED + 1, CLIENT): False,
        Try("b1", "tcp", OTHER, FORWARDED): False,
        Try("inet", "tcp", NAT, FORWARDED, STRANGER): True,
        Try("inet", "tcp", STATIC, 22, CLIENT): True,
        Try("a1", "udp", STRANGER, 53): False,
        Try("a1", "udp", STRANGER, 22): True,
        Try("b1", "udp", STRANGER, 53): True,
        Try("a1", "udp", HOMES["b1"], 53): True,
    }
    lab.assert_answers(tried)
    agree(lab, {it: it.source or HOMES[it.space] for it in tried})


def test_acls_match_protocols_by_number(lab: Lab) -> None:
    """GRE has no ports, so arriving packets are read from a raw socket."""
    for acl, arrives in (
        ((item(1, "allow", "ingress", "47", "", A),), True),
        ((item(1, "deny", "ingress", "47"),), False),
    ):
        lab.renew(vpc(None, acl))
        with lab.open_socket("b1", 3, 47) as there, lab.open_socket("a1", 3, 47) as here:
            here.sendto(b"\0\0\x08\0" + b"hello", (HOMES["b1"], 0))
            there.settimeout(PATIENCE_S if arrives else QUIET_S)
            try:
                got = there.recv(200)
            except TimeoutError:
                got = b""
            assert got.endswith(b"hello") == arrives


# ------------------------------------------------------------------------------------------------------ open flows


@pytest.mark.mutation("a-flow-ends-with-its-list-item", instead="True")
def test_a_changed_acl_ends_only_the_flows_it_allowed(lab: Lab) -> None:
    ssh = item(5, "allow", "ingress", "tcp", "22")
    lab.renew(vpc((ssh, item(6, "allow", "ingress", "tcp", "8080")), (ALL_IN,)))
    gone = [
        lab.connect("inet", NAT, FORWARDED, CLIENT),
        lab.connect("b1", HOMES["a1"], 22),
        lab.connect("b1", STATIC, 22),
    ]
    kept = [
        lab.connect("a1", HOMES["b1"], 80),
        lab.connect("b1", HOMES["a1"], 8080),
        lab.connect("a1", STRANGER, 22),
        lab.connect("inet", NAT, FORWARDED + 1, CLIENT),
    ]
    lab.apply(
        vpc((item(4, "deny", "ingress", "tcp", "22"), ssh, item(6, "allow", "ingress", "tcp", "8080")), (ALL_IN,))
    )
    assert [echoes(it, 0.5) for it in gone] == [False] * 3
    assert [echoes(it) for it in kept] == [True] * 4
    for it in gone + kept:
        it.close()


def test_changing_the_source_nat_address_keeps_inbound_services_of_the_old_one(lab: Lab) -> None:
    """Changed and changed back. Forwards, balanced ports and their open connections survive; outbound flows end."""
    before = vpc((ALL_IN,), (ALL_IN,))
    lab.renew(before)
    served = [lab.connect("inet", NAT, port, CLIENT) for port in (FORWARDED, FORWARDED + 1, BALANCED)]
    inward = [Try("inet", "tcp", NAT, port, CLIENT) for port in (FORWARDED, FORWARDED + 1, BALANCED)]
    inward += [Try("inet", "udp", NAT, FORWARDED, CLIENT), Try("inet", "tcp", STATIC, 22, CLIENT)]
    for now in (OTHER, NAT):
        left = lab.connect("b1", STRANGER, 22)
        lab.apply(
            replace(before, public_ips={it: public(it, source_nat=it == now) for it in (NAT, OTHER, STATIC)}),
        )
        assert [echoes(it) for it in served] == [True] * 3
        assert not echoes(left, 0.5)
        left.close()
        seen = lab.answered(*(Try(vm, "tcp", STRANGER, 22) for vm in ("a1", "b1", "a2")), *inward)
        assert [it.split()[1].split(":")[0] for it in seen] == [now, now, STATIC, *[CLIENT] * len(inward)]
    for it in served:
        it.close()


@pytest.mark.mutation("addresses-of-other-tiers-stay", instead="False")
def test_defect_37_removing_a_tier_does_not_affect_the_others(lab: Lab) -> None:
    before = vpc((ALL_IN,), (ALL_IN,))
    lab.renew(before)
    flows = [lab.connect("inet", NAT, FORWARDED + 1, CLIENT), lab.connect("b1", STRANGER, 22)]
    ended = lab.connect("inet", NAT, FORWARDED, CLIENT)
    lab.apply(call(before, "destroy-network", OWNER, "vpc-7", vpc_id="7", network_id="310").scope)
    assert [echoes(it) for it in flows] == [True, True]
    assert not echoes(ended, 0.5)
    lab.answered(Try("b1", "tcp", STRANGER, 80), Try("inet", "tcp", NAT, FORWARDED + 1, CLIENT))
    for it in [*flows, ended]:
        it.close()
    lab.apply(before)
    lab.answered(Try("b1", "tcp", HOMES["a1"], 22), Try("inet", "tcp", NAT, FORWARDED, CLIENT))


@pytest.mark.mutation(
    "a-tier-has-all-lines-of-its-list", instead='tuple(it for it in ingress_lines(acl) if "6001" not in it)'
)
def test_defect_05_a_flood_sees_no_loss_and_no_gap_during_acl_changes() -> None:
    """The first matching ACL item allows one port and denies another. Everything else changes during the flood."""
    keep = (item(10, "deny", "ingress", "udp", "6001"), item(11, "allow", "ingress", "udp", "", B, f"{CLIENT}/32"))
    some = [item(at, "allow", "ingress", "tcp", str(9000 + at), f"10.{at}.0.0/16") for at in range(20, 80)]
    early = [item(at, "deny", "ingress", "udp", str(100 + at), A, B) for at in range(1, 9)]
    forwards = [forward(OTHER, port, "a2", port, "udp") for port in (6000, 6001)]
    lists = [
        keep,
        (*keep, *some),
        (*early, *keep),
        (*early, *keep, item(90, "allow", "ingress")),
        (*keep, item(5, "deny", "egress", "udp", "7")),
    ]
    scopes = [
        vpc(it, egress, port_forwards={it.key: it for it in forwards}) for it in lists for egress in (None, (ALL_IN,))
    ]
    tables = [nft.ruleset(it) for it in scopes]
    floods: list[Flood] = []
    with VpcLab() as lab, contextlib.closing(Nft(lab.ns("dev"))) as device:
        lab.serve("a1", "tcp", 22)
        lab.renew(scopes[0])
        try:
            floods = [
                Flood(lab, "b1", HOMES["b1"], HOMES["a1"], ("a1", HOMES["a1"]), HOMES["b1"]),
                Flood(lab, "inet", CLIENT, OTHER, ("a2", HOMES["a2"]), CLIENT),
            ]
            for _ in swaps(device, tables, floods, at_least=120):
                pass
            results = [it.finish() for it in floods]
        finally:
            for it in floods:
                it.stop()
    assert all(it.sent >= 1000 for it in results), results
    assert [it[1:] for it in results] == [(0, 0, 0)] * len(floods), results
