"""The root of the repository, and the list of its own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Files of tools, none of them committed (.gitignore).
LEFT_BEHIND = {"__pycache__", "dist", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def own_files() -> Iterator[Path]:
    """Every file of the repository, committed or new."""
    for entry in sorted(ROOT.iterdir()):
        if entry.name in LEFT_BEHIND or entry.name.startswith((".venv", ".import_linter")):
            continue
        yield from [entry] if entry.is_file() else (path for path in sorted(entry.rglob("*")) if _is_own(path))


def _is_own(path: Path) -> bool:
    return path.is_file() and not LEFT_BEHIND & set(path.parts) and path.suffix != ".pyc"
