"""A simulated host for tests of the agent's scheduler: no root, no kernel, no threads, and no waiting for time.

``Agent`` connects ``Scopes`` and ``Upkeep`` as ``agent/serve.py`` does, with simulated neighbours. A test is a
coroutine with the decorator ``simulated``::

    @simulated
    async def test_a_failed_call_is_tried_again(agent: Agent) -> None:
        agent.host.fail("net-204", HostRefused("no bridge"))
        await agent.call("020", "implement-network")
        await agent.clock.advance(1.0)
        assert "net-204" in agent.host.present

Work runs at once, in the thread of the test, unless ``agent.workers.hold()`` was called: then it waits for ``step`` or
``release``, as if the worker threads were slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import inspect
import itertools
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from netloom import pairwire
from netloom.agent.actions.builtin import Actions
from netloom.agent.budget import Budget, Checks
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.host.occupied import Occupied
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Created, Difference, Record, difference
from netloom.agent.log import Log
from netloom.agent.processes.failures import ServiceFailure, ServicesFailed
from netloom.agent.scopes.claims import LOOK_CPU_S, LOOK_EVERY_S, Claims
from netloom.agent.scopes.events import Events
from netloom.agent.scopes.flow_copies import FlowCopies
from netloom.agent.scopes.moves import Moves
from netloom.agent.scopes.roles import Roles
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.standby import Standbys
from netloom.agent.scopes.store import HostRecord, Moved, Store, Unreadable
from netloom.agent.scopes.upkeep import Upkeep
from netloom.agent.standby.member import GroupView
from netloom.errors import HostRefused
from netloom.netobjects import Address
from netloom.pairwire import PairMessage
from netloom.plan.have import Have, HostLink
from netloom.plan.steps import AddAddress, CreateNamespace, RemoveHostPort, RemoveNamespace, Step
from netloom.render.ruleset import Ruleset
from netloom.render.want import Port, Want
from netloom.standby.decision import Local
from netloom.standbywire import GroupSpec
from netloom.state import Scope
from netloom.state.served import Served
from netloom.wire import Call, Registration, Reply

PAYLOADS = Path(__file__).parent / "payloads"
REGISTRATION = Registration(owner="test", guest_nic="eth1", public_nic="eth2")
# The event loop counts as idle after so many turns without new work and new timers.
_IDLE_TURNS = 20
_LIMIT_S = 10.0  # of real time, for a test that waits in vain


class FakeTimer:
    """A callback that is due at a time of a :class:`FakeClock`."""

    def __init__(self, at: float, callback: Callable[[], object]) -> None:
        self._at = at
        self.callback: Callable[[], object] | None = callback

    def when(self) -> float:
        return self._at

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """Time that passes in ``advance`` alone. Starts at 0."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self.activity = 0  # grows with each timer and each work, see settle

    def of_next_agent(self) -> FakeClock:
        """The clock for a new agent. What the earlier one waited for does not come: its process has ended."""
        self._timers.clear()
        return self

    def time(self) -> float:
        return self._now

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> FakeTimer:
        self.activity += 1
        timer = FakeTimer(self._now + delay_s, callback)
        heapq.heappush(self._timers, (timer.when(), next(self._order), timer))
        return timer

    async def sleep(self, delay_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay_s, lambda: woken.set_result(None))
        try:
            await woken
        finally:
            timer.cancel()

    @contextlib.asynccontextmanager
    async def timeout(self, delay_s: float | None) -> AsyncIterator[None]:
        async with asyncio.timeout(None) as real:
            timer = None if delay_s is None else self.call_later(delay_s, lambda: real.reschedule(0.0))
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()

    async def settle(self) -> None:
        """Return when all that can run now has run."""
        idle, seen = 0, self.activity
        while idle < _IDLE_TURNS:
            await asyncio.sleep(0)
            idle, seen = (idle + 1, seen) if seen == self.activity else (0, self.activity)

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and run what is due at its time."""
        until = self._now + seconds
        await self.settle()
        while self._timers and self._timers[0][0] <= until + 1e-9:
            at, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, at)
            if timer.callback is not None:
                timer.callback()
                await self.settle()
        self._now = until


class FakeWorkers(Executor):
    """Runs work at once in the calling thread. After ``hold`` the work waits in ``pending``."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._held = False
        self.pending: deque[Callable[[], None]] = deque()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._clock.activity += 1
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001, as in the standard library
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._held:
            self.pending.append(run)
        else:
            run()
        return future

    def hold(self) -> None:
        """Let work that comes from now on wait."""
        self._held = True

    async def step(self) -> None:
        """Run the work that has waited longest, and what follows from it."""
        self.pending.popleft()()
        await self._clock.settle()

    async def release(self) -> None:
        """Run all work that waits, and further work at once."""
        while self.pending:
            await self.step()
        self._held = False


