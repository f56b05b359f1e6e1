"""Mutation marks and guards match. This check is fast; ``tests/mutants`` runs the tests with each mutation."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mutants.marks import ROOT, Mutant, guards, mutants, mutated


def test_a_guard_has_one_comment_and_a_test() -> None:
    comments = Counter(name for name, _ in guards())
    marked = {mutation.guard for mutant in mutants() for mutation in mutant.mutations}
    assert [name for name, count in comments.items() if count > 1] == [], "comments with the same name"
    assert sorted(marked - set(comments)) == [], "marks without a guard"
    assert sorted(set(comments) - marked) == [], "guards without a mark"


@pytest.mark.parametrize("mutant", list(mutants()), ids=lambda mutant: mutant.test.partition("::")[2])
def test_a_mutation_changes_the_syntax_tree(mutant: Mutant) -> None:
    for mutation in mutant.mutations:
        for path, source in mutated([mutation]).items():
            assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((ROOT / path).read_text())), mutation


def test_a_mutated_file_has_no_undefined_names(tmp_path: Path) -> None:
    """A file that no longer loads, or that has an undefined name, would fail any test."""
    for number, mutant in enumerate(mutants()):
        folder = tmp_path / f"{number}-{mutant.test.partition('::')[2]}"
        folder.mkdir()
        for path, source in mutated(mutant.mutations).items():
            (folder / str(path).replace("/", "-")).write_text(source)
    ruff = ["ruff", "check", "--isolated", "--select", "F821,F822,F823", "--output-format=concise"]
    ran = subprocess.run([sys.executable, "-m", *ruff, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
