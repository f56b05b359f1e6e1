"""Open connections and conversations through the device of a ruleset lab, and whether they go on.

They are of all kinds of translation, so that a test can move them to a :class:`SecondDevice`.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, CLIENT2, PATIENCE_S, STRANGER, Lab
from kernel.vpc_lab import item, vpc
from netloom.state import Network, Scope
from netns import inside
from unit.scopes import A1, A2, B1, VM1, VM2, VM3, admit, forward, static, wish

QUIET_S = 0.5
PREFIX_A, PREFIX_B = "2001:db8:50:1::", "2001:db8:50:2::"

# The kinds of translation. A2 is the address of vm2, A1 and B1 have port forwards; replies of B1 need another exit.
SCOPE = wish(
    admit(A1, "all"), admit(A2, "all"), admit(B1, "all"),
    held=(A1, A2, B1),
    static=[static(A2, VM2)],
    forwards=[
        *(forward(A1, f"22{n}0", VM1, f"4{n}0") for n in range(4)),
        *(forward(B1, f"22{n}0", VM3, f"4{n}0") for n in range(4)),
        forward(A1, "53", VM1, "5300", protocol="udp"),
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How connections of a kind are opened: from where, to which address, and to whom they lead."""

    client: str
    target: str
    port: str  # {n} is the number of the connection
    server: str
    own_port: str
    source: str = ""
    bind: str = ""


KINDS = {
    "source NAT": Kind("vm1", STRANGER, "70{n}1", "inet", "70{n}1", bind=STRANGER),
    "outward by static NAT": Kind("vm2", STRANGER, "70{n}2", "inet", "70{n}2", bind=STRANGER),
    "static NAT": Kind("inet", A2.address, "70{n}3", "vm2", "70{n}3", source=CLIENT),
    "port forward": Kind("inet", A1.address, "22{n}0", "vm1", "4{n}0", source=CLIENT),
    "port forward of another exit": Kind("inet", B1.address, "22{n}0", "vm3", "4{n}0", source=CLIENT2),
    "hairpin": Kind("vm2", A1.address, "22{n}0", "vm1", "4{n}0"),
}
CLIENT_FIRST, SERVER_FIRST, BULK = range(3)


def give_ip6(lab: Lab) -> None:
    """Give the VMs of the tiers IPv6 addresses."""
    for space in ("dev", "a1", "b1"):
        with inside(lab.ns(space)):
            root = Path("/proc/sys/net/ipv6/conf")
            for where in ("all", "default"):
                (root / where / "accept_dad").write_text("0")
            (root / "all/disable_ipv6").write_text("0")
    for space, prefix in (("a1", PREFIX_A), ("b1", PREFIX_B)):
        lab.ip(space, f"addr add {prefix}31/64 dev eth0 nodad", f"route add ::/0 via {prefix}1")


Open = Callable[..., tuple[socket.socket, socket.socket]]


@contextlib.contextmanager
def opener(lab: Lab) -> Iterator[Open]:
    """A function that opens connections, which are closed after the block."""
    with contextlib.ExitStack() as stack:

        def connect(kind: Kind, number: int) -> tuple[socket.socket, socket.socket]:
            """Open a connection; returns its ends: the client's and the server's."""
            listener = lab.open_socket(kind.server, socket.SOCK_STREAM, 0, kind.target)
            with listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((kind.bind, int(kind.own_port.format(n=number))))
                listener.listen(1)
                listener.settimeout(PATIENCE_S)
                client = stack.enter_context(lab.open_socket(kind.client, socket.SOCK_STREAM, 0, kind.target))
                client.settimeout(PATIENCE_S)
                if kind.source:
                    client.bind((kind.source, 0))
                client.connect((kind.target, int(kind.port.format(n=number))))
                server = stack.enter_context(listener.accept()[0])
            assert delivers(client, server) and delivers(server, client)
            return client, server

        yield connect


def delivers(sender: socket.socket, receiver: socket.socket, patience_s: float = PATIENCE_S) -> bool:
    """Whether data of one end reaches the other one."""
    word = secrets.token_hex(8).encode()
    receiver.settimeout(patience_s)
    data = b""
    try:
        sender.sendall(word)
        while len(data) < len(word):
            more = receiver.recv(len(word) - len(data))
            if not more:
                return False
            data += more
    except OSError:
        return False
    return data == word


