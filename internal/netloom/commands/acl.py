"""apply-network-acl: replace the access control list of a tier."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from netloom.commands.firewall import ICMP_MAX, icmp_number, ports
from netloom.commands.transition import Context, network_of, with_left_out, with_network
from netloom.errors import BadRequest
from netloom.protocol.acl import AclRule, ApplyNetworkAcl
from netloom.state import PROTOCOLS_WITH_PORTS, AclItem, Scope


def apply_network_acl(scope: Scope, payload: ApplyNetworkAcl, context: Context) -> Scope:
    """Replace the tier's list, sorted by number. An empty list is valid and closes ingress.

    CloudStack keeps an item in its database even if this command fails, so an item that cannot be carried out does not
    stop the others: one that allows is left out, one that denies is widened.
    """
    if not payload.vpc_id:
        raise BadRequest("payload.vpc_id is missing", hint="only tiers of a VPC have access control lists")
    left_out = list(payload.acl_rules.invalid)
    items: list[AclItem] = []
    for rule in sorted(payload.acl_rules.items, key=lambda rule: rule.number):
        items += _items(rule)
        if not rule.protocol:
            left_out.append(f"item {int(rule.number)}: its protocol is not a whole name of a protocol")
    # A list without an egress item allows egress. This list has one, though no packet can match it.
    if payload.acl_rules.has_egress and not any(
        it.direction == "egress" for it in items
    ):  # guard: left-out-items-open-no-egress
        items.append(AclItem(number=0, action="deny", direction="egress"))
    network = replace(network_of(scope, payload, context), acl=tuple(items))
    return with_left_out(with_network(scope, network), "apply-network-acl", network.network_id, left_out)


def _items(rule: AclRule) -> Iterator[AclItem]:
    """The items of the state: one for each protocol; none if no packet can match."""
    protocols = rule.protocol or (("all",) if rule.action == "deny" else ())
    for protocol in protocols:
        icmp = protocol == "icmp"
        if icmp and max(rule.icmp_type or 0, rule.icmp_code or 0) > ICMP_MAX:
            continue
        icmp_type = icmp_number(rule.icmp_type) if icmp else None
        yield AclItem(
            number=int(rule.number),
            action=rule.action.word,
            direction=rule.traffic_type.word,
            protocol=protocol,
            ports=ports(rule.port_start, rule.port_end) if protocol in PROTOCOLS_WITH_PORTS else None,
            icmp_type=icmp_type,
            icmp_code=icmp_number(rule.icmp_code) if icmp_type is not None else None,
            cidrs=tuple(sorted({str(cidr) for cidr in rule.source_cidrs})),
        )
