"""Policy routing in the ruleset: exits and source addresses of policy-routed traffic, tested with packets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, STRANGER, VMS, Lab, Try, echoes
from netloom.state import Pbr, PbrRoute, PbrRule, Scope
from unit.scopes import A1, A2, B1, C1, VM1, VM2, VM3, admit, egress, forward, static, wish

ANYWHERE = "0.0.0.0/0"
BY_B = PbrRoute(table=100, destination=ANYWHERE, via="198.51.100.1", link="pub-102")
BY_C = PbrRoute(table=101, destination=ANYWHERE, via="198.151.100.1", link="pub-101")
NOWHERE = PbrRoute(table=102, destination=f"{STRANGER}/32", kind="blackhole")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        for port in (22, 80):
            lab.serve("inet", "tcp", port, STRANGER)
            lab.serve("inet", "tcp", port, CLIENT)
            for vm in VMS:
                lab.serve(vm, "tcp", port)
        for port in (53, 5000):
            lab.serve("inet", "udp", port, STRANGER)
        yield lab


def with_policy(scope: Scope, *routes: PbrRoute, **rules: tuple[int, dict[str, str]]) -> Scope:
    made = tuple(PbrRule(priority=10000 + at, table=table, **which) for at, (table, which) in enumerate(rules.values()))
    return replace(scope, pbr=Pbr(routes=routes, rules=made))


def left_as(lab: Lab, vm: str, target: str = STRANGER, protocol: str = "tcp", port: int = 80) -> str:
    """The source address of a guest's connection as the server sees it."""
    (answer,) = lab.answered(Try(vm, protocol, target, port))
    return answer.split()[1].partition(":")[0]


@pytest.mark.mutation("a-chosen-exit-has-its-source")
def test_a_destination_rule_uses_another_exit_and_its_address(lab: Lab) -> None:
    base = wish(held=(A1, B1))
    lab.renew(base)
    assert left_as(lab, "vm1") == A1.address
    lab.renew(with_policy(base, BY_B, to=(100, {"destination": f"{STRANGER}/32"})))
    assert left_as(lab, "vm1") == B1.address
    assert left_as(lab, "vm1", protocol="udp", port=53) == B1.address
    assert left_as(lab, "vm1", CLIENT) == A1.address
    lab.apply(base)
    assert left_as(lab, "vm1") == A1.address


def test_a_source_rule_uses_another_gateway_of_the_same_vlan(lab: Lab) -> None:
    scope = wish(held=(A1, A2, B1, C1), static=[static(A2, VM2), static(B1, VM3)])
    rules = {"one": (101, {"source": f"{VM1}/32"}), "two": (101, {"source": f"{VM3}/32", "iif": "gst-204"})}
    lab.renew(with_policy(scope, BY_C, **rules))
    assert left_as(lab, "vm1") == C1.address
    # vm3 has static NAT on another exit, whose address this gateway would drop.
    assert left_as(lab, "vm3") == C1.address
    assert left_as(lab, "vm2") == A2.address
    # A static NAT address is used when the route uses its exit.
    lab.renew(with_policy(scope, BY_B, all=(100, {})))
    assert [left_as(lab, it) for it in VMS] == [B1.address, B1.address, B1.address]
    lab.renew(with_policy(scope, replace(BY_B, via="203.0.113.1", link="pub-101"), all=(100, {})))
    assert [left_as(lab, it) for it in VMS] == [A1.address, A2.address, A1.address]


@pytest.mark.mutation("replies-ask-no-policy", instead='f"{outward} meta mark set meta mark | {POLICY:#010x}"')
def test_replies_use_the_exit_of_the_request_under_any_policy(lab: Lab) -> None:
    base = wish(
        admit(A1, "tcp", "22"), admit(B1, "all"), held=(A1, B1), forwards=[forward(A1, "22", VM1)],
        static=[static(B1, VM2)],
    )  # fmt: skip
    lab.renew(base)
    before = lab.connect("inet", A1.address, 22, CLIENT)
    nowhere = replace(NOWHERE, destination=ANYWHERE)
    for route in (BY_B, nowhere):
        lab.apply(with_policy(base, route, all=(route.table, {})))
        lab.answered(
            Try("inet", "tcp", A1.address, 22, CLIENT), Try("inet", "tcp", B1.address, 22, CLIENT),
            Try("inet", "icmp", B1.address, source=CLIENT), Try("vm2", "icmp", "10.1.1.1"), Try("vm2", "icmp", VM1),
        )  # fmt: skip
        assert echoes(before)
    lab.silent(Try("vm1", "tcp", STRANGER, 80), Try("vm2", "tcp", STRANGER, 80))
    before.close()


def test_blackhole_drops_silently_and_unreachable_sends_an_error(lab: Lab) -> None:
    base = wish(held=(A1, B1), static=[static(B1, VM2)])
    rule = {"to": (102, {"destination": f"{STRANGER}/32"})}
    lab.renew(base)
    open_one = lab.connect("vm1", STRANGER, 80)
    lab.apply(with_policy(base, NOWHERE, **rule))
    lab.silent(Try("vm1", "tcp", STRANGER, 80), Try("vm2", "tcp", STRANGER, 80), Try("vm1", "udp", STRANGER, 53))
    assert not echoes(open_one, 0.3)
    lab.answered(Try("vm1", "tcp", CLIENT, 80), Try("vm2", "tcp", CLIENT, 80))
    lab.apply(with_policy(base, replace(NOWHERE, kind="unreachable"), **rule))
    assert lab.ask([Try("vm1", "tcp", STRANGER, 80)])[0].startswith("error")
    open_one.close()


def test_the_firewall_applies_to_policy_routed_traffic(lab: Lab) -> None:
    base = wish(egress("tcp", "80"), admit(B1, "tcp", "22"), held=(A1, B1), forwards=[forward(B1, "80", VM3)])
    lab.renew(with_policy(base, BY_B, all=(100, {})))
    lab.silent(Try("vm1", "tcp", STRANGER, 80), Try("inet", "tcp", B1.address, 80, CLIENT))
    assert left_as(lab, "vm1", port=22) == B1.address


def test_removing_a_route_ends_only_the_flows_that_used_it(lab: Lab) -> None:
    base = wish(held=(A1, B1, C1))
    both = with_policy(base, BY_B, BY_C, one=(100, {"source": f"{VM1}/32"}), two=(101, {"source": f"{VM2}/32"}))
    lab.renew(both)
    by_b, by_c, plain = (lab.connect(vm, STRANGER, 80) for vm in VMS)
    assert all(map(echoes, (by_b, by_c, plain)))
    lab.apply(with_policy(base, BY_C, two=(101, {"source": f"{VM2}/32"})))
    assert not echoes(by_b, 0.3)
    assert echoes(by_c)
    assert echoes(plain)
    assert B1.address not in {it.reply_dst for it in lab.entries()}
    for it in (by_b, by_c, plain):
        it.close()
