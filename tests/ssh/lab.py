"""Two hosts with real SSH servers and a management server, made of namespaces.

A host has its own network, /etc, /run, /root and /home. Its SSH servers listen on several ports with different
configurations. The management server is a network namespace without a route to the outside.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes

SETTLE_S = 20.0
REPO = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
MANAGEMENT = "stest-m"

# Ports of a host's SSH servers.
PLAIN = 22  # keys and passwords
INTERACTIVE = 2022  # keyboard-interactive by PAM only
KEYS = 2122  # keys only
BUSY = 2222  # keys only, one login at a time
BLACK_HOLE = 2322  # packets are dropped
MUTE = 2422  # a server listens and sends nothing

# Special characters of shells, JSON and configuration files, and two that need UTF-8.
HOSTILE = """ p"w'\\$(id) `x` #;&|<>%!*~ üµ \\n {}"""

# The interpreter may be below /root, which is hidden here, so its directory is mounted at the same path again.
_PRIVATE = r"""
set -e
mount --make-rprivate /
mkdir -p "$D/fs"
mount -t tmpfs -o mode=755 none "$D/fs"
mkdir "$D/fs/keep" "$D/fs/upper" "$D/fs/work"
case "$PREFIX" in /root/*) mount --bind "$PREFIX" "$D/fs/keep" ;; esac
mount -t tmpfs -o mode=755 none /root
case "$PREFIX" in /root/*) mkdir -p "$PREFIX"; mount --bind "$D/fs/keep" "$PREFIX" ;; esac
"""

_HOST = (
    _PRIVATE
    + r"""
mount -t overlay -o "lowerdir=/etc,upperdir=$D/fs/upper,workdir=$D/fs/work" overlay /etc
mount --bind "$D/run" /run
mount -t tmpfs -o mode=755 none /home
mkdir -p /run/sshd /run/sudo
hostname=$(cat /proc/sys/kernel/hostname)
printf '127.0.0.1 localhost %s\n' "$hostname" > /etc/hosts
: > /etc/resolv.conf
for user in ops plain asked; do useradd -m -s /bin/bash $user; done
chpasswd -c SHA256 < "$D/passwords"
printf 'ops ALL=(root) NOPASSWD: ALL\nasked ALL=(root) ALL\n' > /etc/sudoers.d/stest
chmod 440 /etc/sudoers.d/stest
exec "$@"
"""
)

_CLIENT = (
    _PRIVATE
    + r"""
mount --bind "$D/vartmp" /var/tmp
mount --bind "$D/resolv.conf" /etc/resolv.conf
exec "$@"
"""
)


