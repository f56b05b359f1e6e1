"""Deployment: the first call to a host without netloom uploads the program over the SSH connection and starts it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from bed import Bed
from bed.lab import Host
from bed.machines import until
from netloom.extension.package import machine_of
from ssh.deploy_lab import (
    LIBEXEC,
    ONE,
    SETTLE_S,
    Server,
    builds,
    continue_upload,
    current,
    in_background,
    kill_agent,
    running_agents,
    slow_disk,
    succeeded,
    uploaded_bytes,
)
from ssh.onefile import OneFiles


@pytest.mark.parametrize("user", ["root", "netadmin"])
def test_the_first_call_uploads_the_program_and_the_next_is_one_round_trip(
    user: str, bed: Bed, host: Host, one: Path
) -> None:
    server = Server(bed, one, user=user)
    assert succeeded(server.ask())
    assert builds(host) == [ONE, "current"]
    assert current(host) == ONE
    assert running_agents(host) == [ONE]
    sent = hashlib.sha256(one.read_bytes()).hexdigest()
    assert host.sh(f"sha256sum <{LIBEXEC}/{ONE}/netloom").split()[0] == sent
    assert host.sh(f"stat -c '%a %U' {LIBEXEC} {LIBEXEC}/{ONE} {LIBEXEC}/{ONE}/netloom").split() == ["755", "root"] * 3
    assert host.listing(f"{LIBEXEC}/{ONE}") == ["netloom"]
    logins = host.read("/var/log/sshd.log").count("Accepted publickey")
    assert logins == 1  # the upload used the same connection
    assert succeeded(server.ask())
    assert host.read("/var/log/sshd.log").count("Accepted publickey") == logins
    assert server.log().count(" from byte ") == 1


def test_an_upload_continues_in_the_helper_after_the_deadline(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one, timeout_s=4)
    slow_disk(host, stop=1 << 20)
    ended = server.ask()
    assert ended.status == 2
    assert re.search(rf"agent being installed on {host.address}, \d+ %", ended.output)
    assert ended.seconds < 4
    assert uploaded_bytes(host) == 1 << 20
    continue_upload(host)
    assert server.logged(f"activated: {ONE}")
    server.cloud.timeout_s = 60
    assert succeeded(server.ask())
    assert server.log().count(" from byte ") == 1


def test_without_a_helper_the_next_call_resumes_the_upload(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one, helper="0", timeout_s=4)
    slow_disk(host, stop=1 << 20)
    ended = server.ask()
    assert ended.status == 2
    assert f"agent being installed on {host.address}" in ended.output
    continue_upload(host)
    assert until(lambda: "dd" not in host.sh("ps -A -o comm=").split(), seconds=SETTLE_S)
    there = uploaded_bytes(host)
    assert there >= 1 << 20
    server.cloud.timeout_s = 60
    assert succeeded(server.ask())
    assert f"from byte {there // 65536 * 65536}\n" in server.log()


def test_an_upload_is_resumed_after_a_broken_connection(bed: Bed, host: Host, one: Path) -> None:
    """The upload process of the broken connection may write later on the host. That does not corrupt the program."""
    server = Server(bed, one, helper="0", timeout_s=12)
    slow_disk(host, stop=2 << 20)
    asked = in_background(server)
    assert until(lambda: uploaded_bytes(host) == 2 << 20, seconds=SETTLE_S)
    host.partition("mgmt")
    ended = asked()
    host.heal()
    assert ended.status == 2
    # The next keepalive is not acknowledged: four seconds later the connection is given up, unless time is up before.
    # Then the kernel may know already that nobody answers ARP ("No route to host").
    assert host.address in ended.output
    assert "port 22" in ended.output or "agent being installed on" in ended.output
    server.cloud.timeout_s = 60
    asked = in_background(server)
    assert server.logged(f"from byte {2 << 20}\n")
    continue_upload(host)
    assert succeeded(asked())
    assert current(host) == ONE
    assert host.sh(f"sha256sum <{LIBEXEC}/{ONE}/netloom").split()[0] == hashlib.sha256(one.read_bytes()).hexdigest()


def test_two_servers_can_upload_at_the_same_time(bed: Bed, host: Host, one: Path) -> None:
    servers = [Server(bed, one) for _ in range(2)]
    slow_disk(host, stop=1 << 20)
    asked = [in_background(server) for server in servers]
    assert until(lambda: host.sh("ps -A -o comm=").split().count("dd") == 2, seconds=SETTLE_S)
    continue_upload(host)
    assert all(succeeded(ended()) for ended in asked)
    assert running_agents(host) == [ONE]
    assert host.listing(f"{LIBEXEC}/{ONE}") == ["netloom"]
    assert host.sh(f"sha256sum <{LIBEXEC}/{ONE}/netloom").split()[0] == hashlib.sha256(one.read_bytes()).hexdigest()


def test_a_corrupted_upload_is_never_executed(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one)
    slow_disk(host, spoil=True)
    ended = server.ask()
    assert ended.status == 2
    assert "what arrived there is not what was sent" in ended.output
    assert host.listing(f"{LIBEXEC}/{ONE}") == []
    host.sh("rm /run/dd-spoil")
    assert succeeded(server.ask())


def test_a_disk_full_during_upload_is_reported_and_cleaned_up(bed: Bed, host: Host, one: Path) -> None:
    host.sh("mount -t tmpfs -o size=64m none /usr/local && mkdir /usr/local/bin")
    slow_disk(host, stop=1 << 20)
    server = Server(bed, one)
    asked = in_background(server)
    assert until(lambda: uploaded_bytes(host) == 1 << 20, seconds=SETTLE_S)
    host.sh("cat /dev/zero >/usr/local/ballast", check=False)
    continue_upload(host)
    ended = asked()
    assert ended.status == 2
    assert "the agent could not be uploaded: error writing: No space left on device" in ended.output
    assert uploaded_bytes(host) == 0
    assert host.listing(LIBEXEC) == [".made-parent"]


REFUSED = {
    "no room": ("mount -t tmpfs -o size=20m none /usr/local", "20 MiB are free at /usr/local/libexec/netloom"),
    "noexec": ("mount -t tmpfs -o noexec none /usr/local", "/usr/local/libexec/netloom is mounted noexec"),
    "read-only": ("mount -t tmpfs -o ro none /usr/local", "/usr/local cannot be written to"),
    "another machine": (
        'printf \'#!/bin/sh\\n[ "$1" = -m ] && echo aarch64 || /usr/bin/uname "$@"\\n\' >/usr/local/bin/uname;'
        " chmod 755 /usr/local/bin/uname",
        "is a aarch64 machine, this netloom is made for x86_64",
    ),
    "a file in the way": (f"mkdir -p /usr/local/libexec; touch {LIBEXEC}", f"{LIBEXEC} is no directory, not ours"),
    "a link in the way": (f"mkdir -p /usr/local/libexec; ln -s /tmp {LIBEXEC}", f"{LIBEXEC} is a link, not ours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_deployment_obstacles_are_reported_and_nothing_is_left(case: str, bed: Bed, host: Host, one: Path) -> None:
    script, said = REFUSED[case]
    host.sh(script)
    before = host.sh("find /usr/local -mindepth 1 | sort")
    ended = Server(bed, one).ask()
    assert ended.status == 2
    assert said in ended.output
    assert ended.output.startswith(host.address)
    assert host.sh("find /usr/local -mindepth 1 | sort") == before


def test_a_failed_selftest_is_reported_with_the_missing_feature(bed: Bed, host: Host, one: Path) -> None:
    host.sh("for f in /usr/sbin/nft /usr/lib/*/libnftables.so.1; do mount --bind /dev/null $f; done")
    server = Server(bed, one)
    ended = server.ask()
    assert ended.status == 2
    assert "this host cannot carry networks: nft: neither libnftables nor the program nft is installed" in ended.output
    assert "apt-get install nftables" in ended.output
    assert current(host) == ""
    assert running_agents(host) == []
    assert host.listing(LIBEXEC) == [".made-parent", ONE]
    host.sh("for f in /usr/sbin/nft /usr/lib/*/libnftables.so.1; do umount $f; done")
    assert succeeded(server.ask())  # the program was already uploaded
    assert server.log().count(" from byte ") == 1


# The selftest lasts until a file exists.
WAITS = {"netloom/agent/setup/selftest.py": "def require():\n    while not os.path.exists('/run/go'): time.sleep(0.01)"}


def agent_waits(host: Host) -> bool:
    """Whether a started agent waits for a lock (proc_locks(5))."""
    return any("->" in line for line in host.read("/proc/locks").splitlines())


def test_the_agent_starts_during_the_selftest_and_serves_after_it(bed: Bed, host: Host, files: OneFiles) -> None:
    server = Server(bed, files.make("0.1.0-1-dddd", changes=WAITS))
    asked = in_background(server)
    assert until(lambda: agent_waits(host), seconds=SETTLE_S)
    assert host.listing("/run/netloom") == ["agent.lock", "install.lock", "start.lock"]
    assert host.sh("ls /var/lib/netloom 2>/dev/null", check=False) == ""
    host.write("/run/go", "")
    assert succeeded(asked())
    assert host.listing(LIBEXEC) == [".made-parent", "0.1.0-1-dddd", "current"]


def kill_selftest(server: Server, host: Host) -> None:
    """Make a call, and kill the installation during the selftest."""
    asked = in_background(server)
    assert until(lambda: agent_waits(host), seconds=SETTLE_S)
    host.sh("kill -9 $(ps -A -o pid=,args= | sed -n 's/^ *\\([0-9]*\\) .* agent activate$/\\1/p')")
    assert asked().status == 2


@pytest.mark.mutation("an-untested-host-is-not-served")
def test_an_agent_whose_selftest_was_killed_does_not_serve(bed: Bed, host: Host, files: OneFiles) -> None:
    kill_selftest(Server(bed, files.make("0.1.0-1-dddd", changes=WAITS)), host)
    assert until(lambda: " agent serve" not in host.sh("ps -A -o args="), seconds=SETTLE_S)
    assert "the selftest of this host has not passed" in host.read("/var/log/netloom/agent.log")


@pytest.mark.mutation("an-untested-host-is-installed-again")
def test_the_next_call_tests_a_host_whose_selftest_was_killed(bed: Bed, host: Host, files: OneFiles) -> None:
    server = Server(bed, files.make("0.1.0-1-dddd", changes=WAITS))
    kill_selftest(server, host)
    host.write("/run/go", "")
    again = server.ask()
    assert succeeded(again)
    assert again.seconds < 15


def test_a_program_corrupted_on_the_host_is_uploaded_again(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one, helper="0")
    assert succeeded(server.ask())
    kill_agent(host)
    host.sh(f"printf broken >{LIBEXEC}/{ONE}/netloom")
    assert succeeded(server.ask())
    assert server.log().count(" from byte ") == 2


def test_a_directory_mounted_noexec_is_reported(bed: Bed, host: Host, one: Path) -> None:
    server = Server(bed, one, helper="0")
    assert succeeded(server.ask())
    kill_agent(host)
    host.sh("mount --bind /usr/local /usr/local && mount -o remount,bind,noexec /usr/local")
    ended = server.ask()
    assert ended.status == 2
    assert f"{LIBEXEC} is mounted noexec" in ended.output


def test_the_architecture_is_read_from_elf_files() -> None:
    assert machine_of(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\x00") == "x86_64"
    assert machine_of(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7\x00") == "aarch64"
    assert machine_of(b"\x7fELF\x02\x02\x01" + bytes(11) + b"\x00\x16") == "s390x"
    assert machine_of(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x28\x00") == "another machine"
