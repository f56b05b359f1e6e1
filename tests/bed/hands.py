"""The test's end of a process of the bed: requests out, typed answers back."""

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

PROGRAM = Path(__file__).with_name("inside.py")
START_TIMEOUT_S = 30.0
# Longer than any single request may take inside (inside, 120 s is the most), so that the inside speaks first.
ANSWER_TIMEOUT_S = 150.0


class BedError(Exception):
    """The bed itself failed: a process of it died, or an operation inside it raised."""


class Refused(BedError):
    """An operation inside the bed raised; ``errno`` is the system's number where there was one."""

    def __init__(self, text: str, errno: int | None) -> None:
        super().__init__(text)
        self.errno = errno


class Running(Generic[T]):
    """An operation under way."""

    def __init__(
        self, hands: Hands, number: int, answer: Future[Any], ready: threading.Event, shape: Callable[[Any], T]
    ):
        self._hands, self._number, self._answer, self._ready, self._shape = hands, number, answer, ready, shape

    def wait_ready(self, timeout_s: float = 10.0) -> Running[T]:
        """Until a watch watches, or a transfer is connected. Raises what the operation raised, or TimeoutError."""
        self._answer.add_done_callback(lambda _: self._ready.set())
        if not self._ready.wait(timeout_s):
            raise TimeoutError("the operation did not begin")
        if self._answer.done():
            self._answer.result()
        return self

    def result(self, timeout_s: float = ANSWER_TIMEOUT_S) -> T:
        """The answer, when it is there. Raises Refused, or TimeoutError."""
        return self._shape(self._answer.result(timeout_s))

    def stop(self) -> T:
        """End it early; its answer up to now."""
        self._hands.tell({"id": self._number, "operation": "stop"})
        return self.result()

    @property
    def done(self) -> bool:
        return self._answer.done()


class Hands:
    """One process inside some namespaces. ``pid`` is its process id as the test sees it."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.name = name
        self.pid = 0
        self._number = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Future[Any], threading.Event]] = {}
        self._up = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(PROGRAM), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        )
        self._reader = threading.Thread(target=self._read, name=f"bed {name}", daemon=True)
        self._reader.start()

    def wait_up(self) -> Hands:
        """Until it serves. Raises BedError with what it printed when it does not."""
        if not self._up.wait(START_TIMEOUT_S) or self._process.poll() is not None:
            raise BedError(f"{self.name} did not start: {self._last_words()}")
        return self

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        with self._lock:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise BedError(f"{self.name} is gone: {self._last_words()}") from error

    def start(self, operation: str, shape: Callable[[Any], T], /, **arguments: Any) -> Running[T]:
        with self._lock:
            self._number += 1
            number = self._number
            answer: Future[Any] = Future()
            ready = threading.Event()
            self._waiting[number] = (answer, ready)
        self.tell({"id": number, "operation": operation, "arguments": arguments})
        return Running(self, number, answer, ready, shape)

    def call(self, operation: str, /, **arguments: Any) -> Any:
        """Do it and wait. Raises Refused when it raised inside."""
        return self.start(operation, lambda value: value, **arguments).result()

    def end(self) -> None:
        """Close its stdin, which ends it, and wait for it."""
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
        self._up.set()
        for answer, _ in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(BedError(f"{self.name} ended"))

    def _last_words(self) -> str:
        try:
            self._errors.seek(0)
            return self._errors.read().decode("utf-8", "replace")[-2000:]
        except ValueError:
            return "it was closed"
