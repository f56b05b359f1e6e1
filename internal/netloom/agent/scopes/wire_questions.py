"""The segments that carry the heartbeats of a group, and the questions there when heartbeats do not arrive.

``agent/standby/wires.py`` says when a segment is silent, and what the answers mean.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from netloom import names
from netloom.agent.clock import Clock
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.log import Log
from netloom.agent.scopes.interfaces import Host
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.standby.member import GroupView
from netloom.errors import NetloomError
from netloom.render.want import Port, Want

ANSWER_WITHIN_S = 0.25
ASK_EVERY_S = 0.5
_LINKS_MAX = 2  # of one segment

_KINDS = (names.guest_link(""), names.public_link(""))  # a segment of each kind


_StartTask = Callable[[Coroutine[Any, Any, None]], object]


class Turns(Protocol):
    """The part of the engine that hears of the answers. ``agent/standby/engine.py`` describes the methods."""

    def views(self) -> Mapping[str, GroupView]: ...
    def suspect(self, group_id: str, segment: int) -> None: ...
    def answered(self, group_id: str, segment: int, answer: bool | None) -> None: ...


class Segment(msgspec.Struct, frozen=True):
    """A segment that carries heartbeats: that of the only port of ``want``, which is what the scope wants otherwise.

    ``number``: the same on both hosts, as long as they have the same state.
    """

    number: int
    scope_id: str
    want: Want
    links: tuple[str, ...] = ()


class WireQuestions:
    """Created and used on the event loop. ``start_task``: see ``Upkeep``."""

    def __init__(
        self, engine: Turns, scopes: Scopes, host: Host, log: Log, clock: Clock, start_task: _StartTask
    ) -> None:
        self._engine = engine
        self._scopes = scopes
        self._host = host
        self._log = log
        self._clock = clock
        self._start_task = start_task
        self._segments: dict[str, dict[int, Segment]] = {}  # by group and number
        self._asking: set[tuple[str, int]] = set()

    async def choose(self, group_id: str, wants: Mapping[str, Want]) -> dict[ClaimWire, int]:
        """The links on which heartbeats are broadcast, with the number of their segment. Raises HostRefused.

        ``wants``: what the scopes of the group want.
        """
        wires: dict[ClaimWire, int] = {}
        found: dict[int, Segment] = {}
        for segment in segments(wants):
            look = partial(self._host.claim_wires, segment.scope_id, segment.want)
            links = sorted(await self._scopes.in_worker_uncounted(look), key=lambda it: it.link)[:_LINKS_MAX]
            wires |= {it: segment.number for it in links if it not in wires}
            found[segment.number] = replace(segment, links=tuple(it.link for it in links))
        self._segments[group_id] = found
        return wires

    def uplink_changed(self, link: str, running: bool) -> None:
        """A port of a bridge has lost its carrier, or has it again."""
        if not running:
            for group_id, segments_ in self._segments.items():
                for it in segments_.values():
                    if link in it.links:
                        self._engine.suspect(group_id, it.number)  # guard: a-lost-carrier-is-asked-about-at-once

    def look(self, view: GroupView) -> None:
        """Ask on the segments that are silent now, until they are not."""
        group_id = view.spec.group_id
        for number in view.silent & self._segments.get(group_id, {}).keys():
            if (group_id, number) not in self._asking:
                self._asking.add((group_id, number))
                self._start_task(self._ask(group_id, number))

    async def _ask(self, group_id: str, number: int) -> None:
        said = ""
        try:
            while True:
                view, segment = self._engine.views().get(group_id), self._segments.get(group_id, {}).get(number)
                if view is None or segment is None or number not in view.silent:
                    break
                ask = partial(self._host.anybody_answers, segment.scope_id, segment.want, ANSWER_WITHIN_S)
                answer = await self._scopes.in_worker_uncounted(ask)
                self._engine.answered(group_id, number, answer)
                if said != _ANSWERS[answer]:
                    said = _ANSWERS[answer]
                    partner = view.spec.names.partner(view.me)
                    where = f"{segment.want.ports[0].host_link} of {segment.scope_id}"
                    self._log.line(f"group={group_id} no heartbeats of {partner} on the VLAN of {where}; {said}")
                await self._clock.sleep(ASK_EVERY_S)
        except NetloomError as error:
            self._log.line(f"group={group_id} standby: {error}")
            await self._clock.sleep(ASK_EVERY_S)
        finally:
            self._asking.discard((group_id, number))


_ANSWERS = {True: "neighbours answer this host", False: "nobody answers this host", None: "there is nobody to ask"}


def segments(wants: Mapping[str, Want]) -> list[Segment]:
    """The segments that carry the heartbeats of these scopes: a guests' one and a public one.

    Both hosts choose the same ones: the first where somebody can be asked, in the order of the scopes' ids.
    """
    chosen = []
    for kind in _KINDS:
        found = [
            (not _has_machines(want, port), scope_id, port)
            for scope_id, want in wants.items()
            for port in want.ports
            if port.link.startswith(kind)
        ]
        if found:
            _, scope_id, port = min(found)
            what = (scope_id, port.link, port.segment.nic, port.segment.vlan)
            number = zlib.crc32(msgspec.msgpack.encode(what)) or 1
            chosen.append(Segment(number, scope_id, replace(wants[scope_id], ports=(port,))))
    return chosen


def _has_machines(want: Want, port: Port) -> bool:
    machines = [it.address for it in want.neighbours if it.link == port.link]
    machines += [it.via for it in want.routes if it.link == port.link and it.via]
    return any(":" not in it for it in machines)
