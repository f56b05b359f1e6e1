"""A stand-in for the one file that ``make build`` makes: this checkout in one executable file, of any build id.

A zip archive that the interpreter of the tests runs. As of the real one, the program knows its own path, its build and
the directory that it is unpacked into, and nothing else; what arrives at the other end of an upload is what was sent,
byte by byte. ``ballast`` makes it as large.
"""

from __future__ import annotations

import os
import py_compile
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
_SOURCES = REPO / "internal"

_MAIN = """
import os, sys
from netloom import program
os.environ["NETLOOM_EXE"] = os.path.realpath(sys.argv[0])
program.__compiled__ = True
unpacked = os.path.expanduser("~/.cache/netloom/programs/{build}")
had = os.umask(0o077)
os.makedirs(unpacked, exist_ok=True)
os.umask(had)
program._unpacked = lambda: unpacked
from netloom.entry import main
sys.exit(main(sys.argv))
"""


class OneFiles:
    """Makes them in ``directory``; what Python compiles of the checkout is shared."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._compiled: dict[str, bytes] = {}
        self._ballast = os.urandom(1 << 20)

    def make(self, build: str, *, ballast_mb: int = 0, changes: Mapping[str, tuple[str, str]] | None = None) -> Path:
        """The file of build ``build``; its version is what stands before the first hyphen.

        ``changes``: module file below ``internal`` to a text in it and what stands there instead.
        """
        target = self.directory / f"netloom-{build}-{ballast_mb}"
        if target.exists():
            return target
        version = build.partition("-")[0]
        changed = {"netloom/__init__.py": ('__version__ = "0.1.0"', f'__version__ = "{version}"'), **(changes or {})}
        with target.open("wb") as file:
            file.write(f"#!{sys.executable} -B\n".encode())
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr("__main__.py", _MAIN.format(build=build))
                for source in sorted(_SOURCES.rglob("*.py")):
                    name = str(source.relative_to(_SOURCES))
                    archive.writestr(f"{name}c", self._code(source, name, changed.get(name)))
                for number in range(ballast_mb):
                    archive.writestr(f"ballast/{number}", self._ballast)
        target.chmod(0o755)
        return target

    def _code(self, source: Path, name: str, change: tuple[str, str] | None) -> bytes:
        if change is None and name in self._compiled:
            return self._compiled[name]
        if change is not None:
            text = source.read_text()
            assert change[0] in text, f"{change[0]!r} is not in {name}"
            source = self.directory / "changed.py"
            source.write_text(text.replace(*change))
        out = self.directory / "compiled.pyc"
        py_compile.compile(
            str(source),
            str(out),
            dfile=name,
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        code = out.read_bytes()
        if change is None:
            self._compiled[name] = code
        return code
