"""A host for tests of the agent: a network and a mount namespace, with real agent processes in them.

Veth links named ``eth1.1204`` and so on take the place of VLAN links. Their other ends are in a second namespace, the
fabric. Two holder processes keep the namespaces; everything ends with them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import processes
from netloom.wire import Call, FrameReader, Hello, Message, Registration, Reply, encode
from netns import inside

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "cmd" / "netloom" / "main.py"), "agent"]
PAYLOADS = ROOT / "tests" / "payloads"
REGISTRATION = Registration(owner="test", guest_nic="eth1", public_nic="eth2")

LOG = "/var/log/netloom/agent.log"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_SETUP = """
mount --make-rprivate /
for d in /run /var/lib /var/log; do mount -t tmpfs -o mode=755 none $d; done
mkdir -p /run/netns
ip link set lo up
echo ready
exec sleep "$LIVES_S"
"""


# For tests that compare what stands before and after: the periodic check would repair a change between two looks.
NO_CHECKS = ("--check-every", "3600")


class AgentHost:
    """One host. ``vlans`` are the names of its VLAN links, each connected to the fabric.

    ``lives_s``: its namespaces end after so many seconds, even if the test is killed.
    """

    def __init__(self, vlans: Sequence[str] = ("eth1.1204", "eth1.1377", "eth2.101"), lives_s: int = 1000) -> None:
        self._holders = [self._start_holder(lives_s, "--net", "--mount") for _ in range(2)]
        self.pid, self.fabric = (holder.pid for holder in self._holders)
        self.agent: subprocess.Popen[bytes] | None = None
        # Otherwise the fabric gets an address of a guest segment, and its replies to VMs do not pass the device.
        self.run("sysctl", "-qw", "net/ipv6/conf/default/accept_ra=0", pid=self.fabric)
        self._add_management()
        for nic in sorted({name.partition(".")[0] for name in vlans}):
            self.ip("link", "add", nic, "type", "veth", "peer", "name", f"{nic}-x")
        for name in vlans:
            self.add_vlan(name)

    def _add_management(self) -> None:
        """A network with one other machine, which answers ARP. A host that hears nobody is cut off, and acts so."""
        self.ip("link", "add", "mgmt0", "type", "veth", "peer", "name", "sw-mgmt0", "netns", str(self.fabric))
        for pid, link, address in (
            (self.pid, "mgmt0", "198.19.255.1/30"),
            (self.fabric, "sw-mgmt0", "198.19.255.2/30"),
        ):
            self.run("sysctl", "-qw", f"net/ipv6/conf/{link}/disable_ipv6=1", pid=pid)
            self.run("ip", "addr", "add", address, "dev", link, pid=pid)
            self.run("ip", "link", "set", link, "up", pid=pid)
        there = json.loads(self.run("ip", "-j", "link", "show", "sw-mgmt0", pid=self.fabric))[0]["address"]
        self.ip("neigh", "replace", "198.19.255.2", "lladdr", there, "dev", "mgmt0", "nud", "permanent")

    def add_vlan(self, name: str) -> None:
        """Add a link of this name and set it up; its other end is ``sw-<name>`` in the fabric."""
        peer = f"sw-{name}"[:15]
        self.ip("link", "add", name, "type", "veth", "peer", "name", peer, "netns", str(self.fabric))
        self.run("ip", "link", "set", peer, "up", pid=self.fabric)
        # Otherwise its link-local address would appear seconds later, during a comparison of snapshots.
        self.run("sysctl", "-qw", f"net/ipv6/conf/{name}/disable_ipv6=1")

    @staticmethod
    def _start_holder(lives_s: int, *kinds: str) -> subprocess.Popen[bytes]:
        holder = subprocess.Popen(
            ["unshare", *kinds, "sh", "-ec", _SETUP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={"PATH": _PATH, "LIVES_S": str(lives_s)},
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        return holder

    def processes(self, *words: str) -> dict[int, list[str]]:
        """Processes of this host, without the holder, whose command line contains all ``words``: arguments by pid."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                if pid != self.pid and self._has(pid):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                    alive = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
                    if alive and all(any(word in it for it in line) for word in words):
                        found[pid] = line
        return found

    def _has(self, pid: int) -> bool:
        """Whether the process is in the mount namespace of this host, or its root directory has a part of our /run."""
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat(f"/proc/{self.pid}/ns/mnt").st_ino:
            return True
        run = self.path("/run").stat().st_dev
        root = Path(f"/proc/{pid}/root")
        places = [*(root / "run/netloom/services").glob("*/*"), root / "etc/dnsmasq.d"]
        return any(it.stat().st_dev == run for it in places if it.exists())

    def close(self) -> None:
        self.kill()
        # Programs that the agent started outlive it. End those of this host, and first an agent that a relay started:
        # it would start others.
        for pid in self.processes("serve"):
            processes.kill(pid)
        for pid in self.processes():
            processes.kill(pid)
        for holder in self._holders:
            holder.kill()
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()

    # ------------------------------------------------------------------------------------------- looking and doing

    def run(self, *words: str, pid: int = 0, namespace: str = "", check: bool = True, timeout_s: float = 60) -> str:
        """Run a program on the host, or in one of its namespaces; returns its standard output.

        Raises AssertionError when ``check`` is set and the exit status is not 0.
        """
        where = ["nsenter", "-t", str(pid or self.pid), "-n", "-m"]
        inner = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
        done = subprocess.run(
            [*where, *inner, *words],
            capture_output=True,
            text=True,
            env={"PATH": _PATH},
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def ip(self, *words: str, namespace: str = "") -> str:
        return self.run("ip", *words, namespace=namespace)

    def links(self, namespace: str = "") -> dict[str, dict[str, Any]]:
        found = json.loads(self.run("ip", "-j", "-d", "link", namespace=namespace))
        return {link["ifname"]: link for link in found}

    def inventory(self) -> dict[str, int]:
        """The number of objects of each kind that a network may leave behind."""
        return {
            "links": len(self.links()),
            "addresses": self.run("ip", "-o", "addr").count("\n"),
            "routes": self.run("ip", "route", "show", "table", "all").count("\n"),
            "rules": self.run("ip", "rule").count("\n"),
            "tables": self.run("nft", "list", "tables").count("\n"),
            "namespaces": self.run("ip", "netns", "list").count("\n"),
            "connections": int(self.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count")),
            "files": len(os.listdir(self.path("/var/lib/netloom/scopes"))) if self.agent else 0,
            "services": len(list(self.path("/run/netloom/services").glob("*"))),
            "processes": len(self.processes("dnsmasq")) + len(self.processes("haproxy")),
        }

    def plug(self, vm: str, bridge: str, mac: str, address: str = "") -> None:
        """Add a VM: a namespace with ``eth0``. Its other end ``tap-<vm>`` is a port of ``bridge``, unless empty."""
        self.ip("netns", "add", vm)
        self.ip("link", "add", f"tap-{vm}", "type", "veth", "peer", "name", "eth0", "address", mac, "netns", vm)
        self.run("sysctl", "-qw", f"net/ipv6/conf/tap-{vm}/disable_ipv6=1")
        self.run("sysctl", "-qw", "net/ipv6/conf/all/disable_ipv6=1", namespace=vm)
        self.ip("link", "set", f"tap-{vm}", *(["master", bridge] if bridge else []), "up")
        self.ip("-n", vm, "link", "set", "lo", "up")
        self.ip("-n", vm, "link", "set", "eth0", "up")
        # The kernel learns later that the link has a carrier. Until then the port and its bridge drop every frame.
        wait_until(lambda: self.links()[f"tap-{vm}"]["operstate"] == "UP")
        if address:
            self.ip("-n", vm, "addr", "add", address, "dev", "eth0")

    def within(self, namespace: str = "") -> contextlib.AbstractContextManager[None]:
        """Within the block this thread is in a namespace of the host, or in the fabric. Make sockets there."""
        there = self.path(f"/run/netns/{namespace}") if namespace else Path(f"/proc/{self.fabric}/ns/net")
        return inside(there)

    def inside_host(self) -> contextlib.AbstractContextManager[None]:
        """Within the block this thread is in the host's own namespace."""
        return inside(Path(f"/proc/{self.pid}/ns/net"))

    def path(self, path: str) -> Path:
        """A path of the host, as this process can open it."""
        return Path(f"/proc/{self.pid}/root{path}")

    # --------------------------------------------------------------------------------------------------- the agent

    def start(self, *options: str) -> None:
        """Start an agent and wait until it has restored its scopes."""
        before = self.log().count(" restored")
        self.agent = subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "-n", "-m", "--", *PROGRAM, "serve", "--log", LOG, *options],
            stdin=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": _PATH},
        )
        wait_until(lambda: self.log().count(" restored") > before, 60)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.agent is not None:
            self.agent.send_signal(number)
            self.agent.wait(60)
            self.agent = None

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path("/var/log/netloom/agent.log").read_text()
        return ""

    def client(self) -> Client:
        return Client(str(self.path("/run/netloom/agent.sock")))

    def call(self, fixture: str, command: str, **changes: Any) -> Reply:
        """Send one call over a new connection."""
        with self.client() as client:
            return client.call(fixture, command, **changes)


