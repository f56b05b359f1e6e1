"""A scope and the networks in it."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.acl import AclItem
from netloom.state.firewall import Firewall
from netloom.state.lb import LbRule
from netloom.state.nat import PortForward, PublicIp, StaticNat
from netloom.state.nic import Nic
from netloom.state.pbr import Pbr

SCHEMA = 1


class Uplinks(msgspec.Struct, frozen=True, kw_only=True):
    """The NICs of the host that carry the VLANs (registration details guest.network.device, public.network.device)."""

    guest: str = "eth1"
    public: str = "eth1"
    isolation: Literal["vlan", "vxlan"] = "vlan"  # registration detail guest.isolation


class Outside6(msgspec.Struct, frozen=True, kw_only=True):
    """The way out for IPv6 (registration details public.ip6.gateway, public.ip6.address)."""

    gateway: str
    address: str  # with prefix length; without host bits each scope has an address of its own in it


class Subnet(msgspec.Struct, frozen=True, order=True):
    """A range of a shared network, and the router that its VMs are told of; empty: nobody named one."""

    cidr: str
    gateway: str = ""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """An isolated or shared network, or a tier of a VPC.

    ``implemented``: implement-network came, or another call that told as much, and no shutdown since. Until then what
    is told about the network is remembered and nothing of it stands on the host.
    """

    network_id: str
    guest_type: Literal["isolated", "shared", "l2"] = "isolated"
    implemented: bool = False
    vlan: str = ""  # a tag or "untagged"; empty: not told yet
    cidr: str = ""  # "10.10.1.0/24"
    gateway: str = ""
    subnets: tuple[Subnet, ...] = ()  # further ranges of a shared network: ``cidr`` is the one with ``extension_ip``
    ip6_cidr: str = ""  # "2001:db8:50:1::/64"; empty: IPv4 alone
    ip6_gateway: str = ""
    extension_ip: str = ""  # the device's own guest address; empty: the gateway's, on a shared network none
    firewall: Firewall | None = None  # None: no apply-fw-rules yet: ingress closed, egress open
    acl: tuple[AclItem, ...] | None = None  # of a tier, by number; None: no list yet: ingress closed, egress open
    dhcp: bool = False  # DHCP answers on this network
    dns: bool = False  # a resolver answers on this network
    resolvers: tuple[str, ...] = ()  # where the resolver asks on, IPv4
    domain: str = ""
    nics: dict[str, Nic] = {}  # by Nic.key
    dhcp_options: dict[str, dict[str, str]] = {}  # by nic_id: option code -> value; may come before the NIC does

    @property
    def device_ip(self) -> str:
        """The device's address on the guest side. On a shared network the gateway's is never ours to take."""
        return self.extension_ip or (self.gateway if self.guest_type == "isolated" else "")

    @property
    def is_active(self) -> bool:
        """Whether there is something of it on the host."""
        return bool(self.implemented and self.vlan and self.cidr and self.device_ip)

    @property
    def has_ip6(self) -> bool:
        """Whether the device is the guests' router for IPv6: where it is the one for IPv4, and a subnet was told."""
        return bool(self.is_active and self.ip6_cidr and self.ip6_gateway and self.device_ip == self.gateway)

    @property
    def ranges(self) -> tuple[Subnet, ...]:
        """All its IPv4 subnets, that of the device first."""
        return (*([Subnet(self.cidr, self.gateway)] if self.cidr else []), *self.subnets)


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """All that should hold for one namespace.

    ``revision`` grows by one with every change; ``schema`` is the version of this document.
    """

    scope_id: str  # "net-204" or "vpc-7"
    owner: str
    schema: int = SCHEMA
    revision: int = 0
    uplinks: Uplinks = Uplinks()
    outside6: Outside6 | None = None  # None: IPv6 leads nowhere
    ingress_open: bool = False  # registration detail firewall=absent: the offering has no Firewall service
    vpc_implemented: bool = False  # implement-vpc came: the namespace stands, whether a tier does or not
    vpc_cidr: str = ""  # what the tiers' subnets are taken from; only told, nothing is made of it
    networks: dict[str, Network] = {}
    public_ips: dict[str, PublicIp] = {}  # by address
    static_nats: dict[str, StaticNat] = {}  # by public address
    port_forwards: dict[str, PortForward] = {}  # by PortForward.key
    lb_rules: dict[str, LbRule] = {}  # by rule id
    pbr: Pbr = Pbr()

    @property
    def is_vpc(self) -> bool:
        return self.scope_id.startswith("vpc-")
