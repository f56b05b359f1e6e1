"""apply-fw-rules: the firewall of a network. Each call has the complete set of rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import msgspec

from netloom.errors import BadRequest
from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import Items, convert, convert_items
from netloom.protocol.scalars import Direction, Flag, IcmpNumber, IPv4, Number, Port, Prefix, quoted

_NAMES = {"1": "icmp", "6": "tcp", "17": "udp", "0": "all"}
# iana.org/assignments/protocol-numbers
_NUMBERS = {
    "ah": "51",
    "dccp": "33",
    "esp": "50",
    "gre": "47",
    "icmpv6": "58",
    "igmp": "2",
    "ipip": "4",
    "ipv6-icmp": "58",
    "ospf": "89",
    "sctp": "132",
    "udplite": "136",
    "vrrp": "112",
}
_STORED = "tcp,udp,icmp,all"
_PORTS = frozenset({"portStart", "portEnd", "icmpType", "icmpCode"})
_CIDRS = frozenset({"sourceCidrs", "destCidrs"})
_PROTOCOL = frozenset({"protocol"})


class Protocols(tuple[str, ...]):
    """``tcp``, ``udp``, ``icmp``, ``all`` and the numbers of other protocols, 2 to 255.

    CloudStack compares a name with a text such as ``tcp,udp,icmp,all`` and accepts each part of it, so a value may be a
    list. Number 0 means all protocols, as in iptables(8). Empty: none, or a part of a name (``t``).
    """

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{quoted(value)} is not text")
        text = str(value).strip(" ").lower()
        found = [_protocol(it.strip(" ")) for it in text.split(",")]
        if all(found):
            return cls(("all",) if "all" in found else dict.fromkeys(found))
        if text in _STORED:
            return cls()
        raise ValueError(f"{quoted(value)} is none of tcp, udp, icmp, all, nor a protocol number (0 to 255)")


def _protocol(text: str) -> str:
    """The spelling of one protocol in the state; empty if ``text`` is none."""
    if text.isdecimal() and len(text) <= 48 and int(text) <= 255:  # decimal digits of any script, as in Java
        return _NAMES.get(str(int(text)), str(int(text)))
    return text if text in ("tcp", "udp", "icmp", "all") else _NUMBERS.get(text, "")


class FwRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel", gc=False):
    """One rule. Absent ports, ICMP numbers and empty CIDR lists mean any."""

    type: Direction
    protocol: Protocols = Protocols()
    id: Number = Number(0)
    port_start: Port | None = None
    port_end: Port | None = None
    icmp_type: IcmpNumber | None = None
    icmp_code: IcmpNumber | None = None
    public_ip: IPv4 = IPv4("")
    source_cidrs: tuple[Prefix, ...] = ()
    dest_cidrs: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        check_ports(self.port_start, self.port_end)  # guard: ports-of-a-rule-are-checked


class _Rules(msgspec.Struct, frozen=True, kw_only=True):
    default_egress_allow: Flag
    rules: list[dict[str, Any]]


class FwRules(Items[FwRule]):
    """The complete set. ``default_egress_allow`` true: egress rules deny; false: egress rules allow.

    ``invalid``: the errors of rules that no version of CloudStack stores. They are left out of ``items``; one that
    denies is widened to what can be read of it.
    """

    def __init__(self, default_egress_allow: bool, items: Iterable[FwRule], invalid: Iterable[str]) -> None:
        super().__init__(items, invalid)
        self.default_egress_allow = default_egress_allow

    @classmethod
    def parse(cls, value: object) -> FwRules:
        """Raises ValueError if ``value`` is not an object, BadRequest if one of its two fields is missing or wrong."""
        if not isinstance(value, dict):
            raise ValueError("expected an object")
        given = convert(value, _Rules, root="payload.fw_rules")

        def wider(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
            denies = given.default_egress_allow and str(rule.get("type")).lower() == "egress"
            return widened(rule, ("type",)) if denies else iter(())

        rules, invalid = convert_items(given.rules, FwRule, root="payload.fw_rules.rules", wider=wider, remember=True)
        return cls(bool(given.default_egress_allow), rules, invalid)


class ApplyFwRules(NetworkPayload, frozen=True, kw_only=True):
    """apply-fw-rules: replace the firewall."""

    fw_rules: FwRules  # guard: fw-rules-is-an-object-that-must-be-there

    def __post_init__(self) -> None:
        refuse_invalid(self.network_state, self.fw_rules.invalid)


def check_ports(first: int | None, last: int | None) -> None:
    """Raise ValueError if the two ports of a rule are not a range. The last one alone is a range from 0."""
    if last is not None and (first or 0) > last:
        raise ValueError(f"ports {first}-{last} end before they begin")


def widened(rule: dict[str, Any], fixed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What to take instead of a rule that denies and is not valid, the narrowest first: it never denies less.

    A field that is left out means any; at last only the fields ``fixed`` are left.
    """
    for without in (_PORTS, _CIDRS, _PORTS | _CIDRS, _PORTS | _PROTOCOL):
        yield {key: it for key, it in rule.items() if key not in without} | (
            {"protocol": "all"} if without & _PROTOCOL else {}
        )
    yield {key: rule[key] for key in fixed if key in rule} | {"protocol": "all"}


def refuse_invalid(network_state: str, invalid: tuple[str, ...]) -> None:
    """Raise BadRequest with the first error of a list, unless the network is being implemented.

    On a living network the old rules stay in force. A network that is being implemented has none, and would not start:
    it gets the valid rules.
    """
    if invalid and network_state != "implementing":  # guard: an-invalid-item-does-not-stop-a-network
        raise BadRequest(invalid[0])
