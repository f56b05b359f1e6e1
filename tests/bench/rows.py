"""The figures of `make bench`: what each one means, its target, and how samples of it are taken and kept.

A sample is a pair: our time and that of the yardstick, measured one after the other in the same run. The figure is the
median of their ratios. So it hardly depends on the machine, nor on what else runs there. A figure without a yardstick
(memory, CPU) is the median of its samples.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Pair = tuple[float, float]  # ours, and the yardstick's; 1 without a yardstick
# The samples "event.script" are those of the shell script beside the row "event"; "event@120" is an event with 120
# networks.
SCRIPT = ".script"


@dataclass(frozen=True)
class Row:
    """One figure. ``unit`` is that of its samples. ``reference``: the figure of the reference extension, if known."""

    name: str
    figure: str
    target: float
    yardstick: str = "ssh"
    unit: str = "ms"
    reference: float | None = None
    at_least: bool = False  # the target is a lower bound

    @property
    def is_ratio(self) -> bool:
        return bool(self.yardstick)

    def reaches(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


ROWS = [
    Row("call", "one call, the helper answers", 0.3, "python3 -I -S -c pass"),
    Row("event", "one event: ensure and add-port-forward", 0.05, reference=23),
    Row("event-120", "one event, 120 networks on the host", 1.2, "with one network", "ssh"),
    Row("event-1000", "one event, 1,000 networks on the host", 1.5, "with one network", "ssh"),
    Row("idle-60", "CPU of the agent while nothing happens, 60 networks", 2, "", "%"),
    Row("idle-120", "CPU of the agent while nothing happens, 120 networks", 2, "", "%"),
    Row("idle-241", "CPU of the agent while nothing happens, 241 networks", 2, "", "%"),
    Row("idle-1000", "CPU of the agent while nothing happens, 1,000 networks", 2, "", "%"),
    Row("life", "life of an isolated network, 21 operations", 1.5, reference=262),
    Row("sixteen", "16 port forwards at once on one network, until the last", 0.5, reference=90),
    Row("fifty", "50 events, ten at a time, over 30 networks", 0.5),
    Row("rules-1000", "apply-fw-rules, 1,000 rules", 0.2, reference=46),
    Row("rules-10000", "apply-fw-rules, 10,000 rules", 2),
    Row("restore", "restore-network, 1,000 VMs with metadata", 1),
    Row("restart-120", "first event after the agent was killed, 120 networks", 1),
    Row("restart-1000", "first event after the agent was killed, 1,000 networks", 1),
    Row("first", "first command on a bare host: upload, install, selftest", 4),
    Row("rebuild", "rebuild of all networks after a power cut", 1.5, "replay of its bytes", "s"),
    Row("forwards", "add-port-forward with 10,000 forwards", 2, "with 10 forwards"),
    Row("through-forwards", "new connections through 10,000 forwards", 0.9, "through 10 forwards", "/s", at_least=True),
    Row("through-rules", "new connections through 10,000 rules", 0.8, "through 10 rules", "/s", at_least=True),
    Row("memory-120", "memory per idle network with DNS and a VM, 120 networks", 0.8, "", "MB", reference=17),
    Row("memory-1000", "memory per idle network with DNS and a VM, 1,000 networks", 0.8, "", "MB", reference=17),
    Row("memory-agent-241", "memory of the agent and the guest process, 241 networks", 120, "", "MB"),
    Row("memory-agent-1000", "memory of the agent and the guest process, 1,000 networks", 120, "", "MB"),
    Row("dhcp", "DHCP offers of the guest process", 1.3, "dnsmasq", "/s", at_least=True),
    Row("metadata", "metadata requests of the guest process", 0.8, "a bare loop of h11", "/s", at_least=True),
]
BY_NAME = {row.name: row for row in ROWS}


@dataclass
class Results:
    """The samples of a run, by the name of a row, of a row's shell script, or of a point of a series."""

    build: str = ""
    date: str = ""
    machine: str = ""
    samples: dict[str, list[Pair]] = field(default_factory=dict)

    @classmethod
    def now(cls, build: str, earlier: Path) -> Results:
        """Without samples, or with those that the file ``earlier`` has of the same build and machine."""
        machine = f"{len(os.sched_getaffinity(0))} cores, Linux {platform.release().partition('-')[0]}"
        found = cls(build, time.strftime("%Y-%m-%d", time.gmtime()), machine)
        if earlier.exists():
            had = cls.read(earlier)
            if (had.build, had.machine) == (build, machine):
                found.samples = had.samples
        return found

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises FileNotFoundError, or KeyError when the file is another program's."""
        told: dict[str, Any] = json.loads(path.read_text())
        samples = {name: [(ours, theirs) for ours, theirs in pairs] for name, pairs in told["samples"].items()}
        return cls(told["build"], told["date"], told["machine"], samples)

    def write(self, path: Path) -> None:
        """Write all samples, and the figures made of them for those who only read the file."""
        figures = {name: round(self.value(name), 4) for name in self.samples}
        told = {"build": self.build, "date": self.date, "machine": self.machine, "figures": figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**told, "samples": self.samples}, indent=1) + "\n")

    def value(self, name: str) -> float:
        """The figure: the median of the ratios. Raises KeyError for what was not measured."""
        return statistics.median(ours / theirs for ours, theirs in self.samples[name])

    def medians(self, name: str) -> Pair:
        pairs = self.samples[name]
        return statistics.median(ours for ours, _ in pairs), statistics.median(theirs for _, theirs in pairs)

    def series(self, name: str) -> dict[int, float]:
        """The figure of a series by the number of networks."""
        points = {int(key.rpartition("@")[2]): key for key in self.samples if key.startswith(f"{name}@")}
        return {networks: self.value(points[networks]) for networks in sorted(points)}


Measured = tuple[str, list[Pair]]
"""The name of what was measured, and its samples."""


@dataclass
class Run:
    """What a part of the benchmark needs to know: which rows to measure, how often, and how large the host may get."""

    wanted: frozenset[str]
    rounds: int
    networks: int
    quick: bool
    idle_s: float
    say: Callable[[str], None]

    def wants(self, *names: str) -> bool:
        return not self.wanted.isdisjoint(names)


Part = Callable[[Run], Iterator[Measured]]


def chosen(words: Sequence[str], parts: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The rows that the words name: a row, or the beginning of its name up to a hyphen, or a part. All without words.

    Raises ValueError for a word that names none.
    """
    found: set[str] = set()
    for word in words:
        named = {name for name in BY_NAME if name == word or name.startswith(f"{word}-")} | set(parts.get(word, ()))
        if not named:
            raise ValueError(f"no row is named {word}: {' '.join(BY_NAME)}")
        found |= named
    return frozenset(found or BY_NAME)


def timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def in_turns(
    rounds: int, theirs: Callable[[], float], ours: Mapping[str, Callable[[], float]]
) -> dict[str, list[Pair]]:
    """Measure each of ``ours`` and the yardstick in turns, in an order that changes; returns the pairs by name."""
    pairs: dict[str, list[Pair]] = {name: [] for name in ours}
    for at in range(rounds):
        before = theirs()
        for name in reversed(list(ours)) if at % 2 else ours:
            mine = ours[name]()
            after = theirs()
            pairs[name].append((mine, (before + after) / 2))
            before = after
    return pairs
