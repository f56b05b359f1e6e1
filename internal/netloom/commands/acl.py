"""The access control list of a tier, replaced whole."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.firewall import icmp_number, ports
from netloom.commands.transition import Context, network_of, with_network
from netloom.errors import BadRequest
from netloom.protocol.acl import AclRule, ApplyNetworkAcl
from netloom.state import AclItem, Scope


def apply_network_acl(scope: Scope, payload: ApplyNetworkAcl, context: Context) -> Scope:
    """The tier's list is this one, in the order of its numbers. An empty list is a list too: ingress is closed."""
    if not payload.vpc_id:
        raise BadRequest("payload.vpc_id is missing", hint="only tiers of a VPC have access control lists")
    items = tuple(map(_item, sorted(payload.acl_rules, key=lambda rule: rule.number)))
    return with_network(scope, replace(network_of(scope, payload, context), acl=items))


def _item(rule: AclRule) -> AclItem:
    icmp = rule.protocol == "icmp"
    return AclItem(
        number=int(rule.number),
        action=rule.action.word,
        direction=rule.traffic_type.word,
        protocol=str(rule.protocol),
        ports=ports(rule.port_start, rule.port_end),
        icmp_type=icmp_number(rule.icmp_type) if icmp else None,
        icmp_code=icmp_number(rule.icmp_code) if icmp and icmp_number(rule.icmp_type) is not None else None,
        cidrs=tuple(sorted({str(cidr) for cidr in rule.source_cidrs})),
    )
