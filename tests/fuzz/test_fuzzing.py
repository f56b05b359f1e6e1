"""`make fuzz`: what it prints of a run, and the command that reproduces a fault. A script stands for atheris."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repo.files import ROOT

# The output of libFuzzer, from a run with atheris 3.0.
OUTPUT = """\
#2\tINITED cov: 20 ft: 20 corp: 1/1b exec/s: 0 rss: 46Mb
#27589\tREDUCE cov: 131 ft: 4 corp: 2/242b lim: 269 exec/s: 0 rss: 46Mb L: 242/242 MS: 1 EraseBytes-
 === Uncaught Python exception: ===
AssertionError: descriptors stay open
stat::number_of_executed_units: 27600
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the runner of `make fuzz` and two targets."""
    (tmp_path / "build/ci").mkdir(parents=True)
    shutil.copy(ROOT / "build/ci/fuzzing.py", tmp_path / "build/ci")
    executable(tmp_path / ".venv/bin/python", "echo payload dhcp")
    return tmp_path


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(checkout: Path, *arguments: str, faults: tuple[str, ...] = (), status: int = 0) -> tuple[int, list[str]]:
    """The exit status and the lines of `make fuzz`, when atheris finds these faults in each target."""
    found = "".join(f"for it in {checkout}/dist/fuzz/*/; do touch $it/{name}; done\n" for name in faults)
    executable(checkout / ".venv-fuzz/bin/python", f"cat <<'END'\n{OUTPUT}END\n{found}exit {status}")
    command = [sys.executable, str(checkout / "build/ci/fuzzing.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_a_run_without_faults_ends_with_the_numbers_of_each_target(checkout: Path) -> None:
    status, lines = run(checkout, "--seconds=1")
    assert status == 0
    rows = [line.split() for line in lines[-3:]]
    assert rows == [["payload", "27600", "131", "0"], ["dhcp", "27600", "131", "0"], ["55200", "0"]]


def test_a_fault_is_printed_with_the_command_that_reproduces_it(checkout: Path) -> None:
    status, lines = run(checkout, "--target=dhcp", faults=("crash-1", "timeout-2"), status=77)
    assert status == 1
    assert "AssertionError: descriptors stay open" in lines
    for fault in ("crash-1", "timeout-2"):
        assert f"to reproduce: make fuzz TARGET=dhcp INPUT=dist/fuzz/dhcp/{fault}" in lines
    assert lines[-1].split() == ["27600", "2"]


def test_a_target_that_cannot_run_is_a_failure(checkout: Path) -> None:
    status, lines = run(checkout, "--target=dhcp", status=1)
    assert (status, lines[-2].split()) == (1, ["dhcp", "27600", "131", "0", "failed"])


def test_an_unknown_target_is_refused(checkout: Path) -> None:
    assert run(checkout, "--target=nothing") == (1, ["nothing: no target; there are payload, dhcp"])
