"""Watch the kernel for changes that nobody asked for, and have the scope repaired within moments.

There is one netlink watch per namespace, one for the host's own links, one for the host's nftables tables, and one for
the names of the namespaces.

Each event is compared with what the scope wants. Events that match it, including those caused by our own changes, are
ignored. An event that does not match schedules one repair of the scope; further events within ``DEBOUNCE_S`` join it.
While a command or a repair works on the scope, only the latest event per object is kept; these are compared when the
work is done. If something keeps undoing our repairs, the delay between repairs grows (exponential back-off).

When a NIC or another link of the host appears, for example late at boot, all scopes that need it are repaired. A scope
may have failed because of it, and would be tried again much later.

When another program takes something from our tables on the host, a tidy loads what is missing, with the same back-off.
Before that, and without a back-off, closed gates are closed again: another host may serve the addresses behind them.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

from netloom import names
from netloom.agent.backoff import Backoff
from netloom.agent.clock import Clock, Timer
from netloom.agent.host import fence, gate, lease
from netloom.agent.host.observe_nft import GUARD_TABLE
from netloom.agent.kernel import links, namespaces, rules
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.neighbours import NeighbourRow
from netloom.agent.kernel.nft_watch import NftWatch
from netloom.agent.kernel.routes import RouteRow
from netloom.agent.kernel.watch import Event, NamesWatch, Watch
from netloom.agent.log import Log
from netloom.errors import NetloomError
from netloom.names import UNTAGGED
from netloom.netobjects import MAIN_TABLE, Rule
from netloom.plan.have import ASK_MAIN, CARRIERS, HostLink
from netloom.plan.plan import alias_of
from netloom.plan.uplinks import is_nic_name
from netloom.render.want import Port, Want

DEBOUNCE_S = 0.06
FIREWALL_S = 0.2  # a firewall loads its rules in several transactions
# So many repairs within REPEATED_S start without a delay: of the same object, and of all objects.
REPAIRS_AT_ONCE = 5
ALL_REPAIRS_AT_ONCE = 30
REPEATED_S = 60.0
BACKOFF = Backoff.doubling(1.0, 30.0)

RELEASED_S = 2.0  # at most between a port's release and the end of its bridge

OVERRUN = "events were lost"

_Place = Literal["host", "inside"]
_Key = tuple[_Place, str, object]


class _Watched:
    """A scope that exists. ``identity``: the inode of the namespace that ``inside`` watches."""

    def __init__(self, scope_id: str, want: Want) -> None:
        self.scope_id = scope_id
        self.want = want
        self.inside: Watch | None = None
        self.identity = 0
        self.pending: dict[_Key, Event] = {}  # the latest event per object, while the scope is being worked on
        self.unexpected = 0  # the number of the last event that did not match
        self.repairs: deque[tuple[float, str]] = deque(maxlen=64)  # when, which object


class WatchHandler(Protocol):
    """The callbacks of the watcher. It calls them on the event loop."""

    def busy(self, scope_id: str) -> bool:
        """Whether a command or a repair works on the scope now."""

    async def repair(self, scope_id: str, why: str) -> int | None:
        """Converge the scope and return the number of steps; None: it failed, and the handler tries again."""

    def firewall_changed(self) -> None:
        """Somebody changed nftables tables of the host that are not ours: let the frames of our bridges pass there."""

    def tidy_soon(self) -> None:
        """Schedule a tidy: a link has gone, the guard of a bridge of others follows a change, or a guard is lost."""


class Watcher:
    """``open``, ``watch``, ``unwatch`` and ``unexpected`` are called by worker threads, all else on the event loop.

    ``orphaned`` is called with a bridge that somebody deleted and the links that were in it. ``keep_gates_closed`` is
    called in a thread of its own when our tables have lost something; it may raise HostRefused. ``uplink_changed`` is
    called with a port of a bridge that may be its uplink and has no carrier (False), or has it again (True).
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        log: Log,
        handler: WatchHandler,
        orphaned: Callable[[str, frozenset[str]], None],
        keep_gates_closed: Callable[[], object],
        uplink_changed: Callable[[str, bool], None] = lambda link, running: None,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._log = log
        self._handler = handler
        self._orphaned = orphaned
        self._keep_gates_closed = keep_gates_closed
        self._uplink_changed = uplink_changed
        self._closing: asyncio.Task[None] | None = None
        self._close_again = False  # when the one that runs has ended
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._ports: dict[str, tuple[str, Port]] = {}  # host end -> scope, port
        self._shared: dict[str, set[str]] = {}  # link of the host -> scopes that depend on it
        self._host: Watch | None = None
        self._names: NamesWatch | None = None
        self._tables: NftWatch | None = None
        self._tables_lost: deque[float] = deque(maxlen=64)  # when
        self._tables_timer: Timer | None = None
        self._firewall_changes: deque[float] = deque(maxlen=64)  # when somebody changed the host's other tables
        self._firewall_timer: Timer | None = None
        self._seen: dict[str, tuple[int, int]] = {}  # link of the host -> its index, and that of its bridge or 0
        self._without_carrier: set[str] = set()  # ports of bridges that are not ours
        self._mtus: dict[str, tuple[int, int]] = {}  # link of the host, no bridge -> its MTU, index of its bridge
        self._masters: dict[str, int] = {}  # link of the host -> index of its bridge
        self._own_bridges: set[int] = set()  # their indexes
        self._released: dict[int, dict[str, float]] = {}  # index of a bridge -> link that left it, when
        self._numbers = itertools.count(1)  # of unexpected events, for all scopes
        self._timers: dict[str, Timer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    # ---------------------------------------------------------------------------------- called by worker threads

    def open(self) -> None:
        """Start watching the host. Raises HostRefused."""
        host, gone, tables = (
            Watch(None, "link", "address"),
            NamesWatch(),
            NftWatch(None, GUARD_TABLE, gate.TABLE.name, lease.TABLE.name, fence.TABLE.name),
        )
        listed = links.list_links(None)
        seen = {link.name: (link.index, link.master_index or 0) for link in listed}

        def begin() -> None:
            self._host, self._names, self._tables = host, gone, tables
            self._seen |= seen
            self._masters |= {link.name: link.master_index for link in listed if link.master_index}
            self._own_bridges |= {link.index for link in listed if _is_own_bridge(link)}
            self._mtus |= {it.name: (it.mtu, it.master_index or 0) for it in listed if it.kind != "bridge"}
            for it in filter(_is_dead_uplink, listed):
                self._without_carrier.add(it.name)
                self._uplink_changed(it.name, False)
            self._loop.add_reader(host, self._read_host)
            self._loop.add_reader(gone, self._read_names)
            self._loop.add_reader(tables, self._read_tables)

        self._loop.call_soon_threadsafe(begin)

    def watch(self, scope_id: str, want: Want) -> None:
        """Watch the scope, compared with ``want`` from now on; its namespace as soon as it exists."""
        with self._lock:
            watched = self._watched.setdefault(scope_id, _Watched(scope_id, want))
        fresh: Watch | None = None
        try:
            identity = namespaces.identity(want.namespace) if namespaces.exists(want.namespace) else watched.identity
            if identity != watched.identity:
                fresh = Watch(want.namespace)
        except (NetloomError, OSError) as error:
            # The namespace has just gone, or cannot be watched; the periodic check remains.
            self._log.line(f"scope={scope_id} cannot be watched: {error}")
            identity = watched.identity
        if fresh is None and watched.want is want and identity == watched.identity and watched.inside is not None:
            return
        watched.identity = identity
        if fresh is not None:
            watched.unexpected = next(self._numbers)  # guard: a-new-namespace-is-unexpected
        self._loop.call_soon_threadsafe(self._watch, watched, want, fresh)

    def unwatch(self, scope_id: str) -> None:
        """Stop watching the scope, and close the watch's socket, which would keep the namespace alive."""
        with self._lock:
            watched = self._watched.pop(scope_id, None)
        if watched is not None:
            self._loop.call_soon_threadsafe(self._unwatch, watched)

    def unexpected(self, scope_id: str) -> int:
        """A number that stays the same while all events of the scope match what it wants.

        Events that nobody has read yet do not match. A scope that is not watched has another number each time.
        """
        watched = self._watched.get(scope_id)
        if watched is None:
            return next(self._numbers)
        if watched.pending or self._unread(watched):  # guard: unread-events-are-unexpected
            watched.unexpected = next(self._numbers)
        return watched.unexpected

    def _unread(self, watched: _Watched) -> bool:
        waiting = select.poll()
        try:
            for it in (self._host, self._names, watched.inside):
                if it is None:
                    return True
                waiting.register(it, select.POLLIN)
        except ValueError:  # the event loop has just closed it
            return True
        return bool(waiting.poll(0))

    # ------------------------------------------------------------------------------------------- on the event loop

    def work_done(self, scope_id: str) -> None:
        """A command or repair of the scope is done: compare the latest event of each object that came meanwhile."""
        self._read_host()
        watched = self._watched.get(scope_id)
        if watched is None:
            return
        self._read_inside(watched)
        pending, watched.pending = watched.pending, {}
        for (place, _, _), event in pending.items():
            why = self._deviation(watched, place, event)
            if why:
                self._schedule(watched, why)

    def stop(self) -> None:
        """Close all watches and cancel all scheduled repairs."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._closing is not None:
            self._closing.cancel()
        for timer_of_tables in (self._tables_timer, self._firewall_timer):
            if timer_of_tables is not None:
                timer_of_tables.cancel()
        for watch in (self._host, self._names, self._tables, *(it.inside for it in self._watched.values())):
            if watch is not None:
                self._loop.remove_reader(watch)
                watch.close()
        self._watched.clear()
        self._host = self._names = self._tables = None

    def _watch(self, watched: _Watched, want: Want, fresh: Watch | None) -> None:
        if self._stopped or self._watched.get(watched.scope_id) is not watched:
            if fresh is not None:
                fresh.close()
            return
        if fresh is not None:
            self._close_inside(watched)
            watched.inside = fresh
            watched.pending = {key: event for key, event in watched.pending.items() if key[0] == "host"}
            self._loop.add_reader(fresh, self._read_inside, watched)
        self._forget_links(watched)
        watched.want = want
        for port in want.ports:
            self._ports[port.host_link] = (watched.scope_id, port)
            for link in _links_under(port):
                self._shared.setdefault(link, set()).add(watched.scope_id)

    def _unwatch(self, watched: _Watched) -> None:
        self._close_inside(watched)
        self._forget_links(watched)
        timer = self._timers.pop(watched.scope_id, None)
        if timer is not None:
            timer.cancel()

    def _forget_links(self, watched: _Watched) -> None:
        for port in watched.want.ports:
            if self._ports.get(port.host_link, ("",))[0] == watched.scope_id:
                del self._ports[port.host_link]
            for link in _links_under(port):
                scopes = self._shared.get(link, set())
                scopes.discard(watched.scope_id)
                if not scopes:
                    self._shared.pop(link, None)

    def _close_inside(self, watched: _Watched) -> None:
        if watched.inside is not None:
            self._loop.remove_reader(watched.inside)
            watched.inside.close()
            watched.inside = None

    # ------------------------------------------------------------------------------------------------------ reading

    def _read_names(self) -> None:
        gone = self._names.read() if self._names is not None else frozenset()
        for watched in list(self._watched.values()):
            if gone is None or watched.want.namespace in gone:
                self._schedule(watched, f"namespace {watched.want.namespace} lost its name")

    def _read_tables(self) -> None:
        try:
            transactions = self._tables.read() if self._tables is not None else []
        except NetloomError as error:
            self._log.line(f"watch: {error}")
            return
        for it in transactions:
            if it.overrun or (it.lost and not it.own):  # guard: own-changes-of-the-guard-are-no-loss
                self._close_gates()
                self._restore_tables(it.process or OVERRUN)
            elif not it.own:
                self._follow_firewall()

    def _follow_firewall(self) -> None:
        """Have the host's firewall looked at soon, or later if it changes again and again."""
        if self._stopped or self._firewall_timer is not None:
            return
        now = self._clock.time()
        lately = sum(at > now - REPEATED_S for at in self._firewall_changes)
        self._firewall_changes.append(now)

        def follow() -> None:
            self._firewall_timer = None
            self._handler.firewall_changed()  # guard: a-new-firewall-is-followed

        delay_s = FIREWALL_S if lately < REPAIRS_AT_ONCE else BACKOFF.delay_s(lately - REPAIRS_AT_ONCE)
        self._firewall_timer = self._clock.call_later(delay_s, follow)

    def _close_gates(self) -> None:
        self._close_again = True
        if self._closing is None and not self._stopped:
            self._closing = self._loop.create_task(self._close_gates_until_done())

    async def _close_gates_until_done(self) -> None:
        try:
            while self._close_again and not self._stopped:
                self._close_again = False
                await self._loop.run_in_executor(None, self._keep_gates_closed)  # guard: closed-gates-close-at-once
        except NetloomError as error:
            self._log.line(f"gates: {error}")  # the tidy that follows tries again
        except Exception as error:  # noqa: BLE001, a bug here must not end the watch of the tables
            self._log.traceback("gates", error)
        finally:
            self._closing = None

    def _restore_tables(self, who: str) -> None:
        """Have a tidy load what is missing of the host's tables, soon, or later if this happens again and again."""
        if self._stopped or self._tables_timer is not None:
            return
        now = self._clock.time()
        lately = sum(at > now - REPEATED_S for at in self._tables_lost)
        self._tables_lost.append(now)
        delay_s = 0.0 if lately < REPAIRS_AT_ONCE else BACKOFF.delay_s(lately - REPAIRS_AT_ONCE)
        if delay_s:
            self._log.line(f"{who} changed the tables of the host {lately} times recently; check in {delay_s:.0f} s")

        def restore() -> None:
            self._tables_timer = None
            self._handler.tidy_soon()  # guard: the-guard-is-back-at-once

        self._tables_timer = self._clock.call_later(delay_s, restore)

    def _read_inside(self, watched: _Watched) -> None:
        if watched.inside is None:
            return
        for event in self._events(watched.inside):
            self._hear(watched, "inside", event)

    def _read_host(self) -> None:
        if self._host is None:
            return
        for event in self._events(self._host):
            if event.kind == "overrun":
                for watched in list(self._watched.values()):
                    self._schedule(watched, OVERRUN)
            elif isinstance(event.row, Link):
                self._hear_host(event, event.row)
            elif isinstance(event.row, AddressRow) and not event.row.link_local:
                self._hear_address(event.row)

    def _events(self, watch: Watch) -> list[Event]:
        try:
            return watch.read()
        except NetloomError as error:
            self._log.line(f"watch: {error}")
            return [Event(kind="overrun")]

    def _hear_address(self, row: AddressRow) -> None:
        """A bridge of others that the host has an address on must not be closed."""
        names_of = self._host.names if self._host is not None else {}
        if row.address.link in {names_of.get(it) for it in self._bridges_of_others()}:
            self._handler.tidy_soon()

    def _bridges_of_others(self) -> set[int]:
        """The indexes of the bridges that our ports are in and that somebody else created."""
        return {self._masters[name] for name in self._ports if name in self._masters} - self._own_bridges

    def _hear_host(self, event: Event, link: Link) -> None:
        self._follow_master(event, link)
        self._follow_carrier(event, link)
        owner = self._watched.get(self._ports[link.name][0]) if link.name in self._ports else None
        if owner is not None:
            self._hear(owner, "host", event)
        scopes = self._shared.get(link.name, set())
        if scopes:
            # One scope repairs a shared link, an idle one if possible. A NIC that came back concerns all of them.
            back = not event.gone and self._seen.get(link.name, (link.index, 0))[0] != link.index
            for scope_id in sorted(scopes, key=self._handler.busy)[: len(scopes) if back else 1]:
                if scope_id in self._watched:
                    self._hear(self._watched[scope_id], "host", event)
        self._follow_mtu(event, link, scopes)
        if event.gone:
            self._seen.pop(link.name, None)
            self._handler.tidy_soon()
        else:
            self._follow_arrival(link, scopes)
            self._seen[link.name] = (link.index, link.master_index or 0)

    def _follow_carrier(self, event: Event, link: Link) -> None:
        was_lost = link.name in self._without_carrier
        if not event.gone and _is_dead_uplink(link) and not was_lost:
            self._without_carrier.add(link.name)
            self._uplink_changed(link.name, False)
        elif was_lost and (link.running or event.gone):
            self._without_carrier.discard(link.name)
            self._uplink_changed(link.name, True)

    def _follow_arrival(self, link: Link, scopes: set[str]) -> None:
        """Have every scope repaired that needs a link of others which has appeared, or a bridge that it has joined.

        A registered bridge leads to its NIC (``plan/uplinks.py``). Most scopes do not depend on it once they have one.
        """
        index, master = self._seen.get(link.name, (0, 0))
        appeared = index != link.index
        concerned = {it for it in scopes if appeared and self._needs(it, link)}
        joined = link.master_index if appeared or master != link.master_index else None
        if joined and is_nic_name(link.name) and self._host is not None:
            bridge = self._host.names.get(joined, "")
            concerned |= {it for it in self._shared.get(bridge, ()) if self._needs_bridge(it, bridge)}
        for watched in [self._watched[it] for it in sorted(concerned) if it in self._watched]:
            self._schedule(watched, link.name)  # guard: scopes-wait-for-their-nics

    def _needs(self, scope_id: str, link: Link) -> bool:
        """Whether the scope needs this link, and netloom does not make it. The alias of a new link comes later."""
        segments = [port.segment for port in self._watched[scope_id].want.ports] if scope_id in self._watched else []
        own = link.kind in CARRIERS
        return any(link.name == it.nic or (link.name == it.vlan_link and not own) for it in segments)

    def _needs_bridge(self, scope_id: str, bridge: str) -> bool:
        """Whether the scope's registered device is this bridge, and it has led to no NIC so far."""
        watched = self._watched.get(scope_id)
        return watched is not None and any(port.segment.nic == bridge for port in watched.want.ports)

    def _follow_mtu(self, event: Event, link: Link, scopes: set[str]) -> None:
        """Have every scope above a resized link repaired, because each sets the MTU of its own ports.

        These are also the scopes with a port in the link's bridge: it may be the uplink there, as another may be that
        joins or leaves a bridge of others. The MTU of a bridge is not followed: it changes whenever a VM is plugged in.
        """
        if link.kind == "bridge":
            return
        before, had = self._mtus.pop(link.name, (0, 0))
        mtu, master = (0, 0) if event.gone else (link.mtu, link.master_index or 0)
        if not event.gone:
            self._mtus[link.name] = mtu, master
        resized = before not in (0, mtu) and not event.gone
        concerned = set(scopes) if resized else set()
        if link.kind != "tun" and link.name not in self._ports:
            bridges = {master} if resized else set()
            bridges |= {had, master} & self._bridges_of_others() if had != master else set()
            concerned |= {self._ports[it][0] for it in self._ports if self._masters.get(it) in bridges}
        for watched in [self._watched[it] for it in sorted(concerned) if it in self._watched]:
            self._schedule(watched, link.name)  # guard: ports-follow-the-mtu-of-their-segment

    def _follow_master(self, event: Event, link: Link) -> None:
        """Track bridge ports. Before a bridge is deleted, the kernel releases its ports one by one, VMs' taps too."""
        now = self._clock.time()
        if _is_own_bridge(link) and not event.gone:
            self._own_bridges.add(link.index)
        else:
            self._own_bridges.discard(link.index)
        had = self._masters.pop(link.name, 0)
        if event.gone:
            released = self._released.pop(link.index, {})
            lost = frozenset(name for name, at in released.items() if at > now - RELEASED_S and name not in self._ports)
            if lost and link.name in self._shared:
                self._orphaned(link.name, lost)
                # A repair that runs may have made the bridge again already, without these ports.
                scope_id = min(self._shared[link.name], key=self._handler.busy)
                if scope_id in self._watched:
                    self._schedule(self._watched[scope_id], link.name)  # guard: lost-ports-are-repaired
        elif link.master_index:
            self._masters[link.name] = link.master_index
            moved = bool(had) and link.name in self._ports
            if had != link.master_index and (moved or link.master_index in self._bridges_of_others()):
                self._handler.tidy_soon()  # guard: a-new-port-is-guarded
        elif had:
            self._released.setdefault(had, {})[link.name] = now

    def _hear(self, watched: _Watched, place: _Place, event: Event) -> None:
        if self._handler.busy(watched.scope_id):
            watched.pending[(place, event.kind, _identity(event))] = event
            return
        why = self._deviation(watched, place, event)
        if why:
            self._schedule(watched, why)

    def _deviation(self, watched: _Watched, place: _Place, event: Event) -> str:
        if place == "inside" or not isinstance(event.row, Link):
            return deviation(watched.want, event)
        link = event.row
        if link.name in self._ports:
            port = self._ports[link.name][1]
            bridge = self._host.names.get(link.master_index or 0, "") if self._host is not None else ""
            # A bridge with another name is accepted if the link was in it before.
            known = bridge == port.segment.bridge or self._seen.get(link.name, (0, 0))[1] == link.master_index
            wrong = event.gone or not link.up or not link.master_index or not known
            return link.name if wrong or link.alias != alias_of(watched.scope_id) else ""
        for port in watched.want.ports:
            if link.name in _links_under(port) and _link_lost(port, event, link, self._seen.get(link.name)):
                return link.name
        return ""

    # ------------------------------------------------------------------------------------------------------ repairs

    def _schedule(self, watched: _Watched, why: str) -> None:
        watched.unexpected = next(self._numbers)  # guard: what-is-repaired-is-looked-at
        if self._stopped or watched.scope_id in self._timers:
            return
        since = self._clock.time() - REPEATED_S
        lately = [what for at, what in watched.repairs if at > since]
        too_many = max(lately.count(why) - REPAIRS_AT_ONCE, len(lately) - ALL_REPAIRS_AT_ONCE)
        delay_s = DEBOUNCE_S
        if too_many >= 0:
            delay_s = BACKOFF.delay_s(too_many)
            times = f"{lately.count(why)} times, {len(lately)} in all"
            self._log.line(f"scope={watched.scope_id} {why}: repaired {times} recently; next repair in {delay_s:.0f} s")
        self._start_later(watched, why, delay_s)

    def _start_later(self, watched: _Watched, why: str, delay_s: float) -> None:
        self._timers[watched.scope_id] = self._clock.call_later(delay_s, partial(self._start_repair, watched, why))

    def _start_repair(self, watched: _Watched, why: str) -> None:
        del self._timers[watched.scope_id]
        if self._watched.get(watched.scope_id) is not watched:
            return
        if self._handler.busy(watched.scope_id):
            self._start_later(watched, why, DEBOUNCE_S)
            return
        task = self._loop.create_task(self._run(watched, why))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, watched: _Watched, why: str) -> None:
        if await self._handler.repair(watched.scope_id, f"watch: {why}"):
            watched.repairs.append((self._clock.time(), why))


