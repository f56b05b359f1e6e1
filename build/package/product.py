"""The program that is released: its file, its names, its time."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Product:
    """One build of the executable."""

    executable: Path
    version: str
    build: str
    epoch: int  # of the commit: the only time that gets into a file
    release: str  # of the packages: 1 for a tagged version, else smaller than 1 and growing

    @property
    def sha256(self) -> str:
        """Of the executable."""
        with self.executable.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def time(self) -> datetime:
        """The commit's."""
        return datetime.fromtimestamp(self.epoch, UTC)


def committed(executable: Path) -> Product:
    """The product that ``executable`` says it is, at the time of this repository's commit and with its tags."""
    epoch = int(_output(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]))
    return product(executable, epoch, _output(["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"]).split())


def product(executable: Path, epoch: int, tags: list[str]) -> Product:
    """The product that ``executable`` says it is."""
    said = json.loads(_output([str(executable), "version", "--json"]))
    version, build = str(said["version"]), str(said["build"])
    return Product(executable, version, build, epoch, release(version, build, epoch, tags))


def release(version: str, build: str, epoch: int, tags: list[str]) -> str:
    """``1`` at the tag of this version, else the commit's time and the build's hash: sorted by time, before ``1``."""
    if f"v{version}" in tags:
        return "1"
    return f"0.{datetime.fromtimestamp(epoch, UTC):%Y%m%d%H%M%S}.{build.rpartition('-')[2]}"


def _output(words: list[str]) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
