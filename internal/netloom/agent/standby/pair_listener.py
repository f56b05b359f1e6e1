"""The socket on which the first host of a group waits for the second: it passes on connections that know the secret.

Anybody who reaches the host can connect. So a connection has no buffers of ours until it has proved the group's secret:
only a socket, a few bytes, and two seconds. A stranger gets no answer. When too many connections are waiting, the
oldest one that has said nothing right is closed. Connections are accepted at a bounded rate. A flood of them would fill
the queue of the kernel, so for a while after one the kernel takes those of the hosts of groups alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Collection

from netloom import pairwire
from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.kernel.tcp_sources import accept_all, accept_only
from netloom.agent.log import Log
from netloom.agent.standby.sealing import Agreement
from netloom.pairwire import ANSWER_BYTES, HELLO_BYTES, PROOF_BYTES, Keys, PairError

NEWCOMERS_MAX = 32  # connections that have not proved the secret yet
PROOF_S_MAX = 2.0  # how long they may take
ACCEPTS_MAX = 20  # in each PERIOD_S: the rest waits in the kernel
PERIOD_S = 0.1
FLOOD_S = 10.0  # how long others cannot connect after a flood
LOG_EVERY_S = 60.0  # about strangers
BUFFER_BYTES = 128 << 10  # of a socket, in each direction: what waits there cannot be overtaken
_BACKLOG = 64
_RESET = struct.pack("ii", 1, 0)  # struct linger: close(2) sends a reset and keeps nothing


def set_options(sock: socket.socket) -> None:
    """What the sockets of both ends have, to be set before the connection exists."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class PairListener:
    """The listening socket, while it is wanted. Used on the event loop.

    ``secret_of``: the secret of a group in which this host is the first; None: no such group. ``known_sources``: the
    packed addresses from which the second hosts connect; empty if one is unknown. ``admitted`` gets the group, the
    connection that has proved the secret, and its keys.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        port: int,
        secret_of: Callable[[int], bytes | None],
        known_sources: Callable[[], Collection[bytes]],
        admitted: Callable[[int, socket.socket, Keys], None],
    ) -> None:
        self._loop = loop
        self._log = log
        self._port = port
        self.secret_of = secret_of
        self._known_sources = known_sources
        self.admitted = admitted
        self._socket: socket.socket | None = None
        self._error = ""
        self._newcomers: dict[_Newcomer, None] = {}  # in the order in which they came
        self._accepted = 0  # in this period
        self._period_ends = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self._flood: asyncio.TimerHandle | None = None  # while strangers cannot connect
        self._refused = 0
        self._logged_at = -LOG_EVERY_S

    def open(self) -> None:
        """Listen. If that fails, an error is logged once; call again later."""
        if self._socket is not None:
            return
        try:
            self._socket = _listening(self._port)
        except OSError as error:
            if str(error) != self._error:
                self._error = str(error)
                self._log.line(f"the other host of a group cannot connect: port {self._port}: {error.strerror}")
            return
        self._error = ""
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening, and close the connections that have not proved the secret."""
        for timer in (self._pause, self._flood):
            if timer is not None:
                timer.cancel()
        self._pause = self._flood = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for it in list(self._newcomers):
            it.close()

    def _accept(self) -> None:
        now = self._loop.time()
        if now >= self._period_ends:
            self._accepted, self._period_ends = 0, now + PERIOD_S
        while self._socket is not None:
            if self._accepted >= ACCEPTS_MAX:  # guard: a-flood-of-connections-costs-little
                self._shut_strangers_out(self._socket)
                self._wait(self._period_ends - now)
                return
            try:
                sock, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._log.line(f"a connection of another host cannot be accepted: {error.strerror}")
                    self._wait(1.0)
                    return
                continue  # a connection that has ended already
            self._accepted += 1
            sock.setblocking(False)
            if self._flood is not None:
                accept_all(sock)  # the filter of the listening socket
            if len(self._newcomers) >= NEWCOMERS_MAX:  # guard: newcomers-are-bounded
                next((it for it in self._newcomers if not it.greeted), next(iter(self._newcomers))).refuse()
            newcomer = _Newcomer(self._loop, sock, self)
            self._newcomers[newcomer] = None
            newcomer.read()  # the hello may have come already

    def _wait(self, delay_s: float) -> None:
        assert self._socket is not None
        self._loop.remove_reader(self._socket.fileno())
        self._pause = self._loop.call_later(delay_s, self._resume)

    def _resume(self) -> None:
        self._pause = None
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _shut_strangers_out(self, listening: socket.socket) -> None:
        sources = self._known_sources()
        if self._flood is not None or not sources:
            return
        self._flood = self._loop.call_later(FLOOD_S, self._let_strangers_in, listening)
        try:
            accept_only(listening, sources)  # guard: a-flood-does-not-keep-the-other-host-out
        except OSError as error:
            self._log.line(f"port {self._port}: strangers cannot be shut out: {error.strerror}")

    def _let_strangers_in(self, listening: socket.socket) -> None:
        self._flood = None
        accept_all(listening)

    def forget(self, newcomer: _Newcomer) -> None:
        """The connection is closed or admitted."""
        self._newcomers.pop(newcomer, None)

    def count_refused(self) -> None:
        """Log now and then that somebody connects who does not know a secret."""
        self._refused += 1
        now = self._loop.time()
        if now - self._logged_at >= LOG_EVERY_S:
            self._log.line(f"port {self._port}: {self._refused} connections without the secret of a group were closed")
            self._logged_at, self._refused = now, 0


