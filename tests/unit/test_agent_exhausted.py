"""What a host has run out of becomes one line with a remedy; a bug stays a bug."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import netloom
from fakehost import FakeClock, FakeLog
from netloom.agent import exhausted
from netloom.agent.kernel.namespaces import NamespaceError
from netloom.agent.serve import REPORT_EVERY_S, LoopErrors
from netloom.errors import HostRefused

SCARCE: dict[str, tuple[BaseException, str, str]] = {
    "descriptors": (OSError(errno.EMFILE, "x"), "implement-network: Too many open files", "LimitNOFILE"),
    "processes": (BlockingIOError(errno.EAGAIN, "x"), "implement-network: Resource temporarily", "kernel.pid_max"),
    "threads": (RuntimeError("can't start new thread"), "implement-network: Resource temporarily", "TasksMax"),
    "memory": (MemoryError(), "implement-network: Cannot allocate memory", "too little memory"),
    "a read-only disk": (OSError(errno.EROFS, "x"), "implement-network: Read-only file system", "disk writable"),
}


@pytest.mark.parametrize("scarce", SCARCE)
def test_a_scarce_resource_is_named_with_its_remedy(scarce: str) -> None:
    error, says, remedy = SCARCE[scarce]
    refused = exhausted.refusal(error, "implement-network")
    assert refused is not None
    assert refused.message.startswith(says)
    assert remedy in refused.hint == exhausted.remedy(error)


def test_an_error_has_the_remedy_of_its_cause() -> None:
    refused = HostRefused("create namespace cs-net-204")
    refused.__cause__ = OSError(errno.EMFILE, "x")
    for it in (refused, NamespaceError("create namespace cs-net-204", errno=errno.EMFILE)):
        assert "LimitNOFILE" in exhausted.remedy(it)
        assert exhausted.refusal(it, "implement-network") is None


@pytest.mark.parametrize("bug", [FileNotFoundError(errno.ENOENT, "x"), RuntimeError("x"), KeyError("x")])
def test_a_bug_is_no_scarce_resource(bug: Exception) -> None:
    assert (exhausted.refusal(bug, "implement-network"), exhausted.remedy(bug)) == (None, "")


@pytest.mark.mutation("the-loop-reports-an-error-once")
def test_the_event_loop_reports_the_same_error_once_a_minute() -> None:
    async def scenario() -> list[str]:
        log, clock = FakeLog(), FakeClock()
        report = LoopErrors(log, clock)
        loop = asyncio.get_running_loop()
        refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        for _ in range(2):
            for _ in range(128):
                report(loop, {"message": "socket.accept() out of system resource", "exception": refused})
            await clock.advance(REPORT_EVERY_S)
        report(loop, {"message": "a task failed", "exception": KeyError("FAKE-secret")})
        return log.lines

    first, second, *bug = asyncio.run(scenario())
    assert first == second
    assert first.startswith("event loop: socket.accept() out of system resource: Too many open files (")
    assert bug[0] == "event loop: a task failed bug: KeyError"
    assert "FAKE-secret" not in "".join(bug)


LOST_THREADS = {
    "a thread": "import threading; it = threading.Thread(target=broken); it.start(); it.join()",
    # The result of the work cannot be stored either.
    "a worker": "from concurrent.futures import Future, ThreadPoolExecutor; Future.set_exception = broken; "
    "ThreadPoolExecutor().submit(broken); time.sleep(20)",
}


@pytest.mark.mutation("an-agent-that-lost-a-thread-ends")
@pytest.mark.mutation("an-agent-that-lost-a-worker-ends")
@pytest.mark.parametrize("lost", LOST_THREADS)
def test_an_agent_that_lost_a_thread_ends(lost: str) -> None:
    program = f"""
import time
from netloom.agent.serve import end_with_any_thread
def broken(*_):
    raise MemoryError
end_with_any_thread()
{LOST_THREADS[lost]}
"""
    environment = os.environ | {"PYTHONPATH": str(Path(netloom.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert b"a thread ended by an exception" in done.stderr
