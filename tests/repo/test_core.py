"""The core has no input or output and no late imports. Import contracts check modules; this checks built-in names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from repo.files import ROOT

NETLOOM = ROOT / "internal" / "netloom"
CORE = sorted(
    [
        path
        for stage in ("protocol", "commands", "state", "render", "plan", "standby")
        for path in (NETLOOM / stage).rglob("*.py")
    ]
    + [NETLOOM / name for name in ("wire.py", "claimwire.py", "names.py", "errors.py", "secret.py", "netobjects.py")]
    + [NETLOOM / name for name in ("standbywire.py", "heartbeatwire.py", "pairwire.py", "ethernet.py")]
)
FORBIDDEN = {"open", "print", "input", "exec", "eval", "compile", "breakpoint", "__import__", "globals"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(NETLOOM)))
def test_the_core_has_no_io_and_no_late_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names & FORBIDDEN == set()
    late = [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert late == []
