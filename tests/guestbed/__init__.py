"""The agent's side of the control channel to the guest process, and a segment with VMs that the process serves.

Namespaces are named ``gtest-<n>-...``; this module makes them and removes them at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from netloom.guestwire import (
    Ack,
    DropNetwork,
    GuestHello,
    GuestMessage,
    GuestNetwork,
    GuestNic,
    LendSockets,
    LentSockets,
    Listener,
    ListenerKind,
    PasswordTaken,
    ServeNetwork,
    UpdateNetwork,
)
from netloom.guestwire.channel import Channel, ChannelError
from netns import inside

T = TypeVar("T")

INTERNAL = Path(__file__).parents[2] / "internal"
LINK = "gst-204"
SERVER = "10.1.1.1"
PORTS: dict[ListenerKind, int] = {"dhcp": 67, "metadata": 80, "password": 8080}
ANSWER_TIMEOUT_S = 20.0

GUEST = ("-c", "import sys; from netloom.guest.main import main; sys.exit(main(sys.argv[1:]))")
INTRUDER = (str(Path(__file__).with_name("intruder.py")),)

_numbers = itertools.count(os.getpid() * 100)


def network(*nics: GuestNic, revision: int = 1, **fields: object) -> GuestNetwork:
    """The table of network 204 with these NICs, served from 10.1.1.1."""
    plain = {"dns": (SERVER, "192.0.2.53"), "domain": "cs1.example", "search": ("cs1.example", "example")} | fields
    return GuestNetwork(
        scope_id="net-204",
        network_id="204",
        revision=revision,
        server_ip=SERVER,
        nics=nics,
        **plain,  # type: ignore[arg-type]
    )


def nic(number: int, **fields: object) -> GuestNic:
    """The NIC of VM ``number``: 02:00:00:00:00:<number>, 10.1.1.<number>."""
    plain = {"nic": f"nic-{number}", "mac": f"02:00:00:00:00:{number:02x}", "ip": f"10.1.1.{number}"}
    more = {"prefix_len": 24, "gateway": SERVER, "hostname": f"vm-{number}"}
    return GuestNic(**plain | more | fields)  # type: ignore[arg-type]


def run(*argv: str, check: bool = True, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Raises CalledProcessError when ``check`` is set and it fails."""
    return subprocess.run(argv, capture_output=True, text=True, check=check, timeout=timeout_s)


