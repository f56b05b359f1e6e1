"""Access control lists as text: items in their order, of which the first that matches decides.

A list has two chains. What leaves the tier runs through ``acl_out_<id>`` and comes back when it is allowed, for the
other tier's list is asked next; what enters it ends in ``acl_in_<id>``. Lines hold exact values only (``firewall``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

import msgspec

from netloom.state import AclItem, Network

TCP = "tcp"


class Acl(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force in a tier: the items of each direction, by number, and what becomes of the rest.

    Ingress is denied at the end. Egress is allowed while the list has no egress item (CloudStack's administrator's
    guide and its virtual router). Without a list ingress is closed, or open where offerings have no firewall at all.
    """

    ingress: tuple[AclItem, ...] = ()
    egress: tuple[AclItem, ...] = ()
    ingress_default_allow: bool = False  # what no item of ingress is about
    egress_default_allow: bool = True


def acl_of(network: Network, *, open_without: bool) -> Acl:
    """The list of a tier; ``open_without``: without one ingress is open."""
    if network.acl is None:
        return Acl(ingress_default_allow=open_without)
    items = sorted(network.acl, key=lambda it: it.number)
    egress = tuple(it for it in items if it.direction == "egress")
    return Acl(
        ingress=tuple(it for it in items if it.direction == "ingress"), egress=egress, egress_default_allow=not egress
    )


def ingress_lines(acl: Acl) -> list[str]:
    """The rules of what enters a tier."""
    return [
        *_lines(acl.ingress, "saddr", "accept"),
        "accept" if acl.ingress_default_allow else "drop",  # guard: a-list-has-its-own-end
    ]


def egress_lines(acl: Acl) -> list[str]:
    """The rules of what leaves a tier; what is allowed goes on in the chain that asked."""
    return [*_lines(acl.egress, "daddr", "return"), "return" if acl.egress_default_allow else "drop"]


def lines_to_port(acl: Acl, port: int) -> list[str]:
    """The rules of ingress for TCP to this port, for packets that have another one as yet: balanced ones."""
    lines = []
    for item in acl.ingress:
        if item.protocol not in (TCP, "all") or (item.ports and not item.ports.first <= port <= item.ports.last):
            continue
        verdict = "accept" if item.action == "allow" else "drop"
        lines += [_joined(where, verdict) for family, where in _addresses(item.cidrs, "saddr") if family != 6]
    return [*lines, "accept" if acl.ingress_default_allow else "drop"]


def _lines(items: Iterable[AclItem], field: str, allow: str) -> Iterator[str]:
    for item in items:
        verdict = allow if item.action == "allow" else "drop"
        for family, where in _addresses(item.cidrs, field):
            for what in _match(item, family):
                yield _joined(where, what, verdict)


def _match(item: AclItem, family: int) -> list[str]:
    """What of a packet of that family (0: either) the item is about, addresses apart."""
    if item.protocol == "all":
        return [""]
    if item.protocol in ("tcp", "udp"):
        return [f"{item.protocol} dport {item.ports}" if item.ports else f"meta l4proto {item.protocol}"]
    if item.protocol != "icmp":
        return [f"meta l4proto {item.protocol}"]
    words = [word for word, its in (("icmp", 4), ("icmpv6", 6)) if family in (0, its)]
    if item.icmp_type is None:
        return [f"meta l4proto {word}" for word in words]
    code = "" if item.icmp_code is None else f" {{}} code {item.icmp_code}"
    return [f"{word} type {item.icmp_type}{code.format(word)}" for word in words]


def _addresses(cidrs: Iterable[str], field: str) -> list[tuple[int, str]]:
    """The family and the expression of each line that a list of prefixes takes: one for each length of theirs."""
    by_length: dict[tuple[int, int], list[str]] = {}
    for cidr in cidrs:
        prefix = ip_network(cidr, strict=False)
        by_length.setdefault((prefix.version, prefix.prefixlen), []).append(str(prefix))
    if not by_length:
        return [(0, "")]
    found = []
    for (version, length), those in sorted(by_length.items()):
        word = "ip" if version == 4 else "ip6"
        if length == 0:
            found.append((version, f"meta nfproto ipv{version}"))
            continue
        if len(those) == 1:
            found.append((version, f"{word} {field} {those[0].removesuffix('/32').removesuffix('/128')}"))
            continue
        masked = "" if length == (32 if version == 4 else 128) else f" & {ip_network(those[0]).netmask}"
        values = ", ".join(it.partition("/")[0] for it in sorted(those))
        found.append(
            (
                version,
                f"{word} {field}{masked} {{ {values} }}",  # guard: a-list-item-is-about-its-prefixes
            )
        )
    return found


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
