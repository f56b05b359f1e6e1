"""The start of the one file: where it unpacks itself, which directories it refuses, and the process it becomes.

Each test has its own mounts. In them the directories that the start may choose are empty.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bed.machines import until
from binary.onefile import build_id, one_file
from binary.room import HOME, NOBODY, RUN, Room, helper_of

pytestmark = pytest.mark.binary

SAYS = "netloom 0.1.0 (build "


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the one file. A room reads it from an open descriptor, because its mounts hide /tmp and /opt."""
    return one_file()


@pytest.fixture
def room(held: Path) -> Iterator[Room]:
    it = Room(held)
    try:
        yield it
    finally:
        it.close()


def test_version_prints_the_build(room: Room) -> None:
    done = room.run(f"{RUN} version --json", HOME="/root")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["build"] == build_id()


def test_it_unpacks_once_and_executes_the_unpacked_program(room: Room) -> None:
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    assert room.unpacked() == [build_id()]
    inode = os.stat(room.path(f"{HOME}/programs/{build_id()}/netloom.bin")).st_ino
    serving = room.popen(f"exec {RUN} agent serve --socket /tmp/agent.sock --state-dir /tmp/state", HOME="/root")
    try:
        deadline = time.monotonic() + 30
        while not room.path("/tmp/agent.sock").exists():
            assert serving.poll() is None and time.monotonic() < deadline, serving.communicate()
            time.sleep(0.02)
        exe = os.readlink(f"/proc/{serving.pid}/exe")
        assert exe.endswith(f"/{build_id()}/netloom.bin")  # the same pid: there is no parent process that waits
        serving.terminate()
        assert serving.wait(30) == 0  # the agent handles SIGTERM, as it does when run from source
    finally:
        serving.kill()
        serving.communicate()
    assert os.stat(room.path(f"{HOME}/programs/{build_id()}/netloom.bin")).st_ino == inode


@pytest.mark.parametrize("option", ["ro", "noexec"])
def test_tmp_may_be_read_only_or_noexec(room: Room, option: str) -> None:
    done = room.run(f"mount -o remount,{option} /tmp && {RUN} version", HOME="/root")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_process_gets_the_callers_environment(room: Room) -> None:
    """Nuitka changes PATH for the interpreter. Only the program's own variables are added."""
    room.run("echo '{}' >/tmp/payload")
    room.run(f"{RUN} ensure-network-device /tmp/payload 60", HOME="/root", NETLOOM_HELPER="60", LANG="C")
    helper = helper_of(room)
    told = dict(it.split("=", 1) for it in Path(f"/proc/{helper}/environ").read_text().split("\0") if it)
    assert told == {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C",
        "NETLOOM_HELPER": "60",
        "NETLOOM_EXE": told["NETLOOM_EXE"],
        **{name: value for name, value in told.items() if name.startswith("NUITKA_") or name == "NETLOOM_PATH"},
    }


def test_concurrent_first_starts_unpack_one_program(room: Room) -> None:
    script = f"for i in 1 2 3 4 5; do {RUN} version & done; for i in 1 2 3 4 5; do wait; done; {RUN} version"
    done = room.run(script, HOME="/root")
    assert done.stderr == ""
    assert done.stdout.count(SAYS) == 6
    assert room.unpacked() == [build_id()]


def test_an_interrupted_unpack_is_never_executed(room: Room) -> None:
    for delay_s in (0.02, 0.1, 0.2):
        room.run(f"timeout -s KILL {delay_s} {RUN} version", HOME="/root")
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    assert build_id() in room.unpacked()


def test_an_unset_home_falls_back_to_passwd_and_var_tmp(room: Room) -> None:
    assert room.run(f"{RUN} version").stdout.startswith(SAYS)
    assert room.unpacked() == [build_id()]  # in the home of root, from passwd
    done = room.run(f"{RUN} version", uid=NOBODY)
    assert (done.returncode, done.stderr) == (0, "")
    assert room.unpacked(f"/var/tmp/netloom-{NOBODY}") == [build_id()]


