"""A call as a process, without a host: its arguments, payload file, descriptors, deadline and exit status.

The helper is off here. For calls through the helper see ``tests/ssh/test_helper.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(REPO / "cmd" / "netloom" / "main.py")]

GOOD = {
    "physical-network-extension-details": {"hosts": "192.0.2.10", "sshkey": "no key", "physicalnetworkname": "p"},
    "network-extension-details": {},
    "payload": {"network_id": "42", "vlan": "1204", "current_details": "{}"},
}


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    kept = tmp_path / "netloom"
    kept.mkdir(mode=0o700)

    def run(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
        # stdin is a pipe without end of file, as CloudStack's is.
        reader, writer = os.pipe()
        try:
            environ = {"NETLOOM_DIR": str(kept), "NETLOOM_HELPER": "0", **how.pop("env", {})}
            how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "check": False, **how}
            return subprocess.run([*PROGRAM, *words], stdin=reader, env=environ, timeout=60, **how)
        finally:
            os.close(reader)
            os.close(writer)

    return run


Call = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line of a refusal."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.isascii()
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    return done.stderr[:-1]


def envelope(**payload: object) -> str:
    return json.dumps({**GOOD, "payload": {**GOOD["payload"], **payload}})


def written(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "call.payload"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("words", [["implement-network"], ["implement-network", "/x"], ["a-b", "/x", "60", "more"]])
def test_a_wrong_number_of_arguments_is_refused_in_one_line(words: list[str], call: Call) -> None:
    line = refused(call(*words))
    assert line == f"{len(words)} arguments instead of 3 (usage: <command> <payload-file> <timeout-seconds>)"


@pytest.mark.parametrize("timeout", ["", "0", "-5", "6e1", "1_0", "60s", "٦٠", "9" * 30, "nan", "60\n", "100000"])
def test_an_invalid_timeout_is_refused(timeout: str, call: Call, tmp_path: Path) -> None:
    assert "is not a number of seconds" in refused(call("implement-network", written(tmp_path, "{}"), timeout))


FILES: dict[str, str] = {
    "missing": "No such file or directory",
    "empty": "empty",
    "blank": "empty",
    "a directory": "not a file",
    "a pipe": "not a file",
    "a device": "not a file",
    "truncated": "not JSON",
    "not UTF-8": "not UTF-8",
    "no object": "where an object is expected",
    "nested deeply": "nested too deeply",
    "no details": "physical-network-extension-details",
    "no hosts": "hosts is missing",
    "no network": "network_id is missing",
    "an option as host": "hosts",
    "an option as user": "username",
    "a megabyte as port": "port",
    "a network id with a path": "network_id",
}


@pytest.mark.mutation("a-registration-names-hosts")
@pytest.mark.parametrize("what", FILES)
def test_defect_57_a_bad_payload_file_is_refused_in_one_line(what: str, call: Call, tmp_path: Path) -> None:
    """Each fault of the file, the envelope or the details is one short line that names it."""
    good = envelope()

    def with_details(**details: object) -> str:
        known = GOOD["physical-network-extension-details"]
        return json.dumps({**GOOD, "physical-network-extension-details": {**known, **details}})

    path = str(tmp_path / "call.payload")
    texts: dict[str, str | bytes] = {
        "empty": b"",
        "blank": b" \n\n",
        "truncated": good[: len(good) // 2],
        "not UTF-8": b"\xff\xfe" + good.encode(),
        "no object": "[1, 2]",
        "nested deeply": "[" * 100_000,
        "no details": json.dumps({"payload": {"network_id": "42"}}),
        "no hosts": with_details(hosts=""),
        "no network": envelope(network_id=""),
        "an option as host": with_details(hosts="-oProxyCommand=touch"),
        "an option as user": with_details(username="-l root"),
        "a megabyte as port": with_details(port="2" * 1_000_000),
        "a network id with a path": envelope(network_id="../../etc"),
    }
    if what in texts:
        written(tmp_path, texts[what])
    elif what == "a directory":
        path = str(tmp_path)
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path = "/dev/null"
    line = refused(call("implement-network", path, "60"))
    assert FILES[what] in line
    assert len(line) < 500
    assert "no key" not in line


def test_an_unknown_command_is_refused_in_one_line(call: Call, tmp_path: Path) -> None:
    line = refused(call("frob-network", written(tmp_path, envelope()), "60"))
    assert line.startswith("'frob-network' is not a command")
    hostile = call("frob\x1b[31m\nnetwork-ü", written(tmp_path, envelope()), "60")
    assert "\x1b" not in refused(hostile)


def test_an_unreadable_payload_file_is_refused_in_one_line(call: Call, tmp_path: Path) -> None:
    path = written(tmp_path, envelope())
    os.chmod(path, 0)
    if os.geteuid() == 0:  # root can read every file; without capabilities the file mode applies
        program = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *PROGRAM]
        done = subprocess.run(
            [*program, "implement-network", path, "60"],
            env={"NETLOOM_DIR": str(tmp_path / "netloom"), "NETLOOM_HELPER": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    else:
        done = call("implement-network", path, "60")
    assert refused(done).endswith("Permission denied")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_are_harmless(closed: str, tmp_path: Path) -> None:
    """A file that the program opens must not get the descriptor number of stdout, or output would overwrite it."""
    path = written(tmp_path, envelope())
    kept = tmp_path / "netloom"
    kept.mkdir(mode=0o700)
    shell = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *PROGRAM, "implement-network", path, "60"],
        env={"NETLOOM_DIR": str(kept), "NETLOOM_HELPER": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert ("sshkey" in done.stderr) == ("2>" not in closed)
    assert Path(path).read_text() == envelope()
    assert (kept / "netloom.log").read_text().count("\n") == 1


def test_output_to_a_closed_pipe_is_harmless(tmp_path: Path) -> None:
    """The reader closes stderr before anything is written."""
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*PROGRAM, "frob-network", written(tmp_path, envelope()), "60"],
        env={"NETLOOM_DIR": str(tmp_path / "none"), "NETLOOM_HELPER": "0"},
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
    ) as process:
        os.close(reader)
        os.close(writer)
        assert process.wait(60) == 1


def call_with_msgspec(
    source: str, tmp_path: Path, *options: str, timeout: str = "60"
) -> subprocess.CompletedProcess[str]:
    """Run a call with this module in place of msgspec, the first module that it loads for its work."""
    instead = tmp_path / "instead"
    instead.mkdir()
    (instead / "msgspec.py").write_text(source)
    program = f"import sys; sys.path[:0] = [{str(instead)!r}, {str(REPO / 'internal')!r}]; sys.argv[0] = '/x/y'\n"
    program += "from netloom.entry import main; main(sys.argv)"
    return subprocess.run(
        [sys.executable, *options, "-c", program, "implement-network", written(tmp_path, envelope()), timeout],
        env={"NETLOOM_DIR": str(tmp_path / "netloom"), "NETLOOM_HELPER": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_an_internal_error_is_one_line_and_its_traceback_is_logged(call: Call, tmp_path: Path) -> None:
    noise = "import os, sys; print('noise'); print('noise', file=sys.stderr); os.system('echo noise; echo noise >&2')\n"
    done = call_with_msgspec(noise + "raise RuntimeError('the secret is hunter2')\n", tmp_path)
    line = refused(done, status=3)
    assert line == "internal error: RuntimeError at msgspec.py:2 while loading the program; the log has more"
    assert "Traceback (most recent call last)" in (tmp_path / "netloom" / "netloom.log").read_text()


def test_a_deadline_missed_before_the_payload_is_read_is_status_2(tmp_path: Path) -> None:
    """The timer of last resort: the process is stopped for longer than its timeout, and exits when it continues."""
    # SIGCONT is repeated, because the first one may arrive before the process stops.
    go_on = "for i in $(seq 100); do kill -CONT {os.getpid()} || exit; sleep 0.2; done"
    stopped = f"import os, signal\nos.system(f'(sleep 1.2; {go_on}) >/dev/null 2>&1 &')\n"
    done = call_with_msgspec(stopped + "os.kill(os.getpid(), signal.SIGSTOP)\n", tmp_path, timeout="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not done within 1 s: still" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_signal_during_an_import_sets_the_exit_status(tmp_path: Path) -> None:
    """The signal handler finds the log module half loaded. Nothing is logged, but the caller still gets its line."""
    half = "import os, signal, sys, types; sys.modules['netloom.extension.log'] = types.ModuleType('half')\n"
    done = call_with_msgspec(half + "os.kill(os.getpid(), signal.SIGHUP)\n", tmp_path)
    assert (done.returncode, done.stdout) == (128 + signal.SIGHUP, "")
    assert done.stderr == "ended by SIGHUP while loading the program\n"


def test_a_signal_during_the_import_of_os_is_logged(tmp_path: Path) -> None:
    """Without site, as in the one file, a call loads os late. Compiled modules abort when os is only half loaded."""
    half = "import sys; sys.modules['os'] = type(sys)('os')\n"
    half += "import posix; posix.kill(posix.getpid(), 15)\n"
    done = call_with_msgspec(half, tmp_path, "-I", "-S")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "ended by SIGTERM while loading the program\n")
    assert "status=143" in (tmp_path / "netloom" / "netloom.log").read_text()