class Client:
    """A client of the agent's socket: sends calls and receives replies."""

    _ids = itertools.count()

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._reader = FrameReader()
        self._messages: list[Message] = []
        self.send(Hello(version="test", build="test"))
        hello = self.receive()
        assert isinstance(hello, Hello)
        self.hello = hello

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Message) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes that need not be a message."""
        self._socket.sendall(data)

    def receive(self) -> Message:
        while not self._messages:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the agent hung up")
            self._messages += self._reader.feed(data)
        return self._messages.pop(0)

    def call(self, fixture: str, command: str, **changes: Any) -> Reply:
        self.send(make_call(fixture, command, **changes))
        reply = self.receive()
        assert isinstance(reply, Reply)
        return reply


def make_call(
    fixture: str,
    command: str,
    *,
    call_id: str = "",
    registration: Registration = REGISTRATION,
    remaining_ms: int = 60_000,
    **changes: object,
) -> Call:
    """Make the call of a payload file. ``fixture`` is the number in its name; ``changes`` replace payload fields."""
    (file,) = PAYLOADS.glob(f"{fixture}-*.json")
    payload = json.loads(file.read_bytes())["payload"] | changes
    scope = f"vpc-{payload['vpc_id']}" if payload.get("vpc_id") else f"net-{payload['network_id']}"
    return Call(
        call_id=call_id or f"t{next(Client._ids)}",
        command=command,
        scope_id=scope,
        registration=registration,
        payload=json.dumps(payload).encode(),
        remaining_ms=remaining_ms,
    )


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Poll a condition until it holds. Fails after ``seconds``, a limit for busy machines."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextlib.contextmanager
def agent_host(*vlans: str) -> Iterator[AgentHost]:
    host = AgentHost(vlans) if vlans else AgentHost()
    try:
        yield host
    finally:
        host.close()


def done(reply: Reply) -> Reply:
    """Assert that a call succeeded; returns its reply."""
    assert (reply.status, reply.error) == (0, "")
    return reply


def steps(host: AgentHost) -> int:
    """The number of steps in the last log line that has one."""
    line = next(line for line in reversed(host.log().splitlines()) if "steps=" in line)
    return int(line.partition("steps=")[2].split()[0])


def act(
    host: AgentHost,
    action: str,
    fixture: str = "501",
    *,
    remaining_ms: int = 60_000,
    owner: str = "",
    network_id: str = "",
    **params: Any,
) -> Reply:
    """Send a custom action as the extension does: the flat payload of a file, without the two objects of details."""
    (file,) = PAYLOADS.glob(f"{fixture}-*.json")
    payload = json.loads(file.read_bytes()) | {"action": action, "action-params": params}
    for details in ("physical-network-extension-details", "network-extension-details"):
        del payload[details]
    payload |= {"network_id": network_id} if network_id else {}
    scope = f"vpc-{payload['vpc_id']}" if payload.get("vpc_id") else f"net-{payload['network_id']}"
    call = Call(
        call_id=f"a{time.monotonic_ns()}",
        command="custom-action",
        scope_id=scope,
        registration=Registration(owner=owner) if owner else REGISTRATION,
        payload=json.dumps(payload).encode(),
        remaining_ms=remaining_ms,
    )
    with host.client() as client:
        client.send(call)
        reply = client.receive()
    assert isinstance(reply, Reply)
    assert reply.output.isascii()
    return reply


def message(reply: Reply) -> str:
    """Assert that a custom action succeeded; returns the message of its JSON output."""
    said = json.loads(done(reply).output)
    assert (said["status"], said["printmessage"]) == ("success", "true")
    assert isinstance(said["message"], str)
    return said["message"]
