"""SSH logins of the management server, with real SSH servers and a stand-in for the agent."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bed.machines import until
from ssh.lab import HOSTILE, INTERACTIVE, KEYS, PLAIN, PYTHON, REPO, Caller, SshLab, run

PLACED = '{"host":"10.99.0.11","namespace":"cs-net-42"}'

WAYS: dict[str, dict[str, Any]] = {
    "key, root": {"sshkey": "good"},
    "key, sudo": {"sshkey": "good", "username": "ops"},
    "key in PEM": {"sshkey": "pem"},
    "key beats a wrong password": {"sshkey": "good", "password": "wrong"},
    "password, root": {"password": HOSTILE},
    "password, sudo": {"password": HOSTILE, "username": "ops"},
    "keyboard-interactive": {"password": HOSTILE, "port": str(INTERACTIVE)},
    "port as a number": {"sshkey": "good", "port": KEYS},  # defect 67
    "IPv6": {"sshkey": "good", "hosts": "fd99::11"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_login_method_works(way: str, lab: SshLab, caller: Caller) -> None:
    """Defects 23 and 24: a key works at all, and so does a password with quotes, backslashes and letters."""
    details = caller.details(**WAYS[way])
    if "sshkey" in details:
        details["sshkey"] = lab.key(details["sshkey"])
    ended = caller.ensure(details)
    assert ended.output == PLACED.replace("10.99.0.11", details["hosts"])
    assert [call["uid"] for call in lab.h1.calls_received(but="")] == [0]


@pytest.mark.parametrize("name", ["good", "pem"])
@pytest.mark.parametrize("mangle", ["crlf", "no last newline", "both", "escaped twice"])
def test_a_key_works_with_any_line_endings(name: str, mangle: str, lab: SshLab, caller: Caller) -> None:
    key = lab.key(name)
    key = {
        "crlf": key.replace("\n", "\r\n"),
        "no last newline": key.rstrip("\n"),
        "both": key.replace("\n", "\r\n").rstrip(),
        "escaped twice": key.replace("\n", "\\n"),
    }[mangle]
    assert caller.ensure(caller.details(sshkey=key)).output == PLACED


def test_the_callers_own_key_is_used_when_none_is_registered(lab: SshLab, caller: Caller, tmp_path: Path) -> None:
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True)
    (ssh / "id_ed25519").write_text(lab.key("good"))
    environ = {"HOME": str(ssh.parent), "NETLOOM_DIR": str(caller.home)}
    assert caller.ensure(caller.details(), environ=environ).output == PLACED


def accepts(path: Path) -> bool:
    """Whether a process listens on the socket: its file exists before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_the_callers_ssh_agent_is_used_when_no_key_is_registered(lab: SshLab, caller: Caller, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(lab.key("good"))
    listening = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(listening)], stdout=subprocess.DEVNULL) as agent:
        try:
            assert until(lambda: accepts(listening), seconds=20)
            subprocess.run(
                ["ssh-add", "-q", str(key)], env={**os.environ, "SSH_AUTH_SOCK": str(listening)}, check=True, timeout=20
            )
            environ = {"SSH_AUTH_SOCK": str(listening), "HOME": "/nonexistent", "NETLOOM_DIR": str(caller.home)}
            assert caller.ensure(caller.details(), environ=environ).output == PLACED
        finally:
            agent.terminate()


def test_missing_credentials_are_reported(lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(caller.details())
    assert ended.status == 2
    assert "10.99.0.11: nothing to log in with: no sshkey, no password, and the calling user has no key" in ended.line


REFUSALS: list[tuple[dict[str, Any], str, str, int]] = [
    ({"password": "wrong"}, "login as root by password refused", "Failed password for root", PLAIN),
    ({"sshkey": "stranger"}, "login as root by sshkey refused", "", PLAIN),
    ({"password": "wrong", "port": INTERACTIVE}, "login as root by password refused", "", INTERACTIVE),
    ({"password": HOSTILE, "port": KEYS}, "the host takes no password", "", KEYS),
    ({"sshkey": "stranger", "password": HOSTILE}, "login as root by sshkey refused", "", PLAIN),
    ({"password": HOSTILE, "username": "nobody-here"}, "login as nobody-here by password refused", "", PLAIN),
]


@pytest.mark.parametrize(("details", "said", "logged", "port"), REFUSALS)
def test_a_refused_login_makes_one_attempt_and_prints_one_line(
    details: dict[str, Any], said: str, logged: str, port: int, lab: SshLab, caller: Caller
) -> None:
    """Wrong credentials do not lock an account and do not appear in the output."""
    before = len(lab.h1.logins())
    details = caller.details(**details)
    if "sshkey" in details:
        details["sshkey"] = lab.key(details["sshkey"])
    ended = caller.ensure(details)
    assert ended.status == 2
    assert said in ended.line
    assert ended.line.startswith("10.99.0.11: ")
    # The server writes its log after it has sent the refusal.
    assert until(lambda: logged in lab.h1.logins()[before:], seconds=20)
    attempts = lab.h1.logins()[before:]
    assert attempts.count("Failed password") + attempts.count("authentication failure") <= 1
    assert lab.h1.calls_received(but="") == []
    for secret in (details.get("password", ""), details.get("sshkey", "").strip()[40:100]):
        assert not secret or secret not in ended.stderr + caller.log


BAD_KEYS = {
    "a public key": "that is a public key",
    "an encrypted key": "the key is encrypted",
    "an encrypted key in PEM": "the key is encrypted",
    "a text": "not a private key",
    "half a key": "not a private key",
}


@pytest.mark.parametrize("what", BAD_KEYS)
def test_an_invalid_key_is_a_configuration_error(what: str, lab: SshLab, caller: Caller) -> None:
    keys = lab.directory / "keys"
    text = {
        "a public key": (keys / "good.pub").read_text(),
        "an encrypted key": lab.key("locked", "-N", "secret words"),
        "an encrypted key in PEM": lab.key("locked-pem", "-t", "rsa", "-m", "PEM", "-N", "secret words"),
        "a text": "hunter2 is no key",
        "half a key": lab.key("good")[:200],
    }[what]
    ended = caller.ensure(caller.details(sshkey=text))
    assert ended.status == 1
    assert BAD_KEYS[what] in ended.line
    assert "sshkey" in ended.line
    assert not any(part in ended.stderr + caller.log for part in text.split() if len(part) > 20)
    assert "hunter2" not in ended.stderr


def test_sudo_with_a_password_prompt_is_reported_with_a_remedy(lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), username="asked"))
    assert ended.status == 2
    assert "10.99.0.11: sudo wants a password from asked" in ended.line
    assert "NOPASSWD" in ended.line


