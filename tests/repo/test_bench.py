"""`make bench` measures every row, keeps what it measured, and writes it to the page about speed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import __main__ as program
from bench.document import BEGIN, END, section, with_section
from bench.report import number, table
from bench.rows import BY_NAME, ROWS, Measured, Results, Run, chosen, in_turns
from repo.files import ROOT

SPEED = ROOT / "docs/operators/speed.md"


def test_each_row_is_measured_by_one_part() -> None:
    measured = [name for group in program.PARTS.values() for name in group.rows]
    assert sorted(measured) == sorted(row.name for row in ROWS)


def test_a_word_names_a_row_the_rows_that_begin_with_it_or_a_part() -> None:
    parts = {name: group.rows for name, group in program.PARTS.items()}
    assert chosen(["event-120"], parts) == {"event-120"}
    assert chosen(["idle"], parts) == {name for name in BY_NAME if name.startswith("idle-")}
    assert chosen(["services"], parts) == {"dhcp", "metadata"}
    assert chosen([], parts) == BY_NAME.keys()
    with pytest.raises(ValueError, match="no row is named evnt"):
        chosen(["evnt"], parts)


def test_the_quick_rows_exist() -> None:
    assert set(program.QUICK) <= BY_NAME.keys()


def test_ours_and_the_yardstick_alternate() -> None:
    order: list[str] = []

    def work(name: str, took: float) -> float:
        order.append(name)
        return took

    found = in_turns(2, lambda: work("ssh", 2.0), {"a": lambda: work("a", 1.0), "b": lambda: work("b", 4.0)})
    assert found == {"a": [(1.0, 2.0)] * 2, "b": [(4.0, 2.0)] * 2}
    assert order == ["ssh", "a", "ssh", "b", "ssh", "ssh", "b", "ssh", "a", "ssh"]


def test_a_run_keeps_earlier_figures_of_the_same_build(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results.now("1", file)
    results.samples = {
        "event": [(1.0, 2.0), (3.0, 2.0), (1.2, 2.0)],
        "event@120": [(1.0, 2.0)],
        "event@1": [(1.0, 4.0)],
    }
    results.write(file)
    assert Results.now("1", file).value("event") == 0.6
    assert Results.now("1", file).series("event") == {1: 0.25, 120: 0.5}
    assert Results.now("2", file).samples == {}


def test_a_failing_part_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Run) -> Iterator[Measured]:
        yield "event", [(1.0, 2.0)]
        raise OSError(3, "gone")

    def works(run: Run) -> Iterator[Measured]:
        yield "life", [(3.0, 2.0)]

    monkeypatch.setattr(program, "one_file", lambda: Path(sys.executable))
    monkeypatch.setattr(program, "build_of", lambda _: "1")
    parts = {"a": program.Group(fails, ("event",)), "b": program.Group(works, ("life",))}
    monkeypatch.setattr(program, "PARTS", parts)
    assert program.main(["--into", str(tmp_path), "event", "life"]) == 1
    said = capsys.readouterr()
    assert said.err == "failed: a\n"
    assert "gone" in said.out
    assert Results.read(tmp_path / "results.json").samples.keys() == {"event", "life"}


def test_the_table_has_the_measured_rows_with_figure_reference_and_target() -> None:
    results = Results("1", "2026-01-02", "2 cores", {"event": [(50.0, 200.0)], "event.script": [(400.0, 200.0)]})
    row = "| one event: ensure and add-port-forward | ssh | 50 ms | 200 ms | 0.25 | 2 | 23 | ≤ 0.05 |"
    assert table(results)[2:] == [row]
    text = with_section(f"# Speed\n\n{BEGIN}\nold\n{END}\n", section(results, ["speed-idle"]))
    assert row in text
    assert "(speed-idle.svg)" in text
    assert "old" not in text
    assert [number(value) for value in (0.051, 1.0, 12.34, 1234.5)] == ["0.05", "1", "12.3", "1,234"]


def test_the_page_about_speed_shows_its_charts() -> None:
    text = SPEED.read_text()
    assert BEGIN in text and END in text
    charts = {path.name for path in SPEED.parent.glob("speed-*.svg")}
    assert charts
    for name in charts:
        assert f"({name})" in text
        assert "<script" not in (SPEED.parent / name).read_text()
