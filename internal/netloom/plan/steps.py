"""The steps of a plan. Each is one change to the host; its text is what logs, ``show`` and the golden files print."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from netloom.netobjects import ETHERNET_MTU, Address, Neighbour, Route, Rule
from netloom.plan.have import Others
from netloom.render.ruleset import Name, Ruleset
from netloom.render.want import Port


class Step(msgspec.Struct, frozen=True):
    """One change to the host."""

    shared: ClassVar[bool] = False


class SharedStep(Step, frozen=True):
    """A change to a link that several scopes use, so only one scope at a time may carry it out."""

    shared: ClassVar[bool] = True


class NamespaceStep(Step, frozen=True):
    """A change inside a scope's namespace; an empty ``namespace`` is the host's own."""

    namespace: str


class CreateNamespace(NamespaceStep, frozen=True):
    """Create the scope's namespace: empty, with the loopback down."""

    def __str__(self) -> str:
        return f"create namespace {self.namespace}"


class RemoveNamespace(NamespaceStep, frozen=True):
    """Remove the namespace's name, and with it everything that is left inside."""

    def __str__(self) -> str:
        return f"remove namespace {self.namespace}"


class SetSysctl(NamespaceStep, frozen=True):
    """Write a sysctl of the namespace."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"set {self.key} = {self.value} in {self.namespace}"


class RemoveRoute(NamespaceStep, frozen=True):
    """Delete a route that is no longer wanted."""

    route: Route

    def __str__(self) -> str:
        return f"remove route {self.route}"


class PutRoute(NamespaceStep, frozen=True):
    """Add the route, or replace the one to the same destination atomically."""

    route: Route

    def __str__(self) -> str:
        return f"put route {self.route}"


class RemoveRule(NamespaceStep, frozen=True):
    """Delete a policy rule that is no longer wanted."""

    rule: Rule

    def __str__(self) -> str:
        return f"remove rule {self.rule}"


class AddRule(NamespaceStep, frozen=True):
    """Add a policy rule: packets that match it look up a table of their own."""

    rule: Rule

    def __str__(self) -> str:
        return f"add rule {self.rule}"


class RemoveAddress(NamespaceStep, frozen=True):
    """Delete an address from a link that stays."""

    address: Address

    def __str__(self) -> str:
        return f"remove address {self.address.cidr} from {self.address.link}"


class AddAddress(NamespaceStep, frozen=True):
    """Add an address to a link."""

    address: Address

    def __str__(self) -> str:
        return f"add address {self.address.cidr} to {self.address.link}"


class RemoveNeighbour(NamespaceStep, frozen=True):
    """Delete a permanent neighbour; its address is resolved by ARP again."""

    neighbour: Neighbour

    def __str__(self) -> str:
        return f"remove neighbour {self.neighbour.address} from {self.neighbour.link}"


class PutNeighbour(NamespaceStep, frozen=True):
    """Add a permanent neighbour, or change its MAC address."""

    neighbour: Neighbour

    def __str__(self) -> str:
        return f"put neighbour {self.neighbour.address} at {self.neighbour.mac} on {self.neighbour.link}"


class RemovePort(NamespaceStep, frozen=True):
    """Delete a veth link of the namespace, and with it its other end on the host."""

    link: str

    def __str__(self) -> str:
        return f"remove link {self.link} of {self.namespace}"


class RemoveHostPort(Step, frozen=True):
    """Delete the host end of a veth pair whose other end is not in the namespace."""

    link: str

    def __str__(self) -> str:
        return f"remove stray link {self.link}"


class LoadRuleset(NamespaceStep, frozen=True):
    """Load the ruleset in one transaction: as a change of ``have``, else over ``table``, else as a new table."""

    want: Ruleset
    have: Ruleset | None = None
    table: frozenset[Name] | None = None

    def __str__(self) -> str:
        verb = "swap" if self.have else "load" if self.table is None else "take over"
        return f"{verb} ruleset {self.want.family} {self.want.table} of {self.namespace}"


class GuardBridge(SharedStep, frozen=True):
    """Drop all frames that the bridge would deliver to the host itself, and what no VM may send to the wire.

    ``uplinks``: the ports of the bridge that lead to the wire; ordinary frames are forwarded to them, and no others.
    """

    bridge: str
    uplinks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"guard the host's sockets from {self.bridge}" + "".join(f", and {it}" for it in self.uplinks)


class GuardOthers(SharedStep, frozen=True):
    """Guard the bridges of others that our ports are in, as ``others`` says, and no further ones."""

    others: Others

    def __str__(self) -> str:
        return f"guard the bridges of others: {', '.join(sorted(self.others.bridges)) or 'none'}"


class UnguardBridge(SharedStep, frozen=True):
    """Delete the guard of a bridge that no longer exists; with the ``last`` one, delete the table."""

    bridge: str
    last: bool

    def __str__(self) -> str:
        return f"remove the guard of {self.bridge}"


class CloseGate(Step, frozen=True):
    """Let no frame pass these host ends of ports, which need not exist yet, and let no bridge learn from them."""

    links: tuple[str, ...]

    def __str__(self) -> str:
        return f"close the gate of {', '.join(self.links)}"


class OpenGate(Step, frozen=True):
    """Let frames pass these host ends of ports; of links that are gone nothing is left."""

    links: tuple[str, ...]

    def __str__(self) -> str:
        return f"open the gate of {', '.join(self.links)}"


class LeasePorts(Step, frozen=True):
    """Let frames pass these host ends of ports, which need not exist yet, only while the lease with this mark lives."""

    links: tuple[str, ...]
    mark: int

    def __str__(self) -> str:
        return f"let frames pass {', '.join(self.links)} only with lease {self.mark:08x}"


class ReleasePorts(Step, frozen=True):
    """Let frames pass these host ends of ports without a lease; of links that are gone nothing is left."""

    links: tuple[str, ...]

    def __str__(self) -> str:
        return f"let frames pass {', '.join(self.links)} without a lease"


class CreateBridge(SharedStep, frozen=True):
    """Create a bridge, down and without an address. Its alias names its carrier."""

    bridge: str
    alias: str

    def __str__(self) -> str:
        return f"create bridge {self.bridge}, alias {self.alias}"


class AdoptLink(SharedStep, frozen=True):
    """Set our alias on a link that somebody else created: from now on it is ours to remove, even after a crash."""

    link: str
    alias: str

    def __str__(self) -> str:
        return f"adopt {self.link}, alias {self.alias}"


class CreateVlanLink(SharedStep, frozen=True):
    """Create the VLAN sub-interface of a NIC, down."""

    link: str
    nic: str
    vlan: int

    def __str__(self) -> str:
        return f"create VLAN link {self.link} on {self.nic}"


class CreateVxlanLink(SharedStep, frozen=True):
    """Create the VXLAN tunnel over a NIC, or over the bridge that the NIC is in, down."""

    link: str
    under: str
    vni: int

    def __str__(self) -> str:
        return f"create VXLAN link {self.link} over {self.under}"


class AttachCarrier(SharedStep, frozen=True):
    """Make the link that carries a segment a port of the segment's bridge."""

    link: str
    bridge: str

    def __str__(self) -> str:
        return f"attach {self.link} to {self.bridge}"


