"""The repository is laid out as ARCHITECTURE.md says."""

from __future__ import annotations

import json

from repo.files import LEFT_BEHIND, ROOT

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "build",
    "cmd",
    "docs",
    "internal",
    "pyproject.toml",
    "tests",
}


def test_the_top_level_has_only_the_listed_entries() -> None:
    found = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith((".venv", ".import_linter"))}
    assert found - LEFT_BEHIND == TOP_LEVEL


def test_cmd_is_not_a_package() -> None:
    """With an __init__.py it would hide the standard library's module ``cmd`` when the checkout is on sys.path."""
    assert not list((ROOT / "cmd").rglob("__init__.py"))


def test_every_directory_of_the_program_is_a_package() -> None:
    """The import contracts ignore a directory without __init__.py, so its modules could import anything."""
    folders = {path.parent for path in (ROOT / "internal" / "netloom").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_payload_files_match_the_index() -> None:
    payloads = ROOT / "tests" / "payloads"
    listed = [entry["file"] for entry in json.loads((payloads / "index.json").read_text())]
    assert sorted(listed) == sorted(path.name for path in payloads.glob("[0-9]*.json"))
    assert len(listed) == len(set(listed))
