"""The groups of `make check` run in parallel, each prints one block, and an interrupt stops all of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
from repo.files import ROOT

LIMIT_S = 150.0  # the runner kills a group that does not end within 60 s after an interrupt
# Each test signals that it runs and waits for the other one, so both pass that point only if they run in parallel.
MEET = """
import time
from pathlib import Path

def test_meet():
    Path({mine!r}).touch()
    until = time.monotonic() + 60
    while not Path({other!r}).exists():
        assert time.monotonic() < until, "the other group does not run"
        time.sleep(0.02)
    print("{word}\\n" * 100)
    assert 0
"""
# A signal between a look for signals and the sleep does not end the sleep, so each sleep is short.
SLEEP = """
import os, time
from pathlib import Path

import pytest

@pytest.fixture
def network():
    yield
    Path({deleted!r}).touch()

def test_sleep(network):
    Path({pid!r}).write_text(str(os.getpid()))
    until = time.monotonic() + 600
    while time.monotonic() < until:
        time.sleep(0.05)
"""
CONFTEST = "def pytest_addoption(parser):\n    parser.addoption('--hypothesis-profile')\n"
DOCUMENT = """
| group | proves | needs |
|---|---|---|
| unit | functions | nothing |

| group | tests | time | measured |
|---|---|---|---|
| unit | | | |
| repo | 1 | 2 s | 3 |
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has the runner and no tests yet."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").write_text(CONFTEST)
    (tmp_path / "times.md").write_text(DOCUMENT)
    (tmp_path / "build/ci").mkdir(parents=True)
    for name in ("groups.py", "checkout.py", "apart.py"):
        shutil.copy(ROOT / "build/ci" / name, tmp_path / "build/ci")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-q -p no:cacheprovider"\n')
    return tmp_path


def write(checkout: Path, group: str, text: str) -> None:
    (checkout / "tests" / group).mkdir()
    (checkout / "tests" / group / f"test_{group}.py").write_text(text)


def start(checkout: Path, *groups: str) -> subprocess.Popen[str]:
    """Tests of networks may run on the machine at the same time, so only what is left below the checkout counts."""
    options = [f"--document={checkout}/times.md", "--times", f"--traces-in={checkout}"]
    return subprocess.Popen(
        [sys.executable, str(checkout / "build/ci/groups.py"), *options, *groups],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_groups_run_in_parallel_and_print_one_block_each(checkout: Path) -> None:
    files = str(checkout / "a"), str(checkout / "b")
    write(checkout, "unit", MEET.format(mine=files[0], other=files[1], word="alpha"))
    write(checkout, "repo", MEET.format(mine=files[1], other=files[0], word="beta"))
    with start(checkout, "unit", "repo") as process:
        printed, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, printed.splitlines()[-1]) == (1, "0 passed, 2 failed")
    for group, word in (("unit", "alpha"), ("repo", "beta")):
        block = printed.split(f"== {group}\n")[1].split("\n== ")[0]
        assert block.count(f"{word}\n") == printed.count(f"{word}\n") == 100
    rows = printed.split("\ngroup ")[1].splitlines()[1:3]
    assert [row.split()[:3] for row in rows] == [["unit", "0", "1"], ["repo", "0", "1"]]
    assert (checkout / "times.md").read_text() == DOCUMENT, "times of a run that failed are not written"


def test_what_a_group_leaves_behind_is_a_failure(checkout: Path) -> None:
    apart = checkout / "build/ci/apart.py"
    apart.write_text(apart.read_text().replace("TRACES_GO_WITHIN_S = 10.0", "TRACES_GO_WITHIN_S = 0.0"))
    namespace = checkout / "run/netns/left"
    namespace.parent.mkdir(parents=True)
    write(checkout, "unit", f"from pathlib import Path\n\ndef test_a():\n    Path({str(namespace)!r}).touch()\n")
    with start(checkout, "unit") as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert (process.returncode, printed.splitlines()[-1]) == (1, "1 passed, 1 failed")
    assert f"left behind: {namespace}\n" in printed


def test_an_exception_before_the_first_test_is_a_failure(checkout: Path) -> None:
    write(checkout, "unit", "def test_a():\n    pass\n")
    (checkout / "tests/conftest.py").write_text("def pytest_addoption(parser):\n    raise ValueError\n")
    with start(checkout, "unit") as process:
        printed = process.communicate(timeout=LIMIT_S)[0]
    assert (process.returncode, printed.splitlines()[-1]) == (1, "0 passed, 1 failed")
    assert "pytest ended with 1\n" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_groups(checkout: Path, number: signal.Signals) -> None:
    pids = [checkout / "a", checkout / "b"]
    deleted = [checkout / "a-deleted", checkout / "b-deleted"]
    for group, pid, file in zip(("unit", "repo"), pids, deleted, strict=True):
        write(checkout, group, SLEEP.format(pid=str(pid), deleted=str(file)))
    with start(checkout, "unit", "repo") as process:
        try:
            until = time.monotonic() + LIMIT_S
            while not all(pid.exists() and pid.read_text() for pid in pids):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(number)
            _, said = process.communicate(timeout=LIMIT_S)
            assert (process.returncode, said.splitlines()[-1]) == (130, "interrupted")
            assert [pid for pid in pids if Path("/proc", pid.read_text()).exists()] == []
            assert all(file.exists() for file in deleted), "a group ended without the tear-down of its fixtures"
        finally:
            process.kill()
            for pid in pids:
                if pid.exists():
                    processes.kill(int(pid.read_text()))


def test_the_times_are_written_to_the_document(checkout: Path) -> None:
    write(checkout, "unit", "def test_a():\n    pass\n\ndef test_b():\n    pass\n")
    with start(checkout, "unit") as process:
        assert process.communicate(timeout=LIMIT_S)[0].splitlines()[-1] == "2 passed, 0 failed"
    before, after = (text.splitlines() for text in (DOCUMENT, (checkout / "times.md").read_text()))
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    _, group, tests, time_s, measured, _ = (cell.strip() for cell in changed[0].split("|"))
    assert (group, tests) == ("unit", "2")
    assert time_s.removesuffix(" s").isdigit()
    assert measured.startswith(f"{len(os.sched_getaffinity(0))} cores, 20")


def test_every_group_of_make_test_has_a_row_for_its_time() -> None:
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "$(TIMES)" in line)
    section = (ROOT / "docs/development.md").read_text().split("\n### Times\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert rows == ["group", *recipe.split("$(TIMES)")[1].split()]
