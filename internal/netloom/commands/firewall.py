"""The firewall of a network, replaced whole."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from netloom.commands.transition import Context, network_of, with_network
from netloom.protocol.firewall import ApplyFwRules, FwRule
from netloom.state import Firewall, FirewallRule, Ports, Protocol, Scope

_DIRECTIONS: dict[str, Literal["ingress", "egress"]] = {"ingress": "ingress", "egress": "egress"}
_PROTOCOLS: dict[str, Protocol] = {"tcp": "tcp", "udp": "udp", "icmp": "icmp", "all": "all"}
_ANY = -1  # ICMP type or code


def apply_fw_rules(scope: Scope, asked: ApplyFwRules, context: Context) -> Scope:
    """The network's firewall is this list and nothing else.

    Sorted, because CloudStack's order is not specified and the same rules are the same firewall.
    """
    rules = sorted(map(_rule, asked.fw_rules.rules), key=lambda rule: (rule.rule_id, msgspec.json.encode(rule)))
    firewall = Firewall(default_egress_allow=bool(asked.fw_rules.default_egress_allow), rules=tuple(rules))
    return with_network(scope, replace(network_of(scope, asked, context), firewall=firewall))


def _rule(told: FwRule) -> FirewallRule:
    icmp = told.protocol == "icmp"
    return FirewallRule(
        rule_id=int(told.id),
        direction=_DIRECTIONS[told.type],
        protocol=_PROTOCOLS[told.protocol],
        ports=None if told.port_start is None else Ports(int(told.port_start), int(told.port_end or told.port_start)),
        icmp_type=_icmp(told.icmp_type) if icmp else None,
        icmp_code=_icmp(told.icmp_code) if icmp else None,
        public_ip=str(told.public_ip) if told.type == "ingress" else "",
        source_cidrs=_cidrs(told.source_cidrs),
        dest_cidrs=_cidrs(told.dest_cidrs),
    )


def _icmp(number: int | None) -> int | None:
    return None if number is None or number == _ANY else int(number)


def _cidrs(told: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({str(cidr) for cidr in told}))
