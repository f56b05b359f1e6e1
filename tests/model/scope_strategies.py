"""Hypothesis strategies for scopes with any mixture of addresses, translations and rules that CloudStack may send."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.state import (
    Backend,
    Firewall,
    FirewallRule,
    LbRule,
    Outside6,
    Pbr,
    PbrRoute,
    PbrRule,
    PortForward,
    PublicIp,
    Scope,
    StaticNat,
)
from unit.scopes import A1, A2, B1, C1, CIDR, GATEWAY, VM1, VM2, VM3, network, ports

ADDRESSES = (A1, A2, B1, C1)
PREFIXES = (
    "0.0.0.0/0",
    "192.0.2.0/24",
    "192.0.2.0/25",
    "192.0.2.10/32",
    "10.1.1.0/24",
    "::/0",
    "198.51.100.7/32",
    "2001:db8:50:1::/64",
)
PORTS = ("22", "80", "443", "1-65535", "80-90", "85-100", "5000-5009", "65535")

addresses = st.sampled_from([it.address for it in ADDRESSES])
guests = st.sampled_from((VM1, VM2, VM3))
spans = st.sampled_from(PORTS).map(ports)
prefixes = st.lists(st.sampled_from(PREFIXES), max_size=3).map(tuple)


@st.composite
def rules(draw: st.DrawFn) -> FirewallRule:
    direction = draw(st.sampled_from(("ingress", "egress")))
    protocol = draw(st.sampled_from(("tcp", "udp", "icmp", "all")))
    return FirewallRule(
        rule_id=draw(st.integers(1, 9999)),
        direction=direction,  # type: ignore[arg-type]
        protocol=protocol,
        ports=draw(st.none() | spans) if protocol in ("tcp", "udp") else None,
        icmp_type=draw(st.sampled_from((None, -1, 0, 8, 13))) if protocol == "icmp" else None,
        icmp_code=draw(st.sampled_from((None, -1, 0, 1))) if protocol == "icmp" else None,
        public_ip=draw(addresses) if direction == "ingress" else "",
        source_cidrs=draw(prefixes),
        dest_cidrs=draw(prefixes) if direction == "egress" else (),
    )


@st.composite
def port_forwards(draw: st.DrawFn) -> PortForward:
    public = draw(st.sampled_from(PORTS[:3] + PORTS[4:]).map(ports))
    first = draw(st.integers(1, 65535 - public.count))
    private = draw(st.sampled_from((public, ports(str(first)), ports(f"{first}-{first + public.count - 1}"))))
    return PortForward(
        public_ip=draw(addresses),
        protocol=draw(st.sampled_from(("tcp", "udp"))),
        public_ports=public,
        private_ip=draw(guests),
        private_ports=private,
        network_id="204",
    )


static_nats = st.builds(
    lambda at, to: StaticNat(public_ip=at, private_ip=to, network_id="204"),
    st.sampled_from([it.address for it in ADDRESSES[1:]]),
    guests,
)


# Public ports that no port forward uses, because a command that uses a port twice is refused.
lb_rules = st.builds(
    lambda rule_id, at, port, protocol, algorithm, backends: LbRule(
        rule_id=rule_id,
        public_ip=at,
        public_port=port,
        protocol=protocol,
        algorithm=algorithm,
        backends=tuple(sorted(Backend(ip=it, port=end) for it, end in backends)),
        network_id="204",
    ),
    st.integers(1, 99),
    addresses,
    st.sampled_from((53, 8080)),
    st.sampled_from(("tcp", "udp", "tcp-proxy")),
    st.sampled_from(("roundrobin", "leastconn", "source")),
    st.sets(st.tuples(guests, st.sampled_from((53, 80))), max_size=3),
)


def _held(chosen: list[PublicIp], source: PublicIp | None) -> dict[str, PublicIp]:
    return {it.address: replace(it, source_nat=it == source) for it in chosen}


def _port_of(rule: LbRule) -> tuple[str, int, bool]:
    return rule.public_ip, rule.public_port, rule.protocol == "udp"


routes = st.builds(
    PbrRoute,
    table=st.integers(100, 101),
    destination=st.sampled_from(PREFIXES[:4]),
    link=st.sampled_from(("pub-101", "pub-102", "gst-204")),
    via=st.sampled_from(("", "203.0.113.1", "198.151.100.1", "198.51.100.1", A2.address, "10.1.1.255")),
    source=st.sampled_from(("", A1.address, GATEWAY)),
) | st.builds(
    PbrRoute,
    table=st.integers(100, 101),
    destination=st.sampled_from(PREFIXES[:4]),
    kind=st.sampled_from(("blackhole", "unreachable", "prohibit")),
)
policies = st.builds(
    lambda some, those: Pbr(
        routes=tuple(some), rules=tuple(PbrRule(priority=at, table=100, source=it) for at, it in those.items())
    ),
    st.lists(routes, max_size=4, unique_by=lambda it: (it.table, it.destination)),
    st.dictionaries(st.integers(10000, 10003), st.sampled_from(("", CIDR)), max_size=2),
)
outsides6 = st.builds(
    Outside6,
    gateway=st.sampled_from(("2001:db8:99::1", "fe80::1", "2001:db8:98::1")),
    address=st.sampled_from(("2001:db8:99::/64", "2001:db8:99::7/64")),
)


@st.composite
def scopes(draw: st.DrawFn, implemented: bool = True) -> Scope:
    firewall = draw(
        st.none()
        | st.builds(
            lambda allow, some: Firewall(default_egress_allow=allow, rules=tuple(some)),
            st.booleans(),
            st.lists(rules(), max_size=6),
        )
    )
    chosen = draw(st.lists(st.sampled_from(ADDRESSES), unique_by=lambda it: it.address, max_size=4))
    forwards = draw(st.lists(port_forwards(), max_size=5))
    nats = draw(st.lists(static_nats, max_size=2))
    balanced = draw(st.lists(lb_rules, max_size=3, unique_by=(lambda it: it.rule_id, _port_of)))
    cidr6, gateway6 = draw(st.sampled_from((("", ""), ("2001:db8:50:1::/64", "2001:db8:50:1::1"))))
    configured = replace(network(firewall), implemented=implemented, ip6_cidr=cidr6, ip6_gateway=gateway6)
    return Scope(
        scope_id="net-204",
        owner="tests",
        networks={"204": configured},
        public_ips=_held(chosen, draw(st.sampled_from([None, *chosen]))),
        port_forwards={it.key: it for it in forwards},
        static_nats={it.public_ip: it for it in nats},
        lb_rules={str(it.rule_id): it for it in balanced},
        ingress_open=draw(st.booleans()),
        pbr=draw(st.just(Pbr()) | policies),
        outside6=draw(st.none() | outsides6),
    )
