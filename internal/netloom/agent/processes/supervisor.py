"""The processes inside the scopes' namespaces: started, adopted, reloaded, revived, ended.

They outlive the agent: each leads a session of its own, and what runs stands in its directory (``running.json``:
pid and start time, so that a recycled pid is never taken for ours). A new agent adopts what it finds there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from netloom.agent.environment import PATH
from netloom.agent.kernel.namespaces import identity, inside
from netloom.errors import HostRefused, one_line
from netloom.render.service import SERVICES_DIR, Probe, Service

BACK_OFF_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SETTLED_S = 60.0  # a process that lived this long has no earlier failures
READY_S = 3.0
TAKEN_OVER_S = 10.0
END_S = 2.0
RUN_S_MAX = 20.0

NOBODYS_GROUP = 65534
_RECORD = "running.json"
_LOG = "log"


class Record(msgspec.Struct, frozen=True):
    """What runs: ``started`` is field 22 of /proc/<pid>/stat, in clock ticks since boot (proc(5))."""

    pid: int
    started: int
    digest: str = ""


class _Running:
    """A process that was seen alive, watched through its pidfd (readable when it has ended, pidfd_open(2))."""

    def __init__(self, scope_id: str, namespace: str, service: Service, record: Record, pidfd: int) -> None:
        self.scope_id = scope_id
        self.service = service
        self.record = record
        self.pidfd = pidfd
        self.since = time.monotonic()
        self.namespace = namespace
        self.silent = False  # it was ended because it did not answer


class ProbeTarget(NamedTuple):
    """A process that runs, and how to ask it whether it does more than that."""

    scope_id: str
    namespace: str
    name: str
    record: Record
    probe: Probe


class Supervisor:
    """Keeps what the scopes want running. ``converge`` and ``end`` belong to worker threads, one a scope at a time.

    ``revive`` is called on the event loop with the id of a scope in which a process died, when it is time to start
    it again; it is expected to converge that scope.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, revive: Callable[[str, str], None]) -> None:
        self._loop = loop
        self._revive = revive
        self._lock = threading.Lock()
        self._running: dict[tuple[str, str], _Running] = {}
        self._failures: dict[tuple[str, str], int] = {}
        self._ends: dict[tuple[str, str], int] = {}  # how often it ended and nobody had asked for it
        _make_directory(Path(SERVICES_DIR), 0o711)  # the host's, so that a network leaves no trace of it

    def converge(self, scope_id: str, namespace: str, wanted: tuple[Service, ...]) -> list[str]:
        """Makes exactly ``wanted`` run in ``namespace``; what it did, in words.

        Raises HostRefused, naming the service, when one does not start or refuses its configuration; what ran goes
        on running then, and the other services are seen to first.
        """
        did: list[str] = []
        names = {service.name for service in wanted}
        for name in self._known(scope_id) - names:
            did += self._end(scope_id, name)
        failed: list[HostRefused] = []
        for service in wanted:
            try:
                did += self._one(scope_id, namespace, service)
            except HostRefused as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return did

    def end(self, scope_id: str) -> list[str]:
        """Ends every process of the scope and removes their directories."""
        did = [  # guard: the-end-is-of-one-scope
            step for name in self._known(scope_id) for step in self._end(scope_id, name)
        ]
        shutil.rmtree(f"{SERVICES_DIR}/{scope_id}", ignore_errors=True)
        return did

    def renew(self, scope_id: str) -> None:
        """What runs for the scope counts as started with something else: converge reloads it, or starts it anew."""
        with self._lock:
            for (scope, _), running in self._running.items():
                if scope == scope_id:
                    running.record = msgspec.structs.replace(running.record, digest="")

    def scopes(self) -> set[str]:
        """The scopes that something runs for, or ran for when nobody could tell of it."""
        with self._lock:
            known = {scope_id for scope_id, _ in self._running}
        return known | set(os.listdir(SERVICES_DIR))

    def states(self) -> dict[str, dict[str, int]]:
        """Scope to service to pid, of what was last seen alive."""
        with self._lock:
            table: dict[str, dict[str, int]] = {}
            for (scope_id, name), running in sorted(self._running.items()):
                table.setdefault(scope_id, {})[name] = running.record.pid
            return table

    def ends(self, scope_id: str) -> dict[str, int]:
        """Service to how often it died, or was silent and ended, since it was first wanted of this supervisor."""
        with self._lock:
            return {name: count for (scope, name), count in self._ends.items() if scope == scope_id}

    def answering(self) -> list[ProbeTarget]:
        """What runs and can be asked whether it answers."""
        with self._lock:
            return [
                ProbeTarget(it.scope_id, it.namespace, it.service.name, it.record, it.service.probe)
                for _, it in sorted(self._running.items())
                if it.service.probe is not None
            ]

    def end_silent(self, asked: ProbeTarget) -> bool:
        """Ends a process that does not answer, with its whole group; it is revived as if it had died by itself."""
        with self._lock:
            running = self._running.get((asked.scope_id, asked.name))
            if running is None or running.record.pid != asked.record.pid or not alive(running.record):
                return False
            running.silent = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(asked.record.pid, signal.SIGKILL)
        return True

    # ------------------------------------------------------------------------------------------------ one service

    def _one(self, scope_id: str, namespace: str, service: Service) -> list[str]:
        directory = Path(service.directory)
        _make_directory(directory, 0o711)
        running = self._find(scope_id, namespace, service)
        if running is not None and _is_deaf(directory, service):
            # Noted before the files are changed: who dies in between has not changed anything for good.
            noted = Record(running.record.pid, running.record.started)
            running = self._remember(scope_id, namespace, service, noted)
        did = _write_live(directory, service)
        digest = _digest(service)
        # In a namespace that was made anew under the old name, a process of the old one is deaf.
        placed = running is not None and _namespace_of(running.record.pid) == identity(namespace)
        if running is not None and placed and running.record.digest == digest:
            return did
        begun = any((directory / name).exists() for name in service.config)
        _put_configuration(namespace, directory, service)
        if running is not None and placed and service.on_change == "reload":
            _reload(running.record.pid, service)  # guard: a-reload-waits-for-the-new-worker
            record = Record(running.record.pid, running.record.started, digest)
            self._remember(scope_id, namespace, service, record)
            return [*did, f"reload {service.name}"]
        if running is not None:
            did += self._end(scope_id, service.name, keep_directory=True)
        elif begun:
            for stray in _unnoted(namespace, service):
                _terminate(stray)
        pid = _start(namespace, directory, service)
        self._remember(scope_id, namespace, service, record_of(pid, digest))
        _wait_ready(pid, directory, service)
        return [*did, f"start {service.name}"]

    def _find(self, scope_id: str, namespace: str, service: Service) -> _Running | None:
        """The service's process, when it is alive: as remembered, else as its directory tells."""
        key = (scope_id, service.name)
        with self._lock:
            running = self._running.get(key)
        if running is not None:
            return running if alive(running.record) else None
        record = read_record(Path(service.directory, _RECORD))
        if record is None or not alive(record):
            return None
        return self._remember(scope_id, namespace, service, record)

    def _remember(self, scope_id: str, namespace: str, service: Service, record: Record) -> _Running:
        (Path(service.directory) / _RECORD).write_bytes(msgspec.json.encode(record))
        key = (scope_id, service.name)
        with self._lock:
            had = self._running.get(key)
            if had is not None and had.record.pid == record.pid and had.record.started == record.started:
                had.record, had.service, had.namespace = record, service, namespace
                return had
        try:
            pidfd = os.pidfd_open(record.pid)
        except ProcessLookupError:
            raise HostRefused(f"{service.name} of {scope_id} ended at once: {_last_words(service)}") from None
        running = _Running(scope_id, namespace, service, record, pidfd)
        with self._lock:
            self._running[key] = running
        self._loop.call_soon_threadsafe(self._watch, key, running)
        return running

    def _watch(self, key: tuple[str, str], running: _Running) -> None:
        if self._running.get(key) is running and running.pidfd >= 0:
            self._loop.add_reader(running.pidfd, self._ended, key, running)

    def _ended(self, key: tuple[str, str], running: _Running) -> None:
        """On the event loop: a process has ended, and nobody had asked for it."""
        self._forget(running)
        with self._lock:
            if self._running.get(key) is not running:
                return
            del self._running[key]
            lived_s = time.monotonic() - running.since
            failures = 0 if lived_s > SETTLED_S else self._failures.get(key, 0)
            self._failures[key] = failures + 1
            self._ends[key] = self._ends.get(key, 0) + 1
        wait_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
        how = "hung" if running.silent else "died"
        self._loop.call_later(wait_s, self._revive, running.scope_id, f"{running.service.name} {how}")

    def _end(self, scope_id: str, name: str, *, keep_directory: bool = False) -> list[str]:
        key = (scope_id, name)
        directory = Path(SERVICES_DIR, scope_id, name)
        with self._lock:
            running = self._running.pop(key, None)
            self._failures.pop(key, None)
            if not keep_directory:
                self._ends.pop(key, None)
        record = running.record if running is not None else read_record(directory / _RECORD)
        did = []
        if record is not None and alive(record):
            _terminate(record.pid)
            did = [f"end {name}"]
        if running is not None:
            self._loop.call_soon_threadsafe(self._forget, running)
        if not keep_directory:
            shutil.rmtree(directory, ignore_errors=True)
        return did

    def _forget(self, running: _Running) -> None:
        """On the event loop. It may have died at the moment when its end was asked for: then this comes twice."""
        if running.pidfd >= 0:
            self._loop.remove_reader(running.pidfd)
            os.close(running.pidfd)
            running.pidfd = -1
            _reap(running.record.pid)

    def _known(self, scope_id: str) -> set[str]:
        with self._lock:
            known = {name for scope, name in self._running if scope == scope_id}
        with contextlib.suppress(FileNotFoundError):
            known |= set(os.listdir(f"{SERVICES_DIR}/{scope_id}"))
        return known


