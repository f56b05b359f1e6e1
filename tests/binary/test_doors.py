"""The two doors of a call: the one in C (build/nuitka/call.c), and the one in Python (extension/call.py).

The door in C is the one file, as CloudStack calls it. The door in Python is the unpacked program, executed directly.
Each row of a table has one outcome for both: exit status, output, error, log lines and requests to the helper.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import processes
from bed.machines import until
from binary.fake_helper import FakeHelper, Reply, answer, doing
from binary.onefile import build_id, one_file
from binary.room import HOME, NOBODY, RUN, Room
from entry_points import LINES
from netloom.extension.helper_client import BEAT, pack

pytestmark = pytest.mark.binary

CALL = "implement-network /tmp/payload 60"
# The unpacked program, where the door in C does not look for it.
UNPACKED = f"/opt/unpacked/{build_id()}/netloom.bin"
# start.c sets these variables for the program.
IN_PYTHON = f"NETLOOM_EXE={RUN} NETLOOM_PATH=$PATH exec -a {RUN} {UNPACKED}"
DOORS = {"C": f"exec {RUN}", "Python": IN_PYTHON}
PROGRAMS = f"{HOME}/programs"
# The error of a call that does its own work.
OWN_WORK = "OWN WORK"
CLOSED = "the output could not be written: the caller had closed it"


@pytest.fixture(scope="module")
def used() -> Iterator[Room]:
    """A room with the unpacked program."""
    room = Room(one_file())
    try:
        assert room.run(f"{RUN} version; cp -a {PROGRAMS} /opt/unpacked", HOME="/root").returncode == 0
        yield room
    finally:
        room.close()


@pytest.fixture
def room(used: Room) -> Iterator[Room]:
    """The room without a helper and without a log, with an empty payload."""
    used.run(f"rm -rf /tmp/* {HOME}; mkdir -m 700 {HOME}; cp -a /opt/unpacked {PROGRAMS}; echo '{{}}' >/tmp/payload")
    yield used
    for pid in used.processes():
        processes.kill(pid)


Helper = Callable[..., FakeHelper]


@pytest.fixture
def helper(room: Room) -> Iterator[Helper]:
    """Start a fake helper, in the directory that calls of the room choose."""
    started: list[FakeHelper] = []

    def start(*replies: Reply, directory: str = HOME, uid: int = 0) -> FakeHelper:
        started.append(FakeHelper(room.path(directory) / f"helper-{build_id()}.sock", *replies, uid=uid))
        return started[-1]

    yield start
    for it in started:
        it.close()


def command(door: str, words: str, *, around: str = "{}") -> str:
    """The shell command of a call. ``around``: a script with the command in it."""
    return f"exec bash -c {shlex.quote(around.format(f'{DOORS[door]} {words}'))}"


def logged(room: Room) -> list[str]:
    """The lines of the log from the command on, without times."""
    log = room.path(f"{HOME}/netloom.log")
    lines = log.read_text().splitlines() if log.exists() else []
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [0-9a-f]{32} [^ ]+ - - status=\d+ \d+ms.*", line), line
    return [re.sub(r" \d+ms", "", line.split(" ", 2)[2]) for line in lines]


def without_python(room: Room) -> None:
    """Remove the unpacked program. Python could not start without unpacking it again."""
    room.run(f"rm -r {PROGRAMS}")


@dataclass(frozen=True)
class Case:
    """What the helper does, and what the caller gets."""

    replies: tuple[Reply, ...]
    status: int = 0
    out: str = ""
    err: str = ""
    log: list[str] = field(default_factory=list)
    words: str = CALL
    around: str = "{}"
    requests: int = 1
    in_c: bool = True  # Python is not started


def one(data: bytes) -> tuple[Reply, ...]:
    return (Reply(data),)


LONG = b"x" * 3_000_000
LONG_LINE = f"not done within 4 s: still asking {'h' * 5000}"
# Frames that are no answer. A call makes three attempts, and then it does its own work.
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\0\0",
    "half a message": answer(0, b"out")[:-3],
    "an empty message": b"\0\0\0\0",
    "an answer without fields": pack(b"answer"),
    "an answer with too many fields": pack(b"answer", b"0", b"", b"", b""),
    "an answer with a status that is none": pack(b"answer", b"x", b"", b""),
    "progress of two fields": pack(b"doing", b"a", b"b"),
}
CASES: dict[str, Case] = {
    "output": Case(one(answer(0, b'{"host":"h1"}')), out='{"host":"h1"}\n'),
    "output with newlines": Case(one(answer(0, b"a\nb\n\n")), out="a\nb\n"),
    "output of newlines alone": Case(one(answer(0, b"\n\n")), out="\n"),
    "no output": Case(one(answer(0))),
    "error": Case(one(answer(2, b"", b"h1: no SSH within 5 s")), 2, err="h1: no SSH within 5 s\n"),
    "error and output": Case(one(answer(3, b"out", b"refused")), 3, err="refused\n"),
    "a status without a text": Case(one(answer(3)), 3),
    "progress": Case(one(pack(BEAT) + doing("asking h1") + pack(BEAT) + answer(0, b"o")), out="o\n"),
    "messages of a newer helper": Case(one(pack(b"more", b"a", b"b") + answer(0, b"o")), out="o\n"),
    "single bytes": Case((Reply(doing("asking h1") + answer(0, b"out"), piece_bytes=1),), out="out\n"),
    "long output": Case(one(answer(0, LONG)), out=LONG.decode() + "\n"),
    "a file for output": Case(one(answer(0, b"out")), out="0 out\n", around="({}) >/tmp/out; echo $? $(cat /tmp/out)"),
    "a full disk": Case(
        one(answer(0, b"out")), 3, around="{} >/dev/full", log=[f"implement-network - - status=3 {CLOSED}"]
    ),
    "a full disk and an error": Case(one(answer(2, b"", b"late")), 2, around="{} 2>/dev/full"),
    "a caller that does not wait for the output": Case(
        (Reply(answer(0, b"out"), pause_s=0.5),),
        3,
        around="({}) | true; exit ${{PIPESTATUS[0]}}",
        log=[f"implement-network - - status=3 {CLOSED}"],
    ),
    "a caller that does not read": Case(
        one(answer(0, LONG)),
        2,
        words="implement-network /tmp/payload 2",
        around="({}) | sleep 4; exit ${{PIPESTATUS[0]}}",
    ),
    "a missed deadline": Case(
        (Reply(doing("waiting for h1"), waits=True, beats=True),),
        2,
        err="not done within 2 s: still waiting for h1 (is this server overloaded?)\n",
        log=[
            "implement-network - - status=2 not done within 2 s: still waiting for h1 (is this server overloaded?)",
        ],
        words="implement-network /tmp/payload 2",
    ),
    "a missed deadline without progress": Case(
        (Reply(waits=True, beats=True),),
        2,
        err="not done within 1 s: still asking the helper (is this server overloaded?)\n",
        log=[
            "implement-network - - status=2 not done within 1 s: still asking the helper (is this server overloaded?)"
        ],
        words="implement-network /tmp/payload 1",
    ),
    "a long progress": Case(
        (Reply(doing("asking " + "h" * 5000), waits=True, beats=True),),
        2,
        err=f"{LONG_LINE[:1997]}...\n",
        # The log's line is cut, too: 2,000 characters with a time, a call id, and four digits of milliseconds.
        log=[f"implement-network - - status=2 {LONG_LINE}"[: 2000 - len("2026-01-31T23:59:59Z ") - 33 - 7 - 3] + "..."],
        words="implement-network /tmp/payload 4",
    ),
    "leading zeros": Case(one(answer(0, b"o")), out="o\n", words="implement-network /tmp/payload 00060"),
    "a link to the payload": Case(
        one(answer(0, b"o")),
        out="o\n",
        words="implement-network /tmp/link 60",
        around="ln -s /tmp/payload /tmp/link; {}",
    ),
    "ignored signals": Case(one(answer(0, b"o")), out="o\n", around="trap '' TERM INT HUP PIPE ALRM; {}"),
    # Python continues what the door in C has begun.
    "output that is not ASCII": Case(one(answer(0, "é\n".encode())), out="\\u00e9\n", in_c=False),
    "an error that is not plain": Case(one(answer(1, b"", "ü  x\ty".encode())), 1, err="\\xfc x y\n", in_c=False),
    "a long error": Case(one(answer(1, b"", b"e" * 3000)), 1, err="e" * 1997 + "...\n", in_c=False),
    "a helper that dies": Case(
        (Reply(doing("asking h1")), Reply(answer(0, b"second"))), out="second\n", requests=2, in_c=False
    ),
    **{
        f"a helper that sends {name}": Case(one(data), 1, err=OWN_WORK, requests=3, in_c=False)
        for name, data in BROKEN.items()
    },
    "a silent helper": Case(
        (Reply(waits=True),), 1, err=OWN_WORK, words="implement-network /tmp/payload 8", in_c=False
    ),
    "closed output": Case(one(answer(0, b"out")), around="{} >&-", in_c=False),
    "all descriptors closed": Case(one(answer(1, b"", b"out")), 1, around="{} <&- >&- 2>&-", in_c=False),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", CASES)
def test_both_doors_give_the_same_answer(room: Room, helper: Helper, door: str, name: str) -> None:
    case = CASES[name]
    asked = helper(*case.replies)
    if door == "C" and case.in_c:
        without_python(room)
    done = room.run(command(door, case.words, around=case.around), HOME="/root")
    assert (done.returncode, done.stdout) == (case.status, case.out), done.stderr
    if case.err == OWN_WORK:
        assert logged(room) == [f"implement-network - - status=1 {done.stderr.rstrip()}"]
    else:
        assert done.stderr == case.err
        assert logged(room) == case.log
    assert len(asked.requests) == case.requests
    assert (
        len({(fields[2], *map(float, fields[3].split())) for fields in asked.requests}) == 1
    )  # one call id, one start
    if door == "C" and case.in_c:
        assert room.unpacked() == []
    if name == "a silent helper":
        assert not asked.path.exists()  # the next call starts another one
    assert room.processes("helper") == []


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_call(room: Room, helper: Helper, door: str, number: signal.Signals) -> None:
    asked = helper(Reply(doing("asking h1"), waits=True, beats=True))
    if door == "C":
        without_python(room)
    process = room.popen(command(door, CALL), HOME="/root")
    assert until(lambda: len(asked.requests) == 1)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    line = f"ended by {number.name} while asking h1"
    assert (process.returncode, out, err) == (128 + number, "", f"{line}\n")
    assert logged(room) == [f"implement-network - - status={128 + number} {line}"]


@pytest.mark.parametrize("door", DOORS)
def test_a_stopped_call_goes_on(room: Room, helper: Helper, door: str) -> None:
    """The system call that waits is interrupted when the process continues."""
    asked = helper(Reply(answer(0, b"out"), pause_s=1.5))
    process = room.popen(command(door, CALL), HOME="/root")
    assert until(lambda: len(asked.requests) == 1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30) == ("out\n", "")
    assert len(asked.requests) == 1


@dataclass(frozen=True)
class Asked:
    """A call's environment, and the fields that the helper gets."""

    environ: dict[str, str]
    settings: list[bytes]
    executable: bytes = RUN.encode()
    directory: str = HOME  # of the socket
    before: str = "true"
    words: str = CALL
    payload: bytes = b"{}\n"