def _is_own_bridge(link: Link) -> bool:
    return link.kind == "bridge" and HostLink(name=link.name, alias=link.alias).ours


def deviation(want: Want, event: Event) -> str:
    """The object of an event in the scope's namespace that is not as wanted; empty when the event matches ``want``."""
    row = event.row
    match row:
        case Link():
            return _about_link(want, event.gone, row)
        case AddressRow():
            return _about_address(want, event.gone, row)
        case RouteRow():
            return _about_route(want, event.gone, row)
        case Rule():
            return _about_rule(want, event.gone, row)
        case NeighbourRow():
            return _about_neighbour(want, event.gone, row)
    return OVERRUN if event.kind == "overrun" else ""


def _about_link(want: Want, gone: bool, row: Link) -> str:
    if row.name == "lo":
        return "" if row.up else "lo"
    port = next((it for it in want.ports if it.link == row.name), None)
    if port is None:
        return "" if gone or row.kind != "veth" else row.name
    return row.name if gone or not row.up or row.mac != port.mac else ""


def _about_address(want: Want, gone: bool, row: AddressRow) -> str:
    address = row.address
    wanted = address in want.addresses
    return address.cidr if wanted == gone and address.link != "lo" and not _unwanted_ip6(want, address.cidr) else ""


def _about_route(want: Want, gone: bool, row: RouteRow) -> str:
    route = row.route
    name = f"route to {route.destination}"
    if row.protocol == "kernel" and (route.table == MAIN_TABLE or route.kind == "local"):
        # The kernel creates these with an address; without them the address is cut off.
        created_with = (it for it in want.addresses if route.destination in (it.on_link, it.itself))
        return name if gone and any(it.link == route.link for it in created_with) else ""
    if row.automatic or _unwanted_ip6(want, route.destination):
        return ""
    return name if (route in want.routes) == gone else ""


