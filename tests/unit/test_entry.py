"""The five entry points, and the modules that a call loads."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import processes
from entry_points import LINES
from netloom.agent import main as agent
from netloom.cli.app import app
from netloom.commands.table import TABLE
from netloom.entry import PEOPLE, door
from netloom.sockets import peer_credentials

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_arguments_select_the_entry_point(line: str, expected: str) -> None:
    assert door(line.split()) == expected


def test_every_protocol_command_is_a_call() -> None:
    assert {door([command, "file", "60"]) for command in TABLE} == {"call"}
    assert {door([command]) for command in TABLE} == {"call"}


def test_operator_commands_never_shadow_protocol_commands() -> None:
    words = set(getattr(get_command(app), "commands"))  # noqa: B009  # click's group, without its import
    assert words == set(PEOPLE)
    assert not any("-" in word for word in words)


# The modules that a call may load before it reads its payload. Every module here slows every call.
CALL_LOADS = [
    "__future__",
    "_socket",
    "_stat",
    "netloom",
    "netloom.entry",
    "netloom.errors",
    "netloom.extension",
    "netloom.extension.call",
    "netloom.extension.deadline",
    "netloom.extension.directory",
    "netloom.extension.helper_client",
    "netloom.extension.record",
    "netloom.fastos",
    "netloom.fastos_posix",
    "netloom.program",
]

_WATCH = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv.pop(1))
from netloom.fastos import os
def tell():
    print("\\n".join(sorted(set(sys.modules) - before)), file=open(os.environ["LISTED"], "w"))
    os._exit = end
    end(0)
def stop(event, arguments):
    if event == "import" and arguments[0] == "netloom.extension.run":
        tell()
sys.addaudithook(stop)
end, os._exit = os._exit, lambda status: tell()
from netloom.entry import main
main(sys.argv)
"""


@pytest.mark.parametrize("helper", ["0", "1"])
def test_a_call_loads_only_the_listed_modules(helper: str, tmp_path: Path) -> None:
    """Without the helper until the work starts; with the helper, which already runs, until the call exits."""
    payload, listed = tmp_path / "payload", tmp_path / "listed"
    payload.write_text("{}")
    words = ["implement-network", str(payload), "60"]
    idle_s = "60" if helper == "1" else "0"
    environ = {"LISTED": str(listed), "NETLOOM_DIR": str(tmp_path), "HOME": "/nowhere", "NETLOOM_HELPER": idle_s}
    if helper == "1":
        main = str(REPO / "cmd" / "netloom" / "main.py")
        refused = subprocess.run(
            [sys.executable, main, *words], env=environ, check=False, capture_output=True, text=True
        )
        assert "netloom" not in refused.stderr
        assert "physical-network-extension-details" in refused.stderr
        assert len(list(tmp_path.glob("helper-*.sock"))) == 1
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(REPO / "internal"), *words],
        env=environ,
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert listed.read_text().split() == CALL_LOADS
    for path in tmp_path.glob("helper-*.sock"):
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(path))
            processes.kill(peer_credentials(asked).pid)


@pytest.mark.parametrize("line", ["agent serve --check-every nan", "agent serve --check-every 0", "agent serve --x 1"])
def test_wrong_options_of_the_agent_are_one_line(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert agent.main(line.split()[1:]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("line", ["--control 99999 --root /", "--control 0 --root /nowhere"])
def test_a_guest_process_of_nobody_is_one_line(line: str) -> None:
    words = [sys.executable, "-c", "import sys; from netloom.guest.main import main; sys.exit(main(sys.argv[1:]))"]
    nothing = subprocess.DEVNULL
    ran = subprocess.run(
        [*words, *line.split()], stdin=nothing, stderr=subprocess.PIPE, text=True, cwd=REPO / "internal"
    )
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith("netloom guest: only the agent starts it")
