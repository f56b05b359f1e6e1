"""The upstream of each group without a witness, and the questions to it: does a machine outside answer this host now?

It has the second vote there (``standby/decision.py``). It is the gateway of a public network, else that of a guest
network, else the VMs. Each group has a thread that asks all the time, so that neither the event loop nor a worker
delays an answer: a lease may depend on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec.structs import replace

from netloom.agent.log import Log
from netloom.agent.scopes.interfaces import Host, Neighbours
from netloom.agent.scopes.wire_questions import Segment, segments
from netloom.agent.standby.member import GroupView
from netloom.errors import NetloomError
from netloom.render.want import Want

ASK_EVERY_S = 0.2
ANSWER_WITHIN_S = 0.25  # with three probes
_PAUSE_S = 0.05  # after a question that nobody has answered


class Votes(Protocol):
    """The part of the engine that hears of the answers. ``agent/standby/engine.py`` describes the methods."""

    def now(self) -> float: ...
    def views(self) -> Mapping[str, GroupView]: ...
    def upstream_answered(self, group_id: str, asked_at: float) -> None: ...


def upstream(wants: Mapping[str, Want]) -> Segment | None:
    """The segment where the upstream is asked, with nobody in ``want`` but those who are asked. None: there is none.

    ``wants``: what the scopes of the group want. Both hosts choose the same one.
    """
    chosen = [_asked(it) for it in reversed(segments(wants))]  # the public one first
    with_gateway = [it for it in chosen if it.want.routes]
    with_vms = [it for it in chosen if it.want.neighbours]
    return next(iter(with_gateway + with_vms), None)


def _asked(segment: Segment) -> Segment:
    (port,) = segment.want.ports
    gateways = tuple(it for it in segment.want.routes if it.link == port.link and it.via and ":" not in it.via)
    vms = tuple(it for it in segment.want.neighbours if it.link == port.link and ":" not in it.address)
    # Where both sides of a split have a VM, there is perhaps only one gateway.
    return replace(segment, want=replace(segment.want, routes=gateways, neighbours=() if gateways else vms))


def _start_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="upstream", daemon=True).start()


class Upstreams:
    """``follow`` is for the event loop."""

    def __init__(
        self, engine: Votes, host: Host, log: Log, start: Callable[[Callable[[], None]], None] = _start_thread
    ) -> None:
        self._engine = engine
        self._host = host
        self._log = log
        self._start = start
        self._segments: dict[str, Segment] = {}
        self._neighbours: dict[str, tuple[Segment, Neighbours]] = {}  # each is for the thread of its group
        self._asking: set[str] = set()
        self._refused: set[str] = set()

    def knows(self, group_id: str) -> bool:
        """Whether there is somebody to ask."""
        return group_id in self._segments

    def follow(self, group_id: str, segment: Segment | None) -> None:
        """Ask there from now on."""
        if segment is None:
            self._segments.pop(group_id, None)
            return
        if self._segments.get(group_id) != segment:
            port = segment.want.ports[0].host_link
            what = ", ".join(sorted({it.via for it in segment.want.routes})) or f"{len(segment.want.neighbours)} VMs"
            self._log.line(f"group={group_id} the second vote is that of {what} on {port} of {segment.scope_id}")
        self._segments[group_id] = segment
        if group_id not in self._asking:
            self._asking.add(group_id)
            self._start(lambda: self._run(group_id))

    def _run(self, group_id: str) -> None:
        try:
            while (pause_s := self.ask(group_id)) is not None:
                time.sleep(pause_s)
        except Exception as error:  # noqa: BLE001, the thread's last words
            self._log.traceback("upstream", error)
        finally:
            self._close(group_id)
            self._asking.discard(group_id)

    def ask(self, group_id: str) -> float | None:
        """Ask once; for how long to wait then. None: the group has ended."""
        if group_id not in self._engine.views():
            self._segments.pop(group_id, None)
            return None
        segment = self._segments.get(group_id)
        if segment is None:
            self._close(group_id)
            return ASK_EVERY_S
        asked_at = self._engine.now()
        try:
            answer = self._neighbours_on(group_id, segment).anybody_answers(ANSWER_WITHIN_S)
        except NetloomError as error:
            if group_id not in self._refused:
                self._log.line(f"group={group_id} upstream: {error}")
                self._refused.add(group_id)
            return ASK_EVERY_S
        self._refused.discard(group_id)
        if not answer:
            return _PAUSE_S
        self._engine.upstream_answered(group_id, asked_at)
        return max(_PAUSE_S, asked_at + ASK_EVERY_S - self._engine.now())

    def _neighbours_on(self, group_id: str, segment: Segment) -> Neighbours:
        asked, neighbours = self._neighbours.get(group_id, (None, None))
        if neighbours is None or asked != segment:
            self._close(group_id)
            neighbours = self._host.neighbours(segment.want)
            self._neighbours[group_id] = segment, neighbours
        return neighbours

    def _close(self, group_id: str) -> None:
        if group_id in self._neighbours:
            self._neighbours.pop(group_id)[1].close()
