"""A test with mutation marks fails once its guards are removed.

The guards that the marks name are changed in a copy of the repository, as :mod:`mutants.marks` defines. The test must
then fail by its own assertion: not in its set-up or tear-down, and not because the copy no longer loads. This finds
tests that pass regardless of the program, and tests whose guard no longer exists. Several marks on one test are applied
together: if two guards prevent the same fault, both are removed.
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from xml.etree import ElementTree

import pytest

from mutants.marks import ROOT, Mutant, mutants, mutated

COPIED = ("internal", "cmd", "tests", "docs", "build", "pyproject.toml", "README.md", "Makefile")
IGNORED = shutil.ignore_patterns("__pycache__")
LIMIT_S = 300
# Errors of a program that no longer loads. They prove nothing about the guard.
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError", "UnboundLocalError")


def _named(mutant: Mutant) -> str:
    return mutant.test.partition("::")[2]


def _short(mutant: Mutant) -> bool:
    """Whether ``make test`` runs it: about a ninth. The name decides, so a new mark changes nothing for others."""
    return zlib.crc32(_named(mutant).encode()) % 9 == 0


def _marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    of_machine = "pytestmark = pytest.mark.machine" in (ROOT / mutant.test.partition("::")[0]).read_text()
    return [*([pytest.mark.short] if _short(mutant) else []), *([pytest.mark.machine] if of_machine else [])]


MUTANTS = [pytest.param(it, marks=_marks(it)) for it in mutants()]


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """A compiled copy of the repository in a place that simulated hosts and users without privileges can read.

    The interpreter compares the source's hash with that of the compiled file, so a changed file is compiled anew.
    """
    with tempfile.TemporaryDirectory(prefix="netloom-mutant-", dir=ROOT.parent) as directory:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(directory, name), ignore=IGNORED)
            else:
                shutil.copy(ROOT / name, directory)
        Path(directory).chmod(0o755)
        compileall.compile_dir(directory, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        yield Path(directory)


@pytest.mark.parametrize("mutant", MUTANTS, ids=_named)
def test_the_test_fails_without_its_guards(mutant: Mutant, copy: Path) -> None:
    changed = mutated(mutant.mutations)
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    for path, source in changed.items():
        (copy / path).write_text(source)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", mutant.test, "-x", "--no-header", f"--junit-xml={report}"],
            cwd=copy,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    finally:
        for path in changed:
            shutil.copy(ROOT / path, copy / path)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-2000:] + ran.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.attrib for case in cases if case.find("error") is not None], ran.stdout[-2000:]
    whys = [str(failure.get("message")) for case in cases for failure in case.iter("failure")]
    assert whys
    assert not [why for why in whys if why.startswith(BROKEN)], ran.stdout[-2000:]