def test_a_sudo_refusal_is_reported_with_a_remedy(lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), username="plain"))
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: sudo ")
    assert "/etc/sudoers.d" in ended.line


def test_a_sudo_that_waits_for_a_name_server_is_named_and_does_not_fail_the_call(lab: SshLab, caller: Caller) -> None:
    """sudo looks up the name of its own host, for up to 20 s, and says so before it executes the command."""
    by_ops = caller.details(sshkey=lab.key("good"), username="ops")
    with lab.h1.without_its_name(timeout_s=1):
        assert caller.ensure(by_ops).output == PLACED
        assert "10.99.0.11: sudo needed " in caller.log
        assert "put the host's own name into its /etc/hosts" in caller.log
        # What sudo says is not taken for the reason of another failure.
        ended = caller.ensure(by_ops, agent="/nowhere/netloom agent")
        assert ended.line.startswith("10.99.0.11: no agent at /nowhere/netloom")
        assert "unable to resolve" not in ended.line


@pytest.mark.mutation("a-slow-sudo-is-told-apart", instead="False")
def test_a_call_that_ends_while_sudo_waits_names_the_likely_reason(lab: SshLab, caller: Caller) -> None:
    with lab.h1.without_its_name(timeout_s=30):
        ended = caller.ensure(caller.details(sshkey=lab.key("good"), username="ops"), timeout=6)
    assert ended.status == 2
    assert "SSH is fine, but the agent does not answer" in ended.line
    assert "put the host's own name into its /etc/hosts: sudo looks it up each time" in ended.line


@pytest.mark.parametrize("user", ["root", "ops"])
@pytest.mark.parametrize("agent", ["/nowhere/netloom agent", "/etc/passwd agent"])
def test_the_path_of_a_missing_agent_is_reported(user: str, agent: str, lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), username=user), agent=agent)
    assert ended.status == 2
    assert f"no agent at {agent.split()[0]}" in ended.line


def test_secrets_do_not_appear_in_the_process_table(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    process, began = caller.start_and_wait_for_call(caller.details(password=HOSTILE), 60, lab.h1)
    # No subprocess may write to CloudStack's output or read its stdin, which stays open.
    assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    secret = HOSTILE.encode()
    # A call starts no process, including children of its threads.
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            assert (task / "children").read_text() == ""
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ") if entry.name.isdigit() else ():
            try:
                assert secret not in (entry / name).read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    process.terminate()
    ended = caller.finish(process, began)
    assert ended.status == 143
    assert HOSTILE.strip() not in ended.stderr + caller.log
    for file in caller.home.iterdir():
        assert file.name in {"known_hosts", "known_hosts.lock", "netloom.log"}
        assert file.stat().st_mode & 0o777 == 0o600
        assert secret not in file.read_bytes()


def test_a_caller_needs_no_user_name_home_or_environment(lab: SshLab, caller: Caller) -> None:
    """CloudStack's service has no HOME and no runtime directory. This uid also has no passwd entry."""
    path = lab.directory / "m" / "call.payload"
    path.write_bytes(
        caller.payload(caller.details(sshkey=lab.key("good")), payload={"current_details": "{}"}).read_bytes()
    )
    uid = 64_999
    # The interpreter and the payload may be readable by root only, so make them accessible to this uid.
    for directory in (lab.directory, lab.directory.parent, lab.directory.parent.parent, lab.directory / "m"):
        directory.chmod(directory.stat().st_mode | 0o011)
    path.chmod(0o644)
    began = time.monotonic()
    ended = caller.finish(caller.start("ensure-network-device", str(path), "30", environ={}, uid=uid), began)
    assert ended.output == PLACED
    kept = lab.directory / "m" / "vartmp" / f"netloom-{uid}"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_uid == uid
    assert sorted(file.name for file in kept.iterdir()) == ["known_hosts", "known_hosts.lock", "netloom.log"]


def test_the_command_named_in_the_error_forgets_a_key(lab: SshLab, caller: Caller) -> None:
    assert caller.ensure(caller.details(sshkey=lab.key("good"))).output == PLACED
    main = str(REPO / "cmd" / "netloom" / "main.py")
    environ = {**os.environ, "NETLOOM_DIR": str(caller.home)}
    command = [PYTHON, main, "hosts", "forget", "10.99.0.11"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert lab.h1.fingerprint() in done.stdout
    assert (caller.home / "known_hosts").read_text() == ""
    assert run("env", f"NETLOOM_DIR={caller.home}", PYTHON, main, "hosts", "list", "--json") == "[]\n"
