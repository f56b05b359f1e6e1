"""The replacement of a build on a disk that fails: the former build is in use afterwards, and its agent runs."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from netloom.agent.setup import install
from netloom.errors import HostRefused
from netloom.files import replace_bytes
from unit.failing_flush import FailingFlush

OLD, NEW = "1.0-1-a", "1.0-2-b"


class Builds:
    """Two builds in a directory of the test, of which the older one is in use; ``did`` has what happened."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.libexec = root / "libexec"
        self.scopes = root / "state" / "scopes"
        for build in (OLD, NEW):
            (self.libexec / build).mkdir(parents=True)
            (self.libexec / build / install.PROGRAM).touch()
        self.scopes.mkdir(parents=True)
        (self.scopes / "net-204.json").write_text("present")
        patch.setattr(install, "LIBEXEC", self.libexec)
        patch.setattr(install, "STATE", root / "state")
        patch.setattr(install, "SCOPES", self.scopes)
        patch.setattr(install, "PREVIOUS_STATES", root / "state" / "previous")
        patch.setattr(install, "REPLACED_STATES", root / "state" / "undone")
        patch.setattr(install, "locked", contextlib.nullcontext)
        patch.setattr(install, "start_lock", contextlib.nullcontext)
        patch.setattr(install, "stop", lambda: self.did.append("stop"))
        patch.setattr(install, "_start", lambda: self.did.append(f"start {install.current()}"))
        patch.setattr(install, "_wait_for", lambda build: self.did[-1] == f"start {build}")
        install.set_link("current", OLD)

    def switch(self) -> None:
        """What ``activate`` does for a newer build."""
        install.switch(OLD, NEW, lambda: install.save_states(OLD), install.undo_save_states)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(tmp_path, monkeypatch)


@pytest.mark.mutation("an-agent-runs-after-a-failed-switch")
def test_an_upgrade_that_cannot_be_flushed_leaves_the_former_build_in_use(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        FailingFlush(patch)
        with pytest.raises(HostRefused, match=f"{NEW} cannot be put in use, {OLD} serves again: .*Input/output error"):
            builds.switch()
    assert (install.current(), builds.did) == (OLD, ["stop", f"start {OLD}"])
    builds.switch()
    assert (install.current(), install.previous(), builds.did[-1]) == (NEW, OLD, f"start {NEW}")


@pytest.mark.mutation("an-unflushed-link-is-put-back")
def test_a_link_that_cannot_be_flushed_leads_where_it_led(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        FailingFlush(patch)
        for name in ("current", "previous"):
            with pytest.raises(OSError, match="Input/output error"):
                install.set_link(name, NEW)
    assert install.current() == OLD
    assert not (builds.libexec / "previous").is_symlink()


def test_states_of_an_earlier_upgrade_are_not_restored(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The present states could not be saved, so the saved ones are older than what the networks are now."""
    kept = builds.scopes.parent / "previous" / "scopes"
    kept.mkdir(parents=True)
    (kept / "net-204.json").write_text("older")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(HostRefused, match="No space left on device"):
        builds.switch()
    assert (builds.scopes / "net-204.json").read_text() == "present"


@pytest.mark.parametrize("failing", ["the record", "a state file", "the link"])
def test_a_rollback_that_fails_changes_nothing(failing: str, builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.switch()
    builds.did.clear()
    for number in (204, 205):
        (builds.scopes / f"net-{number}.json").write_text("of the new build")
    (builds.scopes.parent / "previous" / "scopes" / "net-205.json").write_text("of the old build")

    def failed(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "the record":
            patch.setattr(install, "replace_text", failed)
        elif failing == "a state file":
            real, calls = replace_bytes, [0]

            def second(path: Path, data: bytes) -> None:
                calls[0] += 1
                if calls[0] == 2:
                    failed()
                real(path, data)

            patch.setattr(install, "replace_bytes", second)
        else:
            patch.setattr(install, "set_link", failed)
        with pytest.raises(HostRefused, match="Input/output error"):
            install.rollback(keep_state=False)
    assert (install.current(), install.previous(), install.held()) == (NEW, OLD, "")
    assert {it.read_text() for it in builds.scopes.iterdir()} == {"of the new build"}
    assert builds.did in ([], ["stop", f"start {NEW}"])
    install.rollback(keep_state=False)
    assert (install.current(), install.held()) == (OLD, NEW)
    assert (builds.scopes / "net-205.json").read_text() == "of the old build"
