"""Run a target with atheris, reproduce a fault, or keep new inputs.

    python -m fuzz.run <target> --seconds 60 --findings <directory>     needs atheris; `make fuzz` calls this
    python -m fuzz.run <target> --input <file>                          runs one input; needs no atheris
    python -m fuzz.run <target> --keep <directory>                      adds inputs that reach new lines to the corpus

The exit status is 0 if no fault was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz.targets import Target

INPUT_BYTES_MAX = 8192  # of an input that atheris makes
KEPT_BYTES_MAX = 4096  # of an input that is kept
ONE_INPUT_S_MAX = 30  # a longer one is a fault: it hangs
MEMORY_MIB_MAX = 3072

_PROGRAM = str(Path(__file__).resolve().parents[2] / "internal")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fuzz.run")
    parser.add_argument("target", nargs="?", default="")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, help="where new inputs and faults are written")
    parser.add_argument("--input", type=Path, help="run this input alone")
    parser.add_argument("--keep", type=Path, help="a directory of inputs; keep those that reach new lines")
    options = parser.parse_args(arguments)
    if options.findings is not None:
        return _fuzz(options.target, options.seconds, options.findings)
    from fuzz.targets import TARGETS

    if options.list:
        sys.stdout.write("\n".join(TARGETS) + "\n")
        return 0
    if options.input is not None:
        TARGETS[options.target](options.input.read_bytes())
        return 0
    return _keep(options.target, options.keep)


def _fuzz(name: str, seconds: int, findings: Path) -> int:
    """Run until the time is over or an input raises an exception. Does not return: libFuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")  # a package of `make fuzz` alone
    with atheris.instrument_imports(include=["netloom", "h11"]):
        from fuzz import targets
    new = findings / "corpus"
    new.mkdir(parents=True, exist_ok=True)
    words = findings / "words"  # libFuzzer's dictionary; it refuses an empty one
    words.write_text("".join(f'"{_escaped(it)}"\n' for it in targets.tokens(name) or [b"x"]))
    options = {
        "max_total_time": seconds,
        "artifact_prefix": f"{findings}/",
        "dict": words,
        "max_len": INPUT_BYTES_MAX,
        "timeout": ONE_INPUT_S_MAX,
        "rss_limit_mb": MEMORY_MIB_MAX,
        "detect_leaks": 0,
        "print_final_stats": 1,
    }
    argv = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(new), str(targets.CORPUS / name)]
    atheris.Setup(argv, targets.TARGETS[name])
    atheris.Fuzz()
    return 0


def _escaped(word: bytes) -> str:
    r"""A word as libFuzzer reads it: bytes other than plain ASCII as ``\xAB``."""
    return "".join(chr(it) if 32 <= it < 127 and chr(it) not in '"\\' else f"\\x{it:02X}" for it in word)


def _keep(name: str, new: Path) -> int:
    """Write the smallest new inputs that reach lines that no kept one reaches to the corpus; remove useless ones."""
    from fuzz.targets import CORPUS, TARGETS, corpus

    directory = CORPUS / name
    directory.mkdir(parents=True, exist_ok=True)
    inputs = {path.read_bytes() for path in (*corpus(name), *new.glob("*")) if path.is_file()}
    kept = minimised(TARGETS[name], (it for it in inputs if len(it) <= KEPT_BYTES_MAX))
    for path in corpus(name):
        path.unlink()
    for it in kept:
        (directory / hashlib.sha256(it).hexdigest()[:16]).write_bytes(it)
    sys.stdout.write(f"{name}: {len(kept)} inputs, {sum(map(len, kept))} bytes\n")
    return 0


def minimised(target: Target, inputs: Iterable[bytes]) -> list[bytes]:
    """Few small inputs that reach the same pairs of lines, one after the other, of the program as all of them."""
    reached: set[tuple[str, int, int]] = set()
    kept: list[bytes] = []
    for it in sorted(inputs, key=lambda it: (len(it), it)):
        found = pairs_of_lines(target, it)
        if not found <= reached:
            reached |= found
            kept.append(it)
    return kept


def pairs_of_lines(target: Target, data: bytes) -> set[tuple[str, int, int]]:
    """The file and the line before and after each step that the program makes."""
    found: set[tuple[str, int, int]] = set()
    before: dict[int, int] = {}

    def step(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_PROGRAM):
            return None
        if event == "line":
            found.add((frame.f_code.co_filename, before.get(id(frame), 0), frame.f_lineno))
            before[id(frame)] = frame.f_lineno
        elif event == "return":
            before.pop(id(frame), None)
        return step

    sys.settrace(step)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
