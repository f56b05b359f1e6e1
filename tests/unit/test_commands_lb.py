"""apply-lb-rules: what is carried out, what is left out, and which address a rule takes."""

from __future__ import annotations

from typing import Any

import pytest

from netloom.state import Scope
from unit.payload_player import call, implement, play

GOOD = {"id": 1, "name": "web", "publicIp": "203.0.113.20", "publicPort": 80, "protocol": "tcp"}


def lb(scope: Scope | None, *rules: dict[str, Any], **fields: Any) -> tuple[Scope, tuple[str, ...]]:
    """The scope afterwards, and why some rules are left out."""
    outcome = call(scope, "apply-lb-rules", lb_rules=list(rules), **fields)
    assert outcome.scope is not None
    return outcome.scope, outcome.scope.left_out.get("apply-lb-rules 204", ())


def with_address() -> Scope:
    scope = play(implement().scope, "021").scope
    assert scope is not None
    return scope


@pytest.mark.parametrize("wrong", [{"publicPort": 0}, {"publicIp": ""}, {"protocol": "ssl"}, {"algorithm": "random"}])
def test_a_wrong_rule_is_left_out_and_stops_no_other(wrong: dict[str, Any]) -> None:
    bad = {**GOOD, "id": 2, "publicPort": 81, **wrong}
    scope, (reason,) = lb(with_address(), bad, GOOD)
    assert "payload.lb_rules[0]" in reason
    assert set(scope.lb_rules) == {"1"}
    # CloudStack sends all rules with each change, and all of them when the network is implemented.
    again, reasons = lb(scope, bad, GOOD, {**GOOD, "id": 3, "publicPort": 82})
    assert set(again.lb_rules) == {"1", "3"}
    assert reasons == (reason,)
    deleted, reasons = lb(again, {**bad, "revoke": True}, GOOD)
    assert (reasons, deleted.left_out) == ((), {})


def test_control_characters_of_a_name_and_revoked_members_do_not_refuse_a_rule() -> None:
    gone = {"ip": "", "port": 0, "revoked": True}
    scope, reasons = lb(with_address(), {**GOOD, "name": "a\nb", "privatePort": 0, "backends": [gone]})
    assert reasons == ()
    assert (scope.lb_rules["1"].name, scope.lb_rules["1"].backends) == ("a b", ())


def test_a_rule_takes_an_address_that_was_never_assigned() -> None:
    scope, reasons = lb(with_address(), {**GOOD, "publicIp": "203.0.113.77"})
    assert reasons == ()
    taken, known = scope.public_ips["203.0.113.77"], scope.public_ips["203.0.113.20"]
    assert (taken.vlan, taken.gateway, taken.exit) == (known.vlan, known.gateway, known.exit)
    assert not taken.source_nat
    released = call(scope, "release-ip", public_ip="203.0.113.77").scope
    assert released is not None
    assert "203.0.113.77" not in released.public_ips


@pytest.mark.mutation("rules-without-their-address-are-told")
@pytest.mark.parametrize("command", ["apply-lb-rules", "apply-fw-rules"])
def test_rules_whose_vlan_is_not_known_are_told_until_the_assign_ip(command: str) -> None:
    """Nothing says on which VLAN the address is: it is in no known public subnet."""
    address: dict[str, Any] = {
        "public_ip": "198.51.100.7",
        "public_vlan": "vlan://102",
        "public_gateway": "198.51.100.1",
        "public_cidr": "198.51.100.0/24",
        "source_nat": "false",
    }
    listed: dict[str, Any] = {"lb_rules": [{**GOOD, "publicIp": "198.51.100.7"}]}
    none: dict[str, Any] = {"lb_rules": [{"id": 1, "revoke": True}]}
    if command == "apply-fw-rules":
        ingress = {"id": 1, "type": "ingress", "protocol": "tcp", "publicIp": "198.51.100.7"}
        listed = {"fw_rules": {"default_egress_allow": True, "rules": [ingress]}}
        none = {"fw_rules": {"default_egress_allow": True, "rules": []}}
    scope = call(with_address(), command, **listed).scope
    assert scope is not None
    assert "198.51.100.7" not in scope.public_ips
    (reason,) = scope.left_out["assign-ip 204"]
    assert "198.51.100.7" in reason
    assigned = call(scope, "assign-ip", **address).scope
    assert assigned is not None
    assert ("198.51.100.7" in assigned.public_ips, assigned.left_out) == (True, {})
    revoked = call(scope, command, **none).scope
    assert revoked is not None
    assert revoked.left_out == {}


def test_rules_that_swap_their_ports_are_in_force_and_a_repeat_changes_nothing() -> None:
    one, two = {**GOOD, "id": 1, "publicPort": 80}, {**GOOD, "id": 2, "publicPort": 81}
    scope, _ = lb(with_address(), one, two)
    swapped = [{**one, "publicPort": 81}, {**two, "publicPort": 80}]
    after, reasons = lb(scope, *swapped)
    assert {it.rule_id: it.public_port for it in after.lb_rules.values()} == {1: 81, 2: 80}
    assert reasons == ()
    assert lb(after, *swapped)[0] == after


def test_of_a_rule_that_is_listed_twice_the_last_one_is_in_force_and_a_repeat_changes_nothing() -> None:
    first, last = {**GOOD, "id": 1, "publicPort": 80}, {**GOOD, "id": 1, "publicPort": 81}
    other = {**GOOD, "id": 2, "publicPort": 80}
    after, (reason,) = lb(with_address(), first, last, other, other)
    assert {it.rule_id: it.public_port for it in after.lb_rules.values()} == {1: 81, 2: 80}
    assert reason == "rule 1 (203.0.113.20:80): the list has this rule again"
    assert lb(after, first, last, other, other) == (after, (reason,))
