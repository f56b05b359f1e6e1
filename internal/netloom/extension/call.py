"""CloudStack's call: ``<command> <payload-file> <timeout-seconds>``, from the first instruction to the last.

What is imported here is what an interpreter has loaded anyway; a test lists it. The caller reads our output to its end
and then waits without limit, so the end is ours to keep: a timer and the signals end the process wherever
it is, and ``os._exit`` leaves no thread behind that could hold it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the C module: signal.py adds enums to it, a third of a bare start-up
import time

from netloom.errors import BadRequest, NetloomError, one_line
from netloom.extension.deadline import Deadline, parse_timeout, process_started
from netloom.extension.helper_client import hand_over
from netloom.fastos import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

USAGE = "usage: <command> <payload-file> <timeout-seconds>"

# The protocol's largest honest payload is some hundred megabytes: user data of 1 MB for each VM of a restore.
_PAYLOAD_BYTES_MAX = 1 << 30

_ENDING_SIGNALS = {"SIGTERM": _signal.SIGTERM, "SIGINT": _signal.SIGINT, "SIGHUP": _signal.SIGHUP}


class Story:
    """What is known of a call so far: for its log line, and for the last words when it is ended from outside."""

    __slots__ = ("call_id", "command", "doing", "host", "scope_id", "started", "trouble")

    def __init__(self, started: float) -> None:
        self.started = started
        self.call_id = os.urandom(16).hex()
        self.command = "-"
        self.scope_id = "-"
        self.host = "-"
        self.doing = "starting"
        self.trouble = ""  # a traceback, for the log alone


class Ending:
    """The caller's stdout and stderr, and the one way out of the process.

    The two descriptors are kept apart and 0, 1 and 2 are pointed at /dev/null: whatever a library prints, and
    whatever a child inherits, cannot reach CloudStack. Nobody reads the stdin we were given; it never ends.
    """

    def __init__(self, story: Story) -> None:
        self.story = story
        null = os.open(os.devnull, os.O_RDWR)
        while null < 3:  # the caller closed one of 0, 1, 2: nothing of ours may land there
            null = os.dup(null)
        self._stdout = os.dup(1)  # not inheritable, as all that Python opens
        self._stderr = os.dup(2)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        self._said = False

    def end(self, status: int, *, output: str = "", error: str = "", logged: bool = False) -> NoReturn:
        """Say one thing on one stream, close both, write the log line unless the helper did, and end at once."""
        try:
            if not self._said:  # a signal may come while the last word is being written
                self._said = True
                if error:
                    _write(self._stderr, one_line(error) + "\n")
                elif output and not _write(self._stdout, ascii_only(output).rstrip("\n") + "\n"):
                    status, error = 3, "the output could not be written: the caller had closed it"
                    logged = False
                os.close(self._stdout)
                os.close(self._stderr)
                if not logged:
                    from netloom.extension.log import write_down  # small, and not needed before the answer is out

                    write_down(self.story, status, error, os.environ)
        finally:  # a signal may come while the log's own module is half loaded: its status is the one that counts
            os._exit(status)


def _write(fd: int, text: str) -> bool:
    data = text.encode("ascii", "backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True


def ascii_only(text: str) -> str:
    r"""``text`` in ASCII: CloudStack decodes us in its server's default character set.

    Other characters become ``\uXXXX``, in UTF-16 units: inside JSON the same text, elsewhere still readable.
    """
    if text.isascii():
        return text
    units = (text[i].encode("utf-16-be", "surrogatepass") for i in range(len(text)))
    return "".join(
        chr(unit[1]) if len(unit) == 2 and unit[0] == 0 and unit[1] < 0x80 else _escaped(unit) for unit in units
    )


def _escaped(units: bytes) -> str:
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def call(words: list[str], *, executable: str) -> NoReturn:
    """Carry out CloudStack's call and end the process: status 0, or one line on stderr and 1, 2 or 3.

    ``executable``: the path by which this program was called; its directory is part of the default owner.
    """
    story = Story(process_started())
    ending = Ending(story)
    _end_on_signals(ending)  # guard: a-signal-ends-the-call
    try:
        output = _carry_out(words, executable, ending)
    except Exception as error:  # noqa: BLE001  # the one place
        status, said = failure(error, story)
        ending.end(status, error=said)
    ending.end(0, output=output)


def failure(error: Exception, story: Story) -> tuple[int, str]:
    """Exit status and line of a call that raised ``error``; a bug keeps its traceback, in the story."""
    if isinstance(error, NetloomError):
        return error.exit_code, str(error)
    import traceback  # only now: linecache, tokenize, re

    story.trouble = "".join(traceback.format_exception(error))
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return 3, f"internal error: {type(error).__name__} at {place} while {story.doing}; the log has more"


def _carry_out(words: list[str], executable: str, ending: Ending) -> str:
    story = ending.story
    if words:
        story.command = words[0]
    if len(words) != 3:
        raise BadRequest(f"{len(words)} arguments instead of 3", hint=USAGE)
    command, path, timeout = words
    deadline = Deadline(parse_timeout(timeout), story.started)
    _end_on_time(deadline, ending)
    story.doing = "reading the payload"
    payload = read_payload(path)
    story.doing = "asking the helper"
    answer = hand_over((command, executable), payload, deadline, story, os.environ)
    if answer is not None:
        status, output, error = answer
        ending.end(status, output=output, error=error, logged=True)
    story.doing = "loading the program"
    from netloom.extension.work import carry_out  # msgspec, asyncio and asyncssh: thirty bare start-ups

    return carry_out(command, payload, deadline, executable, story)


def read_payload(path: str) -> bytes:
    """The bytes of the payload file. Raises BadRequest: missing, unreadable, empty, or no file."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
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
        ending.end(128 + number, error=f"ended by {names[number]} while {ending.story.doing}")

    for number in names:
        _signal.signal(number, stop)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, names)  # the start of the one file (start.c) holds them back


def _end_on_time(deadline: Deadline, ending: Ending) -> None:
    """The last resort, half a margin after the deadline: whatever holds the program then, it ends with status 2."""

    def stop(number: int, frame: object) -> None:
        story = ending.story
        where = "" if story.host == "-" else f"{story.host}: "
        late = f"{where}not done within {deadline.timeout_s:.0f} s: still {story.doing}"
        ending.end(2, error=f"{late} (is this server overloaded?)")

    _signal.signal(_signal.SIGALRM, stop)
    # A timer of 0 would be none.
    _signal.setitimer(_signal.ITIMER_REAL, max(0.001, deadline.ends + deadline.margin_s / 2 - time.monotonic()))
