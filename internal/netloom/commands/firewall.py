"""apply-fw-rules: replace the firewall of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from operator import attrgetter, lt

import msgspec
from msgspec.structs import replace

from netloom.commands.nat import address_next_to
from netloom.commands.transition import Context, is_shutting_down, network_of, with_left_out, with_network
from netloom.protocol.firewall import ApplyFwRules, FwRule
from netloom.state import PROTOCOLS_WITH_PORTS, Firewall, FirewallRule, Ports, PublicIp, Scope

ICMP_MAX = 255  # the largest type and code (RFC 792)
_PORT_MAX = 65535
_RULES_KEPT = 20_000  # a list comes as a whole with each change of it
_by_id = attrgetter("rule_id")


def apply_fw_rules(scope: Scope, payload: ApplyFwRules, context: Context) -> Scope:
    """Replace all firewall rules of the network.

    The rules are sorted: CloudStack does not specify their order, and the same rules must give the same state. A rule
    that cannot be carried out does not stop the others: one that allows is left out, one that denies is widened.
    """
    given = payload.fw_rules
    left_out = list(given.invalid)
    rules: list[FirewallRule] = []
    for rule in given.items:
        denies = rule.type == "egress" and given.default_egress_allow
        rules += _known_rules(rule, denies)
        if rule.type == "ingress" and not rule.public_ip:
            left_out.append(f"rule {int(rule.id)}: CloudStack did not find its public address")
        if not rule.protocol:
            left_out.append(f"rule {int(rule.id)}: its protocol is not a whole name of a protocol")
    firewall = Firewall(default_egress_allow=given.default_egress_allow, rules=_sorted(rules))
    network = replace(network_of(scope, payload, context), firewall=firewall)
    scope = replace(scope, public_ips=_with_addresses(scope, payload, firewall.ingress))
    return with_left_out(with_network(scope, network), "apply-fw-rules", network.network_id, left_out)


def _sorted(rules: list[FirewallRule]) -> tuple[FirewallRule, ...]:
    """By id. A rule with several protocols gives several rules with its id."""
    rules.sort(key=_by_id)
    if all(map(lt, map(_by_id, rules), map(_by_id, islice(rules, 1, None)))):
        return tuple(rules)
    same_id = (list(group) for _, group in groupby(rules, key=_by_id))
    return tuple(it for group in same_id for it in sorted(group, key=msgspec.json.encode))


def _with_addresses(scope: Scope, payload: ApplyFwRules, named: Iterable[str]) -> dict[str, PublicIp]:
    """The public addresses with those of the rules: CloudStack may send a rule before assign-ip.

    While CloudStack shuts the network down, it still sends the rules, and nothing is assigned anew.
    """
    assigned = dict(scope.public_ips)
    if is_shutting_down(payload):
        return assigned
    for address in sorted(set(named) - assigned.keys()):
        if held := address_next_to(assigned.values(), address, str(payload.network_id)):
            assigned[address] = held
    return assigned


@lru_cache(maxsize=_RULES_KEPT)
def _known_rules(rule: FwRule, denies: bool) -> tuple[FirewallRule, ...]:
    """``_rules``, once for each rule, so that a rule of the list before is the same object."""
    return tuple(_rules(rule, denies=denies))


def _rules(rule: FwRule, *, denies: bool) -> Iterator[FirewallRule]:
    """The rules of the state: one for each protocol; none if no packet can match.

    ``denies``: the rule must match at least what CloudStack's text means; the others at most.
    """
    sources, dests = _cidrs(rule.source_cidrs), _cidrs(rule.dest_cidrs)
    if rule.type == "ingress":
        # A public address is an IPv4 address. CloudStack accepts 0.0.0.0/0 and ::/0 in one list.
        for given in (sources, dests):
            if given and all(":" in cidr for cidr in given):
                return
        sources = tuple(cidr for cidr in sources if ":" not in cidr)
        dests = tuple(cidr for cidr in dests if ":" not in cidr)
        if not rule.public_ip:
            return
    wanted_ports = ports(rule.port_start, rule.port_end)
    for protocol in _protocols(rule, wanted_ports, denies=denies):
        icmp = protocol == "icmp"
        if icmp and max(rule.icmp_type or 0, rule.icmp_code or 0) > ICMP_MAX:
            continue
        yield FirewallRule(
            rule_id=int(rule.id),
            direction=rule.type.word,
            protocol=protocol,
            ports=wanted_ports if protocol in PROTOCOLS_WITH_PORTS else None,
            icmp_type=icmp_number(rule.icmp_type) if icmp else None,
            icmp_code=icmp_number(rule.icmp_code) if icmp else None,
            public_ip=str(rule.public_ip) if rule.type == "ingress" else "",
            source_cidrs=sources,
            dest_cidrs=dests,
        )


def _protocols(rule: FwRule, wanted_ports: Ports | None, *, denies: bool) -> tuple[str, ...]:
    if not rule.protocol:
        return ("all",) if denies else ()
    if rule.protocol == ("all",) and wanted_ports is not None and not denies:
        return ("tcp", "udp")  # the protocols that have the ports
    return rule.protocol


def ports(first: int | None, last: int | None) -> Ports | None:
    """The ports of a rule; None: any. The first one alone is one port, the last one alone is a range from 0."""
    if first is None and last is None:
        return None
    start = int(first or 0)
    end = start if last is None else int(last)
    return None if (start, end) == (0, _PORT_MAX) else Ports(start, end)


def icmp_number(number: int | None) -> int | None:
    """An ICMP type or code as the state has it: None means any, as -1 does for CloudStack."""
    return None if number is None or number < 0 else int(number)


def _cidrs(cidrs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({str(cidr) for cidr in cidrs}))
