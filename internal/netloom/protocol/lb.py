"""apply-lb-rules: load balancing rules. A call has only the rules that change."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.errors import BadRequest
from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import convert
from netloom.protocol.scalars import Choice, Flag, IPv4, Number, Port, Text


class LbProtocol(Choice[Literal["tcp", "udp", "tcp-proxy"]]):
    """The protocol of a rule. ``tcp-proxy`` is TCP with the PROXY protocol header for the backends."""


class LbAlgorithm(Choice[Literal["roundrobin", "leastconn", "source"]]):
    """The algorithm that selects the backend of a connection."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A VM of a rule. ``revoked``: the VM is to be removed from the rule."""

    ip: IPv4
    port: Port
    revoked: Flag = Flag(0)


class LbRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule to create or update, or (``revoke``) to delete. It may have no backend."""

    id: Number
    public_ip: IPv4
    public_port: Port
    name: Text = Text("")
    private_port: Port | None = None
    protocol: LbProtocol = LbProtocol("tcp")
    algorithm: LbAlgorithm = LbAlgorithm("roundrobin")
    revoke: Flag = Flag(0)
    backends: tuple[Backend, ...] = ()

    @property
    def effective_protocol(self) -> Literal["tcp", "udp", "tcp-proxy"]:
        """The protocol to use: the one at the end of the name, ``[udp]`` or ``[tcp-proxy]``, else ``protocol``."""
        name = self.name.rstrip().lower()
        if name.endswith("[udp]"):
            return "udp"
        return "tcp-proxy" if name.endswith("[tcp-proxy]") else self.protocol.word


class LbRules:
    """The valid rules of a call, and the errors of the invalid ones.

    A restart sends all rules in one call, so one invalid rule must not prevent the others.
    """

    def __init__(self, rules: tuple[LbRule, ...], invalid: tuple[str, ...]) -> None:
        self.rules = rules
        self.invalid = invalid

    @classmethod
    def parse(cls, value: object) -> LbRules:
        """Raises ValueError if ``value`` is not a list of objects, BadRequest if all rules are invalid."""
        if not isinstance(value, list) or not all(isinstance(it, dict) for it in value):
            raise ValueError("expected a list of objects")
        rules, invalid = [], []
        for at, item in enumerate(value):
            try:
                rules.append(convert(item, LbRule, root=f"payload.lb_rules[{at}]"))
            except BadRequest as error:  # guard: an-unreadable-rule-keeps-no-other-out
                invalid.append(error.message)
        if invalid and not rules:
            raise BadRequest(invalid[0])
        return cls(tuple(rules), tuple(invalid))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LbRules) and (self.rules, self.invalid) == (other.rules, other.invalid)

    def __hash__(self) -> int:
        return hash((self.rules, self.invalid))


class ApplyLbRules(NetworkPayload, frozen=True, kw_only=True):
    """apply-lb-rules: rules that are not in the call stay as they are."""

    lb_rules: LbRules
