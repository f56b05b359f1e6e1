"""Hypothesis strategies for scopes: any mixture of addresses, translations and rules that CloudStack could ask for."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.state import Firewall, FirewallRule, PortForward, PublicIp, Scope, StaticNat
from unit.wishes import A1, A2, B1, C1, VM1, VM2, VM3, network, ports

ADDRESSES = (A1, A2, B1, C1)
PREFIXES = ("0.0.0.0/0", "192.0.2.0/24", "192.0.2.0/25", "192.0.2.10/32", "10.1.1.0/24", "::/0", "198.51.100.7/32")
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
        protocol=protocol,  # type: ignore[arg-type]
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


def _held(chosen: list[PublicIp], source: PublicIp | None) -> dict[str, PublicIp]:
    return {it.address: replace(it, source_nat=it == source) for it in chosen}


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
    return Scope(
        scope_id="net-204",
        owner="tests",
        networks={"204": replace(network(firewall), implemented=implemented)},
        public_ips=_held(chosen, draw(st.sampled_from([None, *chosen]))),
        port_forwards={it.key: it for it in forwards},
        static_nats={it.public_ip: it for it in nats},
        ingress_open=draw(st.booleans()),
    )
