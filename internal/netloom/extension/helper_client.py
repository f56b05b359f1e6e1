"""A call hands its work to the resident helper and waits for the answer; where there is no helper it starts one.

Loads a C module besides what an interpreter has, for this is what every call of CloudStack's runs through. Nothing
depends on the helper: whenever it does not answer as it should, the call does the same work by itself, under the same
call id, and the agents answer a repeat from memory.
"""

from __future__ import annotations

import _socket  # the C module: socket.py adds enums and selectors to it, half a bare start-up
import time

from netloom.extension.directory import for_sockets
from netloom.fastos import os
from netloom.program import build_id, close_all_but, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from netloom.extension.call import Story
    from netloom.extension.deadline import Deadline

# How long the helper stays without a call; "0" forbids it, and every call works by itself.
SETTING = "NETLOOM_HELPER"

# A helper says something about each call this often. One that is silent for PATIENCE_S, or a third of the time that is
# left, but for four beats at least, hangs; a busy machine's is late.
BEAT_S = 0.5
PATIENCE_S = 5.0
_PATIENCE_S_MIN = 4 * BEAT_S
# A killed one's connections break before its socket refuses new ones: the second may still find it.
_AGAIN_AFTER_S = (0.0, 0.02, 0.2)

# What of a call's environment its work depends on.
ENVIRONMENT = ("NETLOOM_AGENT", "NETLOOM_DIR", "HOME", "SSH_AUTH_SOCK")
# What the helper itself lives in, besides: the first call's.
_STARTED_WITH = ("PATH", "LANG", "LC_ALL", "XDG_RUNTIME_DIR")

BEAT, DOING, ANSWER = b"beat", b"doing", b"answer"

# Never removed: two who hold different files of one name would both start a helper.
_LOCK = "helper.lock"
BACKLOG = 1024
_CHUNK = 1 << 20


class _Broken(Exception):  # not a failure yet
    """The helper is gone in the middle of the call, or does not take it."""


def pack(*fields: bytes) -> bytes:
    """One message: its length, then each field with its own length in front."""
    body = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return len(body).to_bytes(4, "big") + body


def unpack(body: bytes) -> list[bytes]:
    """The fields of a message, without the message's length."""
    fields, at = [], 0
    while at < len(body):
        end = at + 4 + int.from_bytes(body[at : at + 4], "big")
        fields.append(body[at + 4 : end])
        at = end
    return fields


def socket_name() -> str:
    """The helper's name in its directory. A build talks to its own kind only, so what they say needs no version."""
    return f"helper-{build_id()}.sock"


def hand_over(
    words: tuple[str, str], payload: bytes, deadline: Deadline, story: Story, environ: Mapping[str, str]
) -> tuple[int, str, str] | None:
    """The helper's answer: exit status, output, error. None when no helper can give one.

    ``words``: the command, and the path by which this program was called. A helper that dies under the call is
    followed by another one; one that hangs is left behind, so that the next call starts a new one.
    """
    if environ.get(SETTING) == "0":
        return None
    directory = for_sockets(environ)
    if directory is None:
        return None
    request = pack(
        *(word.encode("utf-8", "surrogateescape") for word in words),
        story.call_id.encode(),
        f"{deadline.timeout_s} {story.started}".encode(),
        *(f"{name}={environ[name]}".encode("utf-8", "surrogateescape") for name in ENVIRONMENT if name in environ),
        b"",
        payload,
    )
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for pause_s in _AGAIN_AFTER_S:
            time.sleep(pause_s)
            try:
                return _asked(fd, request, deadline, story, environ)
            except _Broken:
                continue
    except OSError:  # no lock, no process, no memory: whatever it is, the call's own work may still be possible
        pass
    finally:
        os.close(fd)
    return None


