"""Keep the processes that the scopes want running: start, reload, restart after a crash, stop.

The processes outlive the agent: each leads a session of its own, and its directory has a record of it
(``running.json``). The next agent adopts the processes that it finds recorded there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from netloom.agent.backoff import Backoff
from netloom.agent.environment import PATH
from netloom.agent.kernel.descriptors import high
from netloom.agent.kernel.namespaces import identity
from netloom.agent.processes import denials, files
from netloom.agent.processes.failures import ServiceFailure, ServicesFailed, refusal
from netloom.agent.processes.process import (
    Record,
    alive,
    group,
    groups_with_arguments,
    has_capabilities,
    listening,
    namespace_of,
    read_record,
    reap,
    record_of,
    socket_inside,
    start,
    start_time,
    terminate,
    user_of,
    write_record,
)
from netloom.errors import HostRefused
from netloom.render.service import Probe, Service, directory_of
from netloom.state.served import Served

BACKOFF = Backoff((0.1, 0.3, 1.0, 3.0, 10.0, 30.0), settled_s=60.0)
READY_S_MAX = 10.0  # netloom confine takes a moment before it executes the program
RELOAD_S_MAX = 10.0
# After a reload the old workers of haproxy keep their connections. So many of them may remain.
OLD_WORKERS_MAX = 8

_Key = tuple[str, str]  # scope id, name of the service


class ProbeTarget(NamedTuple):
    """A running process, and how to probe it."""

    scope_id: str
    namespace: str
    name: str
    record: Record
    probe: Probe


class _Running:
    """A process that was alive when we last looked. Its pidfd becomes readable when it ends (pidfd_open(2))."""

    def __init__(self, scope_id: str, namespace: str, service: Service, record: Record, pidfd: int) -> None:
        self.scope_id = scope_id
        self.namespace = namespace
        self.service = service
        self.record = record
        self.pidfd = pidfd  # -1: closed
        self.since = time.monotonic()
        self.hung = False  # we killed it because it did not answer


class _NotReady(HostRefused):
    """A process that was started with its present configuration does not answer."""


class Supervisor:
    """The processes of all scopes.

    ``converge`` and ``stop`` block, so worker threads call them; for one scope, one thread at a time.
    ``revive`` is called on the event loop some time after a process died, with the id of its scope and a sentence for
    the log. It has to converge the scope.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, revive: Callable[[str, str], None]) -> None:
        self._loop = loop
        self._revive = revive
        self._lock = threading.Lock()
        self._running: OrderedDict[_Key, _Running] = OrderedDict()  # whose turn it is first
        self._failures: dict[_Key, int] = {}  # in a row
        self._failed: dict[_Key, ServiceFailure] = {}  # the services that failed when they were last converged
        self._crashes: dict[_Key, int] = {}  # in all
        files.make_services_directory()

    def converge(
        self, scope_id: str, namespace: str, wanted: tuple[Service, ...], asked: frozenset[Served] | None = None
    ) -> list[str]:
        """Have the services ``wanted``, and no others, run in ``namespace``; the steps in words.

        ``asked``: what the caller waits for; None: everything. A service that failed before and is not asked for is
        not tried again now, because that may take ten seconds.
        Raises ServicesFailed when services do not start or refuse their configuration. The old process of such a
        service keeps running, and the other services are converged first.
        """
        did: list[str] = []
        names = {service.name for service in wanted}
        for name in self._known(scope_id) - names:
            did += self._stop(scope_id, name)
        failed: list[ServiceFailure] = []
        for service in wanted:
            key = (scope_id, service.name)
            earlier = self._failed.get(key)
            if earlier is not None and asked is not None and not service.serves & asked:
                failed.append(earlier)  # guard: a-call-does-not-wait-for-other-services
                continue
            try:
                did += self._converge_service(scope_id, namespace, service)
            except (HostRefused, OSError) as error:
                failed.append(self._failure(key, service, refusal(service.name, error)))
                self._failed[key] = failed[-1]
            else:
                self._failed.pop(key, None)
        if failed:
            raise ServicesFailed(failed, did)
        return did

    def _failure(self, key: _Key, service: Service, error: HostRefused) -> ServiceFailure:
        running = self._running.get(key)
        stale = running is not None and alive(running.record) and not isinstance(error, _NotReady)
        return ServiceFailure(
            name=service.name,
            message=error.message,
            hint=error.hint,
            serves=service.serves,
            network_id=service.network_id,
            stale=stale,
        )

    def stop(self, scope_id: str) -> list[str]:
        """Stop all processes of the scope and remove their directories; the steps in words."""
        did = [  # guard: the-end-is-of-one-scope
            step for name in self._known(scope_id) for step in self._stop(scope_id, name)
        ]
        files.remove_scope(scope_id)
        return did

    def renew(self, scope_id: str) -> None:
        """Have the next ``converge`` reload or restart every process of the scope, also if nothing has changed."""
        with self._lock:
            for (scope, _), running in self._running.items():
                if scope == scope_id:
                    running.record = _without_digest(running.record)

    def scopes(self) -> set[str]:
        """The scopes that have processes, or had some when an earlier agent ran."""
        with self._lock:
            known = {scope_id for scope_id, _ in self._running}
        return known | files.scopes()

    def states(self) -> dict[str, dict[str, int]]:
        """Scope to name of the service to pid, for all processes that were alive when we last looked."""
        with self._lock:
            table: dict[str, dict[str, int]] = {}
            for (scope_id, name), running in sorted(self._running.items()):
                table.setdefault(scope_id, {})[name] = running.record.pid
            return table

    def runs_all(self, scope_id: str, names: Collection[str]) -> bool:
        """Whether these services of the scope ran when we last looked, each with its last configuration."""
        with self._lock:
            running = [self._running.get((scope_id, name)) for name in names]
        return all(it is not None and it.record.digest for it in running)

    def privileged(self, scope_id: str) -> list[str]:
        """The services of the scope whose processes have capabilities that they should only be told to have."""
        with self._lock:
            running = [(name, it) for (scope, name), it in sorted(self._running.items()) if scope == scope_id]
        return [name for name, it in running if has_capabilities(it.record.pid, it.service.demanded)]

    def crashes(self, scope_id: str) -> dict[str, int]:
        """Name of the service to how often its process died, or hung and was killed, since this agent knows it."""
        with self._lock:
            return {name: count for (scope, name), count in self._crashes.items() if scope == scope_id}

    def user(self, scope_id: str, name: str) -> int:
        """The user of the service's process, or with which it would be started; 0 if that is not known yet."""
        with self._lock:
            running = self._running.get((scope_id, name))
        record = running.record if running is not None else read_record(files.record_path(directory_of(scope_id, name)))
        if record is not None and alive(record):
            return max(user_of(record.pid), 0)
        return files.user_of_scope(scope_id) or 0

    def bound_logs(self) -> None:
        """Shorten the logs that are too long."""
        with self._lock:
            services = [it.service for it in self._running.values()]
        for service in services:
            files.bound_log(files.log_path(service))

    def next_probe_target(self) -> ProbeTarget | None:
        """The running process whose turn it is: each has one, and then all others. None if it cannot be probed."""
        with self._lock:
            it = next(iter(self._running.values()), None)
            if it is None:
                return None
            self._running.move_to_end((it.scope_id, it.service.name))  # guard: each-process-is-probed-in-turn
            if it.service.probe is None:
                return None
            return ProbeTarget(it.scope_id, it.namespace, it.service.name, it.record, it.service.probe)

    @property
    def number(self) -> int:
        """The number of the running processes."""
        return len(self._running)

    def kill_hung(self, target: ProbeTarget) -> bool:
        """Kill the whole group of a process that does not answer. It is revived as after a crash.

        Return False if the process has ended already, or another one has taken its place.
        """
        with self._lock:
            running = self._running.get((target.scope_id, target.name))
            if running is None or running.record.pid != target.record.pid or not alive(running.record):
                return False
            running.hung = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(target.record.pid, signal.SIGKILL)
        return True

    # ------------------------------------------------------------------------------------------------ one service

    def _converge_service(self, scope_id: str, namespace: str, service: Service) -> list[str]:
        user = files.make_directory(service)
        running = self._find(scope_id, namespace, service)
        if running is not None and files.misses_changes(service):
            # Without a digest it will be restarted, also by the next agent if we are killed after changing the files.
            running = self._remember(scope_id, namespace, service, _without_digest(running.record))
        did = files.write_watched_files(service, user)
        digest = files.digest(service)
        # If the namespace was deleted and created again under its name, a process in the old one gets no packets.
        in_place = running is not None and namespace_of(running.record.pid) == identity(namespace)
        # Earlier versions started the processes as root. Such a process is replaced.
        confined = running is not None and user_of(running.record.pid) == user
        if running is not None and in_place and confined and running.record.digest == digest:
            if (scope_id, service.name) in self._failed:
                _wait_ready(running.record.pid, service, within_s=0.0)
            return did
        had_configuration = files.has_configuration(service)
        files.replace_configuration(namespace, service, user)
        if running is not None and in_place and confined and service.on_change == "reload":
            _reload(running.record.pid, service)  # guard: a-reload-waits-for-the-new-worker
            record = msgspec.structs.replace(running.record, digest=digest)
            self._remember(scope_id, namespace, service, record)
            return [*did, f"reload {service.name}"]
        if running is not None:
            if in_place and service.on_change == "reload":
                self._drain(running)  # guard: connections-outlive-the-upgrade
            did += self._stop(scope_id, service.name, keep_directory=True)
        elif had_configuration:
            # An agent that was killed right after it had started the process has not recorded it. Such a process would
            # keep the port, or get a share of the connections.
            for leader in groups_with_arguments(service.argv[1:], identity(namespace)):
                terminate(leader)
        pid = start(service, namespace, user, files.log_path(service))
        self._remember(scope_id, namespace, service, record_of(pid, digest))
        _wait_ready(pid, service)
        return [*did, f"start {service.name}"]

    def _find(self, scope_id: str, namespace: str, service: Service) -> _Running | None:
        """The service's process, if it is alive: one that we know, or one that is recorded in the directory."""
        key = (scope_id, service.name)
        with self._lock:
            running = self._running.get(key)
        if running is not None:
            return running if alive(running.record) else None
        record = read_record(files.record_path(service.directory))
        if record is None or not alive(record):
            return None
        return self._remember(scope_id, namespace, service, record)

    def _remember(self, scope_id: str, namespace: str, service: Service, record: Record) -> _Running:
        """Record the process in its directory, and watch it."""
        write_record(files.record_path(service.directory), record)
        key = (scope_id, service.name)
        with self._lock:
            had = self._running.get(key)
            if had is not None and had.record.pid == record.pid and had.record.started == record.started:
                had.record, had.service, had.namespace = record, service, namespace
                return had
        try:
            pidfd = high(os.pidfd_open(record.pid))
        except ProcessLookupError:
            raise HostRefused(f"{service.name} of {scope_id} ended immediately: {files.last_output(service)}") from None
        running = _Running(scope_id, namespace, service, record, pidfd)
        with self._lock:
            self._running[key] = running
        self._loop.call_soon_threadsafe(self._watch, key, running)
        return running

    def _drain(self, running: _Running) -> None:
        """Have a haproxy of an earlier version end when its connections have ended; forget it once it stops listening.

        SIGUSR1 is the soft stop (haproxy management guide, section 4). Connections that it has are kept; for a moment
        nothing listens. Without an effect the caller stops it at once.
        """
        pid, until = running.record.pid, time.monotonic() + RELOAD_S_MAX
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        while start_time(pid) is not None and listening(pid):
            if time.monotonic() > until:
                return
            time.sleep(0.005)
        with self._lock:
            self._running.pop((running.scope_id, running.service.name), None)
        write_record(files.draining_path(running.service.directory), running.record)
        files.remove_sockets(running.service)
        files.record_path(running.service.directory).unlink(missing_ok=True)
        self._loop.call_soon_threadsafe(self._release, running)

    def _stop(self, scope_id: str, name: str, *, keep_directory: bool = False) -> list[str]:
        key = (scope_id, name)
        directory = directory_of(scope_id, name)
        with self._lock:
            running = self._running.pop(key, None)
            self._failures.pop(key, None)
            if not keep_directory:
                self._crashes.pop(key, None)
                self._failed.pop(key, None)
        record = running.record if running is not None else read_record(files.record_path(directory))
        did = []
        draining = None if keep_directory else read_record(files.draining_path(directory))
        if draining is not None and alive(draining):
            terminate(draining.pid)
        if record is not None and alive(record):
            terminate(record.pid)
            did = [f"stop {name}"]
        if running is not None:
            self._loop.call_soon_threadsafe(self._release, running)
        if not keep_directory:
            shutil.rmtree(directory, ignore_errors=True)
        return did

    def _known(self, scope_id: str) -> set[str]:
        """The names of all services of the scope: those that run, and those that have a directory."""
        with self._lock:
            known = {name for scope, name in self._running if scope == scope_id}
        return known | files.services(scope_id)

    # ------------------------------------------------------------------------------------------- on the event loop

    def _watch(self, key: _Key, running: _Running) -> None:
        if self._running.get(key) is running and running.pidfd >= 0:
            self._loop.add_reader(running.pidfd, self._has_ended, key, running)

    def _has_ended(self, key: _Key, running: _Running) -> None:
        """Have a process revived that has ended by itself."""
        self._release(running)
        with self._lock:
            if self._running.get(key) is not running:
                return  # we stopped it
            del self._running[key]
            failures = BACKOFF.earlier(self._failures.get(key, 0), ran_s=time.monotonic() - running.since)
            self._failures[key] = failures + 1
            self._crashes[key] = self._crashes.get(key, 0) + 1
        why = f"{running.service.name} {'hung' if running.hung else 'died'}"
        self._loop.call_later(BACKOFF.delay_s(failures), self._revive, running.scope_id, why)

    def _release(self, running: _Running) -> None:
        """Stop watching an ended process and reap it. Called twice when it dies while we stop it."""
        if running.pidfd >= 0:
            self._loop.remove_reader(running.pidfd)
            os.close(running.pidfd)
            running.pidfd = -1
            reap(running.record.pid)


