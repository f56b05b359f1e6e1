"""Connections to VMs with several NICs, tested with packets.

The VM ``dual`` has a NIC in the network and its default route through another one, where nobody forwards. The VM
``both`` has a NIC in each of the two tiers of a VPC.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.flow_policy_check import agree
from kernel.ruleset_lab import CLIENT, PATIENCE_S, QUIET_S, Lab, Try, echoes, run
from kernel.vpc_lab import GATEWAYS, HOMES, OTHER, STATIC, VpcLab, item, vpc
from netloom.state import AclItem, Backend, LbRule, Network, Nic, Scope, StaticNat
from unit.scopes import A1, B1, GATEWAY, VM1, admit, forward, static, wish

DUAL = "10.1.1.14"
IN_A, IN_B = "10.20.1.50", "10.20.2.50"


def connect(lab: Lab, space: str, *nics: tuple[str, str]) -> None:
    """Make a namespace with a NIC for each VLAN and address."""
    run("ip", "netns", "add", lab.ns(space))
    lab._spaces.append(space)
    run("ip", "netns", "exec", lab.ns(space), "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.default.rp_filter=0", "net.ipv4.conf.all.arp_ignore=1")  # fmt: skip
    for at, (vlan, address) in enumerate(nics):
        port = f"x{space}-{vlan}"
        lab.ip("sw", f"link add {port} type veth peer name eth{at} netns {lab.ns(space)}",
               f"link set {port} master breth1-{vlan}", f"link set {port} up")  # fmt: skip
        lab.ip(space, f"addr add {address} dev eth{at}", f"link set eth{at} up")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        connect(lab, "dual", ("1204", f"{DUAL}/24"), ("0", "172.31.0.2/24"))
        lab.ip("dual", "route add default via 172.31.0.1")
        for vm in ("dual", "vm1"):
            for protocol in ("tcp", "udp"):
                lab.serve(vm, protocol, 22)
        yield lab


def nic(address: str, hostname: str, *, default: bool) -> Nic:
    return Nic(mac=f"02:01:00:cc:00:{int(address.rpartition('.')[2]):02x}", ip=address, hostname=hostname,
               default=default, leased=True)  # fmt: skip


def with_nics(network: Network, *nics: Nic) -> Network:
    return replace(network, nics={it.key: it for it in nics})


def one_network(*, default: bool = False) -> Scope:
    scope = wish(
        admit(A1, "all"), admit(B1, "all"), held=(A1, B1), static=[static(B1, DUAL)],
        forwards=[forward(A1, "22", DUAL), forward(A1, "22", DUAL, protocol="udp"), forward(A1, "23", VM1, "22")],
    )  # fmt: skip
    balanced = LbRule(rule_id=1, public_ip=A1.address, public_port=24, protocol="udp", algorithm="roundrobin",
                      backends=(Backend(ip=DUAL, port=22),), network_id="204")  # fmt: skip
    network = with_nics(scope.networks["204"], nic(DUAL, "dual", default=default), nic(VM1, "vm1", default=True))
    return replace(scope, networks={"204": network}, lb_rules={"1": balanced})


def from_outside(protocol: str, target: str, port: int) -> Try:
    return Try("inet", protocol, target, port, CLIENT)


@pytest.mark.mutation("a-second-nic-answers-the-device", instead='"continue"')
def test_a_second_nic_is_reached_from_outside_with_the_devices_address(lab: Lab) -> None:
    lab.renew(one_network())
    tries = [
        from_outside("tcp", A1.address, 22), from_outside("udp", A1.address, 22), from_outside("udp", A1.address, 24),
        from_outside("tcp", B1.address, 22), from_outside("udp", B1.address, 22),
    ]  # fmt: skip
    for answer in lab.answered(*tries):
        assert answer.startswith(f"dual {GATEWAY}:"), answer
    lab.answered(Try("inet", "icmp", B1.address, source=CLIENT))
    agree(lab, dict.fromkeys(tries, CLIENT))
    # All other guests see the client.
    assert lab.answered(from_outside("tcp", A1.address, 23))[0].startswith(f"vm1 {CLIENT}:")


def test_a_nic_that_becomes_the_default_sees_the_clients_and_the_other_way_round(lab: Lab) -> None:
    lab.ip("dual", f"route replace default via {GATEWAY}")
    try:
        lab.renew(one_network(default=True))
        assert lab.answered(from_outside("tcp", A1.address, 22))[0].startswith(f"dual {CLIENT}:")
        with lab.connect("inet", A1.address, 22, CLIENT) as stays, lab.open_socket("inet", 2) as datagrams:
            datagrams.settimeout(PATIENCE_S)
            datagrams.bind((CLIENT, 0))
            datagrams.connect((A1.address, 22))
            for default, seen in ((True, CLIENT), (False, GATEWAY), (True, CLIENT)):
                lab.apply(one_network(default=default))
                datagrams.send(b"?")
                assert datagrams.recv(200).decode().startswith(f"dual {seen}:")
                assert echoes(stays)
    finally:
        lab.ip("dual", "route replace default via 172.31.0.1")


# A VPC


@pytest.fixture(scope="module")
def vpc_lab() -> Iterator[Lab]:
    with VpcLab() as lab:
        connect(lab, "both", ("1310", f"{IN_A}/24"), ("1311", f"{IN_B}/24"))
        lab.ip("both", "route add default via 10.20.1.1")
        for port in (22, 80):
            for protocol in ("tcp", "udp"):
                for vm in ("both", *HOMES):
                    lab.serve(vm, protocol, port)
        yield lab


IN_22 = (item(1, "allow", "ingress", "tcp", "22"), item(2, "allow", "ingress", "udp", "22"))


def two_tiers(acl_a: tuple[AclItem, ...] = IN_22, acl_b: tuple[AclItem, ...] = IN_22) -> Scope:
    scope = vpc(acl_a, acl_b)
    a = with_nics(scope.networks["310"], nic(IN_A, "both", default=True), nic(HOMES["a1"], "a1", default=True))
    b = with_nics(scope.networks["311"], nic(IN_B, "both", default=False), nic(HOMES["b1"], "b1", default=True))
    return replace(
        scope,
        networks={"310": a, "311": b},
        static_nats={STATIC: StaticNat(public_ip=STATIC, private_ip=IN_B, network_id="311")},
    )


@pytest.mark.mutation("a-vm-in-two-tiers-answers-the-device", instead="()")
@pytest.mark.mutation("a-second-nic-answers-the-device", instead='"continue"')
def test_a_vm_in_two_tiers_is_reached_at_both_addresses_from_both_tiers(vpc_lab: Lab) -> None:
    vpc_lab.renew(two_tiers())
    tries = {
        Try(vm, protocol, target, 22): HOMES[vm]
        for vm, target in (("a1", IN_B), ("b1", IN_A), ("a1", STATIC), ("b1", STATIC))
        for protocol in ("tcp", "udp")
    }
    tries |= {from_outside("tcp", STATIC, 22): CLIENT, from_outside("udp", STATIC, 22): CLIENT}
    for answer in vpc_lab.answered(*tries):
        assert answer.startswith("both "), answer
    agree(vpc_lab, tries)
    # Inside its own tier, and to other guests, nothing is translated.
    direct = (Try("a1", "tcp", IN_A, 22), Try("b1", "tcp", IN_B, 22), Try("a1", "tcp", HOMES["b1"], 22))
    seen = [answer.split()[1].partition(":")[0] for answer in vpc_lab.answered(*direct)]
    assert seen == [HOMES["a1"], HOMES["b1"], HOMES["a1"]]


def test_the_lists_apply_to_a_vm_in_two_tiers(vpc_lab: Lab) -> None:
    vpc_lab.renew(two_tiers())
    closed = [Try(vm, "tcp", target, 80) for vm, target in (("a1", IN_B), ("b1", IN_A), ("inet", STATIC))]
    vpc_lab.silent(*closed)
    vpc_lab.renew(two_tiers(acl_a=()))
    vpc_lab.answered(Try("a1", "tcp", IN_B, 22))
    vpc_lab.silent(Try("b1", "tcp", IN_A, 22))


def test_a_connection_to_a_vm_in_two_tiers_carries_data_and_ends_with_its_list_item(vpc_lab: Lab) -> None:
    vpc_lab.renew(two_tiers())
    with vpc_lab.connect("a1", IN_B, 22) as to_b, vpc_lab.connect("b1", IN_A, 22) as to_a:
        assert echoes(to_b) and echoes(to_a)
        vpc_lab.apply(two_tiers(acl_b=(item(1, "allow", "ingress", "tcp", "80"),)))
        assert not echoes(to_b, QUIET_S)
        assert echoes(to_a)
        states = [line for line in vpc_lab.entries() if line.dst == IN_A and line.protocol == 6]
        assert [it.reply_dst for it in states] == [GATEWAYS["a1"]]


def test_a_vm_with_its_default_nic_elsewhere_is_reached_at_both_of_its_other_nics(vpc_lab: Lab) -> None:
    """Three NICs: the default one in a foreign network, where nobody forwards, and one in each tier."""
    in_a, in_b = "10.20.1.60", "10.20.2.60"
    connect(vpc_lab, "three", ("0", "172.31.0.3/24"), ("1310", f"{in_a}/24"), ("1311", f"{in_b}/24"))
    vpc_lab.ip("three", "route add default via 172.31.0.1")
    for protocol in ("tcp", "udp"):
        vpc_lab.serve("three", protocol, 22)
    ping = item(3, "allow", "ingress", "icmp")
    scope = two_tiers((*IN_22, ping), (*IN_22, ping))
    networks = {
        key: replace(it, nics=it.nics | {f"n-{key}": nic(address, "three", default=False)})
        for (key, it), address in zip(scope.networks.items(), (in_a, in_b), strict=True)
    }
    nats = {
        STATIC: StaticNat(public_ip=STATIC, private_ip=in_b, network_id="311"),
        OTHER: StaticNat(public_ip=OTHER, private_ip=in_a, network_id="310"),
    }
    vpc_lab.renew(replace(scope, networks=networks, static_nats=nats))
    tries = [
        Try(space, protocol, target, 22, CLIENT if space == "inet" else "")
        for protocol in ("tcp", "udp")
        for space, target in (
            ("inet", STATIC), ("inet", OTHER), ("a1", in_b), ("b1", in_a), ("a1", STATIC), ("b1", OTHER),
            ("a1", OTHER), ("b1", STATIC),
        )
    ]  # fmt: skip
    for answer in vpc_lab.answered(*tries):
        assert answer.startswith("three "), answer
    vpc_lab.answered(
        *(Try("inet", "icmp", target, source=CLIENT) for target in (STATIC, OTHER)),
        *(Try(space, "icmp", target) for space, target in (("a1", in_b), ("b1", in_a))),
    )
    with vpc_lab.connect("inet", STATIC, 22, CLIENT) as one, vpc_lab.connect("a1", in_b, 22) as other:
        assert echoes(one) and echoes(other)
