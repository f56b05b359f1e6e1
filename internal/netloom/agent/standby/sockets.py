"""The sockets for heartbeats: UDP on the management addresses, and packet sockets on VLANs. For one thread.

What cannot be opened is tried again: a link may be created later, and the agent before this one may still have the
port. Errors of sending are counted and otherwise ignored: each message has a successor a moment later.
"""

from __future__ import annotations

import collections
import errno
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterable

from netloom.agent.kernel.claims_socket import HEADER_BYTES, ClaimWire, open_wire
from netloom.agent.kernel.descriptors import high, high_socket
from netloom.agent.kernel.packet_socket import PACKET_OUTGOING
from netloom.agent.kernel.rtnetlink import packed_mac
from netloom.agent.log import Log
from netloom.ethernet import HEARTBEAT, PAYLOAD_BYTES_MAX, ethernet_frame
from netloom.heartbeatwire import from_ethernet, in_ethernet
from netloom.standbywire import GroupHost

AT_ONCE = 64  # messages of one socket that are read before others have their turn
PAUSE_S = 0.02  # after that many
_REOPEN_S = 1.0
_GONE = (errno.ENXIO, errno.ENODEV)

_Port = tuple[socket.AddressFamily, int]
_Key = _Port | ClaimWire


class HeartbeatSockets:
    """Sockets that are registered with ``selector``, with a function to call when they are readable.

    ``received`` gets each message, and the link on which it came; None: over UDP. ``errors``: how often sending and
    receiving failed, by error number.
    """

    def __init__(
        self, selector: selectors.BaseSelector, received: Callable[[bytes, ClaimWire | None], None], log: Log
    ) -> None:
        self.errors: collections.Counter[int] = collections.Counter()
        self._selector = selector
        self._received = received
        self._log = log
        self._wanted: set[_Key] = set()
        self._sockets: dict[_Key, socket.socket] = {}
        self._paused: dict[_Key, float] = {}  # until when
        self._refused: dict[_Key, str] = {}  # what could not be opened, and why
        self._reopen_at = 0.0

    def follow(self, ports: Iterable[_Port], wires: Iterable[ClaimWire], now: float) -> None:
        """Listen on these ports and links, and no others."""
        self._wanted = {*ports, *wires}
        gone = [self._drop(key) for key in self._sockets.keys() - self._wanted]
        self._refused = {key: why for key, why in self._refused.items() if key in self._wanted}
        if gone:
            # The kernel waits until no packet is on its way to a packet socket: milliseconds for each.
            threading.Thread(target=_close, args=(gone,), name="standby-close").start()
        self._open(now)

    def look(self, now: float) -> None:
        """Read paused sockets again, and open those that could not be opened before."""
        for key in [key for key, until in self._paused.items() if now >= until]:
            del self._paused[key]
            if key in self._sockets:
                self._selector.register(self._sockets[key], selectors.EVENT_READ, self._reader(key))
        if now >= self._reopen_at and len(self._sockets) < len(self._wanted):
            self._open(now)

    def send(self, host: GroupHost, message: bytes) -> None:
        """Send a message to a member over UDP."""
        family = family_of(host.address)
        sender = next((it for key, it in self._sockets.items() if isinstance(key, tuple) and key[0] == family), None)
        if sender is not None:
            try:
                sender.sendto(message, socket.MSG_DONTWAIT, (host.address, host.port))
            except OSError as error:
                self._count(error)

    def broadcast(self, wire: ClaimWire, message: bytes) -> None:
        """Broadcast a message on a link."""
        sender = self._sockets.get(wire)
        if sender is not None:
            try:
                sender.send(ethernet_frame(packed_mac(wire.mac), wire.tag, in_ethernet(message)))
            except OSError as error:
                self._count(error)
                if error.errno in _GONE:
                    self._drop(wire).close()

    def close(self) -> None:
        """Stop listening."""
        self._wanted = set()
        _close([self._drop(key) for key in list(self._sockets)])

    def _open(self, now: float) -> None:
        self._reopen_at = now + _REOPEN_S
        for key in self._wanted - self._sockets.keys():
            try:
                opened = _open_port(key) if isinstance(key, tuple) else open_wire(key, HEARTBEAT)
            except OSError as error:
                where = f"port {key[1]}" if isinstance(key, tuple) else key.link
                why = f"heartbeats cannot be heard on {where}: {error.strerror}"
                if self._refused.get(key) != why:
                    self._refused[key] = why
                    self._log.line(f"standby: {why}")
                continue
            self._refused.pop(key, None)
            self._sockets[key] = opened
            self._selector.register(opened, selectors.EVENT_READ, self._reader(key))

    def _drop(self, key: _Key) -> socket.socket:
        opened = self._sockets.pop(key)
        if self._paused.pop(key, None) is None:
            self._selector.unregister(opened)
        return opened

    def _reader(self, key: _Key) -> Callable[[float], None]:
        return lambda now: self._read(key, now)

    def _read(self, key: _Key, now: float) -> None:
        opened = self._sockets.get(key)
        if opened is None:
            return
        for _ in range(AT_ONCE):
            try:
                data, sender = opened.recvfrom(HEADER_BYTES + PAYLOAD_BYTES_MAX + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:  # of a link: it is down; the socket goes on when it is up again
                self._count(error)
                return
            if isinstance(key, tuple):
                self._received(data, None)
            elif sender[2] != PACKET_OUTGOING and (message := from_ethernet(data[HEADER_BYTES:])) is not None:
                self._received(message, key)
        # The kernel drops what comes meanwhile.
        self._selector.unregister(opened)  # guard: a-flood-of-heartbeats-costs-little
        self._paused[key] = now + PAUSE_S

    def _count(self, error: OSError) -> None:
        self.errors[error.errno or 0] += 1


def family_of(address: str) -> socket.AddressFamily:
    """The family of a numeric address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _open_port(port: _Port) -> socket.socket:
    """A UDP socket for all addresses of this host: the one of the registration may come later."""
    family, number = port
    opened = high_socket(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))
    try:
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(("", number))
    except BaseException:
        opened.close()
        raise
    return opened


def _close(sockets: list[socket.socket]) -> None:
    for it in sockets:
        it.close()


class Waker:
    """Ends the wait of a selector from another thread. Its descriptor is open as long as it exists."""

    def __init__(self) -> None:
        self._descriptor = high(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def __del__(self) -> None:
        os.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def wake(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """Forget that it was woken. Not more than once for each time that it was readable."""
        os.eventfd_read(self._descriptor)
