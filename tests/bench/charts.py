"""The charts of `make bench`, as SVG files beside its results. It runs in .venv-bench, which has the library.

PYTHONPATH=tests .venv-bench/bin/python -m bench.charts dist/bench
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pygal
from pygal.style import Style

from bench.rows import BY_NAME, ROWS, SCRIPT, Results

GREY, ORANGE, BLUE, GREEN = "#999999", "#e6a23c", "#2b6cb0", "#2f855a"
STYLE = {
    "background": "#ffffff",
    "plot_background": "#ffffff",
    "foreground": "#333333",
    "foreground_strong": "#111111",
    "foreground_subtle": "#999999",
    "guide_stroke_color": "#dddddd",
    "major_guide_stroke_color": "#dddddd",
    "stroke_width": 2,
    "font_family": "sans-serif",
    "label_font_size": 12,
    "major_label_font_size": 12,
    "value_font_size": 12,
    "legend_font_size": 13,
    "title_font_size": 15,
    "opacity": ".9",
}
WIDTH = 900
POWERS = [0.01, 0.1, 1, 10, 100]
SCRIPTS = re.compile(r"<script.*?</script>", re.DOTALL)  # the library writes its settings for tooltips there


def beside_reference(results: Results) -> Any:
    """The figures that the reference has, too: shorter is better."""
    rows = [row for row in ROWS if row.reference is not None and row.name in results.samples]
    # A horizontal chart begins at the bottom.
    rows.reverse()
    height = 140 + 90 * len(rows)
    chart = _chart(
        pygal.HorizontalBar,
        "Beside the reference, in fresh ssh connections (shorter is better)",
        height,
        GREY,
        ORANGE,
        BLUE,
        GREEN,
    )
    chart.logarithmic = True
    chart.x_labels = [row.figure for row in rows]
    chart.truncate_label = -1
    chart.print_values = True
    chart.y_labels, chart.zero = POWERS, POWERS[0]
    chart.range = (POWERS[0], max(row.reference or 0 for row in rows))
    scripts = [results.value(name) if (name := row.name + SCRIPT) in results.samples else None for row in rows]
    chart.add("reference", [row.reference for row in rows])
    chart.add("shell script", scripts)
    chart.add("netloom", [results.value(row.name) for row in rows])
    chart.add("target", [row.target for row in rows])
    chart.value_formatter = lambda value: f"{value:.3g}"
    return chart


def event_by_networks(results: Results) -> Any:
    """What one event costs with so many networks on the host."""
    chart = _by_networks(results, "event", "One event, in fresh ssh connections, by networks on the host")
    return _with_target(results, "event", chart, BY_NAME["event"].target)


def idle_by_networks(results: Results) -> Any:
    """What the agent uses while nothing happens."""
    chart = _by_networks(results, "idle", "CPU of the agent while nothing happens, in % of a core, by networks")
    return _with_target(results, "idle", chart, BY_NAME["idle-1000"].target)


CHARTS: dict[str, Callable[[Results], Any]] = {
    "speed-reference": beside_reference,
    "speed-events": event_by_networks,
    "speed-idle": idle_by_networks,
}


def _by_networks(results: Results, series: str, title: str) -> Any:
    chart = _chart(pygal.XY, title, 380, BLUE, GREEN)
    chart.y_labels_major_count = 4
    chart.show_minor_y_labels = False
    chart.show_x_guides = False
    chart.range = (0, 1.1 * max(results.series(series).values()))
    chart.add("netloom", list(results.series(series).items()), dots_size=4)
    return chart


def _with_target(results: Results, series: str, chart: Any, target: float) -> Any:
    last = max(results.series(series))
    chart.add("target", [(0, target), (last, target)], show_dots=False, stroke_style={"dasharray": "6, 4"})
    return chart


def _chart(kind: Any, title: str, height: int, *colours: str) -> Any:
    # Without scripts: the documents load nothing from another server.
    chart = kind(
        style=Style(**STYLE, colors=colours),
        js=(),
        width=WIDTH,
        height=height,
        title=title,
        legend_at_bottom=True,
        disable_xml_declaration=True,
    )
    chart.uuid = title.partition(" ")[0].lower()  # a random one would change the file each time
    return chart


def main(directory: Path) -> None:
    """Draw all charts whose figures were measured."""
    results = Results.read(directory / "results.json")
    for name, draw in CHARTS.items():
        series = {"speed-events": "event", "speed-idle": "idle"}.get(name)
        if series is None or len(results.series(series)) > 1:
            drawn = SCRIPTS.sub("", draw(results).render(is_unicode=True))
            (directory / f"{name}.svg").write_text(f"{drawn}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
