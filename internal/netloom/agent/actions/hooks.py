"""Operators' hooks: executables in the state directory that carry out custom actions that are not built in.

A hook runs as root in the host's own namespaces, not in the scope's: what it needs (files, sockets, resolvers, other
links) is there, and ``ip netns exec $NETLOOM_NAMESPACE`` is one word away, while the way out of a namespace is none.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from netloom.agent.environment import PATH
from netloom.commands.actions import OUTPUT_CHARACTERS_MAX, checked, plain
from netloom.errors import HostRefused, one_line

_FILE = re.compile(r"custom-action-([A-Za-z0-9][A-Za-z0-9._-]{0,63})\.sh\Z")
_OUTPUT_BYTES_MAX = 4 * OUTPUT_CHARACTERS_MAX
_TAIL_BYTES = 4096


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a hook. ``payload`` is CloudStack's flat payload without the two objects of details."""

    path: str
    action: str
    scope_id: str
    namespace: str
    payload: bytes

    def run(self, ends: float) -> str:
        """What it printed, in ASCII. ``ends``: when it is killed with its process group, on the monotonic clock.

        Its first argument is a path to read the payload from, as often as it likes: a file in memory. Blocking. Raises
        HostRefused with the hook's last line when it fails, or is not done in time.
        """
        if time.monotonic() >= ends:
            raise HostRefused(f"hook {self.action} was not begun: the call had no time left", hint="do others hang?")
        payload = os.memfd_create("netloom.payload", os.MFD_CLOEXEC)
        try:
            with open(payload, "wb", closefd=False) as file:
                file.write(self.payload)
            return self._run(payload, ends)
        finally:
            os.close(payload)

    def _run(self, payload: int, ends: float) -> str:
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
                printed, complained, in_time = _listen(process, ends)
            finally:
                # Before it is waited for: until then its number cannot be another group's.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if not in_time:
            raise HostRefused(f"hook {self.action} was ended: not done in the time that the call had")
        if process.returncode:
            died = process.returncode < 0
            how = f"was ended by signal {-process.returncode}" if died else f"failed with status {process.returncode}"
            last = complained.last_line() or printed.last_line()
            raise HostRefused(f"hook {self.action} {how}{': ' if last else ', and did not say why'}{last}")
        return checked(self.action, printed.text())


class Hooks:
    """The hooks of a directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        """The actions that there is a file for, fit to be run or not."""
        try:
            found = sorted(map(_FILE.match, os.listdir(self.directory)), key=str)
        except OSError:
            return []
        return sorted(match[1] for match in found if match and ".." not in match[1])

    def path(self, action: str) -> str:
        """The hook's path. Raises HostRefused when somebody else than root could have written what root is to run."""
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
                    f"hook {path}: others than root may write it, so it is not run", hint="chown root, chmod go-w"
                )
        if not found.st_mode & stat.S_IXUSR:
            raise HostRefused(f"hook {file}: not executable", hint="chmod 0755")
        return str(file)


class _Heard:
    """The first bytes of a stream, and its last ones."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = b""

    def add(self, data: bytes) -> None:
        self._head += data[: _OUTPUT_BYTES_MAX - len(self._head)]
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def text(self) -> str:
        return self._head.decode("utf-8", "replace")

    def last_line(self) -> str:
        lines = plain(self._tail.decode("utf-8", "replace")).split("\n")
        return next((one_line(line, 400) for line in reversed(lines) if line.strip()), "")


def _listen(process: subprocess.Popen[bytes], ends: float) -> tuple[_Heard, _Heard, bool]:
    """What it says on both streams until it has ended; False when its time was over first.

    It is over when the hook itself has ended: what it left in the background holds the streams, and nobody up.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    streams = {process.stdout.fileno(): _Heard(), process.stderr.fileno(): _Heard()}
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in streams:
                os.set_blocking(fd, False)
            for fd in (pidfd, *streams):
                selector.register(fd, selectors.EVENT_READ)
            ended = False
            while not ended and (left_s := ends - time.monotonic()) > 0:
                ready = {key.fd for key, _ in selector.select(left_s)}
                ended = pidfd in ready
                for fd in ready & streams.keys():
                    for data in _available(fd):
                        streams[fd].add(data)
                        if not data:
                            selector.unregister(fd)
            if ended:
                # What came between the last look and its end.
                for fd, heard in streams.items():
                    for data in _available(fd):
                        heard.add(data)
    finally:
        os.close(pidfd)
    printed, complained = streams.values()
    return printed, complained, ended


def _available(fd: int) -> Iterator[bytes]:
    """What can be read now, at most so much that others have their turn; an empty piece is the end of the stream."""
    for _ in range(64):
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        yield data
        if not data:
            return