def _about_rule(want: Want, gone: bool, rule: Rule) -> str:
    name = f"rule {rule.priority}"
    if gone and rule == ASK_MAIN:
        return name
    if rules.is_default(rule):
        return ""
    return name if (rule in want.rules) == gone else ""


def _about_neighbour(want: Want, gone: bool, row: NeighbourRow) -> str:
    link, address = row.neighbour.link, row.neighbour.address
    wanted = want.neighbour_at.get((link, address))
    if wanted is None:
        return address if row.permanent and not gone and link.startswith("gst-") else ""
    return "" if row.neighbour == wanted and row.permanent and not gone else f"neighbour {address}"


def _unwanted_ip6(want: Want, prefix: str) -> bool:
    """Whether this is IPv6 of the kernel's own: link-local, or in a namespace that should have none."""
    has_ip6 = any(":" in it.cidr for it in want.addresses)
    return ":" in prefix and (not has_ip6 or prefix.startswith(("fe80:", "ff")))


def _is_dead_uplink(link: Link) -> bool:
    """Whether it may be an uplink of a bridge, and has no carrier. Ends of our own and taps of VMs are none."""
    own = link.name.startswith(names.HOST_PORTS)
    return bool(link.master_index) and not link.running and link.kind != "tun" and not own


def _links_under(port: Port) -> tuple[str, ...]:
    segment = port.segment
    besides = (names.bridge(segment.besides, segment.vlan), names.vlan_link(segment.besides, segment.vlan))
    return tuple(filter(None, (segment.bridge, segment.vlan_link, segment.nic, *(besides if segment.besides else ()))))


def _link_lost(port: Port, event: Event, link: Link, seen: tuple[int, int] | None) -> bool:
    """Whether a link of the host that the port depends on is not as it has to be, or has come back."""
    segment = port.segment
    carrier = segment.nic if segment.vlan == UNTAGGED else segment.vlan_link
    if link.name == segment.nic and event.gone:
        return False  # a repair needs the NIC to come back first
    if link.name == segment.bridge and link.name != carrier:
        return event.gone or not link.up
    if link.name == carrier and link.kind != "bridge":
        return event.gone or not link.up or not link.master_index
    return seen is None or seen[0] != link.index


def _identity(event: Event) -> object:
    row = event.row
    match row:
        case Link():
            return row.name
        case AddressRow():
            return row.address
        case RouteRow():
            return row.route.table, row.route.destination
        case Rule():
            return row
        case NeighbourRow():
            return row.neighbour.link, row.neighbour.address
    return None
