"""Run the named groups of checks and end with a table of their results and times.

Each group is a separate process, so that a crash, a hang or a change of namespace does not affect the others. As many
run at the same time as there are cores, in the order in which they are named; the output of each is printed when it
ends. Groups that need no root, and emulated machines, come first. The others wait more than they compute. They have
namespaces of their own (apart.py), because they name links and files alike. Groups that change what all namespaces of a
machine share run alone at the end.

A group fails when a test fails, is skipped or exceeds the time limit of the group, when it has no tests, and when it
leaves something on the machine. The last line is ``N passed, N failed``. ``--times`` writes the numbers and times to
the table in docs/development.md.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import apart
import checkout

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "PYTHONDONTWRITEBYTECODE": "1"
}
CORES = len(os.sched_getaffinity(0))

TOOLS = ["build/ci", "build/package", "build/pages"]
STATIC = {
    "format": ["ruff", "format", "--quiet", "--diff", "."],
    "lint": ["ruff", "check", "--quiet", "."],
    "types": ["mypy", "--no-error-summary", "internal", "cmd/netloom/main.py", "tests", *TOOLS],
    "imports": ["lint-imports", "--no-logo"],
}
SIDE_BY_SIDE = {"static", "unit", "model", "model-long", "fuzz", "golden", "repo", "docs"}
# One group for each kind of emulated hosts: they run side by side, and "hosts" is all of them.
HOSTS = {f"hosts-{path.stem.removeprefix('test_')}": str(path) for path in sorted(ROOT.glob("tests/hosts/test_*.py"))}
HOST_TEST_S_MAX = 1500  # one test with a boot, on a slow machine
PRIVILEGED = {
    "kernel",
    "kernel-long",
    "kernel-machine",
    "crash",
    "crash-all",
    "load",
    "load-long",
    "ssh",
    "ssh-long",
    "e2e",
    "e2e-long",
    "binary",
    "binary-all",
    "release",
    "mutants",
    "mutants-all",
    "mutants-machine",
    *HOSTS,
}
# They change what all namespaces of a machine share, so nothing runs beside them.
ALONE = {"kernel-machine", "mutants-machine"}
LONG_GROUP_LIMIT_S = 10800  # of a group of make test-long
# Tests of the one file: its start, and the marked end-to-end tests with the one file instead of the sources.
ONE_FILE = {"NETLOOM_ONE_FILE": str(ROOT / "dist" / "netloom")}
EVERY_POINT = {"NETLOOM_CRASH_POINTS": "all"}
WHERE = {
    **{group: [path, f"--override-ini=faulthandler_timeout={HOST_TEST_S_MAX}"] for group, path in HOSTS.items()},
    "model": ["tests/model", "-m", "not long"],
    "model-long": ["tests/model", "-m", "long", f"--override-ini=faulthandler_timeout={LONG_GROUP_LIMIT_S}"],
    "binary": ["tests/binary", "tests/e2e", "-m", "binary and not long"],
    "binary-all": ["tests/binary", "tests/e2e"],
    "kernel": ["tests/kernel", "-m", "not long and not machine"],
    "kernel-long": ["tests/kernel", "-m", "long"],
    "kernel-machine": ["tests/kernel", "-m", "machine"],
    "crash-all": ["tests/crash", f"--override-ini=faulthandler_timeout={LONG_GROUP_LIMIT_S}"],
    "load": ["tests/load", "-m", "not long"],
    "load-long": ["tests/load", "-m", "long", f"--override-ini=faulthandler_timeout={LONG_GROUP_LIMIT_S}"],
    "ssh": ["tests/ssh", "-m", "not long"],
    "ssh-long": ["tests/ssh", "-m", "long"],
    # The tests with the mark "binary" run with the one file in that group, with the sources in "e2e-long".
    "e2e": ["tests/e2e", "-m", "not binary and not long"],
    "e2e-long": ["tests/e2e", "-m", "binary or long", f"--override-ini=faulthandler_timeout={LONG_GROUP_LIMIT_S}"],
    "mutants": ["tests/mutants", "-m", "short and not machine"],
    "mutants-all": ["tests/mutants", "-m", "not machine"],
    "mutants-machine": ["tests/mutants", "-m", "machine"],
}
# Files and links that tests of networks might leave on the machine, where they would affect the next run.
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
GROUP_LIMIT_S = 1800
INTERRUPT_GRACE_S = 60
LOOK_S = 0.1  # between two looks for an interrupt
TIMES = ROOT / "docs" / "development.md"


@dataclass
class Result:
    """The result of a group."""

    group: str
    passed: int = 0
    failed: int = 0
    time_s: float = 0.0
    remarks: list[str] = field(default_factory=list)


class Interrupted(Exception):
    """The run was interrupted, so no further process is started."""


class Processes:
    """The processes of this run. An interrupt terminates all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._terminated = False

    def start(self, command: list[str], output: IO[bytes], **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in a new session. Raises Interrupted."""
        with self._lock:
            if self._terminated:
                raise Interrupted
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.append(process)
            return process

    def terminate(self, *processes: subprocess.Popen[bytes]) -> None:
        """Interrupt these processes, or all. Kill the process groups of those that run on after INTERRUPT_GRACE_S."""
        with self._lock:
            self._terminated = self._terminated or not processes
            stopping = list(processes or self._running)
        for process in stopping:
            process.send_signal(signal.SIGINT)  # fixtures delete their namespaces
        until = time.monotonic() + INTERRUPT_GRACE_S
        for process in stopping:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


PROCESSES = Processes()


def main(arguments: list[str]) -> int:
    """The exit status: 0 when nothing failed, 1 after a failure or without root, 130 after an interrupt."""
    parser = argparse.ArgumentParser(description="Run groups of checks.")
    parser.add_argument("--times", action="store_true", help="write the times to the table of the document")
    parser.add_argument("--document", default=str(TIMES), help="the document, docs/development.md by default")
    parser.add_argument("--traces-in", default="/", help="the root directory that tests must leave clean, / by default")
    parser.add_argument("groups", nargs="+", choices=["hosts", *sorted(SIDE_BY_SIDE | PRIVILEGED)], metavar="GROUP")
    options = parser.parse_args(arguments)
    groups: list[str] = [it for group in options.groups for it in (HOSTS if group == "hosts" else [group])]
    privileged = [group for group in groups if group in PRIVILEGED]
    if privileged and os.geteuid() != 0:
        print(f"{', '.join(privileged)}: these tests create network namespaces and need root", file=sys.stderr)
        return 1
    if privileged and not checkout.is_visible(ROOT):
        times = ["--times"] if options.times else []
        document = f"--document={Path(options.document).resolve()}"
        return checkout.run_in_copy(["build/ci/groups.py", document, *times, *groups])
    interrupts: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: interrupts.append(number))
    started = time.monotonic()
    # `make check` tries fewer examples of each property, so that it is short enough to run before every commit.
    profile = "full" if privileged else "quick"
    # The handler only notes the signal, and this thread looks for it. An exception of a handler could arrive between
    # the start of a process and its entry in PROCESSES. A signal just before a wait without a limit would not end it.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_run_all, groups, profile, options.traces_in)
        while not interrupts and not running.done():
            wait([running], LOOK_S)
        if interrupts:
            PROCESSES.terminate()
    if interrupts:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    results = running.result()
    _table(results, time.monotonic() - started)
    failed = any(result.failed for result in results)
    if options.times and not failed:
        _write_times(Path(options.document), results)
    return 1 if failed else 0


def _run_all(groups: list[str], profile: str, where: str) -> list[Result]:
    """The results of all groups. Raises Interrupted."""
    # Emulated machines come first: they take longest, and use one core each.
    first = sorted((it for it in groups if it in SIDE_BY_SIDE or it in HOSTS), key=lambda it: it not in HOSTS)
    before = _traces(where)
    results = _run_side_by_side(first, profile)
    results += _run_side_by_side([it for it in groups if it not in first and it not in ALONE], profile)
    for group in groups:
        results += _run_side_by_side([group], profile) if group in ALONE else []
    machine = Result("machine")
    _check_traces(where, before, machine)
    return [*results, machine] if machine.failed else results


def _run_side_by_side(groups: list[str], profile: str) -> list[Result]:
    """The results in the order of ``groups``."""
    printing = threading.Lock()

    def run(group: str) -> Result:
        with tempfile.TemporaryFile() as output:
            result = _run(group, profile, output)
            output.seek(0)
            with printing:
                print(f"== {group}", flush=True)
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
        return result

    with ThreadPoolExecutor(max(2, CORES)) as pool:
        return list(pool.map(run, groups))


def _run(group: str, profile: str, output: IO[bytes]) -> Result:
    started = time.monotonic()
    result = _static(output) if group == "static" else _pytest(group, profile, output)
    result.time_s = time.monotonic() - started
    return result


def _static(output: IO[bytes]) -> Result:
    result = Result("static")
    with tempfile.TemporaryDirectory(prefix="netloom-static-") as directory:
        running = {}
        for name, (program, *arguments) in STATIC.items():
            output_path = Path(directory, name)
            with output_path.open("wb") as file:
                # lint-imports imports the program, so it needs PYTHONPATH.
                command = [str(BIN / program), *arguments]
                running[name] = output_path, PROCESSES.start(command, file, PYTHONPATH="internal")
        for name, (output_path, process) in running.items():
            if process.wait() == 0:
                result.passed += 1
            else:
                output.write(f"{name} failed:\n".encode() + output_path.read_bytes())
                result.failed += 1
                result.remarks.append(name)
    return result


def _pytest(group: str, profile: str, output: IO[bytes]) -> Result:
    result = Result(group)
    with tempfile.TemporaryDirectory(prefix="netloom-report-") as directory:
        report = Path(directory, "report.xml")
        command = [str(BIN / "python"), "-m", "pytest", *WHERE.get(group, [f"tests/{group}"])]
        command += [f"--hypothesis-profile={profile}", f"--junit-xml={report}"]
        if sys.stdout.isatty():
            command.append("--color=yes")
        left = Path(directory, "left")
        if group in PRIVILEGED and group not in HOSTS and group not in ALONE:
            command = [str(BIN / "python"), str(ROOT / "build/ci/apart.py"), str(left), *command]
        environment = ONE_FILE if group.startswith(("binary", "hosts")) else EVERY_POINT if group == "crash-all" else {}
        limit_s = LONG_GROUP_LIMIT_S if group.endswith(("-long", "-all")) else GROUP_LIMIT_S
        process = PROCESSES.start(command, output, **environment)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            PROCESSES.terminate(process)
            result.failed += 1
            result.remarks.append(f"stopped after {limit_s} s")
            return result
        _count(report, result)
        _note_left(left.read_text().splitlines() if left.exists() else [], result)
    # An exception before the first test gives status 1, too, and then no report names a failure.
    if status not in (0, 1) or (status == 1 and not result.failed):
        result.failed += 1
        result.remarks.append("no tests" if status == 5 else f"pytest ended with {status}")
    return result


def _traces(where: str) -> set[str]:
    return {path for pattern in TRACES for path in glob.glob(where.rstrip("/") + pattern)}


def _check_traces(where: str, before: set[str], result: Result) -> None:
    until = time.monotonic() + apart.TRACES_GO_WITHIN_S
    while (left := _traces(where) - before) and time.monotonic() < until:
        time.sleep(0.1)
    _note_left(sorted(left), result)


def _note_left(left: list[str], result: Result) -> None:
    if left:
        result.failed += 1
        result.remarks.append(f"left behind: {', '.join(left)}")


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


def _table(results: list[Result], elapsed_s: float) -> None:
    width = max(10, *(len(result.group) + 1 for result in results))
    print(f"\n{'group':<{width}}{'passed':>8}{'failed':>8}{'time':>10}")
    for result in results:
        remarks = f"  {'; '.join(result.remarks[:5])}" if result.remarks else ""
        print(f"{result.group:<{width}}{result.passed:>8}{result.failed:>8}{result.time_s:>8.1f} s{remarks}")
    passed, failed = sum(result.passed for result in results), sum(result.failed for result in results)
    print(f"{'':<{width + 16}}{elapsed_s:>8.1f} s\n\n{passed} passed, {failed} failed", flush=True)


def _write_times(document: Path, results: list[Result]) -> None:
    """Replace the row ``| group | tests | time | measured |`` of each group. Raises ValueError for a missing row."""
    text = document.read_text()
    measured = f"{CORES} cores, {time.strftime('%Y-%m-%d', time.gmtime())}"
    for result in results:
        row = f"| {result.group} | {result.passed} | {result.time_s:.0f} s | {measured} |"
        text, count = re.subn(rf"^\| {result.group} (?:\|[^|\n]*){{3}}\|$", row, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{document}: {count} rows for the time of {result.group} instead of one")
    document.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
