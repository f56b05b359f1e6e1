"""There are no import cycles, neither by late imports, nor by imports for type checking, nor through a package.

The contract ``acyclic_siblings`` of import-linter does not find a module that imports the package it is in.
"""

from __future__ import annotations

import itertools
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest


def cycle(package: str) -> str:
    """An import cycle of the package as text, ``a imports b imports a``. Empty if there is none."""
    graph = grimp.build_graph(package, cache_dir=None)
    try:
        TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))  # graphlib names the imported module first
    return ""


def test_there_are_no_import_cycles() -> None:
    assert cycle("netloom") == ""


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("deep/c.py", "from made_up.other import a\n"),
        ("deep/c.py", "from made_up import other\nimport made_up.other.a as late\n"),
        ("deep/c.py", "def later():\n    from made_up.other import a\n"),
        ("deep/c.py", "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from made_up.other.a import A\n"),
        ("other/b.py", "import made_up.other\n"),
    ],
)
def test_an_import_cycle_is_named(importer: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__.py": "",
        "deep/__init__.py": "",
        "deep/c.py": "",
        "other/__init__.py": "from made_up.other import b\n",
        "other/a.py": "from made_up.other import b\n",
        "other/b.py": "from made_up.deep import c\n",
    }
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, before in files.items():
        (tmp_path / "made_up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made_up" / name).write_text(before)
    assert cycle("made_up") == ""
    (tmp_path / "made_up" / importer).write_text(files[importer] + text)
    named = cycle("made_up").split(" imports ")
    assert named[0] == named[-1]
    assert "made_up.other.b" in named
    steps = itertools.pairwise(named)
    graph = grimp.build_graph("made_up", cache_dir=None)
    assert all(graph.direct_import_exists(importer=one, imported=other) for one, other in steps)