ROOT_HOME = b"HOME=/root"
LARGE = b'{"payload":"' + b"p" * 6_000_000 + b'"}'
REQUESTS: dict[str, Asked] = {
    "a home": Asked({"HOME": "/root"}, [ROOT_HOME]),
    "no home": Asked({}, []),
    "a home that is no path": Asked({"HOME": "root"}, [b"HOME=root"]),
    "all variables": Asked(
        {"SSH_AUTH_SOCK": "/x", "HOME": "/root", "NETLOOM_AGENT": "sudo netloom", "LANG": "C"},
        [b"NETLOOM_AGENT=sudo netloom", ROOT_HOME, b"SSH_AUTH_SOCK=/x"],
    ),
    "empty variables": Asked({"NETLOOM_DIR": "", "HOME": "/root"}, [b"NETLOOM_DIR=", ROOT_HOME]),
    "bytes that are not UTF-8": Asked(
        {"HOME": "/root", "NETLOOM_AGENT": os.fsdecode(b"\xff\xfe \xc3\xa9")},
        [b"NETLOOM_AGENT=\xff\xfe \xc3\xa9", ROOT_HOME],
    ),
    "a large environment": Asked(
        {"HOME": "/root", "NETLOOM_AGENT": "x" * 100_000, **{f"X{i}": "y" * 100_000 for i in range(8)}},
        [b"NETLOOM_AGENT=" + b"x" * 100_000, ROOT_HOME],
    ),
    "a directory": Asked(
        {"HOME": "/root", "NETLOOM_DIR": "/tmp/d"},
        [b"NETLOOM_DIR=/tmp/d", ROOT_HOME],
        directory="/tmp/d",
        before="mkdir -m 700 /tmp/d",
    ),
    "a directory that others may read": Asked(
        {"HOME": "/root", "NETLOOM_DIR": "/tmp/d"}, [b"NETLOOM_DIR=/tmp/d", ROOT_HOME], before="mkdir -m 755 /tmp/d"
    ),
    "a link for a directory": Asked(
        {"HOME": "/root", "NETLOOM_DIR": "/tmp/d"}, [b"NETLOOM_DIR=/tmp/d", ROOT_HOME], before=f"ln -s {HOME} /tmp/d"
    ),
    "a directory of another user": Asked(
        {"HOME": "/root", "NETLOOM_DIR": "/tmp/d"},
        [b"NETLOOM_DIR=/tmp/d", ROOT_HOME],
        before=f"install -d -m 700 -o {NOBODY} /tmp/d",
    ),
    "a directory that another user may replace": Asked(
        {"HOME": "/root", "NETLOOM_DIR": "/tmp/o/d"},
        [b"NETLOOM_DIR=/tmp/o/d", ROOT_HOME],
        before="mkdir -m 777 /tmp/o; mkdir -m 700 /tmp/o/d",
    ),
    "a relative directory": Asked({"HOME": "/root", "NETLOOM_DIR": "d"}, [b"NETLOOM_DIR=d", ROOT_HOME]),
    "a directory for sockets": Asked(
        {"HOME": "/root", "XDG_RUNTIME_DIR": "/tmp/run"},
        [ROOT_HOME],
        directory="/tmp/run/netloom",
        before="mkdir -p -m 700 /tmp/run/netloom",
    ),
    "a long path": Asked(
        {"HOME": "/root", "NETLOOM_DIR": f"/tmp/{'d' * 150}"},
        [f"NETLOOM_DIR=/tmp/{'d' * 150}".encode(), ROOT_HOME],
        directory=f"/tmp/{'d' * 150}",
        before=f"mkdir -m 700 /tmp/{'d' * 150}",
    ),
    "a large payload": Asked({"HOME": "/root"}, [ROOT_HOME], payload=LARGE),
    "a payload that is not UTF-8": Asked({"HOME": "/root"}, [ROOT_HOME], payload=b"\xff\0\n"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", REQUESTS)
def test_both_doors_send_the_same_request(room: Room, helper: Helper, door: str, name: str) -> None:
    case = REQUESTS[name]
    room.run(case.before)
    room.path("/tmp/payload").write_bytes(case.payload)
    with short(room.path(case.directory)) as directory:
        asked = helper(Reply(answer(0, b"out")), directory=directory)
    if door == "C":
        without_python(room)
    done = room.run(command(door, case.words, around="sleep 0.5; {}"), uid=0, **case.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
    ((word, executable, call_id, times, *settings, end, payload),) = asked.requests
    timeout, started = times.split()
    assert (word, executable, settings, end) == (b"implement-network", case.executable, case.settings, b"")
    assert payload == case.payload
    assert re.fullmatch(rb"[0-9a-f]{32}", call_id)
    assert timeout == b"60"
    assert 0.5 <= time.monotonic() - float(started) < 5.5  # it counts from the start of the process


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """A path of the same directory that fits into the address of a socket, from the root of any room."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("before", "path", "sent"),
    [
        ("cd /opt", "extension/any-name.sh", "/opt/extension/any-name.sh"),
        ("cd /opt/extension", "./any-name.sh", "/opt/extension/any-name.sh"),
        ("cd /opt/extension", "../extension/./any-name.sh", "/opt/extension/any-name.sh"),
    ],
)
def test_a_relative_path_is_made_absolute(
    room: Room, helper: Helper, door: str, before: str, path: str, sent: str
) -> None:
    """The directory of the executable is in the default owner, and the helper's working directory is another one."""
    asked = helper(Reply(answer(0, b"out")))
    shell = f"{before}; {DOORS[door].replace(RUN, path)} {CALL}"
    done = room.run(f"exec bash -c {shlex.quote(shell)}", HOME="/root")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
    assert os.path.abspath(asked.requests[0][1].decode()) == sent


def replace_python(room: Room) -> None:
    """Put a script in the place of the unpacked program. It tells what the door in C has left to it."""
    script = '#!/bin/sh\necho "left to Python: ${NETLOOM_BEGUN-nothing was begun}"\n'
    program = room.path(f"{PROGRAMS}/{build_id()}/netloom.bin")
    program.unlink()
    program.write_text(script)
    program.chmod(0o700)


LEFT = "left to Python: nothing was begun\n"
# What the door in C leaves to Python, although a helper runs: the arguments, and what comes before the call.
UNUSUAL: dict[str, tuple[str, str]] = {
    "no helper wanted": (CALL, "export NETLOOM_HELPER=0"),
    "an injected beginning": ("implement-network /none 60", "export NETLOOM_BEGUN='x 1 output 0 injected'"),
    "no payload": ("implement-network /none 60", ""),
    "an empty payload": (CALL, ": >/tmp/payload"),
    "a blank payload": (CALL, "printf ' \\n\\t\\r\\v\\f' >/tmp/payload"),
    "a pipe": ("implement-network /tmp/pipe 60", "mkfifo /tmp/pipe"),
    "a directory": ("implement-network /tmp 60", ""),
    "a device": ("implement-network /dev/null 60", ""),
    "a huge payload": (CALL, "truncate -s 65M /tmp/payload"),
    "no timeout": ("implement-network /tmp/payload ''", ""),
    "a timeout of zero": ("implement-network /tmp/payload 0", ""),
    "a negative timeout": ("implement-network /tmp/payload -5", ""),
    "a signed timeout": ("implement-network /tmp/payload +5", ""),
    "a timeout with a space": ("implement-network /tmp/payload '60 '", ""),
    "a timeout with a unit": ("implement-network /tmp/payload 60s", ""),
    "a timeout of more than a day": ("implement-network /tmp/payload 86401", ""),
    "a timeout of ten digits": ("implement-network /tmp/payload 0000000060", ""),
    "digits of another script": ("implement-network /tmp/payload ٦٠", ""),
    "a command with a space": ("'implement network-x' /tmp/payload 60", ""),
    "a command that is not ASCII": ("implement-nétwork /tmp/payload 60", ""),
    "a command with a byte that is not UTF-8": ("$'implement-\\xff' /tmp/payload 60", ""),
    "a long command": (f"implement-{'x' * 200} /tmp/payload 60", ""),
    "closed input": (CALL, "exec <&-"),
    "closed error": (CALL, "exec 2>&-"),
    "a directory with a wide mode": (CALL, f"chmod 755 {HOME}"),
    "no working directory": ("implement-network /tmp/payload 60", "mkdir /tmp/gone; cd /tmp/gone; rmdir /tmp/gone"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_door_in_c_leaves_what_is_unusual_to_python(room: Room, helper: Helper, name: str) -> None:
    words, before = UNUSUAL[name]
    asked = helper(Reply(answer(0, b"out")))
    replace_python(room)
    # Without a working directory a relative path cannot be made absolute.
    run = f"-a x/any-name.sh {RUN}" if name == "no working directory" else RUN
    script = f"{before}\nexec {run} {words}"
    done = room.run(f"exec bash -c {shlex.quote(script)}", HOME="/root")
    assert (done.returncode, done.stdout) == (0, LEFT)
    assert asked.requests == []


@pytest.mark.parametrize(("line", "entry"), LINES)
def test_the_door_in_c_answers_only_calls(room: Room, helper: Helper, line: str, entry: str) -> None:
    """Of the calls it answers those of three arguments whose command has a hyphen, as every protocol command has."""
    asked = helper(Reply(answer(0, b"out")))
    replace_python(room)
    room.run("cp /tmp/payload /tmp/cs-extnet.payload")
    words = line.split()
    answers = entry == "call" and len(words) == 3 and "-" in words[0]
    assert room.run(f"exec {RUN} {line}", HOME="/root").stdout == ("out\n" if answers else LEFT)
    assert len(asked.requests) == answers


def test_the_door_in_c_needs_a_helper(room: Room, helper: Helper) -> None:
    replace_python(room)
    assert room.run(f"exec {RUN} {CALL}", HOME="/root").stdout == LEFT
    asked = helper(Reply(answer(0, b"out")))
    asked.stop()  # its socket stays
    assert room.run(f"exec {RUN} {CALL}", HOME="/root").stdout == LEFT


def test_the_door_in_c_asks_no_helper_of_another_user(room: Room, helper: Helper) -> None:
    asked = helper(Reply(answer(0, b"out")), uid=NOBODY)
    replace_python(room)
    assert room.run(f"exec {RUN} {CALL}", HOME="/root").stdout == LEFT
    assert asked.requests == []


def test_the_door_in_c_waits_two_seconds_for_a_helper_that_accepts_nothing(room: Room) -> None:
    """These seconds count for the deadline, so Python gets the start of the call."""
    replace_python(room)
    path = str(room.path(HOME) / f"helper-{build_id()}.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(0)
        client.connect(path)  # the backlog is full
        done = room.run(f"exec {RUN} {CALL}", HOME="/root")
    assert re.fullmatch(r"left to Python: [0-9a-f]{32} \d+\.\d+ broken\n", done.stdout)


@pytest.mark.parametrize("door", DOORS)
def test_a_helper_of_another_user_is_replaced(room: Room, helper: Helper, door: str) -> None:
    asked = helper(Reply(answer(0, b"out")), uid=NOBODY)
    done = room.run(command(door, CALL), HOME="/root", NETLOOM_HELPER="60")
    assert (done.returncode, done.stdout) == (1, "")
    assert "physical-network-extension-details" in done.stderr
    assert asked.requests == []
    assert len(room.processes("helper")) == 1


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (Reply(doing("asking h1")), "broken"),
        (Reply(waits=True), "hung {inode}"),
        (Reply(deaf=True, waits=True), "hung {inode}"),
        (Reply(answer(0, "é x\n".encode())), "output 0 é x\n"),
        (Reply(answer(2, b"out", "ü\nx".encode())), "error 2 ü\nx"),
        (Reply(answer(0, b"\xff" * 200_000)), "broken"),  # too long for an environment variable
        (Reply(answer(1, b"", b"a\0b")), "broken"),
        (Reply(pack(b"doing", b"\xff")), "broken"),
        (Reply(pack(b"answer", b"256", b"", b"")), "broken"),
        (Reply(b"\x00\x00\x00\x08\xff\xff\xff\xffbeat"), "broken"),
        (Reply(b"\xff\xff\xff\xff"), "broken"),
    ],
)
def test_the_door_in_c_says_what_it_has_begun(room: Room, helper: Helper, reply: Reply, told: str) -> None:
    if reply.deaf:
        room.path("/tmp/payload").write_bytes(LARGE)
    asked = helper(reply)
    replace_python(room)
    inode = asked.path.stat().st_ino
    done = room.run(f"exec {RUN} implement-network /tmp/payload 8", HOME="/root")
    found = re.fullmatch(r"left to Python: ([0-9a-f]{32}) (\d+\.\d+) (.*)\n", done.stdout, re.DOTALL)
    assert found, done
    call_id, started, what = found.groups()
    assert what == told.format(inode=inode)
    for request in asked.requests:
        assert (request[2].decode(), request[3].split()[1].decode()) == (call_id, started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_call_is_handed_over_is_reported(room: Room, helper: Helper, number: signal.Signals) -> None:
    asked = helper(Reply(doing("asking h1"), pause_s=0.3), Reply(waits=True, beats=True))
    process = room.popen(command("C", CALL), HOME="/root")
    assert until(lambda: len(asked.requests) == 1)
    while os.readlink(f"/proc/{process.pid}/exe").endswith("any-name.sh"):
        pass
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    assert err.startswith(f"ended by {number.name} while ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("door", DOORS)
def test_a_full_log_is_renamed(room: Room, helper: Helper, door: str) -> None:
    helper(Reply(doing("asking h1"), waits=True, beats=True))
    room.run(f"truncate -s 5M {HOME}/netloom.log")
    room.run(command(door, "implement-network /tmp/payload 1"), HOME="/root")
    assert len(logged(room)) == 1
    assert room.path(f"{HOME}/netloom.log.1").stat().st_size == 5 << 20
    assert oct(room.path(f"{HOME}/netloom.log").stat().st_mode) == "0o100600"


def test_a_real_helper_answers_the_door_in_c(room: Room) -> None:
    """Python starts the helper, and the next call needs no Python."""
    first = room.run(f"exec {RUN} {CALL}", HOME="/root", NETLOOM_HELPER="60")
    assert until(lambda: len(room.processes("helper")) == 1)
    without_python(room)
    second = room.run(f"exec {RUN} {CALL}", HOME="/root", NETLOOM_HELPER="60")
    assert (second.returncode, second.stdout, second.stderr) == (first.returncode, first.stdout, first.stderr)
    assert second.returncode == 1
    assert room.unpacked() == []
    assert len(logged(room)) == 2
