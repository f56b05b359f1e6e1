"""``netloom guest``: the guest process. It is started as root, enters its sandbox, and serves until SIGTERM.

    netloom guest --control <descriptor> --root <empty directory> [--build <id>]

``control`` is a listening unix stream socket that only root may connect to. The agent connects there and sends the
tables and sockets of the networks (guestwire).
"""

from __future__ import annotations

import argparse
import contextlib
import linecache  # noqa: F401 - a traceback imports it, and inside the sandbox nothing can be imported
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

from netloom import __version__
from netloom.errors import NetloomError, one_line
from netloom.guest import sandbox
from netloom.guest.loop import EpollLoop, Loop
from netloom.guest.serve import Networks
from netloom.guestwire import (
    Ack,
    DropNetwork,
    GuestHello,
    GuestMessage,
    LendSockets,
    Ping,
    ServeNetwork,
    UpdateNetwork,
)
from netloom.guestwire.channel import Channel, ChannelError
from netloom.program import close_all_but
from netloom.sockets import peer_credentials

# An agent that does not read is disconnected when more than this waits for it.
_UNREAD_BYTES_MAX = 1 << 20
# Time for open connections to end after SIGTERM.
_STOP_S = 3.0


class GuestServer:
    """The control socket of the guest process. The latest connection of root is the agent's.

    Without a connected agent the networks are served as before.
    """

    def __init__(self, loop: Loop, control: socket.socket, build: str) -> None:
        self._loop = loop
        self._control = control
        self._build = build
        self._agent: Channel | None = None
        self.layers: tuple[str, ...] = ()
        self.networks = Networks(loop, self._send)
        control.setblocking(False)
        loop.add_reader(control.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._control.accept()
        except OSError:
            return
        if peer_credentials(sock).uid != 0:
            sock.close()
            return
        self._disconnect_agent()
        self._agent = Channel(sock, pending_bytes_max=_UNREAD_BYTES_MAX)
        self._loop.add_reader(sock.fileno(), self._readable)
        self._send(
            GuestHello(
                version=__version__,
                build=self._build,
                pid=os.getpid(),
                layers=self.layers,
                served=self.networks.served,
            )
        )
        for taken in self.networks.unconfirmed:
            self._send(taken)

    def _readable(self) -> None:
        agent = self._agent
        if agent is None:
            return
        try:
            arrived = agent.receive()
        except ChannelError:
            self._disconnect_agent()
            return
        for message, descriptors in arrived:
            self._handle(message, descriptors)

    def _handle(self, message: GuestMessage, descriptors: list[int]) -> None:
        if isinstance(message, ServeNetwork):
            self._send(self.networks.serve(message, descriptors))
        elif isinstance(message, UpdateNetwork):
            self._send(self.networks.update(message.seq, message.network))
        elif isinstance(message, DropNetwork):
            self._send(self.networks.drop(message.seq, (message.scope_id, message.network_id)))
        elif isinstance(message, LendSockets):
            lent, copies = self.networks.lend(message.seq, (message.scope_id, message.network_id))
            self._send(lent, copies)
        elif isinstance(message, Ping):
            self._send(Ack(seq=message.seq))

    def _send(self, message: GuestMessage, descriptors: Sequence[int] = ()) -> None:
        if self._agent is None:
            return
        try:
            self._agent.queue(message, descriptors)
        except ChannelError:
            self._disconnect_agent()
            return
        self._flush()

    def _flush(self) -> None:
        agent = self._agent
        if agent is None:
            return
        try:
            agent.flush()
        except ChannelError:
            self._disconnect_agent()
            return
        if agent.pending:
            self._loop.add_writer(agent.fileno(), self._flush)
        else:
            self._loop.remove_writer(agent.fileno())

    def _disconnect_agent(self) -> None:
        if self._agent is not None:
            self._loop.remove_reader(self._agent.fileno())
            self._loop.remove_writer(self._agent.fileno())
            self._agent.close()
            self._agent = None

    def stop(self) -> None:
        """End the loop when no connection is open any more, or after ``_STOP_S``."""
        self.networks.stop()
        deadline = self._loop.time() + _STOP_S

        def stop_if_idle() -> None:
            if self.networks.idle or self._loop.time() > deadline:
                self._loop.stop()
            else:
                self._loop.call_later(0.05, stop_if_idle)

        stop_if_idle()


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM; return the exit status. ``argv`` has the arguments after ``guest``."""
    parser = argparse.ArgumentParser(prog="netloom guest", add_help=False)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--build", default="")
    options = parser.parse_args(argv)

    try:
        os.stat(options.root)
        control = socket.socket(fileno=options.control)
    except OSError as error:
        sys.stderr.write(f"netloom guest: only the agent starts it, with a socket and a directory: {error}\n")
        return 1
    close_all_but(0, 1, 2, options.control)
    loop = EpollLoop(_log_failure)
    guest = GuestServer(loop, control, options.build)
    loop.on_signal(signal.SIGTERM, guest.stop)
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(ValueError):
        "".encode("idna")  # the first use of a codec imports it
    try:
        guest.layers = sandbox.enter(options.root)
    except NetloomError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    loop.run()
    return 0


def _log_failure(error: Exception) -> None:
    # One callback failed, for one packet or request; the process goes on. The message of the exception is left out,
    # because it may contain data of a tenant.
    where = traceback.extract_tb(error.__traceback__)
    at = f" at {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    with contextlib.suppress(OSError):  # the log is full
        sys.stderr.write(one_line(f"netloom guest: {type(error).__name__}{at}") + "\n")
