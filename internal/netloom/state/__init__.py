"""Our words: what a scope should be. Frozen values that know nothing of Linux and nothing of CloudStack's spelling.

A *scope* is whatever shares a network namespace: an isolated or shared network, or a VPC with all its tiers.
The values here are what the agent keeps on disk, one JSON document per scope, and all that the renderers see.
"""

from __future__ import annotations

from netloom.state.acl import AclItem
from netloom.state.firewall import Firewall, FirewallRule, Protocol
from netloom.state.lb import Backend, LbRule
from netloom.state.nat import PortForward, Ports, PublicIp, StaticNat
from netloom.state.nic import Nic
from netloom.state.pbr import Pbr, PbrRoute, PbrRule, PbrTable
from netloom.state.scope import SCHEMA, Network, Outside6, Scope, Subnet, Uplinks

__all__ = [
    "SCHEMA",
    "AclItem",
    "Backend",
    "Firewall",
    "FirewallRule",
    "LbRule",
    "Network",
    "Nic",
    "Outside6",
    "Pbr",
    "PbrRoute",
    "PbrRule",
    "PbrTable",
    "PortForward",
    "Ports",
    "Protocol",
    "PublicIp",
    "Scope",
    "StaticNat",
    "Subnet",
    "Uplinks",
]
