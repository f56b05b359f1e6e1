"""The resident helper: shared by all calls. Calls succeed also when it is killed, hung or replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import processes
from netloom.extension.helper_client import ANSWER, pack, unpack
from netloom.wire import Reply, encode
from ssh.lab import (
    BLACK_HOLE,
    KEYS,
    MANAGEMENT,
    PYTHON,
    REPO,
    Caller,
    SshHost,
    SshLab,
    helper_pids,
    run,
    until,
    words_of,
)

STORED = {"host": "10.99.0.11", "namespace": "cs-net-42"}


@pytest.fixture
def caller(lab: SshLab, tmp_path: Path) -> Iterator[Caller]:
    """A caller with its own helper."""
    assert helper_pids() == []
    caller = Caller(lab, tmp_path)
    caller.helper = "60"
    yield caller
    for pid in helper_pids():
        processes.kill(pid)
    assert until(lambda: not helper_pids())


def end_agents(host: SshHost) -> None:
    """Kill the stand-in agents of a host."""
    for pid in run("ip", "netns", "pids", host.netns).split():
        if any(b"standin.py" in word for word in words_of(int(pid))):
            processes.kill(int(pid))


def sockets(caller: Caller) -> list[str]:
    return [path.name for path in caller.home.glob("helper-*.sock")]


def helper_pid() -> int:
    (pid,) = helper_pids()
    return pid


def test_twenty_first_calls_start_one_helper_and_share_its_connection(lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"), port=KEYS)
    logins = len(lab.h1.logins())
    began = time.monotonic()
    path = caller.payload(details, payload={"current_details": "{}"})
    calls = [caller.start("ensure-network-device", str(path), "60") for _ in range(20)]
    for call in calls:
        assert json.loads(caller.finish(call, began).output)["host"] == "10.99.0.11"
    assert until(lambda: len(helper_pids()) == 1)
    assert lab.h1.logins()[logins:].count("Accepted publickey") == 1
    assert caller.log.count(" status=0 ") == 20


def test_a_call_to_a_connected_host_is_one_round_trip(lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"))
    logins = len(lab.h1.logins())
    for command in ("implement-network", "shutdown-network"):
        assert caller.call(command, details, STORED).output == ""
    assert [call["command"] for call in lab.h1.calls_received(but="")] == [
        "locate",
        "implement-network",
        "shutdown-network",
    ]
    assert lab.h1.logins()[logins:].count("Accepted publickey") == 1


def test_the_helper_inherits_nothing_from_its_first_caller(lab: SshLab, caller: Caller) -> None:
    """Reading a call's output to end of file does not wait for the helper."""
    secret = "hunter2-never-shown"
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), password=secret), timeout=60)
    assert ended.took_s < 50  # end of file came, while the helper runs for 60 s
    pid = helper_pid()
    proc = Path("/proc", str(pid))
    assert not [fd for fd in (proc / "fd").iterdir() if os.readlink(fd).startswith("pipe:")]
    assert os.getsid(pid) != os.getsid(0)
    assert os.readlink(proc / "cwd") == "/"
    for file in ("environ", "cmdline"):
        text = (proc / file).read_text()
        assert secret not in text
        assert "PRIVATE KEY" not in text
    assert "Max core file size        0" in (proc / "limits").read_text()


