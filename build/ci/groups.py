"""Run the named groups of checks one after the other and end with a table of their results and times.

A group is a process of its own, so that one that dies, hangs or changes its namespace takes no other with it.
Failed: a test failed, was skipped (a skip would hide what it claims), ran into the group's limit, or there was none;
or the group left something on the machine.
The last line is ``N passed, N failed``.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}

TOOLS = ["build/ci", "build/package", "build/pages"]
STATIC = {
    "format": ["ruff", "format", "--quiet", "--diff", "."],
    "lint": ["ruff", "check", "--quiet", "."],
    "types": ["mypy", "--no-error-summary", "internal", "cmd/netloom/main.py", "tests", *TOOLS],
    "imports": ["lint-imports", "--no-logo"],
}
PRIVILEGED = {"kernel", "ssh", "e2e", "binary", "binary-all", "release", "mutants"}
# The one file: how it starts, and the marked part of the end-to-end tests with it in the place of the sources.
ONE_FILE = {"NETLOOM_ONE_FILE": str(ROOT / "dist" / "netloom")}
WHERE = {"binary": ["tests/binary", "tests/e2e", "-m", "binary"], "binary-all": ["tests/binary", "tests/e2e"]}
HOSTS_OWN = ("/home", "/root", "/run", "/tmp", "/var/tmp")
# What tests of networks would leave on the machine itself, where the next run would find it.
TRACES = (
    "/run/netloom*",
    "/run/netns/*",
    "/sys/class/net/*",
    "/etc/netns/*",
    "/etc/netloom*",
    "/var/lib/netloom*",
    "/var/log/netloom*",
    "/var/cache/netloom",
    "/var/tmp/netloom*",
    "/root/.cache/netloom",
    "/usr/local/libexec/netloom",
)
TRACES_GO_WITHIN_S = 10.0  # the kernel takes namespaces down behind our back
GROUP_LIMIT_S = 1800
INTERRUPT_GRACE_S = 60


@dataclass
class Result:
    """What a group came to."""

    group: str
    passed: int = 0
    failed: int = 0
    time_s: float = 0.0
    remarks: list[str] = field(default_factory=list)


def main(groups: list[str]) -> int:
    """The exit status: 0 when nothing failed."""
    privileged = [group for group in groups if group in PRIVILEGED]
    if privileged and os.geteuid() != 0:
        print(f"{', '.join(privileged)}: these tests make network namespaces and need root", file=sys.stderr)
        return 1
    if privileged and not _is_seen_by_all():
        return _elsewhere(groups)
    results = []
    # Whoever has no time for the groups that need root gets fewer examples of each law, too.
    profile = "full" if privileged else "quick"
    for group in groups:
        print(f"== {group}", flush=True)
        started = time.monotonic()
        result = _static() if group == "static" else _pytest(group, profile)
        result.time_s = time.monotonic() - started
        results.append(result)
    _table(results)
    return 1 if any(result.failed for result in results) else 0


def _is_seen_by_all() -> bool:
    """Whether unprivileged users and simulated hosts, which have directories of their own, can read the checkout."""
    if any(ROOT.is_relative_to(directory) for directory in HOSTS_OWN):
        return False
    passable = all(directory.stat().st_mode & 0o001 for directory in [ROOT, *ROOT.parents])
    return passable and (ROOT / "internal/netloom/__init__.py").stat().st_mode & 0o004 != 0


def _elsewhere(groups: list[str]) -> int:
    """The same in a copy where all can read it."""
    with tempfile.TemporaryDirectory(prefix="netloom-", dir="/opt") as directory:
        copy = Path(directory, "netloom")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".mypy_cache", "__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        print(f"{ROOT} is not seen by all users and simulated hosts: testing a copy, {copy}", flush=True)
        return subprocess.run(
            [copy / ".venv/bin/python", "build/ci/groups.py", *groups], cwd=copy, check=False
        ).returncode


def _static() -> Result:
    result = Result("static")
    running = {
        name: subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=ENVIRONMENT | {"PYTHONPATH": "internal"},  # for lint-imports, which imports what it looks at
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in STATIC.items()
    }
    for name, process in running.items():
        said = process.communicate()[0]
        if process.returncode == 0:
            result.passed += 1
        else:
            print(f"{name} failed:\n{said}", flush=True)
            result.failed += 1
            result.remarks.append(name)
    return result


def _pytest(group: str, profile: str) -> Result:
    result = Result(group)
    before = _traces()
    with tempfile.TemporaryDirectory(prefix="netloom-report-") as directory:
        report = Path(directory, "report.xml")
        command = [
            str(BIN / "python"),
            "-m",
            "pytest",
            *WHERE.get(group, [f"tests/{group}"]),
            f"--hypothesis-profile={profile}",
        ]
        command.append(f"--junit-xml={report}")
        environment = ENVIRONMENT | (ONE_FILE if group in WHERE else {})
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(GROUP_LIMIT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            _end(process)
            if isinstance(stopped, KeyboardInterrupt):
                raise
            result.failed += 1
            result.remarks.append(f"stopped after {GROUP_LIMIT_S} s")
            return result
        _count(report, result)
    if status not in (0, 1):
        result.failed += 1
        result.remarks.append("no test" if status == 5 else f"pytest ended with {status}")
    until = time.monotonic() + TRACES_GO_WITHIN_S
    while (left := _traces() - before) and time.monotonic() < until:
        time.sleep(0.1)
    if left:
        result.failed += 1
        result.remarks.append(f"left behind: {', '.join(sorted(left))}")
    return result


def _traces() -> set[str]:
    return {path for pattern in TRACES for path in glob.glob(pattern)}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # fixtures take their namespaces down
    try:
        process.wait(INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _count(report: Path, result: Result) -> None:
    if not report.exists():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            result.failed += 1
            result.remarks.append(f"skipped: {case.get('name')}")
        elif case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        else:
            result.passed += 1


def _table(results: list[Result]) -> None:
    print(f"\n{'group':<10}{'passed':>8}{'failed':>8}{'time':>10}")
    for result in results:
        remarks = f"  {'; '.join(result.remarks[:5])}" if result.remarks else ""
        print(f"{result.group:<10}{result.passed:>8}{result.failed:>8}{result.time_s:>8.1f} s{remarks}")
    passed, failed = sum(result.passed for result in results), sum(result.failed for result in results)
    print(f"{'':<26}{sum(result.time_s for result in results):>8.1f} s\n\n{passed} passed, {failed} failed", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