def _asked(
    directory: int, request: bytes, deadline: Deadline, story: Story, environ: Mapping[str, str]
) -> tuple[int, str, str] | None:
    patience_s = max(_PATIENCE_S_MIN, min(PATIENCE_S, deadline.remaining_s() / 3))
    helper = _connected(directory) or _started(directory, patience_s, environ)
    if helper is None:
        return None
    found = inode(directory)
    helper.settimeout(patience_s)
    try:
        rest = memoryview(request)
        while rest:
            rest = rest[helper.send(rest) :]
        while True:
            kind, *said = unpack(_received(helper, int.from_bytes(_received(helper, 4), "big")))
            if kind == ANSWER:
                status, output, error = said
                return int(status), output.decode(), error.decode()
            if kind == DOING:
                story.doing = said[0].decode()
    except TimeoutError:
        _leave_behind(directory, found)
        return None
    except (OSError, ValueError) as error:
        raise _Broken from error
    finally:
        helper.close()


def _received(helper: _socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = helper.recv(min(length - len(data), _CHUNK))
        if not chunk:
            raise _Broken
        data += chunk
    return bytes(data)


def _path(directory: int) -> str:
    # Through the descriptor: a socket's address has 107 bytes, a directory's path may have more.
    return f"/proc/self/fd/{directory}/{socket_name()}"


def inode(directory: int) -> int:
    """Which socket has the helper's name; 0 for none."""
    try:
        return os.stat(socket_name(), dir_fd=directory, follow_symlinks=False).st_ino
    except OSError:
        return 0


def _connected(directory: int) -> _socket.socket | None:
    helper = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    helper.settimeout(_PATIENCE_S_MIN)  # for one that hangs with a full backlog
    try:
        helper.connect(_path(directory))
    except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
        helper.close()
        return None
    return helper


def _started(directory: int, patience_s: float, environ: Mapping[str, str]) -> _socket.socket | None:
    """A connection to a new helper, or to the one that another call has just started."""
    lock = locked(directory, patience_s)
    if lock is None:
        return None
    try:
        if (helper := _connected(directory)) is not None:
            return helper
        if inode(directory):
            os.unlink(socket_name(), dir_fd=directory)
        # We listen before it runs, so that nobody has to wait for it to come up, and nobody starts a second one.
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            listener.bind(_path(directory))
            listener.listen(BACKLOG)
            _start(listener.fileno(), directory, environ)
        finally:
            listener.close()
        return _connected(directory)
    finally:
        os.close(lock)


def locked(directory: int, patience_s: float) -> int | None:
    """The descriptor that holds the lock; None when somebody keeps it for longer than ``patience_s``."""
    import fcntl  # a C module, for a start only

    fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(fd)
                return None
        time.sleep(0.005)


def _leave_behind(directory: int, found: int) -> None:
    """Take the name from the helper that hangs, unless somebody did; should it wake up, it ends with its last call."""
    lock = locked(directory, _PATIENCE_S_MIN)
    if lock is not None:
        try:
            if found and inode(directory) == found:
                os.unlink(socket_name(), dir_fd=directory)
        finally:
            os.close(lock)


def _start(listener: int, directory: int, environ: Mapping[str, str]) -> None:
    """Start the helper as a grandchild: own session, ``/`` as working directory, no descriptor of ours but two.

    It finds the socket that it serves as its standard input, and the directory as descriptor 3.
    """
    words = [*command(), "helper"]
    kept = {
        name: value
        for name, value in environ.items()
        if name in (*ENVIRONMENT, *_STARTED_WITH) or name.startswith(("NETLOOM_", "PYTHON"))
    }
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        _become(words, kept, listener, directory)
    finally:
        os._exit(127)


def _become(words: list[str], environ: dict[str, str], listener: int, directory: int) -> NoReturn:
    # Out of the way of the numbers that they are to have.
    listener, directory, null = os.dup(listener), os.dup(directory), os.open(os.devnull, os.O_RDWR)
    while min(listener, directory, null) < 4:
        listener, directory, null = os.dup(listener), os.dup(directory), os.dup(null)
    for wanted, fd in enumerate((listener, null, null, directory)):
        os.dup2(fd, wanted)
    close_all_but(0, 1, 2, 3)
    os.chdir("/")
    os.umask(0o077)
    os.execve(words[0], words, environ)
