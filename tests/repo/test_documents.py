"""The documents agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from netloom.commands.table import TABLE
from repo.files import ROOT, own_files

DOCUMENTS = [path for path in own_files() if path.suffix == ".md"]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
LINE_LENGTH_MAX = 120


def test_the_first_commands_of_the_readme_are_make_targets() -> None:
    block = re.search(r"^ {4}make .*(?:\n {4}make .*)*", README, re.MULTILINE)
    assert block is not None
    assert re.findall(r"make (\w+)", block.group()) == ["demo", "test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_continuous_integration_runs_make_test() -> None:
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_at_most_120_characters(document: Path) -> None:
    lines = enumerate(document.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > LINE_LENGTH_MAX] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_section_stands_twice(document: Path) -> None:
    """A wrong merge repeats sections. The subsections of a changelog have the same names in each release."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,2} .*", text, re.MULTILINE)
    assert sorted({it for it in headings if headings.count(it) > 1}) == []


def test_the_commands_page_describes_every_protocol_command() -> None:
    text = (ROOT / "docs/commands.md").read_text()
    section = text.split("\n## The commands of the protocol\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \| .+ \|$", section, re.MULTILINE)) == set(TABLE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_link_targets_exist(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_every_invariant_names_existing_tests() -> None:
    section = ARCHITECTURE.split("\n## Invariants\n")[1].split("\n## ")[0]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    text = (ROOT / "docs/invariants.md").read_text()
    guarded = re.findall(r"^## (\d+)\. .+\n\n((?:- .+\n(?: {2}.+\n)*)+)", text + "\n", re.MULTILINE)
    assert [int(number) for number, _ in guarded] == numbers
    for number, guards in guarded:
        named = re.findall(r"^- `([\w/.]+)`:?\n((?: {2}`\w+`,?\n)*)", guards, re.MULTILINE)
        assert len(named) == guards.count("- `"), f"invariant {number}: {guards}"
        for path, functions in named:
            check_tests_exist(f"invariant {number}", path, functions)


def check_tests_exist(what: str, path: str, functions: str) -> None:
    """Check that the file exists, and has the functions of this text of names between backticks."""
    assert (ROOT / path).exists(), f"{what}: {path}"
    for function in re.findall(r"`(\w+)`", functions):
        assert re.search(rf"\bdef {function}\b", (ROOT / path).read_text()), f"{what}: {function}"


def test_every_fault_names_existing_tests() -> None:
    table, tests = (ROOT / "docs/faults.md").read_text().split("\n## The faults\n")[1].split("\n## Their tests\n")
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \|$", table, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    named = re.findall(r"^- (\d+): `([\w/.]+)`\n((?: {2}`\w+`,?\n)+)", tests, re.MULTILINE)
    assert len(named) == tests.count("- ")
    assert sorted({int(number) for number, _, _ in named}) == numbers
    for number, path, functions in named:
        check_tests_exist(f"fault {number}", path, functions)


def test_the_worked_command_matches_the_code() -> None:
    text = (ROOT / "docs/contributing.md").read_text()
    shown = re.findall(r"^```diff\n\+\+\+ (.+)\n((?:\+.*\n)+)```$", text, re.MULTILINE)
    assert len(shown) > 10
    for path, lines in shown:
        code = {line.partition("  # guard: ")[0] for line in (ROOT / path).read_text().splitlines()}
        assert [line for line in lines.splitlines() if line[1:] not in code] == [], path


def test_the_path_of_a_packet_names_each_base_chain_at_its_priority() -> None:
    priorities = {"raw": -300, "mangle": -150, "dstnat": -100, "dstnat + 10": -90, "filter": 0, "srcnat": 100}
    priorities |= {"srcnat + 10": 110, "srcnat + 20": 120, "filter + 10": 10}
    text = (ROOT / "internal/netloom/render/README.md").read_text()
    picture = text.split("```")[1]
    ruleset = (ROOT / "tests/golden/ip6-tiers/ruleset.nft").read_text()
    text_of_inet = ruleset.partition("add table arp")[0]
    chains = re.findall(r"chain (\w+) \{\n\t\ttype .+ priority ([^;]+); policy (\w+);", text_of_inet)
    assert len(chains) == 14
    for name, priority, policy in chains:
        dropped = r" \(drop\)" if policy == "drop" else r"(?! \(drop\))"
        assert re.search(rf"(?<![\d-]){priorities[priority]}  {name}\b{dropped}", picture), name
    others = {re.sub(r"_(\d|[.])+", "_", it) for it in re.findall(r"chain ([\w.]+) \{\n\t\t(?!type)", ruleset)}
    shares = {"opened", "opened_by_others", "reached", "reached_others", "reached6", "reached6_others"}
    assert others == {
        "arriving_ip6",
        "lost",
        "reset_outside",
        "lost_here",
        "at_",
        "egress_",
        "acl_out_",
        "acl_in_",
        *shares,
    }
    assert [name for name in others if name not in picture] == []
