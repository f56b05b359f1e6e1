"""What the renderer says of the golden scenarios is what a person has read."""

from __future__ import annotations

from pathlib import Path

import pytest

from golden.rendered import UPDATE, scenarios, texts


def test_there_are_scenarios() -> None:
    assert len(scenarios()) >= 6


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda it: it.name)
def test_rendered_as_read(scenario: Path) -> None:
    for name, text in texts(scenario).items():
        file = scenario / name
        if UPDATE:
            file.write_text(text)
        assert file.read_text() == text, f"{file}: UPDATE_GOLDEN=1 writes it anew"
