"""Load balancing rules; a call lists only those that it is about."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.errors import BadRequest
from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import convert
from netloom.protocol.scalars import Choice, Flag, IPv4, Number, Port, Text


class LbProtocol(Choice[Literal["tcp", "udp", "tcp-proxy"]]):
    """``tcp-proxy`` is tcp with the PROXY protocol towards the backends."""


class LbAlgorithm(Choice[Literal["roundrobin", "leastconn", "source"]]):
    """How a backend is chosen."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A VM behind a rule; ``revoked`` takes it out."""

    ip: IPv4
    port: Port
    revoked: Flag = Flag(0)


class LbRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One rule, created, updated or (``revoke``) ended. It may have no backend."""

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
        """The protocol to speak: what a name that ends in ``[udp]`` or ``[tcp-proxy]`` says, else what was sent."""
        name = self.name.rstrip().lower()
        if name.endswith("[udp]"):
            return "udp"
        return "tcp-proxy" if name.endswith("[tcp-proxy]") else self.protocol.word


class LbRules:
    """The rules of a call, and of each that cannot be read the reason: a restart sends all of them in one call."""

    def __init__(self, rules: tuple[LbRule, ...], invalid: tuple[str, ...]) -> None:
        self.rules = rules
        self.invalid = invalid

    @classmethod
    def parse(cls, value: object) -> LbRules:
        """Raises ValueError when it is no list of objects, BadRequest when there are rules and none can be read."""
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
    """apply-lb-rules: rules that are not listed stay as they are."""

    lb_rules: LbRules
