"""The members of a group without threads, sockets and kernel: their clock is advanced by hand."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from netloom.agent.log import Log
from netloom.agent.standby.group_file import Record
from netloom.agent.standby.member import NANOSECONDS, GroupMember, GroupView, Surroundings
from netloom.errors import HostRefused
from netloom.files import NotFlushed
from netloom.heartbeatwire import Beat, key_of, unpack
from netloom.secret import Secret
from netloom.standby.decision import Kept, Local
from netloom.standbywire import GroupHost, GroupSpec

SPEC = GroupSpec(
    group_id="0000002a",
    owner="netloom/phys-1",
    first=GroupHost(name="kvm1", address="192.0.2.1"),
    second=GroupHost(name="kvm2", address="192.0.2.2"),
    witness=GroupHost(name="kvm3", address="2001:db8::3"),
    secret=Secret("5a" * 32),
)
PAIR = replace(SPEC, witness=None)
KEY = key_of(SPEC.secret)
NAMES = ("kvm1", "kvm2", "kvm3")
TICK_S = 0.1
SEGMENT = 7  # of the VLAN that carries heartbeats
READY = Local()


class Lines(Log):
    """A log whose lines are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str, priority: int = 6) -> None:
        self.lines.append(text)

    def with_(self, part: str) -> list[str]:
        return [it for it in self.lines if part in it]


class Leases:
    """The leases of one kernel. ``refuses``: each change fails."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.until: dict[int, float] = {}
        self.refuses = False

    def renew(self, lives: Mapping[int, float], at: float) -> bool:
        self._check()
        self.until |= {mark: self._clock() + s for mark, s in lives.items()}
        return True

    def end(self, marks: Iterable[int]) -> bool:
        self._check()
        for it in marks:
            self.until.pop(it, None)
        return True

    def alive(self) -> dict[int, float]:
        now = self._clock()
        return {mark: until - now for mark, until in self.until.items() if until > now}

    def _check(self) -> None:
        if self.refuses:
            raise HostRefused("no nftables today")


class Host:
    """A host: its disk, its kernel, and perhaps its agent."""

    def __init__(self, name: str, group: Group) -> None:
        self.name = name
        self.group = group
        self.log = Lines()
        self.leases = Leases(lambda: group.now)
        self.disk = Record(spec=group.spec, me=name, kept=Kept(active="kvm1"))
        self.refusal: OSError | None = None  # what each write raises
        self.perhaps: Record | None = None  # what a power failure may leave on the disk instead
        self.is_frozen = False
        self.inbox: list[bytes] = []  # while it is frozen
        self.member: GroupMember | None = None
        self.boots = 0
        self.sent: list[bytes] = []
        self.changed = 0

    def start(self, local: Local | None = READY) -> None:
        """Start the agent. ``local``: what it is told about the host; None: nothing yet."""
        self.boots += 1
        boot = b"%s%04d" % (self.name.encode(), self.boots)
        around = Surroundings(self.leases, self.log, self.save)
        lease_s = self.leases.alive().get(SPEC.mark, 0.0)
        self.member = GroupMember(self.disk, boot, around, self.group.now, lease_s=lease_s)
        if local is not None:
            self.member.set_local(local, self.group.now)
        if self.name != "kvm3":
            self.member.set_segments([SEGMENT], self.group.now)

    def stop(self) -> None:
        self.member = None
        self.inbox.clear()
        self.is_frozen = False

    def cut_power(self, *, loses: bool) -> None:
        """End the agent and the kernel. ``loses``: what was perhaps written is what is on the disk."""
        self.stop()
        self.leases.until.clear()
        if loses and self.perhaps is not None:
            self.disk = self.perhaps
        self.perhaps = None

    def save(self, record: Record) -> None:
        if self.refusal is not None:
            if isinstance(self.refusal, NotFlushed):
                self.perhaps = record
            raise self.refusal
        self.disk, self.perhaps = record, None

    def freeze(self) -> None:
        """Stop the agent's process for a while."""
        self.is_frozen = True

    def thaw(self) -> None:
        """The process goes on, and reads what has come meanwhile."""
        self.is_frozen = False
        inbox, self.inbox = self.inbox, []
        for it in inbox:
            self.hear(it)

    def hear(self, message: bytes, segment: int | None = None) -> None:
        if self.is_frozen:
            if segment is None:
                self.inbox.append(message)
            return
        beat = unpack(message, KEY)
        if self.member is not None and beat is not None:
            self.member.hear(beat, self.group.now_ns, segment)
            self.renew()

    def renew(self) -> None:
        assert self.member is not None
        until = self.member.wanted_until(self.group.now)
        if until is not None:
            self.member.renewing(until)
            try:
                self.leases.renew({SPEC.mark: until - self.group.now}, 0.0)
            except HostRefused as error:
                self.member.not_renewed(error)
            else:
                self.member.renewed(until, self.group.now)
            assert len(self.group.serving) <= 1

    @property
    def is_awake(self) -> bool:
        return self.member is not None and not self.is_frozen

    @property
    def view(self) -> GroupView:
        assert self.member is not None
        return self.member.view(self.group.now)

    @property
    def lives(self) -> bool:
        """Whether frames pass, whatever the agent does."""
        return bool(self.leases.alive())


