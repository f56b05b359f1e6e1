"""The candidates of one registration, asked at the same time, and what they say.

The looking that placement decides about: every host is asked in a task of its own, each ends with something
heard by the deadline, and ``placement`` says after each answer what to do next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import msgspec

from netloom.errors import HostUnreachable
from netloom.extension.client import Agent, ConnectionLost
from netloom.extension.deadline import Deadline
from netloom.extension.placement import (
    Ask,
    Done,
    Fail,
    Heard,
    Patience,
    Situation,
    Unplaced,
    Use,
    Wait,
    decide,
    decide_everywhere,
)
from netloom.extension.ssh import LOOK_THERE, Login
from netloom.wire import Call, Reply

# What the agent is told to finish within is this much less than what is left: its answer has to come back.
_WAY_BACK_S_MAX = 0.5

Next = Ask | Wait | Use | Unplaced | Done | Fail


class Hosts:
    """Connections to the hosts of one registration, opened when first wanted. ``reached``: whose agent said hello."""

    def __init__(self, login: Login, deadline: Deadline) -> None:
        self.login = login
        self.deadline = deadline
        self.reached: set[str] = set()
        self._agents: dict[str, Agent] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}

    async def call(self, host: str, call: Call) -> Reply:
        """The reply of ``host``. Raises HostUnreachable, also when none came by the deadline.

        A connection that breaks under the call is opened anew, once, and the call repeated with its id: the agent
        answers a repeat from memory.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.deadline.remaining_s()):
                try:
                    return await self._once(host, call)
                except ConnectionLost as lost:
                    self._forget(host)
                    try:
                        return await self._once(host, call)
                    except HostUnreachable as error:
                        raise HostUnreachable(
                            f"{lost.message} during {call.command}, and again: {error.message}", hint=error.hint
                        ) from error
        except TimeoutError:
            raise self._silence(host, call, time.monotonic() - began) from None

    async def _once(self, host: str, call: Call) -> Reply:
        if host not in self._agents:
            self._agents[host] = Agent(host, self.login)
            self._opening[host] = asyncio.create_task(self._open(host))
        # A shield: two calls may wait for one connection, and the end of one must not end the other's.
        await asyncio.shield(self._opening[host])
        left_s = self.deadline.remaining_s()
        left_ms = int((left_s - min(_WAY_BACK_S_MAX, left_s / 10)) * 1000)
        return await self._agents[host].call(msgspec.structs.replace(call, remaining_ms=left_ms))

    async def _open(self, host: str) -> None:
        await self._agents[host].open()
        self.reached.add(host)

    def _forget(self, host: str) -> None:
        self._opening.pop(host, None)
        if agent := self._agents.pop(host, None):
            agent.close()

    def _silence(self, host: str, call: Call, waited_s: float) -> HostUnreachable:
        if host not in self.reached:
            return self._agents[host].connection.silence(waited_s)
        return HostUnreachable(
            f"{host}: its agent did not answer {call.command} within {waited_s:.0f} s",
            hint=LOOK_THERE,
        )

    def close(self) -> None:
        for agent in self._agents.values():
            agent.close()


@dataclass
class Enquiry:
    """Asks hosts until a decision is reached. ``ask`` never raises: a failure is something heard."""

    situation: Situation
    deadline: Deadline
    ask: Callable[[str], Awaitable[Heard]]
    next: Callable[[Situation], Next]
    reached: Callable[[], frozenset[str]] = frozenset

    async def decision(self) -> Use | Unplaced | Done | Fail:
        pending: dict[asyncio.Future[Heard], str] = {}
        graces: dict[Patience, float] = {}
        now = self.situation
        while True:
            now = replace(now, reached=self.reached())
            step = self.next(now)
            match step:
                case Ask(hosts):
                    for host in hosts:
                        pending[asyncio.ensure_future(self.ask(host))] = host
                    now = replace(now, asked=now.asked | set(hosts))
                case Wait(patience):
                    left_s = None
                    if patience is not None:
                        ends = graces.setdefault(patience, time.monotonic() + self.deadline.grace_s())
                        left_s = max(0.0, ends - time.monotonic())
                    done, _ = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    if not done and patience is not None:
                        now = replace(now, over=now.over | {patience})
                    heard = {pending.pop(task): task.result() for task in done}
                    now = replace(now, heard={**now.heard, **heard})
                case Use() | Unplaced() | Done() | Fail() as decision:
                    self.situation = now
                    return decision


async def find(situation: Situation, hosts: Hosts, locate: Call) -> Use | Unplaced | Fail:
    """Where the scope lives, or would: each host that ``placement`` names is asked ``locate``."""

    async def ask(host: str) -> Heard:
        try:
            reply = await hosts.call(host, locate)
        except HostUnreachable as error:
            return Heard(failure=str(error))
        if reply.status:
            return Heard(failure=f"{host}: {reply.error or 'its agent failed to look'}")
        return Heard(holds=reply.holds)

    decision = await Enquiry(situation, hosts.deadline, ask, decide).decision()
    assert not isinstance(decision, Done)
    return decision


async def tell_all(situation: Situation, hosts: Hosts, call: Call) -> tuple[Done | Fail, dict[str, Reply]]:
    """The same call to every candidate and the stored host: the decision, and what each that answered replied."""
    replies: dict[str, Reply] = {}

    async def ask(host: str) -> Heard:
        try:
            replies[host] = await hosts.call(host, call)
        except HostUnreachable as error:
            return Heard(failure=str(error))
        return Heard(holds=replies[host].holds)

    enquiry = Enquiry(situation, hosts.deadline, ask, decide_everywhere, lambda: frozenset(hosts.reached))
    decision = await enquiry.decision()
    assert isinstance(decision, Done | Fail)
    return decision, replies