def test_a_call_in_flight_survives_a_killed_helper(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    details = caller.details(sshkey=lab.key("good"))
    process, began = caller.start_and_wait_for_call(details, 60, lab.h1, STORED)
    (first,) = lab.h1.calls_received()
    lab.h1.set_behaviour()
    killed = helper_pid()
    os.kill(killed, signal.SIGKILL)
    assert caller.finish(process, began).output == ""
    (again,) = lab.h1.calls_received()
    assert again["call_id"] == first["call_id"]  # the agent answers a repeat from memory
    assert helper_pid() != killed
    assert caller.call("implement-network", details, STORED).output == ""


def test_calls_succeed_whenever_the_helper_is_killed(lab: SshLab, caller: Caller) -> None:
    """Calls in sequence, while all helpers are killed at varying intervals."""
    details = caller.details(sshkey=lab.key("good"))
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        pause_s = 0.0
        while not over.wait(pause_s):
            pause_s = (pause_s + 0.07) % 0.6
            for pid in helper_pids():
                killed.append(pid)
                processes.kill(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for number in range(12):
            ended = caller.call("implement-network", details, STORED, {"vlan": str(100 + number)}, timeout=60)
            assert ended.output == ""
    finally:
        over.set()
        killer.join()
    assert len(set(killed)) > 3
    carried_out = {call["call_id"]: json.loads(call["payload"])["vlan"] for call in lab.h1.calls_received()}
    assert sorted(carried_out.values()) == [str(100 + number) for number in range(12)]


def test_a_hung_helper_is_abandoned(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    details = caller.details(sshkey=lab.key("good"))
    process, began = caller.start_and_wait_for_call(details, 12, lab.h1, STORED)
    lab.h1.set_behaviour()
    hung = helper_pid()
    os.kill(hung, signal.SIGSTOP)
    ended = caller.finish(process, began)
    assert ended.output == ""
    assert ended.took_s < 12
    assert helper_pids() == [hung]  # the call worked without the helper
    assert caller.call("implement-network", details, STORED).output == ""
    assert set(helper_pids()) > {hung}
    os.kill(hung, signal.SIGCONT)
    assert until(lambda: hung not in helper_pids())
    assert len(helper_pids()) == 1


def test_sigterm_ends_the_helper_but_no_call(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    process, began = caller.start_and_wait_for_call(caller.details(sshkey=lab.key("good")), 60, lab.h1, STORED)
    lab.h1.set_behaviour()
    told = helper_pid()
    os.kill(told, signal.SIGTERM)
    assert caller.finish(process, began).output == ""
    assert until(lambda: told not in helper_pids())


def test_an_idle_helper_ends_and_removes_its_socket(lab: SshLab, caller: Caller) -> None:
    caller.helper = "1"
    lab.h1.set_behaviour("hang", on=["implement-network"])  # the helper is in use until the call ends
    process, began = caller.start_and_wait_for_call(caller.details(sshkey=lab.key("good")), 60, lab.h1, STORED)
    assert len(sockets(caller)) == 1
    process.terminate()
    assert caller.finish(process, began).status == 143
    assert until(lambda: not helper_pids())
    assert sockets(caller) == []
    assert json.loads(caller.ensure(caller.details(sshkey=lab.key("good"))).output)["host"] == "10.99.0.11"


def test_idle_connections_are_closed_while_the_helper_is_in_use(lab: SshLab, caller: Caller) -> None:
    caller.helper = "2"

    def connections() -> int:
        inside = ["ip", "netns", "exec", MANAGEMENT]
        return run(*inside, "ss", "-tnH", "state", "established", "dport", f"= :{KEYS}").count("\n")

    lab.h1.set_behaviour("hang", on=["implement-network"])
    logins = len(lab.h1.logins())
    process, began = caller.start_and_wait_for_call(
        caller.details(sshkey=lab.key("pem"), port=KEYS), 120, lab.h1, STORED
    )
    helper = helper_pid()
    assert caller.ensure(caller.details(sshkey=lab.key("good"), port=KEYS)).output
    assert lab.h1.logins()[logins:].count("Accepted publickey") == 2
    assert until(lambda: connections() == 1)
    assert helper_pids() == [helper]
    process.terminate()
    assert caller.finish(process, began).status == 143


def test_callers_never_share_credentials(lab: SshLab, caller: Caller) -> None:
    good = caller.details(sshkey=lab.key("good"), port=KEYS)
    assert caller.ensure(good).output
    stranger = caller.ensure({**good, "sshkey": lab.key("stranger")})
    assert (stranger.status, stranger.line.partition(" (")[0]) == (
        2,
        "10.99.0.11: login as root by sshkey refused",
    )
    unknown = caller.ensure({**good, "username": "nobody-there"})
    assert "login as nobody-there by sshkey refused" in unknown.line
    pinned = caller.ensure({**good, "hostkeys": lab.h2.fingerprint()})
    assert "is not among the 1 pinned for it" in pinned.line
    assert caller.ensure(good).output
    assert len(helper_pids()) == 1


def test_other_users_cannot_use_the_helper(lab: SshLab, caller: Caller) -> None:
    """The helper does not use a directory open to others, and refuses other users who reach its socket anyway."""
    caller.ensure(caller.details(sshkey=lab.key("good")))
    (name,) = sockets(caller)
    path = Path("/var/tmp", f"stest-{os.getpid()}.sock")
    os.link(caller.home / name, path)
    request = pack(b"nonsense", b"/x", b"id", f"30 {time.monotonic()}".encode(), b"", b"{}").hex()
    ask = """
import socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    try:
        s.sendall(bytes.fromhex(sys.argv[2]))
        print(s.recv(99).hex())
    except (BrokenPipeError, ConnectionResetError):
        print("")
"""
    try:
        os.chmod(path, 0o777)
        heard = {
            uid: run(
                "setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-c", ask, str(path), request
            ).strip()
            for uid in (0, 65534)
        }
    finally:
        path.unlink()
    assert heard[65534] == ""
    assert ANSWER in bytes.fromhex(heard[0])
    assert unpack(pack(b"", b"a\0b")[4:]) == [b"", b"a\0b"]


def test_an_unprivileged_user_has_a_helper_of_its_own(lab: SshLab, caller: Caller, tmp_path: Path) -> None:
    os.chown(caller.home, 4242, 4242)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    assert caller.ensure(caller.details(sshkey=lab.key("good")), uid=4242).output
    assert os.stat(f"/proc/{helper_pid()}").st_uid == 4242
    assert caller.ensure(caller.details(sshkey=lab.key("good")), uid=4242).output
    assert len(helper_pids()) == 1


def test_a_replaced_program_starts_a_new_helper_and_the_old_one_finishes(
    lab: SshLab, caller: Caller, tmp_path: Path
) -> None:
    for name in ("cmd", "internal"):
        shutil.copytree(REPO / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    executable = (PYTHON, str(tmp_path / "tree" / "cmd" / "netloom" / "main.py"))
    details = caller.details(sshkey=lab.key("good"))
    lab.h1.set_behaviour("hang", on=["implement-network"])
    began = time.monotonic()
    old_call = caller.start("implement-network", str(caller.payload(details, STORED)), "60", executable=executable)
    assert until(lab.h1.calls_received)
    old = helper_pid()
    lab.h1.set_behaviour()
    with (tmp_path / "tree" / "internal" / "netloom" / "errors.py").open("a") as file:
        file.write("\n# a newer program\n")
    assert until(lambda: not sockets(caller))  # the old helper has noticed
    assert caller.call("implement-network", details, STORED, executable=executable).output == ""
    assert set(helper_pids()) > {old}
    assert old_call.poll() is None
    end_agents(lab.h1)  # the old helper repeats its call once
    assert caller.finish(old_call, began).output == ""
    assert until(lambda: old not in helper_pids())
    assert len(helper_pids()) == 1


def test_a_call_works_without_a_helper(lab: SshLab, caller: Caller) -> None:
    (caller.home / "helper.lock").mkdir()
    assert json.loads(caller.ensure(caller.details(sshkey=lab.key("good"))).output)["host"] == "10.99.0.11"
    assert helper_pids() == []
    (caller.home / "helper.lock").rmdir()
    caller.helper = "0"
    assert json.loads(caller.ensure(caller.details(sshkey=lab.key("good"))).output)["host"] == "10.99.0.11"
    assert helper_pids() == []


def break_connections(host: SshHost) -> None:
    """End the host's SSH connections."""
    subprocess.run(["ip", "netns", "exec", host.netns, "ss", "-K", "sport", "= :22"], capture_output=True, check=True)


def test_a_connection_broken_between_two_calls_is_reopened(lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"))
    assert caller.call("implement-network", details, STORED).output == ""
    break_connections(lab.h1)
    assert caller.call("implement-network", details, STORED).output == ""
    lab.h1.set_behaviour(
        "die-once", on=["shutdown-network"]
    )  # applies to the next agent, because the present one ends first
    end_agents(lab.h1)
    assert caller.call("shutdown-network", details, STORED).output == ""
    assert len(helper_pids()) == 1


def test_an_agent_that_ended_is_started_again_over_the_same_connection(lab: SshLab, caller: Caller) -> None:
    """Between two calls, during a call, and after an attempt that failed."""
    details = caller.details(sshkey=lab.key("good"))
    before = len(lab.h1.logins())
    assert caller.call("implement-network", details, STORED).output == ""
    lab.h1.set_behaviour("die-once", on=["shutdown-network"])
    end_agents(lab.h1)
    assert caller.call("implement-network", details, STORED).output == ""
    assert caller.call("shutdown-network", details, STORED).output == ""
    lab.h1.set_behaviour("refuse")
    end_agents(lab.h1)
    assert "the socket is on fire" in caller.call("implement-network", details, STORED).line
    assert lab.h1.logins()[before:].count("Accepted publickey") == 1
    lab.h1.set_behaviour("answer")
    assert caller.call("implement-network", details, STORED).output == ""


@pytest.mark.mutation("a-lost-connection-is-replaced")
def test_a_connection_that_breaks_when_the_agent_is_started_again_is_replaced(lab: SshLab, caller: Caller) -> None:
    details = caller.details(sshkey=lab.key("good"))
    assert caller.call("implement-network", details, STORED).output == ""
    lab.h1.set_behaviour("cut-once")
    before = len(lab.h1.logins())
    end_agents(lab.h1)
    assert caller.call("implement-network", details, STORED).output == ""
    assert lab.h1.logins()[before:].count("Accepted publickey") == 1


def test_a_login_refused_after_a_broken_connection_is_not_repeated(lab: SshLab, caller: Caller) -> None:
    """Repeated failures can lock accounts, for example when credentials changed while the channel was open."""
    details = caller.details(sshkey=lab.key("good"))
    lab.h1.set_behaviour("hang", on=["implement-network"])
    assert caller.call("shutdown-network", details, STORED).output == ""
    process, began = caller.start_and_wait_for_call(details, 60, lab.h1, STORED)
    before = len(lab.h1.logins())
    authorized = lab.h1.run_directory / "authorized"
    text = authorized.read_text()
    authorized.write_text("")
    try:
        break_connections(lab.h1)
        ended = caller.finish(process, began)
    finally:
        authorized.write_text(text)
    assert ended.status == 2
    assert "during implement-network, and again: 10.99.0.11: login as root by sshkey refused" in ended.line
    assert until(lambda: lab.h1.logins()[before:].count("closed by authenticating user root") == 1)


def test_after_a_silent_host_the_next_call_opens_a_new_connection(lab: SshLab, caller: Caller) -> None:
    """TCP retransmits a lost SYN with growing delays, so a call that joined an old connection would answer late."""
    path = str(
        caller.payload(caller.details(sshkey=lab.key("good"), port=BLACK_HOLE), payload={"current_details": "{}"})
    )

    def unanswered_connections() -> int:
        where = ["ip", "netns", "exec", MANAGEMENT]
        return run(*where, "ss", "-Htn", "state", "syn-sent", f"dport = :{BLACK_HOLE}").count("\n")

    began = time.monotonic()
    impatient = caller.start("ensure-network-device", path, "16")
    assert until(lambda: unanswered_connections() == 1)
    patient = caller.start("ensure-network-device", path, "120")  # shares the connection, with a later deadline
    assert "does not answer within 5 s" in caller.finish(impatient, began).line
    assert unanswered_connections() == 1
    third = caller.start("ensure-network-device", path, "120")
    assert until(lambda: unanswered_connections() == 2)
    for call in (patient, third):
        call.send_signal(signal.SIGTERM)
        assert caller.finish(call, began).status == 143
    assert until(lambda: unanswered_connections() == 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_call_and_not_the_helper(
    number: signal.Signals, status: int, lab: SshLab, caller: Caller
) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    process, began = caller.start_and_wait_for_call(caller.details(sshkey=lab.key("good")), 60, lab.h1, STORED)
    process.send_signal(number)
    ended = caller.finish(process, began)
    assert ended.status == status
    assert ended.line == f"ended by {number.name} while waiting for 10.99.0.11"
    assert caller.log.count(f"status={status}") == 1
    assert len(helper_pids()) == 1


def test_failures_are_the_same_with_and_without_a_helper(lab: SshLab, caller: Caller) -> None:
    def results() -> list[tuple[int, str]]:
        lab.h1.set_behaviour(replies={"implement-network": {"status": 3, "error": "zwei\nZeilen \u00fc"}})
        good = caller.details(sshkey=lab.key("good"))
        ended = [
            caller.call("implement-network", caller.details(sshkey="no key"), STORED),
            caller.call("implement-network", caller.details(hosts="-x"), STORED),
            caller.call("frob-network", good, STORED),
            caller.call("implement-network", good, STORED),
        ]
        return [(each.status, each.line) for each in ended]

    through_the_helper = results()
    assert len(helper_pids()) == 1
    caller.helper = "0"
    assert through_the_helper == results()
    assert [line.split(" status=")[1][:1] for line in caller.log.splitlines()] == ["1", "1", "1", "3"] * 2
    assert caller.log.count("frob-network") == 4  # command and error line of two calls


def test_hostile_hosts_take_no_memory_of_the_helper(lab: SshLab, caller: Caller) -> None:
    """A frame's claimed length, endless answers, and as many bytes as fit into a frame, again and again."""
    details = caller.details(sshkey=lab.key("good"), hosts="10.99.0.11")
    behaviours: list[dict[str, Any]] = [
        {"how": "frame", "length": 0x3FFFFFFF},
        {"how": "flood", "chunk": "3fffffff", "times": 1 << 14},
        {"how": "flood", "chunk": encode(Reply(call_id="x", output="x" * 900_000)).hex()},
        {"how": "flood", "chunk": (1 << 20).to_bytes(4, "big").hex(), "times": 1 << 14},
        {"how": "flood", "chunk": encode(Reply(call_id="x")).hex(), "times": 1 << 12},
    ]
    lab.h1.set_behaviour(**behaviours[0], on=["prepare-nic"])
    caller.ensure(details)
    (helper,) = helper_pids()

    def peak_mib() -> int:  # proc(5)
        return int(Path(f"/proc/{helper}/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10

    before = peak_mib()
    for behaviour in behaviours:
        lab.h1.set_behaviour(**behaviour, on=["prepare-nic"])
        for _ in range(2):
            ended = caller.call("prepare-nic", details, STORED, {"mac": "02:01:00:cc:00:03"}, timeout=120)
            assert (ended.status, ended.took_s < 60) == (2, True), ended
    assert helper_pids() == [helper]
    assert peak_mib() - before < 64
    lab.h1.set_behaviour()
    assert caller.ensure(details).status == 0


def test_a_large_payload_arrives_completely(lab: SshLab, caller: Caller) -> None:
    rule = {"type": "egress", "protocol": "tcp", "portStart": 22, "portEnd": 22, "sourceCidrs": [], "destCidrs": []}
    rules = {"rules": [{"id": n, **rule} for n in range(20_000)], "default_egress_allow": True, "cidr": "10.0.0.0/24"}
    sent = caller.call("apply-fw-rules", caller.details(sshkey=lab.key("good")), STORED, {"fw_rules": rules})
    assert sent.output == ""
    (call,) = lab.h1.calls_received()
    assert json.loads(call["payload"])["fw_rules"]["rules"][-1]["id"] == 19_999
