"""The firewall of a network, replaced whole."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from netloom.commands.transition import Context, network_of, with_network
from netloom.protocol.firewall import ApplyFwRules, FwRule
from netloom.state import Firewall, FirewallRule, Ports, Scope

_ANY = -1  # ICMP type or code


def apply_fw_rules(scope: Scope, payload: ApplyFwRules, context: Context) -> Scope:
    """The network's firewall is this list and nothing else.

    Sorted, because CloudStack's order is not specified and the same rules are the same firewall.
    """
    rules = sorted(map(_rule, payload.fw_rules.rules), key=lambda rule: (rule.rule_id, msgspec.json.encode(rule)))
    firewall = Firewall(default_egress_allow=bool(payload.fw_rules.default_egress_allow), rules=tuple(rules))
    return with_network(scope, replace(network_of(scope, payload, context), firewall=firewall))


def _rule(rule: FwRule) -> FirewallRule:
    icmp = rule.protocol == "icmp"
    return FirewallRule(
        rule_id=int(rule.id),
        direction=rule.type.word,
        protocol=rule.protocol.word,
        ports=ports(rule.port_start, rule.port_end),
        icmp_type=icmp_number(rule.icmp_type) if icmp else None,
        icmp_code=icmp_number(rule.icmp_code) if icmp else None,
        public_ip=str(rule.public_ip) if rule.type == "ingress" else "",
        source_cidrs=_cidrs(rule.source_cidrs),
        dest_cidrs=_cidrs(rule.dest_cidrs),
    )


def ports(first: int | None, last: int | None) -> Ports | None:
    """The ports of a rule: one port when ``last`` is None, any when ``first`` is None too."""
    return None if first is None else Ports(int(first), int(last or first))


def icmp_number(number: int | None) -> int | None:
    """An ICMP type or code as the state has it: None means any."""
    return None if number is None or number == _ANY else int(number)


def _cidrs(cidrs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({str(cidr) for cidr in cidrs}))
