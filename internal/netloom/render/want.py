"""What a scope wants to find on a host: plain values, compared with what is there by ``plan``.

The kernel's words: links, addresses, routes, rules, sysctls, one nftables ruleset. Nothing here runs anything.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Literal

import msgspec

from netloom.render.ruleset import Ruleset


class Segment(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A layer-2 segment on the host: a bridge with one VLAN of a NIC as a port. Shared with other scopes and with VMs.

    ``vlan`` ``untagged``: the bridge that the NIC is already in, else ``bridge`` with the NIC itself as a port.
    ``kind`` ``vxlan``: ``vlan`` is the number of a VXLAN, ``vlan_link`` a tunnel over the NIC.
    """

    bridge: str
    nic: str
    vlan: str
    vlan_link: str  # empty when untagged
    kind: Literal["vlan", "vxlan"] = "vlan"


class Port(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A veth pair: ``host_link`` is a port of the segment's bridge, ``link`` stands in the namespace."""

    link: str
    host_link: str
    mac: str
    segment: Segment


class Address(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """An address with its prefix length on a link of the namespace, e.g. ``10.10.1.1/24`` or ``203.0.113.20/32``."""

    link: str
    cidr: str

    @property
    def on_link(self) -> str:
        """The network that the kernel makes a route to with this address; empty: none."""
        network = _interface(self.cidr).network
        return str(network) if network.prefixlen < network.max_prefixlen - 1 else ""

    @property
    def itself(self) -> str:
        """The address as a prefix, which the kernel's local table has, too; IPv4 only: of IPv6 kernels differ."""
        address = _interface(self.cidr).ip
        return f"{address}/32" if address.version == 4 else ""


@lru_cache(maxsize=65536)
def _interface(cidr: str) -> IPv4Interface | IPv6Interface:
    # Every look at a host asks it of every address.
    return ip_interface(cidr)


class Route(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A route of the namespace. ``table`` 254 is the main table. Empty ``via``: on-link."""

    table: int
    destination: str  # a prefix; the default route is "0.0.0.0/0"
    link: str = ""  # empty: the kind alone says what happens
    via: str = ""
    source: str = ""  # preferred source address
    kind: str = "unicast"  # the kernel's word: "blackhole" and so on


class Rule(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A policy routing rule: packets with this firewall mark look up this table. Empty selectors: any."""

    priority: int
    mark: int
    mask: int
    table: int
    source: str = ""  # a prefix, as destination is
    destination: str = ""
    iif: str = ""


class Neighbour(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Who has an address on a link, for good: no ARP message changes it."""

    link: str
    address: str
    mac: str


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one scope on one host. ``namespace`` empty: nothing at all."""

    namespace: str
    ports: tuple[Port, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()  # in an order in which they can be added
    rules: tuple[Rule, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    sysctls: dict[str, str] = {}  # "net.ipv4.ip_forward" -> "1", set inside the namespace in this order
    ruleset: Ruleset | None = None
    announce: tuple[Address, ...] = ()  # addresses whose neighbours are told by gratuitous ARP when they are new
