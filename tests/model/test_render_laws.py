"""Laws of the renderer that hold for every scope."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from model.conntrack_entry import Entry
from model.scope_strategies import scopes
from netloom.names import LINK_NAME_MAX
from netloom.netobjects import MAIN_TABLE
from netloom.render import flows, ruleset
from netloom.render.active import active, within
from netloom.render.marks import POLICY, REVOKED
from netloom.render.scope import render
from netloom.render.want import Want
from netloom.state import Firewall, Scope


def _shuffled(scope: Scope, order: Any) -> Scope:
    """The same scope, with other rule ids and as if the commands had come in another order."""
    network = scope.networks["204"]
    firewall = network.firewall
    if firewall is not None:
        rules = list(firewall.rules)
        order.shuffle(rules)
        rules = [replace(it, rule_id=at + 5000) for at, it in enumerate(rules)]
        firewall = Firewall(default_egress_allow=firewall.default_egress_allow, rules=tuple(rules))

    def mixed(table: dict[str, Any]) -> dict[str, Any]:
        items = list(table.items())
        order.shuffle(items)
        return dict(items)

    return replace(
        scope,
        revision=scope.revision + 1,
        networks={"204": replace(network, firewall=firewall)},
        public_ips=mixed(scope.public_ips),
        static_nats=mixed(scope.static_nats),
        port_forwards=mixed(scope.port_forwards),
    )


@given(scopes(), st.randoms(use_true_random=False))
def test_the_same_scope_in_any_order_is_the_same_value_and_text(scope: Scope, order: Any) -> None:
    other = _shuffled(scope, order)
    one, two = render(scope), render(other)
    assert one == two
    assert one.ruleset is not None
    assert two.ruleset is not None
    assert ruleset.fresh(one.ruleset) == ruleset.fresh(two.ruleset)
    assert ruleset.swap(one.ruleset, two.ruleset) == ""
    assert flows.flow_check(scope, other) == "none"


@given(scopes(), scopes())
def test_a_swap_deletes_the_objects_that_are_not_wanted(before: Scope, after: Scope) -> None:
    have, want = render(before).ruleset, render(after).ruleset
    assert have is not None
    assert want is not None
    assert (ruleset.swap(have, want) == "") == (have == want)
    assert (have.marker == want.marker) == (have == want)
    for one, other in ((have, want), (want, have)):
        text = ruleset.swap(one, other)
        deleted = set(re.findall(r"^delete (chain|set|map|counter) inet netloom (\S+)$", text, re.MULTILINE))
        assert deleted >= ruleset.names(one) - ruleset.names(other)


@given(scopes())
def test_defect_46_names_are_unique_and_fit(scope: Scope) -> None:
    want = render(scope)
    assert want.ruleset is not None
    names = [it.name for it in want.ruleset.chains] + [it.name for it in want.ruleset.sets]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z0-9_.]{0,62}", it) for it in names)
    for port in want.ports:
        assert len(port.link) <= LINK_NAME_MAX
        assert len(port.host_link) <= LINK_NAME_MAX
        # Keys of sysctls are written with dots.
        assert "." not in port.link


@given(scopes())
def test_rules_contain_no_interval_set_and_no_map(scope: Scope) -> None:
    """Lookups in those can miss for an instant while the rules are replaced."""
    want = render(scope)
    assert want.ruleset is not None
    for chain in want.ruleset.chains:
        for rule in chain.rules:
            for inner in re.findall(r"(?<!@)\{([^}]*)\}", re.sub(r"(?:add|update) @\w+ \{", "@{", rule)):
                assert "/" not in inner, rule
                assert not re.search(r"\d-\d", inner), rule
                assert ":" not in inner, rule


@given(scopes())
def test_routes_can_be_added_in_their_order_and_each_exit_has_its_table(scope: Scope) -> None:
    want = render(scope)
    own = {it.cidr.partition("/")[0] for it in want.addresses}
    seen: list[tuple[int, str, str]] = []
    for it in want.routes:
        if it.table < 20000 and it.table != MAIN_TABLE:
            # A route of the operator: its link exists, and its gateway is not the device itself.
            assert it.link in {port.link for port in want.ports} or (it.kind != "unicast" and not it.link)
            assert it.via not in own
        elif it.via:
            gateway = ip_address(it.via)
            gateway_subnets = {ip_interface(own.cidr).network for own in want.addresses if own.link == it.link}
            assert (
                gateway.version == 6 and (gateway.is_link_local or any(gateway in subnet for subnet in gateway_subnets))
            ) or any(
                table == it.table and link == it.link and gateway in ip_network(destination)
                for table, link, destination in seen
            )
        assert not it.source or it.source in own
        seen.append((it.table, it.link, it.destination))
    assert len(set(seen)) == len(seen)
    assert {(it.priority, it.table, it.mark, it.mask) for it in want.rules} == {
        (20000 + it.exit, 20000 + it.exit, it.exit, 0xFFFF) for it in scope.public_ips.values()
    } | {(it.priority, it.table, POLICY, POLICY) for it in scope.pbr.rules}


@given(scopes(implemented=False))
def test_a_network_that_is_not_implemented_renders_nothing(scope: Scope) -> None:
    assert render(scope) == Want(namespace="") == render(None)


@given(scopes())
def test_every_forwarded_port_has_one_destination(scope: Scope) -> None:
    now = active(scope)
    seen: dict[tuple[str, str, int], None] = {}
    for it in now.forwarded:
        assert it.forward.public_ports.first <= it.ports.first <= it.ports.last <= it.forward.public_ports.last
        for port in (it.ports.first, it.ports.last):
            overlapping = [
                other
                for other in now.forwarded
                if other is not it
                and (other.forward.public_ip, other.forward.protocol) == (it.forward.public_ip, it.forward.protocol)
                and other.ports.first <= port <= other.ports.last
            ]
            assert not overlapping
            seen[it.forward.public_ip, it.forward.protocol, port] = None
    for forward in now.port_forwards:
        covered = sum(
            min(it.ports.last, forward.public_ports.last) - max(it.ports.first, forward.public_ports.first) + 1
            for it in now.forwarded
            if (it.forward.public_ip, it.forward.protocol) == (forward.public_ip, forward.protocol)
            and it.ports.first <= forward.public_ports.last
            and forward.public_ports.first <= it.ports.last
        )
        assert covered == forward.public_ports.count


hosts = st.sampled_from(
    ("192.0.2.10", "198.51.100.7", "10.1.1.1", "10.1.1.11", "10.1.1.12", "203.0.113.20", "203.0.113.21", "0.0.0.0",
     "198.51.100.20", "255.255.255.255", "10.1.1.255")
)  # fmt: skip
numbers = st.sampled_from((22, 53, 67, 68, 80, 85, 443, 5003, 65535))
hosts6 = st.sampled_from(
    ("2001:db8:50:1::1", "2001:db8:50:1::7", "2001:db8:50:1::8", "2001:db8:99::7", "2001:db8:ffff::1", "fe80::7")
)
marks = st.sampled_from((0, 1, 2, REVOKED, REVOKED | 1))
entries = st.builds(
    Entry, st.sampled_from((1, 6, 17, 47)), hosts, hosts, numbers, numbers, hosts, hosts, numbers, numbers,
    st.sampled_from((-1, 0, 8, 13)), st.sampled_from((-1, 0, 1)), marks,
) | st.builds(
    lambda protocol, src, dst, sport, dport, *more: Entry(
        protocol, src, dst, sport, dport, dst, src, dport, sport, *more
    ),
    st.sampled_from((6, 17, 47, 58)), hosts6, hosts6, numbers, numbers,
    st.sampled_from((-1, 128, 129)), st.sampled_from((-1, 0, 1)), marks,
)  # fmt: skip


@given(scopes(), entries)
def test_an_action_that_was_carried_out_is_not_repeated(scope: Scope, entry: Entry) -> None:
    action = flows.FlowPolicy(scope).action(entry)
    if action == "revoke":
        assert entry.protocol not in (flows.TCP, flows.ICMP, flows.ICMPV6)
        marked = Entry(**{**entry.__dict__, "mark": entry.mark | REVOKED})
        assert flows.FlowPolicy(scope).action(marked) == "keep"


@given(scopes(), scopes(), entries)
def test_flows_that_are_not_checked_would_be_kept(before: Scope, after: Scope, entry: Entry) -> None:
    """Checking no flow, or revoked flows only, never misses a flow that a full check would end."""
    check = flows.flow_check(before, after)
    if check == "all" or flows.FlowPolicy(before).action(entry) != "keep":
        return
    if check == "none" or not entry.mark & REVOKED:
        assert flows.FlowPolicy(after).action(entry) == "keep"


@given(scopes(), entries)
def test_without_a_scope_no_flow_is_kept(scope: Scope, entry: Entry) -> None:
    plain = Entry(**{**entry.__dict__, "mark": 0})
    assert flows.FlowPolicy(None).action(plain) == (
        "delete" if plain.protocol in (flows.TCP, flows.ICMP, flows.ICMPV6) else "revoke"
    )
    assert flows.flow_check(scope, None) == "all"
    assert flows.flow_check(None, scope) == "none"


@given(scopes(), entries)
def test_a_guest_of_a_removed_prefix_does_not_count_as_the_device(scope: Scope, entry: Entry) -> None:
    """IPv6 flows of a removed tier end. They do not go on when the tier comes back with other rules."""
    other = replace(scope.networks["204"], ip6_cidr="2001:db8:50:2::/64", ip6_gateway="2001:db8:50:2::1")
    plain = Entry(**{**entry.__dict__, "mark": 0})
    if within(plain.src, "2001:db8:50:1::/64") or within(plain.dst, "2001:db8:50:1::/64"):
        own = plain.src in ("2001:db8:99::7", "fe80::7")
        assert own or flows.FlowPolicy(replace(scope, networks={"204": other})).action(plain) != "keep"
