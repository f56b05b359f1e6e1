"""What tests say that they stand on is there to be taken out: seen here in a moment, where the mutants take minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mutants.marks import ROOT, Mutant, mutants


@pytest.mark.parametrize("mutant", list(mutants()), ids=lambda mutant: mutant.test.partition("::")[2])
def test_what_is_to_be_taken_out_is_there_once(mutant: Mutant) -> None:
    for file, text, instead in mutant.taken_out:
        assert text != instead
        assert (ROOT / file).read_text().count(text) == 1, f"{file} has {text!r} another number of times"


def test_what_is_left_is_a_program(tmp_path: Path) -> None:
    """A file that no longer loads, or that speaks of what is not there, would fail any test."""
    for number, mutant in enumerate(mutants()):
        there = tmp_path / f"{number}-{mutant.test.partition('::')[2]}"
        there.mkdir()
        for file, text, instead in mutant.taken_out:
            copy = there / file.replace("/", "-")
            source = copy.read_text() if copy.exists() else (ROOT / file).read_text()
            copy.write_text(source.replace(text, instead))
    ruff = ["ruff", "check", "--isolated", "--select", "F821,F822,F823", "--output-format=concise"]
    ran = subprocess.run([sys.executable, "-m", *ruff, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
