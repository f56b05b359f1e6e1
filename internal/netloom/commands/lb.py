"""apply-lb-rules: add, change and revoke balanced ports of public addresses."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.nat import address_next_to
from netloom.commands.transition import Context, network_of, with_left_out, with_network
from netloom.protocol import lb as protocol
from netloom.state import Backend, LbRule, Scope


def apply_lb_rules(scope: Scope, payload: protocol.ApplyLbRules, context: Context) -> Scope:
    """Add, change or revoke the rules in the call; other rules stay as they are (docs/protocol.md, section 3).

    A rule that cannot be carried out is left out. It does not fail the call: CloudStack sends all rules of the network
    each time, also when it implements the network.
    """
    network_id = str(payload.network_id)
    rules = dict(scope.lb_rules)
    listed = [_rule(rule, network_id) for rule in payload.lb_rules.items]
    last = {it.rule_id: it for it in listed}
    # Revoke first: another rule of the same call may use the port of a revoked one, or of one that moves to another.
    for rule_id in (*map(int, payload.lb_rules.revoked), *last):
        rules.pop(str(rule_id), None)
    complaints = list(payload.lb_rules.invalid)
    addresses = dict(scope.public_ips)
    for wanted in listed:
        at = f"rule {wanted.rule_id} ({wanted.public_ip}:{wanted.public_port})"
        taken = _taken(scope, rules, wanted) if wanted == last[wanted.rule_id] else "the list has this rule again"
        if taken:
            complaints.append(f"{at}: {taken}")
            continue
        rules[str(wanted.rule_id)] = wanted
        if wanted.public_ip not in addresses and (
            held := address_next_to(addresses.values(), wanted.public_ip, network_id)
        ):
            addresses[held.address] = held
    after = scope
    if payload.lb_rules.items or payload.lb_rules.revoked or payload.lb_rules.invalid:
        network = network_of(scope, payload, context)
        after = with_network(replace(scope, lb_rules=rules, public_ips=addresses), network)
        after = with_left_out(after, "apply-lb-rules", network_id, complaints)
    return after


def _rule(rule: protocol.LbRule, network_id: str) -> LbRule:
    return LbRule(
        rule_id=int(rule.id),
        name=str(rule.name),
        public_ip=str(rule.public_ip),
        public_port=int(rule.public_port),
        protocol=rule.effective_protocol,
        algorithm=rule.algorithm.word,
        backends=tuple(sorted({Backend(ip=str(it.ip), port=int(it.port)) for it in rule.backends})),
        network_id=network_id,
    )


def _taken(scope: Scope, rules: dict[str, LbRule], wanted: LbRule) -> str:
    """The reason why another rule or a port forward already uses the port; empty if none does."""
    transport = _transport(wanted)
    for other in rules.values():
        if (other.public_ip, other.public_port, _transport(other)) == (
            wanted.public_ip,
            wanted.public_port,
            transport,
        ) and other.rule_id != wanted.rule_id:
            return f"the port is balanced by rule {other.rule_id}"
    for forward in scope.port_forwards.values():
        ports = forward.public_ports
        if (forward.public_ip, forward.protocol) == (wanted.public_ip, transport) and (
            ports.first <= wanted.public_port <= ports.last
        ):
            return f"the port is forwarded ({forward.key})"
    return ""


def _transport(rule: LbRule) -> str:
    return "udp" if rule.protocol == "udp" else "tcp"
