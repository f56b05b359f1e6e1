"""What the documents say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from netloom.commands.table import TABLE
from repo.files import ROOT, own_files

DOCUMENTS = [path for path in own_files() if path.suffix == ".md"]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def test_the_first_commands_of_the_readme_are_targets() -> None:
    block = re.search(r"^ {4}make .*(?:\n {4}make .*)*", README, re.MULTILINE)
    assert block is not None
    assert re.findall(r"make (\w+)", block.group()) == ["demo", "test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_continuous_integration_is_make_test() -> None:
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_tells_what_each_command_of_the_protocol_does() -> None:
    section = README.split("\n## Commands\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \| .+ \|$", section, re.MULTILINE)) == set(TABLE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_each_invariant_names_the_test_that_guards_it() -> None:
    section = ARCHITECTURE.split("\n## Invariants\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", section, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, guards in rows:
        named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", guards)
        assert named, f"invariant {number} names no test"
        for path, function in named:
            assert (ROOT / path).exists(), f"invariant {number}: {path}"
            assert not function or re.search(rf"\bdef {function}\b", (ROOT / path).read_text()), (
                f"invariant {number}: {function}"
            )


def test_each_sequence_names_a_test_that_is_there() -> None:
    section = (ROOT / "docs/development.md").read_text().split("\n## The sequences of CloudStack's events\n")[1]
    named = re.findall(r"`(tests/[^`:]+)(?:::([^`]+))?`", section.split("\n## ")[0])
    assert len(named) > 30
    for file, test in named:
        path = ROOT / file
        assert path.exists(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
