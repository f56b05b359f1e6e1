"""Tests that kill several processes in a loop allow that killing one process makes another one exit."""

from __future__ import annotations

import ast

import pytest

from repo.files import ROOT

TESTS = ROOT / "tests"


def bare_kills(source: str) -> list[int]:
    """The lines in ``for`` loops that kill a process with os.kill instead of ``processes.kill``."""
    return [
        call.lineno
        for loop in ast.walk(ast.parse(source))
        if isinstance(loop, ast.For)
        for call in ast.walk(loop)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("os.kill", "os.killpg")
        and ast.unparse(call.args[1]) in ("signal.SIGKILL", "signal.SIGTERM", "9", "15")
        # A loop over rounds may kill one process that the test has just looked up.
        and isinstance(loop.target, ast.Name)
        and ast.unparse(call.args[0]) in (loop.target.id, f"int({loop.target.id})")
    ]


@pytest.mark.parametrize("number", ["signal.SIGKILL", "9"])
def test_a_bare_kill_in_a_loop_is_found(number: str) -> None:
    assert bare_kills(f"for pid in pids:\n    os.kill(int(pid), {number})\n") == [2]
    assert bare_kills(f"for turn in range(3):\n    os.kill(pid, {number})\n") == []
    assert bare_kills(f"for pid in pids:\n    processes.kill(int(pid), {number})\n") == []


def test_loops_use_processes_kill() -> None:
    found = {str(path.relative_to(TESTS)): bare_kills(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}
