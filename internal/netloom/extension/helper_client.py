"""The client of the resident helper: send it the call and wait for its answer; start it when it does not run.

In the one file, build/nuitka/call.c does the same in C, before Python is started. This module begins the calls that the
C code leaves to it, and continues those that it has begun and cannot end.

Each of them loads this module, so it imports one C module and nothing else that is new. The helper is optional: when it
does not answer correctly, the call does the work itself under the same call id. The agents recognise a repeated call id
and answer it from memory.
"""

from __future__ import annotations

import _socket  # the C module: socket.py adds enums and selectors to it, half a bare start-up
import sys
import time

from netloom.extension.directory import for_sockets
from netloom.fastos import os
from netloom.program import build_id, command, start_detached

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from netloom.extension.deadline import Deadline
    from netloom.extension.record import CallRecord

# The environment variable with the seconds after which an idle helper exits. "0": no helper is used.
SETTING = "NETLOOM_HELPER"

# The helper sends a heartbeat per call this often. Without one for PATIENCE_S, or a third of the remaining time if that
# is less (but never under four heartbeats, because a busy machine is late), the helper counts as hung.
BEAT_S = 0.5
PATIENCE_S = 5.0
_PATIENCE_S_MIN = 4 * BEAT_S
# The pause before each attempt. After a helper is killed its socket may accept connections for a moment longer, so the
# second attempt can still reach the dead helper.
_ATTEMPT_PAUSES_S = (0.0, 0.02, 0.2)

# The variables of a call's environment that its work depends on; they are sent with each call.
CALL_ENVIRONMENT = ("NETLOOM_AGENT", "NETLOOM_DIR", "HOME", "SSH_AUTH_SOCK")
# Further variables that the helper process inherits from the call that starts it.
_START_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "XDG_RUNTIME_DIR")

BEAT, DOING, ANSWER = b"beat", b"doing", b"answer"

# The lock file is never removed: two calls that locked different files of the same name would both start a helper.
_LOCK = "helper.lock"
BACKLOG = 1024
_CHUNK = 1 << 20


class _Broken(Exception):  # internal: leads to another attempt
    """The connection to the helper broke before its answer was complete."""


def pack(*fields: bytes) -> bytes:
    """One message: a length of 4 bytes, then each field with its own length of 4 bytes in front."""
    body = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return len(body).to_bytes(4, "big") + body


def unpack(body: bytes) -> list[bytes]:
    """The fields of a message whose own length has been cut off."""
    fields, at = [], 0
    while at < len(body):
        end = at + 4 + int.from_bytes(body[at : at + 4], "big")
        fields.append(body[at + 4 : end])
        at = end
    return fields


def socket_name() -> str:
    """The name of the helper's socket. It contains the build, so both ends speak the same version of the messages."""
    return f"helper-{build_id()}.sock"


def ask_helper(
    command: str,
    executable: str,
    payload_file: bytes,
    deadline: Deadline,
    record: CallRecord,
    environ: Mapping[str, str],
    failed: tuple[str, ...] = (),
) -> tuple[int, str, str] | None:
    """The helper's answer: exit status, output, error. None when there is no helper or it does not answer.

    ``executable``: the path by which this program was called. When the helper dies during the call, another one is
    started. When it hangs, its socket is removed, so that the next call starts a new one. ``failed``: how an attempt of
    build/nuitka/call.c has failed, ``("broken",)`` or ``("hung", <inode of the socket>)``.
    """
    if environ.get(SETTING) == "0":
        return None
    directory = for_sockets(environ)
    if directory is None:
        return None
    try:
        executable = os.path.abspath(executable)  # the helper's working directory is another one
    except OSError:  # the caller's was removed
        return None
    request = pack(
        *(text.encode("utf-8", "surrogateescape") for text in (command, executable)),
        record.call_id.encode(),
        f"{deadline.timeout_s} {record.started}".encode(),
        *(f"{name}={environ[name]}".encode("utf-8", "surrogateescape") for name in CALL_ENVIRONMENT if name in environ),
        b"",
        payload_file,
    )
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if failed[:1] == ("hung",):
            _abandon(fd, int(failed[1]))
            return None
        for pause_s in _ATTEMPT_PAUSES_S[1:] if failed else _ATTEMPT_PAUSES_S:
            time.sleep(pause_s)
            try:
                return _attempt(fd, request, deadline, record, environ)
            except _Broken:
                continue
    except OSError:  # no lock, process or memory for a helper: the call may still succeed without one
        pass
    finally:
        os.close(fd)
    return None


