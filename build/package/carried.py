"""The Python distributions that the executable carries, with their licences and their own bills of materials."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

# Dependencies of carried packages that the executable does not contain (build/nuitka): pycparser compiles modules of
# cffi; rich and its dependencies print coloured help, which netloom does not use.
LEFT_OUT = {"markdown-it-py", "mdurl", "pycparser", "pygments", "rich"}


@dataclass(frozen=True)
class Distribution:
    """An installed Python distribution."""

    info: Path  # its .dist-info
    name: str
    version: str
    licence: str
    bills: list[dict[str, Any]] = field(default_factory=list)  # its own bills of materials (PEP 770)

    def changed(self) -> list[str]:
        """Files that differ from the wheel. Scripts that pip has generated outside the package are left out."""
        rows = csv.reader((self.info / "RECORD").read_text().splitlines())
        own = [(path, digest) for path, digest, _ in rows if digest and not path.startswith("../")]
        return [path for path, digest in own if self._sum(path) != digest.removeprefix("sha256=")]

    def _sum(self, path: str) -> str:
        try:
            content = (self.info.parent / path).read_bytes()
        except FileNotFoundError:
            return "missing"
        return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

    @property
    def texts(self) -> dict[str, str]:
        """The texts of the licence files, by name."""
        found = [*self.info.glob("LICEN[CS]E*"), *self.info.glob("COPYING*"), *self.info.glob("NOTICE*")]
        found += [path for path in (self.info / "licenses").rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.info)): path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(found)
        }


def distributions(environment: Path) -> list[Distribution]:
    """The distributions in a virtual environment or another directory, sorted by name."""
    infos = [*environment.glob("lib/python3.*/site-packages/*.dist-info"), *environment.glob("*.dist-info")]
    return sorted(map(_distribution, infos), key=lambda it: it.name)


def carried(environment: Path) -> list[Distribution]:
    """The distributions of ``environment`` that the executable contains."""
    return [it for it in distributions(environment) if it.name not in LEFT_OUT]


def canonical(name: str) -> str:
    """A distribution's name as requirement files spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(info: Path) -> Distribution:
    metadata = HeaderParser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    bills = [json.loads(path.read_text()) for path in sorted((info / "sboms").glob("*.json"))]
    return Distribution(info, canonical(metadata["Name"]), metadata["Version"], _licence(metadata), bills)


def _licence(metadata: Message) -> str:
    """The SPDX expression, else the older licence fields; empty when there is none."""
    if metadata["License-Expression"]:
        return str(metadata["License-Expression"])
    if metadata["License"] and "\n" not in metadata["License"]:
        return str(metadata["License"])
    return " AND ".join(sorted(_classified(metadata)))


def _classified(metadata: Message) -> Iterator[str]:
    for line in metadata.get_all("Classifier", []):
        if line.startswith("License :: OSI Approved :: "):
            yield line.rpartition(" :: ")[2]
