"""apply-lb-rules: what is carried out, what is left out, and which address a rule takes."""

from __future__ import annotations

from typing import Any

import pytest

from netloom.errors import HostRefused
from netloom.state import Scope
from unit.payload_player import call, implement, play

GOOD = {"id": 1, "name": "web", "publicIp": "203.0.113.20", "publicPort": 80, "protocol": "tcp"}


def lb(scope: Scope | None, *rules: dict[str, Any], **fields: Any) -> tuple[Scope, HostRefused | None]:
    outcome = call(scope, "apply-lb-rules", lb_rules=list(rules), **fields)
    assert outcome.scope is not None
    return outcome.scope, outcome.refused


def with_address() -> Scope:
    scope = play(implement().scope, "021").scope
    assert scope is not None
    return scope


@pytest.mark.parametrize("wrong", [{"publicPort": 0}, {"publicIp": ""}, {"protocol": "ssl"}, {"algorithm": "random"}])
def test_a_wrong_rule_fails_its_own_call_and_no_later_one(wrong: dict[str, Any]) -> None:
    bad = {**GOOD, "id": 2, "publicPort": 81, **wrong}
    scope, refused = lb(with_address(), bad, GOOD)
    assert refused is not None
    assert "payload.lb_rules[0]" in refused.message
    assert set(scope.lb_rules) == {"1"}
    # CloudStack sends all rules with each change, and all of them when the network is implemented.
    again, refused = lb(scope, bad, GOOD, {**GOOD, "id": 3, "publicPort": 82})
    assert refused is None
    assert set(again.lb_rules) == {"1", "3"}
    assert again.left_out == scope.left_out != {}
    assert lb(with_address(), bad, GOOD, network_state="implementing")[1] is None
    deleted, refused = lb(again, {**bad, "revoke": True}, GOOD)
    assert (refused, deleted.left_out) == (None, {})


def test_control_characters_of_a_name_and_revoked_members_do_not_refuse_a_rule() -> None:
    gone = {"ip": "", "port": 0, "revoked": True}
    scope, refused = lb(with_address(), {**GOOD, "name": "a\nb", "privatePort": 0, "backends": [gone]})
    assert refused is None
    assert (scope.lb_rules["1"].name, scope.lb_rules["1"].backends) == ("a b", ())


def test_a_rule_takes_an_address_that_was_never_assigned() -> None:
    scope, refused = lb(with_address(), {**GOOD, "publicIp": "203.0.113.77"})
    assert refused is None
    taken, known = scope.public_ips["203.0.113.77"], scope.public_ips["203.0.113.20"]
    assert (taken.vlan, taken.gateway, taken.exit) == (known.vlan, known.gateway, known.exit)
    assert not taken.source_nat
    released = call(scope, "release-ip", public_ip="203.0.113.77").scope
    assert released is not None
    assert "203.0.113.77" not in released.public_ips


def test_a_rule_whose_vlan_is_not_known_is_reported_and_kept_for_its_assign_ip() -> None:
    scope, refused = lb(with_address(), {**GOOD, "publicIp": "198.51.100.7"})
    assert refused is not None
    assert "203" not in refused.message
    assert "198.51.100.7:80" in refused.message
    assert set(scope.lb_rules) == {"1"}
    assert "198.51.100.7" not in scope.public_ips
