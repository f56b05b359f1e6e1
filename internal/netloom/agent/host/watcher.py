"""What was taken from a live scope is seen within moments: a watch over each namespace, over the host, over the names.

An event is held against the wish: what agrees with it is nobody's concern, our own changes among it. What does not
makes the scope's turn come, once for all that happens within ``DEBOUNCE_S``. While a scope is being worked on, only the
last word about each object counts, and only when the work is done. Somebody who undoes us again and again is
answered ever more slowly.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal

from netloom.agent.host.observe import as_route, as_rule
from netloom.agent.kernel import links, namespaces
from netloom.agent.kernel.links import AddressRow, Link, NeighbourRow, RouteRow, RuleRow
from netloom.agent.kernel.watch import Event, NamesWatch, Watch
from netloom.agent.log import Log
from netloom.errors import NetloomError
from netloom.names import UNTAGGED
from netloom.plan import ASK_MAIN, alias_of
from netloom.render.want import Address, Neighbour, Port, Want

DEBOUNCE_S = 0.06
CALM_HEALS = 5  # so often in FIGHT_S the same thing is put right at once
ALL_CALM_HEALS = 30  # whatever it was
FIGHT_S = 60.0
BACK_OFF_S_MAX = 30.0

RELEASED_S = 2.0  # between a port's leaving and the end of its bridge

_PRIORITIES_OF_THE_KERNEL = frozenset({0, 32766, 32767})
_ROUTES_OF_THE_KERNEL = frozenset({"kernel", "redirect", "ra"})

_Place = Literal["host", "inside"]
_Key = tuple[_Place, str, object]


class _Watched:
    """A scope that stands. ``identity``: the inode of the namespace that ``inside`` watches."""

    def __init__(self, scope_id: str, want: Want) -> None:
        self.scope_id = scope_id
        self.want = want
        self.inside: Watch | None = None
        self.identity = 0
        self.said: dict[_Key, Event] = {}  # while the scope is being worked on: the last event about each object
        self.heals: deque[tuple[float, str]] = deque(maxlen=64)  # when, what


class Healer:
    """``attend`` and ``leave`` belong to worker threads, ``open`` too; everything else to the event loop.

    ``heal`` converges a scope and tells how many steps that took, or None when it failed (and is tried again by whoever
    failed). ``busy`` tells whether somebody works on the scope. ``orphaned`` is told of a bridge that was deleted, and
    which links were in it; ``untidy`` when any link of the host has gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        heal: Callable[[str, str], Awaitable[int | None]],
        busy: Callable[[str], bool],
        orphaned: Callable[[str, frozenset[str]], None],
        untidy: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._log = log
        self._heal = heal
        self._busy = busy
        self._orphaned = orphaned
        self._untidy = untidy
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._ports: dict[str, tuple[str, Port]] = {}  # host end -> scope, port
        self._shared: dict[str, set[str]] = {}  # link of the host -> scopes that stand on it
        self._host: Watch | None = None
        self._names: NamesWatch | None = None
        self._seen: dict[str, tuple[int, int]] = {}  # link of the host -> its number and its bridge's
        self._masters: dict[str, int] = {}  # link of the host -> number of its bridge
        self._released: dict[int, dict[str, float]] = {}  # number of a bridge -> link that left it, when
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    # ---------------------------------------------------------------------------------- called by worker threads

    def open(self) -> None:
        """Begins to watch the host. Raises HostRefused."""
        host, gone = Watch(None, "link"), NamesWatch()
        listed = links.list_links(None)
        seen = {link.name: (link.index, link.master_index or 0) for link in listed}

        def begin() -> None:
            self._host, self._names = host, gone
            self._seen |= seen
            self._masters |= {link.name: link.master_index for link in listed if link.master_index}
            self._loop.add_reader(host, self._read_host)
            self._loop.add_reader(gone, self._read_names)

        self._loop.call_soon_threadsafe(begin)

    def attend(self, scope_id: str, want: Want) -> None:
        """From now on the scope is watched for this wish; its namespace from when it is there."""
        with self._lock:
            watched = self._watched.setdefault(scope_id, _Watched(scope_id, want))
        fresh: Watch | None = None
        try:
            identity = namespaces.identity(want.namespace) if namespaces.exists(want.namespace) else watched.identity
            if identity != watched.identity:
                fresh = Watch(want.namespace)
        except (NetloomError, OSError) as error:
            # It went just now; or it cannot be watched, and the slow check is left.
            self._log.line(f"scope={scope_id} cannot be watched: {error}")
            identity = watched.identity
        if fresh is None and watched.want is want and identity == watched.identity and watched.inside is not None:
            return
        watched.identity = identity
        self._loop.call_soon_threadsafe(self._attend, watched, want, fresh)

    def leave(self, scope_id: str) -> None:
        """The scope is watched no more, and no socket of a watch keeps its namespace alive."""
        with self._lock:
            watched = self._watched.pop(scope_id, None)
        if watched is not None:
            self._loop.call_soon_threadsafe(self._leave, watched)

    # ------------------------------------------------------------------------------------------- on the event loop

    def settled(self, scope_id: str) -> None:
        """The work on a scope is done: what was said meanwhile counts by its last word."""
        self._read_host()
        watched = self._watched.get(scope_id)
        if watched is None:
            return
        self._read_inside(watched)
        said, watched.said = watched.said, {}
        for (place, _, _), event in said.items():
            why = self._disturbs(watched, place, event)
            if why:
                self._mark(watched, why)

    def stop(self) -> None:
        """Watches nothing any more."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        for watch in (self._host, self._names, *(it.inside for it in self._watched.values())):
            if watch is not None:
                self._loop.remove_reader(watch)
                watch.close()
        self._watched.clear()
        self._host = self._names = None

    def _attend(self, watched: _Watched, want: Want, fresh: Watch | None) -> None:
        if self._stopped or self._watched.get(watched.scope_id) is not watched:
            if fresh is not None:
                fresh.close()
            return
        if fresh is not None:
            self._close_inside(watched)
            watched.inside = fresh
            watched.said = {key: event for key, event in watched.said.items() if key[0] == "host"}
            self._loop.add_reader(fresh, self._read_inside, watched)
        self._forget_links(watched)
        watched.want = want
        for port in want.ports:
            self._ports[port.host_link] = (watched.scope_id, port)
            for link in _grounds(port):
                self._shared.setdefault(link, set()).add(watched.scope_id)

    def _leave(self, watched: _Watched) -> None:
        self._close_inside(watched)
        self._forget_links(watched)
        timer = self._timers.pop(watched.scope_id, None)
        if timer is not None:
            timer.cancel()

    def _forget_links(self, watched: _Watched) -> None:
        for port in watched.want.ports:
            if self._ports.get(port.host_link, ("",))[0] == watched.scope_id:
                del self._ports[port.host_link]
            for link in _grounds(port):
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
                self._mark(watched, f"namespace {watched.want.namespace} lost its name")

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
                    self._mark(watched, "more happened than could be told")
            elif isinstance(event.row, Link):
                self._hear_host(event, event.row)

    def _events(self, watch: Watch) -> list[Event]:
        try:
            return watch.read()
        except NetloomError as error:
            self._log.line(f"watch: {error}")
            return [Event(kind="overrun")]

    def _hear_host(self, event: Event, link: Link) -> None:
        self._follow_master(event, link)
        owner = self._watched.get(self._ports[link.name][0]) if link.name in self._ports else None
        if owner is not None:
            self._hear(owner, "host", event)
        scopes = self._shared.get(link.name)
        if scopes:
            # What is shared is put right by whichever scope comes first. A NIC that came back was missing to all.
            back = not event.gone and self._seen.get(link.name, (link.index, 0))[0] != link.index
            for scope_id in sorted(scopes, key=self._busy)[: len(scopes) if back else 1]:
                if scope_id in self._watched:
                    self._hear(self._watched[scope_id], "host", event)
        if event.gone:
            self._seen.pop(link.name, None)
            self._untidy()
        elif link.name in self._ports or scopes:
            self._seen[link.name] = (link.index, link.master_index or 0)

    def _follow_master(self, event: Event, link: Link) -> None:
        """A bridge that is deleted lets its ports go first, one by one; VMs' taps among them."""
        now = time.monotonic()
        had = self._masters.pop(link.name, 0)
        if event.gone:
            released = self._released.pop(link.index, {})
            lost = frozenset(name for name, at in released.items() if at > now - RELEASED_S and name not in self._ports)
            if lost and link.name in self._shared:
                self._orphaned(link.name, lost)
        elif link.master_index:
            self._masters[link.name] = link.master_index
        elif had:
            self._released.setdefault(had, {})[link.name] = now

    def _hear(self, watched: _Watched, place: _Place, event: Event) -> None:
        if self._busy(watched.scope_id):
            watched.said[(place, event.kind, _identity(event))] = event
            return
        why = self._disturbs(watched, place, event)
        if why:
            self._mark(watched, why)

    def _disturbs(self, watched: _Watched, place: _Place, event: Event) -> str:
        if place == "inside" or not isinstance(event.row, Link):
            return disturbs(watched.want, event)
        link = event.row
        if link.name in self._ports:
            port = self._ports[link.name][1]
            bridge = self._host.names.get(link.master_index or 0, "") if self._host is not None else ""
            # A bridge of another name is one that was there before us, or it is a stranger's.
            known = bridge == port.segment.bridge or self._seen.get(link.name, (0, 0))[1] == link.master_index
            wrong = event.gone or not link.up or not link.master_index or not known
            return link.name if wrong or link.alias != alias_of(watched.scope_id) else ""
        for port in watched.want.ports:
            if link.name in _grounds(port) and _ground_gave_way(port, event, link, self._seen.get(link.name)):
                return link.name
        return ""

    # ------------------------------------------------------------------------------------------------------ healing

    def _mark(self, watched: _Watched, why: str) -> None:
        if self._stopped or watched.scope_id in self._timers:
            return
        since = time.monotonic() - FIGHT_S
        lately = [what for at, what in watched.heals if at > since]
        too_many = max(lately.count(why) - CALM_HEALS, len(lately) - ALL_CALM_HEALS)
        delay_s = DEBOUNCE_S
        if too_many >= 0:
            delay_s = min(BACK_OFF_S_MAX, 2.0**too_many)
            times = f"{lately.count(why)} times, all in all {len(lately)}"
            self._log.line(f"scope={watched.scope_id} {why}: put right {times} lately; next look in {delay_s:.0f} s")
        self._timers[watched.scope_id] = self._loop.call_later(delay_s, self._turn, watched, why)

    def _turn(self, watched: _Watched, why: str) -> None:
        del self._timers[watched.scope_id]
        if self._watched.get(watched.scope_id) is not watched:
            return
        if self._busy(watched.scope_id):
            self._timers[watched.scope_id] = self._loop.call_later(DEBOUNCE_S, self._turn, watched, why)
            return
        task = self._loop.create_task(self._one(watched, why))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, watched: _Watched, why: str) -> None:
        if await self._heal(watched.scope_id, f"watch: {why}"):
            watched.heals.append((time.monotonic(), why))


