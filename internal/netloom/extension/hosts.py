"""The candidates of one registration, asked at the same time, and what they say.

The looking that placement decides about: every host is asked in a task of its own, each ends with something
heard by the deadline, and ``placement`` says after each answer what to do next. The channels belong to a ``Pool``, in
which the calls of one moment meet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgspec

from netloom.errors import HostUnreachable
from netloom.extension.agent_client import Agent
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
from netloom.extension.ssh import LOOK_THERE, ConnectionLost, Login
from netloom.wire import Call, Reply

# What the agent is told to finish within is this much less than what is left: its answer has to come back.
_WAY_BACK_S_MAX = 0.5
_REPLACE_AGAIN_S = 300.0

Next = Ask | Wait | Use | Unplaced | Done | Fail


class _Line:
    """A channel to one agent, open or on its way there, and how many calls use it.

    What installs the agent on its host goes on when the calls that waited for it have given up.
    """

    def __init__(self, host: str, login: Login, note: Callable[[str], None]) -> None:
        self.listeners: set[Callable[[str], None]] = set()  # the calls that want to know what is being installed
        self.agent = Agent(host, login, self._tell, note)
        self.opening = asyncio.create_task(self.agent.open())
        self.opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear
        self.replacing: asyncio.Task[None] | None = None
        self.users = 0
        self.left = time.monotonic()

    def _tell(self, what: str) -> None:
        for listener in self.listeners:
            listener(what)

    @property
    def is_open(self) -> bool:
        done = self.opening
        return done.done() and not done.cancelled() and done.exception() is None and not self.agent.is_broken

    @property
    def is_lost(self) -> bool:
        return self.opening.done() and not self.is_open

    @property
    def is_installing(self) -> bool:
        replaces = self.replacing is not None and not self.replacing.done()
        return replaces or (not self.opening.done() and self.agent.connection.stage == "install")

    def replace(self) -> asyncio.Task[None]:
        """Bring the host's agent up to date, beside the calls that it answers."""
        if self.replacing is None:
            self.replacing = asyncio.create_task(self.agent.replace())
        return self.replacing

    def close(self) -> None:
        self.opening.cancel()
        if self.replacing is not None:
            self.replacing.cancel()
        self.agent.close()


class Pool:
    """Channels to agents, by host and login: whoever logs in another way, or trusts another key, gets his own.

    ``resident``: it lives on when the calls have ended.
    """

    def __init__(self, *, resident: bool = False) -> None:
        self.resident = resident
        self._lines: dict[tuple[str, Login], _Line] = {}
        self._replaced: dict[str, float] = {}  # host -> when its older agent was to be replaced

    def is_open(self, host: str, login: Login) -> bool:
        """Whether a call to ``host`` would have its channel at once."""
        line = self._lines.get((host, login))
        return line is not None and line.is_open

    @property
    def is_installing(self) -> bool:
        """Whether an agent is being installed somewhere."""
        return any(line.is_installing for line in self._lines.values())

    def may_replace(self, host: str) -> bool:
        """Whether it is time to replace the older agent of ``host``: one that fails takes the agent's calls along."""
        now = time.monotonic()
        if now - self._replaced.get(host, -_REPLACE_AGAIN_S) < _REPLACE_AGAIN_S:
            return False
        self._replaced[host] = now
        return True

    @contextmanager
    def line(self, host: str, login: Login, note: Callable[[str], None]) -> Iterator[_Line]:
        """The channel, opened if need be. One that is lost, or was given up on its way, is not kept."""
        line = self._lines.get((host, login))
        if line is None or line.is_lost:
            line = self._lines[host, login] = _Line(host, login, note)
        line.users += 1
        try:
            yield line
        finally:
            line.users -= 1
            line.left = time.monotonic()
            if not line.users and not line.is_open and not line.is_installing:
                self._drop((host, login), line)

    def leave_behind(self, line: _Line) -> None:
        """Let no further call wait for this one: a first packet of its own is answered as soon as the host is back,
        one that was lost is repeated later and later."""
        self._lines = {key: it for key, it in self._lines.items() if it is not line}

    def drop_idle(self, idle_s: float) -> None:
        """Close what is lost, and what no call has used for so long, with the credentials that are kept with it."""
        old = time.monotonic() - idle_s
        for key, line in list(self._lines.items()):
            if not line.users and (line.left < old or line.is_lost) and not line.is_installing:
                self._drop(key, line)

    def close(self) -> None:
        for key, line in list(self._lines.items()):
            self._drop(key, line)

    def _drop(self, key: tuple[str, Login], line: _Line) -> None:
        line.close()
        if self._lines.get(key) is line:
            del self._lines[key]


