"""A scope that is as it was left is changed without a look at the host. The kernel is simulated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from msgspec.structs import replace

from netloom.agent.host import converge, settled
from netloom.agent.host.converge import KernelHost
from netloom.agent.host.settled import Settled, change_settled
from netloom.agent.kernel import kept, nft_netlink
from netloom.agent.kernel.namespaces import NamespaceError
from netloom.plan.steps import Step
from netloom.render.scope import render
from unit.scopes import A1, A2, B1, wish

WANT = render(wish(held=(A1, A2)))
SETTLED = Settled(WANT, unexpected=7, generation=40)


class Kernel:
    """Counts transactions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, generation: int = 40) -> None:
        self.generation = generation
        self.did: list[Step] = []
        monkeypatch.setattr(kept, "netfilter", lambda *of: self)
        monkeypatch.setattr(nft_netlink, "generation", lambda socket: self.generation)
        monkeypatch.setattr(settled, "apply", self.apply)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply(self, steps: Iterable[Step]) -> None:
        self.did += steps


def test_a_new_address_takes_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    before = render(wish(held=(A1,)))
    changed = change_settled(replace(SETTLED, want=before), WANT)
    assert changed == (tuple(kernel.did), replace(SETTLED, generation=41))
    assert {type(it).__name__ for it in kernel.did} == {"LoadRuleset", "AddAddress"}


def test_a_namespace_without_its_name_takes_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(namespace: str | None) -> Kernel:
        raise NamespaceError(f"namespace {namespace}")

    kernel = Kernel(monkeypatch)
    monkeypatch.setattr(kept, "netfilter", missing)
    assert change_settled(replace(SETTLED, want=render(wish(held=(A1,)))), WANT) is None
    assert kernel.did == []


def test_nothing_to_do_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    assert change_settled(SETTLED, render(wish(held=(A1, A2)))) == ((), SETTLED)
    assert kernel.did == []


@pytest.mark.mutation("own-transactions-are-no-change", instead="not same")
def test_a_ruleset_that_a_call_changes_meanwhile_was_not_changed_by_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = KernelHost(tmp_path)
    kernel = Kernel(monkeypatch)
    monkeypatch.setattr(converge, "Socket", lambda *of: kernel)
    host._settled["net-204"] = SETTLED
    assert host.changed_rulesets(["net-204", "net-205"]) == []
    kernel.generation = 41
    assert host.changed_rulesets(["net-204", "net-205"]) == ["net-204"]

    def meanwhile(socket: object) -> int:
        host._settled["net-204"] = replace(SETTLED, generation=41)
        return 41

    host._settled["net-204"] = SETTLED
    monkeypatch.setattr(nft_netlink, "generation", meanwhile)
    assert host.changed_rulesets(["net-204"]) == []


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
