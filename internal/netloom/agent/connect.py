"""``netloom agent connect``: carries bytes between its own stdin and stdout and the agent's socket.

The other end of the SSH channel. When no agent answers, one is started, detached from this process, its terminal and
its descriptors, by a command line made from this one's own. Imports nothing but the standard library, and little of it.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import time

SOCKET = "/run/netloom/agent.sock"
LOG = "/var/log/netloom/agent.log"

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
    # Never removed: two who hold different files of one name would both start an agent.
    lock = os.open(os.path.join(directory, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _locked(lock):
            agent = _try(path)
            if agent is not None:
                return agent
            _wait(deadline, "another start of the agent does not come to an end")
        agent = _try(path)
        if agent is not None:
            return agent
        _start(arguments)
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


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(what)
    time.sleep(0.02)


def _start(arguments: list[str]) -> None:
    """Starts the agent as a grandchild: own session, no descriptor of ours, ``/`` as working directory."""
    argv = [*program("connect"), "agent", "serve", "--log", LOG, *arguments]
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
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.execve(argv[0], argv, environment)
    finally:
        os._exit(127)


def program(word: str) -> list[str]:
    """How this process was executed as ``agent <word>``, up to there: interpreter and script, or the compiled file."""
    words = list(sys.orig_argv)
    at = next(index for index in range(len(words) - 1) if words[index : index + 2] == ["agent", word])
    words = words[:at]
    if "__compiled__" not in globals():  # a compiled program's own path stands in front already
        words[0] = sys.executable
    script = sys.argv[0]
    if script in words:
        words[words.index(script)] = os.path.abspath(script)
    return words


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
