"""The hosts of one registration, as one call uses them: ask them in parallel, and let ``placement`` decide.

Every host is asked in a task of its own, which ends with an answer or a failure by the deadline. After each of them
``placement`` names the next step. The channels come from a ``Pool``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import msgspec

from netloom.claimwire import EvacuationClaim, PlacementClaim, Signable, StandbyClaim
from netloom.errors import HostUnreachable
from netloom.extension.agent_client import AgentClient, OtherProtocol
from netloom.extension.deadline import Deadline
from netloom.extension.package import Package
from netloom.extension.placement import (
    AllTold,
    Ask,
    AskAgain,
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
from netloom.extension.pool import Pool, PooledChannel, Retries
from netloom.extension.progress import Progress
from netloom.extension.proof import Credentials
from netloom.extension.ssh import LOOK_THERE, ConnectionLost, Login, NoAgent
from netloom.extension.without_agent import reply_without_agent
from netloom.placementwire import CLOSED_S
from netloom.standbywire import COMMANDS as STANDBY_COMMANDS
from netloom.wire import Call, Evacuated, Reply, Signers

# The agent gets this much less than the remaining time (a tenth of it, if that is less), so that its reply is in time.
_REPLY_RESERVE_S_MAX = 0.5

# The last step of a move takes less than a second. If it fails, the old host serves again within this time.
_MOVE_S_MAX = CLOSED_S + 2.0
_AGAIN_S = 0.25
# How long the host of a scope with a standby may take before the others are asked, too. A host that works answers in
# milliseconds; a standby takes over within 1.2 s.
HESITATES_S = 0.7
_LAST_S = 1.0  # of the call's time; a host is not asked again then

_SSH_AGENT_S = 1.0

_EVACUATED_MAX = 16  # records of one host that are verified: a host may send any number
EPOCH_MAX = (1 << 53) - 1  # as far as every reader of JSON counts

LOCATE = "locate"

NextStep = Ask | AskAgain | Wait | Use | Unplaced | AllTold | Fail


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
        self.credentials = Credentials(login)
        self.reached: set[str] = set()
        self._package = package
        self._installs = installs
        self._progress = progress
        self._pool = pool
        self._asked: dict[str, AgentClient] = {}

    def is_open(self, host: str) -> bool:
        return self._pool.is_open(host, self.login, self._package)

    def remembered(self, host: str, owner: str, scope_id: str) -> Reply | None:
        """As ``AgentClient.remembered``, over the open channel to the host."""
        client = self._pool.client(host, self.login, self._package)
        return client.remembered(owner, scope_id) if client is not None else None

    def address(self, host: str) -> str:
        """The numeric address of a host with an open channel. Raises HostUnreachable when there is none."""
        address = self._pool.address(host, self.login, self._package)
        if not address:
            raise HostUnreachable(f"{host}: the connection to it is lost", hint="repeat the command")
        return address

    @property
    def standby_retries(self) -> Retries:
        """When a standby may be set up again."""
        return self._pool.standby_retries

    @property
    def standby_losses(self) -> Retries:
        """When a host that its active host did not hear may be in a group again."""
        return self._pool.standby_losses

    async def call(self, host: str, call: Call, *, installs: bool = True) -> Reply:
        """The reply of ``host``. Raises HostUnreachable, also when there is no reply by the deadline.

        Without ``installs``, nothing is installed there, whatever the call is.

        When the connection breaks during the call, it is opened once more and the call is repeated under its id: the
        agent answers a repeated call from memory.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.deadline.remaining_s()):
                try:
                    return await self._once(host, call, installs and self._installs)
                except ConnectionLost as lost:
                    try:
                        return await self._once(host, call, installs and self._installs)
                    except HostUnreachable as error:
                        raise HostUnreachable(
                            f"{lost.message} during {call.command}, and again: {error.message}", hint=error.hint
                        ) from error
        except TimeoutError:
            raise self._silence(host, call, time.monotonic() - began) from None

    async def _once(self, host: str, call: Call, installs: bool) -> Reply:
        with self._pool.channel(host, self.login, self._package, self._progress) as channel:
            try:
                await self._open(host, channel, installs)
            except NoAgent as missing:
                if installs or call.command in STANDBY_COMMANDS:
                    raise
                return await reply_without_agent(channel.agent.connection, call, missing)
            if not (installs and channel.agent.outdated and self._pool.may_replace(host)):
                return await self._reply(channel, call)
            await self._replace_agent(channel)
            if not channel.agent.is_broken:
                return await self._reply(channel, call)
        # The older agent has ended, as intended. The agent that answers now is the new one, or the old one restarted.
        with self._pool.channel(host, self.login, self._package, self._progress) as channel:
            await self._open(host, channel, installs)
            return await self._reply(channel, call)

    async def _open(self, host: str, channel: PooledChannel, installs: bool) -> None:
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
                await self._opened(channel, installs)
        finally:
            channel.listeners.discard(self._progress)
        self.reached.add(host)

    async def _opened(self, channel: PooledChannel, installs: bool) -> None:
        try:
            await asyncio.shield(channel.opening)
        except (NoAgent, OtherProtocol):
            if not installs or self._package is None:  # guard: a-removal-installs-nothing
                raise
            await asyncio.shield(channel.install())

    async def _reply(self, channel: PooledChannel, call: Call) -> Reply:
        signers = await self._signers(call.registration.owner, channel.agent)
        left_s = self.deadline.remaining_s()
        left_ms = int((left_s - min(_REPLY_RESERVE_S_MAX, left_s / 10)) * 1000)
        return await channel.agent.call(msgspec.structs.replace(call, remaining_ms=left_ms, signers=signers))

    async def _signers(self, owner: str, client: AgentClient) -> Signers | None:
        """Who can sign placements; None if the caller's SSH agent does not say it soon. The next call brings them."""
        known = client.signers.get(owner)
        if known is not None:
            return known
        own_keys = self.login.method == "own keys"
        try:
            async with asyncio.timeout(_SSH_AGENT_S if own_keys else None):
                signers = await self.credentials.signers(owner, client.host)
        except TimeoutError:
            return None
        if not own_keys:  # those can change while the login stays the same
            client.signers[owner] = signers
        return signers

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
        moves_end = time.monotonic() + min(_MOVE_S_MAX, self.deadline.remaining_s() - _LAST_S)
        now = self.situation
        while True:
            now = replace(now, reached=frozenset(self.reached))
            step = self.next_step(now)
            match step:
                case Ask(hosts):
                    for host in hosts:
                        pending[asyncio.ensure_future(self.ask(host))] = host
                    now = replace(now, asked=now.asked | set(hosts))
                case AskAgain(hosts):
                    if time.monotonic() + _AGAIN_S > moves_end:
                        now = replace(now, over=now.over | {"moves"})
                        continue
                    await asyncio.sleep(_AGAIN_S)
                    again = await self._again(hosts)
                    now = replace(now, answers={**now.answers, **again, **_ended(pending, pending)})
                case Wait(patience):
                    left_s = None
                    if patience is not None:
                        patience_s = HESITATES_S if patience == "host" else self.deadline.grace_s()
                        ends = graces.setdefault(patience, time.monotonic() + patience_s)
                        left_s = max(0.0, ends - time.monotonic())
                    done, _ = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    if not done and patience is not None:
                        now = replace(now, over=now.over | {patience})
                    now = replace(now, answers={**now.answers, **_ended(pending, done)})
                case Use() | Unplaced() | AllTold() | Fail() as decision:
                    self.situation = now
                    return decision

    async def _again(self, hosts: tuple[str, ...]) -> dict[str, HostAnswer]:
        """The new answers of those that answer soon."""
        asked = {asyncio.ensure_future(self.ask(host)): host for host in hosts}
        try:
            done, _ = await asyncio.wait(asked, timeout=self.deadline.grace_s())
        finally:
            for task in asked:
                task.cancel()
        return {asked[task]: task.result() for task in done}


