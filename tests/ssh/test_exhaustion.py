"""Calls of a management server that runs out of something, and slow or poor hosts: one line in time, or success."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jumping_clock
from netns import inside
from ssh.lab import KEYS, PYTHON, REPO, Caller, CallResult, SshLab

STORED = {"host": "10.99.0.11", "namespace": "cs-net-42"}
MAIN = (PYTHON, str(REPO / "cmd" / "netloom" / "main.py"))
DRIPPING = 2210
TIMEOUT_S = 6
UID = 4300


@pytest.fixture
def callers(lab: SshLab, tmp_path: Path) -> tuple[Caller, Caller]:
    """A caller without a helper, and one with its own. They call at the same time, because each waits for seconds."""
    made = []
    for helper in ("0", "1"):
        (tmp_path / helper).mkdir()
        caller = Caller(lab, tmp_path / helper)
        caller.helper = helper
        made.append(caller)
    return made[0], made[1]


def ended_calls(callers: tuple[Caller, Caller], command: str, details: dict[str, Any]) -> list[CallResult]:
    """The results of one call of each caller."""
    began = time.monotonic()
    running = [it.start(command, str(it.payload(details, STORED)), str(TIMEOUT_S)) for it in callers]
    return [it.finish(process, began) for it, process in zip(callers, running, strict=True)]


@contextlib.contextmanager
def dripping(lab: SshLab, quick: bytes, slow: bytes) -> Iterator[None]:
    """A server on h1 that sends ``quick`` at once, and then one byte of ``slow`` a second."""
    with inside(Path(f"/run/netns/{lab.h1.netns}")):
        listener = socket.create_server(("", DRIPPING))
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(quick)
            for at in range(len(slow)):
                connection.sendall(slow[at : at + 1])
                if ended.wait(1):
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


BANNER = b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"


@pytest.mark.parametrize("quick", [b"", BANNER], ids=["banner", "key exchange"])
def test_an_ssh_server_of_one_byte_a_second_is_reported_before_the_deadline(
    quick: bytes, lab: SshLab, callers: tuple[Caller, Caller]
) -> None:
    details = callers[0].details(sshkey=lab.key("good"), port=DRIPPING)
    with dripping(lab, quick, BANNER + bytes(1000)):
        for ended in ended_calls(callers, "implement-network", details):
            assert ended.status == 2
            assert ended.line.startswith(f"10.99.0.11: port {DRIPPING} is open, but no SSH answers within"), ended.line
            assert ended.took_s < TIMEOUT_S


@pytest.mark.parametrize("what", ["hello", "reply"])
def test_an_agent_of_one_byte_a_second_is_reported_before_the_deadline(
    what: str, lab: SshLab, callers: tuple[Caller, Caller]
) -> None:
    lab.h1.set_behaviour("drip", what=what)
    for ended in ended_calls(callers, "implement-network", callers[0].details(sshkey=lab.key("good"))):
        assert ended.status == 2
        assert "10.99.0.11: " in ended.line
        assert "answer" in ended.line
        assert ended.took_s < TIMEOUT_S


def test_a_host_without_sudo_is_reported_with_a_remedy(lab: SshLab, caller: Caller) -> None:
    with lab.h1.without("/usr/bin/sudo"):
        ended = caller.ensure(caller.details(username="ops", sshkey=lab.key("good")))
        assert ended.status == 2
        assert ended.line == "10.99.0.11: there is no sudo for ops (install sudo, or log in as root)"
    assert caller.ensure(caller.details(username="ops", sshkey=lab.key("good"))).output != ""


# ------------------------------------------------------------------------------------------- the management server


def within(setup: str) -> tuple[str, ...]:
    """The program, started after a shell has made a condition for it in its own mount namespace."""
    return ("sh", "-ec", f'{setup}; exec "$@"', "call", *MAIN)


def test_a_call_with_a_full_disk_trusts_no_key_that_it_cannot_keep(lab: SshLab, caller: Caller) -> None:
    """A pinned key needs no disk. A line of the log that cannot be written is lost."""
    full = f"mount -t tmpfs -o size=4k,mode=700 none {caller.home}; head -c 4096 /dev/zero >{caller.home}/ballast"
    details = caller.details(sshkey=lab.key("good"), port=KEYS)
    ended = caller.ensure(details, executable=within(full))
    assert ended.status == 2
    assert ended.line.startswith(f"10.99.0.11: its key cannot be remembered: {caller.home}/"), ended.line
    assert "No space left on device" in ended.line or "the disk is full" in ended.line
    assert "pin keys by the registration detail hostkeys" in ended.line
    pinned = caller.details(sshkey=lab.key("good"), port=KEYS, hostkeys=lab.h1.public_key())
    assert json.loads(caller.ensure(pinned, executable=within(full)).output)["host"] == "10.99.0.11"


def test_a_call_without_a_writable_disk_names_all_directories_that_it_tried(lab: SshLab, caller: Caller) -> None:
    places = (str(caller.home), "/var/cache", "/var/tmp")
    read_only = "; ".join(f"mount -t tmpfs -o ro,mode=700 none {it}" for it in places)
    how: dict[str, Any] = {"executable": within(read_only), "environ": {"NETLOOM_DIR": places[0], "HOME": places[0]}}
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), port=KEYS), **how)
    assert ended.status == 1
    assert ended.line.startswith("no directory to keep known host keys in: "), ended.line
    assert all(it in ended.line for it in places)
    assert "set NETLOOM_DIR to a directory of uid 0" in ended.line


@pytest.mark.parametrize("files", [10, 12, 16, 20])
def test_a_call_with_few_descriptors_ends_in_one_line_or_succeeds(files: int, lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"), port=KEYS)
    ended = caller.ensure(details, executable=("prlimit", f"--nofile={files}:{files}", *MAIN), timeout=TIMEOUT_S)
    if ended.status:
        assert "Too many open files" in ended.line, ended.line
    else:
        assert json.loads(ended.output)["host"] == "10.99.0.11"
    assert ended.took_s < TIMEOUT_S


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_call_with_few_processes_ends_in_one_line_or_succeeds(
    processes: int, lab: SshLab, caller: Caller, tmp_path: Path
) -> None:
    """Threads count, too. RLIMIT_NPROC does not hold for root, so the call runs as another user, as CloudStack's do."""
    caller.helper = "1"
    uid = UID + processes
    os.chown(caller.home, uid, uid)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    details = caller.details(sshkey=lab.key("good"), port=KEYS)
    limit = ("prlimit", f"--nproc={processes}:{processes}")
    ended = caller.ensure(details, uid=uid, executable=(*limit, *MAIN), timeout=TIMEOUT_S)
    if ended.status:
        assert "too few processes" in ended.line, ended.line
        assert "raise TasksMax" in ended.line
    else:
        assert json.loads(ended.output)["host"] == "10.99.0.11"
    assert ended.took_s < TIMEOUT_S
    assert processes < 8 or ended.status == 0


