"""Access control lists of VPC tiers as rules: the items in their order, of which the first that matches decides.

A list has two chains. A packet that leaves the tier passes ``acl_out_<id>`` and returns from there if it is allowed,
because the list of the destination tier is checked next. A packet that enters the tier ends in ``acl_in_<id>``. Rules
contain exact values only (``prefixes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

import msgspec

from netloom.render.prefixes import Field, by_length, is_in
from netloom.state import AclItem, Network

TCP = "tcp"


class Acl(msgspec.Struct, frozen=True, kw_only=True):
    """The list in force for a tier: the items of each direction by number, and the default for all other packets.

    Ingress is denied by default. Egress is allowed by default as long as the list has no egress item (CloudStack's
    administrator's guide and its virtual router). Without a list, ingress is denied, or allowed if the network offering
    has no Firewall service.
    """

    ingress: tuple[AclItem, ...] = ()
    egress: tuple[AclItem, ...] = ()
    ingress_default_allow: bool = False
    egress_default_allow: bool = True


def acl_of(network: Network, *, open_without: bool) -> Acl:
    """The list of a tier. ``open_without``: allow ingress if the tier has no list."""
    if network.acl is None:
        return Acl(ingress_default_allow=open_without)
    items = sorted(network.acl, key=lambda it: it.number)
    ingress = tuple(it for it in items if it.direction == "ingress")
    egress = tuple(it for it in items if it.direction == "egress")
    return Acl(ingress=ingress, egress=egress, egress_default_allow=not egress)


def ingress_lines(acl: Acl) -> list[str]:
    """The rules for packets that enter a tier."""
    return [
        *_lines(acl.ingress, "saddr", "accept"),
        "accept" if acl.ingress_default_allow else "drop",  # guard: a-list-has-its-own-end
    ]


def egress_lines(acl: Acl) -> list[str]:
    """The rules for packets that leave a tier. An allowed packet continues in the calling chain."""
    return [*_lines(acl.egress, "daddr", "return"), "return" if acl.egress_default_allow else "drop"]


def lines_to_port(acl: Acl, port: int) -> list[str]:
    """The ingress rules for TCP to ``port``, without a comparison of the port.

    They are for load-balanced connections: until haproxy forwards them, their packets have the public port.
    """
    lines = []
    for item in acl.ingress:
        if item.protocol not in (TCP, "all") or (item.ports and not item.ports.first <= port <= item.ports.last):
            continue
        verdict = "accept" if item.action == "allow" else "drop"
        lines += [_joined(address, verdict) for family, address in _addresses(item.cidrs, "saddr") if family != 6]
    return [*lines, "accept" if acl.ingress_default_allow else "drop"]


def _lines(items: Iterable[AclItem], field: Field, allow: str) -> Iterator[str]:
    for item in items:
        verdict = allow if item.action == "allow" else "drop"
        for family, address in _addresses(item.cidrs, field):
            for protocol in _protocols(item, family):
                yield _joined(address, protocol, verdict)


def _protocols(item: AclItem, family: int) -> list[str]:
    """The expressions for protocol, ports and ICMP type of an item. ``family`` 0: packets of both families."""
    if item.protocol == "all":
        return [""]
    if item.protocol in ("tcp", "udp"):
        return [f"{item.protocol} dport {item.ports}" if item.ports else f"meta l4proto {item.protocol}"]
    if item.protocol != "icmp":
        ports = f" th dport {item.ports}" if item.ports else ""
        return [f"meta l4proto {item.protocol}{ports}"]
    names = [name for name, its_family in (("icmp", 4), ("icmpv6", 6)) if family in (0, its_family)]
    if item.icmp_type is None:
        return [f"meta l4proto {name}" for name in names]
    code = "" if item.icmp_code is None else f" {{}} code {item.icmp_code}"
    return [f"{name} type {item.icmp_type}{code.format(name)}" for name in names]


def _addresses(cidrs: Iterable[str], field: Field) -> list[tuple[int, str]]:
    """The expressions for the prefixes of an item, each with its family: one for each family and prefix length."""
    groups = by_length(str(ip_network(cidr, strict=False)) for cidr in cidrs)
    if not groups:
        return [(0, "")]
    found: list[tuple[int, str]] = []
    for (family, length), group in sorted(groups.items()):
        if length == 0:
            found.append((family, f"meta nfproto ipv{family}"))
        else:
            found.append(
                (
                    family,
                    is_in(field, sorted(group)),  # guard: a-list-item-is-about-its-prefixes
                )
            )
    return found


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
