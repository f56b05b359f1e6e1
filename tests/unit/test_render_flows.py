"""Which open flows must be checked after a change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.render.flows import FlowCheck, flow_check, lacks
from netloom.state import Outside6, Scope
from unit.scopes import A1, A2, B1, CIDR, VM1, VM2, VM3, admit, egress, forward, network, static, wish

PLAIN = wish(admit(A1, "tcp", "22"), held=(A1, A2), forwards=[forward(A1, "22", VM1)])
OPEN = wish(firewall=False)
DOWN = replace(PLAIN, networks={"204": replace(network(), implemented=False)})
SIX = replace(
    PLAIN,
    networks={
        "204": replace(PLAIN.networks["204"], ip6_cidr="2001:db8:50:1::/64", ip6_gateway="2001:db8:50:1::1"),
    },
)
OUTSIDE = replace(SIX, outside6=Outside6(gateway="2001:db8:99::1", address="2001:db8:99::7/64"))

ROWS: dict[str, tuple[Scope | None, Scope | None, FlowCheck]] = {
    "no change": (PLAIN, PLAIN, "none"),
    "the first implement": (None, PLAIN, "none"),
    "from inactive to active": (DOWN, PLAIN, "none"),
    "the scope is deleted": (PLAIN, None, "all"),
    "shut down": (PLAIN, DOWN, "all"),
    "revision and rule ids": (PLAIN, replace(wish(admit(A2, "udp", "1"), admit(A1, "tcp", "22"), held=(A1, A2),
                                             forwards=[forward(A1, "22", VM1)]), revision=9), "revoked_only"),
    "another VLAN": (PLAIN, replace(PLAIN, networks={"204": replace(PLAIN.networks["204"], vlan="9")}), "none"),
    "another subnet": (PLAIN, replace(PLAIN, networks={"204": replace(network(), cidr="10.2.0.0/16")}), "all"),
    "one address more": (wish(held=(A1,)), wish(held=(A1, A2)), "all"),
    "one address less": (wish(held=(A1, A2)), wish(held=(A1,)), "all"),
    "an address through another exit": (wish(held=(A1, B1)), wish(held=(A1, replace(B1, exit=3))), "all"),
    "the first source NAT": (wish(held=(replace(A1, source_nat=False), A2)), wish(held=(A1, A2)), "revoked_only"),
    "another source NAT": (wish(held=(A1, A2)),
                           wish(held=(replace(A1, source_nat=False), replace(A2, source_nat=True))), "all"),
    "one forward more": (wish(held=(A1,)), wish(forwards=[forward(A1, "1", VM1)]), "revoked_only"),
    "one UDP forward more": (wish(), wish(forwards=[forward(A1, "1", VM1, protocol="udp")]), "all"),
    "a forward moved": (wish(forwards=[forward(A1, "1", VM1)]), wish(forwards=[forward(A1, "1", VM2)]), "all"),
    "a static translation": (wish(held=(A1, A2)), wish(held=(A1, A2), static=[static(A2, VM3)]), "all"),
    "one ingress rule less": (wish(admit(A1, "tcp", "1")), wish(), "all"),
    "an ingress rule narrower": (wish(admit(A1, "tcp", "1")), wish(admit(A1, "tcp", "1", "10.0.0.0/8")), "all"),
    "ingress opened": (wish(admit(A1, "tcp", "1")), wish(ingress_open=True), "revoked_only"),
    "rules under open ingress": (wish(admit(A1, "tcp", "1"), ingress_open=True), wish(ingress_open=True), "none"),
    "ingress closed": (wish(ingress_open=True), wish(), "all"),
    "the first list, which denies nothing": (OPEN, wish(allow_egress=True), "none"),
    "the first list, which denies": (OPEN, wish(egress("tcp", "25"), allow_egress=True), "all"),
    "the first list, closed by default": (OPEN, wish(egress("all"), allow_egress=False), "all"),
    "one denial less": (wish(egress("tcp", "25")), wish(), "revoked_only"),
    "one denial more": (wish(), wish(egress("tcp", "25", sources=(CIDR,))), "all"),
    "one allowance more": (wish(allow_egress=False), wish(egress("all"), allow_egress=False), "revoked_only"),
    "one allowance less": (wish(egress("all"), allow_egress=False), wish(allow_egress=False), "all"),
    "IPv6 is added": (PLAIN, SIX, "all"),
    "IPv6 is removed": (SIX, PLAIN, "all"),
    "IPv6 gets a default route": (SIX, OUTSIDE, "revoked_only"),
    "IPv6 loses its default route": (OUTSIDE, SIX, "all"),
    "egress opened": (wish(egress("all"), allow_egress=False), wish(allow_egress=True), "revoked_only"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_flow_check(row: str) -> None:
    before, after, expected = ROWS[row]
    assert flow_check(before, after) == expected


@pytest.mark.parametrize("row", ROWS)
def test_flow_check_of_states_that_share_nothing(row: str) -> None:
    """Most objects of two states are the same in both, and are not compared then. The result is the same."""
    before, after, expected = ROWS[row]
    assert flow_check(copied(before), copied(after)) == expected


def copied(scope: Scope | None) -> Scope | None:
    """The state as it is after a restart of the agent."""
    return None if scope is None else msgspec.json.decode(msgspec.json.encode(scope), type=Scope)


VALUES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)))


@given(VALUES, VALUES, st.booleans())
def test_what_a_collection_lacks(these: list[tuple[int, int]], others: list[tuple[int, int]], alike: bool) -> None:
    # The same object, an equal one, or one that is equal but for its first field.
    others = [*others, *these[::2], *((a, b) for a, b in these[1::3])]
    if alike:
        assert lacks(these, others, lambda it: it[1]) == (not {b for _, b in others} <= {b for _, b in these})
    else:
        assert lacks(these, others) == (not set(others) <= set(these))