def test_the_directory_of_the_executable_is_never_written_to(room: Room) -> None:
    look = "cd /opt/extension; stat -c '%n %i %y %s' . *; sha256sum *"
    before = room.run(look).stdout
    room.run(f"{RUN} version; {RUN} ensure-network-device /none 60", HOME="/root", NETLOOM_HELPER="1")
    assert room.run(look).stdout == before


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        ("mkdir -m 777 /tmp/d", "mode 0777"),
        ("mkdir -m 700 /tmp/real; ln -s /tmp/real /tmp/d", "a link"),
        (f"mkdir -m 700 /tmp/d; chown {NOBODY} /tmp/d", f"owned by uid {NOBODY}"),
        ("mkdir -m 700 /tmp/d; mount -t tmpfs -o noexec,mode=700 none /tmp/d", "noexec"),
        ("touch /tmp/d", "not a directory"),
    ],
)
def test_an_unsafe_directory_is_not_used(room: Room, prepare: str, why: str) -> None:
    """The next candidate is used. Without another candidate, one line names the fault of each directory."""
    done = room.run(f"{prepare}; {RUN} version", HOME="/root", NETLOOM_DIR="/tmp/d")
    assert (done.returncode, done.stderr) == (0, "")
    assert room.unpacked("/tmp/d") == []
    assert room.unpacked() == [build_id()]
    for directory in ("/root", "/var/cache", "/var/tmp"):
        room.run(f"mount -t tmpfs -o ro none {directory}")
    done = room.run(f"{RUN} version", HOME="/root", NETLOOM_DIR="/tmp/d")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("netloom: no directory to unpack this program into: /tmp/d")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert "NETLOOM_DIR" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        ("mkdir -m 777 /tmp/above", "others may write to /tmp/above"),
        ("mkdir -m 775 /tmp/above; chgrp 4242 /tmp/above", "others may write to /tmp/above"),
        (f"mkdir -m 755 /tmp/above; chown {NOBODY} /tmp/above", f"/tmp/above is owned by uid {NOBODY}"),
        (f"mkdir -m 755 /tmp/real; ln -s real /tmp/above; chown -h {NOBODY} /tmp/above", "/tmp/above is owned by uid"),
    ],
)
def test_a_directory_that_another_user_could_replace_is_not_used(room: Room, prepare: str, why: str) -> None:
    """No directory is created there either. Each directory is private and ours when it is checked."""
    mine = "/tmp/above/a/mine"
    script = f"{prepare}; mkdir /tmp/above/a; chmod 755 /tmp/above/a; mkdir -m 700 {mine}; {RUN} version"
    done = room.run(script, HOME="/root", NETLOOM_DIR=mine)
    assert (done.returncode, done.stderr) == (0, "")
    assert room.unpacked(mine) == []
    assert room.unpacked() == [build_id()]
    for directory in ("/root", "/var/cache", "/var/tmp"):
        room.run(f"mount -t tmpfs -o ro none {directory}")
    done = room.run(f"{RUN} version", HOME="/root", NETLOOM_DIR="/tmp/above/new")
    assert done.returncode == 1
    assert f"/tmp/above/new: {why}" in done.stderr
    assert not room.path("/tmp/above/new").exists()


CALLERS = {
    "SIGCHLD ignored": f"trap '' CHLD; {RUN} version",
    "umask 0777": f"umask 0777; {RUN} version; {RUN} version",
    "a name with a space, a link, a relative path": (
        f"cp {RUN} '/tmp/na me'; ln -s '/tmp/na me' /tmp/link; cd /tmp; './na me' version; /tmp/link version"
    ),
    "closed descriptors": f"{RUN} version <&- 2>&-; {RUN} version >&-; {RUN} version <&- >&- 2>&-",
    "variables of Python": "PYTHONHASHSEED=x PYTHONMALLOC=x PYTHONVERBOSE=1 PYTHONDEVMODE=1 PYTHONWARNINGS=error"
    f" PYTHONINSPECT=1 PYTHONPATH=/tmp PYTHONHOME=/nowhere {RUN} version",
    "variables of the start": "NETLOOM_UNPACKING=1 NETLOOM_EXE=/bin/false NETLOOM_TIDY=1 NETLOOM_PATH=/nowhere"
    f" NUITKA_ORIGINAL_ARGV0=x NUITKA_ONEFILE_PARENT=1 NUITKA_ONEFILE_DIRECTORY=/ {RUN} version",
}


@pytest.mark.parametrize("caller", CALLERS)
def test_it_starts_in_any_caller_environment(room: Room, caller: str) -> None:
    room.run("echo 'raise SystemExit(\"not ours\")' | tee /tmp/typing.py /tmp/msgspec.py /tmp/sitecustomize.py")
    done = room.run(CALLERS[caller], HOME="/root")
    assert (done.returncode, done.stderr) == (0, "")
    assert {line[: len(SAYS)] for line in done.stdout.splitlines()} == {SAYS}
    assert room.unpacked() == [build_id()]


