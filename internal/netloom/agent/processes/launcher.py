"""The process that starts the services: ``netloom confine serve``, a child of the agent.

It has loaded what ``netloom confine`` needs, so a service starts with a fork instead of an interpreter. It ends when
nothing was started for ``IDLE_S`` seconds, and with the agent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from netloom.agent.environment import PATH
from netloom.agent.kernel.namespaces import descriptor
from netloom.confine import REQUEST_BYTES_MAX, SERVE
from netloom.errors import HostRefused
from netloom.program import path

IDLE_S = 10.0
_ANSWER_S_MAX = 10.0


class Launcher:
    """Starts confined programs. Any thread may use it, outside of ``namespaces.inside``: it may start a thread."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def launch(self, arguments: Sequence[str], namespace: str, output: int) -> int:
        """Start ``netloom confine`` with these arguments in the namespace, as leader of a session; returns its pid.

        ``output``: the descriptor for stdout and stderr. Raises HostRefused, also when there is no such namespace, and
        OSError when there can be no process.
        """
        request = "\0".join(arguments).encode("utf-8", "surrogateescape")
        if len(request) > REQUEST_BYTES_MAX:
            raise HostRefused(f"the arguments of {arguments[6]} are longer than {REQUEST_BYTES_MAX} bytes")
        with descriptor(namespace) as there, self._lock:
            for _ in range(2):
                answer = self._asked(request, [there, output])
                if answer.lstrip(b"-").isdigit():
                    pid = int(answer)
                    if pid < 0:
                        raise OSError(-pid, os.strerror(-pid))
                    return pid
                status = self._end()
                if answer or status:
                    break
                # It had been idle for so long that it ended just before it read this.
        why = answer.decode("utf-8", "replace") or f"it ended with status {status}"
        raise HostRefused(f"the process that starts services: {why}", hint="the agent tries again")

    def close(self) -> None:
        """End the process; the next ``launch`` starts another one."""
        with self._lock:
            self._end()

    def _asked(self, request: bytes, descriptors: list[int]) -> bytes:
        """The answer: a number, or why there is none; empty when the process has ended. Raises OSError."""
        sock = self._socket or self._start()
        try:
            socket.send_fds(sock, [request], descriptors)
            return sock.recv(4096)
        except TimeoutError:
            return b"no answer"
        except ConnectionError:  # EPIPE, ECONNRESET
            return b""

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_S_MAX)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*_confine(), SERVE, str(self._idle_s)],
                    stdin=theirs.fileno(),
                    cwd="/",
                    env={"PATH": PATH, "LANG": "C"},
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self._socket = ours
        reaping = threading.Thread(target=self._forget_ended, args=(self._process, ours), name="launcher", daemon=True)
        try:
            reaping.start()
        except RuntimeError as error:  # there can be no further thread
            self._end()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return ours

    def _forget_ended(self, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        """In a thread of its own: reap the process when it ends by itself, and close our socket."""
        process.wait()
        with self._lock:
            if self._socket is ours:
                ours.close()
                self._socket = self._process = None

    def _end(self) -> int:
        """Have the process end, and return its exit status; negative: the signal that ended it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_ANSWER_S_MAX)
        process.kill()
        return process.wait()


def _confine() -> list[str]:
    """The argv of ``netloom confine``. In a checkout, an interpreter that loads only this module."""
    if (program := path()) is not None:
        return [program, "confine"]
    packages = str(Path(__file__).parents[3])
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from netloom.confine import main"
    return [sys.executable, "-S", "-E", "-P", "-c", f"{code}; sys.exit(main(sys.argv[1:]))", packages]
