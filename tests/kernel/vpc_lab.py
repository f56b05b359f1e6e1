"""The ruleset lab with a VPC: two tiers, two VMs in the first and one in the second, and three public addresses.

A static NAT, port forwards and a balanced port lead into the tiers. Sockets of the device stand in for haproxy.
"""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from kernel.ruleset_lab import MACS, Lab, run
from netloom.state import AclItem, Backend, LbRule, Network, Nic, PortForward, Ports, PublicIp, Scope, StaticNat

A, B = "10.20.1.0/24", "10.20.2.0/24"
GATEWAYS = {"a1": "10.20.1.1", "a2": "10.20.1.1", "b1": "10.20.2.1"}
HOMES = {"a1": "10.20.1.31", "a2": "10.20.1.32", "b1": "10.20.2.31"}
TIERS = {"a1": "310", "a2": "310", "b1": "311"}
FORWARDED, BALANCED = 2222, 8000


def public(address: str, *, source_nat: bool = False, network_id: str = "") -> PublicIp:
    return PublicIp(
        address=address, vlan="101", gateway="203.0.113.1", cidr="203.0.113.0/24", exit=1, source_nat=source_nat,
        network_id=network_id,
    )  # fmt: skip


NAT, OTHER, STATIC = "203.0.113.30", "203.0.113.31", "203.0.113.32"


def vpc(acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None, **more: object) -> Scope:
    tier = Network(network_id="310", implemented=True, vlan="1310", cidr=A, gateway="10.20.1.1", acl=acl_a)
    other = replace(tier, network_id="311", vlan="1311", cidr=B, gateway="10.20.2.1", acl=acl_b)
    scope = Scope(
        scope_id="vpc-7",
        owner="test",
        vpc_implemented=True,
        networks={it.network_id: replace(it, nics=_nics(it)) for it in (tier, other)},
        public_ips={it.address: it for it in (public(NAT, source_nat=True), public(OTHER), public(STATIC))},
        static_nats={STATIC: StaticNat(public_ip=STATIC, private_ip=HOMES["a2"], network_id="310")},
        port_forwards={
            it.key: it
            for it in (
                # The VPC's source-NAT address has several services, of two tiers.
                forward(NAT, FORWARDED, "a1", 22, "tcp"),
                forward(NAT, FORWARDED, "a1", 22, "udp"),
                forward(NAT, FORWARDED + 1, "b1", 22, "tcp"),
            )
        },
        lb_rules={
            "1": LbRule(
                rule_id=1, public_ip=NAT, public_port=BALANCED, protocol="tcp", algorithm="roundrobin",
                backends=(Backend(ip=HOMES["a1"], port=80),), network_id="310",
            )
        },
    )  # fmt: skip
    return replace(scope, **more)


def _nics(tier: Network) -> dict[str, Nic]:
    return {vm: Nic(mac=MACS[vm], ip=HOMES[vm]) for vm in HOMES if TIERS[vm] == tier.network_id}


def forward(at: str, port: int, vm: str, private: int, protocol: str) -> PortForward:
    return PortForward(
        public_ip=at, protocol="udp" if protocol == "udp" else "tcp", public_ports=Ports(port, port),
        private_ip=HOMES[vm], private_ports=Ports(private, private), network_id=TIERS[vm],
    )  # fmt: skip


def item(number: int, action: str, direction: str, protocol: str = "all", ports: str = "", *cidrs: str) -> AclItem:
    first, _, last = ports.partition("-")
    return AclItem(
        number=number,
        action="allow" if action == "allow" else "deny",
        direction="ingress" if direction == "ingress" else "egress",
        protocol=protocol,
        ports=Ports(int(first), int(last or first)) if ports else None,
        cidrs=cidrs,
    )


class VpcLab(Lab):
    """The ruleset lab with a segment for each tier."""

    def _build(self) -> None:
        super()._build()
        self.ip("sw", *(f"link add breth1-{vlan} type bridge" for vlan in ("1310", "1311")))
        self.ip("sw", *(f"link set breth1-{vlan} up" for vlan in ("1310", "1311")))
        for vm, address in HOMES.items():
            run("ip", "netns", "add", self.ns(vm))
            self._spaces.append(vm)
            run("ip", "netns", "exec", self.ns(vm), "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
            self.plug(vm, "1310" if TIERS[vm] == "310" else "1311", f"{address}/24")
            self.ip(vm, f"route add default via {GATEWAYS[vm]}", "link set lo up")
        self.ip("nb", f"route add {A} via {NAT}", f"route add {B} via {NAT}")


@st.composite
def items(
    draw: st.DrawFn, cidrs: st.SearchStrategy[list[str]], number: str, icmp_type: int, other_type: int
) -> AclItem:
    protocol = draw(st.sampled_from(["tcp", "tcp", "udp", "icmp", "all", number]))
    ports = draw(st.sampled_from(["", "22", "53", "1-80", "80-8080"])) if protocol in ("tcp", "udp") else ""
    made = item(
        draw(st.integers(1, 20)), draw(st.sampled_from(["allow", "allow", "deny"])),
        draw(st.sampled_from(["ingress", "ingress", "egress"])), protocol, ports, *sorted(set(draw(cidrs))),
    )  # fmt: skip
    return replace(made, icmp_type=draw(st.sampled_from([None, icmp_type, other_type]))) if protocol == "icmp" else made


def lists(
    cidrs: st.SearchStrategy[list[str]], *, number: str, icmp_type: int, other_type: int
) -> st.SearchStrategy[tuple[AclItem, ...] | None]:
    """A strategy for ACLs, including no ACL.

    ``number`` is a protocol given by its number. Tests send ICMP of ``icmp_type`` and none of ``other_type``.
    """
    made = items(cidrs, number, icmp_type, other_type)
    return st.none() | st.lists(made, max_size=6, unique_by=lambda it: it.number).map(tuple)