@pytest.mark.parametrize("mib", [40, 64, 96, 128, 256])
def test_a_call_with_little_memory_ends_in_one_line_or_succeeds(mib: int, lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"), port=KEYS)
    ended = caller.ensure(details, executable=("prlimit", f"--as={mib << 20}", *MAIN), timeout=TIMEOUT_S)
    if ended.status:
        assert "memory" in ended.line.lower(), ended.line
    else:
        assert json.loads(ended.output)["host"] == "10.99.0.11"
    assert ended.took_s < TIMEOUT_S


@pytest.mark.parametrize("jump_s", [86400, -86400])
def test_a_clock_that_jumps_a_day_does_not_move_the_deadline(
    jump_s: int, lab: SshLab, callers: tuple[Caller, Caller], tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    jumping_clock.write(clock, 0)
    program = (PYTHON, jumping_clock.__file__, str(clock))
    details = callers[0].details(sshkey=lab.key("good"), port=KEYS)
    lab.h1.set_behaviour("hang", on=["implement-network"])
    began = time.monotonic()
    running = [
        it.start("implement-network", str(it.payload(details, STORED)), str(TIMEOUT_S), executable=program)
        for it in callers
    ]
    while [it["command"] for it in lab.h1.calls_received()] != ["implement-network"] * 2:
        assert [it.poll() for it in running] == [None, None]
        time.sleep(0.05)
    jumping_clock.write(clock, jump_s)
    for caller, process in zip(callers, running, strict=True):
        ended = caller.finish(process, began)
        assert ended.status == 2
        assert ended.line.startswith("10.99.0.11: its agent did not answer implement-network within")
        assert 1 < ended.took_s < TIMEOUT_S
    lab.h1.set_behaviour()
    (without_helper, _) = callers  # the stand-in on the helper's connection still sleeps
    again = without_helper.call("implement-network", details, STORED, executable=program, timeout=TIMEOUT_S)
    assert again.output == ""