# ------------------------------------------------------------------------------------------------------- files


def _digest(service: Service) -> str:
    """Of all that a running process was started with."""
    return hashlib.sha256(msgspec.json.encode((service.argv, sorted(service.config.items())))).hexdigest()


def _make_directory(directory: Path, mode: int) -> None:
    for part in (*reversed([p for p in directory.parents if p.is_relative_to(SERVICES_DIR)]), directory):
        if not part.exists():
            part.mkdir(parents=True)
            part.chmod(mode)


def _write(path: Path, text: str, mode: int, group: int = 0) -> None:
    """Whole or not at all. The temporary name has a dot: dnsmasq leaves such files of its hostsdir alone."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        os.fchown(descriptor, 0, group)
        file.write(text)
    temporary.rename(path)


def _put_configuration(namespace: str, directory: Path, service: Service) -> None:
    """The configuration in force, after its own program has accepted it. Raises HostRefused and leaves the old one."""
    for name, text in service.config.items():
        candidate = directory / f"{name}.candidate"
        _write(candidate, text, 0o600)
    if service.check:
        candidates = {f"{directory}/{name}": f"{directory}/{name}.candidate" for name in service.config}
        argv = [candidates.get(word, word) for word in service.check]
        checked = run(namespace, argv)
        if checked.returncode != 0:
            raise HostRefused(
                f"{service.name}: the configuration was refused: {one_line(checked.stdout, 400)}"
            )  # guard: a-refused-file-stays-a-candidate
    for name in service.config:
        (directory / f"{name}.candidate").rename(directory / name)


def _is_deaf(directory: Path, service: Service) -> bool:
    """Whether what runs will not notice by itself what becomes of its live files.

    Because somebody took the directory away that it watches, or because a text is to be known no more that it does not
    forget.
    """
    if not service.live_directory:
        return False
    live = directory / service.live_directory
    if not live.exists():
        return True
    if service.forgets:
        return False
    return any(service.live.get(it.name) != it.read_text() for it in live.iterdir() if not it.name.startswith("."))


def _write_live(directory: Path, service: Service) -> list[str]:
    if not service.live_directory:
        return []
    # dnsmasq reads these as the user it has become: nobody's group, and nobody else on the host.
    live = directory / service.live_directory
    if not live.exists():
        live.mkdir(mode=0o750)
        live.chmod(0o750)
        os.chown(live, 0, NOBODYS_GROUP)
    had = {path.name: path for path in live.iterdir() if not path.name.startswith(".")}
    did = []
    for name, text in service.live.items():
        if name not in had or had[name].read_text() != text:
            _write(live / name, text, 0o640, NOBODYS_GROUP)
            did.append(f"write {service.name}/{name}")
    for name in had.keys() - service.live.keys():
        had[name].unlink()
        did.append(f"remove {service.name}/{name}")
    return did


def read_record(path: Path) -> Record | None:
    """What was noted there of a process; None when nothing was, or nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


