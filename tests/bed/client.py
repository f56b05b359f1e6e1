"""The client side of a bed process: starts ``bed/child.py``, sends requests and returns the answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PROGRAM = Path(__file__).with_name("child.py")
START_TIMEOUT_S = 60.0
# Longer than the longest request in the process (120 s), so that the process reports its own timeout first.
ANSWER_TIMEOUT_S = 150.0


class BedError(Exception):
    """The bed itself failed: one of its processes died, or an operation in a process raised an exception."""


class Refused(BedError):
    """An operation in a bed process raised an exception; ``errno`` is that of the exception, if it has one."""

    def __init__(self, text: str, errno: int | None) -> None:
        super().__init__(text)
        self.errno = errno


class Running(Generic[T]):
    """A request that has been sent and not yet been answered."""

    def __init__(
        self, client: Client, number: int, answer: Future[Any], ready: threading.Event, shape: Callable[[Any], T]
    ):
        self._client, self._number, self._answer, self._ready, self._shape = client, number, answer, ready, shape

    def wait_ready(self, timeout_s: float = 60.0) -> Running[T]:
        """Wait until the operation has started: a watch records, a transfer is connected.

        Raises the exception of the operation, or TimeoutError after ``timeout_s`` seconds.
        """
        self._answer.add_done_callback(lambda _: self._ready.set())
        if not self._ready.wait(timeout_s):
            raise TimeoutError("the operation did not begin")
        if self._answer.done():
            self._answer.result()
        return self

    def result(self, timeout_s: float = ANSWER_TIMEOUT_S) -> T:
        """Wait for the answer. Raises Refused, or TimeoutError after ``timeout_s`` seconds."""
        return self._shape(self._answer.result(timeout_s))

    def stop(self) -> T:
        """Stop the operation; returns its answer so far."""
        self._client.send({"id": self._number, "operation": "stop"})
        return self.result()

    @property
    def done(self) -> bool:
        return self._answer.done()


def _start_here(specification: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", str(PROGRAM), specification]


class Client:
    """One bed process in its namespaces. ``pid`` is its process id as the process itself or its parent sees it.

    ``command`` makes the command that starts the process from the specification as JSON.
    """

    def __init__(self, name: str, spec: dict[str, Any], command: Callable[[str], list[str]] = _start_here) -> None:
        self.name = name
        self.pid = 0
        self._number = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Future[Any], threading.Event]] = {}
        self._up = threading.Event()
        self._ended = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command(json.dumps(spec)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        )
        self._reader = threading.Thread(target=self._read, name=f"bed {name}", daemon=True)
        self._reader.start()

    def wait_up(self) -> Client:
        """Wait until the process accepts requests. Raises BedError with its stderr when it does not."""
        if not self._up.wait(START_TIMEOUT_S) or self._ended:
            raise BedError(f"{self.name} did not start: {self._stderr_text()}")
        return self

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        with self._lock:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise BedError(f"{self.name} is gone: {self._stderr_text()}") from error

    def start(self, operation: str, shape: Callable[[Any], T], /, **arguments: Any) -> Running[T]:
        with self._lock:
            self._number += 1
            number = self._number
            answer: Future[Any] = Future()
            ready = threading.Event()
            self._waiting[number] = (answer, ready)
        self.send({"id": number, "operation": operation, "arguments": arguments})
        return Running(self, number, answer, ready, shape)

    def call(self, operation: str, /, **arguments: Any) -> Any:
        """Send a request and wait for its answer. Raises Refused when the operation raised an exception."""
        return self.start(operation, lambda value: value, **arguments).result()

    def end(self) -> None:
        """Close the stdin of the process, which ends it, and wait for its exit."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with self._lock, contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "pid" in message:
                self.pid = message["pid"]
            elif "id" not in message:
                self._up.set()
            elif message.get("ready"):
                self._waiting[message["id"]][1].set()
            else:
                answer, _ = self._waiting.pop(message["id"])
                if "error" in message:
                    answer.set_exception(
                        Refused(f"in {self.name}: {message['error']}\n{message['traceback']}", message["errno"])
                    )
                else:
                    answer.set_result(message["value"])
        self._ended = True  # before the event: a process that is about to exit still has no exit status
        self._up.set()
        for answer, _ in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(BedError(f"{self.name} ended"))

    def _stderr_text(self) -> str:
        try:
            self._errors.seek(0)
            return self._errors.read().decode("utf-8", "replace")[-2000:]
        except ValueError:
            return "it was closed"
