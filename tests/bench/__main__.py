"""`make bench`: measure the rows, print a line for each, and write the samples to a file. Needs root.

    .venv/bin/python build/ci/checkout.py -m bench [--quick] [--into DIRECTORY] [ROW ...]

The scripts bench_*.py compare parts of the program with other tools and print tables of their own. They run after the
rows, by the name of the script without "bench_" or without any name. A part or a script that fails does not stop the
others. The last line names those that failed; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import calls, dataplane, rebuild, scale, services
from bench.report import HEAD, line, missed
from bench.rows import BY_NAME, Part, Results, Run, chosen
from bench.stand import NotBuilt, build_of, one_file

NETWORKS, QUICK_NETWORKS = 1000, 30
ROUNDS, QUICK_ROUNDS = 12, 6
IDLE_S, QUICK_IDLE_S = 15.0, 5.0
QUICK = ("call", "event", "sixteen", "rules-1000", "first")


@dataclass(frozen=True)
class Group:
    """A part, and the rows that it measures."""

    part: Part
    rows: tuple[str, ...]


PARTS = {
    "calls": Group(calls.calls, ("call", "event", "life", "sixteen", "fifty", "rules-1000", "rules-10000", "restore")),
    "bare": Group(calls.first, ("first",)),
    "scale": Group(
        scale.scale,
        tuple(name for name in BY_NAME if name.startswith(("event-", "idle-", "restart-", "memory-"))),
    ),
    "services": Group(services.services, ("dhcp", "metadata")),
    "power": Group(rebuild.rebuild, ("rebuild",)),
    "dataplane": Group(dataplane.dataplane, ("forwards", "through-forwards", "through-rules")),
}


HERE = Path(__file__).resolve().parent
SCRIPTS = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


class Show:
    """Prints a line for each row; on a terminal also what is being measured meanwhile."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._status = self._console.status("")

    def __enter__(self) -> Show:
        self._status.start()  # nothing is shown where there is no terminal
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def say(self, what: str) -> None:
        self._status.update(what)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False)


def measured(show: Show, run: Run, results: Results, into: Path) -> Iterator[str]:
    """Measure all parts; yields the names of those that failed. The file is written after each row."""
    for name, group in PARTS.items():
        if not run.wants(*group.rows):
            continue
        try:
            for key, pairs in group.part(run):
                results.samples[key] = pairs
                results.write(into)
                if key in BY_NAME:
                    show.print(line(results, BY_NAME[key]))
        except Exception:  # noqa: BLE001, the other parts are measured all the same
            show.print(traceback.format_exc())
            yield name


def main(arguments: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure netloom beside its yardsticks.")
    parser.add_argument("--quick", action="store_true", help="a part of the rows, in two minutes")
    parser.add_argument("--into", default="dist/bench", help="the directory of results.json")
    parser.add_argument("rows", nargs="*", help="rows, or the first words of their names; all by default")
    options = parser.parse_args(arguments)
    words = options.rows or (QUICK if options.quick else ())
    scripts = [name for name in SCRIPTS if name in words or not words]
    words = [word for word in words if word not in SCRIPTS]
    networks = int(os.environ.get("NETLOOM_BENCH_NETWORKS") or (QUICK_NETWORKS if options.quick else NETWORKS))
    try:
        named = {name: group.rows for name, group in PARTS.items()}
        wanted = frozenset[str]() if scripts and options.rows and not words else chosen(words, named)
        into = Path(options.into, "results.json")
        results = Results.now(build_of(one_file()), into)
    except (NotBuilt, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with Show() as show:
        show.print(f"{results.build}; {results.machine}")
        show.print(HEAD)
        rounds, idle_s = (QUICK_ROUNDS, QUICK_IDLE_S) if options.quick else (ROUNDS, IDLE_S)
        run = Run(wanted, rounds, networks, options.quick, idle_s, show.say)
        failed = list(measured(show, run, results, into))
        if over := [name for name in missed(results) if name in run.wanted]:
            show.print(f"not at their target: {' '.join(over)}")
        show.print(f"samples: {into}")
    for name in scripts:
        sys.stdout.write(f"== {SCRIPTS[name].name}\n")
        sys.stdout.flush()
        if subprocess.run([sys.executable, SCRIPTS[name]], check=False).returncode:
            failed.append(SCRIPTS[name].name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
