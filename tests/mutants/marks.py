"""What tests say that they stand on: the marks ``taken_out(file, text, instead)``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """What is taken out at once, as (file, text, instead), and the test that has to notice."""

    test: str  # "tests/unit/test_a.py::test_b"
    taken_out: list[tuple[str, str, str]]


def mutants() -> Iterator[Mutant]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        if "taken_out(" not in source or path.parent == Path(__file__).parent:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = [
                    (*map(ast.literal_eval, mark.args),)
                    for mark in node.decorator_list
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.taken_out"
                ]
                if marks:
                    yield Mutant(f"{path.relative_to(ROOT)}::{node.name}", marks)
