"""The firewall of a network: the complete set of rules of the last apply-fw-rules."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

from netloom.state.nat import Ports

# Those whose header begins with two ports: DCCP, SCTP and UDP-Lite by their numbers (IANA).
PROTOCOLS_WITH_PORTS = frozenset({"tcp", "udp", "33", "132", "136"})


class FirewallRule(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One rule. None and empty mean any."""

    rule_id: int
    direction: Literal["ingress", "egress"]
    protocol: str  # "tcp", "udp", "icmp", "all", or the number of another protocol: "47"
    ports: Ports | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    public_ip: str = ""  # ingress only: the destination before DNAT
    source_cidrs: tuple[str, ...] = ()
    dest_cidrs: tuple[str, ...] = ()


class Firewall(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The firewall's rules and its egress policy (docs/protocol.md, section 3, fw_rules).

    ``default_egress_allow``: if True, egress is allowed and egress rules deny; otherwise egress rules allow.
    """

    default_egress_allow: bool
    rules: tuple[FirewallRule, ...] = ()

    @cached_property
    def egress(self) -> tuple[FirewallRule, ...]:
        """The egress rules."""
        return tuple(it for it in self.rules if it.direction == "egress")

    @cached_property
    def ingress(self) -> dict[str, tuple[FirewallRule, ...]]:
        """The ingress rules by their public address."""
        found: dict[str, list[FirewallRule]] = {}
        for rule in self.rules:
            if rule.direction == "ingress" and rule.public_ip:
                found.setdefault(rule.public_ip, []).append(rule)
        return {address: tuple(rules) for address, rules in found.items()}
