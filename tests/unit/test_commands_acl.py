"""apply-network-acl: the items of CloudStack's list as items of the state."""

from __future__ import annotations

from typing import Any

import pytest

from netloom.commands import Context, apply, check_payload
from netloom.state import AclItem, Ports, Scope
from unit.payload_player import OURS, play

ITEM = {"number": 5, "action": "allow", "trafficType": "ingress", "protocol": "tcp", "sourceCidrs": ["0.0.0.0/0"]}


def tier(*rules: dict[str, Any]) -> Scope:
    scope = play(play(None, "203").scope, "210").scope
    assert scope is not None
    (network_id,) = scope.networks
    fields = {"vpc_id": "7", "network_id": network_id, "acl_rules": list(rules)}
    context = Context(scope_id=scope.scope_id, registration=OURS)
    after = apply("apply-network-acl", scope, check_payload("apply-network-acl", fields), context).scope
    assert after is not None
    return after


def items(*rules: dict[str, Any]) -> tuple[AclItem, ...]:
    (network,) = tier(*rules).networks.values()
    assert network.acl is not None
    return network.acl


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        ({"portStart": 0, "portEnd": 65535}, [("tcp", None)]),
        ({"protocol": "0"}, [("all", None)]),
        ({"protocol": "0047"}, [("47", None)]),
        ({"protocol": "132", "portStart": 1, "portEnd": 2}, [("132", Ports(1, 2))]),
        ({"protocol": "47", "portStart": 1, "portEnd": 2}, [("47", None)]),
        ({"protocol": "1", "portStart": 1, "portEnd": 2}, [("icmp", None)]),
        ({"protocol": "tcp,udp", "portStart": 53, "portEnd": 53}, [("tcp", Ports(53, 53)), ("udp", Ports(53, 53))]),
        ({"protocol": "icmp", "icmpType": 256}, []),
        ({"protocol": "t"}, []),
        ({"protocol": "t", "action": "deny"}, [("all", None)]),
        ({"number": -1, "sourceCidrs": ["10.0.0.0/08", "10.0.0.0/8/"]}, [("tcp", None)]),
    ],
)
def test_what_cloudstack_stores_is_carried_out(rule: dict[str, Any], stored: list[tuple[str, Ports | None]]) -> None:
    others = {**ITEM, "number": 9, "portStart": 22, "portEnd": 22}
    found = items({**ITEM, **rule}, others)
    assert [(it.protocol, it.ports) for it in found[:-1]] == stored
    assert found[-1].ports == Ports(22, 22)


def test_an_item_that_is_not_in_force_is_remembered() -> None:
    scope = tier({**ITEM, "protocol": "t"})
    (reasons,) = scope.left_out.values()
    assert reasons == ("item 5: its protocol is not a whole name of a protocol",)
