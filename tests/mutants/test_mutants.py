"""A test that names what it stands on fails once that is taken out.

``@pytest.mark.taken_out(file, text, instead)`` stands on a test: in a copy of the repository in which ``text`` of
``file`` is replaced by ``instead``, the test must fail: by what it claims, not while it is set up or torn down, and not
because the copy no longer loads. So a test that would pass whatever the program does is found, and so is one that
outlived what it guards. Several marks on one test go together: where there are two barriers, both are taken out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mutants.marks import ROOT, Mutant, mutants

COPIED = ("internal", "cmd", "tests", "build", "pyproject.toml", "README.md", "Makefile")
IGNORED = shutil.ignore_patterns("__pycache__")
LIMIT_S = 300
# How a test fails whose program is spoilt: that says nothing of what was taken out.
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError", "UnboundLocalError")


def _named(mutant: Mutant) -> str:
    return mutant.test.partition("::")[2]


@pytest.fixture
def copy() -> Iterator[Path]:
    """The repository, where simulated hosts and users without privileges see it too."""
    with tempfile.TemporaryDirectory(prefix="netloom-mutant-", dir=ROOT.parent) as directory:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(directory, name), ignore=IGNORED)
            else:
                shutil.copy(ROOT / name, directory)
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.parametrize("mutant", list(mutants()), ids=_named)
def test_the_test_fails_when_what_it_stands_on_is_taken_out(mutant: Mutant, copy: Path) -> None:
    for file, text, instead in mutant.taken_out:
        source = (copy / file).read_text()
        assert source.count(text) == 1, f"{file} has {text!r} {source.count(text)} times"
        (copy / file).write_text(source.replace(text, instead))
    report = copy / "report.xml"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", mutant.test, "-x", "--no-header", f"--junit-xml={report}"],
        cwd=copy,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-2000:] + ran.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.attrib for case in cases if case.find("error") is not None], ran.stdout[-2000:]
    whys = [str(failure.get("message")) for case in cases for failure in case.iter("failure")]
    assert whys
    assert not [why for why in whys if why.startswith(BROKEN)], ran.stdout[-2000:]
