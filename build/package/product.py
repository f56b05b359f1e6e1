"""The program that is released: its file, version, build and time."""

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
    epoch: int  # of the commit: the only time that is written to files
    release: str  # of the packages: 1 for a tagged version, else between 0 and 1 and growing with time

    @property
    def sha256(self) -> str:
        """The SHA-256 of the executable, in hex."""
        with self.executable.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def time(self) -> datetime:
        """The time of the commit."""
        return datetime.fromtimestamp(self.epoch, UTC)


def committed(executable: Path) -> Product:
    """The product of ``executable``, which prints its version, at the time and with the tags of the current commit."""
    epoch = int(_output(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]))
    return product(executable, epoch, _output(["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"]).split())


def product(executable: Path, epoch: int, tags: list[str]) -> Product:
    """The product of ``executable``, which prints its version and build."""
    printed = json.loads(_output([str(executable), "version", "--json"]))
    version, build = str(printed["version"]), str(printed["build"])
    return Product(executable, version, build, epoch, release(version, build, epoch, tags))


def release(version: str, build: str, epoch: int, tags: list[str]) -> str:
    """``1`` at the tag of this version, else ``0.<commit time>.<hash of the build>``, which sorts by time, below 1."""
    if f"v{version}" in tags:
        return "1"
    return f"0.{datetime.fromtimestamp(epoch, UTC):%Y%m%d%H%M%S}.{build.rpartition('-')[2]}"


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
