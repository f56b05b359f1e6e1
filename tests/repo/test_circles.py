"""No module of the program imports itself by way of others, not even for type checking."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from repo.files import ROOT

INTERNAL = ROOT / "internal"


def test_imports_have_no_circle() -> None:
    """Raises CycleError, which names the circle."""
    files = {_name(path): path for path in (INTERNAL / "netloom").rglob("*.py")}
    graph = {name: {it for it in _imports(path, files) if it != name} for name, path in files.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(files)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(INTERNAL).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path, files: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {it.name for it in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{it.name}" for it in node.names}
            found |= {it if it in files else node.module for it in submodules}
    return found & files.keys()