class Hosts:
    """The hosts of one registration, as one call talks to them. ``reached``: whose agent said hello.

    ``tell`` hears of an agent that has to be installed first, ``note`` is for the log.
    """

    def __init__(
        self,
        login: Login,
        deadline: Deadline,
        pool: Pool,
        tell: Callable[[str], None] = lambda what: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.login = login
        self.deadline = deadline
        self.reached: set[str] = set()
        self._tell = tell
        self._note = note
        self._pool = pool
        self._asked: dict[str, Agent] = {}

    def is_open(self, host: str) -> bool:
        return self._pool.is_open(host, self.login)

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
                    try:
                        return await self._once(host, call)
                    except HostUnreachable as error:
                        raise HostUnreachable(
                            f"{lost.message} during {call.command}, and again: {error.message}", hint=error.hint
                        ) from error
        except TimeoutError:
            raise self._silence(host, call, time.monotonic() - began) from None

    async def _once(self, host: str, call: Call) -> Reply:
        with self._pool.line(host, self.login, self._note) as line:
            await self._opened(host, line)
            if not (line.agent.outdated and self._pool.may_replace(host)):
                return await self._answered(line, call)
            await self._bring_up_to_date(line)
            if not line.agent.is_broken:
                return await self._answered(line, call)
        # The agent that answered has ended, as it should; the next one may be new, or the same once more.
        with self._pool.line(host, self.login, self._note) as line:
            await self._opened(host, line)
            return await self._answered(line, call)

    async def _opened(self, host: str, line: _Line) -> None:
        self._asked[host] = line.agent
        line.listeners.add(self._tell)
        try:
            began = time.monotonic()
            await asyncio.wait([line.opening], timeout=self.deadline.reach_s())
            if not line.opening.done() and line.agent.connection.is_silent:
                self._pool.leave_behind(line)
                raise line.agent.connection.silence(time.monotonic() - began)
            # A shield: two calls may wait for one channel, and the end of one must not end the other's.
            await asyncio.shield(line.opening)
        finally:
            line.listeners.discard(self._tell)
        self.reached.add(host)

    async def _answered(self, line: _Line, call: Call) -> Reply:
        left_s = self.deadline.remaining_s()
        left_ms = int((left_s - min(_WAY_BACK_S_MAX, left_s / 10)) * 1000)
        return await line.agent.call(msgspec.structs.replace(call, remaining_ms=left_ms))

    async def _bring_up_to_date(self, line: _Line) -> None:
        """In the background of a pool that stays. Another one ends with its call, which waits for half of its time."""
        replacing = line.replace()
        if not self._pool.resident:
            await asyncio.wait([replacing], timeout=self.deadline.remaining_s() / 2)

    def _silence(self, host: str, call: Call, waited_s: float) -> HostUnreachable:
        if host not in self.reached:
            return self._asked[host].connection.silence(waited_s)
        return HostUnreachable(
            f"{host}: its agent did not answer {call.command} within {waited_s:.0f} s",
            hint=LOOK_THERE,
        )


@dataclass
class Enquiry:
    """Asks hosts until a decision is reached. ``ask`` never raises: a failure is something heard."""

    situation: Situation
    deadline: Deadline
    ask: Callable[[str], Awaitable[Heard]]
    next: Callable[[Situation], Next]
    reached: Callable[[], frozenset[str]] = frozenset

    async def decision(self) -> Use | Unplaced | Done | Fail:
        """The decision. Who was asked and was not waited for may go on; when the call is given up, all end."""
        pending: dict[asyncio.Future[Heard], str] = {}
        try:
            return await self._decided(pending)
        except asyncio.CancelledError:
            for asked in pending:
                asked.cancel()
            raise

    async def _decided(self, pending: dict[asyncio.Future[Heard], str]) -> Use | Unplaced | Done | Fail:
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
