"""The engine: one thread that sends and hears heartbeats, decides who serves, and renews the leases in the kernel.

It is synchronous and has its own sockets, so that neither the event loop nor other workers delay it. Ten times a second
each group has a tick: the decision looks at the time, leases are renewed in one transaction, and a message is sent to
the other members. In between, messages are heard. What is urgent is sent at once: a vote, a new term, a turn that is
given away.

Its clock is CLOCK_BOOTTIME, which also runs while all processes are stopped and while the machine sleeps.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.log import Log
from netloom.agent.standby.group_file import Contents, GroupFile, Record, check
from netloom.agent.standby.member import NANOSECONDS, GroupMember, GroupView, LeaseTable, Surroundings
from netloom.agent.standby.sockets import HeartbeatSockets, Waker, family_of
from netloom.agent.standby.ticks import TICK_S, Ticks
from netloom.errors import HostRefused
from netloom.heartbeatwire import BOOT_BYTES, group_of, unpack
from netloom.standby.decision import Kept, Local
from netloom.standbywire import GroupSpec

T = TypeVar("T")

HURRY_TICK_S = 0.02  # while the other host may just have died
GATHER_S = 0.001  # within this time after a message its copies come on the other paths
_ANSWER_S = 60.0


def boottime_ns() -> int:
    """The clock of leases and promises."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Engine:
    """The groups of this host, in the file ``standby.json`` of ``directory``.

    ``changed`` is called with the id of a group after each change of its term, its active host or ``released``, and
    when a lease of this host begins or ends, or a segment falls silent or is heard again. It is called in the engine's
    thread, so it must not wait.
    ``refused``: why the file cannot be read; then no group is served, and the file is left unchanged.
    """

    def __init__(
        self,
        directory: Path,
        log: Log,
        changed: Callable[[str], None],
        leases: LeaseTable,
        *,
        clock_ns: Callable[[], int] = boottime_ns,
    ) -> None:
        self.refused: HostRefused | None = None
        self._log = log
        self._changed = changed
        self._leases = leases
        self._clock_ns = clock_ns
        self._boot = b""  # random bytes of each start
        self._file = GroupFile(directory)
        self._contents = Contents()
        self._members: dict[str, GroupMember] = {}  # replaced as a whole
        self._wires: dict[str, dict[ClaimWire, int]] = {}
        self._ticks = Ticks(self._now())
        self._turn = threading.Lock()  # of the thread, and of the inbox while there is none
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._inbox: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._waker = Waker()
        self._sockets: HeartbeatSockets | None = None
        self._bug_at = -1.0
        try:
            self._contents = self._file.load()
        except HostRefused as error:
            self.refused = error  # guard: an-unreadable-file-serves-nothing
            log.line(f"standby: {error}; no group is served")

    # ----------------------------------------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller. A lease goes on as it is, unless its turn is over.

        When this returns, ``views`` has the groups of the file.
        """
        with self._turn:
            self._is_stopping = False
            self._boot = os.urandom(BOOT_BYTES)
            self._begin()
            self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread. Leases and the file stay as they are."""
        with self._turn:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._is_stopping = True
            self._waker.wake()
            thread.join()
            self._take_inbox()

    def views(self) -> Mapping[str, GroupView]:
        """What is known about each group when it is looked up. Waits for nobody; the groups stay the same."""
        return _Views(self._members, self._now)

    def set_group(self, spec: GroupSpec, me: str) -> None:
        """This host, ``me``, is a member of the group; that is on disk when this returns.

        A group that is known may have other addresses, and nothing else may differ. Raises HostRefused.
        """
        check(spec, me)
        self._do(lambda: self._set_group(spec, me))

    def forget_group(self, group_id: str) -> None:
        """This host is no member of the group any more, for good: the same group cannot be set again. A lease in the
        kernel is not renewed. Raises HostRefused."""
        self._do(lambda: self._forget_group(group_id))

    def dissolve(self, group_id: str) -> None:
        """Ask the other members to dissolve the group, if this host is the active one. ``views`` tells when it is done.

        One of them is enough. The scopes of the group should leave it then."""
        self._post(lambda: self._dissolve(group_id))

    def continue_alone(self, group_id: str) -> None:
        """An operator says that the other host of the group is off: this one serves alone from now on, and the group is
        dissolved. ``views`` tells when it is done. Nothing happens while the other host is heard."""
        self._post(lambda: self._tell(group_id, lambda it, now: it.continue_alone(now)))

    def set_local(self, group_id: str, local: Local) -> None:
        """What this host knows about itself; its effect, such as giving the turn away, begins at once.

        For one thread. The same again wakes up nobody."""
        member = self._members.get(group_id)
        if member is not None and member.told != local:  # guard: only-news-wake-the-engine
            member.told = local
            self._post(lambda: self._set_local(group_id, local))

    def set_wires(self, group_id: str, wires: Mapping[ClaimWire, int]) -> None:
        """The links on which the heartbeats of the group travel, beside UDP, each with the number of its segment.

        The numbers are the same at both hosts, and not 0; there are at most ``heartbeatwire.SEGMENTS_MAX``.
        """
        self._post(lambda: self._set_wires(group_id, dict(wires)))

    def suspect(self, group_id: str, segment: int) -> None:
        """A link of the segment does not work any more: both hosts ask their neighbours there at once."""
        self._post(lambda: self._tell(group_id, lambda it, now: it.suspect(segment, now)))

    def answered(self, group_id: str, segment: int, answer: bool | None) -> None:
        """Whether neighbours on the segment answer this host; None: there is nobody to ask. Holds for a short time."""
        self._post(lambda: self._tell(group_id, lambda it, now: it.answered(segment, answer, now)))

    def upstream_answered(self, group_id: str, asked_at: float) -> None:
        """The upstream has answered a question of this host, asked at this time of ``now``. For a group without a
        witness: there it has the second vote."""
        self._post(lambda: self._tell(group_id, lambda it, now: it.upstream_answered(asked_at, now)))

    def now(self) -> float:
        """The clock of the leases, in seconds."""
        return self._now()

    def _post(self, what: Callable[[], object]) -> Future[object]:
        done: Future[object] = Future()
        self._inbox.append((what, done))
        self._waker.wake()
        return done

    def _do(self, what: Callable[[], T]) -> T:
        """Run in the engine's thread, or here while there is none. Raises HostRefused."""
        with self._turn:
            if self._thread is None or not self._thread.is_alive():
                return what()
            results: list[T] = []
            done = self._post(lambda: results.append(what()))
        try:
            done.result(_ANSWER_S)
        except FutureTimeout as error:
            raise HostRefused("the agent's heartbeats hang: the host's disk may not answer") from error
        return results[0]

    # ------------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._sockets = HeartbeatSockets(selector, self._received, self._log)
            selector.register(self._waker, selectors.EVENT_READ, lambda _: self._waker.clear())
            try:
                self._follow()
                self._ticks = Ticks(self._now())
                while not self._is_stopping:
                    try:
                        self._round(selector)
                    except Exception as error:  # noqa: BLE001, leases of other groups must not end by it
                        self._bug(error)
                        self._ticks = Ticks(self._now() + TICK_S)
            except Exception as error:  # noqa: BLE001, the thread's last words
                self._log.traceback("standby", error)
            finally:
                self._sockets.close()
                self._sockets = None

    def _begin(self) -> None:
        """Become a member of the groups in the file, with what is left of their leases."""
        now = self._now()
        try:
            alive = dict(self._leases.alive())
        except HostRefused as error:
            self._log.line(f"standby: the leases in the kernel cannot be read: {error}")
            alive = {it.spec.mark: it.spec.lease_ms / 1000 for it in self._contents.groups}
        around = Surroundings(self._leases, self._log, self._save)
        self._members = {
            it.spec.group_id: GroupMember(it, self._boot, around, now, lease_s=alive.get(it.spec.mark, 0.0))
            for it in self._contents.groups
        }

    def _round(self, selector: selectors.BaseSelector) -> None:
        """Wait, and do what has come or is due."""
        now = self._now()
        hurried = any(it.is_hurried(now) for it in self._members.values())
        due = min(self._ticks.due, now + HURRY_TICK_S) if hurried else self._ticks.due
        if selector.select(max(0.0, due - now) if self._members else None):
            time.sleep(GATHER_S)  # most of what a message costs is to wake up for it
            for key, _ in selector.select(0):
                key.data(self._now())
        self._take_inbox()
        now = self._now()
        members = list(self._members.values())
        if self._ticks.begin(now):
            assert self._sockets is not None
            self._sockets.look(now)
            for it in members:
                it.tick(now)
            self._renew(members)
            self._send(members)
        elif hurried:
            hasty = [it for it in members if it.is_hurried(now)]
            for it in hasty:
                it.tick(now)
            self._send(it for it in hasty if it.wants)
        self._urgent()

    def _urgent(self) -> None:
        """Do at once what cannot wait for the next tick."""
        now = self._now()
        members = list(self._members.values())
        self._renew(it for it in members if it.is_short(now))
        self._send(it for it in members if it.is_urgent)
        for it in members:
            if it.is_changed:
                it.is_changed = False
                self._changed(it.spec.group_id)

    def _received(self, data: bytes, wire: ClaimWire | None) -> None:
        """A message that came from anybody. What it changes in the kernel is done at the end of the round, or now."""
        member = self._members.get(group_of(data) or "")
        if member is None:
            return
        segment = self._wires.get(member.spec.group_id, {}).get(wire, 0) if wire is not None else None
        for latest, beat in member.latest.values():
            if data == latest:  # most are copies, on another path
                member.hear_copy(beat, self._now(), segment)
                return
        heard = unpack(data, member.key)
        if heard is not None:
            member.latest[heard.sender] = data, heard
            self._ticks.heard(self._now())
            member.hear(heard, self._clock_ns(), segment)

    def _send(self, members: Iterable[GroupMember]) -> None:
        assert self._sockets is not None
        for it in members:
            message = it.message(self._clock_ns())
            if message is None:
                continue
            for at, host in enumerate(it.spec.hosts):
                if at != it.me:
                    self._sockets.send(host, message)
            for wire in self._wires.get(it.spec.group_id, ()):
                self._sockets.broadcast(wire, message)

    def _renew(self, members: Iterable[GroupMember]) -> None:
        """Renew the leases in the kernel, never beyond what the decision says."""
        now = self._now()
        wanted = {it: until for it in members if (until := it.wanted_until(now)) is not None}
        if not wanted:
            return
        for it, until in wanted.items():
            it.renewing(until)
        at = time.monotonic()  # before the look at the other clock: if the thread is stopped in between, it is shorter
        now = self._now()
        try:
            self._leases.renew({it.spec.mark: until - now for it, until in wanted.items()}, at)
        except HostRefused as error:
            for it in wanted:
                it.not_renewed(error)
        else:
            for it, until in wanted.items():
                it.renewed(until, now)

    # ------------------------------------------------------------------------------------------------------- the inbox

    def _take_inbox(self) -> None:
        while self._inbox:
            what, done = self._inbox.popleft()
            try:
                what()
            except HostRefused as error:
                done.set_exception(error)
            except BaseException as error:
                done.set_exception(error)
                raise
            else:
                done.set_result(None)

    def _set_group(self, spec: GroupSpec, me: str) -> None:
        if self.refused is not None:
            raise self.refused
        group_id = spec.group_id
        if group_id in self._contents.forgotten:
            raise HostRefused(f"group {group_id}: this host has left it", hint="make another group")
        known = next((it for it in self._contents.groups if it.spec.group_id == group_id), None)
        if known is None:
            record = Record(spec=spec, me=me, kept=Kept(active=spec.first.name))
        else:
            same = replace(known.spec, first=spec.first, second=spec.second, witness=spec.witness)
            if same != spec or known.spec.names != spec.names or known.me != me:
                raise HostRefused(f"group {group_id}: a group never changes", hint="make another group")
            if known.spec == spec:
                return
            record = replace(known, spec=spec)
        try:
            self._save(record)
        except OSError as error:
            raise self._file.refusal(error) from error
        if self._sockets is not None:
            if known is None:
                around = Surroundings(self._leases, self._log, self._save)
                self._members = self._members | {group_id: GroupMember(record, self._boot, around, self._now())}
                self._log.line(f"standby {group_id}: this host is a member, as {me}")
            else:
                self._members[group_id].set_spec(spec)
            self._follow()

    def _forget_group(self, group_id: str) -> None:
        if self.refused is not None:
            raise self.refused
        left = tuple(it for it in self._contents.groups if it.spec.group_id != group_id)
        if len(left) == len(self._contents.groups):
            return
        try:
            self._replace(replace(self._contents, groups=left, forgotten=(*self._contents.forgotten, group_id)))
        except OSError as error:
            raise self._file.refusal(error) from error
        self._members = {it: member for it, member in self._members.items() if it != group_id}
        self._wires.pop(group_id, None)
        if self._sockets is not None:
            self._follow()

    def _dissolve(self, group_id: str) -> None:
        member = self._members.get(group_id)
        if member is not None:
            member.dissolve()

    def _set_local(self, group_id: str, local: Local) -> None:
        member = self._members.get(group_id)
        if member is not None:
            member.set_local(local, self._now())

    def _tell(self, group_id: str, what: Callable[[GroupMember, float], None]) -> None:
        member = self._members.get(group_id)
        if member is not None:
            what(member, self._now())

    def _set_wires(self, group_id: str, wires: dict[ClaimWire, int]) -> None:
        if group_id in self._members and self._wires.get(group_id, {}) != wires:
            self._wires[group_id] = wires
            self._members[group_id].set_segments(wires.values(), self._now())
            self._follow()

    def _follow(self) -> None:
        """Listen where the members of this host's groups are heard."""
        assert self._sockets is not None
        hosts = [(it.spec.hosts[it.me].port, host) for it in self._members.values() for host in it.spec.hosts]
        ports = {(family_of(host.address), port) for port, host in hosts}
        self._sockets.follow(ports, {wire for it in self._wires.values() for wire in it}, self._now())

    def _save(self, record: Record) -> None:
        """Write one group to disk. Raises OSError."""
        groups = {it.spec.group_id: it for it in self._contents.groups} | {record.spec.group_id: record}
        self._replace(replace(self._contents, groups=tuple(groups.values())))

    def _replace(self, contents: Contents) -> None:
        self._file.save(contents)
        self._contents = contents

    def _now(self) -> float:
        return self._clock_ns() / NANOSECONDS

    def _bug(self, error: Exception) -> None:
        now = self._now()
        if now >= self._bug_at:
            self._log.traceback("standby", error)
            self._bug_at = now + 10
        time.sleep(HURRY_TICK_S)  # it may come back at once


class _Views(Mapping[str, GroupView]):
    """The views of some members, each made when it is looked up: most callers want one of many."""

    def __init__(self, members: Mapping[str, GroupMember], now: Callable[[], float]) -> None:
        self._members = members
        self._now = now

    def __getitem__(self, group_id: str) -> GroupView:
        return self._members[group_id].view(self._now())

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
