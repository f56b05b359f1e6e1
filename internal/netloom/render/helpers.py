"""Conntrack helpers for protocols that open further connections, such as FTP.

A helper reads the connection to the protocol's port and tells conntrack which connections it will open: conntrack then
calls their first packets "related". No helper is used unless the registration detail ``conntrack.helpers`` names it.
A helper is assigned to connections that guests open, and to connections to a public address that are translated to a
guest. All other connections have none, and without a helper only ICMP errors are related. A connection that ends at the
device has none either: haproxy repeats what a backend says, so a backend could announce any port of the public address,
and the client's connection to it would pass without the firewall.

The assignment is before DNAT: without a helper at that moment, kernels before 6.18 do not prepare the connection for
texts whose length changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from netloom.render.active import Active, target_port
from netloom.render.device import GUEST_LINKS
from netloom.render.ruleset import Helper, NftSet
from netloom.state import Ports


class Service(msgspec.Struct, frozen=True):
    """A helper of the kernel, and the protocol and the port of the connections that it reads."""

    type: str
    protocol: str
    port: int


# By the names in the registration (``names.CONNTRACK_HELPERS``), which are those of the modules nf_conntrack_<name>.
SERVICES = {
    "amanda": (Service("amanda", "udp", 10080),),
    "ftp": (Service("ftp", "tcp", 21),),
    "irc": (Service("irc", "tcp", 6667),),
    "pptp": (Service("pptp", "tcp", 1723),),
    "sane": (Service("sane", "tcp", 6566),),
    "sip": (Service("sip", "udp", 5060), Service("sip", "tcp", 5060)),
    "tftp": (Service("tftp", "udp", 69),),
}

ICMP_ERRORS = "meta l4proto { icmp, icmpv6 } ct state related accept"  # guard: only-icmp-is-related-without-a-helper


def objects(helpers: Iterable[str]) -> tuple[Helper, ...]:
    """The helper objects of the table, for the names of the registration. Unknown names are ignored."""
    return tuple(Helper(name=_object(it), type=it.type, protocol=it.protocol) for it in _services(helpers))


def modules(name: str) -> tuple[str, ...]:
    """The kernel modules of a helper: one for conntrack and, except for ``sane``, one for NAT."""
    return (f"nf_conntrack_{name}",) if name == "sane" else (f"nf_conntrack_{name}", f"nf_nat_{name}")


def not_offered(names: Iterable[str]) -> list[str]:
    """For each of these names, that the kernel of the host lacks the helper, and what to do."""
    return [
        f"conntrack.helpers: the kernel of this host has no helper for {it} (modprobe -a {' '.join(modules(it))})"
        for it in names
    ]


def opened_ports(now: Active, helpers: Iterable[str]) -> tuple[NftSet, ...]:
    """For each helper the public addresses and ports that lead to a guest, if one of both ports is the protocol's."""
    return tuple(
        NftSet(
            name=_set(it), kind="set", type="ipv4_addr . inet_service", flags="interval",
            elements=dict.fromkeys(_opened(now, it), ""),
        )
        for it in _services(helpers)
    )  # fmt: skip


def assignment(helpers: Iterable[str]) -> list[str]:
    """The rules that give new IPv4 connections their helper. They accept nothing."""
    rules = []
    outward = f"iifname {GUEST_LINKS} fib daddr type != local"  # guard: a-connection-to-the-device-has-no-helper
    for it in _services(helpers):
        new, set_it = "ct state new", f'ct helper set "{_object(it)}"'
        rules += [
            f"{new} {outward} {it.protocol} dport {it.port} {set_it}",
            f"{new} meta l4proto {it.protocol} ip daddr . th dport @{_set(it)} {set_it}",
        ]
    return rules


def ip6_assignment(helpers: Iterable[str], *, from_outside: bool) -> list[str]:
    """The same for IPv6, which is not translated. ``from_outside``: outside hosts may open connections."""
    guests = "" if from_outside else f"iifname {GUEST_LINKS} "
    return [
        f'ct state new {guests}{it.protocol} dport {it.port} ct helper set "{_object(it)}"' for it in _services(helpers)
    ]


def related(helpers: Iterable[str]) -> list[str]:
    """The rules that accept ICMP errors, and the connections that a helper in use has announced."""
    types = dict.fromkeys(it.type for it in _services(helpers))
    return [ICMP_ERRORS, *(f'ct state related ct helper "{it}" accept' for it in types)]


def _services(helpers: Iterable[str]) -> list[Service]:
    return [service for name in helpers for service in SERVICES.get(name, ())]


def _opened(now: Active, service: Service) -> list[str]:
    found = {f"{it.public_ip} . {service.port}" for it in now.static_nats}
    for part in now.forwarded:
        forward, first, last = part.forward, part.ports.first, part.ports.last
        if forward.protocol != service.protocol:
            continue
        ports = {service.port} if first <= service.port <= last else set()
        if target_port(forward, first) == target_port(forward, last) == service.port:
            found.add(f"{forward.public_ip} . {part.ports}")
            continue
        same = first + service.port - target_port(forward, first)
        if first <= same <= last and target_port(forward, same) == service.port:
            ports.add(same)
        found |= {f"{forward.public_ip} . {port}" for port in ports}
    if service.protocol == "udp":
        found |= {
            f"{rule.public_ip} . {rule.public_port}"
            for rule in now.udp_balanced
            if service.port in (rule.public_port, *(end.port for end in rule.backends))
        }
    return _without_covered(sorted(found))


def _without_covered(elements: list[str]) -> list[str]:
    """Without single ports that a range of the same address contains: the kernel refuses such a set."""
    spans = [(address, Ports(int(first), int(last or first))) for address, _, text in (
        it.partition(" . ") for it in elements
    ) for first, _, last in (text.partition("-"),)]  # fmt: skip
    return [
        element
        for element, (address, ports) in zip(elements, spans, strict=True)
        if not any(
            other != ports and where == address and other.first <= ports.first and ports.last <= other.last
            for where, other in spans
        )
    ]


def _object(service: Service) -> str:
    return f"helper_{service.type}_{service.protocol}"


def _set(service: Service) -> str:
    return f"to_{service.type}_{service.protocol}"
