"""The replacement for ``os`` behaves like ``os``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom import fastos_posix

INTERNAL = Path(__file__).resolve().parents[2] / "internal"
PATHS = st.text("ab./", max_size=12)


@given(PATHS, PATHS)
def test_path_functions_match_os_path(one: str, other: str) -> None:
    assert fastos_posix.path.join(one, other) == os.path.join(one, other)
    assert fastos_posix.path.dirname(one) == os.path.dirname(one)
    assert fastos_posix.path.basename(one) == os.path.basename(one)
    assert fastos_posix.path.abspath("/" + one.lstrip("/")) == os.path.abspath("/" + one.lstrip("/"))
    assert fastos_posix.path.abspath(f"x{one}") == os.path.abspath(f"x{one}")


def test_makedirs_matches_os(tmp_path: Path) -> None:
    fastos_posix.makedirs(str(tmp_path / "a/b/c"), mode=0o700)
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700
    fastos_posix.makedirs(str(tmp_path / "a/b/c"), exist_ok=True)
    with pytest.raises(FileExistsError):
        fastos_posix.makedirs(str(tmp_path / "a/b/c"))


def test_a_removed_variable_is_absent_in_children_and_in_os() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(INTERNAL)!r})
from netloom.fastos import os
assert "os" not in sys.modules and os.__name__ == "netloom.fastos_posix"
os.environ["PUT"] = "z"
assert os.environ["TOLD"] == "x" and os.environ.pop("TOLD") == "x" and os.environ.pop("TOLD", None) is None
import os as whole, subprocess
assert "TOLD" not in whole.environ and whole.environ["KEPT"] == "y" == os.environ["KEPT"]
assert "TOLD" not in subprocess.run(["/usr/bin/env"], capture_output=True, text=True).stdout
assert whole.environ["PUT"] == os.environ["PUT"] == "z"
assert os.walk is whole.walk
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], env={"TOLD": "x", "KEPT": "y"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_fastos_is_os_where_os_is_loaded() -> None:
    from netloom.fastos import os as fast

    assert fast is os