def test_a_program_planted_by_another_user_is_not_run(room: Room) -> None:
    place = f"/tmp/d/programs/{build_id()}"
    script = f"mkdir -m 700 /tmp/d /tmp/d/programs; mkdir -m 755 {place}; echo '#!/bin/sh' >{place}/netloom.bin"
    done = room.run(f"{script}; chmod 755 {place}/netloom.bin; {RUN} version", HOME="/root", NETLOOM_DIR="/tmp/d")
    assert done.stdout.startswith(SAYS)
    room.run(f"chmod 700 {place}; chown {NOBODY} {place}/netloom.bin")
    assert room.run(f"{RUN} version", HOME="/root", NETLOOM_DIR="/tmp/d").stdout.startswith(SAYS)


def test_widened_directories_are_made_private_again(room: Room) -> None:
    """Other users' files are removed. The build is unpacked anew, because they could have changed it."""
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    home, build = "/root/.cache/netloom", f"/root/.cache/netloom/programs/{build_id()}"
    room.run(f"chmod 777 {home} {home}/programs {build}; touch {home}/planted; chown {NOBODY} {home}/planted")
    room.run(f"echo '#!/bin/sh' >{build}/netloom.bin")
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    assert room.run(f"stat -c %a {home} {home}/programs {build}").stdout.split() == ["700"] * 3
    assert room.run(f"ls {home}/planted").returncode != 0


