"""What the host will lack for more networks, for check and show."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloom.agent.host import room


def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, descriptors: int, tasks: int) -> None:
    """A /proc with these numbers, in which at most 1,000 tasks are allowed, for an agent that may open 100 files."""
    (tmp_path / "self/fd").mkdir(parents=True)
    for at in range(descriptors):
        (tmp_path / f"self/fd/{at}").touch()
    (tmp_path / "loadavg").write_text(f"0.01 0.02 0.03 2/{tasks} 4711\n")
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/pid_max").write_text("1000\n")
    (tmp_path / "sys/kernel/threads-max").write_text("5000\n")
    monkeypatch.setattr(room, "PROC", tmp_path)
    monkeypatch.setattr(room, "RUN", tmp_path)
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, 100))


def test_a_host_with_room_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, descriptors=80, tasks=800)
    assert room.scarce() == []


@pytest.mark.mutation("a-scarce-resource-is-named")
def test_resources_that_run_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, descriptors=81, tasks=801)
    assert [it.partition(" are in use")[0] for it in room.scarce()] == [
        "host: 81 of 100 descriptors of the agent",
        "host: 801 of 1000 processes and threads of the host",
    ]


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PROC", tmp_path)
    monkeypatch.setattr(room, "RUN", tmp_path / "missing")
    assert room.scarce() == []
