"""The firewall of a network, complete in every call."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.protocol.network import NetworkPayload
from netloom.protocol.scalars import Choice, Direction, Flag, IcmpNumber, IPv4, IPv4Prefix, Number, Port, Prefix


class FirewallProtocol(Choice[Literal["tcp", "udp", "icmp", "all"]]):
    """The protocols of CloudStack's firewall rules."""


class FwRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule. Absent ports, ICMP numbers and empty CIDR lists mean any."""

    type: Direction
    protocol: FirewallProtocol
    id: Number = Number(0)
    port_start: Port | None = None
    port_end: Port | None = None
    icmp_type: IcmpNumber | None = None
    icmp_code: IcmpNumber | None = None
    public_ip: IPv4 = IPv4("")
    source_cidrs: tuple[Prefix, ...] = ()
    dest_cidrs: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        check_ports(
            self.protocol in ("tcp", "udp"), self.protocol, self.port_start, self.port_end
        )  # guard: ports-of-a-rule-are-checked
        if self.type == "ingress" and not self.public_ip:
            raise ValueError("an ingress rule needs publicIp")
        if self.type == "ingress" and any(":" in cidr for cidr in (*self.source_cidrs, *self.dest_cidrs)):
            raise ValueError("an ingress rule is about a public IPv4 address, and this one has an IPv6 network")


class FwRules(msgspec.Struct, frozen=True, kw_only=True):
    """The network's complete set. ``default_egress_allow``: explicit egress rules deny, else they allow."""

    default_egress_allow: Flag
    rules: tuple[FwRule, ...]
    cidr: IPv4Prefix = IPv4Prefix("")


class ApplyFwRules(NetworkPayload, frozen=True, kw_only=True):
    """apply-fw-rules."""

    fw_rules: FwRules  # guard: fw-rules-is-an-object-that-must-be-there


def check_ports(has_ports: bool, protocol: str, first: int | None, last: int | None) -> None:
    """Raises ValueError when a rule's two ports do not make a range, or its protocol has none."""
    if first is None and last is None:
        return
    if not has_ports:
        raise ValueError(f"protocol {protocol} has no ports")
    if first is None:
        raise ValueError("portEnd without portStart")
    if last is not None and first > last:
        raise ValueError(f"ports {first}-{last} end before they begin")