class Segment:
    """A bridge with the namespace of the network and VMs as its ports."""

    def __init__(self) -> None:
        self._prefix = f"gtest-{next(_numbers)}"
        self._namespaces: list[str] = []
        self.switch = self._make("sw")
        self._ip(self.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        self._ip(self.switch, "link", "set", "br0", "up")
        self.scope = self._plug("net", LINK, "0a:00:00:00:00:01")
        self._ip(self.scope, "addr", "add", f"{SERVER}/24", "dev", LINK)

    def vm(self, of: GuestNic, *, mac: str = "", ip: str = "", neighbour: bool = True) -> str:
        """Add a VM with this NIC, its link up; returns its namespace. It has no address unless ``ip`` is given."""
        namespace = self._plug(f"vm{len(self._namespaces)}", "eth0", mac or of.mac)
        if ip:
            self._ip(namespace, "addr", "add", f"{ip}/24", "dev", "eth0")
        if neighbour:
            self.know(of)
        return namespace

    def know(self, of: GuestNic) -> None:
        """Add the permanent neighbour entry that the agent keeps for each NIC of the table."""
        self._ip(self.scope, "neigh", "replace", of.ip, "lladdr", of.mac, "nud", "permanent", "dev", LINK)

    def sockets(self, kinds: Sequence[ListenerKind] = ("dhcp", "metadata", "password")) -> list[socket.socket]:
        """Open sockets in the namespace of the network, as the agent does."""
        with inside(self.scope):
            return [_listener(kind) for kind in kinds]

    def close(self) -> None:
        for namespace in reversed(self._namespaces):
            run("ip", "netns", "del", namespace, check=False)

    def _make(self, name: str) -> str:
        namespace = f"{self._prefix}-{name}"
        run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        self._ip(namespace, "link", "set", "lo", "up")
        return namespace

    def _plug(self, name: str, link: str, mac: str) -> str:
        namespace = self._make(name)
        port = f"p{len(self._namespaces)}"
        self._ip(self.switch, "link", "add", port, "type", "veth", "peer", "name", link, "netns", namespace)
        self._ip(self.switch, "link", "set", port, "master", "br0", "up")
        self._ip(namespace, "link", "set", link, "address", mac)
        self._ip(namespace, "link", "set", link, "up")
        return namespace

    def _ip(self, namespace: str, *argv: str) -> None:
        run("ip", "-n", namespace, *argv)


def _listener(kind: ListenerKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "dhcp" else socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LINK.encode())
    if kind == "dhcp":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.bind(("0.0.0.0", PORTS[kind]))
    else:
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
        sock.bind((SERVER, PORTS[kind]))
        sock.listen(128)
    return sock


class Agent:
    """One control connection to the guest process. Messages that answer no request are kept in ``news``."""

    def __init__(self, path: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        self._channel = Channel(sock)
        self._arrived: list[tuple[GuestMessage, list[int]]] = []
        self._seq = itertools.count(1)
        self.news: list[GuestMessage] = []
        self.hello = self._next(GuestHello)[0]

    def serve(self, table: GuestNetwork, sockets: Sequence[socket.socket], *listeners: Listener) -> Ack:
        """Hand over sockets; without ``listeners`` they are for DHCP, metadata and passwords, in that order."""
        kinds: tuple[ListenerKind, ...] = ("dhcp", "metadata", "password")
        asked = listeners or tuple(Listener(kind) for kind in kinds[: len(sockets)])
        descriptors = [sock.fileno() for sock in sockets]
        return self._ask(ServeNetwork(seq=next(self._seq), network=table, listeners=asked), Ack, descriptors)[0]

    def update(self, table: GuestNetwork) -> Ack:
        return self._ask(UpdateNetwork(seq=next(self._seq), network=table), Ack)[0]

    def drop(self) -> Ack:
        return self._ask(DropNetwork(seq=next(self._seq), scope_id="net-204", network_id="204"), Ack)[0]

    def lend(self) -> tuple[LentSockets, list[socket.socket]]:
        lent, descriptors = self._ask(
            LendSockets(seq=next(self._seq), scope_id="net-204", network_id="204"), LentSockets
        )
        return lent, [socket.socket(fileno=it) for it in descriptors]

    def taken(self) -> PasswordTaken:
        """Wait for the next message that a VM has fetched its password."""
        for at, message in enumerate(self.news):
            if isinstance(message, PasswordTaken):
                del self.news[at]
                return message
        return self._next(PasswordTaken)[0]

    def listen(self, seconds: float) -> list[GuestMessage]:
        """Receive for ``seconds``; returns the messages that answer no request."""
        with contextlib.suppress(TimeoutError):
            self._next(GuestHello, seconds)
        return self.news

    def close(self) -> None:
        self._channel.close()

    def _ask(self, message: GuestMessage, kind: type[T], descriptors: Sequence[int] = ()) -> tuple[T, list[int]]:
        self._channel.queue(message, descriptors)
        while self._channel.pending:
            select.select([], [self._channel], [], ANSWER_TIMEOUT_S)
            self._channel.flush()
        return self._next(kind)

    def _next(self, kind: type[T], seconds: float = ANSWER_TIMEOUT_S) -> tuple[T, list[int]]:
        deadline = time.monotonic() + seconds
        while True:
            while self._arrived:
                message, descriptors = self._arrived.pop(0)
                if isinstance(message, kind):
                    return message, descriptors
                self.news.append(message)
            if not select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no {kind} came; {self.news}")
            self._arrived += self._channel.receive()


class GuestProcess:
    """``netloom guest``, started as the agent starts it. ``program``: the arguments of Python that start it."""

    def __init__(self, program: Sequence[str] = GUEST, *, litter: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gtest-")
        directory = Path(self._directory.name)
        self.path = directory / "guest.sock"
        self.root = directory / "empty"
        self.root.mkdir(mode=0o555)
        if litter:
            (self.root / "something").touch()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        os.chmod(self.path, 0o600)
        listener.listen(4)
        self._log = directory / "log"
        with self._log.open("wb") as log, listener:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *program, "--control", str(listener.fileno())),
                    *("--root", str(self.root), "--build", "b1"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[listener.fileno()],
                env={"PYTHONPATH": str(INTERNAL)},
                start_new_session=True,
            )

    def connect(self) -> Agent:
        """Connect as an agent. Raises ChannelError, with the stderr of the process, when it has died."""
        try:
            return Agent(self.path)
        except (OSError, ChannelError, TimeoutError) as error:
            raise ChannelError(f"{error}; the process says: {self.said}") from error

    def attempts(self) -> dict[str, str]:
        """Have the intruder make its attempts; returns the name of the errno of each, or ``possible``."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], ANSWER_TIMEOUT_S)[0]:
            raise TimeoutError(f"the intruder reports nothing; {self.said}")
        outcomes: dict[str, str] = json.loads(self.process.stdout.readline())
        return outcomes

    @property
    def said(self) -> str:
        """The stderr of the process; it must stay empty."""
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(ANSWER_TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._directory.cleanup()


@contextlib.contextmanager
def guest_process(program: Sequence[str] = GUEST) -> Iterator[GuestProcess]:
    """A guest process that ends with the block. Asserts that its stderr stayed empty."""
    process = GuestProcess(program)
    try:
        yield process
        assert process.said == ""
    finally:
        process.close()


@contextlib.contextmanager
def segment() -> Iterator[Segment]:
    """A segment that is removed at the end of the block."""
    made = Segment()
    try:
        yield made
    finally:
        made.close()
