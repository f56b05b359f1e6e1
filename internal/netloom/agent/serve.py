"""``netloom agent serve``: the one long-running process of a host, behind a socket that only root may use.

``_serve`` creates these objects. An arrow means "calls":

::

   _Peer --> _Calls --> Scopes --> Host, Services, Watcher, Store, Actions
                          ^ |
     converge of a scope  | |  work_failed, work_succeeded
                          | v
                        Upkeep <-- Events <-- Watcher        repair, busy, tidy_soon, firewall_changed
                                          <-- Supervisor     revive
                                          <-- GuestProcess   password_taken

For example, when dnsmasq dies: ``Supervisor`` notices it and calls ``revive``; ``Upkeep`` converges the scope by
``Scopes.converge``; this calls ``Services.converge``, which has ``Supervisor`` start dnsmasq again.

``Heartbeat`` tells systemd that calls are answered, and aborts an agent whose worker threads hang.

``Upkeep`` needs all the others, and some of them need a handler for their events from the start. ``Events`` closes this
ring: it is created first, and passes on to ``Upkeep`` once that exists. ARCHITECTURE.md shows the objects below
``Services``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import fcntl
import logging
import os
import resource
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from netloom import __version__, placementwire, standbywire
from netloom.agent import exhausted, heap
from netloom.agent.actions.builtin import Actions
from netloom.agent.budget import Budget
from netloom.agent.clock import Clock, LoopClock
from netloom.agent.connect import SOCKET
from netloom.agent.heartbeat import Heartbeat, notify, ready
from netloom.agent.host.converge import KernelHost
from netloom.agent.host.lease import Leases
from netloom.agent.host.outside import Outside
from netloom.agent.host.watcher import Watcher
from netloom.agent.kernel.claims_socket import ClaimSockets
from netloom.agent.kernel.conntrack_copy import Record
from netloom.agent.kernel.keeper import Keeper, start_keeper
from netloom.agent.log import Log, complain
from netloom.agent.processes.guest_process import GuestProcess
from netloom.agent.processes.guests import Guests
from netloom.agent.processes.liveness import EVERY_S as PROBE_EVERY_S
from netloom.agent.processes.liveness import PROBE_CPU_S, LivenessProbes
from netloom.agent.processes.services import Services
from netloom.agent.processes.supervisor import Supervisor
from netloom.agent.scopes.claims import LOOK_CPU_S, LOOK_EVERY_S, Claims
from netloom.agent.scopes.events import Events
from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.isolation import Isolation
from netloom.agent.scopes.moves import Moves
from netloom.agent.scopes.roles import Roles
from netloom.agent.scopes.scopes import Scopes, start_workers
from netloom.agent.scopes.standby import Standbys
from netloom.agent.scopes.store import Store
from netloom.agent.scopes.upkeep import (
    CHECK_CPU_S,
    CHECK_EVERY_S,
    COUNT_CPU_S,
    COUNTS_PER_CHECK,
    TIDY_CPU_S,
    TIDY_EVERY_S,
    Upkeep,
)
from netloom.agent.setup.install import held, wait_for_selftest
from netloom.agent.standby.engine import Engine
from netloom.agent.standby.flows import FlowSink, FlowSource
from netloom.agent.standby.pair import Pairs
from netloom.errors import HostRefused, NetloomError
from netloom.program import build_id, command
from netloom.sockets import peer_credentials
from netloom.wire import PROTOCOL_VERSION, Call, FrameReader, Hello, Message, Reply, encode

STATE_DIR = "/var/lib/netloom/scopes"
BUILD = build_id()
SPOKEN = Hello(version=__version__, build=BUILD)  # the protocols; ``held`` is read at each greeting, not at each call

REMEMBERED_MAX = 512  # replies, for callers whose connection broke before the reply came
STOP_S_MAX = 5.0
PREPARE_S_MAX = 20.0
REPORT_EVERY_S = 60.0
RESTORING_MAX = 20  # scopes that a Hello names


def serve(
    socket_path: str = SOCKET,
    state_dir: str = STATE_DIR,
    log_path: str = "",
    check_every_s: float = CHECK_EVERY_S,
) -> int:
    """Serve until SIGTERM or SIGINT. Exit status 0; 1 without root; 3 if another agent serves, or the host forbids it.

    ``log_path`` empty: log to stderr. ``check_every_s``: seconds between two checks of the same scope, if the budget
    suffices.
    """
    os.umask(0o077)  # guard: agent-creates-private-files
    if os.geteuid() != 0:
        complain("serve needs root")
        return 1
    _raise_descriptor_limit()
    keeper = start_keeper()
    try:
        log = Log(log_path)
    except OSError as error:
        complain(str(error))
        return 3
    try:
        lock = _lock(socket_path)
        wait_for_selftest()
        store = Store(state_dir)
    except (OSError, NetloomError) as error:
        log.fatal("not serving", error)
        return 3
    _trace_aborts()
    end_with_any_thread()
    try:
        asyncio.run(_serve(socket_path, store, log, check_every_s, keeper))
    except (OSError, NetloomError) as error:
        log.fatal("serve failed", error)
        return 3
    finally:
        os.close(lock)
    # Do not wait for a worker thread that hangs in the kernel.
    os._exit(0)


async def _serve(path: str, store: Store, log: Log, check_every_s: float, keeper: Keeper) -> None:
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop)
    loop.set_exception_handler(LoopErrors(log, clock))
    heap.share_one_arena()
    workers = start_workers()
    events = Events()
    host = KernelHost(store.directory.parent)
    engine = Engine(store.directory.parent, log, events.turn_changed, Leases())
    engine.start()  # first: the lease of an earlier agent runs out within a second
    roles = Roles(engine.views)
    guest_process = GuestProcess(loop, log, [*command(), "guest"], BUILD, events.password_taken)
    supervisor = Supervisor(loop, events.revive)
    services = Services(Guests(loop, guest_process), supervisor, log)
    outside = Outside(host.placed)
    watcher = Watcher(
        loop, clock, log, events, host.orphaned, partial(_keep_closed, host, outside), events.uplink_changed
    )
    host.unexpected = watcher.unexpected
    actions = Actions(host, store.directory.parent / "hooks")
    scopes = Scopes(store, host, services, watcher, actions, events, log, clock, workers, roles)
    upkeep = Upkeep(scopes, host, services, watcher, log, clock)
    moves = Moves(scopes, upkeep, host, store, log, clock)
    isolation = Isolation(scopes, upkeep, outside, log, clock)
    flows = FlowCopies(loop, log, upkeep.start_task, partial(_started_source, log), partial(_started_sink, log))
    standbys = Standbys(loop, engine, roles, scopes, upkeep, host, services, store, log, clock, flows)
    pairs = Pairs(loop, log, standbys)
    store.on_saved, store.on_retired = standbys.saved, standbys.retired
    events.connect(upkeep, isolation, standbys)
    scopes.load()
    moves.resume()
    standbys.connect(pairs)
    prepared = asyncio.Event()
    claims = Claims(scopes, upkeep, host, log, clock, partial(ClaimSockets, loop, keeper=keeper))
    calls = _Calls(scopes, moves, standbys, claims, prepared)
    stop = asyncio.Event()
    # Before the socket exists: a program that finds it may send them at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = await loop.create_unix_server(lambda: _Peer(calls, log, partial(_hello, upkeep)), path=path, backlog=128)
    os.chmod(path, 0o600)
    log.line(f"serving: version={__version__} build={BUILD} pid={os.getpid()} socket={path}")
    status = partial(_status, scopes, upkeep)
    adopting = asyncio.ensure_future(_adopt(guest_process, log))
    restore = partial(_restore, upkeep, adopting, prepared, status)
    restoring = asyncio.ensure_future(restore())  # guard: the-agent-restores-at-its-start
    heartbeat = Heartbeat(
        clock,
        log,
        partial(_greeted, path),
        partial(scopes.in_worker_uncounted, host.await_shared_links),
        lambda: scopes.work_done,
        status,
        notify,
    )
    probes = LivenessProbes(loop, log, supervisor, guest_process, scopes.busy)
    budget = Budget()
    loops = [
        asyncio.ensure_future(upkeep.keep_tidy(budget.checks(TIDY_EVERY_S, TIDY_CPU_S))),
        asyncio.ensure_future(upkeep.keep_checked(budget.checks(check_every_s, CHECK_CPU_S))),
        asyncio.ensure_future(upkeep.keep_counted(budget.checks(check_every_s / COUNTS_PER_CHECK, COUNT_CPU_S))),
        asyncio.ensure_future(probes.run(budget.checks(PROBE_EVERY_S, PROBE_CPU_S))),
        asyncio.ensure_future(_beat(heartbeat, prepared)),
        asyncio.ensure_future(isolation.run()),
        asyncio.ensure_future(claims.run(budget.checks(LOOK_EVERY_S, LOOK_CPU_S))),
        asyncio.ensure_future(standbys.run()),
        asyncio.ensure_future(
            heap.keep_trimmed(clock, lambda: scopes.work_done, partial(scopes.in_worker_uncounted, heap.trim))
        ),
    ]
    restoring.add_done_callback(lambda task: _restored(task, log))
    await stop.wait()
    server.close()
    with contextlib.suppress(OSError):
        os.unlink(path)
    watcher.stop()
    for task in (restoring, *loops):
        task.cancel()
    pairs.close()
    await calls.finish(STOP_S_MAX)
    await upkeep.stop(STOP_S_MAX)
    engine.stop()
    workers.shutdown(wait=False, cancel_futures=True)
    guest_process.stop()
    log.line("stopped; what runs keeps running")


def _started_source(
    log: Log, changed: Callable[[str, list[Record], list[Record]], None], gap: Callable[[frozenset[str]], None]
) -> FlowSource:
    source = FlowSource(log, changed, gap)
    source.start()
    return source


def _started_sink(log: Log, lost: Callable[[str], None]) -> FlowSink:
    sink = FlowSink(log, lost)
    sink.start()
    return sink


def _keep_closed(host: KernelHost, outside: Outside) -> None:
    """Close the gates and fence the uplinks that have to be: somebody changed our tables. Raises HostRefused."""
    host.keep_gates_closed()
    outside.keep_fenced()


class LoopErrors:
    """Logs what the event loop reports, each message at most once in REPORT_EVERY_S seconds.

    Without descriptors, for example, it reports 128 connections a second that it cannot accept, with a traceback each.
    asyncio's own handler writes to stderr, which may be the log without its bound.
    """

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._reported: dict[str, float] = {}

    def __call__(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error, message, now = context.get("exception"), str(context["message"]), self._clock.time()
        if now - self._reported.get(message, -REPORT_EVERY_S) < REPORT_EVERY_S:
            return  # guard: the-loop-reports-an-error-once
        self._reported[message] = now
        refused = exhausted.refusal(error, message) if error is not None else None
        if error is None or refused is not None:
            self._log.line(f"event loop: {refused or message}")
        else:
            self._log.traceback(f"event loop: {message}", error)


async def _adopt(guest_process: GuestProcess, log: Log) -> None:
    try:
        await guest_process.adopt()
    except NetloomError as error:
        log.line(f"guest process: {error}")


async def _restore(
    upkeep: Upkeep, adopting: asyncio.Future[None], prepared: asyncio.Event, status: Callable[[], str]
) -> None:
    """Prepare the host, let the calls begin, and restore the scopes. A call restores its own scope first.

    Calls do not wait for a preparation that hangs, for example because another process holds the lock of /run/netns.
    """
    preparing = asyncio.ensure_future(upkeep.prepare())
    await asyncio.wait([preparing], timeout=PREPARE_S_MAX)
    await adopting
    prepared.set()
    notify(f"{ready(os.environ.get('WATCHDOG_USEC', ''))}\nSTATUS={status()}")
    await preparing
    await upkeep.restore()
    notify(f"STATUS={status()}")


async def _beat(heartbeat: Heartbeat, prepared: asyncio.Event) -> None:
    await prepared.wait()
    await heartbeat.run()


def _restored(task: asyncio.Future[None], log: Log) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.traceback("restore", error)
        return
    log.line("restored")


def _status(scopes: Scopes, upkeep: Upkeep) -> str:
    """One line for ``systemctl status``."""
    networks = sum(slot.scope is not None for slot in scopes.slots())
    missing = upkeep.missing()
    done = f"{networks} networks"
    if missing:
        failed = next((f"; {it}" for it in missing if it.endswith(")")), "")
        done = f"restoring: {networks - len(missing)} of {networks} networks done{failed}"
    for gate, what in (("passive", "passive"), ("standby", "on standby")):
        count = sum(slot.gate == gate for slot in scopes.slots())
        done += f", {count} of them {what}" if count else ""
    return done


async def _greeted(path: str) -> None:
    """Connect to our own socket, and return when the agent has spoken. Raises OSError."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        if not await reader.read(1):
            raise ConnectionResetError("the connection was closed")
    finally:
        writer.transport.abort()


