"""The sandbox of the guest process: attempts to leave it from inside, and its properties seen from outside."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest

from guestbed import INTRUDER, GuestProcess, guest_process
from netloom.guest.sandbox import GROUP_ID, USER_ID
from netloom.guestwire import decode
from netloom.guestwire.channel import ChannelError


def test_every_attempt_from_inside_is_refused() -> None:
    with guest_process(INTRUDER) as process:
        agent = process.connect()
        outcomes = process.attempts()
        assert set(outcomes.values()) == {"EPERM"}, outcomes
        assert len(outcomes) >= 14
        agent.close()
        assert process.connect().hello.pid == process.process.pid  # the process is still alive


def test_without_the_system_call_filter_the_other_layers_refuse_the_attempts() -> None:
    with guest_process((*INTRUDER, "--without-filter")) as process:
        agent = process.connect()
        assert "seccomp" not in agent.hello.layers
        assert process.attempts() == {
            "open a file": "ENOENT",
            "make a file": "EACCES",
            "list a directory": "possible",  # the empty one
            "connect out": "ENETUNREACH",
            "open a raw socket": "EPERM",
            "execute": "ENOENT",
            "fork": "EAGAIN",
            "ptrace": "EPERM",
            "signal another process": "EPERM",
            "become root": "EPERM",
            "leave the root directory": "EPERM",
            "mount": "EPERM",
            "make a user namespace": "EPERM",
            "get executable memory": "possible",
        }


def test_no_message_starts_attempts() -> None:
    """Earlier builds had a message ``try`` for these tests. It closes the connection, as every unknown message does."""
    body = msgspec.msgpack.encode({"type": "try", "seq": 1})
    with guest_process() as process:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(str(process.path))
            sock.sendall(len(body).to_bytes(4, "big") + body)
            said = b""
            while data := sock.recv(1 << 16):
                said += data
        assert decode(said[4:]) == process.connect().hello
        assert process.process.poll() is None


@pytest.mark.mutation("the-guest-process-is-not-root")
@pytest.mark.mutation("the-guest-process-has-a-memory-limit")
def test_defect_19_the_guest_process_has_no_privileges() -> None:
    with guest_process() as process:
        hello = process.connect().hello
        assert hello.layers == ("namespace", "root", "user", "capabilities", "limits", "seccomp")
        proc = Path(f"/proc/{hello.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        assert status["Uid"].split() == [str(USER_ID)] * 4
        assert status["Gid"].split() == [str(GROUP_ID)] * 4
        assert status["Groups"].split() == []
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert status["Threads"] == "1"
        assert os.readlink(proc / "root") == str(process.root)
        assert os.readlink(proc / "ns/net") != os.readlink("/proc/self/ns/net")
        limits = {line[:25].strip(): line[25:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max file size"] == ["1048576"] * 2
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert limits["Max data size"] == [str(max(2 << 30, memory // 8))] * 2
        # stdio, the control socket, epoll, and the wake-up sockets of the loop; none from the parent process.
        assert len(os.listdir(proc / "fd")) <= 9


def test_a_root_directory_that_is_not_empty_is_refused() -> None:
    process = GuestProcess(litter=True)
    assert process.process.wait(60) == 3
    with pytest.raises(ChannelError, match="not an empty directory"):
        process.connect()
    process.close()


def test_only_root_can_connect_as_the_agent() -> None:
    with guest_process() as process:
        os.chmod(process.path, 0o666)
        os.chmod(process.path.parent, 0o755)
        listen = ["timeout", "30", "nc", "-U", str(process.path)]
        for user, greeted in ((0, True), (65534, False)):
            with subprocess.Popen(listen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, user=user) as client:
                assert client.stdout is not None
                assert bool(client.stdout.read(1)) is greeted  # the process closes the connection of another user
                client.terminate()
