"""The wheel and the sdist: built with pip from a copy of the checkout, installed in a new environment, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from netloom import __version__
from repo.files import ROOT

# A build reads the whole checkout. These entries are not committed and must not be copied.
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "dist", "__pycache__", ".*_cache", ".hypothesis", ".import_linter*"
)
TOP = {
    "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "Makefile", "PKG-INFO", "README.md", ".gitignore",
    "build", "cmd", "docs", "internal", "pyproject.toml", "tests",
}  # fmt: skip


def ran(*words: str | Path, cwd: Path = ROOT, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NETLOOM"))}
    ended = subprocess.run(
        words, cwd=cwd, env=kept | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, because a build writes beside the sources. Its package has one file that is no module."""
    copy = tmp_path_factory.mktemp("checkout") / "netloom"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    (copy / "internal/netloom/data.json").write_text("{}\n")
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    back_end = "import sys, hatchling.build as it; print(it.build_sdist(sys.argv[1]))"
    name = ran(sys.executable, "-c", back_end, checkout / "out", cwd=checkout).stdout.split()[-1]
    return checkout / "out" / name


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return built(checkout, checkout / "wheel")


def built(source: Path, into: Path) -> Path:
    """Build a wheel with pip, without access to a registry. Returns its path."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    ran(*pip, "--wheel-dir", into, source, SOURCE_DATE_EPOCH="1700000000")
    (found,) = into.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and the packages of .venv-runtime (runtime.txt)."""
    fresh = tmp_path_factory.mktemp("fresh") / "venv"
    ran(sys.executable, "-m", "venv", fresh)
    (site,) = fresh.glob("lib/python3.*/site-packages")
    (packages,) = ROOT.glob(".venv-runtime/lib/python3.*/site-packages")
    (site / "runtime.pth").write_text(f"{packages}\n")
    # Dependencies are checked too: --no-index fails if runtime.txt does not satisfy the metadata.
    ran(fresh / "bin/python", "-m", "pip", "install", "--quiet", "--no-index", wheel)
    ran(fresh / "bin/python", "-m", "pip", "check")
    return fresh


def test_the_installed_program_behaves_like_the_checkout(installed: Path, tmp_path: Path) -> None:
    source: list[str | Path] = [sys.executable, ROOT / "cmd/netloom/main.py"]
    program = installed / "bin/netloom"
    for words in (["--help"], ["--version"], ["version", "--json"], ["commands"], ["help", "agent", "install"]):
        told = ran(program, *words, cwd=tmp_path, NETLOOM_DIR=str(tmp_path)).stdout
        assert told == ran(*source, *words, cwd=tmp_path, NETLOOM_DIR=str(tmp_path)).stdout
    assert json.loads(ran(program, "version", "--json", cwd=tmp_path).stdout)["build"] == f"source-{__version__}"


@pytest.mark.parametrize("helper", ["0", "1"])
def test_the_installed_program_answers_a_call(installed: Path, helper: str, tmp_path: Path) -> None:
    """With and without the helper. The installed program starts the helper by its own script."""
    payload = tmp_path / "payload"
    payload.write_text("{}")
    words: list[str | Path] = [installed / "bin/netloom", "implement-network", payload, "60"]
    done = ran(*words, cwd=tmp_path, status=1, NETLOOM_DIR=str(tmp_path), NETLOOM_HELPER=helper)
    assert "physical-network-extension-details" in done.stderr
    assert len(list(tmp_path.glob("helper-*.sock"))) == int(helper)


def test_the_wheel_contains_the_whole_package(checkout: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(checkout / "internal")) for path in (checkout / "internal").rglob("*") if path.is_file()
    }
    assert "netloom/data.json" in package
    info, data = f"netloom-{__version__}.dist-info", f"netloom-{__version__}.data"
    assert {name for name in names if not name.startswith((info, data))} == package
    assert {f"{info}/licenses/LICENSE", f"{data}/data/share/man/man1/netloom.1"} <= names


def test_the_sdist_contains_the_repository_and_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names} <= TOP
    assert {"LICENSE", "build/requirements/runtime.txt", "tests/release/test_wheel.py", "cmd/netloom/main.py"} <= names
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []
    again = zipfile.ZipFile(built(sdist, tmp_path))
    first = zipfile.ZipFile(wheel)
    assert {name: again.read(name) for name in again.namelist()} == {
        name: first.read(name) for name in first.namelist()
    }
