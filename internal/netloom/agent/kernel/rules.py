"""IPv4 policy routing rules (rtnetlink): list, add, delete. Message layout: linux/fib_rules.h."""

from __future__ import annotations

import ipaddress
import socket
import struct

from netloom.agent.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Socket,
    attribute,
    attribute_map,
    number,
    string,
    text,
    u32,
)
from netloom.agent.kernel.rtnetlink import RTM_DELRULE, RTM_GETRULE, RTM_NEWRULE, address_text, fixed_part
from netloom.netobjects import Rule

_HEAD = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr: family, dst_len, src_len, tos, table, -, -, action, flags

_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK = 1, 2, 3, 6, 10, 15, 16
_FR_ACT_TO_TBL = 1

_DEFAULT_PRIORITIES = frozenset({0, 32766, 32767})  # of the rules in a new namespace: local, main, default


def is_default(rule: Rule) -> bool:
    """Whether the rule has the priority of a rule that every new namespace has (ip-rule(8))."""
    return rule.priority in _DEFAULT_PRIORITIES


def list_rules_over(rtnetlink: Socket) -> list[Rule]:
    """All rules, by priority. Raises NetlinkError."""
    head = _HEAD.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    found = rtnetlink.dump(Message(RTM_GETRULE, payload=head, what="list rules"))
    return [decode_rule(payload) for kind, payload in found if kind == RTM_NEWRULE]


def decode_rule(payload: bytes) -> Rule:
    """Raises NetlinkError (EBADMSG) when ``payload`` is no fib_rule_hdr with attributes."""
    family, to_length, from_length, _tos, table, *_ = fixed_part(_HEAD, payload, "rule")
    values = attribute_map(payload, _HEAD.size)
    return Rule(
        priority=number(values.get(_FRA_PRIORITY)),
        mark=number(values.get(_FRA_FWMARK)),
        mask=number(values.get(_FRA_FWMASK)),
        table=number(values.get(_FRA_TABLE), table),
        source=f"{address_text(family, values[_FRA_SRC])}/{from_length}" if _FRA_SRC in values else "",
        destination=f"{address_text(family, values[_FRA_DST])}/{to_length}" if _FRA_DST in values else "",
        iif=string(values.get(_FRA_IIFNAME)),
    )


def add_rule(rule: Rule) -> Message:
    """Add a rule. EEXIST when it exists."""
    return _message(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, rule, f"add rule {rule}")


def delete_rule(rule: Rule) -> Message:
    """Delete a rule. ENOENT when it does not exist."""
    return _message(RTM_DELRULE, 0, rule, f"delete rule {rule}")


def _message(message: int, flags: int, rule: Rule, what: str) -> Message:
    source, destination = (ipaddress.ip_network(it) if it else None for it in (rule.source, rule.destination))
    lengths = destination.prefixlen if destination else 0, source.prefixlen if source else 0
    table = rule.table if rule.table < 256 else 0  # larger numbers fit only into the attribute
    payload = _HEAD.pack(socket.AF_INET, *lengths, 0, table, 0, 0, _FR_ACT_TO_TBL, 0)
    payload += u32(_FRA_PRIORITY, rule.priority) + u32(_FRA_TABLE, rule.table)
    for kind, network in ((_FRA_SRC, source), (_FRA_DST, destination)):
        payload += attribute(kind, network.network_address.packed) if network else b""
    if rule.mask:
        payload += u32(_FRA_FWMARK, rule.mark) + u32(_FRA_FWMASK, rule.mask)
    if rule.iif:
        payload += text(_FRA_IIFNAME, rule.iif)
    return Message(message, flags, payload, what=what)