class _Calls:
    """The running calls and the last replies. A call that is repeated gets the same reply and is not executed twice."""

    def __init__(
        self, scopes: Scopes, moves: Moves, standbys: Standbys, claims: Claims, prepared: asyncio.Event
    ) -> None:
        self._scopes = scopes
        self._moves = moves
        self._standbys = standbys
        self._claims = claims
        self._prepared = prepared  # until then a call waits
        self._running: dict[str, asyncio.Task[Reply]] = {}
        self._replies: OrderedDict[str, Reply] = OrderedDict()

    async def answer(self, call: Call) -> Reply:
        """Execute the call, or join its execution, and return the reply."""
        if call.call_id in self._replies:
            return self._replies[call.call_id]
        task = self._running.get(call.call_id)
        if task is None:
            task = asyncio.ensure_future(self._execute(call))
            self._running[call.call_id] = task
            task.add_done_callback(lambda done: self._remember(call.call_id, done))
        # Shielded: the call is completed even if its connection breaks.
        return await asyncio.shield(task)

    async def _execute(self, call: Call) -> Reply:
        await self._prepared.wait()
        await self._claims.learn(call)
        if call.command in standbywire.COMMANDS:
            return await self._standbys.execute(call)
        return await (self._moves if call.command in placementwire.COMMANDS else self._scopes).execute(call)

    async def finish(self, wait_s: float) -> None:
        """Wait for the running calls, at most ``wait_s`` seconds."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=wait_s)

    def _remember(self, call_id: str, done: asyncio.Task[Reply]) -> None:
        self._running.pop(call_id, None)
        if not done.cancelled() and done.exception() is None:
            reply = done.result()
            if reply.elsewhere:  # guard: a-call-may-come-back-after-a-move
                return
            self._replies[call_id] = reply
            while len(self._replies) > REMEMBERED_MAX:
                self._replies.popitem(last=False)


class _Peer(asyncio.Protocol):
    """One connection, from a relay or another process of root. Many calls at once, each answered when it is done."""

    def __init__(self, calls: _Calls, log: Log, hello: Callable[[], Hello]) -> None:
        self._calls = calls
        self._hello = hello
        self._log = log
        self._reader = FrameReader()
        self._caller: Hello | None = None
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        uid = peer_credentials(transport.get_extra_info("socket")).uid
        if uid != 0:
            self._log.line(f"refused a connection of uid {uid}")
            transport.abort()
            return
        self._transport = transport
        transport.write(encode(self._hello()))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        try:
            messages = self._reader.feed(data)
        except HostRefused as error:
            self._log.line(f"connection dropped: {error}")
            self._transport.abort()
            return
        for message in messages:
            self._receive(message)

    def _receive(self, message: Message) -> None:
        match message:
            case Hello():
                self._caller = message
            case Call():
                task = asyncio.ensure_future(self._answer(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Reply():
                self._log.line("a reply came where calls are expected; ignored")

    async def _answer(self, call: Call) -> None:
        if self._caller is not None and not self._caller.understands(SPOKEN):
            reply = Reply(
                call_id=call.call_id,
                status=3,
                error=f"the agent speaks protocol {PROTOCOL_VERSION}, the caller {self._caller.protocol}",
                hint="update the older of the two",
            )
        else:
            reply = await self._calls.answer(call)
        if self._transport is not None:
            self._transport.write(encode(reply))


def _hello(upkeep: Upkeep) -> Hello:
    missing = upkeep.missing()
    return Hello(
        version=__version__, build=BUILD, held=held(), unrestored=len(missing), restoring=tuple(missing[:RESTORING_MAX])
    )


def _lock(path: str) -> int:
    """Take the lock of the agent that serves the socket ``path``; it is held until the process ends.

    The file is never removed: otherwise two agents could lock two files of the same name.
    Raises HostRefused or OSError.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    os.chmod(directory, 0o711)  # dnsmasq reads its files below it as another user; the sockets belong to root
    fd = os.open(os.path.join(directory, "agent.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EWOULDBLOCK:
            raise HostRefused(f"another agent serves {path}") from None
        raise
    return fd


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as possible: libnftables ends the process when it cannot open one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_with_any_thread() -> None:
    """End the agent when one of its threads ends by an exception, as it may without memory.

    The call that this thread worked on would never be answered, and its scope never be free. Systemd or the next call
    starts the agent again.
    """

    threading.excepthook = _end  # guard: an-agent-that-lost-a-thread-ends
    # A worker of concurrent.futures reports the exception that ends it, and no other of this level, to its logger.
    logging.getLogger("concurrent.futures").addHandler(  # guard: an-agent-that-lost-a-worker-ends
        _Ending(logging.CRITICAL)
    )


def _end(_: object) -> None:
    os.write(2, b"netloom agent: a thread ended by an exception, so the agent ends; is there too little memory?\n")
    os._exit(3)


class _Ending(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _end(record)


def _trace_aborts() -> None:
    """Write the stacks of all threads to stderr on SIGABRT, which ends an agent that hangs, and on SIGSEGV.

    The journal or the log gets them. No core file is written, because the memory has passwords.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    faulthandler.enable()  # guard: an-agent-that-hung-leaves-its-stacks
