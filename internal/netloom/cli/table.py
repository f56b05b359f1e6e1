"""Plain text tables: aligned columns, separated by two blanks, as ps prints them."""

from __future__ import annotations

from collections.abc import Sequence


def render(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text, without a final newline and without blanks at the ends of lines."""
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (heads, *rows)
    )
