"""A rollback puts the state files of the earlier time back, except those of scopes that were moved since then."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from netloom.agent.scopes.placements import placed
from netloom.agent.scopes.store import Store
from netloom.agent.setup import install
from netloom.state import Gate, Placement, Scope

THEN = Scope(scope_id="net-204", owner="then")


def put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: bytes, then: bytes) -> tuple[bytes, list[str]]:
    """The content of the state file after the rollback, and the ids of the changed scopes."""
    scopes, kept = tmp_path / "scopes", tmp_path / "kept"
    scopes.mkdir()
    kept.mkdir()
    monkeypatch.setattr(install, "SCOPES", scopes)
    (scopes / "net-204.json").write_bytes(now)
    (kept / "net-204.json").write_bytes(then)
    changed = install._restore_states(kept, tmp_path / "aside")
    return (scopes / "net-204.json").read_bytes(), changed


@pytest.mark.mutation("a-rollback-undoes-no-move")
@pytest.mark.parametrize(("epoch", "gate"), [(1, "open"), (0, "closed"), (0, "passive"), (2, "incoming")])
def test_a_scope_that_was_moved_keeps_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, gate: Gate
) -> None:
    now = Store.encoded(placed(THEN, Placement(epoch=epoch, gate=gate)))
    assert put_back(tmp_path, monkeypatch, now, Store.encoded(THEN)) == (now, [])


def test_a_state_of_a_build_that_knew_no_moves_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = msgspec.json.encode({"schema": 1, "scope_id": "net-204", "owner": "then"})
    now = Store.encoded(msgspec.structs.replace(THEN, revision=7))
    assert put_back(tmp_path, monkeypatch, now, older) == (older, ["net-204"])


@pytest.mark.parametrize("now", [b"", b"{", b'{"placement": 7}'])
def test_a_state_that_cannot_be_read_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: bytes) -> None:
    then = Store.encoded(THEN)
    assert put_back(tmp_path, monkeypatch, now, then) == (then, ["net-204"])
