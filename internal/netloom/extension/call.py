"""CloudStack's call, ``<command> <payload-file> <timeout-seconds>``, from the first instruction to the exit.

In the one file, build/nuitka/call.c answers most calls before Python starts. This module gets the others.

Import only modules that the interpreter has already loaded (tests/unit/test_entry.py lists them): every call pays for
them. CloudStack waits for our exit without a timeout, so we enforce the deadline ourselves: a timer and the signals end
the process wherever it is, and ``os._exit`` does not wait for threads.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the C module: signal.py adds enums to it, a third of a bare start-up
import time

from netloom.errors import BadRequest, ascii_only, one_line
from netloom.extension.deadline import Deadline, parse_timeout, process_started
from netloom.extension.helper_client import ask_helper
from netloom.extension.record import CallRecord, failure
from netloom.fastos import os
from netloom.program import begun

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

USAGE = "usage: <command> <payload-file> <timeout-seconds>"

# The largest legitimate payload has some hundred megabytes: a restore with 1 MB of user data for each VM.
_PAYLOAD_BYTES_MAX = 1 << 30

_ENDING_SIGNALS = {"SIGTERM": _signal.SIGTERM, "SIGINT": _signal.SIGINT, "SIGHUP": _signal.SIGHUP}


class Ending:
    """The caller's stdout and stderr, and the only way to exit.

    The two descriptors are duplicated, and 0, 1 and 2 are then redirected to /dev/null: output of a library or of a
    child process cannot reach CloudStack. The stdin that CloudStack gives us never ends, so nobody may read it.
    """

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        null = os.open(os.devnull, os.O_RDWR)
        while null < 3:  # the caller had closed one of 0, 1, 2: keep our descriptors above them
            null = os.dup(null)
        self._stdout = os.dup(1)  # not inherited by children, as all descriptors that Python opens
        self._stderr = os.dup(2)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        self._has_written = False

    def end(self, status: int, *, output: str = "", error: str = "", logged: bool = False) -> NoReturn:
        """Write either ``error`` or ``output``, close both streams, write the log line unless ``logged``, and exit."""
        try:
            if not self._has_written:  # a signal may arrive during the write and call us again
                self._has_written = True
                if error:
                    _write(self._stderr, one_line(error) + "\n")
                elif output and not _write(self._stdout, ascii_only(output).rstrip("\n") + "\n"):
                    status, error = 3, "the output could not be written: the caller had closed it"
                    logged = False
                os.close(self._stdout)
                os.close(self._stderr)
                if not logged:
                    from netloom.extension.log import write_down  # not needed before the answer is written

                    write_down(self.record, status, error, os.environ)
        finally:  # a signal may arrive while the log module is half imported; the exit status must be right anyway
            os._exit(status)


def _write(fd: int, text: str) -> bool:
    data = text.encode("ascii", "backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True


def call(arguments: list[str], *, executable: str) -> NoReturn:
    """Run CloudStack's call and exit: status 0, or one line on stderr and status 1, 2 or 3.

    ``executable``: the path by which this program was called; its directory is part of the default owner.
    """
    record = CallRecord(process_started())
    ending = Ending(record)
    _end_on_signals(ending)  # guard: a-signal-ends-the-call
    try:
        output = _run(arguments, executable, ending)
    except Exception as error:  # noqa: BLE001  # the only place in a call that catches everything
        status, message = failure(error, record)
        ending.end(status, error=message)
    ending.end(0, output=output)


def _run(arguments: list[str], executable: str, ending: Ending) -> str:
    record = ending.record
    if arguments:
        record.command = arguments[0]
    if len(arguments) != 3:
        raise BadRequest(f"{len(arguments)} arguments instead of 3", hint=USAGE)
    command, path, timeout = arguments
    failed = _take_over(begun(), ending)
    deadline = Deadline(parse_timeout(timeout), record.started)
    _end_on_time(deadline, ending)
    record.doing = "reading the payload"
    payload_file = read_payload(path)
    record.doing = "asking the helper"
    answer = ask_helper(command, executable, payload_file, deadline, record, os.environ, failed)
    if answer is not None:
        status, output, error = answer
        ending.end(status, output=output, error=error, logged=True)
    record.doing = "loading the program"
    from netloom.extension.run import run_blocking  # msgspec, asyncio and asyncssh: thirty bare start-ups

    return run_blocking(command, payload_file, deadline, executable, record)


def _take_over(begun: str, ending: Ending) -> tuple[str, ...]:
    """Continue the call that build/nuitka/call.c has begun with the helper; its call.h has the form of ``begun``.

    Returns how the helper failed, for ask_helper; nothing when no call was begun. A complete answer is printed.
    """
    if not begun:
        return ()
    # The same call id: the agents must recognise what the helper may have sent them already.
    ending.record.call_id, started, *what = begun.split(" ", 4)
    ending.record.started = float(started)
    match what:
        case "output", status, text:
            ending.end(int(status), output=text, logged=True)
        case "error", status, text:
            ending.end(int(status), error=text, logged=True)
    return tuple(what)


def read_payload(path: str) -> bytes:
    """The bytes of the payload file. Raises BadRequest when it is missing, unreadable, empty or not a regular file."""
    try:
        # Without O_NONBLOCK, opening a named pipe without a writer would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise BadRequest(f"payload file {path[:200]}: {_why(error)}") from error
    try:
        found = os.fstat(fd)
        if found.st_mode & 0o170000 != 0o100000:
            raise BadRequest(f"payload file {path[:200]}: not a file")
        if found.st_size > _PAYLOAD_BYTES_MAX:
            raise BadRequest(f"payload file {path[:200]}: {found.st_size} bytes are too many")
        chunks = []
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
    except OSError as error:
        raise BadRequest(f"payload file {path[:200]}: {_why(error)}") from error
    finally:
        os.close(fd)
    data = b"".join(chunks)
    if not data.strip():
        raise BadRequest(f"payload file {path[:200]}: empty")
    return data


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _end_on_signals(ending: Ending) -> None:
    names = {number: name for name, number in _ENDING_SIGNALS.items()}

    def stop(number: int, frame: object) -> None:
        ending.end(128 + number, error=f"ended by {names[number]} while {ending.record.doing}")

    for number in names:
        _signal.signal(number, stop)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, names)  # build/nuitka/start.c has blocked them


def _end_on_time(deadline: Deadline, ending: Ending) -> None:
    """Exit with status 2 half a margin after the deadline, even if the program hangs then."""

    def stop(number: int, frame: object) -> None:
        record = ending.record
        where = "" if record.host == "-" else f"{record.host}: "
        late = f"{where}not done within {deadline.timeout_s:.0f} s: still {record.doing}"
        ending.end(2, error=f"{late} (is this server overloaded?)")

    _signal.signal(_signal.SIGALRM, stop)
    # setitimer(2): 0 would disarm the timer.
    _signal.setitimer(_signal.ITIMER_REAL, max(0.001, deadline.ends + deadline.margin_s / 2 - time.monotonic()))
