"""The hosts of one registration, as one call uses them: ask them in parallel, and let ``placement`` decide.

Every host is asked in a task of its own, which ends with an answer or a failure by the deadline. After each of them
``placement`` names the next step. The channels come from a ``Pool``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import msgspec

from netloom.errors import HostUnreachable
from netloom.extension.agent_client import AgentClient, OtherProtocol
from netloom.extension.deadline import Deadline
from netloom.extension.package import Package
from netloom.extension.placement import (
    AllTold,
    Ask,
    Fail,
    HostAnswer,
    Patience,
    Situation,
    Unplaced,
    Use,
    Wait,
    decide,
    decide_everywhere,
)
from netloom.extension.pool import Pool, PooledChannel
from netloom.extension.progress import Progress
from netloom.extension.ssh import LOOK_THERE, ConnectionLost, Login, NoAgent
from netloom.extension.without_agent import reply_without_agent
from netloom.wire import Call, Reply

# The agent gets this much less than the remaining time (a tenth of it, if that is less), so that its reply is in time.
_REPLY_RESERVE_S_MAX = 0.5

NextStep = Ask | Wait | Use | Unplaced | AllTold | Fail


class Hosts:
    """The hosts that one call can use. ``reached``: the hosts whose agents have said hello.

    ``installs``: whether the agent is installed where it is missing, and upgraded where it is older.
    """

    def __init__(
        self,
        login: Login,
        package: Package | None,
        deadline: Deadline,
        pool: Pool,
        progress: Progress,
        *,
        installs: bool,
    ) -> None:
        self.login = login
        self.deadline = deadline
        self.reached: set[str] = set()
        self._package = package
        self._installs = installs
        self._progress = progress
        self._pool = pool
        self._asked: dict[str, AgentClient] = {}

    def is_open(self, host: str) -> bool:
        return self._pool.is_open(host, self.login, self._package)

    async def call(self, host: str, call: Call) -> Reply:
        """The reply of ``host``. Raises HostUnreachable, also when there is no reply by the deadline.

        When the connection breaks during the call, it is opened once more and the call is repeated under its id: the
        agent answers a repeated call from memory.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.deadline.remaining_s()):
                try:
                    return await self._once(host, call)
                except ConnectionLost as lost:
                    try:
                        return await self._once(host, call)
                    except HostUnreachable as error:
                        raise HostUnreachable(
                            f"{lost.message} during {call.command}, and again: {error.message}", hint=error.hint
                        ) from error
        except TimeoutError:
            raise self._silence(host, call, time.monotonic() - began) from None

    async def _once(self, host: str, call: Call) -> Reply:
        with self._pool.channel(host, self.login, self._package, self._progress) as channel:
            try:
                await self._open(host, channel)
            except NoAgent as missing:
                if self._installs:
                    raise
                return await reply_without_agent(channel.agent.connection, call, missing)
            if not (self._installs and channel.agent.outdated and self._pool.may_replace(host)):
                return await self._reply(channel, call)
            await self._replace_agent(channel)
            if not channel.agent.is_broken:
                return await self._reply(channel, call)
        # The older agent has ended, as intended. The agent that answers now is the new one, or the old one restarted.
        with self._pool.channel(host, self.login, self._package, self._progress) as channel:
            await self._open(host, channel)
            return await self._reply(channel, call)

    async def _open(self, host: str, channel: PooledChannel) -> None:
        self._asked[host] = channel.agent
        channel.listeners.add(self._progress)
        try:
            began = time.monotonic()
            await asyncio.wait([channel.opening], timeout=self.deadline.reach_s())
            if not channel.opening.done() and channel.agent.connection.is_silent:
                self._pool.abandon(channel)
                raise channel.agent.silence(time.monotonic() - began)
            # Shielded: two calls may wait for one channel, and cancelling one of them must not cancel the other's.
            if not channel.is_open:
                await self._opened(channel)
        finally:
            channel.listeners.discard(self._progress)
        self.reached.add(host)

    async def _opened(self, channel: PooledChannel) -> None:
        try:
            await asyncio.shield(channel.opening)
        except (NoAgent, OtherProtocol):
            if not self._installs or self._package is None:  # guard: a-removal-installs-nothing
                raise
            await asyncio.shield(channel.install())

    async def _reply(self, channel: PooledChannel, call: Call) -> Reply:
        left_s = self.deadline.remaining_s()
        left_ms = int((left_s - min(_REPLY_RESERVE_S_MAX, left_s / 10)) * 1000)
        return await channel.agent.call(msgspec.structs.replace(call, remaining_ms=left_ms))

    async def _replace_agent(self, channel: PooledChannel) -> None:
        """In the background if the pool outlives this call; otherwise wait for it, for half of the remaining time."""
        replacing = channel.replace()
        if not self._pool.resident:
            await asyncio.wait([replacing], timeout=self.deadline.remaining_s() / 2)

    def _silence(self, host: str, call: Call, waited_s: float) -> HostUnreachable:
        if host not in self.reached:
            return self._asked[host].silence(waited_s)
        return HostUnreachable(
            f"{host}: its agent did not answer {call.command} within {waited_s:.0f} s",
            hint=LOOK_THERE,
        )


