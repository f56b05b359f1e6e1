"""apply-lb-rules: load balancing rules. A call has only the rules that change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import Items, convert_items
from netloom.protocol.scalars import Choice, IPv4, Number, ServicePort, Title


class LbProtocol(Choice[Literal["tcp", "udp", "tcp-proxy"]]):
    """The protocol of a rule. ``tcp-proxy`` is TCP with the PROXY protocol header for the backends."""


class LbAlgorithm(Choice[Literal["roundrobin", "leastconn", "source"]]):
    """The algorithm that selects the backend of a connection."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A VM of a rule."""

    ip: IPv4
    port: ServicePort


class LbRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule to create or update. It may have no backend."""

    id: Number
    public_ip: IPv4
    public_port: ServicePort
    name: Title = Title("")
    protocol: LbProtocol = LbProtocol("tcp")
    algorithm: LbAlgorithm = LbAlgorithm("roundrobin")
    backends: tuple[Backend, ...] = ()

    @property
    def effective_protocol(self) -> Literal["tcp", "udp", "tcp-proxy"]:
        """The protocol to use: the one at the end of the name, ``[udp]`` or ``[tcp-proxy]``, else ``protocol``."""
        name = self.name.rstrip().lower()
        if name.endswith("[udp]"):
            return "udp"
        return "tcp-proxy" if name.endswith("[tcp-proxy]") else self.protocol.word


class _Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """A rule to delete. Nothing but its id is read: the deletion of a rule that was refused must succeed."""

    id: Number


class LbRules(Items[LbRule]):
    """The valid rules of a call, the ids of those to delete, and the errors of the invalid ones.

    A call has all rules of the network, so one invalid rule must not prevent the others.
    """

    def __init__(self, items: Iterable[LbRule], invalid: Iterable[str], revoked: Iterable[Number]) -> None:
        super().__init__(items, invalid)
        self.revoked = tuple(revoked)

    @classmethod
    def parse(cls, value: object) -> LbRules:
        """Raises BadRequest if ``value`` is not a list of objects."""
        listed = value if isinstance(value, list) and all(isinstance(it, dict) for it in value) else None
        wanted = value if listed is None else [_without_revoked(it) for it in listed if not _is_true(it.get("revoke"))]
        root = "payload.lb_rules"
        rules, invalid = convert_items(wanted, LbRule, root=root)
        revoked, unknown = convert_items([it for it in listed or () if _is_true(it.get("revoke"))], _Revoked, root=root)
        return cls(rules, (*invalid, *unknown), (it.id for it in revoked))


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")


def _without_revoked(rule: dict[str, Any]) -> dict[str, Any]:
    """The rule without the VMs that are to be removed from it, of which nothing else is read."""
    backends = rule.get("backends")
    if not isinstance(backends, list):
        return rule
    return rule | {"backends": [it for it in backends if not (isinstance(it, dict) and _is_true(it.get("revoked")))]}


class ApplyLbRules(NetworkPayload, frozen=True, kw_only=True):
    """apply-lb-rules: rules that are not in the call stay as they are."""

    lb_rules: LbRules
