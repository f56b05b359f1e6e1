"""apply-network-acl: the access control list of a VPC tier. Each call has the complete list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from netloom.protocol.firewall import Protocols, check_ports, refuse_invalid, widened
from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import Items, convert_items
from netloom.protocol.scalars import Choice, Direction, IcmpNumber, Order, Port, Prefix


class AclAction(Choice[Literal["allow", "deny"]]):
    """The action of an item for packets that match it."""


class AclRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One item. ``source_cidrs`` match the source of ingress and the destination of egress; empty means any."""

    number: Order
    action: AclAction
    traffic_type: Direction
    protocol: Protocols = Protocols()
    port_start: Port | None = None
    port_end: Port | None = None
    icmp_type: IcmpNumber | None = None
    icmp_code: IcmpNumber | None = None
    source_cidrs: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        check_ports(self.port_start, self.port_end)


class AclRules(Items[AclRule]):
    """The items, and the errors of items that no version of CloudStack stores.

    Those are left out of ``items``; one that denies is widened to what can be read of it. ``has_egress``: the list has
    an item that is not about ingress, whether it is valid or not.
    """

    def __init__(self, items: Iterable[AclRule], invalid: Iterable[str], has_egress: bool) -> None:
        super().__init__(items, invalid)
        self.has_egress = has_egress

    @classmethod
    def parse(cls, value: object) -> AclRules:
        """Raises BadRequest if ``value`` is not a list of objects."""
        items, invalid = convert_items(value, AclRule, root="payload.acl_rules", wider=_wider)
        listed = value if isinstance(value, list) else []
        return cls(items, invalid, any(str(it.get("trafficType")).lower() != "ingress" for it in listed))


def _wider(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    denies = str(rule.get("action")).lower() == "deny"
    return widened(rule, ("number", "action", "trafficType")) if denies else iter(())


class ApplyNetworkAcl(NetworkPayload, frozen=True, kw_only=True):
    """apply-network-acl: the tier's complete list."""

    acl_rules: AclRules

    def __post_init__(self) -> None:
        refuse_invalid(self.network_state, self.acl_rules.invalid)
