"""IPv6 packets against the rendered rulesets, compared with an independent truth table and with the flow policy.

The lab has two tiers of a VPC, of which the second may have no IPv6, and an isolated network, each with an uplink. All
VMs have static addresses and permanent neighbour entries of their gateways, so every packet is really sent.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kernel.flood import Flood, swaps
from kernel.flow_policy_check import agree
from kernel.ftp_control import Control, expectations, numbers
from kernel.ip6_lab import (
    FAR,
    FARTHER,
    GATEWAYS,
    HOMES,
    NEIGHBOUR,
    OURS,
    OUTSIDE,
    ROUTER,
    A,
    B,
    C,
    SixLab,
    known,
    tiers,
)
from kernel.ruleset_lab import PATIENCE_S, STRANGER, Lab, Nft, Try, echoes, run
from kernel.vpc_lab import HOMES as VM
from kernel.vpc_lab import TIERS, item, lists
from netloom import names
from netloom.render import nft, ruleset
from netloom.state import AclItem, Firewall, FirewallRule, Scope
from netns import inside
from unit.scopes import A1, CIDR, MACS, VM2, egress, wish, with_nics

ECHO = 128 << 8
PORTS = (22, 53, 80, 8080)
KINDS = [(protocol, port) for protocol in ("tcp", "udp") for port in PORTS] + [("icmp", ECHO)]
SERVICES = [("udp", 53), ("tcp", 53), ("icmp", ECHO)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with SixLab() as lab:
        for port in PORTS:
            for protocol in ("tcp", "udp"):
                for space in ("dev", *HOMES):
                    lab.serve(space, protocol, port, "::")
                for address in (FAR, FARTHER):
                    lab.serve("inet", protocol, port, address)
        yield lab


def is_in(address: str, cidrs: Iterable[str]) -> bool:
    return not list(cidrs) or any(ip_address(address) in ip_network(it) for it in cidrs)


# ------------------------------------------------------------------------------------------------------------- tiers


def lets(acl: tuple[AclItem, ...] | None, direction: str, protocol: str, port: int, far: str) -> bool:
    """An independent implementation of ACLs for IPv6."""
    mine = [it for it in sorted(acl or (), key=lambda it: it.number) if it.direction == direction]
    for it in mine:
        right_port = it.ports is None or it.ports.first <= port <= it.ports.last
        right_type = protocol != "icmp" or it.protocol == "all" or it.icmp_type in (None, port >> 8)
        about = it.protocol == "all" or it.protocol == protocol or (it.protocol, protocol) == ("58", "icmp")
        if about and right_port and right_type and is_in(far, it.cidrs):
            return it.action == "allow"
    return direction == "egress" and not mine


def table(acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None, *, both: bool) -> dict[Try, bool]:
    """The truth table: each attempt, and whether it must be answered."""
    acls = {"310": acl_a, "311": acl_b}
    tried: dict[Try, bool] = {}
    for protocol, port in KINDS:

        def out(vm: str, target: str, protocol: str = protocol, port: int = port) -> bool:
            return lets(acls[TIERS[vm]], "egress", protocol, port, target)

        def into(vm: str, source: str, protocol: str = protocol, port: int = port) -> bool:
            return lets(acls[TIERS[vm]], "ingress", protocol, port, source)

        for one, other in (("a1", "b1"), ("b1", "a1"), ("b1", "a2")):
            between = both and out(one, HOMES[other]) and into(other, HOMES[one])
            tried[Try(one, protocol, HOMES[other], port)] = between
        for vm in ("a1", "b1"):
            speaks = both or vm == "a1"
            for target in (FAR, FARTHER):
                tried[Try(vm, protocol, target, port)] = speaks and out(vm, target)
            tried[Try(vm, protocol, GATEWAYS[vm], port)] = speaks and (protocol, port) in SERVICES
            tried[Try(vm, protocol, GATEWAYS["b1" if vm == "a1" else "a1"], port)] = False
            for space, source in (("inet", FAR), ("inet", FARTHER), ("nb", NEIGHBOUR)):
                tried[Try(space, protocol, HOMES[vm], port, source)] = speaks and into(vm, source)
            tried[Try("inet", protocol, GATEWAYS[vm], port, FAR)] = False
        tried[Try("inet", protocol, OURS, port, FAR)] = False
        # A neighbour on the public VLAN with the source address of a guest.
        tried[Try("nb", protocol, HOMES["a1"], port, HOMES["a2"])] = False
        tried[Try("nb", protocol, HOMES["b1"], port, HOMES["a2"])] = False
    return tried


CIDRS = st.lists(
    st.sampled_from([A, B, "2001:db8:50::/48", "::/0", f"{FAR}/128", "2001:db8:fffe::/47", f"{HOMES['b1']}/128",
                     f"{NEIGHBOUR}/128", "0.0.0.0/0", "10.20.0.0/16"]),
    max_size=3,
)  # fmt: skip


LISTS = lists(CIDRS, number="58", icmp_type=128, other_type=8)
OPEN = (item(1, "allow", "ingress"),)


@pytest.mark.mutation(
    "a-tiers-list-is-asked-about-ipv6", instead='[f"iifname {PUBLIC_LINKS} oifname {link} meta nfproto ipv6 accept"]'
)
@settings(max_examples=12)
@example((item(1, "allow", "ingress", "tcp", "22", f"{FAR}/128"), item(2, "deny", "egress", "udp")), OPEN, True)
@given(LISTS, st.just(OPEN) | LISTS, st.booleans())
def test_ipv6_packets_of_tiers_follow_the_acls(
    lab: Lab, acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None, both: bool
) -> None:
    lab.renew(tiers(acl_a, acl_b, both=both))
    told = table(acl_a, acl_b, both=both)
    lab.assert_answers(told)
    # The flow policy does not know the inbound link. So leave out the neighbour with a guest's address and the VMs of a
    # tier without IPv6, whose addresses count as outside.
    sources = {it: it.source or HOMES[it.space] for it in told if both or it.space != "b1"}
    agree(lab, {it: source for it, source in sources.items() if (it.space, source) != ("nb", HOMES["a2"])})


def test_closed_ports_of_the_ipv6_gateway_are_refused_to_its_tier(lab: Lab) -> None:
    lab.renew(tiers((item(1, "deny", "egress"),), None, both=True))
    closed = [Try(vm, protocol, GATEWAYS[vm], 4444) for vm in ("a1", "b1") for protocol in ("tcp", "udp")]
    assert lab.ask(closed) == ["refused"] * len(closed)
    lab.silent(Try("a1", "tcp", GATEWAYS["b1"], 4444), Try("inet", "tcp", GATEWAYS["b1"], 4444, FAR))
    link = names.guest_link("310")
    link_local = re.search(r"fe80::[0-9a-f:]+", run("ip", "-n", lab.ns("dev"), "-6", "addr", "show", "dev", link))
    assert link_local
    with lab.open_socket("a1", socket.SOCK_STREAM, 0, "::") as client, pytest.raises(ConnectionRefusedError):
        client.settimeout(PATIENCE_S)
        with inside(lab.ns("a1")):
            client.connect((link_local[0], 4444, 0, socket.if_nametoindex("eth0")))


def test_closed_ports_of_the_ipv6_gateway_are_refused_to_an_isolated_network(lab: Lab) -> None:
    lab.renew(isolated(None, open_to_all=True))
    closed = [("tcp", 4444), ("udp", 4444)]
    assert lab.ask(Try("vm1", protocol, GATEWAYS["vm1"], port) for protocol, port in closed) == ["refused"] * 2
    lab.silent(*(Try("inet", protocol, GATEWAYS["vm1"], port, FAR) for protocol, port in closed))


@pytest.mark.parametrize("named", [(), ("ftp",)], ids=["none", "ftp"])
def test_ftp_over_ipv6_and_between_tiers_works_with_its_helper_only(lab: Lab, named: tuple[str, ...]) -> None:
    """EPRT and EPSV. The list of the second tier opens port 21 and denies all others."""
    ftp_only = (item(1, "allow", "ingress", "tcp", "21"), item(2, "deny", "ingress"))
    lab.renew(replace(tiers(None, ftp_only, both=True), helpers=named))
    lab.serve("b1", "tcp", 8080)
    inward, outward = (HOMES["b1"], 8080), (HOMES["a1"], 8080)
    with Control(lab, "a1", "b1", (HOMES["b1"], 21), (HOMES["b1"], 21)) as control:
        assert control.ask("EPSV", f"229 Entering (|||{inward[1]}|)")
        lab.silent(Try("a1", "tcp", inward[0], 22), Try("a2", "tcp", *inward))
        lab.assert_answers({Try("a1", "tcp", *inward): bool(named)})
    with Control(lab, "a1", "inet", (FAR, 21), (FAR, 21)) as control:
        for third in (HOMES["b1"], GATEWAYS["a1"], HOMES["a2"]):
            control.ask(f"EPRT |2|{third}|22|", "200 no")
        assert expectations(lab, 6) == []
        control.ask(f"EPRT |2|{outward[0]}|{outward[1]}|", "200 yes")
        lab.silent(Try("inet", "tcp", *outward, FARTHER))
        lab.assert_answers({Try("inet", "tcp", *outward, FAR): bool(named)})
    with Control(lab, "a1", "b1", (VM["b1"], 21), (VM["b1"], 21)) as control:
        control.ask("PASV", f"227 Entering ({numbers(VM['b1'], 8080)})")
        lab.silent(Try("a1", "tcp", VM["b1"], 22))
        lab.assert_answers({Try("a1", "tcp", VM["b1"], 8080): bool(named)})


@pytest.mark.mutation("an-ipv6-flow-is-judged-by-the-lists")
def test_a_changed_acl_ends_only_the_flows_it_allowed(lab: Lab) -> None:
    ssh, web = item(5, "allow", "ingress", "tcp", "22"), item(6, "allow", "ingress", "tcp", "8080")
    lab.renew(tiers((ssh, web), OPEN, both=True))
    gone = [lab.connect("inet", HOMES["a1"], 22, FAR), lab.connect("b1", HOMES["a1"], 22)]
    kept = [
        lab.connect("inet", HOMES["a1"], 8080, FAR),
        lab.connect("b1", HOMES["a1"], 8080),
        lab.connect("a1", HOMES["b1"], 22),
        lab.connect("a1", FAR, 22),
    ]
    lab.apply(tiers((item(4, "deny", "ingress", "tcp", "22", "::/0"), ssh, web), OPEN, both=True))
    assert [echoes(it, 0.5) for it in gone] == [False] * 2
    assert [echoes(it) for it in kept] == [True] * 4
    # Removing IPv6 from a tier ends only the flows of that tier.
    lab.apply(tiers((ssh, web), OPEN, both=False))
    assert [echoes(it, 0.5 if ends else PATIENCE_S) for it, ends in zip(kept, (0, 1, 1, 0), strict=True)] == [
        True, False, False, True,
    ]  # fmt: skip
    for it in gone + kept:
        it.close()


@pytest.mark.mutation("a-list-item-is-about-its-prefixes", instead='is_in(field, group) if family == 4 else ""')
def test_a_flood_sees_no_loss_and_no_gap_during_acl_changes(lab: Lab) -> None:
    """The ACL allows one port and denies another in both directions. Everything else changes during the flood."""
    keep = (
        item(10, "allow", "ingress", "udp", "6000", f"{FAR}/128", f"{FARTHER}/128"),
        item(11, "allow", "ingress", "udp", "6001", f"{ROUTER}/128", f"{NEIGHBOUR}/128"),
        item(12, "deny", "egress", "udp", "6001", f"{FAR}/128", f"{FARTHER}/128"),
        item(99, "allow", "egress"),
    )
    some = tuple(item(20 + at, "allow", "ingress", "udp", str(9000 + at), f"2001:db8:{at:x}::/48") for at in range(60))
    early = (item(1, "deny", "egress", "tcp", "25", B, "2001:db8:7::/48"), item(2, "deny", "ingress", "udp", "7", A))
    lists = [keep, (*keep, *some), (*early, *keep), (*early, *keep, *some[:9])]
    tables = [
        nft.ruleset(tiers(it, other, both=both)) for it in lists for other in (None, OPEN) for both in (True, False)
    ]
    lab.renew(tiers(keep, None, both=True))
    floods: list[Flood] = []
    with contextlib.closing(Nft(lab.ns("dev"))) as device:
        have = tables[0]
        try:
            floods = [
                Flood(lab, "inet", FAR, HOMES["a1"], ("a1", HOMES["a1"]), FAR),
                Flood(lab, "a2", HOMES["a2"], FARTHER, ("inet", FARTHER), HOMES["a2"]),
            ]
            for loaded in swaps(device, tables, floods, at_least=120):
                have = loaded
            results = [it.finish() for it in floods]
        finally:
            for it in floods:
                it.stop()
            device.load(ruleset.swap(have, tables[0]))
    assert all(it.sent >= 1000 for it in results), results
    assert [it[1:] for it in results] == [(0, 0, 0)] * len(floods), results


# ------------------------------------------------------------------------------------------------- isolated networks


def isolated(firewall: Firewall | None, *, open_to_all: bool) -> Scope:
    scope = wish(held=(A1,), ingress_open=open_to_all)
    network = replace(
        scope.networks["204"], firewall=firewall, ip6_cidr=C, ip6_gateway=GATEWAYS["vm1"], nics=known("vm1")
    )
    return replace(scope, networks={"204": network}, outside6=OUTSIDE)


def passes(firewall: Firewall | None, protocol: str, port: int, target: str) -> bool:
    """An independent implementation of egress rules for IPv6. Rules with an ICMP type concern IPv4 only."""
    if firewall is None:
        return True
    listed = any(
        it.protocol in ("all", protocol)
        and (protocol == "icmp" or it.ports is None or it.ports.first <= port <= it.ports.last)
        and not (it.protocol == "icmp" and (it.icmp_type or -1) >= 0)
        and is_in(HOMES["vm1"], it.source_cidrs)
        and is_in(target, it.dest_cidrs)
        for it in firewall.rules
    )
    return firewall.default_egress_allow != listed


RULES = st.builds(
    lambda protocol, port, sources, dests, type_: (
        egress(protocol, port, sources=sources, dests=dests)
        if protocol in ("tcp", "udp")
        else egress(protocol, sources=sources, dests=dests, type=type_ if protocol == "icmp" else None)
    ),
    st.sampled_from(["tcp", "udp", "icmp", "all"]),
    st.sampled_from(["", "22", "1-80", "80-8080"]),
    st.sampled_from([(), (), (CIDR,), (C,), (CIDR, C), (A,)]),
    st.sampled_from([(), (), ("0.0.0.0/0",), ("::/0",), (f"{FAR}/128",), ("2001:db8:fffe::/48", f"{STRANGER}/32")]),
    st.sampled_from([None, -1, 8, 128]),
)
FIREWALLS = st.none() | st.builds(
    lambda allow, rules: Firewall(default_egress_allow=allow, rules=tuple(rules)),
    st.booleans(),
    st.lists(RULES, min_size=1, max_size=5),
)
CLOSED = Firewall(default_egress_allow=False, rules=(FirewallRule(rule_id=1, direction="egress", protocol="icmp"),))


@settings(max_examples=12)
@example(CLOSED, False)
@given(FIREWALLS, st.booleans())
def test_ipv6_packets_of_an_isolated_network_follow_the_firewall(
    lab: Lab, firewall: Firewall | None, open_to_all: bool
) -> None:
    lab.renew(isolated(firewall, open_to_all=open_to_all))
    told: dict[Try, bool] = {}
    for protocol, port in KINDS:
        for target in (FAR, FARTHER):
            told[Try("vm1", protocol, target, port)] = passes(firewall, protocol, port, target)
        told[Try("vm1", protocol, GATEWAYS["vm1"], port)] = (protocol, port) in SERVICES
        for space, source in (("inet", FAR), ("nb", NEIGHBOUR)):
            told[Try(space, protocol, HOMES["vm1"], port, source)] = open_to_all
            for device in (GATEWAYS["vm1"], OURS):
                told[Try(space, protocol, device, port, source)] = False
    lab.assert_answers(told)
    agree(lab, {it: it.source or HOMES[it.space] for it in told})


@pytest.mark.mutation("dns-over-ip6-is-for-nics")
def test_the_resolver_of_a_shared_network_knows_its_vms_by_mac_over_ip6(lab: Lab) -> None:
    """A VM may have any IPv6 address of the prefix. Unknown machines have no TCP, and few questions."""
    home = replace(wish().networks["204"], guest_type="shared", ip6_cidr=C, ip6_gateway=GATEWAYS["vm1"])
    scope = replace(wish(), networks={"204": home}, outside6=OUTSIDE)
    udp, tcp = (Try("vm1", protocol, GATEWAYS["vm1"], 53) for protocol in ("udp", "tcp"))
    lab.renew(scope)
    lab.answered(udp, tcp)
    lab.renew(with_nics(scope, {VM2: MACS[VM2]}))
    lab.answered(udp)
    lab.silent(tcp)