class FakeHost:
    """The kernel of the simulated host: for each scope what it wanted when it last converged.

    ``did`` lists what was done, in order. ``arp`` has the announcements, each with its time.
    ``known``: for each convergence, the ruleset that the host was said to have.
    """

    def __init__(self, clock: FakeClock, did: list[str]) -> None:
        self._clock = clock
        self._errors: defaultdict[str, deque[Exception]] = defaultdict(deque)
        self.did = did
        self.present: dict[str, Want] = {}
        self.without_helpers: frozenset[str] = frozenset()
        self.arp: list[tuple[float, list[str]]] = []
        self.known: list[Ruleset | None] = []
        self.named: set[str] = set()  # further namespaces
        self.blocking_changes: tuple[str, ...] = ()  # what the next ``let_through`` changes
        self.blocking: list[str] = []  # what ``blocked`` says, each with a bridge as its first word
        self.unused: list[str] = []  # links that the next tidy removes
        self.with_vms: set[str] = set()  # bridges
        self.owners: dict[str, str] = {}  # of addresses, on other hosts
        self.asked: list[set[str]] = []  # the addresses of each question
        self.answering: bool | None = True  # what ``anybody_answers`` says
        self.open_neighbours = 0
        self.probing: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self.flows: dict[str, list[Record]] = defaultdict(list)  # by namespace
        self.counted: list[list[str]] = []  # the scopes of each ``changed_rulesets``
        self.changed: set[str] = set()  # scopes in whose namespace others have changed nftables
        self.revoked = True  # whether a flow is marked as revoked, once the flows are checked
        self.told_revoked: list[bool] = []  # what each check of the flows was told about that
        self.hides_heartbeats = False
        self.looked_for: set[str] = set()  # next hops of routes
        self.unplaced: dict[str, str] = {}  # scope -> why its bridge leads to no NIC

    def fail(self, what: str, *errors: Exception) -> None:
        """Let the next converge of a scope fail, or the next ``"tidy"``, or several of them in a row."""
        self._errors[what].extend(errors)

    def prepare(self) -> None:
        self.did.append("prepare")

    def claim(self, scope_id: str, want: Want) -> None:
        self.did.append(f"claim {scope_id}")

    def placed(self, scope_id: str, want: Want, *, anew: bool = False) -> Want:
        if scope_id in self.unplaced:
            raise HostRefused(self.unplaced[scope_id])
        return want

    def converge(self, scope_id: str, want: Want, known: Ruleset | None, *, thorough: bool = False) -> HostChanges:
        self.did.append(f"converge {scope_id}{' thoroughly' if thorough else ''}")
        self.known.append(known)
        self._raise(scope_id)
        had = self.present.get(scope_id)
        steps: list[Step] = []
        if not want.namespace:
            if self.present.pop(scope_id, None) is not None:
                steps.append(RemoveNamespace(f"cs-{scope_id}"))
            return HostChanges(tuple(steps))
        if had is None:
            steps.append(CreateNamespace(want.namespace))
        new = [it for it in want.announce if had is None or it not in had.announce]
        steps += [AddAddress(want.namespace, it) for it in new]
        opened = had is not None and not want.gated and (had.gated or (had.lease and not want.lease))
        self.present[scope_id] = want
        return HostChanges(tuple(steps), () if want.gated else _announced(want, want.announce if opened else new))

    def enforce_flows(self, namespace: str, old: Scope | None, new: Scope, *, revoked: bool) -> bool:
        self.did.append(f"flows {old.revision if old else None} {new.revision}")
        self.told_revoked.append(revoked)
        return self.revoked

    def missing_helpers(self, helpers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(it for it in helpers if it in self.without_helpers)

    def look(self, scope_id: str, want: Want, known: Ruleset | None) -> Have:
        nics = {it.segment.nic for it in want.ports}
        links = {it: HostLink(name=it, up=True) for it in nics}
        return Have(scope_id=scope_id, namespace=want.namespace, host_links=links)

    def changed_rulesets(self, scope_ids: Sequence[str]) -> list[str]:
        self.counted.append(list(scope_ids))
        self._raise("count")
        return [it for it in scope_ids if it in self.changed]

    def renewed(self, scope_id: str) -> None:
        self.did.append(f"renewed {scope_id}")

    def tidy(self) -> tuple[Step, ...]:
        self.did.append("tidy")
        self._raise("tidy")
        removed, self.unused = self.unused, []
        return tuple(map(RemoveHostPort, removed))

    def let_through(self) -> tuple[str, ...]:
        self._raise("let through")
        done, self.blocking_changes = self.blocking_changes, ()
        return done

    def blocked(self, ports: tuple[Port, ...], *, seen_within_s: float = 0.0) -> list[str]:
        self._raise("blocked")
        bridges = {it.segment.bridge for it in ports}
        return [it for it in self.blocking if it.split()[0] in bridges]

    def bridges_with_vms(self) -> frozenset[str]:
        return frozenset(self.with_vms)

    def await_shared_links(self) -> None:
        pass

    def namespace_exists(self, namespace: str) -> bool:
        return namespace in self.named | {want.namespace for want in self.present.values()}

    def hide_heartbeats(self, is_member: bool) -> None:
        self.hides_heartbeats = is_member

    def look_for_gateways(self, want: Want) -> None:
        self.looked_for |= {it.via for it in want.routes if it.via}

    def announcements(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        return _announced(want, want.announce)

    def send_arp(self, announcements: tuple[Announcement, ...]) -> None:
        self.arp.append((self._clock.time(), [it.address for it in announcements]))

    def announce(self, announcements: tuple[Announcement, ...]) -> Callable[[], None]:
        self.send_arp(announcements)
        return lambda: self.did.append("announced")

    def serves(self, want: Want) -> bool:
        return any(it.namespace == want.namespace and not it.gated for it in self.present.values())

    def close_gate(self, scope_id: str, want: Want) -> None:
        self.did.append(f"close {scope_id}")
        self.present[scope_id] = replace(want, gated=True)

    def open_gate(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        self.did.append(f"open {scope_id}")
        self.present[scope_id] = want = replace(want, gated=False)
        return _announced(want, want.announce)

    def occupied(self, scope_id: str, want: Want, timeout_s: float, claim: bytes) -> Occupied:
        self.did.append(f"ask {scope_id}")
        asked = {it.ip for it in want.announce}
        self.asked.append(asked)
        heard = ({it: at[it] for it in asked & at.keys()} for at in (self.owners, self.probing, self.unknown))
        return Occupied(*heard)

    def claim_wires(self, scope_id: str, want: Want) -> frozenset[ClaimWire]:
        carriers = {it.segment.nic + it.segment.vlan for it in want.ports}
        return frozenset(ClaimWire(it, 1, "02:00:00:00:00:01") for it in carriers)

    def anybody_answers(self, scope_id: str, want: Want, timeout_s: float) -> bool | None:
        (port,) = want.ports
        self.did.append(f"neighbours of {port.link}")
        return self.answering

    def neighbours(self, want: Want) -> FakeNeighbours:
        return FakeNeighbours(self, want)

    def read_flows(self, namespace: str) -> Listing:
        listing = Listing()
        listing.records = list(self.flows[namespace])
        return listing

    def changed_flows(self, namespace: str, before: Listing) -> Difference:
        return difference(before.records, self.flows[namespace])

    def reset_connections(self, namespace: str) -> None:
        self.did.append(f"reset {namespace}")

    def copy_flows(self, namespace: str, create: list[Record], delete: list[Record]) -> Created:
        gone = {*delete, *create}
        self.flows[namespace] = [it for it in self.flows[namespace] if it not in gone] + create
        return Created(len(create))

    def _raise(self, what: str) -> None:
        if self._errors[what]:
            raise self._errors[what].popleft()


class FakeNeighbours:
    def __init__(self, host: FakeHost, want: Want) -> None:
        self._host = host
        self._want = want
        host.open_neighbours += 1

    def anybody_answers(self, timeout_s: float) -> bool | None:
        return self._host.anybody_answers("", self._want, timeout_s)

    def close(self) -> None:
        self._host.open_neighbours -= 1


class FakeSockets:
    """The frames that the simulated host sends, each with its link. ``on_send`` gets each of them."""

    def __init__(self, heard: Callable[[ClaimWire, bytes], None], lost: Callable[[ClaimWire], None]) -> None:
        self.heard = heard
        self.lost = lost
        self.followed: frozenset[ClaimWire] = frozenset()
        self.sent: list[tuple[ClaimWire, bytes]] = []
        self.on_send: Callable[[ClaimWire, bytes], None] = lambda wire, payload: None

    def follow(self, wires: Iterable[ClaimWire]) -> list[str]:
        self.followed = frozenset(wires)
        return []

    def send(self, wire: ClaimWire, payload: bytes) -> None:
        self.sent.append((wire, payload))
        self.on_send(wire, payload)


class FakeServices:
    """The processes of the simulated host: the scopes that have some.

    ``failed``: the services that fail as long as they are in this list. ``asked``: what the calls waited for.
    """

    def __init__(self, did: list[str]) -> None:
        self._did = did
        self.failed: list[ServiceFailure] = []
        self.asked: list[frozenset[Served] | None] = []
        self.of: dict[str, str] = {}  # scope id to namespace

    def converge(
        self, scope: Scope, namespace: str, asked: frozenset[Served] | None = None, *, settled: bool = False
    ) -> list[str]:
        self._did.append(f"services {scope.scope_id}")
        self.asked.append(asked)
        if self.failed:
            raise ServicesFailed(self.failed, [])
        started = [] if scope.scope_id in self.of else ["start dns"]
        self.of[scope.scope_id] = namespace
        return started

    def stop(self, scope_id: str) -> list[str]:
        return ["stop dns"] if self.of.pop(scope_id, None) is not None else []

    def renew(self, scope_id: str) -> None:
        self._did.append(f"renew {scope_id}")

    def scopes(self) -> set[str]:
        return set(self.of)

    def waiting(self, scope_id: str) -> dict[int, str]:
        return {}

    def limited(self, scope: Scope, namespace: str) -> list[str]:
        return []

    def revive_backends(self, scope: Scope) -> None:
        self._did.append(f"revive backends {scope.scope_id}")

    def privileged(self, scope_id: str) -> list[str]:
        return []

    def unserved(self, scope: Scope, namespace: str) -> list[str]:
        return []

    def running(self, scope_id: str) -> dict[str, int]:
        return {"dns": 1} if scope_id in self.of else {}

    def crashes(self, scope_id: str) -> dict[str, int]:
        return {}

    def guest_process(self) -> tuple[int, int]:
        return 2, 0


class FakeWatcher:
    """The watches of the simulated host. ``watched``: what each scope's events would be compared with."""

    def __init__(self, did: list[str]) -> None:
        self._did = did
        self.watched: dict[str, Want] = {}
        self.done: list[str] = []
        self.error: HostRefused | None = None

    def open(self) -> None:
        self._did.append("open")
        if self.error is not None:
            raise self.error

    def watch(self, scope_id: str, want: Want) -> None:
        self._did.append(f"watch {scope_id}")
        self.watched[scope_id] = want

    def unwatch(self, scope_id: str) -> None:
        self.watched.pop(scope_id, None)

    def work_done(self, scope_id: str) -> None:
        self.done.append(scope_id)


def _announced(want: Want, addresses: Iterable[Address]) -> tuple[Announcement, ...]:
    return tuple(Announcement(want.namespace, it.link, it.ip, "") for it in addresses)


class FakeStore(Store):
    """State files in memory. ``unreadable`` lists scopes whose file is broken; while ``full``, nothing can be saved.

    While ``unflushed``, a change is made and may not last.
    """

    def __init__(self, did: list[str]) -> None:
        self._did = did
        self.files: dict[str, Scope] = {}
        self.retired: set[str] = set()
        self.unreadable: set[str] = set()
        self.full = False
        self.unflushed = False
        self.doubtful: set[str] = set()
        self.loads = 0
        self.went: dict[str, Moved] = {}
        self.record = HostRecord()

    def living(self) -> list[str]:
        return sorted(self.files.keys() | self.unreadable)

    def ended(self) -> list[str]:
        return sorted(self.retired)

    def load(self, scope_id: str) -> Scope | None:
        self.loads += 1
        if scope_id in self.unreadable or self.unflushed:
            raise Unreadable(f"state file {scope_id}.json cannot be read")
        self.doubtful.discard(scope_id)
        return self.files.get(scope_id)

    def unsettled(self, scope_id: str) -> bool:
        return scope_id in self.doubtful

    def _flush(self, scope_id: str) -> None:
        if self.unflushed:
            self.doubtful.add(scope_id)
            raise HostRefused("a power failure may undo that")

    def save(self, scope: Scope) -> None:
        self._did.append(f"save {scope.scope_id}")
        if self.full:
            raise HostRefused(f"state file {scope.scope_id}.json cannot be written: No space left on device")
        self.files[scope.scope_id] = scope
        self.retired.discard(scope.scope_id)
        self._flush(scope.scope_id)
        self.on_saved(scope, self.encoded(scope))

    def retire(self, scope_id: str) -> None:
        self._did.append(f"retire {scope_id}")
        if self.files.pop(scope_id, None) is not None:
            self.retired.add(scope_id)
        self._flush(scope_id)
        self.on_retired(scope_id)

    def forget(self, scope_id: str) -> None:
        self._did.append(f"forget {scope_id}")
        self.retired.discard(scope_id)

    def moved(self) -> dict[str, Moved]:
        return dict(self.went)

    def save_moved(self, scope_id: str, moved: Moved) -> None:
        self.went[scope_id] = moved

    def forget_moved(self, scope_id: str) -> None:
        self.went.pop(scope_id, None)

    def host_record(self) -> HostRecord:
        return self.record

    def save_host_record(self, record: HostRecord) -> None:
        self.record = record


class FakeEngine:
    """Whose turn it is in each group: as the test says. ``local`` is what the agent said of itself.

    ``promises``: another member promises to dissolve a group when it is asked. ``forgotten``: groups.
    """

    def __init__(self) -> None:
        self.groups: dict[str, GroupView] = {}
        self.promises = True
        self.forgotten: list[str] = []
        self.local: dict[str, Local] = {}
        self.wires: dict[str, dict[ClaimWire, int]] = {}
        self.suspected: list[int] = []
        self.answers: list[tuple[int, bool | None]] = []
        self.time = 100.0
        self.votes: list[float] = []  # of the upstream: when it was asked

    def now(self) -> float:
        return self.time

    def upstream_answered(self, group_id: str, asked_at: float) -> None:
        self.votes.append(asked_at)

    def views(self) -> Mapping[str, GroupView]:
        return self.groups

    def set_group(self, spec: GroupSpec, me: str) -> None:
        self.groups[spec.group_id] = GroupView(
            spec=spec,
            me=me,
            term=0,
            active=spec.first.name,
            released=False,
            serves=spec.first.name == me,
            lease_s=1.0,
            heard={},
            partner_ready=True,
            last=None,
        )

    def dissolve(self, group_id: str) -> None:
        if self.promises:
            self.groups[group_id] = replace(self.groups[group_id], dissolved=True)

    def continue_alone(self, group_id: str) -> None:
        view = self.groups[group_id]
        self.groups[group_id] = replace(
            view, term=view.term + 1, active=view.me, released=False, serves=True, dissolved=True
        )

    def forget_group(self, group_id: str) -> None:
        del self.groups[group_id]
        self.forgotten.append(group_id)

    def set_local(self, group_id: str, local: Local) -> None:
        self.local[group_id] = local

    def set_wires(self, group_id: str, wires: Mapping[ClaimWire, int]) -> None:
        self.wires[group_id] = dict(wires)

    def suspect(self, group_id: str, segment: int) -> None:
        self.suspected.append(segment)

    def answered(self, group_id: str, segment: int, answer: bool | None) -> None:
        self.answers.append((segment, answer))


class FakeFlows:
    """The connections of the simulated host, as the standby sees them. ``did``: what the standby did with them."""

    def __init__(self) -> None:
        self.did: list[tuple[Any, ...]] = []
        self.followed: frozenset[str] = frozenset()
        self.listed: dict[str, list[Record]] = defaultdict(list)
        self.changed: Callable[[str, list[Record], list[Record]], None] = lambda *_: None
        self.gap: Callable[[frozenset[str]], None] = lambda _: None

    def source(
        self, changed: Callable[[str, list[Record], list[Record]], None], gap: Callable[[frozenset[str]], None]
    ) -> FakeFlows:
        self.changed, self.gap = changed, gap
        return self

    def follow(self, wanted: Iterable[str]) -> None:
        fresh = frozenset(wanted) - self.followed
        self.followed = frozenset(wanted)
        if fresh:
            self.gap(fresh)

    async def listing(self, namespace: str) -> AsyncIterator[list[Record]]:
        if self.listed[namespace]:
            yield list(self.listed[namespace])

    def change(self, namespace: str, create: list[Record], delete: list[Record]) -> None:
        self.did.append(("change", namespace, create, delete))

    def begin(self, namespace: str, token: int) -> None:
        self.did.append(("begin", namespace))

    def end(self, namespace: str, token: int) -> None:
        self.did.append(("end", namespace))

    def flush(self, namespace: str) -> None:
        self.did.append(("flush", namespace))

    def serve(self, namespace: str) -> None:
        self.did.append(("serve", namespace))


class FakePairs:
    """The connection to the other host of each group. ``cut`` and ``connect`` change it; ``sent`` has all messages."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._peer: FakePairs | None = None
        self._groups: tuple[str, ...] = ()
        self.sent: list[PairMessage] = []
        self.dropped: tuple[type[Any], ...] = ()  # messages of these types are lost

    def set_groups(self, specs: Iterable[tuple[GroupSpec, str]]) -> None:
        self._groups = tuple(spec.group_id for spec, _ in specs)

    def connected(self, group_id: str) -> bool:
        return self._peer is not None

    def send(self, group_id: str, message: PairMessage) -> bool:
        if self._peer is None:
            return False
        self.sent.append(message)
        if not isinstance(message, self.dropped):
            self._agent.clock.activity += 1
            received = pairwire.decode(pairwire.encode(message))
            receiver = self._peer
            asyncio.get_running_loop().call_soon(receiver.receive, group_id, received)
        return True

    async def drained(self, group_id: str) -> bool:
        return self._peer is not None

    def receive(self, group_id: str, message: PairMessage | None) -> None:
        assert message is not None
        if self._peer is not None:
            self._agent.standbys.pair_received(group_id, message)

    def connect(self, peer: FakePairs) -> None:
        self._peer, peer._peer = peer, self
        for it in (self, peer):
            for group_id in it._agent.engine.groups:
                it._agent.standbys.pair_connected(group_id)

    def cut(self) -> None:
        peer = self._peer
        assert peer is not None
        self._peer = peer._peer = None
        for it in (self, peer):
            for group_id in it._agent.engine.groups:
                it._agent.standbys.pair_lost(group_id)


class FakeLog(Log):
    """A log in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str, priority: int = 6) -> None:
        self.lines.append(text)


class Agent:
    """Scopes and Upkeep on a simulated host. ``restart`` is a new agent on the same host and state files."""

    def __init__(self, clock: FakeClock | None = None, name: str = "h1") -> None:
        self.clock = clock or FakeClock()
        self.name = name
        self.engine = FakeEngine()
        self.did: list[str] = []
        self.host = FakeHost(self.clock, self.did)
        self.services = FakeServices(self.did)
        self.store = FakeStore(self.did)
        self._tasks: list[asyncio.Task[Any]] = []
        self.numbers = itertools.count(1)
        self.restart()

    def restart(self) -> None:
        self.clock = self.clock.of_next_agent()
        self.did.clear()
        self.workers = FakeWorkers(self.clock)
        self.watcher = FakeWatcher(self.did)
        self.log = FakeLog()
        events = Events()
        actions = Actions(self.host, Path("/nonexistent"))
        self.scopes = Scopes(
            self.store,
            self.host,
            self.services,
            self.watcher,
            actions,
            events,
            self.log,
            self.clock,
            self.workers,
            roles := Roles(self.engine.views),
        )
        self.upkeep = Upkeep(self.scopes, self.host, self.services, self.watcher, self.log, self.clock)
        self.moves = Moves(self.scopes, self.upkeep, self.host, self.store, self.log, self.clock)
        self.claims = Claims(self.scopes, self.upkeep, self.host, self.log, self.clock, self._make_sockets)
        events.connect(self.upkeep)
        self.scopes.load()
        self.moves.resume()
        self.registration = REGISTRATION
        self.flows = FakeFlows()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # a test of what is stored: no group
        flows = FlowCopies(
            loop,
            self.log,
            self.upkeep.start_task,
            self.flows.source,
            lambda lost: self.flows,
        )
        self.standbys = Standbys(
            loop,
            self.engine,
            roles,
            self.scopes,
            self.upkeep,
            self.host,
            self.services,
            self.store,
            self.log,
            self.clock,
            flows,
        )
        self.pairs = FakePairs(self)
        self.standbys.connect(self.pairs)
        self.store.on_saved, self.store.on_retired = self.standbys.saved, self.standbys.retired

    def _make_sockets(
        self, heard: Callable[[ClaimWire, bytes], None], lost: Callable[[ClaimWire], None]
    ) -> FakeSockets:
        self.sockets = FakeSockets(heard, lost)
        return self.sockets

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something in the background. It is cancelled at the end of the test."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        return task

    def send(
        self, fixture: str, command: str, *, remaining_ms: int = 60_000, epoch: int = 0, **changes: object
    ) -> asyncio.Task[Reply]:
        """Start the call of a payload file. ``fixture`` is the number in its name; ``changes`` replace fields."""
        (file,) = PAYLOADS.glob(f"{fixture}-*.json")
        payload = json.loads(file.read_bytes())
        payload = (payload if command == "custom-action" else payload["payload"]) | changes
        for details in ("physical-network-extension-details", "network-extension-details"):
            payload.pop(details, None)
        call = Call(
            call_id=f"c{next(self.numbers)}",
            command=command,
            scope_id=f"net-{payload['network_id']}",
            registration=self.registration,
            payload=json.dumps(payload).encode(),
            remaining_ms=remaining_ms,
            epoch=epoch,
        )
        return self.start(self.scopes.execute(call))

    async def call(self, fixture: str, command: str, **changes: Any) -> Reply:
        """Send a call and return its reply."""
        return await self.send(fixture, command, **changes)

    async def live(self, *network_ids: str) -> None:
        """Build these networks, each with its source-NAT address. Then forget what was done and logged."""
        for number, network_id in enumerate(network_ids or ("204",)):
            vlan = str(1204 + number)
            assert (await self.call("020", "implement-network", network_id=network_id, vlan=vlan)).status == 0
            address = {"vlan": vlan, "public_ip": f"203.0.113.{20 + number}"}
            assert (await self.call("021", "assign-ip", network_id=network_id, **address)).status == 0
        await self.clock.advance(60)
        self.forget()

    def forget(self) -> None:
        """Forget what was done, logged and announced until now."""
        self.did.clear()
        self.log.lines.clear()
        self.host.arp.clear()
        self.watcher.done.clear()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def looks() -> Checks:
    """For ``Claims.run``, on a budget that suffices on any machine."""
    return Budget(share=1000.0).checks(LOOK_EVERY_S, LOOK_CPU_S)


def simulated(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that gets a simulated agent as its first argument."""

    async def run(**arguments: Any) -> None:
        agent = Agent()
        try:
            async with asyncio.timeout(_LIMIT_S):
                await test(agent, **arguments)
        finally:
            agent.close()

    def wrapped(**arguments: Any) -> None:
        asyncio.run(run(**arguments))

    functools.update_wrapper(wrapped, test)
    signature = inspect.signature(test)
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:], return_annotation=None
    )
    return wrapped