def _ended(
    pending: dict[asyncio.Future[HostAnswer], str], tasks: Iterable[asyncio.Future[HostAnswer]]
) -> dict[str, HostAnswer]:
    """The answers of those of the tasks that have ended, by host. They are pending no longer."""
    return {pending.pop(task): task.result() for task in list(tasks) if task.done()}


class Inquiry:
    """Asks hosts by ``locate`` where the scope of ``call`` lives, and verifies what they say.

    One object for all questions of a call: an agent answers a repeated call id from memory, so each has its own.
    ``answers``: the last one of each host. ``from_memory``: the stored host is not asked if it has just said that it
    serves the scope.
    """

    def __init__(self, hosts: Hosts, call: Call, *, from_memory: bool = False) -> None:
        self._from_memory = from_memory
        self._hosts = hosts
        self._locate = msgspec.structs.replace(call, command=LOCATE, payload=b"{}")
        self._credentials = hosts.credentials
        self._count = itertools.count(1)
        self.answers: dict[str, HostAnswer] = {}

    async def find(self, situation: Situation) -> Use | Unplaced | Fail:
        """Where the scope lives, or where it would be created."""

        async def ask(host: str) -> HostAnswer:
            try:
                # Nothing is installed where a network is only looked for.
                return await self.look(situation, host, installs=situation.stored in ("", host))
            except HostUnreachable as error:
                return HostAnswer(failure=str(error))

        self.answers.update(situation.answers)
        decision = await DecisionLoop(situation, self._hosts.deadline, ask, decide).decision()
        assert not isinstance(decision, AllTold)
        return decision

    async def look(self, situation: Situation, host: str, *, installs: bool = False) -> HostAnswer:
        """The verified answer of one host to ``locate``. Raises HostUnreachable."""
        if self._from_memory and host == situation.stored:
            self._from_memory = False  # whoever asks once more wants to know what has changed
            remembered = self._hosts.remembered(host, self._owner, situation.scope_id)
            if (
                remembered is not None
                and remembered.epoch >= situation.epoch  # guard: no-older-placement-is-remembered
            ):
                self.answers[host] = answer = await self.answer(situation, host, remembered)
                return answer
        number = next(self._count)
        call_id = f"{self._locate.call_id}-{LOCATE}" + (f"-{number}" if number > 1 else "")
        locate = msgspec.structs.replace(self._locate, call_id=call_id)
        answer = await self.answer(situation, host, await self._hosts.call(host, locate, installs=installs))
        self.answers[host] = answer
        return answer

    async def answer(self, situation: Situation, host: str, reply: Reply) -> HostAnswer:
        """What a reply says about the placement. The stored host proves nothing: it is believed as long as it answers.

        The proofs are verified by the deadline of the call; one that was not verified does not count.
        """
        if reply.status and not reply.elsewhere:
            return HostAnswer(failure=f"{host}: {reply.error or 'its agent failed to look'}")
        if not 0 <= reply.epoch <= EPOCH_MAX:
            return HostAnswer(failure=f"{host}: its agent says that the epoch is {reply.epoch}")
        answer = HostAnswer(
            holds=reply.holds and not reply.moved_to,
            epoch=reply.epoch,
            gate="standby" if _has_no_lease(reply) else reply.gate,
            why=reply.error or reply.note,
            moved_to=reply.moved_to,
            drained=reply.drained,
            standby=reply.standby,
            about_to_move=reply.about_to_move,
        )
        if host == situation.stored:
            return answer
        try:
            async with asyncio.timeout(self._hosts.deadline.remaining_s()):
                return replace(
                    answer,
                    is_proven=(answer.holds or answer.stands_by) and await self._is_proven(host, reply),
                    evacuated=await self._evacuated(situation, host, reply.evacuated)
                    if situation.stored
                    else frozenset(),
                )
        except TimeoutError:
            return answer

    async def _is_proven(self, host: str, reply: Reply) -> bool:
        scope_id = self._locate.scope_id
        claim: Signable = PlacementClaim(self._owner, scope_id, reply.epoch, host)
        if reply.proof_from:
            if reply.epoch < reply.proof_from:  # guard: a-standbys-proof-has-a-beginning
                return False
            claim = StandbyClaim(self._owner, scope_id, reply.proof_from, host)
        return bool(reply.epoch and reply.proof) and await self._credentials.holds(claim, reply.proof)

    async def _evacuated(self, situation: Situation, host: str, records: tuple[Evacuated, ...]) -> frozenset[str]:
        """The registered hosts for which ``host`` has a valid record, spelled as in the registration."""
        valid = set()
        known = {name.lower(): name for name in (*situation.previous, situation.stored, *situation.order) if name}
        for record in [it for it in records if it.host.lower() in known][:_EVACUATED_MAX]:
            claim = EvacuationClaim(self._owner, record.host, record.until, host)
            if (
                record.until > time.time()  # guard: an-evacuation-ends
                and await self._credentials.holds(claim, record.proof)  # guard: an-evacuation-needs-a-proof
            ):
                valid.add(known[record.host.lower()])
        return frozenset(valid)

    @property
    def _owner(self) -> str:
        return self._locate.registration.owner


def _has_no_lease(reply: Reply) -> bool:
    """Whether the host is the active one of a group, and does not serve the scope at the moment."""
    return reply.gate == "open" and reply.standby is not None and not reply.standby.serving


async def tell_all(situation: Situation, hosts: Hosts, call: Call) -> tuple[AllTold | Fail, dict[str, Reply]]:
    """Send ``call`` to every candidate, the stored host and those that the scope left: the decision, and the replies.

    The call ends the scope, and with it the proof of the host that has it, so each host is asked for that before.
    """
    replies: dict[str, Reply] = {}
    inquiry = Inquiry(hosts, call)

    async def ask(host: str) -> HostAnswer:
        try:
            before = await inquiry.look(situation, host) if situation.stored else HostAnswer()
            reply = await hosts.call(host, call)
        except HostUnreachable as error:
            return HostAnswer(failure=str(error))
        replies[host] = reply
        return replace(before, failure="", moved_to=reply.moved_to or before.moved_to)

    decision = await DecisionLoop(situation, hosts.deadline, ask, decide_everywhere, hosts.reached).decision()
    assert isinstance(decision, AllTold | Fail)
    return decision, replies
