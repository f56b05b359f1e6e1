"""Who answers for the addresses of a network, asked at every host every 5 ms.

    with Observer(bed, [Question("eth1", 1204, "10.10.1.1"), Question("eth2", 101, "203.0.113.20")]) as observer:
        ...
        never_two(observer, h1, h2)

Times are those of ``time.monotonic``, noted by the kernel when the answer arrives at the switch.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bed.client import Client
from bed.lab import Bed, Host
from bed.machines import until

EVERY_S = 0.005


@dataclass(frozen=True)
class Question:
    """An address, and the VLAN on which it is asked for: an IPv4 address by ARP, an IPv6 address by a solicitation."""

    nic: str
    vlan: int | str
    address: str


@dataclass(frozen=True)
class Heard:
    """One answer."""

    at: float
    host: str
    address: str


@dataclass(frozen=True)
class Turn:
    """Successive answers of one host, while no other host answered."""

    host: str
    first: float
    last: float
    answers: int


def _at(it: Heard) -> float:
    return it.at


class Observer:
    """Asks the hosts of a bed from the start of the ``with`` block to its end.

    The addresses belong to one network: at any time one host answers for all of them.
    """

    def __init__(
        self, bed: Bed, questions: Sequence[Question], *, hosts: Sequence[Host] | None = None, every_s: float = EVERY_S
    ) -> None:
        self._hosts = list(bed.hosts if hosts is None else hosts)
        self._names = {it.number: it.name for it in self._hosts}
        self._addresses = [it.address for it in questions]
        self._answers: list[Heard] = []
        self._late: list[tuple[float, float]] = []
        self._began = time.monotonic()
        bed.add_segments([(it.nic, str(it.vlan)) for it in questions])
        self._client = Client("observer", {"role": "worker", "enter": {"pid": bed.fabric.client.pid, "kinds": ["net"]}})
        ports = {
            (host.number, host.port(it.nic, it.vlan)): [
                number for number, other in enumerate(questions) if (other.nic, other.vlan) == (it.nic, it.vlan)
            ]
            for host in self._hosts
            for it in questions
        }
        self._arguments: dict[str, Any] = {
            "addresses": self._addresses,
            "wires": [[host, port, asked] for (host, port), asked in ports.items()],
            "every_s": every_s,
        }

    def __enter__(self) -> Observer:
        self._client.wait_up()
        self._asking = self._client.start("observe", int, **self._arguments).wait_ready()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._asking.stop()
            self._read()
        finally:
            self._client.end()

    def _read(self) -> None:
        if not self._client.alive:
            return
        told = self._client.call("observed", answers=len(self._answers), late=len(self._late))
        new = [Heard(at, self._names[host], self._addresses[number]) for at, host, number in told["answers"]]
        new.sort(key=_at)  # they were noted by several processors
        disordered = bool(new and self._answers and new[0].at < self._answers[-1].at)
        self._answers += new
        if disordered:
            self._answers.sort(key=_at)
        self._late += [(began, ended) for began, ended in told["late"]]

    def answers(self, *, host: Host | None = None, address: str = "", since: float = 0.0) -> list[Heard]:
        """The answers so far, in the order of their times."""
        self._read()
        return [
            it
            for it in self._answers[bisect.bisect_left(self._answers, since, key=_at) :]
            if (host is None or it.host == host.name) and (not address or it.address == address)
        ]

    def late(self) -> list[tuple[float, float]]:
        """The times in which the observer got no processor, so that nobody was asked: (from, to)."""
        self._read()
        return list(self._late)

    def turns(self, *, since: float = 0.0, address: str = "") -> list[Turn]:
        """Who answered, in turn: for any address, or for this one."""
        turns: list[Turn] = []
        for it in self.answers(since=since, address=address):
            if turns and turns[-1].host == it.host:
                turns[-1] = Turn(it.host, turns[-1].first, it.at, turns[-1].answers + 1)
            else:
                turns.append(Turn(it.host, it.at, it.at, 1))
        return turns

    def serving(self, *, within_s: float = 0.1) -> set[str]:
        """The names of the hosts that have answered within the last moment."""
        return {it.host for it in self.answers(since=time.monotonic() - within_s)}

    def wait_for(self, host: Host, *, seconds: float = 30.0) -> float:
        """Wait until the host answers for all addresses; returns the time of its first answer from now on.

        Raises TimeoutError.
        """
        began = time.monotonic()
        found: list[Heard] = []

        def answered() -> bool:
            found[:] = self.answers(host=host, since=began)
            return {it.address for it in found} >= set(self._addresses)

        if not until(answered, seconds=seconds, pause_s=0.02):
            missing = sorted(set(self._addresses) - {it.address for it in found})
            raise TimeoutError(f"{host.name} did not answer for {missing} within {seconds} s\n{self.story()}")
        return found[0].at

    @property
    def addresses(self) -> list[str]:
        return list(self._addresses)

    def story(self) -> str:
        """The turns as text, with times since the start of the observation, and the pauses of the observer itself."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        turns = self.turns()
        yield "s since the start: answers of a host while no other one answered"
        # The first moments of a quarrel tell most.
        for number, turn in enumerate(turns):
            if number == 40:
                yield f"  ... and {len(turns) - number} more turns"
                break
            gap_ms = (turn.first - turns[number - 1].last) * 1000 if number else 0.0
            pause = f", {gap_ms:.1f} ms after the one before" if number else ""
            first, last = turn.first - self._began, turn.last - self._began
            yield f"  {first:9.4f} to {last:9.4f}  {turn.host}  {turn.answers} answers{pause}"
        for began, ended in self._late[:20]:
            yield f"  {began - self._began:9.4f} to {ended - self._began:9.4f}  nobody was asked: the observer was late"


def never_two(observer: Observer, *turns: Host) -> None:
    """Assert that no host answered after another one had begun to answer.

    ``turns`` are the hosts that have to answer, one after the other; a host may come back. Without them each host may
    have one turn.
    """
    found = [it.host for it in observer.turns()]
    assert found, "nobody answered at all"
    if turns:
        assert found == [it.name for it in turns], f"not {[it.name for it in turns]}:\n{observer.story()}"
    else:
        assert len(found) == len(set(found)), f"two hosts answered in turn:\n{observer.story()}"


def gap(observer: Observer, since: float = 0.0) -> float:
    """The longest time in seconds in which an address had no answer, of the worst address; also at the end."""
    now = time.monotonic()
    longest = 0.0
    for address in observer.addresses:
        times = [it.at for it in observer.answers(address=address, since=since)]
        assert times, f"nobody answered for {address}"
        edges = [*([since] if since else []), *times, now]
        longest = max(longest, *(later - earlier for earlier, later in itertools.pairwise(edges)))
    return longest


def outage(observer: Observer) -> float:
    """The time in seconds from the last answer of one host to the first one of the next; the longest, if several."""
    turns = observer.turns()
    assert len(turns) > 1, f"no host took over:\n{observer.story()}"
    return max(later.first - earlier.last for earlier, later in itertools.pairwise(turns))
