"""The manual page and the bash completion cover every command and option for operators."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from netloom.commands.table import TABLE
from netloom.entry import PEOPLE
from package import completion
from repo.files import ROOT

PAGE = (ROOT / "docs" / "netloom.1").read_text()
SYNOPSIS = PAGE.split("\n.Sh SYNOPSIS\n")[1].split("\n.Sh ")[0]


def forms() -> dict[str, set[str]]:
    """The long options of each form in the synopsis, by its command. ``login`` is short for several options."""
    login = PAGE.split("\nThose options are:\n")[1].split("\n.El\n")[0]
    found = {}
    for form in SYNOPSIS.split(".Nm\n"):
        words = re.findall(r"^\.Cm (.+)$", form, re.MULTILINE)
        if words:
            options = form + (login if ".Op Ar login\n" in form else "")
            found[words[0]] = {f"--{it}" for it in re.findall(r"Fl -([a-z-]+)", options)}
    return found


def test_every_subcommand_has_a_synopsis_and_a_paragraph() -> None:
    known = completion.words()
    last = {path: it for path, it in known.items() if path and not it.words}
    wanted = {path: {name for name in it.options if name.startswith("--")} - {"--help"} for path, it in last.items()}
    assert forms() == wanted
    assert sorted(re.findall(r"^\.It Cm ((?:[a-z-]+ ?)+?)(?: (?:Op )?Ar .*)?$", PAGE, re.MULTILINE)) == sorted(last)


def test_the_entry_point_knows_every_operator_command() -> None:
    assert set(PEOPLE) == set(completion.words()[""].words)
    assert not set(PEOPLE) & TABLE.keys()


def test_the_page_lists_every_documented_setting_and_status() -> None:
    section = (ROOT / "docs/setup.md").read_text().split("\n## Settings of the environment\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\.It Ev (\w+)$", PAGE, re.MULTILINE)) == set(
        re.findall(r"^`(NETLOOM_\w+)`$", section, re.MULTILINE)
    )
    statuses = (ROOT / "docs/commands.md").read_text().split("\n## Exit statuses\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| (\d) \|", statuses, re.MULTILINE)
    assert listed == ["0", "1", "2", "3"]
    for status in listed:
        assert f"\n.It {status}\n" in PAGE


def offered(*words: str) -> list[str]:
    """The completions that bash offers for the last word."""
    asked = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _netloom; echo "${COMPREPLY[*]}"'
    script = f"{completion.bash(completion.words())}\n{asked}"
    ended = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout.split()


def cases() -> Iterator[tuple[list[str], list[str]]]:
    for path, it in completion.words().items():
        yield [*path.split(), ""], [*it.words, *it.options]
        yield from (([*path.split(), name[:-1]], [name]) for name in it.words)


@pytest.mark.parametrize(("said", "wanted"), list(cases()), ids=lambda it: "-".join(it)[:40])
def test_bash_completes_every_word_in_its_position(said: list[str], wanted: list[str]) -> None:
    assert set(wanted) <= set(offered("netloom", *said))


def test_bash_completes_options_after_an_argument() -> None:
    assert offered("netloom", "hosts", "forget", "h1.example", "--j") == ["--json"]
    assert offered("netloom", "--json", "ho") == ["hosts"]
    assert offered("netloom", "hosts", "li") == ["list"]


def test_the_launcher_never_changes() -> None:
    """CloudStack disables an extension while its file differs between management servers."""
    launcher = ROOT / "build" / "package" / "netloom.sh"
    assert (
        hashlib.sha256(launcher.read_bytes()).hexdigest()
        == "7464747d5edbea14379f699aa69af0ff0ce8d1cd64401434c76532245ad47af5"
    )
