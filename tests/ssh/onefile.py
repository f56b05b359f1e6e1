"""A stand-in for the one-file program of ``make build``: this checkout in one executable file with any build id.

It is a zip archive that the interpreter of the tests runs. Like the real one, it knows its own path, its build and the
directory that it is unpacked into. ``ballast`` makes it as large as the real one.
"""

from __future__ import annotations

import ast
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
    """Makes one-files in ``directory``. They share the compiled modules of the checkout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._compiled: dict[str, bytes] = {}
        self._ballast = os.urandom(1 << 20)

    def make(self, build: str, *, ballast_mb: int = 0, changes: Mapping[str, str] | None = None) -> Path:
        """Make the file of build ``build``, whose version is the part before the first hyphen.

        ``changes`` maps a module file below ``internal`` to code that is added at its end, where it replaces functions,
        classes or constants of the module.
        """
        target = self.directory / f"netloom-{build}-{ballast_mb}"
        if target.exists():
            return target
        version = build.partition("-")[0]
        changed = {"netloom/__init__.py": f'__version__ = "{version}"', **(changes or {})}
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

    def _code(self, source: Path, name: str, change: str | None) -> bytes:
        if change is None and name in self._compiled:
            return self._compiled[name]
        if change is not None:
            text = source.read_text()
            assert _replaced(change) <= _defined(text), f"{name} does not define {_replaced(change) - _defined(text)}"
            source = self.directory / "changed.py"
            source.write_text(f"{text}\n{change}\n")
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


def _replaced(code: str) -> set[str]:
    """The names that the code replaces. Names that begin with ``original_`` are its own."""
    return {name for name in _defined(code) if not name.startswith("original_")}


def _defined(code: str) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