class _Newcomer:
    """A connection that has not proved the secret."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, listener: PairListener) -> None:
        self._loop = loop
        self._socket = sock
        self._listener = listener
        self._hello = b""
        self._proof = b""
        self._answer = b""
        self._secret = b""
        self._agreement: Agreement | None = None
        loop.add_reader(sock.fileno(), self.read)
        self._timer = loop.call_later(PROOF_S_MAX, self.refuse)  # guard: newcomers-have-two-seconds

    @property
    def greeted(self) -> bool:
        """Whether its hello was right. It may be a repetition of an earlier one."""
        return self._agreement is not None

    def read(self) -> None:
        """Read what has come, but nothing of what follows the proof."""
        missing = HELLO_BYTES - len(self._hello) if self._agreement is None else PROOF_BYTES - len(self._proof)
        try:
            data = self._socket.recv(missing)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.refuse()
        elif self._agreement is None:
            self._hello += data
            if len(self._hello) == HELLO_BYTES:
                self._greet()
        else:
            self._proof += data
            if len(self._proof) == PROOF_BYTES:
                self._admit(self._agreement)

    def _greet(self) -> None:
        group = pairwire.group_of(self._hello)
        secret = self._listener.secret_of(group) if group is not None else None
        if secret is None or not pairwire.is_hello(secret, self._hello):  # guard: a-stranger-gets-no-answer
            self.refuse()
            return
        self._agreement = Agreement()
        self._secret = secret
        self._answer = pairwire.answer(secret, self._hello, self._agreement.nonce)
        try:
            sent = self._socket.send(self._answer)
        except OSError:
            sent = 0
        if sent != ANSWER_BYTES:
            self.close()

    def _admit(self, agreement: Agreement) -> None:
        if not pairwire.is_proof(self._secret, self._hello, self._answer, self._proof):  # guard: a-replay-is-refused
            self.refuse()
            return
        group = pairwire.group_of(self._hello)
        try:
            agreed = agreement.agreed(pairwire.nonce_in(self._hello))
        except PairError:
            self.refuse()
            return
        if group is None or self._listener.secret_of(group) != self._secret:  # the group has ended meanwhile
            self.close()
            return
        self._leave()
        keys = pairwire.keys(self._secret, self._hello, self._answer, agreed)
        self._listener.admitted(group, high_socket(self._socket), keys)

    def refuse(self) -> None:
        """Close the connection of somebody who does not know the secret, and leave no trace of it in the kernel."""
        self._listener.count_refused()
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        self._leave()
        self._socket.close()

    def _leave(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._listener.forget(self)


def _listening(port: int) -> socket.socket:
    """A listening socket for IPv6 and IPv4, or for IPv4 alone if the kernel has no IPv6. Raises OSError."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        address = "::"
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        address = "0.0.0.0"
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        set_options(sock)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return high_socket(sock)
