"""The members of a group in simulated time, with every fault that a host and a network can have.

Each member has a clock of its own. The network loses, repeats, delays and reorders messages, and is cut in one
direction or both. Agents freeze, crash between any two effects, and lose power. The kernel's lease goes on while an
agent is frozen or dead, as on a real host. A host that serves without a lease serves for ever, also without power.

In a group without a witness both hosts ask the upstream all the time. It answers those who reach it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from netloom.standby.decision import Group, Kept, Local, Member, Says, Timing

GROUP = Group("a", "b", "w")
PAIR = Group("a", "b")
HOSTS = ("a", "b", "w")
PATHS = tuple(itertools.permutations(HOSTS, 2))
TIMING = Timing()
BEAT_S = 0.1
TIMER_LATE_S = 0.01  # an element of the kernel may live so much longer
LATE_S = 5.0  # of some messages, as if the sender had been frozen just before it sent them
DRIFT = 0.02
QUIET_S = 8.0  # after the last fault
ASK_S = 0.2  # between two questions to the upstream
HEAVY_LOSS, SILENT_S = 0.3, 0.3  # so much loss cuts a path for so long, now and then
SPLIT_S = 2.0  # two hosts may serve for so long after both reached the upstream without hearing each other

KINDS = (
    *("freeze", "crash", "power", "cut off", "deaf", "one way", "between", "crash at an effect"),
    *("not ready", "behind", "gives way", "dissolve"),
)
PAIR_KINDS = (*KINDS, "no upstream", "no upstream for one", "no upstream for one", "between")
Fault = tuple[float, str, int, float]  # the pause before it, its kind, where, how long


class Crash(Exception):
    """The agent dies here."""


@dataclass
class Message:
    sender: str
    boot: int
    seq: int
    sent: float
    echo_boot: int
    says: Says


@dataclass
class Answer:
    """The upstream answers a question. ``asked``: when, by the clock of the host."""

    boot: int
    asked: float


@dataclass
class Host:
    name: str
    rate: float
    offset: float
    disk: Kept = field(default_factory=lambda: Kept(active="a"))
    kernel_until: float = -math.inf  # real time at which the element is surely gone
    member: Member | None = None
    powered: bool = True
    boot: int = 0
    seq: int = 0
    frozen_until: float = -math.inf
    inbox: list[Message | Answer] = field(default_factory=list)
    heard: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # boot, seq, sent
    local: Local = field(default_factory=Local)
    crash_after: int = -1  # effects
    reached_at: float = -math.inf  # when the upstream was reached last while the other host was not heard, or not told

    def clock(self, real: float) -> float:
        return real * self.rate + self.offset

    def real(self, clock: float) -> float:
        return (clock - self.offset) / self.rate

    @property
    def alone(self) -> bool:
        return self.disk.active == self.name and not self.disk.released and self.disk.dissolved


class World:
    """Events in real time. ``two``: when two hosts served. ``gaps``: when nobody did, and who ended that.

    ``without_upstream``: who cannot reach it. ``split``: as ``two``, where nothing prevents that: both hosts reached
    the upstream and did not hear each other. Only in groups without a witness.
    """

    def __init__(
        self, seed: int, loss: float = 0.0, delay_s: float = 0.002, late: float = 0.0, *, group: Group = GROUP
    ) -> None:
        self.group = group
        self.names = tuple(filter(None, (group.first, group.second, group.witness)))
        self.paths = tuple(itertools.permutations(self.names, 2))
        self.chance = random.Random(seed)
        self.now = 0.0
        self.loss, self.delay_s, self.late = loss, delay_s, late
        self.hosts = {
            it: Host(it, 1 + self.chance.uniform(-DRIFT, DRIFT), self.chance.uniform(0, 1000)) for it in self.names
        }
        self.cut: set[tuple[str, str]] = set()
        self.without_upstream: set[str] = set()
        self.split: list[str] = []
        self._split_at = -math.inf
        self._passed_at = dict.fromkeys(self.paths, 0.0)  # when a message has arrived last
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.two: list[str] = []
        self.alone: set[str] = set()
        self.gaps: list[tuple[float, float, str]] = []
        self._served_until = 0.0
        for name in self.names:
            self.start(name)
            self.at(self.chance.uniform(0, BEAT_S), lambda name=name: self.beat(name))  # type: ignore[misc]
            if not group.witness:
                self.at(self.chance.uniform(0, ASK_S), lambda name=name: self.ask(name))  # type: ignore[misc]

    def at(self, after_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + after_s, next(self._count), what))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def run_for(self, s: float) -> None:
        self.run(self.now + s)

    @property
    def serving(self) -> list[str]:
        return [it.name for it in self.hosts.values() if it.alone or it.kernel_until > self.now]

    @property
    def term(self) -> int:
        return max(it.disk.term for it in self.hosts.values())

    # --------------------------------------------------------------------------------------------------------- hosts

    def start(self, name: str) -> None:
        """Start the agent, unless the host is without power or has one."""
        host = self.hosts[name]
        if not host.powered or host.member is not None:
            return
        host.boot += 1
        host.inbox.clear()
        host.heard.clear()
        host.member = Member(self.group, name, TIMING, host.disk, host.clock(self.now))
        self.step(host, lambda member: None)

    def crash(self, name: str) -> None:
        self.hosts[name].member = None

    def power(self, name: str, on: bool) -> None:
        host = self.hosts[name]
        if on and not host.powered:
            host.powered = True
            host.offset = -self.now * host.rate  # the clock begins again
            self.start(name)
        elif not on:
            host.powered = False
            host.member = None
            self._end_lease(host)

    def beat(self, name: str) -> None:
        self.at(BEAT_S * self.chance.uniform(0.9, 1.3), lambda: self.beat(name))
        host = self.hosts[name]
        if host.member is None or self.now < host.frozen_until:
            return
        if self.chance.random() < 0.5:
            self.read(host)
        if self.chance.random() < 0.1:
            self.step(host, lambda member: None, send=True)
        self.tick(host)
        self.read(host)

    def ask(self, name: str) -> None:
        """Ask the upstream. The thread that asks may run while that of the decision does not."""
        self.at(ASK_S * self.chance.uniform(0.9, 1.3), lambda: self.ask(name))
        host = self.hosts[name]
        if host.member is None or name in self.without_upstream or self.chance.random() < self.loss**3:  # three probes
            return
        if self._is_split():
            host.reached_at = self.now
            if min(it.reached_at for it in self.hosts.values()) > self.now - 1:
                self._split_at = self.now
        answer = Answer(host.boot, host.clock(self.now))
        self.at(self.chance.uniform(0, self.delay_s), lambda: self.answered(host, answer))

    def _is_split(self) -> bool:
        """Whether the hosts do not hear each other, one way or both: a path is cut, or has lost all for a while."""
        paths = ("a", "b"), ("b", "a")
        is_lossy = self.loss >= HEAVY_LOSS
        return any(it in self.cut or (is_lossy and self.now - self._passed_at[it] > SILENT_S) for it in paths)

    def answered(self, host: Host, answer: Answer) -> None:
        if host.member is None or host.boot != answer.boot:
            return
        if self.now < host.frozen_until:
            host.inbox.append(answer)
        else:
            self.step(host, lambda member: member.answered(host.clock(self.now), answer.asked))

    def tick(self, host: Host) -> None:
        member = host.member
        if member is not None and self.now >= host.frozen_until:
            self.step(host, lambda member: member.tick(host.clock(self.now), host.local), send=True)
            if 0 < (due_s := host.real(member.promised_until) - self.now) < BEAT_S:
                self.at(due_s + 0.0001, lambda: self.tick(host))

    def read(self, host: Host) -> None:
        """Read what has waited while the agent was frozen."""
        while host.inbox and host.member is not None:
            what = host.inbox.pop(self.chance.choice([0, -1]) if not self.group.witness else 0)
            if isinstance(what, Answer):
                self.answered(host, what)
            else:
                self.take(host, what)

    def step(self, host: Host, what: Callable[[Member], None], *, send: bool = False) -> None:
        """What a member decides is done, and then it sends."""
        member = host.member
        if member is None:
            return
        before = member.kept
        what(member)
        try:
            self._effects(host, member)
            if send or member.kept != before:
                for other in self.names:
                    if other != host.name:
                        self._effect(host)
                        self.send(host, member, other)
        except Crash:
            host.member = None
            self.at(self.chance.uniform(0, 2), lambda: self.start(host.name))

    def _effect(self, host: Host) -> None:
        if host.crash_after == 0:
            host.crash_after = -1
            raise Crash
        host.crash_after -= host.crash_after > 0

    def _effects(self, host: Host, member: Member) -> None:
        """A crash may come before each effect."""
        if member.kept != host.disk:
            self._effect(host)
            host.disk = member.kept
            if host.alone:
                self.alone.add(host.name)
                self._serves(host, math.inf)
        if not member.may_serve:
            if host.kernel_until > self.now:
                self._effect(host)
            self._end_lease(host)
        elif (until := host.real(member.lease_until)) > max(self.now, host.kernel_until - TIMER_LATE_S):
            self._effect(host)
            host.kernel_until = until + TIMER_LATE_S
            self._serves(host, host.kernel_until)

    def _serves(self, host: Host, until: float) -> None:
        if self.now > self._served_until:
            self.gaps.append((self._served_until, self.now, host.name))
        self._served_until = max(self._served_until, until)
        if len(self.serving) > 1:
            where = self.split if self.now - self._split_at < SPLIT_S else self.two
            where.append(f"{self.now:.3f}: {self.hosts['a'].disk}, {self.hosts['b'].disk}")

    def _end_lease(self, host: Host) -> None:
        if host.kernel_until > self.now:
            host.kernel_until = -math.inf
            if not self.serving:
                self._served_until = self.now

    # ------------------------------------------------------------------------------------------------------- messages

    def send(self, host: Host, member: Member, to: str) -> None:
        host.seq += 1
        boot, _, sent = host.heard.get(to, (0, 0, -1.0))
        clock = host.clock(self.now)
        message = Message(host.name, host.boot, host.seq, clock, boot, member.says(clock, sent))
        for _ in range(1 + (self.chance.random() < 0.05)):
            if self.chance.random() >= self.loss:
                delay_s = LATE_S if self.chance.random() < self.late else self.delay_s
                self.at(self.chance.uniform(0, delay_s), lambda: self.deliver(to, message))

    def deliver(self, to: str, message: Message) -> None:
        host = self.hosts[to]
        if (message.sender, to) in self.cut or host.member is None:
            return
        self._passed_at[message.sender, to] = self.now
        if self.now < host.frozen_until:
            host.inbox.append(message)
        else:
            self.take(host, message)

    def take(self, host: Host, message: Message) -> None:
        boot, seq, sent = host.heard.get(message.sender, (0, 0, -1.0))
        if message.boot < boot or (message.boot == boot and message.seq <= seq and self.chance.random() < 0.5):
            return  # half of those that were overtaken are heard, as if their number did not matter
        if message.boot > boot or message.sent > sent:
            host.heard[message.sender] = message.boot, message.seq, message.sent
        says = message.says if message.echo_boot == host.boot else replace(message.says, heard_at=-1.0)
        self.step(host, lambda member: member.hear(host.clock(self.now), message.sender, says))

    # --------------------------------------------------------------------------------------------------------- faults

    def fault(self, kind: str, where: int, s: float) -> None:
        """Begin a fault that lasts ``s`` seconds."""
        name = self.names[where % len(self.names)]
        host = self.hosts[name]
        match kind:
            case "freeze":
                host.frozen_until = self.now + s
            case "crash":
                self.crash(name)
                self.at(s, lambda: self.start(name))
            case "power":
                self.power(name, False)
                self.at(s, lambda: self.power(name, True))
            case "cut off":
                self.part({it for it in self.paths if name in it}, s)
                self.without_upstream_for({name}, s)
            case "deaf":
                self.part({it for it in self.paths if it[1] == name}, s)
            case "one way":
                self.part({self.paths[where % len(self.paths)]}, s)
            case "between":
                path = self.paths[where % len(self.paths)]
                self.part({path, path[::-1]}, s)
            case "no upstream":
                self.without_upstream_for(self.names, s)
            case "no upstream for one":
                self.without_upstream_for({name}, s)
            case "not ready":
                self.set_local(name, s, ready=False)
            case "behind":
                self.set_local(name, s, behind=True)
            case "gives way":
                self.set_local(name, s, gives_way=True)
            case "dissolve":
                self.step(host, Member.dissolve)
            case "crash at an effect":
                host.crash_after = where
            case _:
                raise AssertionError(kind)

    def set_local(self, name: str, s: float, **changes: bool) -> None:
        host = self.hosts[name]
        host.local = replace(host.local, **changes)
        self.at(s, lambda: setattr(host, "local", replace(host.local, **{it: it == "ready" for it in changes})))

    def part(self, paths: Iterable[tuple[str, str]], s: float) -> None:
        paths = set(paths)
        self.cut |= paths
        self.at(s, lambda: self.cut.difference_update(paths))

    def without_upstream_for(self, names: Iterable[str], s: float) -> None:
        names = set(names)
        self.without_upstream |= names
        self.at(s, lambda: self.without_upstream.difference_update(names))


def play(faults: Iterable[Fault], seed: int, loss: float, delay_s: float, group: Group = GROUP) -> World:
    """Faults with the pauses between them, and then a time without any."""
    world, ends = World(seed, loss, delay_s, late=0.02, group=group), 0.0
    world.run(2.0)
    for pause_s, kind, where, s in faults:
        world.run_for(pause_s)
        world.fault(kind, where, s)
        ends = max(ends, world.now + s)
    world.run(ends + 2)
    world.loss = world.late = 0.0
    for host in world.hosts.values():
        host.crash_after = -1
    world.run_for(QUIET_S)
    return world
