"""Many long-lived flows between machines of the bed, which have to outlive the host that carries them.

    kinds = [FlowKind("source NAT", vm, internet, "198.51.100.1", 8000, count=200)]
    with Flows(kinds) as flows:
        flows.wait_open()
        host.power_cut()
        assert flows.go_on(), flows.story()

Each flow sends a numbered message, waits for its echo, and sends the next one ``every_s`` later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from bed.client import Client, Running
from bed.machines import Machine, until


@dataclass(frozen=True)
class FlowKind:
    """Flows of one kind, from ``client`` to ``server``. The server listens on ``listens_at``, by default on ``port``.

    ``address`` and ``port`` are what the client connects to. ``per_s``: so many are opened each second.
    """

    name: str
    client: Machine
    server: Machine
    address: str
    port: int
    count: int = 1
    protocol: str = "tcp"
    every_s: float = 0.25
    per_s: float = 500.0
    source: str = ""
    listens_at: int = 0


@dataclass(frozen=True)
class Flow:
    """One flow so far, as its client saw it. Times are those of ``time.monotonic``; 0 means: not yet.

    ``gap_s``: the longest time between two answers. ``failure``: why the flow has ended, for example ``reset``; empty
    while it lives.
    """

    kind: str
    opened: float
    last: float
    gap_s: float
    answers: int
    failure: str


class Flows:
    """The flows run in a process of each machine, from the start of the ``with`` block to its end."""

    def __init__(self, kinds: Sequence[FlowKind]) -> None:
        self.kinds = list(kinds)
        machines = {id(it): it for kind in kinds for it in (kind.client, kind.server)}
        self._processes = {key: _process(it) for key, it in machines.items()}
        self._running: list[Running[Any]] = []
        self._asking: dict[int, list[FlowKind]] = {}

    def __enter__(self) -> Flows:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> None:
        for process in self._processes.values():
            process.wait_up()
        places: dict[int, list[list[Any]]] = {}
        for kind in self.kinds:
            anywhere = "::" if ":" in kind.address else "0.0.0.0"
            place = [kind.protocol, anywhere, kind.listens_at or kind.port]
            if place not in (mine := places.setdefault(id(kind.server), [])):
                mine.append(place)
            self._asking.setdefault(id(kind.client), []).append(kind)
        for key, mine in places.items():
            self._running.append(self._processes[key].start("serve_flows", dict, places=mine).wait_ready())
        for key, kinds in self._asking.items():
            groups = [
                {
                    "protocol": it.protocol,
                    "address": it.address,
                    "port": it.port,
                    "count": it.count,
                    "per_s": it.per_s,
                    "every_s": it.every_s,
                    "source": it.source,
                }
                for it in kinds
            ]
            self._running.append(self._processes[key].start("run_flows", int, groups=groups).wait_ready())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes.values():
            process.end()

    def seen(self) -> list[Flow]:
        """All flows that have been begun."""
        found = []
        for key, kinds in self._asking.items():
            for group, *row in self._processes[key].call("flows_seen"):
                found.append(Flow(kinds[group].name, *row))
        return found

    def wait_open(self, *, seconds: float = 60.0) -> None:
        """Wait until all flows have had an answer. Raises TimeoutError."""
        wanted = sum(it.count for it in self.kinds)
        if not until(lambda: sum(it.last > 0 for it in self.seen()) == wanted, seconds=seconds, pause_s=0.2):
            raise TimeoutError(f"not all flows are open after {seconds:.0f} s\n{self.story()}")

    def open_no_more(self) -> float:
        """End the opening of flows; returns the time at which no process opened any more."""
        return max(float(self._processes[key].call("open_no_more")) for key in self._asking)

    def stuck(self, since: float, *, opened_before: float = float("inf")) -> list[Flow]:
        """The flows that have ended, or have had no answer after ``since``; only those opened in time."""
        return [it for it in self.seen() if 0 < it.opened < opened_before and (it.failure or it.last <= since)]

    def go_on(self, *, seconds: float = 60.0, opened_before: float = float("inf")) -> bool:
        """Whether each flow that was opened before that time lives, and gets one more answer from now on."""
        since = time.monotonic()

        def decided() -> bool:
            stuck = self.stuck(since, opened_before=opened_before)
            return all(it.failure for it in stuck)

        until(decided, seconds=seconds, pause_s=0.2)
        return not self.stuck(since, opened_before=opened_before)

    def gap(self, kind: str = "") -> float:
        """The longest time in seconds between two answers of any flow, of one kind or of all; also up to now."""
        now = time.monotonic()
        flows = [it for it in self.seen() if it.last and kind in ("", it.kind)]
        return max(max(it.gap_s, 0.0 if it.failure else now - it.last) for it in flows)

    def disordered(self) -> int:
        """How many messages the servers received out of order, again, or not at all."""
        servers = {id(it.server) for it in self.kinds}
        return sum(int(self._processes[key].call("flows_served")["disordered"]) for key in servers)

    def story(self) -> str:
        """One line for each kind: begun, open, ended and why, the longest gap."""
        lines, now = [], time.monotonic()
        flows = self.seen()
        for name in dict.fromkeys(it.name for it in self.kinds):
            mine = [it for it in flows if it.kind == name]
            ended = Counter(it.failure for it in mine if it.failure)
            living = [it for it in mine if it.last and not it.failure]
            silent_s = max((now - it.last for it in living), default=0.0)
            gap_s = max((it.gap_s for it in living), default=0.0)
            lines.append(
                f"{name}: {len(mine)} begun, {len(living)} live, longest gap {gap_s:.2f} s, silent for {silent_s:.2f} s"
                f"{', ended: ' + str(dict(ended)) if ended else ''}"
            )
        return "\n".join(lines)


def _process(machine: Machine) -> Client:
    """A process of its own on the machine, so that other requests do not delay the flows."""
    entered = {"pid": machine.client.pid, "kinds": ["uts", "ipc", "net", "pid", "mnt"]}
    return Client(f"flows of {machine.name}", {"role": "worker", "enter": entered})
