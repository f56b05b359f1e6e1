"""What a host may run out of, made to happen to a running agent: each is a context manager that ends it again.

Errors of system calls are injected from outside by strace, so the agent is the unchanged program.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kernel.agent_host import AgentHost, wait_until

SCOPES = "/var/lib/netloom/scopes"


@contextlib.contextmanager
def failing(host: AgentHost, *injections: str, paths: Sequence[str] = ()) -> Iterator[None]:
    """Let system calls of the agent fail, for example ``fsync:error=EIO``.

    ``paths``: only those calls that use one of them.
    """
    assert host.agent is not None
    pid = host.agent.pid
    calls = ",".join(it.partition(":")[0] for it in injections)
    words = ["strace", "-f", "-q", "-o", "/dev/null", "-e", f"trace={calls}"]
    words += [f"--inject={it}" for it in injections] + [f"--trace-path={it}" for it in paths]
    # In the mount namespace of the host, where the paths of descriptors have their names.
    tracer = subprocess.Popen(["nsenter", "-t", str(host.pid), "-m", *words, "-p", str(pid)])
    try:
        wait_until(lambda: "0" not in _tracers(pid))
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(60)
    assert _tracers(pid) == {"0"}


def _tracers(pid: int) -> set[str]:
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            found |= set(re.findall(r"TracerPid:\t(\d+)", Path(f"/proc/{pid}/task/{task}/status").read_text()))
    return found


@contextlib.contextmanager
def limited(host: AgentHost, limit: int, value: int) -> Iterator[None]:
    """Lower a limit (getrlimit(2)) of the running agent."""
    assert host.agent is not None
    before = resource.prlimit(host.agent.pid, limit)
    resource.prlimit(host.agent.pid, limit, (value, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(host.agent.pid, limit, before)


def descriptors(host: AgentHost) -> int:
    """The number of open files of the agent."""
    return len(_descriptors(host))


def packet_sockets(host: AgentHost) -> int:
    """The number of packet sockets of the host: on each uplink the agent listens for claims, within seconds."""
    assert host.agent is not None
    return len(Path(f"/proc/{host.agent.pid}/net/packet").read_text().splitlines()) - 1


def _descriptors(host: AgentHost) -> set[int]:
    assert host.agent is not None
    return set(map(int, os.listdir(f"/proc/{host.agent.pid}/fd")))


def without_descriptors(host: AgentHost, *, spare: int = 0) -> contextlib.AbstractContextManager[None]:
    """Let the agent open only ``spare`` more files. The limit is one of numbers, and some open files have high ones."""
    taken = _descriptors(host)
    free = (it for it in itertools.count() if it not in taken)
    return limited(host, resource.RLIMIT_NOFILE, next(itertools.islice(free, spare, None)))


def spare_descriptors(host: AgentHost) -> int:
    """How many more files the agent may open."""
    assert host.agent is not None
    limit, _ = resource.prlimit(host.agent.pid, resource.RLIMIT_NOFILE)
    return len(set(range(limit)) - _descriptors(host))


@contextlib.contextmanager
def read_only_disk(host: AgentHost) -> Iterator[None]:
    host.run("mount", "-o", "remount,ro", "/var/lib")
    try:
        yield
    finally:
        host.run("mount", "-o", "remount,rw", "/var/lib")


@contextlib.contextmanager
def full_disk(host: AgentHost) -> Iterator[None]:
    """The state directory is on a file system without a free block."""
    ballast = host.path("/var/lib/ballast")
    host.run("mount", "-o", "remount,size=2m", "/var/lib")
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()
        host.run("mount", "-o", "remount,size=50%", "/var/lib")


class Group:
    """A control group of the agent, of version 1 or 2, that limits one resource. It ends with the block."""

    def __init__(self, host: AgentHost, controller: str) -> None:
        assert host.agent is not None
        root = Path("/sys/fs/cgroup")
        self._version = 1 if (root / controller).is_dir() else 2
        self._parent = root / controller if self._version == 1 else root
        if self._version == 2:
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
        self._directory = self._parent / f"netloom-test-{host.agent.pid}"
        self._directory.mkdir()
        self._pid = host.agent.pid

    def __enter__(self) -> Group:
        (self._directory / "cgroup.procs").write_text(str(self._pid))
        return self

    def __exit__(self, *_: object) -> None:
        wait_until(self._removed)

    def limit(self, one: str, two: str, value: int) -> None:
        """Write a limit. ``one`` and ``two``: the names of its file in version 1 and 2."""
        (self._directory / (one if self._version == 1 else two)).write_text(str(value))

    def read(self, one: str, two: str) -> int:
        return int((self._directory / (one if self._version == 1 else two)).read_text())

    def _removed(self) -> bool:
        for pid in (self._directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                (self._parent / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):  # the last process has just ended
            self._directory.rmdir()
        return not self._directory.exists()


PORTS = 60_000


def fill_conntrack(host: AgentHost, namespace: str) -> None:
    """Fill the table of the namespace with open connections, which the kernel does not evict for new ones.

    The entries of earlier UDP packets are deleted first: they would expire after 30 s and leave room for new ones.
    """
    host.run("conntrack", "-D", "-p", "udp", namespace=namespace, check=False)
    most = int(host.run("cat", "/proc/sys/net/netfilter/nf_conntrack_max", namespace=namespace))
    file = host.path("/run/connections")
    with file.open("w") as lines:
        for at in range(most):
            flow = f"-s 192.0.2.{1 + at // PORTS} -d 198.51.100.1 -p udp --sport 7 --dport {1024 + at % PORTS}"
            lines.write(f"-I {flow} --timeout 600 -u ASSURED,SEEN_REPLY\n")
    host.run("conntrack", "-R", "/run/connections", namespace=namespace, check=False)
    file.unlink()
    assert int(host.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count", namespace=namespace)) >= most


def empty_conntrack(host: AgentHost, namespace: str) -> None:
    """Delete these connections. It takes half a minute."""
    most = int(host.run("cat", "/proc/sys/net/netfilter/nf_conntrack_max", namespace=namespace))
    for at in range(1 + most // PORTS):
        host.run("conntrack", "-D", "-s", f"192.0.2.{1 + at}", namespace=namespace, check=False, timeout_s=120)


class Pings:
    """Echo requests every 20 ms from a namespace of the host during the block. Asserts that none was lost."""

    def __init__(self, host: AgentHost, namespace: str, to: str) -> None:
        words = ["nsenter", "-t", str(host.pid), "-n", "-m", "nsenter", f"--net=/run/netns/{namespace}"]
        self._words = [*words, "ping", "-i", "0.02", "-W", "20", to]
        self._ping: subprocess.Popen[str] | None = None

    def __enter__(self) -> Pings:
        self._ping = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True)
        assert self._ping.stdout is not None
        while "bytes from" not in self._ping.stdout.readline():
            assert self._ping.poll() is None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._ping is not None
        self._ping.send_signal(signal.SIGINT)
        said = self._ping.communicate(timeout=60)[0]
        (sent, received) = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", said)[0])
        assert sent - received <= 1, said[-300:]  # the last one may be on its way


# Who sent lately: packets fill these sets, and not the agent.
_COUNTED = re.compile(r"(set \w+ \{[^{}]*flags [^\n]*dynamic[^{}]*?)\n\s*elements = \{[^}]*\}")
_TABLE = re.compile(r"^table [^\n]*\{\n.*?^\}$", re.MULTILINE | re.DOTALL)
_OBJECT = re.compile(r"^\t(?:set|map|chain|counter|ct)\b[^\n]*\{\n.*?^\t\}\n+", re.MULTILINE | re.DOTALL)


def stands(host: AgentHost, *namespaces: str) -> str:
    """The kernel objects of these namespaces and the host's links as text, without counters, handles and states."""
    parts = [
        json.dumps({name: (it.get("master"), it["mtu"], "UP" in it["flags"]) for name, it in host.links().items()})
    ]
    for namespace in namespaces:
        parts += [
            host.run(*words, namespace=namespace)
            for words in (
                ("ip", "-br", "addr"),
                ("ip", "rule"),
                ("nft", "-s", "list", "ruleset"),
            )
        ]
        parts.append(host.run("ip", "route", "show", "table", "all", namespace=namespace).replace(" linkdown", ""))
    return _COUNTED.sub(r"\1", _TABLE.sub(_in_order, "\n".join(parts)))


def _in_order(table: re.Match[str]) -> str:
    """The listing of a table, with its objects in alphabetical order. A set that is made again comes last."""
    objects = _OBJECT.findall(table[0])
    return _OBJECT.sub("", table[0]) + "".join(sorted(objects))
