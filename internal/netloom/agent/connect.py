"""``netloom agent connect``: copy bytes between stdin and stdout and the agent's socket.

It runs at the host's end of the SSH channel. If no agent answers, it starts one: by systemd where our unit is
installed, else as a daemon, with the same program. An agent that hangs (hung.py) is ended first: when it does not greet
a new connection, or later, when it is silent on this one and does not greet another. Every connection of a management
server starts this process, so it imports little.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import time

from netloom.agent import hung
from netloom.agent.environment import PATH
from netloom.program import command, start_detached
from netloom.program import path as program_path

SOCKET = "/run/netloom/agent.sock"
LOG = "/var/log/netloom/agent.log"

# The systemd unit of the agent, written by the installation (setup/install.py).
UNIT = "netloom-agent.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
_SYSTEMD_RUNS = "/run/systemd/system"  # sd_booted(3)

UNTESTED = ".untested"  # beside the builds: the selftest of a first installation has not passed (setup/install.py)

START_S_MAX = 20.0  # until a started agent answers; it listens before it restores the scopes

QUIET_S = 5.0  # without a byte from the agent: ask over another connection whether it lives

_CHUNK = 1 << 18
_STDERR = 2


class Uninstalled(Exception):
    """The program was removed from the host since this process was started, or its installation is not complete."""


def connect(arguments: list[str]) -> int:
    """Relay until one side closes. ``arguments``: ``--socket PATH``, and the options of ``serve`` if it is started.

    The exit status: 0, or 3 when no agent answers and none could be started. 127, as of a shell that does not find the
    program, when it was uninstalled meanwhile.
    """
    path = SOCKET
    if "--socket" in arguments[:-1]:
        path = arguments[arguments.index("--socket") + 1]
    try:
        with _connect_or_start(path, arguments) as agent:
            silent = _relay(agent, path)
        if silent:  # the caller repeats its call over a new channel, which finds the new agent
            _start_another(path, arguments, silent).close()
    except Uninstalled as error:
        sys.stderr.write(f"netloom agent: {error}\n")
        return 127
    except PermissionError:
        sys.stderr.write(f"netloom agent: {path}: not allowed (log in as root, or let the user run it with sudo -n)\n")
        return 3
    except OSError as error:
        sys.stderr.write(f"netloom agent: {path}: {error.strerror or error}\n")
        return 3
    return 0


def _connect_or_start(path: str, arguments: list[str]) -> socket.socket:
    """A connection to the agent, which has spoken. It is started if none answers. Raises OSError and Uninstalled."""
    agent, silent = _greeted(path)
    if agent is not None:
        return agent
    _check_installed()
    return _start_another(path, arguments, silent)


def _start_another(path: str, arguments: list[str], silent: int) -> socket.socket:
    """End the agent ``silent`` if it still serves, and start another, unless another relay does.

    Raises OSError and Uninstalled.

    ``silent``: the pid of an agent that hangs; 0: none is known.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    deadline = time.monotonic() + START_S_MAX
    lock = open_lock(directory)
    try:
        while not locked(lock):
            if not silent or hung.agent_pid(directory) != silent:
                agent, silent = _greeted(path)
                if agent is not None:
                    return agent
            _wait(deadline, "another process has been starting the agent for too long")
        _end(directory, silent)
        agent, silent = _greeted(path)
        if agent is not None:
            return agent
        try:
            _check_installed()  # guard: an-uninstall-is-not-undone
        except Uninstalled:
            _remove_lock(directory, lock)
            raise
        _end(directory, silent)
        _start(arguments)
        return _started(path, arguments)
    finally:
        os.close(lock)


def _check_installed() -> None:
    """Raise Uninstalled if neither our file nor the unit is there any more. An uninstall holds the lock meanwhile.

    Raise it also before the selftest of the first installation has passed, so that the caller installs us (again).
    """
    file = program_path()
    if file is not None and os.path.exists(f"{os.path.dirname(os.path.dirname(file))}/{UNTESTED}"):
        raise Uninstalled("the selftest of this host has not passed")  # guard: an-untested-host-is-installed-again
    if file is not None and not os.path.exists(file) and not has_unit():
        raise Uninstalled(f"{file} is not installed any more")


def _remove_lock(directory: str, lock: int) -> None:
    """Remove our lock and its directory, which the uninstall has removed before we created them."""
    name = os.path.join(directory, "start.lock")
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(name), os.fstat(lock)):
            os.unlink(name)
        os.rmdir(directory)


def _started(path: str, arguments: list[str]) -> socket.socket:
    """A connection to the agent that was just started. Raises OSError when it does not answer.

    An older agent may hold the lock and not listen. It is ended if it hangs, and the agent is started again.
    """
    directory = os.path.dirname(path)
    deadline = time.monotonic() + START_S_MAX
    starting = hung.Silence(0)
    while True:
        agent, silent = _greeted(path)
        if agent is not None:
            return agent
        holder = hung.agent_pid(directory)
        if starting.pid != holder:
            starting = hung.Silence(holder)
        if starting.hangs(time.monotonic()):
            silent = holder
        if silent:
            _end(directory, silent)
            _start(arguments)
            deadline = time.monotonic() + START_S_MAX
        _wait(deadline, f"the agent was started and does not answer: see {LOG}")


def _start(arguments: list[str]) -> None:
    if has_unit() and not arguments:
        start_unit()
    else:
        start(command(), arguments)