def disturbs(want: Want, event: Event) -> str:
    """What an event inside the scope's namespace is about, when it is not as wished; empty when it is."""
    row = event.row
    match row:
        case Link() if row.name == "lo":
            return "" if row.up else "lo"
        case Link():
            port = next((it for it in want.ports if it.link == row.name), None)
            if port is None:
                return "" if event.gone or row.kind != "veth" else row.name
            return row.name if event.gone or not row.up or row.mac != port.mac else ""
        case AddressRow():
            wanted = Address(link=row.link, cidr=row.cidr) in want.addresses
            return row.cidr if wanted == event.gone and row.link != "lo" and not _beside(want, row.cidr) else ""
        case RouteRow() if row.protocol == "kernel" and (row.table == links.MAIN_TABLE or row.kind == "local"):
            made_with = (it for it in want.addresses if row.destination in (it.on_link, it.itself))
            cut_off = event.gone and any(it.link == row.link for it in made_with)
            return f"route to {row.destination}" if cut_off else ""
        case RouteRow():
            if (
                row.protocol in _ROUTES_OF_THE_KERNEL
                or row.table == links.LOCAL_TABLE
                or _beside(want, row.destination)
            ):
                return ""
            return f"route to {row.destination}" if (as_route(row) in want.routes) == event.gone else ""
        case RuleRow():
            if event.gone and as_rule(row) == ASK_MAIN:
                return f"rule {row.priority}"
            if row.priority in _PRIORITIES_OF_THE_KERNEL:
                return ""
            return f"rule {row.priority}" if (as_rule(row) in want.rules) == event.gone else ""
        case NeighbourRow():
            return _about_neighbour(want, event.gone, row)
    return "more happened than could be told" if event.kind == "overrun" else ""


