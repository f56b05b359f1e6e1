"""The access control list of a tier, replaced whole."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace

from netloom.commands.transition import Context, network_of, with_network
from netloom.errors import BadRequest
from netloom.protocol.acl import AclRule, ApplyNetworkAcl
from netloom.state import AclItem, Ports, Scope

_ACTIONS: dict[str, Literal["allow", "deny"]] = {"allow": "allow", "deny": "deny"}
_DIRECTIONS: dict[str, Literal["ingress", "egress"]] = {"ingress": "ingress", "egress": "egress"}


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
        action=_ACTIONS[rule.action],
        direction=_DIRECTIONS[rule.traffic_type],
        protocol=str(rule.protocol),
        ports=None if rule.port_start is None else Ports(int(rule.port_start), int(rule.port_end or rule.port_start)),
        icmp_type=_icmp(rule.icmp_type) if icmp else None,
        icmp_code=_icmp(rule.icmp_code) if icmp and _icmp(rule.icmp_type) is not None else None,
        cidrs=tuple(sorted({str(cidr) for cidr in rule.source_cidrs})),
    )


def _icmp(number: int | None) -> int | None:
    return None if number is None or number < 0 else int(number)  # CloudStack's -1 is any
