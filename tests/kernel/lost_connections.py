"""Open TCP connections, what happens to their ends when conntrack entries are lost, and a conntrack table that is full.

An end notices nothing until it sends. Then it gets a reset, or its connection goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from kernel.ruleset_lab import PATIENCE_S
from netns import inside

_CT_NEW, _REQUEST_CREATE_EXCLUSIVE = 1 << 8, 0x601
_SEEN_REPLY_ASSURED_CONFIRMED = 0xE
_MESSAGE_BYTES, _MESSAGES_AT_ONCE = 140, 200


class Connection(NamedTuple):
    """Both ends of a TCP connection."""

    client: socket.socket
    server: socket.socket

    def close(self) -> None:
        self.client.close()
        self.server.close()

    def works(self) -> bool:
        """Whether data passes in both directions."""
        return passes(self.client, self.server) and passes(self.server, self.client)

    def ends_are_reset(self, first: str) -> bool:
        """Whether each end gets a reset when it sends. ``first``: "client" or "server" sends before the other."""
        ends = (self.client, self.server) if first == "client" else (self.server, self.client)
        return all(is_reset(it) for it in ends)


def passes(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether a byte that ``sender`` sends now arrives."""
    receiver.settimeout(PATIENCE_S)
    try:
        sender.sendall(b"x")
        return receiver.recv(1) == b"x"
    except OSError:
        return False


def is_reset(end: socket.socket, patience_s: float = PATIENCE_S) -> bool:
    """Whether this end gets a reset when it sends: at once, or for a repetition of its segment."""
    end.settimeout(patience_s)
    try:
        end.sendall(b"x")
        end.recv(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    raise AssertionError("the other end has sent something, or has closed")


class Listener(NamedTuple):
    """A TCP server of a test: ``space`` listens at ``address:port`` (empty: any address)."""

    space: str
    port: int
    address: str = ""


class Spaces(Protocol):
    """Network namespaces with short names, as the ruleset lab has them."""

    def open_socket(self, space: str, kind: int, protocol: int = 0, address: str = "") -> socket.socket: ...


@contextlib.contextmanager
def opened(lab: Spaces, space: str, target: str, port: int, server: Listener, source: str = "") -> Iterator[Connection]:
    """An open connection from ``space`` to ``target:port`` that reaches ``server``. Data has passed."""
    family = target if ":" in target else server.address
    with lab.open_socket(server.space, socket.SOCK_STREAM, 0, family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server.address or ("::" if ":" in target else ""), server.port))
        listener.listen(1)
        listener.settimeout(PATIENCE_S)
        client = lab.open_socket(space, socket.SOCK_STREAM, 0, target)
        client.settimeout(PATIENCE_S)
        if source:
            client.bind((source, 0))
        client.connect((target, port))
        connection = Connection(client, listener.accept()[0])
    with contextlib.closing(connection):
        assert connection.works()
        yield connection


def fill_conntrack(namespace: str | Path, guest: str, public: str) -> int:
    """Add connections until the table of this network namespace is full; returns their number.

    They are UDP, from ``guest`` to addresses of 198.18.0.0/15 (RFC 2544), with the source NAT address ``public``. They
    are assured, so the kernel does not remove them early.
    """
    with inside(namespace):
        ctnetlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    room = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    added = 0
    with ctnetlink:
        while added < room + _MESSAGES_AT_ONCE:
            ctnetlink.send(b"".join(_connection(it, guest, public) for it in range(added, added + _MESSAGES_AT_ONCE)))
            added += _MESSAGES_AT_ONCE
            with contextlib.suppress(BlockingIOError):
                answer = ctnetlink.recv(1 << 16, socket.MSG_DONTWAIT)
                error = -struct.unpack_from("=i", answer, 16)[0]
                assert error == errno.ENOMEM, os.strerror(error)
                return added
    raise AssertionError(f"{added} connections fit into a table of {room}")


def _connection(number: int, guest: str, public: str) -> bytes:
    """The request to create one connection, without an acknowledgement."""
    far = socket.inet_aton(f"198.18.{number >> 16 & 255}.{number >> 8 & 255}")
    port, far_port = 1024 + (number & 255), 9
    message = struct.pack("=IHHIIBBH", _MESSAGE_BYTES, _CT_NEW, _REQUEST_CREATE_EXCLUSIVE, 0, 0, socket.AF_INET, 0, 0)
    original = (1, socket.inet_aton(guest), far, port, far_port)
    for kind, src, dst, sport, dport in (original, (2, far, socket.inet_aton(public), far_port, port)):
        message += struct.pack("=HHHH", 52, kind | 0x8000, 20, 1 | 0x8000)
        message += struct.pack("=HH4sHH4s", 8, 1, src, 8, 2, dst)
        message += struct.pack("=HHHHB3x", 28, 2 | 0x8000, 5, 1, socket.IPPROTO_UDP)
        message += struct.pack("=HH", 6, 2) + struct.pack("!H2x", sport)
        message += struct.pack("=HH", 6, 3) + struct.pack("!H2x", dport)
    for kind, value in ((3, _SEEN_REPLY_ASSURED_CONFIRMED), (7, 600)):  # status, timeout
        message += struct.pack("=HH", 8, kind) + struct.pack("!I", value)
    return message
