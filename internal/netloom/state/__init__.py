"""The desired state of a scope: frozen values, independent of Linux and of CloudStack's spelling.

A *scope* is everything that shares one network namespace: an isolated or shared network, or a VPC with all its tiers.
The agent stores one JSON document per scope. The keys of the document are the names of the fields, so renaming a field
changes the file format. The renderers read only these values.
"""

from __future__ import annotations

from netloom.state.acl import AclItem
from netloom.state.firewall import PROTOCOLS_WITH_PORTS, Firewall, FirewallRule
from netloom.state.lb import Backend, Balancing, LbRule
from netloom.state.nat import PortForward, Ports, PublicIp, StaticNat
from netloom.state.nic import Nic
from netloom.state.pbr import Pbr, PbrRoute, PbrRule, PbrTable
from netloom.state.placement import Gate, Placement
from netloom.state.scope import SCHEMA, Network, Outside6, Scope, Subnet, Uplinks

__all__ = [
    "PROTOCOLS_WITH_PORTS",
    "SCHEMA",
    "AclItem",
    "Backend",
    "Balancing",
    "Firewall",
    "FirewallRule",
    "Gate",
    "LbRule",
    "Network",
    "Nic",
    "Outside6",
    "Pbr",
    "PbrRoute",
    "PbrRule",
    "PbrTable",
    "Placement",
    "PortForward",
    "Ports",
    "PublicIp",
    "Scope",
    "StaticNat",
    "Subnet",
    "Uplinks",
]
