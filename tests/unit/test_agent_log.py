"""The agent's log: its file, and the journal if systemd has connected stderr to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

_PROGRAM = """
import sys
from netloom.agent.log import Log
log = Log(sys.argv[1])
for number in range(int(sys.argv[2])):
    log.line(f"line {number}")
log.fatal("not serving", OSError("another agent"))
"""


def write_lines(path: str, count: int, stderr: int, *, journal: bool = False) -> bool:
    """Write lines and the reason of an end by a Log, in a process of its own with this stderr. False: it hangs."""
    environment = {**os.environ, "PYTHONPATH": str(REPO / "internal")}
    environment.pop("JOURNAL_STREAM", None)
    if journal:
        found = os.fstat(stderr)
        environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
    words = [sys.executable, "-c", _PROGRAM, path, str(count)]
    try:
        subprocess.run(words, env=environment, stderr=stderr, timeout=20, check=True)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_lines_go_to_the_file_and_with_their_priority_to_the_journal(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_lines(str(tmp_path / "agent.log"), 2, theirs.fileno(), journal=True)
        assert ours.recv(1 << 16) == b"<6>line 0\n<6>line 1\n<3>not serving: another agent\n"
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "agent.log").read_text().splitlines()]
    assert lines == ["line 0", "line 1", "not serving: another agent"]


def test_without_systemd_only_the_reason_of_an_end_goes_to_stderr(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_lines(str(tmp_path / "agent.log"), 2, theirs.fileno())
        assert ours.recv(1 << 16) == b"netloom agent: another agent\n"


def test_a_detached_agent_writes_each_line_once(tmp_path: Path) -> None:
    """Its stderr is the log file."""
    path = tmp_path / "agent.log"
    with path.open("a") as file:
        write_lines(str(path), 1, file.fileno())
    lines = [line.split(" ", 1)[1] for line in path.read_text().splitlines()]
    assert lines == ["line 0", "not serving: another agent"]


@pytest.mark.mutation("a-hung-journal-does-not-stop-the-agent", instead="0")
def test_a_journal_that_does_not_read_stops_no_writer(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert write_lines(str(tmp_path / "agent.log"), 2000, theirs.fileno(), journal=True)
    assert len((tmp_path / "agent.log").read_text().splitlines()) == 2001
