"""A scope that is as it was left is changed without a look at the host. The kernel is simulated."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from netloom.agent.host import settled
from netloom.agent.host.settled import Settled, change_settled
from netloom.plan.steps import LoadRuleset, Step
from netloom.render.scope import render
from unit.scopes import A1, A2, B1, wish

WANT = render(wish(held=(A1, A2)))
SETTLED = Settled(WANT, unexpected=7, generation=40)


class Kernel:
    """Counts transactions. ``others``: how many somebody else makes while ours is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, generation: int = 40, others: int = 0) -> None:
        self.generation = generation
        self.others = others
        self.did: list[Step] = []
        monkeypatch.setattr(settled, "Socket", lambda *of: self)
        monkeypatch.setattr(settled.nft_netlink, "generation", lambda socket: self.generation)
        monkeypatch.setattr(settled, "apply", self.apply)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply(self, steps: Iterable[Step]) -> None:
        self.did += steps
        self.generation += sum(isinstance(it, LoadRuleset) for it in self.did) + self.others


def test_a_new_address_takes_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    before = render(wish(held=(A1,)))
    changed = change_settled(replace(SETTLED, want=before), WANT)
    assert changed is not None
    assert list(changed.steps) == kernel.did
    assert {type(it).__name__ for it in changed.steps} == {"LoadRuleset", "AddAddress"}
    assert changed.settled == replace(SETTLED, generation=41)


def test_nothing_to_do_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    changed = change_settled(SETTLED, render(wish(held=(A1, A2))))
    assert changed is not None
    assert (changed.steps, changed.settled, kernel.did) == ((), SETTLED, [])


@pytest.mark.parametrize("held", [(A1,), (A1, A2, B1), (B1,)])
def test_what_has_further_effects_takes_a_look(monkeypatch: pytest.MonkeyPatch, held: tuple[object, ...]) -> None:
    kernel = Kernel(monkeypatch)
    assert change_settled(SETTLED, render(wish(held=held))) is None  # type: ignore[arg-type]
    assert kernel.did == []


@pytest.mark.mutation("a-changed-table-is-looked-at")
def test_a_ruleset_that_somebody_has_changed_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, generation=41)
    assert change_settled(replace(SETTLED, want=render(wish(held=(A1,)))), WANT) is None
    assert kernel.did == []


@pytest.mark.mutation("a-table-that-changes-meanwhile-is-looked-at")
def test_a_ruleset_that_somebody_changes_meanwhile_is_looked_at_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, others=1)
    changed = change_settled(replace(SETTLED, want=render(wish(held=(A1,)))), WANT)
    assert changed is not None
    assert changed.settled is None
