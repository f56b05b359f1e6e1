"""Connections of the scopes that a standby has, too: the active host sends what changes, the standby creates it.

:class:`FlowSource` is on the active host, :class:`FlowSink` on the standby. Both have a thread of their own, so neither
the event loop nor the thread that keeps the leases waits for the kernel. That of the source is in a namespace of its
own, because a socket hears all namespaces that have a number in its namespace.

**The stream.** The source says ``changed``: connections to delete, then connections to create. When reports may have
been lost, and for a namespace that is new to it, it says ``gap``. Then the target gets all connections: ``begin``, the
parts of :meth:`FlowSource.listing`, ``end``. Changes go on meanwhile. At the end the sink deletes what it has not been
told since the beginning.

**Which connections.** Assured ones: open TCP, UDP in both directions for more than a moment, GRE with a reply. And
those with a mark of ``marked``. ESP is never assured: its next packet outwards makes the entry anew. The rest is as in
``conntrack_copy``.

**Timeouts.** At the active host packets renew them, and the kernel does not report that. So connections at the standby
get at least ``KEPT_S``, and end when the active host says so. When the host begins to serve (:meth:`FlowSink.serve`),
those that are not open TCP get ``SETTLED_S``, and the first packet sets the timeout of the protocol. The complete
listing is repeated every ``RELIST_S``. That renews ``KEPT_S``, and ends what was missed: connections that were open
before their namespace was followed are not reported.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from netloom.agent.kernel import conntrack_copy, namespaces
from netloom.agent.kernel.conntrack_changes import list_records
from netloom.agent.kernel.conntrack_copy import Record, key_of, lasting, timeout_of
from netloom.agent.kernel.conntrack_events import (
    BUFFER_BYTES,
    REPLICATED,
    ConntrackEvents,
    connection_socket,
    enable,
)
from netloom.agent.kernel.descriptors import high
from netloom.agent.kernel.netlink import Socket
from netloom.agent.log import Log
from netloom.errors import HostRefused
from netloom.render.marks import REVOKED

KEPT_S = 86_400
SETTLED_S = 180  # longer than the kernel's own for UDP (120 s), and as for TCP that one end has closed
RELIST_S = 900
PART = 2048  # connections of a listing at once
QUEUED_MAX = 200_000  # connections that wait in the sink

_EVERY_S = 0.005  # between two batches of changes
_AT_ONCE = 64  # so many changes do not wait
_READ_MAX = 512
_BATCHES_MAX = 64  # that the event loop has not taken
_RETRY_S = 1.0  # for namespaces that do not exist, and after an error
_TICK_S = 10.0
_SOCKETS_MAX = 16
_IDLE_S = 1.0  # an open socket keeps its namespace, even a deleted one
_LOG_EVERY_S = 60.0

Changed = Callable[[str, list[Record], list[Record]], None]


class FlowSource:
    """The changes of connections in the followed namespaces, on the event loop. Use it there only.

    ``changed``: namespace, connections to create, connections to delete; the target deletes first. ``gap``: these
    namespaces must be listed from now on, because reports were lost or begin now.
    """

    def __init__(
        self,
        log: Log,
        changed: Changed,
        gap: Callable[[frozenset[str]], None],
        *,
        marked: int = REVOKED,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._log = log
        self._changed = changed
        self._gap = gap
        self._marked = marked
        self._buffer_bytes = buffer_bytes
        self._wanted: frozenset[str] = frozenset()
        self._listed_at: dict[str, float] = {}
        self._listings: dict[str, list[set[bytes]]] = {}  # what has changed during each listing under way
        self._logged_at: dict[str, float] = {}
        self._stop = False
        self._wake = high(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._paused = select.poll()  # waits for a call only
        self._paused.register(self._wake, select.POLLIN)
        self._room = threading.Semaphore(_BATCHES_MAX)
        self._lister = ThreadPoolExecutor(1, "flow-listing")
        self._thread = threading.Thread(target=self._run, name="flows", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._tick()

    async def stop(self) -> None:
        """End the thread. Nothing is reported afterwards."""
        self._stop = True
        if self._timer is not None:
            self._timer.cancel()
        os.eventfd_write(self._wake, 1)
        while self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._lister.shutdown(wait=False, cancel_futures=True)
        os.close(self._wake)

    def follow(self, wanted: Iterable[str]) -> None:
        """Follow exactly these namespaces, from soon on; call it again when one was made anew.

        ``gap`` is called for each that is new or new again, and for one that does not exist yet, when it exists.
        """
        self._wanted = frozenset(wanted)
        for name in self._listed_at.keys() - self._wanted:
            del self._listed_at[name]
        os.eventfd_write(self._wake, 1)

    async def listing(self, namespace: str) -> AsyncIterator[list[Record]]:
        """The connections of a namespace, in parts. What has changed meanwhile is left out: ``changed`` has said it.

        Send each part before the changes that come after it. Raises NamespaceError, NetlinkError.
        """
        touched: set[bytes] = set()
        self._listings.setdefault(namespace, []).append(touched)
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._lister, _listed, namespace, self._marked)
            for at in range(0, len(found), PART):
                part = found[at : at + PART]
                yield [it for it in part if key_of(it) not in touched]  # guard: a-listing-does-not-undo-a-change
        finally:
            self._listings[namespace] = [it for it in self._listings[namespace] if it is not touched]
            if not self._listings[namespace]:
                del self._listings[namespace]

    def _deliver(
        self, by_namespace: dict[str, tuple[dict[bytes, Record], dict[bytes, Record]]], gaps: frozenset[str]
    ) -> None:
        self._room.release()
        if self._stop:
            return
        for namespace, (delete, create) in by_namespace.items():
            if namespace not in self._wanted:
                continue
            for touched in self._listings.get(namespace, ()):
                touched.update(delete, create)
            self._changed(namespace, list(create.values()), list(delete.values()))
        self._ask(gaps & self._wanted)

    def _ask(self, gaps: frozenset[str]) -> None:
        now = time.monotonic()
        for name in gaps:
            # Not all at the same time again.
            self._listed_at[name] = now - zlib.crc32(name.encode()) % (RELIST_S // 4 + 1)
        if gaps:
            self._gap(gaps)

    def _tick(self) -> None:
        due = time.monotonic() - RELIST_S
        self._ask(frozenset(name for name, at in self._listed_at.items() if at < due))
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    # In the thread

    def _run(self) -> None:
        is_private = False
        while not self._stop:
            try:
                if not is_private:
                    # Only the followed namespaces have numbers there, so the kernel does not give us other reports.
                    namespaces.enter_private()  # guard: other-namespaces-do-not-fill-the-buffer
                    is_private = True
                self._read()
            except (HostRefused, OSError) as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001, a bug here must not be the end of all later changes
                self._log.traceback("flows", error)
            self._wait(self._paused, _RETRY_S)

    def _read(self) -> None:
        """Read until the end or an error. Afterwards all namespaces are new."""
        while not self._wanted:
            if self._stop:
                return
            self._wait(self._paused, None)
        events = ConntrackEvents(marked=self._marked, buffer_bytes=self._buffer_bytes)
        try:
            reports = select.poll()
            for descriptor in (self._wake, *events.filenos()):
                reports.register(descriptor, select.POLLIN)
            wanted: frozenset[str] = frozenset()
            asked_at = handed_at = 0.0
            while not self._stop and self._wanted:
                now = time.monotonic()
                if self._wanted is not wanted or (events.missing(wanted) and now >= asked_at + _RETRY_S):
                    wanted, asked_at = self._wanted, now
                    events.follow(wanted)
                    for name, why in events.refused.items():
                        self._complain(f"{name}: {why}")
                changes = events.read(_READ_MAX)
                gaps = changes.started | (wanted - events.missing(wanted) if changes.overrun else frozenset())
                if changes.overrun:
                    self._log.line(f"flows: the kernel dropped reports; listing {len(gaps)} namespaces anew")
                count = sum(len(delete) + len(create) for delete, create in changes.by_namespace.values())
                if count or gaps:
                    if not self._hand_over(changes.by_namespace, gaps):
                        return
                    handed_at = time.monotonic()
                if changes.more or count >= _AT_ONCE:
                    continue
                rest_s = handed_at + _EVERY_S - time.monotonic()
                if rest_s > 0:
                    self._wait(self._paused, rest_s)
                else:
                    self._wait(reports, _RETRY_S if events.missing(wanted) else None)
        finally:
            events.close()

    def _complain(self, text: str) -> None:
        """Log it, but not each time that it is tried again."""
        now = time.monotonic()
        if now >= self._logged_at.get(text, -_LOG_EVERY_S) + _LOG_EVERY_S:
            self._logged_at = {it: at for it, at in self._logged_at.items() if now < at + _LOG_EVERY_S} | {text: now}
            self._log.line(f"flows: {text}")

    def _hand_over(
        self, by_namespace: dict[str, tuple[dict[bytes, Record], dict[bytes, Record]]], gaps: frozenset[str]
    ) -> bool:
        """Whether the event loop will take them. Waits while it has enough, so that the kernel drops the rest."""
        while not self._room.acquire(timeout=_RETRY_S):  # guard: changes-do-not-pile-up
            if self._stop:
                return False
        loop = self._loop
        if loop is None or loop.is_closed():
            return False
        loop.call_soon_threadsafe(self._deliver, by_namespace, gaps)
        return True

    def _wait(self, poll: select.poll, at_most_s: float | None) -> None:
        for descriptor, _ in poll.poll(None if at_most_s is None else at_most_s * 1000):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)


def _listed(namespace: str, marked: int) -> list[Record]:
    return list_records(namespace, marked=marked, status=REPLICATED)


@dataclass
class _Listing:
    """A listing of the active host that comes in. ``here``: the connections of this host. ``named``: those of them that
    the other one has, too, as far as the listing has come."""

    token: int
    here: dict[bytes, Record]
    named: set[bytes] = field(default_factory=set)

    def lacks(self, record: Record) -> bool:
        """Whether the connection must be created, or replaced because it differs or would end too soon."""
        key = key_of(record)
        earlier = self.here.get(key)
        self.named.add(key)
        if earlier is not None and earlier[:-4] == record[:-4] and timeout_of(earlier) >= KEPT_S // 2:
            return False
        self.here[key] = lasting(record, KEPT_S)
        return True

    def unnamed(self) -> list[Record]:
        return [record for key, record in self.here.items() if key not in self.named]


@dataclass
class _Work:
    """``kind``: change, begin, end, flush, serve."""

    kind: str
    namespace: str
    create: list[Record] = field(default_factory=list)
    delete: list[Record] = field(default_factory=list)
    token: int = 0

    @property
    def size(self) -> int:
        return len(self.create) + len(self.delete)


class FlowSink:
    """Has the connections of other hosts in namespaces of this one. Any thread may use it.

    The work on each namespace is done in the order of the calls, in one thread. ``lost``: something for this namespace
    was lost, because the kernel refused it all or too much waited: it needs a listing. It is called in the thread of
    the sink, or in the caller's, once until the next ``begin``.
    """

    def __init__(self, log: Log, lost: Callable[[str], None], *, marked: int = REVOKED) -> None:
        self._log = log
        self._lost = lost
        self._marked = marked
        self._condition = threading.Condition()
        self._queue: deque[_Work] = deque()
        self._queued = 0
        self._busy = False
        self._stop = False
        self._incomplete: set[str] = set()
        self._serving: set[str] = set()
        self._listings: dict[str, _Listing] = {}  # from here on in the thread only
        self._sockets: OrderedDict[str, tuple[int, Socket]] = OrderedDict()
        self._logged_at: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="flow-sink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits is not done. The connections stay."""
        with self._condition:
            self._stop = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def change(self, namespace: str, create: list[Record], delete: list[Record]) -> None:
        """Delete, then create. A connection that exists is replaced."""
        self._add(_Work("change", namespace, create, delete))

    def begin(self, namespace: str, token: int) -> None:
        """From now until :meth:`end` all connections are named. Another ``begin`` replaces this one."""
        with self._condition:
            self._incomplete.discard(namespace)
        self._add(_Work("begin", namespace, token=token))

    def end(self, namespace: str, token: int) -> None:
        """Delete what was not named since the ``begin`` with this token. Nothing if that was lost or replaced."""
        self._add(_Work("end", namespace, token=token))

    def flush(self, namespace: str) -> None:
        """Delete all connections: those of a host that served and does not any more. It may get connections again."""
        with self._condition:
            self._serving.discard(namespace)
        self._add(_Work("flush", namespace))

    def serve(self, namespace: str) -> None:
        """This host serves: what waits is done, then the timeouts become ordinary. Later changes are refused.

        Call it at each take-over, and at each start of an agent that serves. :meth:`flush` ends this.
        """
        self._add(_Work("serve", namespace))
        with self._condition:
            self._serving.add(namespace)

    def settled(self, timeout_s: float) -> bool:
        """Wait until all work is done; False: it was not done in time."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def _add(self, work: _Work) -> None:
        lost = False
        with self._condition:
            if work.kind != "flush" and work.namespace in self._serving:  # guard: a-serving-host-takes-no-changes
                return
            if work.size and self._queued + work.size > QUEUED_MAX:  # guard: the-queue-of-changes-is-bounded
                lost = self._is_news(work.namespace)
            else:
                self._queue.append(work)
                self._queued += work.size
                self._condition.notify()
        if lost:
            self._log.line(f"flows: {work.namespace}: too many changes wait; some are dropped")
            self._lost(work.namespace)

    def _is_news(self, namespace: str) -> bool:
        known = namespace in self._incomplete
        self._incomplete.add(namespace)
        return not known

    # In the thread

    def _run(self) -> None:
        while True:
            with self._condition:
                self._busy = False
                self._condition.notify_all()
                if not self._queue and not self._stop:
                    self._condition.wait(_IDLE_S if self._sockets else None)
                if self._stop:
                    break
                work = self._next()
                self._busy = work is not None
            if work is None:
                self._close_sockets()
                continue
            try:
                self._do(work)
            except (HostRefused, OSError) as error:
                self._failed(work.namespace, str(error))
            except Exception as error:  # noqa: BLE001, a bug here must not be the end of all later changes
                self._log.traceback("flows", error)
                self._failed(work.namespace, "a bug")
        self._close_sockets()

    def _next(self) -> _Work | None:
        if not self._queue:
            return None
        work = self._queue.popleft()
        self._queued -= work.size
        return work

    def _failed(self, namespace: str, why: str) -> None:
        self._drop_socket(namespace)
        self._listings.pop(namespace, None)
        with self._condition:
            news = self._is_news(namespace)
        if news:
            self._log.line(f"flows: {namespace}: {why}")
            self._lost(namespace)

    def _do(self, work: _Work) -> None:
        namespace = work.namespace
        if work.kind == "change":
            self._change(work)
        elif work.kind == "begin":
            self._listings.pop(namespace, None)
            self._socket(namespace)  # before the listing: the namespace reports connections that are made from now on
            records = _listed(namespace, self._marked)
            self._listings[namespace] = _Listing(work.token, {key_of(it): it for it in records})
        elif work.kind == "end":
            listing = self._listings.get(namespace)
            if listing is None or listing.token != work.token:  # guard: only-a-whole-listing-ends-connections
                return
            del self._listings[namespace]
            self._replicate(namespace, listing.unnamed(), [])
        elif work.kind == "flush":
            self._listings.pop(namespace, None)
            conntrack_copy.flush(self._socket(namespace))
        else:
            self._listings.pop(namespace, None)
            records = _listed(namespace, self._marked)
            settled = [it for it in records if timeout_of(it) > SETTLED_S and not conntrack_copy.is_open_tcp(it)]
            conntrack_copy.set_timeouts(self._socket(namespace), settled, SETTLED_S)

    def _change(self, work: _Work) -> None:
        create = work.create
        listing = self._listings.get(work.namespace)
        if listing is not None:
            for record in work.delete:
                listing.here.pop(key_of(record), None)
            create = [it for it in create if listing.lacks(it)]
        if create or work.delete:
            self._replicate(work.namespace, work.delete, [lasting(it, KEPT_S) for it in create])

    def _replicate(self, namespace: str, delete: Sequence[Record], create: Sequence[Record]) -> None:
        created = conntrack_copy.replicate(self._socket(namespace), delete, create)
        if created.refused:
            now = time.monotonic()
            if now >= self._logged_at.get(namespace, -_LOG_EVERY_S) + _LOG_EVERY_S:
                self._logged_at[namespace] = now
                self._log.line(f"flows: {namespace}: {created.refused} connections refused: {created.reason}")

    def _socket(self, namespace: str) -> Socket:
        """A socket of the namespace that has this name now. Raises NamespaceError, NetlinkError, OSError."""
        inode = namespaces.identity(namespace)
        known = self._sockets.get(namespace)
        if known is not None and known[0] == inode:  # guard: a-namespace-made-anew-gets-its-own-connections
            self._sockets.move_to_end(namespace)
            return known[1]
        self._drop_socket(namespace)
        while len(self._sockets) >= _SOCKETS_MAX:
            self._drop_socket(next(iter(self._sockets)))
        enable(namespace)
        made = connection_socket(namespace)
        self._sockets[namespace] = inode, made
        return made

    def _drop_socket(self, namespace: str) -> None:
        known = self._sockets.pop(namespace, None)
        if known is not None:
            known[1].close()

    def _close_sockets(self) -> None:
        for namespace in list(self._sockets):
            self._drop_socket(namespace)