DAMAGE = {
    "a link": "rm -r {build}; ln -s /tmp {build}",
    "a file": "rm -r {build}; touch {build}",
    "a fifo": "rm -r {build}; mkfifo {build}",
    "a program that others may write to": "chmod 775 {build}/netloom.bin",
    "a program that cannot be executed": "chmod 600 {build}/netloom.bin",
    "no program": "rm {build}/netloom.bin",
    "closed directories": "chmod 0 {build} {home}/programs {home}",
    "another user's directory": "chmod 777 {home}; mv {home}/programs /tmp/x; mkdir -p {home}/programs/x;"
    f" chown {NOBODY} {{home}}/programs",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_build_is_unpacked_anew(room: Room, damage: str) -> None:
    home = "/root/.cache/netloom"
    build = f"{home}/programs/{build_id()}"
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    room.run(DAMAGE[damage].format(build=build, home=home))
    assert room.run(f"{RUN} version", HOME="/root").stdout.startswith(SAYS)
    done = room.run(f"stat -c %a {home} {home}/programs {build} {build}/netloom.bin")
    assert done.stdout.split()[:3] == ["700"] * 3
    assert room.unpacked("/var/cache/netloom/0") == []


@pytest.mark.parametrize(("disk", "why"), [("size=20m", "19 MB free"), ("size=200m,nr_inodes=8", "unpacking failed")])
def test_a_full_disk_is_reported_and_leaves_no_partial_unpack(room: Room, disk: str, why: str) -> None:
    for directory in ("/root", "/var/cache", "/var/tmp"):
        room.run(f"mount -t tmpfs -o ro none {directory}")
    room.run(f"mkdir -m 700 /tmp/d; mount -t tmpfs -o mode=700,{disk} none /tmp/d")
    done = room.run(f"{RUN} version", HOME="/root", NETLOOM_DIR="/tmp/d")
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr.replace("20 MB", "19 MB")
    assert done.stderr.count("\n") == 1
    assert room.unpacked("/tmp/d") == []


def test_old_builds_are_removed_after_an_hour_without_use(room: Room) -> None:
    """A build is removed when it was not started for an hour. The first start of a new build and later starts do it."""
    programs = f"{HOME}/programs"
    old = f"{programs}/0.0.1-1-aaaa {programs}/.new-killed"
    used = f"{programs}/0.0.2-1-bbbb"
    room.run(f"mkdir -p {programs}; chmod 700 {HOME} {programs}; mkdir {old} {used}; touch -d '2 hours ago' {old}")
    assert room.run(f"{RUN} version", HOME="/root").returncode == 0
    assert room.unpacked() == ["0.0.2-1-bbbb", build_id()]
    room.run(f"touch -d '2 hours ago' {used}; {RUN} version", HOME="/root")
    assert room.unpacked() == ["0.0.2-1-bbbb", build_id()]  # not every start looks for old builds:
    room.run(f"touch -d '11 minutes ago' {programs}/{build_id()}; {RUN} version", HOME="/root")
    assert room.unpacked() == [build_id()]  # one start in ten minutes does


def test_a_call_starts_a_helper_that_inherits_no_descriptors(room: Room) -> None:
    """The caller reads end of file at once. The helper is of this build and exits on SIGTERM."""
    room.run("echo '{}' >/tmp/payload")
    done = room.run(f"{RUN} ensure-network-device /tmp/payload 60 | cat; exit 0", HOME="/root", NETLOOM_HELPER="60")
    assert "missing" in done.stdout + done.stderr
    helper = helper_of(room)
    os.kill(helper, signal.SIGTERM)
    assert until(lambda: room.processes("helper") == [])


def test_a_call_does_not_load_os_or_site(room: Room) -> None:
    """Compiled packages would use os.path to find themselves: a quarter of the time of a call through the helper."""
    room.run(f"echo '{{}}' >/tmp/payload; {RUN} version", HOME="/root")
    program = f"NETLOOM_EXE={RUN} PYTHONVERBOSE=1 {HOME}/programs/{build_id()}/netloom.bin"
    said = room.run(f"{program} ensure-network-device /tmp/payload 60", HOME="/root", NETLOOM_HELPER="60").stderr
    loaded = {line.split("'")[1] for line in said.splitlines() if line.startswith("import '")}
    assert "netloom.extension.helper_client" in loaded
    assert loaded & {"os", "posixpath", "stat", "_collections_abc", "site", "inspect", "typing", "socket"} == set()


def test_exit_statuses_match_the_source_version(room: Room) -> None:
    payload = {
        "physical-network-extension-details": {"hosts": "127.0.0.1", "port": "1", "password": "FAKE"},
        "payload": {"network_id": "1"},
    }
    room.run(f"ip link set lo up; echo {shlex.quote(json.dumps(payload))} >/tmp/payload")
    for words, status in (
        ("no-such-command /tmp/payload 60", 1),
        ("implement-network /none 60", 1),
        ("ensure-network-device /tmp/payload 20", 2),
        ("hosts list", 0),
        ("hosts forget nobody", 1),
        ("agent selftest --json", 0),
        ("nosuchword", 2),
    ):
        done = room.run(f"{RUN} {words}", HOME="/root", NETLOOM_HELPER="0")
        assert done.returncode == status, (words, done)
        assert "FAKE" not in done.stdout + done.stderr


@pytest.fixture
def unanswered(room: Room) -> Iterator[str]:
    """The command line of a call that hangs because its host does not respond. The program is already unpacked."""
    payload = {
        "physical-network-extension-details": {"hosts": "127.0.0.1", "port": "2222", "password": "FAKE"},
        "payload": {"network_id": "1"},
    }
    room.run(f"ip link set lo up; echo {shlex.quote(json.dumps(payload))} >/tmp/payload; {RUN} version", HOME="/root")
    listen = "import socket, time; s = socket.create_server(('', 2222), backlog=200); print(flush=True); time.sleep(99)"
    mute = room.popen(f"exec python3 -c {shlex.quote(listen)}")
    assert mute.stdout is not None
    assert mute.stdout.readline() == "\n"
    yield f"exec {RUN} ensure-network-device /tmp/payload 60"
    mute.kill()
    mute.communicate()


def _ended_by(number: signal.Signals, call: subprocess.Popen[str]) -> None:
    """Send the signal; the call ends with one line and the signal's status."""
    call.send_signal(number)
    out, err = call.communicate(timeout=30)
    assert (call.returncode, out) == (128 + number, ""), err
    assert err.startswith(f"ended by {number.name} while ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("helper", ["0", "60"])
def test_signals_behave_as_in_the_source_version(room: Room, unanswered: str, helper: str) -> None:
    """Nuitka's own start code would translate one signal into another and lose a third."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        call = room.popen(unanswered, HOME="/root", NETLOOM_HELPER=helper)
        deadline = time.monotonic() + 30
        while not _catches(call.pid, signal.SIGHUP):  # its handler is installed last
            assert call.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        _ended_by(number, call)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_early_signal_is_reported_once_the_program_runs(room: Room, unanswered: str, number: signal.Signals) -> None:
    for _ in range(5):
        call = room.popen(unanswered, HOME="/root", NETLOOM_HELPER="0")
        deadline = time.monotonic() + 30
        while not os.readlink(f"/proc/{call.pid}/exe").endswith("/netloom.bin"):
            assert call.poll() is None and time.monotonic() < deadline
        _ended_by(number, call)


def test_a_signal_during_any_import_is_reported(room: Room, unanswered: str) -> None:
    """A third of the signals in these milliseconds ended in abort(): the log module used os, which was half loaded."""
    for tenths_ms in range(60):
        call = room.popen(unanswered, HOME="/root", NETLOOM_HELPER="0")
        deadline = time.monotonic() + 30
        while not _catches(call.pid, signal.SIGHUP):
            assert call.poll() is None and time.monotonic() < deadline
        time.sleep(tenths_ms / 10_000)
        _ended_by(signal.SIGTERM, call)


def _catches(pid: int, number: int) -> bool:
    """Whether the process has installed a handler for the signal."""
    told = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    # The door in C has the name of the one file, and the program that it executes has its own.
    return bool(int(told["SigCgt"], 16) & 1 << (number - 1)) and told["Name"] in ("any-name.sh", "netloom.bin")