def _end(directory: str, silent: int) -> None:
    """End the agent that hangs, and say so in the log; 0: there is none. Raises OSError."""
    if not silent or hung.agent_pid(directory) != silent:
        return
    text = f"the agent (process {silent}) hangs: it does not answer a new connection; it is ended and started again"
    sys.stderr.write(f"netloom agent: {text}\n")
    log = _open_log()
    if log != _STDERR:
        os.write(log, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n".encode())
        os.close(log)
    hung.end(directory, silent)


def _greeted(path: str) -> tuple[socket.socket | None, int]:
    """A connection to the agent after its first bytes have come, and 0.

    None and 0 when no agent listens. None and its pid when it hangs. Raises OSError.
    """
    question = _Question(path)
    while True:
        if question.answered(hung.SAMPLE_S):
            return question.connection, 0
        if question.connection is None:
            return None, 0
        if question.silence.hangs(time.monotonic()):
            question.close()
            return None, question.silence.pid


class _Question:
    """A new connection on which the agent has not spoken yet. ``connection``: None when no agent listens.

    The constructor and ``answered`` raise OSError.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._connected = False
        self.silence = hung.Silence(hung.agent_pid(os.path.dirname(path)))
        self.connection: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    def answered(self, within_s: float) -> bool:
        """Whether the agent speaks within this time."""
        if self.connection is None:
            return False
        self.connection.settimeout(within_s)
        try:
            if not self._connected:
                self.connection.connect(self._path)
                self._connected = True
            if self.connection.recv(1, socket.MSG_PEEK):
                self.connection.settimeout(None)
                return True
        except TimeoutError:
            return False
        except BlockingIOError:  # the backlog of a stopped process is full
            time.sleep(within_s)
            return False
        except (FileNotFoundError, ConnectionError):
            pass
        except OSError:
            self.close()
            raise
        self.close()
        return False

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def open_lock(directory: str) -> int:
    """Open the lock of the process that starts an agent. Raises OSError.

    The file is never removed: else two processes could each lock a file of this name, and both start an agent.
    """
    return os.open(os.path.join(directory, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def locked(fd: int) -> bool:
    """Try to take the lock, without waiting; whether we have it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(deadline: float, error: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(error)
    time.sleep(0.02)


def systemd_runs() -> bool:
    """Whether systemd is the init system of this host."""
    return os.path.isdir(_SYSTEMD_RUNS)


def has_unit() -> bool:
    """Whether systemd supervises the agent."""
    return systemd_runs() and os.path.exists(UNIT_FILE)


def start_unit() -> None:
    """Let systemd start the agent, without waiting until it answers. Raises OSError."""
    child = os.fork()
    if not child:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execvp("systemctl", ["systemctl", "start", "--no-block", UNIT])
        finally:
            os._exit(127)
    _, status = os.waitpid(child, 0)
    if status:
        raise OSError(f"systemd does not start {UNIT}: see systemctl status {UNIT}")


def start(program: list[str], arguments: list[str]) -> None:
    """Start the agent as a daemon, with stdin and stdout from /dev/null and the log file as stderr. Raises OSError."""
    kept = ("PATH", "LANG", "LC_ALL")
    environment = {
        key: value for key, value in os.environ.items() if key in kept or key.startswith(("PYTHON", "NETLOOM_"))
    }
    environment.setdefault("PATH", PATH)
    null = os.open(os.devnull, os.O_RDWR)
    log = _open_log()
    try:
        start_detached([*program, "agent", "serve", "--log", LOG, *arguments], environment, (null, null, log))
    finally:
        os.close(null)
        if log != _STDERR:
            os.close(log)


def _open_log() -> int:
    """Open the log for the errors of an agent that fails before it opens the log itself; else use our stderr."""
    try:
        os.makedirs(os.path.dirname(LOG), mode=0o700, exist_ok=True)
        return os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return _STDERR


def _relay(agent: socket.socket, path: str) -> int:
    """Copy bytes in both directions until stdin ends, or the agent or the reader of stdout closes.

    Returns 0, or the pid of the agent when it hangs.
    """
    agent.setblocking(False)
    stdin, stdout = 0, 1
    upward = b""  # bytes for the agent
    heard = time.monotonic()  # when the agent spoke last, on any connection
    question: _Question | None = None
    while True:
        wanted_r: list[socket.socket | int] = [agent]
        if not upward:
            wanted_r.append(stdin)
        ready_r, ready_w, _ = select.select(
            wanted_r, [agent] if upward else [], [], QUIET_S if question is None else hung.SAMPLE_S
        )
        if agent in ready_r:
            try:
                data = agent.recv(_CHUNK)
            except BlockingIOError:
                data = None
            except ConnectionError:
                return 0
            if data == b"":
                return 0
            if data and not _write(stdout, data):
                return 0
            heard = time.monotonic()
        if stdin in ready_r:
            upward = os.read(stdin, _CHUNK)
            if not upward:
                return 0  # the management server has closed the channel; the agent keeps running
        if upward and agent in ready_w:
            try:
                upward = upward[agent.send(upward) :]
            except BlockingIOError:
                pass
            except ConnectionError:
                return 0
        now = time.monotonic()
        if now - heard < QUIET_S:
            if question is not None:
                question.close()
            question = None
            continue
        question = question or _Question(path)
        if question.answered(0.0) or question.connection is None:
            heard = now
        elif question.silence.hangs(now):  # guard: a-relay-notices-that-the-agent-hangs
            question.close()
            return question.silence.pid


def _write(fd: int, data: bytes) -> bool:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BrokenPipeError:
            return False
        except BlockingIOError:  # sshd passes a socket, which another process may have set non-blocking
            select.select([], [fd], [])
    return True
