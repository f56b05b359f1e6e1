"""Short constructors for the scopes of the renderer's tests.

There is one isolated network with three guests, and there are public addresses behind three exits: ``A1`` (the
source-NAT address) and ``A2`` on VLAN 101, ``B1`` on VLAN 102, and ``C1`` (15 characters) on VLAN 101 in a subnet with
its own gateway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from netloom.state import Firewall, FirewallRule, Network, Nic, Pbr, PortForward, Ports, PublicIp, Scope, StaticNat

CIDR, GATEWAY = "10.1.1.0/24", "10.1.1.1"
VM1, VM2, VM3 = "10.1.1.11", "10.1.1.12", "10.1.1.13"
MACS = {VM1: "02:00:00:00:00:01", VM2: "02:00:00:00:00:02", VM3: "02:00:00:00:00:03"}

A1 = PublicIp(address="203.0.113.20", vlan="101", gateway="203.0.113.1", cidr="203.0.113.0/24", exit=1, source_nat=True)
A2 = replace(A1, address="203.0.113.21", source_nat=False)
B1 = PublicIp(address="198.51.100.20", vlan="102", gateway="198.51.100.1", cidr="198.51.100.0/24", exit=2)
C1 = PublicIp(address="198.151.100.120", vlan="101", gateway="198.151.100.1", cidr="198.151.100.0/24", exit=3)


NO_PBR = Pbr()


def network(firewall: Firewall | None = None) -> Network:
    return Network(
        network_id="204",
        implemented=True,
        vlan="1204",
        cidr=CIDR,
        gateway=GATEWAY,
        extension_ip=GATEWAY,
        firewall=firewall,
        nics=nics(MACS),
    )


def wish(
    *rules: FirewallRule,
    held: Iterable[PublicIp] = (A1,),
    forwards: Iterable[PortForward] = (),
    static: Iterable[StaticNat] = (),
    allow_egress: bool = True,
    firewall: bool = True,
    ingress_open: bool = False,
    pbr: Pbr = NO_PBR,
) -> Scope:
    """A scope with one implemented network and these rules. ``firewall=False``: apply-fw-rules was never called."""
    numbered = tuple(replace(rule, rule_id=at) for at, rule in enumerate(rules, 1))
    return Scope(
        scope_id="net-204",
        owner="tests",
        networks={"204": network(Firewall(default_egress_allow=allow_egress, rules=numbered) if firewall else None)},
        public_ips={it.address: it for it in held},
        port_forwards={it.key: it for it in forwards},
        static_nats={it.public_ip: it for it in static},
        ingress_open=ingress_open,
        pbr=pbr,
    )


def nics(macs: dict[str, str]) -> dict[str, Nic]:
    """A NIC for each address: address to MAC."""
    return {mac: Nic(mac=mac, ip=ip, leased=True) for ip, mac in macs.items()}


def with_nics(scope: Scope, macs: dict[str, str]) -> Scope:
    """``scope`` with these NICs and no others."""
    return replace(scope, networks={"204": replace(scope.networks["204"], nics=nics(macs))})


def ports(text: str) -> Ports:
    first, _, last = text.partition("-")
    return Ports(int(first), int(last or first))


def admit(
    at: PublicIp,
    protocol: Literal["tcp", "udp", "icmp", "all"] = "tcp",
    port: str = "",
    *sources: str,
    type: int | None = None,
    code: int | None = None,
) -> FirewallRule:
    """An ingress rule."""
    return FirewallRule(
        rule_id=0,
        direction="ingress",
        protocol=protocol,
        ports=ports(port) if port else None,
        public_ip=at.address,
        source_cidrs=sources,
        icmp_type=type,
        icmp_code=code,
    )


def egress(
    protocol: Literal["tcp", "udp", "icmp", "all"] = "all",
    port: str = "",
    *,
    sources: tuple[str, ...] = (),
    dests: tuple[str, ...] = (),
    type: int | None = None,
    code: int | None = None,
) -> FirewallRule:
    """An egress rule. The firewall's default decides whether it allows or denies."""
    return FirewallRule(
        rule_id=0,
        direction="egress",
        protocol=protocol,
        ports=ports(port) if port else None,
        source_cidrs=sources,
        dest_cidrs=dests,
        icmp_type=type,
        icmp_code=code,
    )


def forward(
    at: PublicIp, port: str, to: str, private: str = "", protocol: Literal["tcp", "udp"] = "tcp"
) -> PortForward:
    return PortForward(
        public_ip=at.address,
        protocol=protocol,
        public_ports=ports(port),
        private_ip=to,
        private_ports=ports(private or port),
        network_id="204",
    )


def static(at: PublicIp, to: str) -> StaticNat:
    return StaticNat(public_ip=at.address, private_ip=to, network_id="204")
