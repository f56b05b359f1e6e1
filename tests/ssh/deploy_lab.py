"""A bed for tests of deployment: hosts without netloom, and management servers with stand-ins for the one file."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bed import Bed
from bed.cloudstack import CLOUD_UID, FakeCloudStack
from bed.lab import Host
from bed.machines import Execution, until
from ssh.onefile import OneFiles

ONE, TWO, THREE = "0.1.0-1-aaaa", "0.1.0-2-bbbb", "0.2.0-1-cccc"  # builds, the later the newer
LIBEXEC = "/usr/local/libexec/netloom"
BALLAST_MB = 4
# Directories that netloom writes to.
FILES = [
    "/usr/local",
    "/etc/systemd/system",
    "/var/lib/netloom",
    "/var/log/netloom",
    "/run/netloom",
    "/root/.cache",
    "/tmp",
]
SETTLE_S = 60.0

# Replaces dd on a host: stops at a given byte until told to continue, and may corrupt the first byte.
_DD = """#!/usr/bin/python3 -I
import os, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
stop = int(open("/run/dd-stop").read()) if os.path.exists("/run/dd-stop") else 1 << 60
fd = os.open(words["of"], os.O_WRONLY | os.O_CREAT, 0o644)
at = int(words["seek"]) * int(words["bs"])
end = at + int(words["count"])  # in bytes, by iflag=count_bytes
while at < end:
    data = os.read(0, min(1 << 16, end - at, max(1, stop - at)))
    if not data:
        break
    if at == 0 and os.path.exists("/run/dd-spoil"):
        data = b"?" + data[1:]
    try:
        os.pwrite(fd, data, at)
    except OSError as error:
        sys.exit(f"dd: error writing: {error.strerror}")
    at += len(data)
    while at == stop:
        if not os.path.exists("/run/dd-stop"):
            stop = 1 << 60
        time.sleep(0.01)
