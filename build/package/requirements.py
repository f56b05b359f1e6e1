"""Read the requirement files: the only packages that may be installed."""

from __future__ import annotations

import re
from pathlib import Path

from package.carried import canonical
from package.product import ROOT

DIRECTORY = ROOT / "build" / "requirements"
_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][0-9a-z.]*)( ; [^\\]+)?( --hash=sha256:[0-9a-f]{64})+")


class NotPinned(Exception):
    """An entry has no exact version, or no hash."""


def files() -> list[Path]:
    """The requirement files, sorted."""
    return sorted(DIRECTORY.glob("*.txt"))


def pins(*names: str) -> set[tuple[str, str]]:
    """Name and version of each entry of these files. Raises NotPinned."""
    found = set()
    for name in names:
        text = (DIRECTORY / name).read_text().replace("\\\n", "")
        lines = [" ".join(line.split()) for line in text.splitlines()]
        for line in (line for line in lines if line and not line.startswith("#")):
            entry = _PINNED.fullmatch(line)
            if entry is None:
                raise NotPinned(f"{name}: {line[:100]}")
            found.add((canonical(entry[1]), entry[2]))
    return found