# --------------------------------------------------------------------------------------------------- processes


def _start(namespace: str, directory: Path, service: Service) -> int:
    program = shutil.which(service.argv[0], path=PATH)
    if program is None:
        raise HostRefused(
            f"{service.name}: {service.argv[0]} is not installed on this host", hint=f"install {service.argv[0]}"
        )
    log = os.open(directory / _LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with inside(namespace):
            process = subprocess.Popen(
                [program, *service.argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": PATH, "LANG": "C"},
                start_new_session=True,
            )
    finally:
        os.close(log)
    # Watched through its pidfd and reaped there: Popen's own book-keeping would warn about a child it lost.
    process.returncode = 0
    return process.pid


def _unnoted(namespace: str, service: Service) -> set[int]:
    """The groups of processes of the service that run in the namespace, though no record tells of them.

    An agent that was killed right after it had started one left it there; it has the port, or a share of it.
    """
    here, groups = identity(namespace), set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
            if words[1:] == list(service.argv[1:]) and _namespace_of(pid) == here:
                groups.add(os.getpgid(pid))
    return groups


def run(namespace: str | None, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """What a program that soon ends says, on both streams. Raises HostRefused when it is missing or does not end."""
    program = shutil.which(argv[0], path=PATH)
    if program is None:
        raise HostRefused(f"{argv[0]} is not installed on this host", hint=f"install {argv[0]}")
    with inside(namespace):
        try:
            return subprocess.run(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": PATH, "LANG": "C"},
                text=True,
                errors="replace",
                timeout=RUN_S_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HostRefused(f"{argv[0]} {argv[1]} was ended: not done in {RUN_S_MAX:.0f} s") from None


def _wait_ready(pid: int, directory: Path, service: Service) -> None:
    """Until it listens on all that it should, or has ended. Raises HostRefused with its last words."""
    until = time.monotonic() + READY_S
    while True:
        if _start_time(pid) is None:
            raise HostRefused(f"{service.name} ended at once: {_last_words(service)}")
        if _listening(pid) >= set(service.listens):
            return
        if time.monotonic() > until:
            raise HostRefused(f"{service.name} does not listen after {READY_S:.0f} s: {_last_words(service)}")
        time.sleep(0.005)


def _reload(pid: int, service: Service) -> None:
    """Has the master read its configuration; returns when nobody answers by the old one any more.

    Until then a worker of the old one takes new clients, too. Those that it has are served to their end.
    Raises HostRefused with its last words when no new worker takes over.
    """
    old = set(_group(pid)) - {pid}
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    _wake(service)  # guard: a-sleeping-master-is-woken
    until = time.monotonic() + TAKEN_OVER_S
    while time.monotonic() < until and _start_time(pid) is not None:
        workers = set(_group(pid)) - {pid}
        new = any(_listening(pid, [it]) >= set(service.listens) for it in workers - old)
        if new and not _listening(pid, workers & old):
            return
        time.sleep(0.01)
    raise HostRefused(f"{service.name} goes on with its old configuration: {_last_words(service)}")


def _wake(service: Service) -> None:
    """Has the master look at the signals that it got.

    One that comes between its last look and its wait for events is found with the next event, which may be long in
    coming (tried with haproxy 2.6, 2026-11: one reload in some hundred, when an old worker ended at that moment).
    """
    if service.probe is not None:
        with socket.socket(socket.AF_UNIX) as master, contextlib.suppress(OSError):  # its socket was taken away
            master.settimeout(1.0)
            master.connect(service.probe.at)


def _listening(pid: int, members: Iterable[int] | None = None) -> set[tuple[str, int]]:
    """Protocol and port on which the process, or one of its group, waits for peers (proc(5), /proc/<pid>/net/tcp).

    The table lists every socket of the namespace: those of others, an older process's for one, do not count.
    """
    own = {inode for member in (_group(pid) if members is None else members) for inode in _sockets(member)}
    found = set()
    for protocol, state in (("tcp", "0A"), ("udp", "07")):
        with contextlib.suppress(OSError):
            for fields in map(str.split, Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]):
                if fields[3] == state and fields[9] in own:
                    found.add((protocol, int(fields[1].rpartition(":")[2], 16)))
    return found


def _sockets(pid: int) -> set[str]:
    """The inode numbers of the process's sockets."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found


def _start_time(pid: int) -> int | None:
    """Field 22 of its stat; None when there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _namespace_of(pid: int) -> int:
    """The inode of the network namespace that the process is in; 0 when it has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def record_of(pid: int, digest: str = "") -> Record:
    """What is to be noted of a process that runs."""
    return Record(pid, _start_time(pid) or 0, digest)


def alive(record: Record) -> bool:
    """Whether it is that very process that has the number."""
    return _start_time(record.pid) == record.started  # guard: a-recycled-pid-is-another-process


def _terminate(pid: int) -> None:
    """SIGTERM, then SIGKILL to its whole group; returns when all of it has ended.

    The group, and not its leader alone: an old haproxy worker keeps its sockets until its connections have ended.
    """
    for number, wait_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            if _start_time(pid) is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                if not _group(pid):
                    return
            time.sleep(0.005)


def _group(leader: int) -> list[int]:
    """The processes of the group that run (proc(5), /proc/<pid>/stat: field 3 is the state, 5 the group)."""
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX" and int(fields[2]) == leader:
                    members.append(int(name))
    return members


def _reap(pid: int) -> None:
    """Our own child's remains; an adopted process has another parent."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _last_words(service: Service) -> str:
    try:
        text = (Path(service.directory) / _LOG).read_text(errors="replace")
    except OSError:
        return "it said nothing"
    return one_line(text, 400) or "it said nothing"