"""


@contextmanager
def deploying_files() -> Iterator[OneFiles]:
    """A maker of one-files (ssh/onefile.py) in a directory that every simulated machine can read."""
    directory = Path(tempfile.mkdtemp(prefix="netloom-onefile-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield OneFiles(directory)
    finally:
        shutil.rmtree(directory)


@contextmanager
def deploying(hosts: int = 2) -> Iterator[tuple[Bed, OneFiles]]:
    """A bed and a maker of one-files that all its machines can read."""
    with deploying_files() as files, Bed(hosts=hosts, public_vlans=[101]) as bed:
        yield bed, files


class Server:
    """A management server with its own directory and helper, and the one file where CloudStack expects it."""

    _numbers = itertools.count(1)

    def __init__(self, bed: Bed, program: Path, *, user: str = "root", helper: str = "60", timeout_s: int = 60) -> None:
        self.bed = bed
        self.name = f"server{next(self._numbers)}"
        self.directory = f"/var/tmp/{self.name}"
        self.helper = helper
        self._path = bed.management.install(self.name, program)
        self._files = itertools.count(1)
        self.cloud = FakeCloudStack(self._run)
        self.cloud.timeout_s = timeout_s
        self.cloud.register(hosts=bed.hosts[:1], **bed.login(user))

    def _run(self, command: str, text: str, timeout_s: int) -> Execution:
        file = f"/tmp/{self.name}-{next(self._files)}.payload"
        self.bed.management.write(file, text, uid=CLOUD_UID)
        environment = self.bed.management.environment(NETLOOM_DIR=self.directory, NETLOOM_HELPER=self.helper)
        return self.bed.management.execute([self._path, command, file, str(timeout_s)], environment=environment)

    def replace(self, program: Path) -> None:
        """Replace the file that CloudStack calls, as an operator does."""
        self.bed.management.run("install", "-m", "755", str(program), f"{self._path}.new")
        self.bed.management.run("mv", f"{self._path}.new", self._path)

    def ask(self) -> Execution:
        """Make one call that reaches a host, installs the program, and makes no network there.

        It is the ensure-network-device before a network's first implement-network.
        """
        network = self.cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24")
        network.facts.state = "implementing"
        return network.ensure().execution

    def log(self) -> str:
        return self.bed.management.sh(f"cat {self.directory}/netloom.log", check=False)

    def logged(self, pattern: str) -> bool:
        """Whether a line of the log matches ``pattern`` within ``SETTLE_S``."""
        return until(lambda: re.search(pattern, self.log()), seconds=SETTLE_S)


_background: list[threading.Thread] = []  # calls that may still run


def in_background(server: Server) -> Callable[[], Execution]:
    """Start a call in a thread; returns a function that waits for its result."""
    ended: list[Execution] = []
    thread = threading.Thread(target=lambda: ended.append(server.ask()))
    _background.append(thread)
    thread.start()

    def end() -> Execution:
        thread.join(SETTLE_S)
        return ended[0]

    return end


def wipe(bed: Bed) -> None:
    """Wait for calls in the background, end all helpers, restart the host and delete netloom's files from it.

    A call of a test that failed would install its build in the middle of the next test.
    """
    while _background:
        _background.pop().join()
    for line in bed.management.sh("ps -A -o pid=,args=").splitlines():
        if line.endswith(" helper"):
            pid = line.split()[0]
            bed.management.sh(f"kill -9 {pid} 2>/dev/null || test ! -e /proc/{pid}")  # it may have ended already
    host = bed.hosts[0]
    host.power_cut()
    host.boot()
    ours = "/usr/local/libexec /usr/local/bin/* /var/lib/netloom /var/log/netloom"
    host.sh(f"rm -rf {ours} && truncate -s 0 /var/log/sshd.log")


def succeeded(done: Execution) -> bool:
    """Whether a call succeeded and printed the answer of ensure-network-device."""
    return done.status == 0 and '"namespace":"cs-net-204"' in done.output


def host_objects(host: Host) -> dict[str, list[str]]:
    """What an installation, an agent or a network could leave on a host."""
    return host.objects(files=FILES)


def builds(host: Host) -> list[str]:
    """The entries of the program's directory on a host: builds and symbolic links."""
    return [name for name in host.listing(LIBEXEC) if not name.startswith(".")]


def current(host: Host) -> str:
    return host.sh(f"readlink {LIBEXEC}/current", check=False).strip()


def running_agents(host: Host) -> list[str]:
    """One entry for each running agent process: the build that the log named last."""
    lines = host.sh("ps -A -o pid=,ppid=,args=").splitlines()
    agents = {line.split()[0]: line.split()[1] for line in lines if " agent serve" in line}
    # A child of an agent has the agent's command line until it has executed its program.
    serving = [pid for pid, parent in agents.items() if parent not in agents]
    said = re.findall(r" build=(\S+) ", host.sh("cat /var/log/netloom/agent.log", check=False))
    return [said[-1] for _ in serving]


def kill_agent(host: Host, number: str = "KILL") -> None:
    """Send a signal to the agent that started last; KILL by default."""
    host.sh(f"kill -{number} {re.findall(r' pid=([0-9]+) ', host.read('/var/log/netloom/agent.log'))[-1]}")


def slow_disk(host: Host, *, stop: int = 0, spoil: bool = False) -> None:
    """Make later uploads stop after ``stop`` bytes until ``go_on`` is called, or corrupt their first byte."""
    host.write("/usr/local/bin/dd", _DD, mode=0o755)
    if stop:
        host.write("/run/dd-stop", str(stop))
    if spoil:
        host.write("/run/dd-spoil", "")


def continue_upload(host: Host) -> None:
    host.sh("rm -f /run/dd-stop")


def uploaded_bytes(host: Host) -> int:
    """The number of bytes of an unfinished upload on a host."""
    return int(host.sh(f"cat {LIBEXEC}/*/.part-* 2>/dev/null | wc -c", check=False))