def _attempt(
    directory: int, request: bytes, deadline: Deadline, record: CallRecord, environ: Mapping[str, str]
) -> tuple[int, str, str] | None:
    patience_s = max(_PATIENCE_S_MIN, min(PATIENCE_S, deadline.remaining_s() / 3))
    helper = _connect(directory) or _connect_new(directory, patience_s, environ)
    if helper is None:
        return None
    found = inode(directory)
    helper.settimeout(patience_s)
    try:
        rest = memoryview(request)
        while rest:
            rest = rest[helper.send(rest) :]
        while True:
            kind, *fields = unpack(_receive(helper, int.from_bytes(_receive(helper, 4), "big")))
            if kind == ANSWER:
                status, output, error = fields
                return int(status), output.decode(), error.decode()
            if kind == DOING:
                (doing,) = fields  # guard: a-helper-sends-any-fields
                record.doing = doing.decode()
    except TimeoutError:
        _abandon(directory, found)
        return None
    except (OSError, ValueError) as error:
        raise _Broken from error
    finally:
        helper.close()


def _receive(helper: _socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = helper.recv(min(length - len(data), _CHUNK))
        if not chunk:
            raise _Broken
        data += chunk
    return bytes(data)


def _path(directory: int) -> str:
    # By way of the descriptor: a socket address holds 107 bytes, and the path of the directory may be longer.
    return f"/proc/self/fd/{directory}/{socket_name()}"


def inode(directory: int) -> int:
    """The inode number of the helper's socket; 0 when there is none."""
    try:
        return os.stat(socket_name(), dir_fd=directory, follow_symlinks=False).st_ino
    except OSError:
        return 0


def _connect(directory: int) -> _socket.socket | None:
    """A connection to the helper; None when there is none, or it is another user's, or it hangs."""
    helper = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    helper.settimeout(_PATIENCE_S_MIN)  # in case the helper hangs and its backlog is full
    try:
        helper.connect(_path(directory))
        if _peer_uid(helper) != os.geteuid():  # guard: a-helper-is-our-own
            raise ConnectionRefusedError
    except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
        helper.close()
        return None
    return helper


def _peer_uid(helper: _socket.socket) -> int:
    """The user who listens at the other end: the second of three numbers of 4 bytes (unix(7), SO_PEERCRED)."""
    return int.from_bytes(helper.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)


def _connect_new(directory: int, patience_s: float, environ: Mapping[str, str]) -> _socket.socket | None:
    """Start a helper and connect to it, or to one that another call has started meanwhile."""
    lock = locked(directory, patience_s)
    if lock is None:
        return None
    try:
        if (helper := _connect(directory)) is not None:
            return helper
        if inode(directory):
            os.unlink(socket_name(), dir_fd=directory)
        # The socket listens before the helper runs: calls can connect at once, and none starts a second helper.
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            listener.bind(_path(directory))
            listener.listen(BACKLOG)
            _start(listener.fileno(), directory, environ)
        finally:
            listener.close()
        return _connect(directory)
    finally:
        os.close(lock)


def locked(directory: int, patience_s: float) -> int | None:
    """The descriptor that holds the lock; None when another process holds it for longer than ``patience_s``."""
    import fcntl  # a C module, needed only to start a helper

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


def _abandon(directory: int, found: int) -> None:
    """Remove the socket of a helper that hangs, if its inode is still ``found``. The helper exits when it notices."""
    lock = locked(directory, _PATIENCE_S_MIN)
    if lock is not None:
        try:
            if found and inode(directory) == found:
                os.unlink(socket_name(), dir_fd=directory)
        finally:
            os.close(lock)


def _start(listener: int, directory: int, environ: Mapping[str, str]) -> None:
    """Start the helper detached from this call. Its stdin is the listening socket, its descriptor 3 the directory."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in (*CALL_ENVIRONMENT, *_START_ENVIRONMENT) or name.startswith(("NETLOOM_", "PYTHON"))
    }
    null = os.open(os.devnull, os.O_RDWR)
    try:
        start_detached([*command(), "helper"], kept, (listener, null, null, directory))
    finally:
        os.close(null)
