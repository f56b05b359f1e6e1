"""The access control list of a VPC tier, complete in every call."""

from __future__ import annotations

from typing import Literal, Self

import msgspec

from netloom.protocol.firewall import check_ports
from netloom.protocol.network import NetworkPayload
from netloom.protocol.scalars import Choice, Direction, IcmpNumber, Number, Port, Prefix, quoted


class AclAction(Choice[Literal["allow", "deny"]]):
    """What an ACL item does."""


class AclProtocol(str):
    """``tcp``, ``udp``, ``icmp``, ``all``, or a protocol number 0 to 255 (6, 17 and 1 become their names)."""

    @classmethod
    def parse(cls, value: object) -> Self:
        text = str(value).lower() if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if text in ("tcp", "udp", "icmp", "all"):
            return cls(text)
        if text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 255:
            return cls({"1": "icmp", "6": "tcp", "17": "udp"}.get(str(int(text)), str(int(text))))
        raise ValueError(f"{quoted(value)} is none of tcp, udp, icmp, all, nor a protocol number (0 to 255)")


class AclRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One item; the CIDR list filters the source of ingress and the destination of egress."""

    number: Number
    action: AclAction
    traffic_type: Direction
    protocol: AclProtocol
    port_start: Port | None = None
    port_end: Port | None = None
    icmp_type: IcmpNumber | None = None
    icmp_code: IcmpNumber | None = None
    source_cidrs: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        check_ports(self.protocol in ("tcp", "udp"), self.protocol, self.port_start, self.port_end)


class ApplyNetworkAcl(NetworkPayload, frozen=True, kw_only=True):
    """apply-network-acl: the tier's complete list."""

    acl_rules: tuple[AclRule, ...]
