"""The access control list of a VPC tier: the complete list of the last apply-network-acl."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.nat import Ports


class AclItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of the list. Of the items that match a packet, the one with the lowest ``number`` decides.

    None and empty mean any. ``cidrs`` are IPv4 and IPv6 prefixes; they match the source of ingress and the destination
    of egress. ``protocol`` ``icmp`` means ICMP for IPv4 and ICMPv6 for IPv6.
    """

    number: int
    action: Literal["allow", "deny"]
    direction: Literal["ingress", "egress"]
    protocol: str = "all"  # "tcp", "udp", "icmp", "all", or the number of another protocol: "47"
    ports: Ports | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    cidrs: tuple[str, ...] = ()
