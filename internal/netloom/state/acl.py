"""The access control list of a VPC's tier, as CloudStack last gave it, whole."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.nat import Ports


class AclItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item: of those that a packet matches the lowest ``number`` decides. ``None`` and empty mean *any*.

    ``cidrs``, IPv4 and IPv6, are about the source of ingress and the destination of egress. ``protocol`` ``icmp`` is
    ICMP for IPv4 and ICMPv6 for IPv6.
    """

    number: int
    action: Literal["allow", "deny"]
    direction: Literal["ingress", "egress"]
    protocol: str = "all"  # "tcp", "udp", "icmp", "all", or another protocol's number: "47"
    ports: Ports | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    cidrs: tuple[str, ...] = ()
