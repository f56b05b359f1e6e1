"""`make bench-docs`: put the results of `make bench` into docs/operators/speed.md, with its charts beside it.

PYTHONPATH=tests .venv/bin/python -m bench.document dist/bench docs/operators/speed.md
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.report import table
from bench.rows import Results

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
CHARTS = {
    "speed-reference": "The figures beside those of the reference and of a shell script",
    "speed-events": "The cost of one event by the number of networks",
    "speed-idle": "The CPU of the agent by the number of networks",
}


def section(results: Results, charts: list[str]) -> str:
    """What stands between the two marks."""
    measured = f"Measured on {results.date}: {results.machine}, build {results.build}."
    images = [f"![{CHARTS[name]}]({name}.svg)" for name in charts]
    return "\n\n".join([measured, "\n".join(table(results)), *images])


def with_section(text: str, new: str) -> str:
    """The document with another section. Raises ValueError without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main(directory: Path, document: Path) -> None:
    """Copy the charts beside the document, and write its section. Raises FileNotFoundError without results."""
    results = Results.read(directory / "results.json")
    charts = [name for name in CHARTS if (directory / f"{name}.svg").exists()]
    document.write_text(with_section(document.read_text(), section(results, charts)))
    for name in charts:
        shutil.copy(directory / f"{name}.svg", document.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