@dataclass
class DecisionLoop:
    """Asks hosts until ``next_step`` decides. ``situation`` is what the decision was based on, afterwards.

    ``ask`` turns HostUnreachable into a failure of that host. BadRequest (a wrong sshkey, for example) ends the loop.
    """

    situation: Situation
    deadline: Deadline
    ask: Callable[[str], Awaitable[HostAnswer]]
    next_step: Callable[[Situation], NextStep]
    reached: AbstractSet[str] = frozenset()  # filled by ``ask`` meanwhile

    async def decision(self) -> Use | Unplaced | AllTold | Fail:
        """The decision. Hosts that it did not wait for may still be asked; they are cancelled only with the call."""
        pending: dict[asyncio.Future[HostAnswer], str] = {}
        try:
            return await self._decided(pending)
        except asyncio.CancelledError:
            for task in pending:
                task.cancel()
            raise

    async def _decided(self, pending: dict[asyncio.Future[HostAnswer], str]) -> Use | Unplaced | AllTold | Fail:
        graces: dict[Patience, float] = {}
        now = self.situation
        while True:
            now = replace(now, reached=frozenset(self.reached))
            step = self.next_step(now)
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
                    answers = {pending.pop(task): task.result() for task in done}
                    now = replace(now, answers={**now.answers, **answers})
                case Use() | Unplaced() | AllTold() | Fail() as decision:
                    self.situation = now
                    return decision


async def find(situation: Situation, hosts: Hosts, locate: Call) -> Use | Unplaced | Fail:
    """Where the scope lives, or where it would be created: asks the hosts that ``placement`` names by ``locate``."""

    async def ask(host: str) -> HostAnswer:
        try:
            reply = await hosts.call(host, locate)
        except HostUnreachable as error:
            return HostAnswer(failure=str(error))
        if reply.status:
            return HostAnswer(failure=f"{host}: {reply.error or 'its agent failed to look'}")
        return HostAnswer(holds=reply.holds)

    decision = await DecisionLoop(situation, hosts.deadline, ask, decide).decision()
    assert not isinstance(decision, AllTold)
    return decision


async def tell_all(situation: Situation, hosts: Hosts, call: Call) -> tuple[AllTold | Fail, dict[str, Reply]]:
    """Send ``call`` to every candidate and the stored host: the decision, and the replies of those that answered."""
    replies: dict[str, Reply] = {}

    async def ask(host: str) -> HostAnswer:
        try:
            replies[host] = await hosts.call(host, call)
        except HostUnreachable as error:
            return HostAnswer(failure=str(error))
        return HostAnswer(holds=replies[host].holds)

    decision = await DecisionLoop(situation, hosts.deadline, ask, decide_everywhere, hosts.reached).decision()
    assert isinstance(decision, AllTold | Fail)
    return decision, replies
