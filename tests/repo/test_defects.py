"""docs/defects.md names every test of a known defect, and no other, and says which of them are marked."""

from __future__ import annotations

import ast
import re

from mutants.marks import mutants
from repo.files import ROOT

DOCUMENT = (ROOT / "docs" / "defects.md").read_text()
ROWS = dict(re.findall(r"^\| (\d+) \| .+? \| (.+) \|$", DOCUMENT, re.MULTILINE))


def defined() -> dict[int, set[str]]:
    """Defect to the tests that are named after it."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (named := re.match(r"test_defects?_((?:\d\d_)+)", node.name)):
                for number in named[1].strip("_").split("_"):
                    found.setdefault(int(number), set()).add(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def test_every_defect_has_its_tests_and_the_document_names_them() -> None:
    tests = defined()
    assert sorted(map(int, ROWS)) == list(range(1, 70))
    assert {int(number): set(re.findall(r"`([^`]+)`", row)) for number, row in ROWS.items()} == tests


def test_the_document_says_which_are_shown_to_fail() -> None:
    marked = {it.test for it in mutants()}
    said = {test for row in ROWS.values() for test in re.findall(r"`([^`]+)` \*\*M\*\*", row)}
    assert said == {test for tests in defined().values() for test in tests if test in marked}
    # A defect without a marked test would rest on a test that perhaps cannot fail.
    assert {number for number, tests in defined().items() if not tests & marked} == set()


def test_what_is_known_by_reading_points_to_rows_and_tests() -> None:
    rows = re.findall(r"^\| F(\d+) \| .+? \| (.+) \|$", DOCUMENT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 22))
    for pointer in ", ".join(where for _, where in rows).split(", "):
        if pointer.isdigit():
            assert pointer in ROWS
        else:
            file, _, name = pointer.strip("`").partition("::")
            assert f"def {name}(" in (ROOT / file).read_text()
