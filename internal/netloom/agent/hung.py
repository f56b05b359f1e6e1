"""Tell an agent that hangs from a slow one, and end it.

The process of the agent is the one that holds the agent's lock. The kernel names it (proc_locks(5)), so there is no pid
file that could name another process. ``netloom agent connect`` loads this module, so it imports little.
"""

from __future__ import annotations

import os
import select
import signal

SAMPLE_S = 0.5  # between two samples
SILENT_S_MAX = 15.0  # without an answer and without a wish for the CPU; or the CPU time that was used without an answer
_SAMPLES = int(SILENT_S_MAX / SAMPLE_S)
_ACTIVE_MAX = _SAMPLES // 5  # a thread that waits in vain for Python's lock (GIL) wakes now and then
_LATE_S = 2.0  # between two samples: the machine is overloaded, and the silence proves nothing

_TRACEBACK_S = 3.0  # SIGABRT writes the stacks of all threads to stderr, the journal or the log (serve.py)
_KILL_S = 10.0


def agent_pid(directory: str) -> int:
    """The process that holds the lock of the agent in ``directory``; 0 when none does."""
    try:
        file = os.stat(f"{directory}/agent.lock")
        with open("/proc/locks") as locks:
            lines = locks.read().splitlines()
    except OSError:
        return 0
    of_lock = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 708 00:1a:1234 0 EOF
        words = line.split()
        if words[1] == "FLOCK" and words[5] == of_lock:
            return int(words[4])
    return 0


class Silence:
    """Samples of an agent that has not answered a question yet. ``pid``: 0 when it is not known.

    Ask ``hangs`` at least every ``SAMPLE_S`` seconds from the question on.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._last: tuple[float, str, int, int] | None = None  # time, state, CPU ticks, page faults that read a disk
        self._samples = 0
        self._active = 0
        self._ran_s = 0.0

    def hangs(self, now: float) -> bool:
        """Take a sample if one is due; whether the agent hangs by now. ``now``: the monotonic time in seconds.

        A living agent wants the CPU as soon as it is asked: its main thread runs, or waits for the CPU or for a page.
        An agent hangs when it wants no CPU for SILENT_S_MAX seconds, or has used so much CPU time and not answered.
        """
        if self._last is not None and now - self._last[0] < SAMPLE_S * 0.9:
            return False
        before, self._last = self._last, self._sample(now)
        if before is None or self._last is None or now - before[0] > _LATE_S:  # guard: late-samples-prove-nothing
            self._samples = self._active = 0
            self._ran_s = 0.0
            return False
        _, state, ticks, faults = self._last
        self._samples += 1
        self._ran_s += (ticks - before[2]) / os.sysconf("SC_CLK_TCK")
        # Sleeping, stopped or in the kernel. A traced process is an operator's business.
        if state not in "SDT" or ticks != before[2] or faults != before[3]:  # guard: an-agent-that-wants-the-cpu-lives
            self._active += 1
        if self._ran_s >= SILENT_S_MAX:
            return True
        if self._samples < _SAMPLES:
            return False
        idle = self._active <= _ACTIVE_MAX
        self._samples = self._active = 0
        return idle

    def _sample(self, now: float) -> tuple[float, str, int, int] | None:
        """The state of the agent's main thread (proc_pid_stat(5)); None when it cannot be read."""
        if not self.pid:
            return None
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        return now, fields[0].decode(), int(fields[11]) + int(fields[12]), int(fields[9])


def end(directory: str, pid: int) -> None:
    """End the agent with this pid, if it still holds the lock in ``directory``. It writes the stacks of its threads.

    The networks keep running. Raises OSError when the process does not end.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if agent_pid(directory) != pid:  # guard: only-the-holder-of-the-lock-is-ended
            return
        for number, wait_s in ((signal.SIGABRT, _TRACEBACK_S), (signal.SIGKILL, _KILL_S)):
            try:
                signal.pidfd_send_signal(process, number)
                signal.pidfd_send_signal(process, signal.SIGCONT)  # a stopped process handles no SIGABRT
            except ProcessLookupError:
                return
            if select.select([process], [], [], wait_s)[0]:
                return
    finally:
        os.close(process)
    raise OSError(f"the agent (process {pid}) hangs and cannot be killed: is the kernel hung? see dmesg")
