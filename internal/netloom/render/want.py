"""What a scope wants to find on a host: plain values, compared with what is there by ``plan``.

The kernel's words: links, addresses, routes, rules, sysctls, one nftables ruleset. Nothing here runs anything.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.netobjects import Address, Neighbour, Route, Rule
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
