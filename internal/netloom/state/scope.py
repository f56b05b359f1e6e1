"""A scope and the networks in it."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.firewall import Firewall
from netloom.state.lb import LbRule
from netloom.state.nat import PortForward, PublicIp, StaticNat
from netloom.state.nic import Nic

SCHEMA = 1


class Uplinks(msgspec.Struct, frozen=True, kw_only=True):
    """The NICs of the host that carry the VLANs (registration details guest.network.device, public.network.device)."""

    guest: str = "eth1"
    public: str = "eth1"


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """An isolated or shared network, or a tier of a VPC.

    ``implemented``: implement-network came and no shutdown since. Until then what is told about the network is
    remembered and nothing of it stands on the host.
    """

    network_id: str
    guest_type: Literal["isolated", "shared", "l2"] = "isolated"
    implemented: bool = False
    vlan: str = ""  # a tag or "untagged"; empty: not told yet
    cidr: str = ""  # "10.10.1.0/24"
    gateway: str = ""
    extension_ip: str = ""  # the device's own guest address; empty: it has none but the gateway's
    firewall: Firewall | None = None  # None: no apply-fw-rules yet: ingress closed, egress open
    dhcp: bool = False  # DHCP answers on this network
    dns: bool = False  # a resolver answers on this network
    resolvers: tuple[str, ...] = ()  # where the resolver asks on, IPv4
    domain: str = ""
    nics: dict[str, Nic] = {}  # by Nic.key
    dhcp_options: dict[str, dict[str, str]] = {}  # by nic_id: option code -> value; may come before the NIC does


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """All that should hold for one namespace.

    ``revision`` grows by one with every change; ``schema`` is the version of this document.
    """

    scope_id: str  # "net-204" or "vpc-7"
    owner: str
    schema: int = SCHEMA
    revision: int = 0
    uplinks: Uplinks = Uplinks()
    ingress_open: bool = False  # registration detail firewall=absent: the offering has no Firewall service
    networks: dict[str, Network] = {}
    public_ips: dict[str, PublicIp] = {}  # by address
    static_nats: dict[str, StaticNat] = {}  # by public address
    port_forwards: dict[str, PortForward] = {}  # by PortForward.key
    lb_rules: dict[str, LbRule] = {}  # by rule id
