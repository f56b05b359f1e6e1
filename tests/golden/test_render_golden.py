"""The output of the renderer for the golden scenarios is the reviewed output."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.rendered import UPDATE, load, scenarios, texts
from netloom.render.scope import guest_bridges, outline, render


def test_there_are_scenarios() -> None:
    assert len(scenarios()) >= 6


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda it: it.name)
def test_rendered_output_matches_the_golden_files(scenario: Path) -> None:
    rendered = texts(scenario)
    assert {it.name for it in scenario.iterdir()} <= {*rendered, "state.json"} or UPDATE, "a file that nothing writes"
    for name, text in rendered.items():
        file = scenario / name
        if UPDATE:
            file.write_text(text)
        assert file.read_text() == text, f"{file}: UPDATE_GOLDEN=1 writes it again"


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda it: it.name)
def test_the_outline_has_what_a_scope_uses_of_the_host(scenario: Path) -> None:
    scope = load(scenario)
    whole, short = render(scope), outline(scope)
    assert (short.namespace, short.ports) == (whole.namespace, whole.ports)
    assert guest_bridges(scope) >= {it.segment.bridge for it in whole.ports if it.link.startswith("gst-")}
