"""Commands for operators: their output as text and as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from netloom import __version__
from netloom.cli import table
from netloom.commands.table import TABLE
from netloom.wire import PROTOCOL_VERSION

REPO = Path(__file__).resolve().parents[2]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB"


def say(*words: str, home: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, str(REPO / "cmd" / "netloom" / "main.py"), *words],
        env={"NETLOOM_DIR": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    made.mkdir(mode=0o700)
    return made


def test_help_lists_the_commands(home: Path) -> None:
    done = say("--help", home=home)
    assert done.returncode == 0
    assert all(f"  {word} " in done.stdout for word in ("version", "commands", "hosts"))
    assert done.stdout.isascii()


def test_help_does_not_depend_on_docstrings(home: Path) -> None:
    """The one file has no docstrings, like ``python -OO``. Every command still has a description."""
    for words in ((), ("agent",), ("hosts",), ("agent", "install")):
        asked = say(*words, "--help", home=home).stdout
        assert say(*words, "--help", home=home, options=("-OO",)).stdout == asked
        _, _, listed = asked.partition("Commands:\n")
        for line in filter(str.strip, listed.partition("\n\n")[0].splitlines()):
            assert len(line.split()) > 2, line


def test_version(home: Path) -> None:
    assert say("version", home=home).stdout.startswith(f"netloom {__version__} ")
    assert json.loads(say("version", "--json", home=home).stdout) == {
        "version": __version__,
        "build": f"source-{__version__}",
        "wire": PROTOCOL_VERSION,
    }


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_is_also_an_option(option: str, home: Path) -> None:
    done = say(option, home=home)
    assert (done.returncode, done.stdout, done.stderr) == (0, say("version", home=home).stdout, "")


@pytest.mark.parametrize("words", [[], ["hosts"], ["agent", "install"]])
def test_help_is_a_command_and_an_option(words: list[str], home: Path) -> None:
    asked = say(*words, "--help", home=home)
    assert asked.returncode == 0
    for same in (say("help", *words, home=home), say(*words, "-h", home=home)):
        assert (same.returncode, same.stdout, same.stderr) == (0, asked.stdout, "")


def test_help_for_an_unknown_command_is_an_error(home: Path) -> None:
    done = say("help", "frobnicate", home=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'frobnicate'" in done.stderr


@pytest.mark.parametrize("words", [["version"], ["agent", "install", "--help"], ["hosts", "forget", "kvm1"]])
def test_operator_commands_do_not_load_rich_or_pydantic(words: list[str], home: Path) -> None:
    """Typer requires rich for coloured help, and later releases require pydantic. Neither is loaded."""
    loaded = say(*words, home=home, options=("-X", "importtime")).stderr
    assert re.search(r"\| +typer$", loaded, re.MULTILINE)
    assert re.findall(r"\| +(?:rich|pydantic|pygments|markdown_it)$", loaded, re.MULTILINE) == []


def test_help_fits_80_columns(home: Path) -> None:
    for words in ((), ("agent",), ("hosts",), ("agent", "install"), ("agent", "uninstall"), ("hosts", "forget")):
        told = say(*words, "--help", home=home).stdout
        assert max(map(len, told.splitlines())) <= 80
        assert "\\[" not in told  # unrendered markup


def test_commands_lists_the_protocol_commands(home: Path) -> None:
    rows = json.loads(say("commands", "--json", home=home).stdout)
    assert [row["command"] for row in rows] == list(TABLE)
    lines = say("commands", home=home).stdout.splitlines()
    assert lines[0].split() == ["COMMAND", "KIND"]
    assert lines[1].split() == ["ensure-network-device", "extension"]
    assert len(lines) == len(TABLE) + 1


def test_hosts_are_listed_and_forgotten(home: Path) -> None:
    assert "No host key is remembered yet" in say("hosts", "list", home=home).stdout
    (home / "known_hosts").write_text(f"kvm1 {KEY}\n[kvm2]:2222 {KEY}\n")
    (listed, _) = json.loads(say("hosts", "list", "--json", home=home).stdout)
    assert listed["host"] == "kvm1"
    assert listed["line"] == 1
    assert say("hosts", "list", home=home).stdout.splitlines()[1].split() == [
        "kvm1",
        "ssh-ed25519",
        listed["fingerprint"],
        "1",
    ]
    gone = say("hosts", "forget", "[kvm2]:2222", home=home)
    assert gone.stdout == f"Forgotten: [kvm2]:2222 ssh-ed25519 {listed['fingerprint']}\n"
    again = say("hosts", "forget", "[kvm2]:2222", home=home)
    assert again.returncode == 1
    assert "no key of [kvm2]:2222 is remembered" in again.stderr
    assert (home / "known_hosts").read_text() == f"kvm1 {KEY}\n"


def test_the_helper_refuses_to_be_started_by_hand(home: Path) -> None:
    done = say("helper", home=home)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "netloom helper: only CloudStack's calls start it; there is no need to start it by hand\n"


def test_tables_are_aligned_without_trailing_blanks() -> None:
    assert (
        table.render(["A", "LONG"], [["wide cell", "x"], ["y", "z"]]) == "A          LONG\nwide cell  x\ny          z"
    )


def test_loading_ssh_starts_no_process() -> None:
    """asyncssh would run ldconfig and gcc at each import to find optional libraries. The program prevents it."""
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(REPO / 'internal')!r})\n"
        "started = []\n"
        "watched = ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.system', 'os.exec')\n"
        "sys.addaudithook(lambda event, arguments: started.append(event) if event in watched else None)\n"
        "import netloom.extension.ssh\n"
        "import ctypes.util\n"
        "assert started == [], started\n"
        "assert ctypes.util.find_library('c') and started\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