class SetCarrierMtu(SharedStep, frozen=True):
    """Set the MTU of a VLAN link or a VXLAN tunnel of ours to what the link below it carries."""

    link: str
    mtu: int

    def __str__(self) -> str:
        return f"set MTU of {self.link} to {self.mtu}"


class SetHostLinkUp(SharedStep, frozen=True):
    """Set a NIC, a VLAN link or a bridge up."""

    link: str

    def __str__(self) -> str:
        return f"set {self.link} up"


class SetHostLinkDown(SharedStep, frozen=True):
    """Set a carrier down again that was down before we came: up, the host would send on the tenants' segment."""

    link: str

    def __str__(self) -> str:
        return f"set {self.link} down"


class RemoveBridge(SharedStep, frozen=True):
    """Delete a bridge; its carrier stays."""

    bridge: str

    def __str__(self) -> str:
        return f"remove bridge {self.bridge}"


class RemoveVlanLink(SharedStep, frozen=True):
    """Delete a VLAN link or a VXLAN tunnel."""

    link: str

    def __str__(self) -> str:
        return f"remove VLAN link {self.link}"


class SilenceIpv6(Step, frozen=True):
    """Disable IPv6 on a link that tenants share, so that the host has no link-local address there."""

    link: str

    def __str__(self) -> str:
        return f"set net.ipv6.conf.{self.link}.disable_ipv6 = 1"


class CreatePort(Step, frozen=True):
    """Create a veth pair, both ends down: one end is a port of the bridge, the other is in the namespace.

    The ends have their MTU when they are created: a port that joins with a smaller one pulls the bridge down.
    """

    namespace: str
    port: Port
    bridge: str
    alias: str
    mtu: int = ETHERNET_MTU

    def __str__(self) -> str:
        mtu = f", MTU {self.mtu}" if self.mtu != ETHERNET_MTU else ""
        return f"create {self.port.host_link} on {self.bridge} with {self.port.link} in {self.namespace}{mtu}"


class AttachPort(Step, frozen=True):
    """Make a link a port of the segment's bridge again: a host end, or a port of a bridge that was deleted."""

    link: str
    bridge: str

    def __str__(self) -> str:
        return f"attach {self.link} to {self.bridge}"


class MarkPort(Step, frozen=True):
    """Set the alias of a host end again, which names its scope: only links with our alias are deleted."""

    link: str
    alias: str

    def __str__(self) -> str:
        return f"set the alias of {self.link} to {self.alias}"


class SetMac(NamespaceStep, frozen=True):
    """Set a link of the namespace to its derived MAC address again."""

    link: str
    mac: str

    def __str__(self) -> str:
        return f"set MAC address of {self.link} to {self.mac}"


class SetMtu(NamespaceStep, frozen=True):
    """Set one end of a port to the MTU of its segment. ``namespace`` empty: the host's end."""

    link: str
    mtu: int

    def __str__(self) -> str:
        return f"set MTU of {self.link} to {self.mtu}"


class SetPortUp(Step, frozen=True):
    """Set the host end of a port up."""

    link: str

    def __str__(self) -> str:
        return f"set {self.link} up"


class SetLinkUp(NamespaceStep, frozen=True):
    """Set a link of the namespace up."""

    link: str

    def __str__(self) -> str:
        return f"set {self.link} up in {self.namespace}"
