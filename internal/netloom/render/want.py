"""The desired state of a scope on a host, in the kernel's terms: links, addresses, routes, rules, sysctls, a ruleset.

``render.scope`` computes it, ``plan`` compares it with what the host has.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.netobjects import Address, Neighbour, Route, Rule
from netloom.render.ruleset import Ruleset


class Segment(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A layer-2 segment on the host, used by other scopes and VMs too: a bridge, and the carrier of its frames.

    The carrier is a VLAN link of the NIC, or, for ``kind`` ``vxlan``, a tunnel over the NIC with ``vlan`` as its VNI.
    ``vlan`` ``untagged``: the NIC itself is the carrier; a bridge that it is already in is used instead of ``bridge``.
    """

    bridge: str
    nic: str
    vlan: str
    vlan_link: str  # empty when untagged
    kind: Literal["vlan", "vxlan"] = "vlan"


class Port(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A veth pair: ``host_link`` is a port of the segment's bridge, ``link`` is in the namespace with ``mac``."""

    link: str
    host_link: str
    mac: str
    segment: Segment


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one scope on one host. An empty ``namespace`` means that nothing of the scope may exist.

    ``routes``: in an order in which they can be added, so a gateway comes after the route that leads to it.
    ``sysctls``: of the namespace, written in this order, e.g. ``"net.ipv4.ip_forward": "1"``.
    ``announce``: the addresses that are announced by gratuitous ARP when they are new.
    """

    namespace: str
    ports: tuple[Port, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    sysctls: dict[str, str] = {}
    ruleset: Ruleset | None = None
    announce: tuple[Address, ...] = ()