def run(*argv: str, stdin: str = "") -> str:
    """Run a program; returns its stdout. Raises AssertionError when the exit status is not 0."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(argv)}: {done.stderr}"
    return done.stdout


@dataclass
class CallResult:
    """Exit status, output and duration of one call."""

    status: int
    stdout: str
    stderr: str
    took_s: float

    @property
    def line(self) -> str:
        """The error line. Asserts a failure with an empty stdout and one ASCII line on stderr."""
        assert self.status != 0, f"it succeeded: {self.stdout!r}"
        assert self.stdout == ""
        assert self.stderr.isascii()
        assert self.stderr.endswith("\n")
        assert self.stderr.count("\n") == 1, self.stderr
        return self.stderr[:-1]

    @property
    def output(self) -> str:
        """The output. Asserts success, complete lines on stdout and an empty stderr."""
        assert (self.status, self.stderr) == (0, ""), self.stderr
        assert not self.stdout or self.stdout.endswith("\n")
        return self.stdout.removesuffix("\n")


class SshHost:
    """One simulated host."""

    def __init__(self, name: str, number: int, directory: Path) -> None:
        self.netns = f"stest-{name}"
        self.address = f"10.99.0.{number}"
        self.address6 = f"fd99::{number}"
        self.directory = directory
        self.run_directory = directory / "run"
        self._sshd: list[subprocess.Popen[bytes]] = []
        self.ports = (PLAIN, INTERACTIVE, KEYS, BUSY)

    def boot(self, authorized: str) -> None:
        self.run_directory.mkdir(parents=True)
        users = ("root", "ops", "plain", "asked")
        passwords = self.directory / "passwords"
        passwords.touch(0o600)
        passwords.write_text("".join(f"{user}:{HOSTILE}\n" for user in users))
        (self.run_directory / "authorized").write_text(authorized)
        self.new_host_keys()
        self.set_behaviour()
        common = (
            "HostKey /run/hostkey_ed25519\nHostKey /run/hostkey_rsa\nPermitRootLogin yes\nStrictModes no\nUseDNS no\n"
            "PidFile none\nAuthorizedKeysFile /run/authorized\nPrintMotd no\n"
        )
        keys_only = "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        for port, settings in {
            PLAIN: "UsePAM no\nPasswordAuthentication yes\nKbdInteractiveAuthentication no\n",
            INTERACTIVE: "UsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication yes\n"
            "PubkeyAuthentication no\n",
            KEYS: keys_only + "MaxStartups 100\n",
            BUSY: keys_only + "MaxStartups 1\n",
        }.items():
            (self.run_directory / f"sshd_{port}").write_text(f"Port {port}\n{common}{settings}")
        self.start()

    def start(self) -> None:
        """Start all SSH servers in one set of namespaces."""
        servers = " ".join(f"/usr/sbin/sshd -D -e -f /run/sshd_{port} 2>>/run/sshd.log &" for port in self.ports)
        hung = f"exec nc -l -k -p {MUTE} </dev/null >/dev/null"
        environment = {**os.environ, "D": str(self.directory), "PREFIX": sys.base_prefix}
        inner = ["sh", "-c", f"{servers} {hung}"]
        self._sshd = [
            subprocess.Popen(
                ["ip", "netns", "exec", self.netns, "unshare", "-m", "sh", "-c", _HOST, "host", *inner],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        ]
        for port in (*self.ports, MUTE):
            self._wait_for(port)

    def _wait_for(self, port: int) -> None:
        for _ in range(200):
            if f":{port} " in run("ip", "netns", "exec", self.netns, "ss", "-ltnH"):
                return
            time.sleep(0.1)
        raise AssertionError(f"no listener on {port}")

    def new_host_keys(self) -> None:
        for kind in ("ed25519", "rsa"):
            path = self.run_directory / f"hostkey_{kind}"
            for old in (path, path.with_suffix(".pub")):
                old.unlink(missing_ok=True)
            run("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path))

    def public_key(self, kind: str = "ed25519") -> str:
        return " ".join((self.run_directory / f"hostkey_{kind}.pub").read_text().split()[:2])

    def fingerprint(self, kind: str = "ed25519") -> str:
        return run("ssh-keygen", "-lf", str(self.run_directory / f"hostkey_{kind}.pub")).split()[1]

    def halt(self) -> None:
        """End every process of the host."""
        for pid in run("ip", "netns", "pids", self.netns).split():
            processes.kill(int(pid))
        for process in self._sshd:
            process.wait()
        self._sshd = []

    def set_behaviour(self, how: str = "answer", **script: Any) -> None:
        """Set what the stand-in agent does from the next connection on, and delete its record of calls."""
        (self.run_directory / "standin.json").write_text(json.dumps({"how": how, **script}))
        for name in ("standin.log", "standin.log.died"):
            (self.run_directory / name).unlink(missing_ok=True)

    def calls_received(self, *, but: str = "locate") -> list[dict[str, Any]]:
        """The calls that the stand-in agent got, without ``locate`` calls."""
        journal = self.run_directory / "standin.log"
        calls = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return [call for call in calls if call["command"] != but]

    @contextmanager
    def without_its_name(self, *, timeout_s: int) -> Iterator[None]:
        """Let the host not find its own name: it is not in /etc/hosts, and the name server never answers."""
        ours = self._sh("cat /etc/hosts")
        # h2 drops such packets.
        asks = f"nameserver 10.99.0.12\\noptions timeout:{timeout_s} attempts:1\\n"
        self._sh(f"printf '127.0.0.1 localhost\\n' > /etc/hosts; printf '{asks}' > /etc/resolv.conf")
        try:
            yield
        finally:
            self._sh(f"printf %s {shlex.quote(ours)} > /etc/hosts; : > /etc/resolv.conf")

    @contextmanager
    def without(self, program: str) -> Iterator[None]:
        """Let the host not have this program."""
        directory = os.path.dirname(program)
        layers = "lowerdir=$D,upperdir=/run/layers/upper,workdir=/run/layers/work"
        self._sh(
            f"D={directory}; mkdir -p /run/layers; mount -t tmpfs none /run/layers; mkdir /run/layers/upper "
            f"/run/layers/work; mount -t overlay -o {layers} overlay $D; rm {program}"
        )
        try:
            yield
        finally:
            self._sh(f"umount -l {directory}; umount -l /run/layers; rmdir /run/layers")

    def _sh(self, script: str) -> str:
        return run("nsenter", "-t", str(self._sshd[0].pid), "-m", "sh", "-ec", script)

    def logins(self) -> str:
        return (self.run_directory / "sshd.log").read_text()


class SshLab:
    """Two hosts and the management server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.h1 = SshHost("h1", 11, directory / "h1")
        self.h2 = SshHost("h2", 12, directory / "h2")
        self.absent = "10.99.0.99"
        (directory / "keys").mkdir()
        (directory / "m" / "vartmp").mkdir(parents=True)
        (directory / "m" / "vartmp").chmod(0o1777)
        # A resolver that never answers, because its packets are dropped.
        (directory / "m" / "resolv.conf").write_text(f"nameserver {self.h1.address}\noptions timeout:5 attempts:3\n")

    def key(self, name: str, *arguments: str) -> str:
        """The text of a private key, which is created at the first call."""
        path = self.directory / "keys" / name
        if not path.exists():
            run("ssh-keygen", "-q", "-N", "", "-C", name, *arguments, "-f", str(path))
        return path.read_text()

    def up(self) -> None:
        self.down()
        run("ip", "netns", "add", MANAGEMENT)
        self._in(MANAGEMENT, "ip link set lo up; ip link add sw type bridge; ip link set sw up")
        self._in(MANAGEMENT, "ip address add 10.99.0.1/24 dev sw; ip -6 address add fd99::1/64 dev sw nodad")
        # An address that nobody has is unreachable after three of these times, by default after 3 s.
        self._in(MANAGEMENT, "sysctl -qw net.ipv4.neigh.sw.retrans_time_ms=250")
        for host in (self.h1, self.h2):
            port = host.netns.replace("stest", "p")
            run("ip", "netns", "add", host.netns)
            run("ip", "-n", MANAGEMENT, "link", "add", port, "type", "veth", "peer", "eth0", "netns", host.netns)
            self._in(MANAGEMENT, f"ip link set {port} master sw up")
            self._in(host.netns, "ip link set lo up; ip link set eth0 up")
            self._in(host.netns, f"ip address add {host.address}/24 dev eth0")
            self._in(host.netns, f"ip -6 address add {host.address6}/64 dev eth0 nodad")
            rule = f"add table inet hole; add chain inet hole in {{ type filter hook input priority 0; }}; \
                add rule inet hole in tcp dport {BLACK_HOLE} drop; add rule inet hole in udp dport 53 drop"
            self._in(host.netns, f"nft '{rule}'")
        self.key("good", "-t", "ed25519")
        self.key("pem", "-t", "rsa", "-b", "2048", "-m", "PEM")
        self.key("stranger", "-t", "ed25519")
        public = "".join((self.directory / "keys" / f"{name}.pub").read_text() for name in ("good", "pem"))
        self.h1.boot(public)
        self.h2.boot(public)

    def down(self) -> None:
        existing = {line.split()[0] for line in run("ip", "netns", "list").splitlines() if line}
        for netns in {MANAGEMENT, self.h1.netns, self.h2.netns} & existing:
            for pid in run("ip", "netns", "pids", netns).split():
                processes.kill(int(pid))
            run("ip", "netns", "delete", netns)

    @contextmanager
    def disconnected(self, host: SshHost) -> Iterator[None]:
        """Disconnect the host silently: its packets are dropped and links stay up."""
        port = host.netns.replace("stest", "p")
        run("ip", "-n", MANAGEMENT, "link", "set", port, "nomaster")
        try:
            yield
        finally:
            run("ip", "-n", MANAGEMENT, "link", "set", port, "master", "sw")

    def _in(self, netns: str, script: str) -> None:
        run("ip", "netns", "exec", netns, "sh", "-ec", script)


