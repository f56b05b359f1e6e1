"""A process that closes packet sockets after the agent, so that nobody waits for it.

The kernel waits at the close of each packet socket until no packet is on its way to it: 20 ms, or 20 s for the sockets
of 1,000 networks. An agent that is killed would be there so long: its connections open, its lock taken, and systemd
waiting for its end. So a child of the agent has each of these sockets, too, and the close of the agent's descriptor
costs nothing. The child closes the sockets that the agent has done with, and all of them after the agent has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import queue
import signal
import socket
import threading

from netloom.agent.kernel.descriptors import high_socket

TITLE = b"netloom agent keep"  # for ps(1), with NUL between the words
_ANSWER_S_MAX = 1.0
_MESSAGE_BYTES = 32


class Keeper:
    """The agent's end. Without a child, or when it does not take what is sent, sockets are closed as usual.

    Any thread may use it.
    """

    def __init__(self, sock: socket.socket | None = None) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether the child is there, as far as is known."""
        return self._socket is not None

    def close(self) -> None:
        """Have the child close everything and end, as at the end of the agent."""
        with self._lock:
            self._end()

    def keep(self, descriptor: int) -> None:
        """Keep the socket of this descriptor until ``drop`` is called with it."""
        self._send(descriptor, [descriptor])

    def drop(self, descriptor: int) -> None:
        """Close the socket that was kept under this number. Call it before the descriptor is closed."""
        self._send(descriptor, [])

    def _send(self, number: int, descriptors: list[int]) -> None:
        with self._lock:
            if self._socket is None:
                return
            try:
                socket.send_fds(self._socket, [b"%d" % number], descriptors)
            except OSError:  # it was ended, or stopped: it closes everything when it reads that we have left
                self._end()

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def start_keeper() -> Keeper:
    """Fork the child. Call it while the process has one thread and nothing open that matters."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.freeze()  # so that the child shares what it does not change
    try:
        pid = os.fork()
    except OSError:  # no process can be had now
        ours.close()
        return Keeper()
    finally:
        gc.unfreeze()
    if not pid:
        try:
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(_ANSWER_S_MAX)
    return Keeper(high_socket(ours))


def _serve(theirs: socket.socket) -> None:
    """In the child: keep what comes, until the agent has ended."""
    gc.disable()
    # Not the lock, the log or the terminal of the agent.
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.dup2(theirs.fileno(), 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    os.setsid()
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)  # those of a terminal or of systemd are for the agent
    with contextlib.suppress(OSError, ValueError, IndexError):  # then ps(1) calls it as the agent
        _set_title(TITLE)
    closing: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_close_all, args=(closing,), daemon=True).start()
    kept: dict[bytes, int] = {}
    with socket.socket(fileno=3) as agent:
        while True:
            message, descriptors, _, _ = socket.recv_fds(agent, _MESSAGE_BYTES, 1)
            if not message:
                return  # the agent has ended
            if message in kept:
                closing.put(kept.pop(message))
            if descriptors:
                kept[message] = descriptors[0]


def _close_all(closing: queue.SimpleQueue[int]) -> None:
    """In a thread of its own, so that the agent never waits for it."""
    while True:
        os.close(closing.get())


def _set_title(title: bytes) -> None:
    """Write over the arguments of this process, where ps(1) reads them."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, fields 48 and 49 (proc_pid_stat(5))
    text = title.replace(b" ", b"\0")[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
