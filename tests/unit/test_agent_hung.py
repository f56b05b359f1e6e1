"""An agent that hangs is told apart from a slow one. Real processes, simulated time."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netloom.agent import hung
from netloom.agent.hung import SAMPLE_S, SILENT_S_MAX, Silence, agent_pid, end
from netloom.agent.setup import install

HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1] + "/agent.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(1000)
"""
Sample = tuple[str, int, int]  # state, CPU ticks, page faults


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock of an agent and sleeps."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def judged(monkeypatch: pytest.MonkeyPatch, samples: list[Sample], every_s: float = SAMPLE_S) -> float:
    """The time in seconds at which these samples say that the agent hangs; 0: they do not."""
    silence = Silence(1)
    for number, (state, ticks, faults) in enumerate(samples):
        now = number * every_s
        monkeypatch.setattr(silence, "_sample", lambda now=now, it=(state, ticks, faults): (now, *it))
        if silence.hangs(now):
            return now
    return 0.0


def test_a_sleeping_or_stopped_agent_that_does_not_answer_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in "STD":
        assert judged(monkeypatch, [(state, 7, 7)] * 100) == SILENT_S_MAX
    # A thread that waits in vain for Python's lock wakes 200 times a second, and uses a tick in five seconds.
    assert judged(monkeypatch, [("S", number // 10, 7) for number in range(100)]) == SILENT_S_MAX


@pytest.mark.mutation("an-agent-that-wants-the-cpu-lives")
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param([("R", 7, 7)] * 200, id="waits-for-the-cpu"),
        pytest.param([("SR"[number % 4 == 0], 7, 7) for number in range(200)], id="waits-for-the-cpu-now-and-then"),
        pytest.param([("S", number // 3, 7) for number in range(200)], id="runs-a-little"),
        pytest.param([("D", 7, number // 2) for number in range(200)], id="waits-for-pages"),
        pytest.param([("t", 7, 7)] * 200, id="traced-by-an-operator"),
    ],
)
def test_a_slow_agent_does_not_hang(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judged(monkeypatch, samples)


def test_an_agent_that_has_the_cpu_and_does_not_answer_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks_per_sample = int(os.sysconf("SC_CLK_TCK") * SAMPLE_S)
    samples: list[Sample] = [("R", number * ticks_per_sample, 7) for number in range(100)]
    assert judged(monkeypatch, samples) == SILENT_S_MAX


@pytest.mark.mutation("late-samples-prove-nothing", instead="before is None or self._last is None")
def test_an_overloaded_machine_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judged(monkeypatch, [("S", 7, 7)] * 100, every_s=3.0)


def test_samples_are_spread_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(monkeypatch, [("S", 7, 7)] * 300, every_s=SAMPLE_S / 5) >= SILENT_S_MAX * 0.9


def test_a_real_process_is_judged_by_what_the_kernel_says(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert agent_pid(str(tmp_path)) == holder.pid
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
    silence = Silence(holder.pid)
    assert [silence.hangs(number * SAMPLE_S) for number in range(31)] == [False] * 30 + [True]
    assert not any(Silence(0).hangs(number * SAMPLE_S) for number in range(100))


def test_a_stopped_agent_is_ended(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGSTOP)
    end(str(tmp_path), holder.pid)
    assert holder.wait(20) in (-signal.SIGABRT, -signal.SIGKILL)
    assert agent_pid(str(tmp_path)) == 0
    end(str(tmp_path), holder.pid)


def test_a_stopped_agent_whose_backlog_is_full_has_a_pid(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """So ``install``, ``rollback`` and ``uninstall`` can end it."""
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        assert install.running(path) == install.Running(holder.pid, None)


@pytest.mark.mutation("only-the-holder-of-the-lock-is-ended")
def test_a_process_that_does_not_hold_the_lock_is_not_ended(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "1000"])
    try:
        with open(tmp_path / "agent.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert agent_pid(str(tmp_path)) == os.getpid()
            end(str(tmp_path), other.pid)
        assert agent_pid(str(tmp_path)) == 0
        end(str(tmp_path), other.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_limits_are_generous() -> None:
    """A call has about 57 s. A hung agent is replaced within it, and a machine may be slow for ten seconds."""
    assert 10 < hung.SILENT_S_MAX < 25