class Bulk:
    """Both ends of a connection send without reading, until all buffers on the way are full."""

    def __init__(self, one: socket.socket, other: socket.socket) -> None:
        self.ends = (one, other)
        self._sent = {one: 0, other: 0}
        self._read = {one: 0, other: 0}
        for end in self.ends:
            end.setblocking(False)
        self._fill()

    def _fill(self) -> None:
        block = bytes(1 << 16)
        poll = select.poll()
        for end in self.ends:
            poll.register(end, select.POLLOUT)
        while ready := poll.poll(200):
            for fd, _ in ready:
                end = next(it for it in self.ends if it.fileno() == fd)
                with contextlib.suppress(BlockingIOError):
                    self._sent[end] += end.send(block)

    def goes_on(self, patience_s: float = PATIENCE_S) -> bool:
        """Whether all that was sent arrives, and the ends can go on talking."""
        until = time.monotonic() + patience_s
        expected = {self.ends[0]: self._sent[self.ends[1]], self.ends[1]: self._sent[self.ends[0]]}
        while any(self._read[it] < expected[it] for it in self.ends):
            waiting = [it for it in self.ends if self._read[it] < expected[it]]
            ready = select.select(waiting, [], [], max(0.0, until - time.monotonic()))[0]
            if not ready:
                return False
            for end in ready:
                try:
                    self._read[end] += len(end.recv(1 << 20))
                except OSError:
                    return False
        one, other = self.ends
        return delivers(one, other, patience_s) and delivers(other, one, patience_s)


def open_all(connect: Open, kinds: Mapping[str, Kind]) -> dict[str, Callable[[float], bool]]:
    """Open three connections of each kind; returns for each whether it goes on, to be asked after the move."""
    goes_on: dict[str, Callable[[float], bool]] = {}
    for name, kind in kinds.items():
        for case in (CLIENT_FIRST, SERVER_FIRST):
            client, server = connect(kind, case)
            first, second = (client, server) if case == CLIENT_FIRST else (server, client)

            def quiet(patience_s: float, first: socket.socket = first, second: socket.socket = second) -> bool:
                return delivers(first, second, patience_s) and delivers(second, first, patience_s)

            goes_on[f"{name}, {'client' if case == CLIENT_FIRST else 'server'} first"] = quiet
        goes_on[f"{name}, bulk"] = Bulk(*connect(kind, BULK)).goes_on
    return goes_on


def asked(goes_on: Mapping[str, Callable[[float], bool]], patience_s: float) -> dict[str, bool]:
    """Which connections go on. All are asked at once, because each that does not go on takes ``patience_s``."""
    with ThreadPoolExecutor(len(goes_on)) as pool:
        answers = {name: pool.submit(it, patience_s) for name, it in goes_on.items()}
        return {name: it.result() for name, it in answers.items()}


def tiers(prefixes: Mapping[str, str]) -> Scope:
    everything = (item(1, "allow", "ingress"), item(2, "allow", "egress"))
    scope = vpc(everything, everything)

    def with_ip6(network: Network) -> Network:
        prefix = prefixes[network.network_id]
        return replace(network, ip6_cidr=f"{prefix}/64", ip6_gateway=f"{prefix}1")

    return replace(scope, networks={key: with_ip6(it) for key, it in scope.networks.items()})


@dataclass
class Datagrams:
    """A flow of a guest to STRANGER by source NAT, with a socket at each end."""

    guest: socket.socket
    outside: socket.socket
    peer: tuple[str, int]

    def reaches_guest(self, patience_s: float) -> bool:
        """Whether the next message of the outside host arrives."""
        word = secrets.token_bytes(16)
        self.outside.sendto(gre(word) if self.outside.proto == socket.IPPROTO_GRE else word, self.peer)
        self.guest.settimeout(patience_s)
        with contextlib.suppress(TimeoutError):
            while True:
                if self.guest.recv(200).endswith(word):
                    return True
        return False


def gre(body: bytes) -> bytes:
    return struct.pack(">HH", 0, 0x0800) + body  # RFC 2784: no options, version 0


PROTOCOLS = {"UDP": socket.IPPROTO_UDP, "ESP": socket.IPPROTO_ESP, "GRE": socket.IPPROTO_GRE}


def datagrams(lab: Lab, protocol: int, stack: contextlib.ExitStack) -> Datagrams:
    kind = socket.SOCK_DGRAM if protocol == socket.IPPROTO_UDP else socket.SOCK_RAW
    port = 6000 if kind == socket.SOCK_DGRAM else 0
    guest, outside = (stack.enter_context(lab.open_socket(it, kind, protocol)) for it in ("vm1", "inet"))
    outside.bind((STRANGER, port))
    guest.connect((STRANGER, port))
    guest.send(gre(b"hello") if protocol == socket.IPPROTO_GRE else b"hello")
    outside.settimeout(PATIENCE_S)
    peer = outside.recvfrom(100)[1]
    assert peer[0] == A1.address
    return Datagrams(guest, outside, (peer[0], peer[1]))
