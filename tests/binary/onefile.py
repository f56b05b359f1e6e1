"""The one file that ``make build`` made from these sources."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def build_id() -> str:
    """The build id of dist/netloom. It must be made from these sources.

    Only the hash in it is compared: its number counts commits, and a copy of the sources may have no history.
    """
    made = (ROOT / "dist/build-id").read_text().strip()
    asked = subprocess.run([ROOT / "build/nuitka/build", "--build-id"], check=True, stdout=subprocess.PIPE, text=True)
    wanted = asked.stdout.strip()
    assert made.rpartition("-")[2] == wanted.rpartition("-")[2], f"dist/netloom is {made}, not {wanted}: make build"
    return made


def one_file() -> Path:
    """The path of dist/netloom."""
    assert build_id()
    return ROOT / "dist/netloom"
