"""The five doors, and what the fast one loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from netloom.cli.app import app
from netloom.commands.table import TABLE
from netloom.entry import PEOPLE, door

REPO = Path(__file__).resolve().parents[2]

DOORS: list[tuple[str, str]] = [
    ("ensure-network-device /tmp/cs-extnet.payload 60", "call"),
    ("ensure-network-device", "call"),  # CloudStack's word with too few: one line, no manual
    ("frobnicate /tmp/cs-extnet.payload 60", "call"),  # a newer CloudStack's command
    ("agent serve", "agent"),
    ("agent connect --socket", "agent"),
    ("agent", "agent"),
    ("guest", "guest"),
    ("helper", "helper"),
    ("", "people"),
    ("--help", "people"),
    ("version", "people"),
    ("hosts list --json", "people"),
    ("hosts forget kvm1", "people"),
    ("frobnicate", "people"),
]


@pytest.mark.parametrize(("line", "expected"), DOORS)
def test_door(line: str, expected: str) -> None:
    assert door(line.split()) == expected


def test_every_command_of_the_protocol_is_a_call() -> None:
    assert {door([command, "file", "60"]) for command in TABLE} == {"call"}
    assert {door([command]) for command in TABLE} == {"call"}


def test_no_word_of_ours_hides_a_command() -> None:
    words = set(getattr(get_command(app), "commands"))  # noqa: B009  # click's group, without its import
    assert words == set(PEOPLE)
    assert not any("-" in word for word in words)


# What a call may load before it knows what it is asked for. A name that appears here costs every call.
CALL_LOADS = [
    "__future__",
    "_collections_abc",
    "_stat",
    "genericpath",
    "netloom",
    "netloom.entry",
    "netloom.errors",
    "netloom.extension",
    "netloom.extension.call",
    "netloom.extension.deadline",
    "os",
    "os.path",
    "posixpath",
    "stat",
]

_WATCH = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv.pop(1))
loaded = None
def stop(event, arguments):
    global loaded
    if event == "import" and arguments[0] == "netloom.extension.work" and loaded is None:
        loaded = sorted(set(sys.modules) - before)
        print("\\n".join(loaded), file=open("/dev/fd/3", "w"))
sys.addaudithook(stop)
from netloom.entry import main
main(sys.argv)
"""


def test_a_call_loads_nothing_heavy_before_the_work_begins(tmp_path: Path) -> None:
    payload, listed = tmp_path / "payload", tmp_path / "listed"
    payload.write_text("{}")
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(REPO / "internal")]
    shell = 'exec "$@" 3>"$LISTED"'
    subprocess.run(
        ["sh", "-c", shell, "sh", *command, "implement-network", str(payload), "60"],
        env={"LISTED": str(listed), "NETLOOM_DIR": str(tmp_path)},
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert listed.read_text().split() == CALL_LOADS
