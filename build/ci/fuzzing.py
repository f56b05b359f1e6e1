"""Fuzz the targets of tests/fuzz with atheris, one after the other, and end with a table of the executions and faults.

A fault is an input for which a target raises an exception, hangs or needs too much memory. The input is saved below
dist/fuzz/, and the command that reproduces it is printed. New inputs that reach more of the program are kept there, so
the next run goes on from them; ``--keep`` adds few small ones to tests/fuzz/corpus. The exit status is 1 after a fault.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = ROOT / "dist" / "fuzz"
PLAIN, WITH_ATHERIS = ROOT / ".venv" / "bin" / "python", ROOT / ".venv-fuzz" / "bin" / "python"

_ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / it) for it in ("tests", "internal")),
    "PYTHONDONTWRITEBYTECODE": "1",
}
# What libFuzzer calls the files of inputs that raise an exception, hang, or need too much memory.
_FAULTS = ("crash-*", "timeout-*", "oom-*")
_EXECUTIONS = re.compile(rb"stat::number_of_executed_units: +([0-9]+)")
_COVERAGE = re.compile(rb"^#[0-9]+\s.*\bcov: ([0-9]+)", re.MULTILINE)
_LAST_LINES = 30


@dataclass
class Run:
    """What a target's run has found. ``edges``: places of the program that its inputs reach, as atheris counts them."""

    target: str
    executions: int = 0
    edges: int = 0
    faults: list[Path] = field(default_factory=list)
    failed: bool = False


def main(arguments: list[str]) -> int:
    """The exit status: 1 after a fault, or when there is no such target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="", help="one target; all by default")
    parser.add_argument("--seconds", type=int, default=120, help="for each target")
    parser.add_argument("--input", type=Path, help="run this input alone, without atheris")
    parser.add_argument("--keep", action="store_true", help="add inputs that reach more of the program to the corpus")
    options = parser.parse_args(arguments)
    targets = _targets()
    if options.target and options.target not in targets:
        print(f"{options.target}: no target; there are {', '.join(targets)}", file=sys.stderr)
        return 1
    if options.input is not None:
        return _python(PLAIN, options.target, f"--input={options.input}").returncode
    runs = []
    for target in [options.target] if options.target else targets:
        print(f"== {target}, {options.seconds} s", flush=True)
        runs.append(fuzz(target, options.seconds))
        if options.keep:
            _python(PLAIN, target, f"--keep={FINDINGS / target / 'corpus'}")
    print(table(runs))
    return 1 if any(run.failed for run in runs) else 0


def fuzz(target: str, seconds: int) -> Run:
    """Run a target, and print how to reproduce what it finds."""
    directory = FINDINGS / target
    directory.mkdir(parents=True, exist_ok=True)
    before = _faults(directory)
    log = directory / "log"
    with log.open("wb") as output:
        done = _python(WITH_ATHERIS, target, f"--seconds={seconds}", f"--findings={directory}", output=output)
    text = log.read_bytes()
    run = Run(target, failed=done.returncode != 0)
    run.executions = max((int(it) for it in _EXECUTIONS.findall(text)), default=0)
    run.edges = max((int(it) for it in _COVERAGE.findall(text)), default=0)
    run.faults = sorted(_faults(directory) - before)
    if run.failed:
        print("\n".join(text.decode("utf-8", "replace").splitlines()[-_LAST_LINES:]))
    for fault in run.faults:
        print(f"to reproduce: make fuzz TARGET={target} INPUT={fault.relative_to(ROOT)}", flush=True)
    return run


def table(runs: list[Run]) -> str:
    """One line for each run, and the sums."""
    lines = [f"\n{'target':<16}{'executions':>12}{'edges':>8}{'faults':>8}"]
    for run in runs:
        remark = "  failed" if run.failed and not run.faults else ""
        lines.append(f"{run.target:<16}{run.executions:>12}{run.edges:>8}{len(run.faults):>8}{remark}")
    faults = sum(len(run.faults) for run in runs)
    lines.append(f"{'':<16}{sum(run.executions for run in runs):>12}{'':>8}{faults:>8}")
    return "\n".join(lines)


def _targets() -> list[str]:
    listed = _python(PLAIN, "--list", output=subprocess.PIPE)
    listed.check_returncode()
    names: bytes = listed.stdout
    return names.decode().split()


def _python(python: Path, *arguments: str, output: object = None) -> subprocess.CompletedProcess[bytes]:
    """Run tests/fuzz/run.py in a process of its own. An interrupt ends both."""
    command = [str(python), "-m", "fuzz.run", *arguments]
    errors = subprocess.STDOUT if output is not None and output != subprocess.PIPE else None
    return subprocess.run(command, cwd=ROOT, env=_ENVIRONMENT, stdout=output, stderr=errors, check=False)  # type: ignore[call-overload,no-any-return]


def _faults(directory: Path) -> set[Path]:
    return {path for pattern in _FAULTS for path in directory.glob(pattern)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
