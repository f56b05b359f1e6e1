"""docs/defects.md names every test of a known defect, and no other, and says which of them are marked."""

from __future__ import annotations

import ast
import re

from mutants.marks import mutants
from repo.files import ROOT

DOCUMENT = (ROOT / "docs" / "defects.md").read_text()
DEFECTS, READ = DOCUMENT.split("\n## Findings of the first reading\n")
# The number of each entry, and its lines up to the next one.
ENTRIES = dict(re.findall(r"^## (\d+)\. .+\n((?:(?!## ).*\n)+)", DEFECTS, re.MULTILINE))
TEST = re.compile(r"^(?:- |  )`(tests/[\w/]+\.py)`\n  `(\w+)`( \*\*M\*\*)?$", re.MULTILINE)


def listed_in(entry: str, *, marked: bool = False) -> set[str]:
    """The tests that an entry names; ``marked``: those of them that it calls mutation tests."""
    assert len(TEST.findall(entry)) == entry.count("`tests/"), entry
    return {f"{file}::{name}" for file, name, mark in TEST.findall(entry) if mark or not marked}


def defined() -> dict[int, set[str]]:
    """The tests that are named after each defect, by its number."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (named := re.match(r"test_defects?_((?:\d\d_)+)", node.name)):
                for number in named[1].strip("_").split("_"):
                    found.setdefault(int(number), set()).add(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def test_the_document_lists_the_tests_of_every_defect() -> None:
    tests = defined()
    assert sorted(map(int, ENTRIES)) == list(range(1, 70))
    assert {int(number): listed_in(entry) for number, entry in ENTRIES.items()} == tests


def test_the_document_marks_the_mutation_tests() -> None:
    marked = {it.test for it in mutants()}
    said = {test for entry in ENTRIES.values() for test in listed_in(entry, marked=True)}
    assert said == {test for tests in defined().values() for test in tests if test in marked}
    # Only a mutation test is known to be able to fail, so every defect needs one.
    assert {number for number, tests in defined().items() if not tests & marked} == set()


def test_findings_of_the_first_reading_point_to_entries_and_tests() -> None:
    findings = re.findall(r"^- \*\*F(\d+)\.\*\* .+\n((?:  .+\n)+)", READ, re.MULTILINE)
    assert [int(number) for number, _ in findings] == list(range(1, 22))
    for number, where in findings:
        pointers = [
            it for listed in re.findall(r"^  Defects? ([\d, ]+)\.$", where, re.MULTILINE) for it in listed.split(", ")
        ]
        tests = listed_in(where)
        assert pointers or tests, f"F{number} leads nowhere"
        assert set(pointers) <= ENTRIES.keys()
        assert len(where.splitlines()) == bool(pointers) + 2 * len(tests), f"F{number}"
        for test in tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text()
