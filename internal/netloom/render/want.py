"""The desired state of a scope on a host, in the kernel's terms: links, addresses, routes, rules, sysctls, a ruleset.

``render.scope`` computes it, ``plan`` compares it with the present state of the host.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

from netloom.netobjects import Address, Neighbour, Route, Rule
from netloom.render.ruleset import Ruleset


class Segment(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A layer-2 segment on the host: a bridge, and the link that carries its frames to other hosts.

    Other scopes and VMs use the same segment. The carrier is a VLAN link on the NIC or, with ``kind`` ``vxlan``, a
    tunnel over the NIC with ``vlan`` as its VNI. With ``vlan`` ``untagged`` the NIC itself is the carrier; if the NIC
    is already in a bridge, that bridge is used instead of ``bridge``.

    ``besides``: another device of this host that the same VLAN may be on: the bridge that the registration names, whose
    port ``nic`` is, or the other way round. Known on a host only (``plan/uplinks.py``).
    """

    bridge: str
    nic: str
    vlan: str
    vlan_link: str  # empty when untagged
    kind: Literal["vlan", "vxlan"] = "vlan"
    besides: str = ""


class Port(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A veth pair: ``host_link`` is a port of the segment's bridge, ``link`` is in the namespace with ``mac``."""

    link: str
    host_link: str
    mac: str
    segment: Segment


class Want(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything that one scope needs on one host.

    ``namespace``: the name of the network namespace, e.g. ``cs-net-204``. Empty: the scope must not exist on the host.
    The plan then removes the namespace, its ports, and bridges that no other scope uses.

    ``ports``: one veth pair for each active network and for each public VLAN on which the scope holds an address. They
    also say which bridges and VLAN links the host needs.

    ``addresses``: the device's address on each guest link with the subnet's prefix length, each public address with
    /32, and the IPv6 addresses. With the prefix length of a guest address the kernel adds the route to the guests
    itself, so ``routes`` does not contain it.

    ``routes``: all other routes, in an order in which they can be added: a gateway comes after the route that leads to
    it. The main table has the default exit. Table 20000 + n has the routes of exit n. Lower numbers are the operator's
    tables.

    ``rules``: the policy routing rules: first the operator's (priorities 10000 to 19999), then one for each exit, which
    selects the exit's table by the packet's mark (``marks``).

    ``neighbours``: a permanent neighbour for each NIC with an address, so that no ARP message can redirect packets for
    a VM to another VM.

    ``sysctls``: settings inside the namespace, e.g. ``"net.ipv4.ip_forward": "1"``. They are written in this order,
    because some of them reset others.

    ``ruleset``: the nftables table of the namespace (``nft``). None only if ``namespace`` is empty.

    ``announce``: the addresses that are announced by gratuitous ARP when they are new on this host, so that switches
    and gateways learn the new MAC address. IPv6 addresses are not announced.

    ``gated``: everything exists on the host, but no frame passes the host ends of the ports, and nothing is announced.
    Rendering leaves it False; whoever knows that another host serves the scope sets it. ``gated_ports``: the host ends
    of ports for which the same holds although the scope is not gated.

    ``lease``: if not 0, frames pass the ports only while the lease with this mark lives (``agent/host/lease.py``).
    Rendering leaves it 0.
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
    gated: bool = False
    gated_ports: frozenset[str] = frozenset()
    lease: int = 0

    @cached_property
    def neighbour_at(self) -> dict[tuple[str, str], Neighbour]:
        """The neighbours by link and address: each of a thousand events asks for one."""
        return {(it.link, it.address): it for it in self.neighbours}

    @property
    def closed_ends(self) -> frozenset[str]:
        """The host ends of the ports that no frame passes."""
        return frozenset(port.host_link for port in self.ports if self.gated or port.host_link in self.gated_ports)

    @property
    def leased_ends(self) -> dict[str, int]:
        """The host ends of the ports that frames pass only while a lease lives, with its mark."""
        return {port.host_link: self.lease for port in self.ports if self.lease}
