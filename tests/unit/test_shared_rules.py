"""Networks share the text of the rules that are the same for all."""

from __future__ import annotations

import pytest

from netloom.render.ruleset import Chain, NftSet

RULES = 2


def _chain(name: str, rules: int) -> Chain:
    return Chain(name=name, rules=tuple(f"tcp dport {1000 + at} accept" for at in range(rules)))


@pytest.mark.mutation("rules-are-shared")
def test_the_rules_of_two_chains_are_the_same_text_in_memory() -> None:
    one, other = _chain("one", RULES), _chain("other", RULES)
    assert one.rules == other.rules == tuple(f"tcp dport {1000 + at} accept" for at in range(RULES))
    assert [id(it) for it in one.rules] == [id(it) for it in other.rules]


def test_a_long_list_of_rules_is_used_as_it_is() -> None:
    """Its rules are those of one tenant, and there may be ten thousand."""
    rules = tuple(f"tcp dport {at} accept" for at in range(10_000))
    assert Chain(name="long", rules=rules).rules is rules


def test_the_names_and_types_of_sets_are_the_same_text_in_memory() -> None:
    one, other = (NftSet(name="".join(["kno", "wn4"]), kind="set", type="".join(["ipv4", "_addr"])) for _ in range(2))
    assert (id(one.name), id(one.type)) == (id(other.name), id(other.type))
