"""The table of platforms: a row for each kind of emulated hosts, from the results that the tests leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from repo.files import ROOT

sys.path.insert(0, str(ROOT / "build/ci"))
import platforms

MODULES = sorted(path.stem.removeprefix("test_") for path in ROOT.glob("tests/hosts/test_*.py"))
RESULT: dict[str, Any] = {
    "passed": 7,
    "failed": 0,
    "build": "0.1.0-57-1f2e3d4c5b6a",
    "date": "2026-03-04",
    "seconds": 300,
    "hosts": [
        {"kind": "debian12", "kernel": "6.1.0-50-amd64", "systemd": "252.39-1~deb12u2", "libnftables1": "1:1.0.6-2"}
    ],
}
ROW = "| debian12 | 6.1.0 | 1.0.6 | 252.39 | - | - | 7 | 0.1.0-57-1f2e3d4c5b6a | 2026-03-04 |"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "platforms.md"
    file.write_text("| hosts | Linux |\n|---|---|\n| debian12 | - |\n| docker | - |\n\ndebian12\n:   Two hosts.\n")
    return file


def results(directory: Path, **by_module: dict[str, Any]) -> Path:
    for name, result in by_module.items():
        (directory / f"{name}.json").write_text(json.dumps(result))
    return directory


def test_every_kind_of_hosts_has_a_row_and_a_paragraph() -> None:
    text = (ROOT / "docs/platforms.md").read_text()
    for name in MODULES:
        assert text.count(f"\n| {name} |") == 1
        assert f"\n{name}" in text.replace(", ", "\n").replace("\n\n:", ":")


def test_a_row_gets_the_versions_the_build_and_the_date(document: Path, tmp_path: Path) -> None:
    assert platforms.write(document, results(tmp_path, debian12=RESULT)) == []
    assert document.read_text().splitlines()[2:4] == [ROW, "| docker | - |"]


def test_a_failed_kind_keeps_its_old_row(document: Path, tmp_path: Path) -> None:
    both = results(tmp_path, debian12={**RESULT, "failed": 1}, docker=RESULT)
    assert platforms.write(document, both) == ["debian12"]
    assert "| debian12 | - |" in document.read_text()


def test_a_kind_without_a_row_is_an_error(document: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 rows for solaris instead of one"):
        platforms.write(document, results(tmp_path, solaris=RESULT))


def test_the_last_success_is_the_oldest_row(document: Path, tmp_path: Path) -> None:
    assert platforms.last(document) == "emulated hosts: never run (make test-hosts)"
    older = {**RESULT, "date": "2026-02-01", "build": "0.1.0-50-aaaaaaaaaaaa"}
    platforms.write(document, results(tmp_path, debian12=RESULT, docker=older))
    assert platforms.last(document) == (
        "emulated hosts: passed, the oldest on 2026-02-01, with 0.1.0-50-aaaaaaaaaaaa, 0.1.0-57-1f2e3d4c5b6a "
        "(make test-hosts)"
    )


def test_a_release_says_when_the_hosts_passed_last() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "build/ci/platforms.py", "--last"], capture_output=True, text=True, check=True
    )
    assert done.stdout == platforms.last(ROOT / "docs/platforms.md") + "\n"
    assert "build/ci/platforms.py --last" in (ROOT / "build/package/release").read_text()