def _beside(want: Want, prefix: str) -> bool:
    """Whether it is IPv6 that nobody wished for: link-local, or in a namespace that speaks none."""
    spoken = any(":" in it.cidr for it in want.addresses)
    return ":" in prefix and (not spoken or prefix.startswith(("fe80:", "ff")))


def _about_neighbour(want: Want, gone: bool, row: NeighbourRow) -> str:
    wanted = next((it for it in want.neighbours if (it.link, it.address) == (row.link, row.address)), None)
    if wanted is None:
        return row.address if row.permanent and not gone and row.link.startswith("gst-") else ""
    stands = Neighbour(link=row.link, address=row.address, mac=row.mac) == wanted and row.permanent and not gone
    return "" if stands else f"neighbour {row.address}"


def _grounds(port: Port) -> tuple[str, ...]:
    segment = port.segment
    return tuple(filter(None, (segment.bridge, segment.vlan_link, segment.nic)))


def _ground_gave_way(port: Port, event: Event, link: Link, seen: tuple[int, int] | None) -> bool:
    """Whether a link of the host that the port stands on is not as it has to be, or has come back."""
    segment = port.segment
    carrier = segment.nic if segment.vlan == UNTAGGED else segment.vlan_link
    if link.name == segment.nic and event.gone:
        return False  # nothing helps but its return
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
            return row.link, row.cidr
        case RouteRow():
            return row.table, row.destination
        case RuleRow():
            return row
        case NeighbourRow():
            return row.link, row.address
    return None