def _without_digest(record: Record) -> Record:
    return msgspec.structs.replace(record, digest="")


def _wait_ready(pid: int, service: Service, within_s: float = READY_S_MAX) -> None:
    """Wait until the process listens on all its ports.

    Raises HostRefused with its output when it ends, or takes longer than ``within_s``.
    """
    until = time.monotonic() + within_s
    while True:
        if start_time(pid) is None:
            raise _not_ready(pid, service, "ended immediately")
        if listening(pid, among=service.listens) >= set(service.listens):
            return
        if time.monotonic() > until:
            raise _not_ready(pid, service, "does not listen")
        time.sleep(0.005)


def _not_ready(pid: int, service: Service, what: str) -> _NotReady:
    output = files.last_output(service)
    denial = denials.find(shutil.which(service.argv[0], path=PATH) or service.argv[0], pid, output)
    if denial is None:
        return _NotReady(f"{service.name} {what}: {output}")
    return _NotReady(f"{service.name} {what}: {output}; {denial.says}", hint=denial.remedy)


def _reload(pid: int, service: Service) -> None:
    """Have the master of haproxy load its new configuration; wait until no worker accepts clients by the old one.

    An old worker accepts new clients until it stops listening. Connections that it already has are kept.
    Raises HostRefused with the output when no new worker takes over within ``RELOAD_S_MAX``.
    """
    old = set(group(pid)) - {pid}
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    _wake(pid, service)  # guard: a-sleeping-master-is-woken
    until = time.monotonic() + RELOAD_S_MAX
    while time.monotonic() < until and start_time(pid) is not None:
        workers = set(group(pid)) - {pid}
        new = any(listening(pid, [it]) >= set(service.listens) for it in workers - old)
        if new and not listening(pid, workers & old):
            _end_oldest(workers & old)  # guard: old-workers-are-bounded
            return
        time.sleep(0.01)
    raise HostRefused(f"{service.name} keeps its old configuration: {files.last_output(service)}")


def _end_oldest(old: set[int]) -> None:
    """End the oldest of the old workers, and their connections, until ``OLD_WORKERS_MAX`` remain.

    A worker without connections ends by itself. So a connection stays for as long as at most ``OLD_WORKERS_MAX``
    workers are in use, however many changes there are.
    """
    started = {worker: start_time(worker) for worker in old}
    by_age = sorted((at, worker) for worker, at in started.items() if at is not None)
    for _, worker in by_age[: max(len(by_age) - OLD_WORKERS_MAX, 0)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)


def _wake(pid: int, service: Service) -> None:
    """Send the master an event, so that it handles the signals that it has received.

    A signal that arrives just before the master waits for events is handled only after the next event, which may take
    long (observed with haproxy 2.6, 2026-11: about one reload in a hundred, when an old worker ended at that moment).
    """
    if service.probe is not None:
        with socket.socket(socket.AF_UNIX) as master, contextlib.suppress(OSError):  # its socket may be gone
            master.settimeout(1.0)
            with socket_inside(pid, service.probe.at) as path:
                master.connect(path)
