"""Laws of a VPC and its two tiers, checked on random sequences of all commands that concern them."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from model.calls import Call, carry_out, content, some, text
from model.conntrack_entry import Entry
from model.vpc_calls import (
    ACLS,
    ADDRESSES,
    BALANCED,
    FORWARDS,
    GUESTS,
    IN_TIER,
    TIERS,
    VPC,
    WHOLE,
    balanced,
)
from netloom.commands import Context
from netloom.render import flows
from netloom.render.scope import render
from netloom.state import Scope
from netloom.wire import Registration

OURS = Context(scope_id="vpc-7", registration=Registration(owner="zone-a"))


begins = some(["implement-vpc"], [VPC, *WHOLE]) | some(
    ["implement-network"], [{**tier, "extension_ip": tier["gateway"]} for tier in TIERS]
)
of_a_tier = st.one_of(
    some(["assign-ip", "assign-ip", "release-ip"], IN_TIER),
    some(["add-static-nat", "add-static-nat", "delete-static-nat"], GUESTS),
    some(["add-port-forward", "add-port-forward", "delete-port-forward"], FORWARDS),
    some(["apply-lb-rules"], BALANCED),
    some(["apply-network-acl"], ACLS),
)
tier_ends = some(["shutdown-network", "destroy-network"], [{**it, "network_state": "shutdown"} for it in TIERS])
vpc_ends = some(["shutdown-vpc", "destroy-vpc"], [VPC])
changes = begins | of_a_tier | of_a_tier | some(["update-vpc-source-nat-ip"], WHOLE)
calls = changes | tier_ends | vpc_ends
walks = st.builds(
    lambda one, begun, two, end, three: [*one, *begun, *two, *end, *three],
    st.lists(changes, max_size=4),
    some(["implement-vpc"], [VPC, *WHOLE]).flatmap(
        lambda vpc: st.permutations([vpc, *(("implement-network", tier) for tier in TIERS)])
    ),
    st.lists(changes, max_size=15),
    st.lists(tier_ends, max_size=1),
    st.lists(changes, max_size=6),
)


def walked(walk: list[Call]) -> Scope | None:
    scope: Scope | None = None
    for call in walk:
        scope = carry_out(scope, call, OURS)
    return scope


def source(scope: Scope | None) -> set[str]:
    return {key for key, it in scope.public_ips.items() if it.source_nat} if scope else set()


def inward(scope: Scope) -> set[str]:
    """The addresses of static NATs and port forwards."""
    return {*scope.static_nats, *(it.public_ip for it in scope.port_forwards.values())}


def of(scope: Scope, network_id: str) -> tuple[object, ...]:
    """Everything that belongs to one tier."""
    return (
        scope.networks.get(network_id),
        {key: it for key, it in scope.static_nats.items() if it.network_id == network_id},
        {key: it for key, it in scope.port_forwards.items() if it.network_id == network_id},
        {key: it for key, it in scope.lb_rules.items() if it.network_id == network_id},
    )


@given(walks, calls)
def test_every_call_is_idempotent(walk: list[Call], call: Call) -> None:
    once = carry_out(walked(walk), call, OURS)
    assert carry_out(once, call, OURS) == once


@given(walks)
def test_translated_addresses_are_assigned_and_at_most_one_is_source_nat(walk: list[Call]) -> None:
    scope: Scope | None = None
    for call in walk:
        scope = carry_out(scope, call, OURS)
        if scope is None:
            continue
        assert len(source(scope)) <= 1
        assert inward(scope) <= scope.public_ips.keys()
        assert all(it.network_id in scope.networks for it in scope.static_nats.values())
        assert all(it.network_id in scope.networks for it in scope.port_forwards.values())
        assert all(it.network_id in scope.networks for it in scope.lb_rules.values())
        render(scope)


@given(walks, st.sampled_from(WHOLE))
def test_changing_the_source_nat_address_changes_nothing_else(walk: list[Call], asked: dict[str, Any]) -> None:
    before = walked(walk)
    after = carry_out(before, ("update-vpc-source-nat-ip", asked), OURS)
    assert after is not None
    assert source(after) == {asked["public_ip"]}
    assert before is not None
    assert [of(after, it["network_id"]) for it in TIERS] == [of(before, it["network_id"]) for it in TIERS]
    former = {it for it in source(before) if it not in used(after)} - {asked["public_ip"]}
    assert after.public_ips.keys() == (before.public_ips.keys() | {asked["public_ip"]}) - former


@given(walks)
def test_an_address_that_belongs_to_no_tier_is_the_source_nat_address_or_has_a_rule(walk: list[Call]) -> None:
    scope = walked(walk)
    for address, it in scope.public_ips.items() if scope else ():
        assert it.source_nat or it.network_id or address in used(scope)


def used(scope: Scope | None) -> set[str]:
    """The public addresses that a rule uses."""
    if scope is None:
        return set()
    uses = [*scope.static_nats, *(it.public_ip for it in scope.port_forwards.values())]
    uses += [it.public_ip for it in scope.lb_rules.values()]
    firewalls = [it.firewall for it in scope.networks.values() if it.firewall is not None]
    return {*uses, *(rule.public_ip for it in firewalls for rule in it.rules if rule.public_ip)}


@given(walks, some(["release-ip"], IN_TIER) | of_a_tier | tier_ends)
def test_no_tier_call_removes_the_vpcs_source_nat_address(walk: list[Call], call: Call) -> None:
    """Only assign-ip sets whether an address is the source-NAT address."""
    before = walked(walk)
    after = carry_out(before, call, OURS)
    assert after is not None
    if call[0] != "assign-ip":
        assert source(after) == source(before)
    elif call[1]["source_nat"] == "true":
        assert source(after) == {call[1]["public_ip"]}


@example(
    [
        *(("implement-vpc", VPC), ("implement-network", TIERS[0]), ("implement-network", TIERS[1])),
        ("add-port-forward", FORWARDS[0]),
        ("add-port-forward", {**FORWARDS[0], **TIERS[1], "private_ip": "10.20.2.45", "public_port": "80"}),
    ],
    ("release-ip", IN_TIER[0]),
)
@given(walks, tier_ends | some(["release-ip"], IN_TIER))
def test_removals_in_a_tier_leave_the_other_tier_unchanged(walk: list[Call], call: Call) -> None:
    before = walked(walk)
    assert before is not None
    after = carry_out(before, call, OURS)
    other = next(it["network_id"] for it in TIERS if it["network_id"] != call[1]["network_id"])
    if after is None:
        assert other not in before.networks
        return
    assert of(after, other) == of(before, other)
    assert inward(after) <= after.public_ips.keys()
    if call[0] != "release-ip":
        assert of(after, call[1]["network_id"]) == (None, {}, {}, {})
        event(f"{len(before.public_ips) - len(after.public_ips)} addresses gone")


@given(walks)
def test_implementing_a_vpc_again_changes_nothing(walk: list[Call]) -> None:
    """A restart with cleanup sends implement-vpc without implementing the tiers again."""
    before = walked(walk)
    assert content(carry_out(before, ("implement-vpc", VPC), OURS)) == content(before)


@given(walks, vpc_ends)
def test_shutdown_and_destroy_of_a_vpc_leave_no_state(walk: list[Call], end: Call) -> None:
    assert carry_out(walked(walk), end, OURS) is None
    assert carry_out(None, end, OURS) is None


HOSTS = ("192.0.2.10", "10.20.1.45", "10.20.1.46", "10.20.2.45", "10.20.1.1", *ADDRESSES)
FLOWS = [
    Entry(protocol, src, dst, sport, dport, "", "", 0, sport, icmp_type, icmp_code, 0)
    for (protocol, sport, dport, icmp_type, icmp_code), src, dst in product(
        [(6, 40000, 22, -1, -1), (6, 40000, 81, -1, -1), (17, 40000, 81, -1, -1), (1, 0, 0, 8, 0)], HOSTS, HOSTS
    )
    if src != dst
]


# The tier's ACL allows one of the two backend ports.
@example(
    [
        ("implement-vpc", WHOLE[0]),
        ("implement-network", TIERS[0]),
        ("apply-network-acl", ACLS[2]),
        ("apply-lb-rules", balanced(GUESTS[0], 80)),
    ],
    [("apply-lb-rules", balanced(GUESTS[0], 8080))],
)
@settings(max_examples=200)
@given(walks, st.lists(calls | some(["apply-lb-rules"], BALANCED), min_size=1, max_size=4))
def test_every_change_that_can_break_a_flow_is_checked(walk: list[Call], more: list[Call]) -> None:
    """If a change does not lead to a check of all flows, every flow keeps its verdict, on every path it can take."""
    before = walked(walk)
    for call in more:
        after = carry_out(before, call, OURS)
        if flows.flow_check(before, after) != "all":
            was, now = flows.FlowPolicy(before), flows.FlowPolicy(after)
            for flow in FLOWS:
                for reply in was._allowed(flow):
                    taken = dataclasses.replace(
                        flow,
                        reply_src=reply.reply_src,
                        reply_sport=reply.reply_sport if flow.sport else 0,
                        reply_dst=reply.reply_dst,
                        mark=reply.exit or 0,
                    )
                    assert was.action(taken) == now.action(taken) == "keep", call
        before = after


@given(walks)
def test_commands_never_mutate_their_input(walk: list[Call]) -> None:
    scope: Scope | None = None
    for call in walk:
        before, was = scope, text(scope)
        scope = carry_out(scope, call, OURS)
        assert text(before) == was