@contextmanager
def running_lab(directory: Path) -> Iterator[SshLab]:
    """The lab, for one test run of this machine at a time: its namespaces have fixed names.

    Those of a killed earlier run are removed.
    """
    with Path(tempfile.gettempdir(), "stest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lab = SshLab(directory)
        try:
            lab.up()
            yield lab
        finally:
            lab.down()


class Caller:
    """Runs the extension as CloudStack does: a payload file, a stdin that stays open, and two pipes."""

    def __init__(self, lab: SshLab, directory: Path) -> None:
        self.lab = lab
        self.home = directory / "netloom"
        self.home.mkdir(mode=0o700)
        self.helper = "0"  # NETLOOM_HELPER; test_helper.py tests the helper
        self._count = 0

    def details(self, **details: Any) -> dict[str, Any]:
        return {"hosts": self.lab.h1.address, "physicalnetworkname": "phys-1", **details}

    def payload(
        self,
        details: Mapping[str, Any],
        stored: Mapping[str, Any] | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> Path:
        self._count += 1
        path = self.home.parent / f"call-{self._count}.payload"
        envelope = {
            "physical-network-extension-details": dict(details),
            "network-extension-details": dict(stored or {}),
            "payload": {"network_id": "42", "zone_id": "1", **(payload or {})},
        }
        path.write_text(json.dumps(envelope, ensure_ascii=False))
        return path

    def start(
        self,
        *words: str,
        environ: Mapping[str, str] | None = None,
        uid: int = 0,
        agent: str | None = None,
        executable: Sequence[str] = (PYTHON, str(REPO / "cmd" / "netloom" / "main.py")),
    ) -> subprocess.Popen[str]:
        standin = shlex.join([PYTHON, str(REPO / "tests" / "ssh" / "standin.py"), "agent"])
        given = {"NETLOOM_DIR": str(self.home), "NETLOOM_AGENT": agent or standin} if environ is None else dict(environ)
        given.setdefault("NETLOOM_AGENT", agent or standin)
        given.setdefault("NETLOOM_HELPER", self.helper)
        as_user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"] if uid else []
        bare = ["env", "-i", *(f"{name}={value}" for name, value in given.items())]
        inside = ["ip", "netns", "exec", MANAGEMENT, "unshare", "-m", "sh", "-c", _CLIENT, "client"]
        outside = {**os.environ, "D": str(self.lab.directory / "m"), "PREFIX": sys.base_prefix}
        return subprocess.Popen(
            [*inside, *as_user, *bare, *executable, *words],
            env=outside,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_and_wait_for_call(
        self, details: Mapping[str, Any], timeout: int, host: SshHost, stored: Mapping[str, Any] | None = None
    ) -> tuple[subprocess.Popen[str], float]:
        """Start implement-network and wait until the agent of ``host`` has it; returns process and start time."""
        began = time.monotonic()
        process = self.start("implement-network", str(self.payload(details, stored)), str(timeout))
        while "implement-network" not in [call["command"] for call in host.calls_received()]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return process, began

    def finish(self, process: subprocess.Popen[str], began: float) -> CallResult:
        """Read the output to end of file, then wait for the exit, as CloudStack does. stdin stays open."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        texts = {process.stdout: "", process.stderr: ""}
        waiting = list(texts)
        while waiting:
            for stream in select.select(waiting, [], [])[0]:
                data = os.read(stream.fileno(), 65536).decode()
                texts[stream] += data
                if not data:
                    waiting.remove(stream)
        status = process.wait()
        ended = CallResult(status, texts[process.stdout], texts[process.stderr], time.monotonic() - began)
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        return ended

    def call(
        self,
        command: str,
        details: Mapping[str, Any],
        stored: Mapping[str, Any] | None = None,
        payload: Mapping[str, Any] | None = None,
        *,
        timeout: int = 30,
        **how: Any,
    ) -> CallResult:
        path = self.payload(details, stored, payload)
        if how.get("uid"):
            os.chown(path, how["uid"], -1)
        began = time.monotonic()
        return self.finish(self.start(command, str(path), str(timeout), **how), began)

    def ensure(self, details: Mapping[str, Any], stored: Mapping[str, Any] | None = None, **how: Any) -> CallResult:
        current = json.dumps(stored or {})
        return self.call("ensure-network-device", details, stored, {"current_details": current}, **how)

    @property
    def log(self) -> str:
        path = self.home / "netloom.log"
        return path.read_text() if path.exists() else ""


def helper_pids() -> list[int]:
    """The pids of the helpers on the management server."""
    pids = map(int, run("ip", "netns", "pids", MANAGEMENT).split())
    return [pid for pid in pids if words_of(pid)[-1:] == [b"helper"]]


def words_of(pid: int) -> list[bytes]:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def until(what: Callable[[], object]) -> bool:
    """Whether it comes true in time."""
    ends = time.monotonic() + SETTLE_S
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True
