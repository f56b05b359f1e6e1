"""The traces of the start of the one file in the environment and on disk, and the order of builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from netloom import __version__, program


def test_variables_of_the_start_are_removed_from_the_environment() -> None:
    environ = {"NETLOOM_EXE": "/opt/netloom", "NETLOOM_TIDY": "1", "NETLOOM_BEGUN": "x", "NETLOOM_DIR": "/var/lib/x"}
    environ |= {"NUITKA_ORIGINAL_ARGV0": "netloom", "NUITKA_ONEFILE_DIRECTORY": "/opt", "NUITKA_ONEFILE_PARENT": "7"}
    program.take_environment(environ)
    assert environ == {"NETLOOM_DIR": "/var/lib/x"}


@pytest.mark.parametrize(("told", "left"), [("/usr/bin:/bin", {"PATH": "/usr/bin:/bin"}), ("", {})])
def test_variables_hidden_by_the_compiler_are_restored(told: str, left: dict[str, str]) -> None:
    environ = {"PATH": "/", "PYTHONHOME": "/unpacked", "NETLOOM_PATH": told}
    program.take_environment(environ)
    assert environ == left
    untouched = {"PATH": "/sbin", "PYTHONHOME": "/opt/python", "NETLOOM_PATH": told}
    program.take_environment(untouched)
    assert untouched == {"PATH": "/sbin", "PYTHONHOME": "/opt/python"}


def test_a_checkout_is_not_the_one_file() -> None:
    program.take_environment({"NETLOOM_EXE": "/opt/netloom", "NETLOOM_BEGUN": "id 1.0 output 0 injected"})
    assert program.path() is None
    assert program.begun() == ""
    assert program.build_id() == f"source-{__version__}"


def test_old_builds_are_removed_unless_in_use(tmp_path: Path) -> None:
    long_ago = time.time() - 2 * program.UNUSED_S
    for name in ("now", "unused", "running", "young", ".new-Ab12Cd", ".old-0.1.0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "netloom.bin").write_bytes(b"")
    shutil.copy("/bin/sleep", tmp_path / "running" / "netloom.bin")
    (tmp_path / "elsewhere").symlink_to("/usr")
    for name in ("now", "unused", "running", ".new-Ab12Cd", ".old-0.1.0"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    os.utime(tmp_path / "elsewhere", (long_ago, long_ago), follow_symlinks=False)
    with subprocess.Popen([tmp_path / "running" / "netloom.bin", "60"]) as runs:
        program.tidy(str(tmp_path), "now")
        runs.kill()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir() and not entry.is_symlink()) == [
        "now",
        "running",
        "young",
    ]
    assert Path("/usr/bin").exists()


def test_builds_are_ordered_by_version_then_commit_count() -> None:
    ages = [["source-0.1.0"], ["0.1.0-1f2e3d4c5b6a", "0.1.0-123456789012", "0.1.0-0-aaaa"], ["0.1.0-9-ffff"]]
    ages += [["0.1.0-10-0000", "0.1.0-10-ffff"], ["0.1.1-1-aaaa"], ["0.2.0-bbbb"], ["0.10.0-3-cccc"], ["1.0.0-1-dddd"]]
    for at, one in enumerate(ages):
        for other_at, other in enumerate(ages):
            assert {program.is_newer(a, than=b) for a in one for b in other} == {at > other_at}


def test_close_all_but_closes_exactly_the_other_descriptors() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    child = os.fork()
    if not child:
        for fd in (9, 10, 700):
            os.dup2(null, fd)
        program.close_all_but(0, 1, 2, 10)
        left = sorted(fd for fd in range(1024) if os.path.exists(f"/proc/self/fd/{fd}"))
        os._exit(0 if left == [0, 1, 2, 10] else 1)
    os.close(null)
    assert os.waitpid(child, 0)[1] == 0
