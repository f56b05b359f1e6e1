"""The process that starts the services."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernel.agent_host import wait_until
from kernel.scratch import descriptors, scratch
from netloom.agent.kernel.namespaces import NamespaceError, identity
from netloom.agent.processes.launcher import Launcher
from netloom.agent.processes.process import namespace_of, open_log, start_time
from netloom.errors import HostRefused

UID = 0x7E7F1234


@pytest.fixture
def namespace() -> Iterator[str]:
    with scratch() as name:
        yield name


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    it = Launcher()
    yield it
    it.close()


def launched(launcher: Launcher, namespace: str, directory: Path, script: str) -> tuple[int, Path]:
    """The pid of a shell that executes the script, and the file with its output."""
    log = directory / "log"
    output = open_log(log)
    try:
        confined = [str(UID), str(directory), "", "net_raw", "", "64", "/bin/sh", "-c", script]
        return launcher.launch(confined, namespace, output), log
    finally:
        os.close(output)


def ended(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def pid_of(launcher: Launcher) -> int:
    assert launcher._process is not None
    return launcher._process.pid


def test_a_program_is_confined_in_its_namespace_as_leader_of_a_session(
    launcher: Launcher, namespace: str, tmp_path: Path
) -> None:
    pid, log = launched(launcher, namespace, tmp_path, "id -u; sleep 60")
    wait_until(lambda: log.read_text() == f"{UID}\n")
    assert namespace_of(pid) == identity(namespace)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"Uid:\t{UID}\t{UID}" in status
    assert "CapEff:\t0000000000002000" in status
    ignored = int(re.search(r"SigIgn:\t(\w+)", status)[1], 16)  # type: ignore[index]
    assert not ignored & 1 << signal.SIGCHLD - 1, "the program may wait for its children"
    opened = {int(it): os.readlink(f"/proc/{pid}/fd/{it}") for it in os.listdir(f"/proc/{pid}/fd")}
    assert {fd: opened[fd] for fd in (0, 1, 2)} == {0: "/dev/null", 1: str(log), 2: str(log)}
    assert not any("socket:" in it or "net:" in it for it in opened.values())
    os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid))


@pytest.mark.mutation("a-process-has-its-group-when-it-is-known", instead="None")
def test_a_process_has_its_group_when_its_pid_is_known(launcher: Launcher, namespace: str, tmp_path: Path) -> None:
    """Who ends the service ends its group."""
    for _ in range(50):
        pid, _log = launched(launcher, namespace, tmp_path, "sleep 60")
        os.killpg(pid, signal.SIGKILL)


def test_the_launcher_starts_many_and_leaves_no_zombies(launcher: Launcher, namespace: str, tmp_path: Path) -> None:
    pids = [launched(launcher, namespace, tmp_path, "exit 3")[0] for _ in range(20)]
    assert len(set(pids)) == 20
    for pid in pids:
        wait_until(lambda pid=pid: ended(pid))


def test_after_a_pause_there_is_another_launcher(namespace: str, tmp_path: Path) -> None:
    launcher = Launcher(idle_s=0.1)
    first, _ = launched(launcher, namespace, tmp_path, "sleep 60")
    old = pid_of(launcher)
    wait_until(lambda: start_time(old) is None)
    assert start_time(first) is not None, "what it started goes on"
    second, _ = launched(launcher, namespace, tmp_path, "sleep 60")
    assert start_time(second) is not None
    os.killpg(first, signal.SIGKILL)
    os.killpg(second, signal.SIGKILL)
    launcher.close()


def test_a_launcher_that_is_killed_during_a_start_fails_it_and_no_other(
    launcher: Launcher, namespace: str, tmp_path: Path
) -> None:
    """Perhaps it has started the process, so it is not started once more at once."""
    launched(launcher, namespace, tmp_path, "exit 0")
    pid = pid_of(launcher)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(launched, launcher, namespace, tmp_path, "exit 0")
        wait_until(launcher._lock.locked)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(HostRefused, match="status -9"):
            starting.result()
    launched(launcher, namespace, tmp_path, "exit 0")


def test_a_launcher_that_ends_by_itself_leaves_nothing(namespace: str, tmp_path: Path) -> None:
    before = descriptors()
    launcher = Launcher(idle_s=0.1)
    launched(launcher, namespace, tmp_path, "exit 0")
    pid = pid_of(launcher)
    wait_until(lambda: ended(pid) and descriptors() == before)


def test_what_cannot_be_started_is_refused(launcher: Launcher, namespace: str, tmp_path: Path) -> None:
    with pytest.raises(NamespaceError):
        launched(launcher, "missing", tmp_path, "exit 0")
    with pytest.raises(HostRefused, match="longer than"):
        launched(launcher, namespace, tmp_path, "x" * 70_000)
    launched(launcher, namespace, tmp_path, "exit 0")


def test_the_launcher_ends_with_the_agent(namespace: str, tmp_path: Path) -> None:
    """Its socket is closed then."""
    launcher = Launcher()
    launched(launcher, namespace, tmp_path, "exit 0")
    pid = pid_of(launcher)
    launcher.close()
    assert ended(pid)
