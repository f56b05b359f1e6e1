"""The firewall of a network: replaced whole, or not touched."""

from __future__ import annotations

from typing import Any

import pytest

from netloom.errors import BadRequest
from netloom.state import Firewall, FirewallRule, Ports
from unit.payload_player import call, implement, network, play


def test_the_full_list_as_the_client_sends_it() -> None:
    firewall = network(play(implement().scope, "070")).firewall
    assert firewall is not None
    assert firewall.default_egress_allow
    assert [it.rule_id for it in firewall.rules] == [901, 902, 903, 904, 905, 906, 907, 908]
    assert firewall.rules[1] == FirewallRule(
        rule_id=902,
        direction="ingress",
        protocol="tcp",
        ports=Ports(8080, 8090),
        public_ip="203.0.113.21",
        source_cidrs=("192.0.2.0/24", "198.51.100.0/24"),
    )
    assert (firewall.rules[2].icmp_type, firewall.rules[2].icmp_code) == (8, 0)
    assert (firewall.rules[3].icmp_type, firewall.rules[3].icmp_code) == (None, None)


def test_a_list_replaces_the_one_before() -> None:
    scope = play(play(implement().scope, "070").scope, "023").scope
    assert scope is not None
    assert scope.networks["204"].firewall == Firewall(default_egress_allow=False, rules=())


def test_the_order_of_the_list_is_not_the_firewall() -> None:
    rules: list[dict[str, Any]] = [
        {"id": number, "type": "egress", "protocol": "tcp", "portStart": number, "sourceCidrs": cidrs}
        for number, cidrs in ((1, ["10.10.1.0/25", "10.10.1.128/25"]), (2, []), (2, ["10.10.1.9/32"]))
    ]
    once = apply_rules(implement().scope, rules)
    turned = [{**rule, "sourceCidrs": list(reversed(rule["sourceCidrs"]))} for rule in reversed(rules)]
    assert apply_rules(once.scope, turned) == once


def test_words_in_any_case_and_a_single_port() -> None:
    (rule,) = rules_of({"type": "EGRESS", "protocol": "Tcp", "portStart": "25"})
    assert (rule.direction, rule.protocol, rule.ports) == ("egress", "tcp", Ports(25, 25))


def test_host_bits_of_a_rule_are_cleared() -> None:
    (rule,) = rules_of({"type": "egress", "protocol": "all", "destCidrs": ["198.51.100.9/24", "198.51.100.0/24"]})
    assert rule.dest_cidrs == ("198.51.100.0/24",)


def test_a_firewall_before_implement_is_remembered() -> None:
    remembered = network(play(None, "023"))
    assert (remembered.implemented, remembered.vlan) == (False, "1204")
    assert network(play(play(None, "023").scope, "020")).firewall == Firewall(default_egress_allow=False)


@pytest.mark.mutation("a-port-is-at-most-65535", instead="99999")
def test_defect_07_one_wrong_rule_leaves_the_firewall_as_it_was() -> None:
    scope = play(implement().scope, "070").scope
    assert scope is not None
    before = scope.networks["204"].firewall
    with pytest.raises(BadRequest, match=r"rules\[1\]\.portStart: 99999"):
        apply_rules(
            scope,
            [
                {"type": "egress", "protocol": "tcp", "portStart": 25},
                {"type": "egress", "protocol": "tcp", "portStart": 99999},
            ],
        )
    assert scope.networks["204"].firewall is before


OPEN = {"type": "ingress", "publicIp": "203.0.113.20", "protocol": "tcp"}


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        ({"portStart": 0, "portEnd": 65535}, [("tcp", None)]),  # as Terraform's users write it
        ({"portStart": 0, "portEnd": 0}, [("tcp", Ports(0, 0))]),
        ({"portEnd": 80}, [("tcp", Ports(0, 80))]),
        ({"protocol": "all", "portStart": 1, "portEnd": 2}, [("tcp", Ports(1, 2)), ("udp", Ports(1, 2))]),
        ({"protocol": "icmp", "portStart": 1, "portEnd": 2}, [("icmp", None)]),
        ({"protocol": "47"}, [("47", None)]),
        ({"protocol": "GRE"}, [("47", None)]),
        ({"protocol": "0"}, [("all", None)]),
        ({"protocol": "tcp,udp", "portStart": 53}, [("tcp", Ports(53, 53)), ("udp", Ports(53, 53))]),
        ({"protocol": "icmp", "icmpType": 300}, []),  # no packet has this type
        ({"protocol": "icmp", "icmpType": 8, "icmpCode": 1000}, []),
        ({"protocol": "icmp", "icmpType": -2}, [("icmp", None)]),
        ({"sourceCidrs": ["0.0.0.0/0", "::/0"]}, [("tcp", None)]),
        ({"sourceCidrs": ["::/0"]}, []),  # no packet to a public IPv4 address has such a source
        ({"protocol": "t"}, []),
        ({"publicIp": ""}, []),
    ],
)
def test_what_cloudstack_stores_is_carried_out(rule: dict[str, Any], stored: list[tuple[str, Ports | None]]) -> None:
    found = rules_of({**OPEN, **rule}, {**OPEN, "id": 9, "portStart": 22})
    assert [(it.protocol, it.ports) for it in found[:-1]] == stored
    assert found[-1].ports == Ports(22, 22)
    assert all(":" not in cidr for it in found for cidr in it.source_cidrs)


def test_a_rule_that_denies_is_widened_and_never_left_out() -> None:
    denies: dict[str, Any] = {"type": "egress", "protocol": "t", "portStart": 25, "destCidrs": ["198.51.100.0/24"]}
    (rule,) = rules_of(denies)
    assert (rule.protocol, rule.ports, rule.dest_cidrs) == ("all", None, ("198.51.100.0/24",))
    (rule,) = rules_of({**denies, "protocol": "all"})
    assert (rule.protocol, rule.ports) == ("all", None)


def test_what_is_not_in_force_is_remembered_until_the_next_list() -> None:
    assigned = play(implement().scope, "021").scope
    scope = apply_rules(assigned, [{**OPEN, "id": 5, "protocol": "t"}, {**OPEN, "id": 6, "publicIp": ""}]).scope
    assert scope.left_out == {
        "apply-fw-rules 204": (
            "rule 5: its protocol is not a whole name of a protocol",
            "rule 6: CloudStack did not find its public address",
        )
    }
    assert apply_rules(scope, [OPEN]).scope.left_out == {}


def apply_rules(scope: Any, rules: list[dict[str, Any]]) -> Any:
    return call(scope, "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": rules})


def rules_of(*rules: dict[str, Any]) -> tuple[FirewallRule, ...]:
    firewall = network(apply_rules(implement().scope, list(rules))).firewall
    assert firewall is not None
    return firewall.rules