class Group:
    """The hosts, and the paths between them. ``cut``: pairs of sender and receiver that have none.

    ``cut_off_vlan``: hosts whose VLAN is dead. ``neighbours``: whether those who ask there hear anybody else.
    ``upstream``: whom it answers, in a group without a witness.
    """

    def __init__(self, spec: GroupSpec = SPEC) -> None:
        self.spec = spec
        self.upstream = set(NAMES)
        self.now_ns = 5_000 * NANOSECONDS
        self.cut: set[tuple[str, str]] = set()
        self.cut_off_vlan: set[str] = set()
        self.neighbours = True
        self.hosts = {it.name: Host(it.name, self) for it in spec.hosts}
        self.first, self.second = list(self.hosts.values())[:2]
        self.messages: list[tuple[str, bytes]] = []  # all that were sent

    @property
    def witness(self) -> Host:
        return self.hosts["kvm3"]

    @property
    def now(self) -> float:
        return self.now_ns / NANOSECONDS

    def start(self) -> Group:
        """Start all agents, and wait until the first host serves."""
        for it in self.hosts.values():
            it.start()
        self.run(4)
        assert self.serving == ["kvm1"]
        return self

    def run(self, s: float, *, each: Callable[[], None] = lambda: None) -> None:
        """Ten ticks a second. ``each`` is called before each round of them."""
        for _ in range(round(s / TICK_S)):
            self.now_ns += round(TICK_S * NANOSECONDS)
            each()
            for it in self.hosts.values():
                if it.member is not None and not it.is_frozen:
                    it.member.tick(self.now)
                    self.ask(it)
                    if self.spec.witness is None and it.name in self.upstream:
                        it.member.upstream_answered(self.now, self.now)
                    it.renew()
                    self.send(it)
            self.settle()
            assert len(self.serving) <= 1

    def ask(self, host: Host) -> None:
        """The questions of the agent on silent segments."""
        for segment in host.view.silent:
            assert host.member is not None
            host.member.answered(segment, self.neighbours and host.name not in self.cut_off_vlan, self.now)

    def settle(self) -> None:
        """What is urgent is sent at once."""
        for _ in range(20):
            urgent = [it for it in self.hosts.values() if it.is_awake and it.member and it.member.is_urgent]
            if not urgent:
                return
            for it in urgent:
                self.send(it)
        raise AssertionError("the members do not come to an end")

    def send(self, host: Host) -> None:
        assert host.member is not None
        message = host.member.message(self.now_ns)
        if message is None:
            host.member.is_urgent = False
            return
        self.messages.append((host.name, message))
        for to in self.hosts:
            if to != host.name and (host.name, to) not in self.cut:
                self.hosts[to].hear(message)
                if to != "kvm3" and not {host.name, to} & self.cut_off_vlan:
                    self.hosts[to].hear(message, SEGMENT)

    def cut_off(self, name: str) -> None:
        self.cut |= {(a, b) for a in NAMES for b in NAMES if name in (a, b)}

    @property
    def serving(self) -> list[str]:
        return [it.name for it in self.hosts.values() if it.lives]

    def beats_of(self, name: str) -> list[Beat]:
        return [beat for sender, it in self.messages if sender == name and (beat := unpack(it, KEY)) is not None]


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")
