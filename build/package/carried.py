"""What the executable carries besides netloom: distributions of Python, and what they and the build brought along."""

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

# The metadata of a carried package asks for these, and the executable leaves them out (build/nuitka): pycparser is for
# compiling cffi's modules, rich and its packages are for the coloured help that netloom does not use.
LEFT_OUT = {"markdown-it-py", "mdurl", "pycparser", "pygments", "rich"}


@dataclass(frozen=True)
class Distribution:
    """An installed Python distribution."""

    info: Path  # its .dist-info
    name: str
    version: str
    licence: str
    bills: list[dict[str, Any]] = field(default_factory=list)  # what it says itself of its own insides (PEP 770)

    def changed(self) -> list[str]:
        """Its files that are no longer what its wheel brought; without the starters that pip makes beside them."""
        rows = csv.reader((self.info / "RECORD").read_text().splitlines())
        own = [(path, told) for path, told, _ in rows if told and not path.startswith("../")]
        return [path for path, told in own if self._sum(path) != told.removeprefix("sha256=")]

    def _sum(self, path: str) -> str:
        try:
            content = (self.info.parent / path).read_bytes()
        except FileNotFoundError:
            return "missing"
        return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

    @property
    def texts(self) -> dict[str, str]:
        """Its licence files by name."""
        found = [*self.info.glob("LICEN[CS]E*"), *self.info.glob("COPYING*"), *self.info.glob("NOTICE*")]
        found += [path for path in (self.info / "licenses").rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.info)): path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(found)
        }


def distributions(environment: Path) -> list[Distribution]:
    """What is installed in a virtual environment or another directory, sorted by name."""
    infos = [*environment.glob("lib/python3.*/site-packages/*.dist-info"), *environment.glob("*.dist-info")]
    return sorted(map(_distribution, infos), key=lambda it: it.name)


def carried(environment: Path) -> list[Distribution]:
    """Those of them that are in the executable."""
    return [it for it in distributions(environment) if it.name not in LEFT_OUT]


def canonical(name: str) -> str:
    """A distribution's name as requirement files spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(info: Path) -> Distribution:
    told = HeaderParser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    bills = [json.loads(path.read_text()) for path in sorted((info / "sboms").glob("*.json"))]
    return Distribution(info, canonical(told["Name"]), told["Version"], _licence(told), bills)


def _licence(told: Message) -> str:
    """The SPDX expression, or what stands in its place. Empty when nothing is said."""
    if told["License-Expression"]:
        return str(told["License-Expression"])
    if told["License"] and "\n" not in told["License"]:
        return str(told["License"])
    return " AND ".join(sorted(_classified(told)))


def _classified(told: Message) -> Iterator[str]:
    for line in told.get_all("Classifier", []):
        if line.startswith("License :: OSI Approved :: "):
            yield line.rpartition(" :: ")[2]
