"""``netloom agent connect``: carries bytes between its own stdin and stdout and the agent's socket.

The other end of the SSH channel. When no agent answers, one is started: by systemd where it has our
unit, else detached from this process, its terminal and its descriptors, by a command line made from this one's own.
Imports little.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import time

from netloom.program import close_all_but, command

SOCKET = "/run/netloom/agent.sock"
LOG = "/var/log/netloom/agent.log"

# What systemd starts where it runs; written when the program is installed (install.py).
UNIT = "netloom-agent.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
_SYSTEMD_RUNS = "/run/systemd/system"  # sd_booted(3)

START_S_MAX = 20.0  # for the agent to answer after it was started; it listens before it restores the scopes

_CHUNK = 1 << 18


def connect(arguments: list[str]) -> int:
    """Relays until either side is done. ``arguments``: ``--socket PATH``, and options that ``serve`` gets when started.

    Exit status 0, 1 for a usage error, 3 when no agent answers and none could be started.
    """
    path = SOCKET
    if "--socket" in arguments[:-1]:
        path = arguments[arguments.index("--socket") + 1]
    try:
        agent = _reach(path, arguments)
    except PermissionError:
        sys.stderr.write(f"netloom agent: {path}: not allowed (log in as root, or let the user run it with sudo -n)\n")
        return 3
    except OSError as error:
        sys.stderr.write(f"netloom agent: {path}: {error.strerror or error}\n")
        return 3
    _relay(agent)
    return 0


def _reach(path: str, arguments: list[str]) -> socket.socket:
    agent = _try(path)
    if agent is not None:
        return agent
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    deadline = time.monotonic() + START_S_MAX
    lock = open_lock(directory)
    try:
        while not locked(lock):
            agent = _try(path)
            if agent is not None:
                return agent
            _wait(deadline, "another start of the agent does not come to an end")
        agent = _try(path)
        if agent is not None:
            return agent
        if has_unit() and not arguments:
            start_unit()
        else:
            start(command(), arguments)
        while True:
            agent = _try(path)
            if agent is not None:
                return agent
            _wait(deadline, f"the agent was started and does not answer: see {LOG}")
    finally:
        os.close(lock)


def _try(path: str) -> socket.socket | None:
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    agent.settimeout(START_S_MAX)  # a stopped agent whose backlog is full would keep us for ever
    try:
        agent.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        agent.close()
        return None
    except OSError:
        agent.close()
        raise
    return agent


def open_lock(directory: str) -> int:
    """The lock of whoever starts an agent. Never removed: two who hold different files of one name would both do it."""
    return os.open(os.path.join(directory, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def locked(fd: int) -> bool:
    """Whether we have the lock now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(what)
    time.sleep(0.02)


def systemd_runs() -> bool:
    """Whether systemd is this host's init."""
    return os.path.isdir(_SYSTEMD_RUNS)


def has_unit() -> bool:
    """Whether systemd looks after the agent."""
    return systemd_runs() and os.path.exists(UNIT_FILE)


def start_unit() -> None:
    """Has systemd start the agent. Raises OSError when it refuses; does not wait until the agent answers."""
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
    """Starts the agent as a grandchild: own session, no descriptor of ours, ``/`` as working directory."""
    argv = [*program, "agent", "serve", "--log", LOG, *arguments]
    kept = ("PATH", "LANG", "LC_ALL")
    environment = {
        key: value for key, value in os.environ.items() if key in kept or key.startswith(("PYTHON", "NETLOOM_"))
    }
    environment.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        null = os.open("/dev/null", os.O_RDWR)
        for fd, instead in enumerate((null, null, _last_words())):  # guard: agent-holds-none-of-the-relays-streams
            os.dup2(instead, fd)
        close_all_but(0, 1, 2)
        os.execve(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"{argv[0]} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _last_words() -> int:
    """Where an agent that cannot even begin says why."""
    try:
        os.makedirs(os.path.dirname(LOG), mode=0o755, exist_ok=True)
        return os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:
        return 2


def _relay(agent: socket.socket) -> None:
    """Both ways until the agent hangs up, or stdin ends and the agent has said what it had to say."""
    agent.setblocking(False)
    stdin, stdout = 0, 1
    upward = b""  # towards the agent
    reading = True
    while True:
        wanted_r: list[socket.socket | int] = [agent]
        if reading and not upward:
            wanted_r.append(stdin)
        ready_r, ready_w, _ = select.select(wanted_r, [agent] if upward else [], [])
        if agent in ready_r:
            try:
                data = agent.recv(_CHUNK)
            except BlockingIOError:
                data = None
            except ConnectionError:
                return
            if data == b"":
                return
            if data and not _write(stdout, data):
                return
        if stdin in ready_r:
            upward = os.read(stdin, _CHUNK)
            if not upward:
                # Whoever called is gone, or has nothing more to ask: the relay ends, the agent stays.
                return
        if upward and agent in ready_w:
            try:
                upward = upward[agent.send(upward) :]
            except BlockingIOError:
                pass
            except ConnectionError:
                return


def _write(fd: int, data: bytes) -> bool:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BrokenPipeError:
            return False
        except BlockingIOError:  # sshd gives a socket that somebody may have set non-blocking
            select.select([], [fd], [])
    return True
