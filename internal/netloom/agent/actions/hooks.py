"""Hooks: executables of the operator that carry out custom actions which are not built in.

A hook runs as root in the namespaces of the host, not in that of the scope. There it has the host's files, sockets,
resolvers and links, and enters the scope by ``ip netns exec $NETLOOM_NAMESPACE``. From inside the scope's namespace it
could not get back to the host's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import selectors
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from netloom.agent.environment import PATH
from netloom.commands.actions import OUTPUT_CHARACTERS_MAX, hook_output, printable_ascii
from netloom.errors import HostRefused, one_line
from netloom.files import replace_text

_FILE = re.compile(r"custom-action-([A-Za-z0-9_-][A-Za-z0-9._-]{0,199})\.sh\Z")
# The calls that started a hook, for the next agent. This one remembers its replies (serve.py).
STARTED = Path("/run/netloom/hooks.started")
STARTED_MAX = 1024

_started_lock = threading.Lock()

_OUTPUT_BYTES_MAX = 4 * OUTPUT_CHARACTERS_MAX
_TAIL_BYTES = 4096


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a hook. ``payload`` is CloudStack's payload in JSON, without the two objects of details.

    ``call_id``: of the call that asked for it. A call whose connection breaks is repeated under its id.
    """

    call_id: str
    path: str
    action: str
    scope_id: str
    namespace: str
    payload: bytes

    def run(self, deadline: float) -> str:
        """Run the hook and return its standard output in ASCII. Blocking.

        The hook's only argument is the path of the payload, a file in memory, which it may read repeatedly. At
        ``deadline``, in seconds of the monotonic clock, the hook is killed with its process group.
        Raises HostRefused, with the hook's last line, if it fails or is killed; also if it was started for this call by
        an agent that has ended since. Nobody knows then what the hook has done.
        """
        if time.monotonic() >= deadline:
            raise HostRefused(
                f"hook {self.action} was not started: the call had no time left", hint="do other hooks hang?"
            )
        self._note_start()
        payload = os.memfd_create("netloom.payload", os.MFD_CLOEXEC)
        try:
            with open(payload, "wb", closefd=False) as file:
                file.write(self.payload)
            return self._run(payload, deadline)
        finally:
            os.close(payload)

    def _note_start(self) -> None:
        """Record that the hook is started for this call. Raises HostRefused if it was before, or on a full disk."""
        key = hashlib.sha256(self.call_id.encode()).hexdigest()
        try:
            with _started_lock:
                earlier = STARTED.read_text().splitlines() if STARTED.exists() else []
                if key in earlier:  # guard: a-hook-runs-once
                    raise HostRefused(
                        f"hook {self.action} was started for this call, and the agent was restarted meanwhile: "
                        "it may have been carried out, and is not run again",
                        hint="look at what it has done before you repeat the action",
                    )
                kept = [*earlier[-STARTED_MAX:], key]
                replace_text(STARTED, "".join(f"{it}\n" for it in kept), durable=False)  # no hook survives a power cut
        except OSError as error:
            raise HostRefused(f"hook {self.action} was not started: {STARTED}: {error.strerror}") from error

    def _run(self, payload: int, deadline: float) -> str:
        try:
            process = subprocess.Popen(
                [self.path, f"/dev/fd/{payload}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env={
                    "PATH": PATH,
                    "LANG": "C.UTF-8",
                    "NETLOOM_ACTION": self.action,
                    "NETLOOM_SCOPE": self.scope_id,
                    "NETLOOM_NAMESPACE": self.namespace,
                },
                pass_fds=(payload,),
                start_new_session=True,
            )
        except OSError as error:
            hint = "does its first line name an interpreter, as in #!/bin/sh?"
            raise HostRefused(f"hook {self.path} cannot be run: {error.strerror}", hint=hint) from error
        with process:
            try:
                out, err, in_time = _capture(process, deadline)
            finally:
                # Before waitpid(2): until then no other process group can get this number.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if not in_time:
            raise HostRefused(f"hook {self.action} was killed: it did not end in the time of the call")
        if process.returncode:
            died = process.returncode < 0
            how = f"was killed by signal {-process.returncode}" if died else f"failed with status {process.returncode}"
            last = err.last_line() or out.last_line()
            raise HostRefused(f"hook {self.action} {how}{': ' if last else ', without a message'}{last}")
        return hook_output(self.action, out.text())


class Hooks:
    """The hooks in a directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        """The actions that have a file; it may be unsafe or not executable."""
        try:
            found = sorted(map(_FILE.match, os.listdir(self.directory)), key=str)
        except OSError:
            return []
        return sorted(match[1] for match in found if match and ".." not in match[1])

    def path(self, action: str) -> str:
        """The path of the hook for ``action``.

        Raises HostRefused if it is missing or not executable, or if users other than root could have written it.
        """
        file = self.directory / f"custom-action-{action}.sh"
        for path in (self.directory.parent, self.directory, file):
            try:
                found = path.lstat()
            except OSError as error:
                raise HostRefused(f"hook {path}: {error.strerror}") from error
            if not (stat.S_ISREG if path is file else stat.S_ISDIR)(found.st_mode):
                raise HostRefused(f"hook {path}: not a plain {'file' if path is file else 'directory'}")
            if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise HostRefused(
                    f"hook {path}: users other than root may write to it, so it is not run",
                    hint="chown root, chmod go-w",
                )
        if not found.st_mode & stat.S_IXUSR:
            raise HostRefused(f"hook {file}: not executable", hint="chmod 0755")
        return str(file)


class _CapturedOutput:
    """The first and the last bytes of a stream."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = b""

    def add(self, data: bytes) -> None:
        self._head += data[: _OUTPUT_BYTES_MAX - len(self._head)]
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def text(self) -> str:
        return self._head.decode("utf-8", "replace")

    def last_line(self) -> str:
        lines = printable_ascii(self._tail.decode("utf-8", "replace")).split("\n")
        return next((one_line(line, 400) for line in reversed(lines) if line.strip()), "")


def _capture(process: subprocess.Popen[bytes], deadline: float) -> tuple[_CapturedOutput, _CapturedOutput, bool]:
    """The standard output and standard error of the hook, and whether it ended before ``deadline``.

    Only the end of the hook's own process counts. Its background processes may keep the streams open; nothing waits for
    them.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    streams = {process.stdout.fileno(): _CapturedOutput(), process.stderr.fileno(): _CapturedOutput()}
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in streams:
                os.set_blocking(fd, False)
            for fd in (pidfd, *streams):
                selector.register(fd, selectors.EVENT_READ)
            ended = False
            while not ended and (left_s := deadline - time.monotonic()) > 0:
                ready = {key.fd for key, _ in selector.select(left_s)}
                ended = pidfd in ready
                for fd in ready & streams.keys():
                    for data in _available(fd):
                        streams[fd].add(data)
                        if not data:
                            selector.unregister(fd)
            if ended:
                # The last output: it may have arrived together with the end of the process.
                for fd, captured in streams.items():
                    for data in _available(fd):
                        captured.add(data)
    finally:
        os.close(pidfd)
    out, err = streams.values()
    return out, err, ended


def _available(fd: int) -> Iterator[bytes]:
    """The data that can be read without waiting, in pieces; an empty piece is the end of the stream.

    At most 4 MiB at a time, so that the other stream and the deadline get their turn.
    """
    for _ in range(64):
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        yield data
        if not data:
            return
