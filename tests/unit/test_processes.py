"""Tests can kill processes that have already ended."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

import processes
from ssh import lab


def ended() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_running_process_is_killed() -> None:
    process = subprocess.Popen(["sleep", "60"])
    processes.kill(process.pid)
    assert process.wait() == -signal.SIGKILL


def test_an_ended_process_is_no_error() -> None:
    processes.kill(ended())


def test_a_lab_shuts_down_although_one_of_its_processes_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ip-netns(8) lists may end before the signal is sent."""
    deleted = []

    def run(*argv: str, stdin: str = "") -> str:
        if argv[:3] == ("ip", "netns", "delete"):
            deleted.append(argv[3])
        said = {"list": f"{lab.MANAGEMENT} (id: 1)\nstest-h1\n", "pids": f"{ended()}\n"}
        return said.get(argv[2], "")

    monkeypatch.setattr(lab, "run", run)
    it = lab.SshLab(tmp_path)
    it.down()
    assert sorted(deleted) == ["stest-h1", lab.MANAGEMENT]
    it.h1.halt()
