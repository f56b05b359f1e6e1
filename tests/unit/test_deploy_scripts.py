"""The shell scripts that install the program on a host."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from netloom.extension.deploy import _FINISH, _STEPS

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


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_one_shell_executes_all_steps_and_reads_exactly_the_upload(shell: str, tmp_path: Path) -> None:
    program = b'#!/bin/sh\necho "{$*}"; [ "$2" != connect ] || cat\n' + b"#" * 200_000
    size, digest = len(program), hashlib.sha256(program).hexdigest()
    feed = b"look\nupload 1 %d\n%b" % (size - 65536, program[65536:])  # the first block was there
    feed += b"finish\nactivate --by-word\nconnect\nlook\n"
    (tmp_path / BUILD).mkdir()
    (tmp_path / BUILD / f".part-{digest}").write_bytes(program[:65536])
    (tmp_path / "current").symlink_to(BUILD)
    done = subprocess.run(
        [shell, "-c", _STEPS, "netloom", str(tmp_path), BUILD, digest, str(size)], input=feed, capture_output=True
    )
    facts, uploaded, finished, activated, relay = done.stdout.split(b"\nnetloom-end 0\n")
    assert b"netloom-part 65536\n" in facts
    assert b"3+1 records in" in uploaded or b"2+1 records in" in uploaded
    assert finished == b""
    assert activated == b"{agent activate --by-word}\n"
    assert relay == b"{agent connect}\nlook\n"  # the rest of stdin is the relay's
    assert done.stderr == b""
    assert (tmp_path / BUILD / "netloom").read_bytes() == program


def test_the_rest_of_an_upload_that_failed_is_not_executed(tmp_path: Path) -> None:
    """The shell ends instead of reading the bytes as steps."""
    program = b"\nactivate\n" * 20_000
    full = tmp_path / BUILD / f".part-{HASH}"
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    marker = full.with_name("netloom")
    marker.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    marker.chmod(0o755)
    argv = ["sh", "-c", _STEPS, "netloom", str(tmp_path), BUILD, HASH, str(len(program))]
    feed = b"upload 0 %d\n%b" % (len(program), program)
    done = subprocess.run(argv, input=feed, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"No space left on device" in done.stdout
    assert done.stdout.endswith(b"\nnetloom-end 1\n")
    assert not (tmp_path / "executed").exists()


def test_a_shell_without_an_agent_says_so_and_stays(tmp_path: Path) -> None:
    argv = ["sh", "-c", _STEPS, "netloom", str(tmp_path), BUILD, HASH, "1", "connect"]
    done = subprocess.run(argv, input=b"finish\n", capture_output=True, check=True)
    assert done.stdout == b"\nnetloom-end 1\n\nnetloom-end 65\n"
