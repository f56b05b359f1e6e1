"""The shell script that finishes an upload on a host, when another sender of the same build has finished it first."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from netloom.extension.deploy import _FINISH

PROGRAM = b"a program"
HASH = hashlib.sha256(PROGRAM).hexdigest()
BUILD = "0.1.0-1-a"


def finished(directory: Path, *, script: str = _FINISH) -> int:
    """The exit status of the script."""
    command = ["sh", "-c", script, "sh", str(directory), BUILD, HASH, str(len(PROGRAM))]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture
def build(tmp_path: Path) -> Path:
    (tmp_path / BUILD).mkdir()
    return tmp_path / BUILD


def test_what_was_uploaded_is_checked_and_becomes_the_program(build: Path) -> None:
    (build / f".part-{HASH}").write_bytes(PROGRAM)
    assert finished(build.parent) == 0
    assert (build / "netloom").read_bytes() == PROGRAM
    assert [it.name for it in build.iterdir()] == ["netloom"]


@pytest.mark.parametrize(("there", "status"), [(PROGRAM, 0), (b"another program", 65), (None, 65)])
def test_an_upload_that_another_sender_has_finished_is_done(build: Path, there: bytes | None, status: int) -> None:
    if there is not None:
        (build / "netloom").write_bytes(there)
    assert finished(build.parent) == status


def test_an_upload_that_another_sender_finishes_at_this_moment_is_done(build: Path) -> None:
    """The other one removes what was uploaded just before it is copied."""
    part = build / f".part-{HASH}"
    part.write_bytes(PROGRAM)
    moment = 'if ! cp "$part" "$new"'
    assert moment in _FINISH
    script = _FINISH.replace(moment, f'mv "$part" "$program"; {moment}')
    assert finished(build.parent, script=script) == 0
    assert (build / "netloom").read_bytes() == PROGRAM
