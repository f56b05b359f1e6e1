"""The results of `make bench` as text: lines for a terminal, and the table of docs/operators/speed.md."""

from __future__ import annotations

from bench.rows import ROWS, SCRIPT, Results, Row

HEAD = f"{'':58}{'median':>12}{'yardstick':>12}{'figure':>9}{'script':>9}{'reference':>11}{'target':>9}"


def line(results: Results, row: Row) -> str:
    """The line of one row."""
    cells = _cells(results, row)
    widths = (12, 12, 9, 9, 11, 9)
    return f"{row.figure:58}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def table(results: Results) -> list[str]:
    """The rows that were measured, as a table in Markdown."""
    head = ["figure", "beside", "median", "that of it", "figure", "a script", "reference", "target"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * 6]
    for row in ROWS:
        if row.name in results.samples:
            lines.append(f"| {row.figure} | {row.yardstick or '–'} | " + " | ".join(_cells(results, row)) + " |")
    return lines


def missed(results: Results) -> list[str]:
    """The names of the measured rows that do not reach their target."""
    return [row.name for row in ROWS if row.name in results.samples and not row.reaches(results.value(row.name))]


def _cells(results: Results, row: Row) -> list[str]:
    ours, theirs = results.medians(row.name)
    figure = number(results.value(row.name)) + ("" if row.is_ratio else f" {row.unit}")
    script = row.name + SCRIPT
    sign = "≥" if row.at_least else "≤"
    return [
        f"{number(ours)} {row.unit}",
        f"{number(theirs)} {row.unit}" if row.is_ratio else "–",
        figure,
        number(results.value(script)) if script in results.samples else "–",
        number(row.reference) if row.reference is not None else "–",
        f"{sign} {number(row.target)}",
    ]


def number(value: float) -> str:
    """A number with at most three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if value >= 10 else f"{value:.2f}".rstrip("0").removesuffix(".")
