"""A scope, its networks, and what the registration says about its host and its IPv6 uplink."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.acl import AclItem
from netloom.state.firewall import Firewall
from netloom.state.lb import Balancing, LbRule
from netloom.state.nat import PortForward, PublicIp, StaticNat
from netloom.state.nic import Nic
from netloom.state.pbr import Pbr
from netloom.state.placement import Placement

SCHEMA = 3  # the newest that can be read


class Uplinks(msgspec.Struct, frozen=True, kw_only=True):
    """The host's NICs for guest and public traffic, from the registration details named in the comments."""

    guest: str = "eth1"  # guest.network.device
    public: str = "eth1"  # public.network.device
    isolation: Literal["vlan", "vxlan"] = "vlan"  # guest.isolation


class Outside6(msgspec.Struct, frozen=True, kw_only=True):
    """The uplink for IPv6, from the registration details named in the comments."""

    gateway: str  # public.ip6.gateway
    address: str  # public.ip6.address, with prefix length; if it has no host bits, each scope has its own address in it


class Subnet(msgspec.Struct, frozen=True, order=True):
    """A range of a shared network, and the router of its VMs; empty: CloudStack named none."""

    cidr: str
    gateway: str = ""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """An isolated or shared network, or a tier of a VPC.

    Identity: ``network_id`` and ``guest_type``. ``implemented`` is True after implement-network, or after another
    command that carries the segment, the subnet and the device's address, until shutdown-network. Before that, the
    network's fields are stored, but the host has no links and no services for it.

    Segment and addresses: ``vlan`` to ``extension_ip``. A shared network may have several ranges. ``cidr`` and
    ``gateway`` are those of the range that contains ``extension_ip``; ``subnets`` has the others.

    Filters: ``firewall`` and, for a tier, ``acl``. While CloudStack has sent none, ingress is closed and egress open.

    Services for the guests: ``dhcp``, ``dns``, ``resolvers`` and ``domain``.

    VMs: ``nics`` and ``dhcp_options``. CloudStack may send the options of a NIC before the NIC itself. ``unlisted`` has
    the NICs that the last restore did not list, without their secrets. Nothing is served for them.
    """

    network_id: str
    guest_type: Literal["isolated", "shared", "l2"] = "isolated"
    implemented: bool = False

    vlan: str = ""  # a tag or "untagged"; empty: not known yet
    cidr: str = ""  # "10.10.1.0/24"
    gateway: str = ""
    subnets: tuple[Subnet, ...] = ()
    ip6_cidr: str = ""  # "2001:db8:50:1::/64"; empty: no IPv6
    ip6_gateway: str = ""
    extension_ip: str = ""  # the device's own guest address; empty: the gateway's, none on a shared network

    firewall: Firewall | None = None
    acl: tuple[AclItem, ...] | None = None  # by number

    dhcp: bool = False  # a DHCP server answers on this network
    dns: bool = False  # a resolver answers on this network
    resolvers: tuple[str, ...] = ()  # IPv4 addresses that the resolver forwards queries to
    domain: str = ""

    nics: dict[str, Nic] = {}  # by Nic.key
    unlisted: dict[str, Nic] = {}  # by Nic.key
    dhcp_options: dict[str, dict[str, str]] = {}  # by nic_id: option code -> value

    @property
    def device_ip(self) -> str:
        """The device's guest address. A shared network's gateway is another router: its address is never used."""
        return self.extension_ip or (self.gateway if self.guest_type == "isolated" else "")

    @property
    def is_active(self) -> bool:
        """Whether the network exists on the host: it is implemented, and its segment and addresses are known."""
        return bool(self.implemented and self.vlan and self.cidr and self.device_ip)

    @property
    def has_ip6(self) -> bool:
        """Whether the device routes IPv6 for the guests: it is their IPv4 router, and there is an IPv6 subnet."""
        return bool(self.is_active and self.ip6_cidr and self.ip6_gateway and self.device_ip == self.gateway)

    @property
    def ranges(self) -> tuple[Subnet, ...]:
        """All IPv4 subnets of the network, the device's own first."""
        return (*([Subnet(self.cidr, self.gateway)] if self.cidr else []), *self.subnets)


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The desired state of one network namespace.

    Identity: ``scope_id``, and ``owner``, the registration that the scope belongs to. ``revision`` increases by one
    with each change. ``schema`` is the version of the document on disk: 2 while the gate is not open, and 3 in a group,
    because builds that do not know that would serve the scope.

    Placement: ``placement``, where the scope lives. It has no part in ``revision``.

    Registration details: ``uplinks``, ``outside6``, ``helpers``, ``ingress_open``, ``balancing`` and
    ``connections_max``. Each call brings the current ones.

    VPC: ``vpc_implemented`` is True after implement-vpc. The namespace then exists even without a tier.

    Networks and public addresses: ``networks`` to ``lb_rules``. An isolated or shared network's scope has one network.

    Reports: ``left_out``, for ``check`` and ``show``.

    Policy routing: ``pbr``, from an operator's custom actions.
    """

    scope_id: str  # "net-204" or "vpc-7"
    owner: str
    schema: int = 1
    revision: int = 0
    placement: Placement = Placement()

    uplinks: Uplinks = Uplinks()
    outside6: Outside6 | None = None  # None: no uplink for IPv6
    helpers: tuple[str, ...] = ()  # conntrack.helpers
    ingress_open: bool = False  # firewall=absent: the network offering has no Firewall service
    balancing: Balancing = Balancing()
    connections_max: int = 32_000  # conntrack.max.per.vm

    vpc_implemented: bool = False
    vpc_cidr: str = ""  # the ranges that the tiers' subnets are part of, with commas; empty: not known

    networks: dict[str, Network] = {}  # by network_id
    public_ips: dict[str, PublicIp] = {}  # by address
    static_nats: dict[str, StaticNat] = {}  # by public address
    port_forwards: dict[str, PortForward] = {}  # by PortForward.key
    lb_rules: dict[str, LbRule] = {}  # by rule id

    # Parts of the last lists that are not in force, and why: by command and network_id, "apply-fw-rules 204".
    left_out: dict[str, tuple[str, ...]] = {}

    pbr: Pbr = Pbr()

    @property
    def is_vpc(self) -> bool:
        return self.scope_id.startswith("vpc-")
