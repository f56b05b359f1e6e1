"""A host that is cut off from all others fences its uplinks, and asks who serves its scopes before it goes on.

To the others, a host that is cut off looks like one that is dead. An operator may have had another host serve its
scopes meanwhile, with the same addresses. So an uplink is fenced (``host/fence.py``)

- when it has no carrier any more, and
- with all others, when the host has heard nobody for ``SILENT_ROUNDS`` seconds: no frame on any way out, although it
  has asked neighbours, gateways and VMs for a sign of life.

While it is fenced, nobody outside is served, and nobody is there. VMs on this host are served as before. With the first
frame that arrives the agent asks by ARP who else answers for the addresses behind the uplink. A scope that another host
serves becomes passive; then the fence is lifted.

An uplink that lost its carrier for less than ``MOMENT_S`` serves again without a question: nobody gives up a host that
fast. An uplink that was fenced because the host heard nobody always needs the question.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Protocol, TypeVar

from netloom.agent.clock import Clock
from netloom.agent.host.outside import Answer, Listener
from netloom.agent.log import Log
from netloom.agent.scopes.placements import OCCUPIED_S
from netloom.agent.scopes.scopes import Scopes
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.upkeep import Upkeep
from netloom.errors import NetloomError
from netloom.render.want import Want

_T = TypeVar("_T")

ROUND_S = 1.0
SILENT_ROUNDS = 4  # the first one shows that nothing comes by itself on the ways where something came last
_WATCH_ROUNDS = 10  # while it is silent
MOMENT_S = 2.0
TOGETHER_S = 0.05  # uplinks that are lost, or heard, within this time are handled together
ASK_AGAIN_S = 0.4


class Outside(Protocol):
    """``host.outside.Outside``, which describes the methods."""

    def watch(self, wants: dict[str, Want]) -> None: ...
    def heard_lately(self) -> bool: ...
    def heard(self) -> bool: ...
    def call_neighbours(self) -> bool: ...
    def call(self, wants: dict[str, Want]) -> None: ...
    def uplinks(self, wants: dict[str, Want]) -> frozenset[str]: ...
    def unused(self, wants: dict[str, Want], links: Iterable[str]) -> frozenset[str]: ...
    def fenced(self) -> frozenset[str]: ...
    def fence(self, links: Iterable[str]) -> None: ...
    def lift(self, links: Iterable[str]) -> None: ...
    def ask(
        self, wants: dict[str, Want], links: frozenset[str], timeout_s: float, claim: Callable[[str], bytes]
    ) -> list[Answer]: ...


class Isolation:
    """Created and used on the event loop. ``run`` is one of the agent's loops."""

    def __init__(self, scopes: Scopes, upkeep: Upkeep, outside: Outside, log: Log, clock: Clock) -> None:
        self._scopes = scopes
        self._upkeep = upkeep
        self._outside = outside
        self._log = log
        self._clock = clock
        self._silent = 0  # rounds in which nothing was heard
        self._begun = self._watched = False
        self._fenced: set[str] = set()
        self._brief: set[str] = set()  # those that were fenced for their carrier alone
        self._lost: dict[str, float] = {}  # port of a bridge without a carrier, since when
        self._unseen: set[str] = set()  # of those, the ones that ``_fence_lost`` has not looked at
        self._fencing = False  # uplinks without a carrier will be, within moments
        self._listeners: dict[str, Listener] = {}  # by fenced uplink
        self._heard: set[str] = set()  # fenced uplinks that have heard somebody
        self._asking = False
        self._turn = asyncio.Lock()  # for ``outside``

    async def run(self) -> None:
        """Look once a second whether anybody is heard, for ever."""
        while True:
            await self._reported(self._round())
            await self._clock.sleep(ROUND_S)

    def uplink_changed(self, link: str, running: bool) -> None:
        """A port of a bridge has lost its carrier, or has it again."""
        if not running:
            self._lost.setdefault(link, self._clock.time())
            self._unseen.add(link)
            if not self._fencing:
                self._fencing = True
                self._upkeep.start_task(self._fence_lost())
        elif link in self._lost:
            away_s = self._clock.time() - self._lost.pop(link)
            if away_s >= MOMENT_S:
                self._brief.discard(link)  # guard: a-long-absence-is-asked-about-after-another-moment
            elif link in self._brief:
                moment = "it was without a carrier for a moment"
                self._upkeep.start_task(self._reported(self._lift({link}, moment)))

    # ---------------------------------------------------------------------------------------------------- the rounds

    async def _round(self) -> None:
        if not self._begun:
            left = await self._in_worker(self._outside.fenced) - self._fenced
            if left:  # guard: a-new-agent-keeps-the-fence
                self._note_fenced(left, "an earlier agent was cut off")
            self._begun = True
        if not any(map(_serves, self._scopes.slots())):
            self._silent = 0
            if self._fenced and not any(it.scope is not None or it.unreadable for it in self._scopes.slots()):
                await self._free(self._fenced)
            return
        if await self._hears():
            self._silent = 0
        else:
            self._silent += 1
            if self._silent >= SILENT_ROUNDS:  # guard: a-silent-host-fences-its-uplinks
                uplinks = await self._in_worker(partial(self._outside.uplinks, self._served()))
                self._brief -= uplinks  # guard: a-silent-uplink-is-asked-about-after-a-moment-without-carrier
                await self._fence(uplinks, "nobody is heard on any link of this host")
        if self._fenced and self._all_rendered():  # guard: a-fence-stays-until-its-networks-are-known
            unused = partial(self._outside.unused, self._served(), set(self._fenced))
            await self._free(await self._in_worker(unused))
        self._listen()
        if self._silent or self._fenced:
            await self._call()

    async def _hears(self) -> bool:
        """Whether somebody was heard since the last round.

        Most rounds look at a few ways out. All of them, and what they are, is looked at from the second silent round
        on. That look is the first of its kind for long, so it tells only what was heard at some time before.
        """
        if not self._watched:
            await self._in_worker(partial(self._outside.watch, self._served()))
            self._watched = True
        if await self._in_worker(self._outside.heard_lately):
            return True
        if not self._silent:
            return False
        if self._silent % _WATCH_ROUNDS == 1:  # otherwise the ways out that are known suffice
            await self._in_worker(partial(self._outside.watch, self._served()))
        heard = await self._in_worker(self._outside.heard)
        return heard and self._silent > 1  # guard: what-came-before-the-silence-does-not-end-it

    async def _call(self) -> None:
        """Ask for a sign of life: at first neighbours of the host alone, then machines behind all ways out, too."""
        enough = self._silent == 1 and not self._fenced
        if enough and await self._in_worker(self._outside.call_neighbours):
            return
        await self._in_worker(partial(self._outside.call, self._served()))

    def _served(self) -> dict[str, Want]:
        """What the scopes want that this host serves, as it was rendered last."""
        return {it.scope_id: it.rendered[1] for it in self._scopes.slots() if _serves(it) and it.rendered is not None}

    def _all_rendered(self) -> bool:
        """Whether it is known what all scopes want. An agent that has just started does not know it."""
        slots = [it for it in self._scopes.slots() if it.gate == "open" or it.unreadable]
        return all(it.rendered is not None and not it.unreadable for it in slots)

    # ----------------------------------------------------------------------------------------------------- the fence

    async def _free(self, links: Iterable[str]) -> None:
        """Lift the fence of links through which no scope is served any more. Nothing more is heard of their carrier."""
        for link in links:
            self._lost.pop(link, None)
        await self._lift(set(links), "no network of this host uses it")

    async def _fence_lost(self) -> None:
        """Fence the uplinks without a carrier. The VLAN links of a NIC lose theirs together.

        A new link of a bridge has none for a moment. Which links are uplinks is asked only if it stays so.
        """
        try:
            while self._unseen:
                await self._clock.sleep(TOGETHER_S)
                lost, self._unseen = self._unseen & self._lost.keys(), set()
                if lost:  # guard: a-carrier-that-is-back-needs-no-look
                    await self._reported(self._fence_uplinks())
        finally:
            self._fencing = False

    async def _fence_uplinks(self) -> None:
        uplinks = await self._in_worker(partial(self._outside.uplinks, self._served()))
        lost = uplinks & self._lost.keys()
        self._brief |= lost - self._fenced  # first: the carrier may come back while the fence is made
        await self._fence(lost, "no carrier")

    async def _fence(self, links: Iterable[str], why: str) -> None:
        fresh = set(links) - self._fenced
        if fresh:
            await self._in_worker(partial(self._outside.fence, fresh))
            self._note_fenced(fresh, why)

    def _note_fenced(self, links: Iterable[str], why: str) -> None:
        self._fenced |= set(links)
        self._log.line(
            f"warning: uplink {_listed(links)} fenced: {why}; with the first frame there, ARP tells who serves"
        )
        self._listen()

    async def _lift(self, links: set[str], why: str) -> None:
        """Lift the fence of those uplinks that have a carrier."""
        links = links - self._lost.keys()
        if not links:
            return
        await self._in_worker(partial(self._outside.lift, links))
        self._fenced -= links
        self._brief -= links
        for link in links:
            self._heard.discard(link)
            self._deafen(link)
        self._log.line(f"uplink {_listed(links)} is fenced no longer: {why}")

    def _listen(self) -> None:
        """Listen on the fenced uplinks, those that have come back, too."""
        for link in self._fenced - self._listeners.keys() - self._heard:
            with contextlib.suppress(OSError):  # it is gone: the next round tries again
                listener = self._listeners[link] = Listener(link)
                asyncio.get_running_loop().add_reader(listener, self._hear, link)

    def _deafen(self, link: str) -> None:
        listener = self._listeners.pop(link, None)
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    def _hear(self, link: str) -> None:
        try:
            heard = self._listeners[link].heard()
        except OSError:
            self._deafen(link)
            return
        if heard:
            self._deafen(link)
            self.hear(link)

    def hear(self, link: str) -> None:
        """A frame has arrived on a fenced uplink: ask."""
        if link not in self._fenced:
            return
        self._heard.add(link)
        if not self._asking:
            self._asking = True
            self._upkeep.start_task(self._ask_until_answered())

    # -------------------------------------------------------------------------------------------------- the question

    async def _ask_until_answered(self) -> None:
        try:
            wait_s = TOGETHER_S
            while self._heard:
                await self._clock.sleep(wait_s)
                wait_s = ASK_AGAIN_S
                await self._reported(self._ask(frozenset(self._heard)))
        finally:
            self._asking = False

    async def _ask(self, links: frozenset[str]) -> None:
        """Ask on these uplinks, and lift their fence where everything is clear."""
        wants = self._served()
        answers = await self._in_worker(partial(self._outside.ask, wants, links, OCCUPIED_S, self._claim))
        unclear = set()
        for it in answers:
            if it.occupied.owners:  # guard: a-scope-that-was-taken-over-is-given-up
                why = f"{it.occupied} on {it.uplink}; another host has taken {it.scope_id} over"
                if not await self._upkeep.step_aside(it.scope_id, why):
                    unclear.add(it.uplink)
            elif it.occupied.unknown:
                self._heard.discard(it.uplink)  # it is down again; the listener hears when it is not
                unclear.add(it.uplink)
            elif it.occupied.probing:
                unclear.add(it.uplink)  # another host has come back at the same moment, and goes first
        await self._lift(set(links) - unclear, "nobody else answers for what is served through it")

    def _claim(self, scope_id: str) -> bytes:
        return self._scopes.placements.claim(self._scopes.get(scope_id))

    async def _reported(self, work: Awaitable[None]) -> None:
        try:
            await work
        except NetloomError as error:
            self._log.line(f"isolation: {error}")
        except Exception as error:  # noqa: BLE001, a bug must end neither the agent nor the rounds
            self._log.traceback("isolation", error)

    async def _in_worker(self, work: Callable[[], _T]) -> _T:
        async with self._turn:
            return await self._scopes.in_worker_uncounted(work)


def _serves(slot: Slot) -> bool:
    """Whether this host serves the scope, and has rendered what it wants."""
    return slot.gate == "open" and slot.rendered is not None and bool(slot.rendered[1].namespace)


def _listed(links: Iterable[str]) -> str:
    listed = sorted(links)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
