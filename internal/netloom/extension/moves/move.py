"""Move one scope between two hosts; placementwire.py has the protocol.

A move can be interrupted anywhere, also by the end of this process. The next ``move`` of the scope goes on from what
the hosts say:

=================  ==================  ===============================================================================
source             target              what the next ``move`` does
=================  ==================  ===============================================================================
open               nothing, incoming   moves, from the beginning
closed             incoming            the same; to another target, when the source has opened again by itself
closed, open       open                the target has the higher epoch: tells the source to remove its copy
moved              open                nothing
=================  ==================  ===============================================================================

A scope with a standby leaves its group first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from netloom.claimwire import Claim, PlacementClaim
from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.extension.moves.agents import ANSWER_S, BUILD_S, Agents, Refused
from netloom.extension.moves.inventory import (
    Await,
    Inventory,
    Leftover,
    TakeOver,
    There,
    Transfer,
    leftovers,
    next_step,
    serving_hosts,
    take_inventory,
)
from netloom.placementwire import (
    ADD_FLOWS,
    CLOSE,
    CLOSED_S,
    DROP,
    FINISH,
    OPEN,
    OPEN_WITHIN_S,
    READ_FLOWS,
    READ_STATE,
    RECEIVE,
    REOPEN,
    AddFlows,
    Close,
    Closed,
    Drop,
    Finish,
    HeldScope,
    Open,
    Part,
    ReadPart,
    Receive,
    Received,
    Reopen,
)
from netloom.standbywire import LEAVE_GROUP, LeaveGroup

# How often a state that changes while it is copied is read again.
_TRIES = 10
# ``close`` waits for the scope's other calls. If it comes too late, the target may not open any more.
_CLOSE_S = OPEN_WITHIN_S / 2
# Of OPEN_WITHIN_S, for ``open`` itself: its way, and the connections that it brings.
_RESERVED_S = 1.5
# A host that opens a gate writes to its disk before.
_OPEN_S = 2 * OPEN_WITHIN_S
_LOOK_AGAIN_S = 0.5
# Until a source that has closed the gate has opened it again, on a busy host.
_DECIDED_S = 4 * CLOSED_S


class Signer(Protocol):
    """Signs with the credentials of the registration. ``proof.Credentials`` implements it."""

    async def sign(self, claim: Claim) -> str:
        """The proof of the claim. Raises BadRequest, LoginRefused."""


class Interrupted(NetloomError):
    """The operator pressed Ctrl-C before the move had changed anything."""

    exit_code = 130


@dataclass(frozen=True)
class Moved:
    """The result of one move. ``error``: None when ``target`` serves the scope now.

    ``gap_ms``: from the request that closes the gate on the source to the reply that it is open on the target, so a
    packet of the network waited at most that long. None: this run did not switch it over. ``flows``: open connections
    that were copied; ``lost``: those that were not.
    """

    scope_id: str
    source: str = ""
    target: str = ""
    epoch: int = 0
    gap_ms: float | None = None
    took_s: float = 0.0
    flows: int = 0
    lost: int = 0
    note: str = ""
    error: NetloomError | None = None


@dataclass
class _Flows:
    """The connections of one move, so far. ``ready``: from the target, for ``open``; when that was asked for."""

    token: str = ""
    ready: str = ""
    asked_at: float = 0.0
    copied: int = 0
    lost: int = 0


@dataclass(frozen=True)
class _State:
    """The state of a scope as it travels."""

    data: bytes = field(repr=False)
    revision: int
    owner: str


class Mover:
    """Moves scopes, several at once. ``step`` is called with a scope and what is done with it now.

    ``stopping``: when it is set, moves that have not closed the gate yet end without a change.
    """

    def __init__(
        self,
        agents: Agents,
        signer: Signer,
        step: Callable[[str, str], None] = lambda scope_id, what: None,
        stopping: asyncio.Event | None = None,
    ) -> None:
        self.agents = agents
        self.signer = signer
        self.stopping = stopping or asyncio.Event()
        self.on_step = step

    async def move(self, scope_id: str, to: str, inventory: Inventory, *, force: bool = False) -> Moved:
        """Move the scope to the host ``to``. Never raises NetloomError: it is in the result.

        ``inventory``: a recent one. ``force``: also to a drained host.
        """
        began = _now()
        try:
            moved = await self._move(scope_id, to, inventory, force)
        except NetloomError as error:
            moved = Moved(scope_id, self._source(scope_id, inventory), to, error=error)
        return replace(moved, took_s=_now() - began)

    @staticmethod
    def _source(scope_id: str, inventory: Inventory) -> str:
        held = inventory.held_by(scope_id)
        return next(iter([*serving_hosts(held), *(host for host, it in held.items() if it.gate == "closed")]), "")

    async def _move(self, scope_id: str, to: str, inventory: Inventory, force: bool) -> Moved:
        ends = _now() + _DECIDED_S
        while True:
            step = next_step(scope_id, to, inventory)
            if isinstance(step, Await):
                self.on_step(scope_id, f"waiting until {step.source} has opened it again")
                if _now() > ends:
                    raise HostRefused(
                        f"{step.source} keeps {scope_id} closed", hint="look at /var/log/netloom/agent.log there"
                    )
                await asyncio.sleep(_LOOK_AGAIN_S)
                inventory = await take_inventory(self.agents)
                continue
            rest = leftovers(scope_id, inventory)
            if isinstance(step, There):
                note = await self._clear(scope_id, rest)
                source = next((it.host for it in rest if it.held.gate != "incoming"), "")
                return Moved(scope_id, source, to, step.epoch, note=note)
            _check_target(to, inventory, force)
            if isinstance(step, Transfer) and step.held.group:
                await self._leave_group(scope_id, step)
                inventory = await take_inventory(self.agents)
                if not isinstance(again := next_step(scope_id, to, inventory), Transfer) or again.held.group:
                    raise HostRefused(f"{step.source}: {scope_id} still has a standby", hint="repeat the command")
                step, rest = again, leftovers(scope_id, inventory)
            notes = [await self._clear_before(scope_id, it, to) for it in rest]
            if isinstance(step, TakeOver):
                moved = await self.take_over(scope_id, step.source, step.held, step.epoch, to)
            else:
                moved = await self._transfer(scope_id, step, to)
            return replace(moved, note="; ".join(filter(None, [moved.note, *notes])))

    async def _leave_group(self, scope_id: str, step: Transfer) -> None:
        """End the standby of the scope: its host alone serves it from now on. CloudStack's next call sets one up again.

        Otherwise the standby would take over when the source closes the gate.
        """
        self.on_step(scope_id, f"ending the standby on {step.held.standby}")
        message = LeaveGroup(group_id=step.held.group, moves=True)
        await self.agents.tell(step.source, LEAVE_GROUP, message, scope_id=scope_id, owner=step.held.owner)

    async def _clear_before(self, scope_id: str, it: Leftover, to: str) -> str:
        """Remove a leftover before the scope moves; a remark when that fails and does not matter.

        A host that has closed the scope for an earlier move opens it again, with an old state, if it asks who answers
        for the addresses just when nobody does. Raises HostRefused when such a copy cannot be removed.
        """
        if it.host == to and it.held.gate == "incoming":  # it is received anew
            return ""
        remark = await self.clear(scope_id, it)  # guard: a-scope-leaves-when-no-older-copy-can-open
        if remark and (it.host == to or it.held.gate in ("open", "closed")):
            raise HostRefused(remark)
        return remark

    # ----------------------------------------------------------------------------------------------- one transfer

    async def _transfer(self, scope_id: str, step: Transfer, to: str) -> Moved:
        proof = await self.signer.sign(PlacementClaim(step.held.owner, scope_id, step.epoch, to))
        for _ in range(_TRIES):
            if (moved := await self._try(scope_id, step, to, proof)) is not None:
                return moved
            self.on_step(scope_id, "it has changed: once more")
        await self._drop(scope_id, to, step.epoch, step.held.owner)
        raise HostRefused(f"{scope_id} changes all the time on {step.source}", hint="repeat the command later")

    async def _try(self, scope_id: str, step: Transfer, to: str, proof: str) -> Moved | None:
        """The result; None if the state changed before the gate was closed."""
        source, epoch, owner = step.source, step.epoch, step.held.owner
        try:
            self.on_step(scope_id, f"reading it from {source}")
            state = await self.read_state(scope_id, source, owner)
            self.on_step(scope_id, f"building it on {to}")
            received = await self._receive(scope_id, to, epoch, proof, source, state.data, owner)
            self.on_step(scope_id, "copying the connections")
            flows = await self._copy_flows(scope_id, source, to, epoch, owner, received.ready)
            if self.stopping.is_set():  # guard: an-interrupted-move-ends-before-the-gate-closes
                raise Interrupted(f"{scope_id} was not moved")
        except (NetloomError, asyncio.CancelledError):
            await self._drop(scope_id, to, epoch, owner)
            raise
        self.on_step(scope_id, "switching over")
        began = _now()
        closed = await self._close(scope_id, step, to, state.revision, flows.token)
        if closed is None:
            return None
        last, lost_note = await self._copy_changes(scope_id, step, to, flows, closed)
        note = await self._open(scope_id, step, to, flows, last)
        gap_ms = (_now() - began) * 1000
        self.on_step(scope_id, f"removing it from {source}")
        note = "; ".join(filter(None, [lost_note, note, await self._finish(scope_id, source, to, epoch, owner)]))
        return Moved(scope_id, source, to, epoch, gap_ms=gap_ms, flows=flows.copied, lost=flows.lost, note=note)

    async def read_state(self, scope_id: str, host: str, owner: str) -> _State:
        """The whole state of the scope on this host. Raises Refused, HostUnreachable."""
        part = await self._part(READ_STATE, scope_id, host, owner, ReadPart())
        data = [part.data]
        for number in range(1, part.parts):
            more = await self._part(READ_STATE, scope_id, host, owner, ReadPart(number=number, token=part.token))
            data.append(more.data)
        return _State(b"".join(data), part.revision, part.owner)

    async def _part(
        self, command: str, scope_id: str, host: str, owner: str, wanted: ReadPart, within_s: float = ANSWER_S
    ) -> Part:
        return await self.agents.ask(host, command, wanted, Part, scope_id=scope_id, owner=owner, within_s=within_s)

    async def _receive(
        self, scope_id: str, to: str, epoch: int, proof: str, peer: str, state: bytes, owner: str
    ) -> Received:
        message = Receive(epoch=epoch, host=to, proof=proof, peer=peer, state=state)
        return await self.agents.ask(to, RECEIVE, message, Received, scope_id=scope_id, owner=owner, within_s=BUILD_S)

    async def _copy_flows(self, scope_id: str, source: str, to: str, epoch: int, owner: str, ready: str) -> _Flows:
        part = await self._part(READ_FLOWS, scope_id, source, owner, ReadPart())
        flows = _Flows(part.token, ready)
        number = 0
        while True:
            message = AddFlows(epoch=epoch, flows=part.data)
            flows.asked_at = _now()
            added = await self.agents.ask(to, ADD_FLOWS, message, Received, scope_id=scope_id, owner=owner)
            flows.ready = added.ready  # the latest: the target may open only for some seconds after it
            flows.copied += added.flows
            flows.lost += added.refused
            number += 1
            if number >= part.parts:
                return flows
            part = await self._part(READ_FLOWS, scope_id, source, owner, ReadPart(number=number, token=flows.token))

    # ---------------------------------------------------------------------------------- from close to open

    async def _close(self, scope_id: str, step: Transfer, to: str, revision: int, token: str) -> Closed | None:
        """The source's answer; None if it has another revision, so that nothing was closed."""
        source, owner = step.source, step.held.owner
        message = Close(epoch=step.epoch, to=to, revision=revision, token=token)
        try:
            return await self.agents.ask(
                source, CLOSE, message, Closed, scope_id=scope_id, owner=owner, within_s=_CLOSE_S
            )
        except Refused as refused:
            if refused.reply.holds and refused.reply.revision != revision:  # guard: a-changed-state-is-read-again
                return None
            again = await self._give_up(scope_id, step, to, token)
            if refused.reply.gate != "closed":
                raise
            raise HostRefused(f"{refused.message}; {again}", hint=refused.hint) from refused
        except NetloomError as error:
            # Nobody has asked the target to open, and nobody will: the source goes on, or opens again.
            again = await self._give_up(scope_id, step, to, token)
            raise HostUnreachable(f"{error}; {again} if it has closed it", hint="repeat the command") from error

    async def _copy_changes(
        self, scope_id: str, step: Transfer, to: str, flows: _Flows, closed: Closed
    ) -> tuple[Part, str]:
        """Copy the connections that have changed, in all parts but the last one, which is left for ``open``.

        Returns that part, and a remark if something failed. What the time does not allow is lost.
        """
        owner, counts = step.held.owner, closed.counts
        until = flows.asked_at + OPEN_WITHIN_S - _RESERVED_S
        at, part = 0, Part(data=closed.flows, gone=closed.gone)
        took_s = 0.0  # the last part; the next one will take as long
        try:
            while at + 1 < len(counts) and (began := _now()) + took_s < until:  # guard: the-last-copy-ends-in-time
                left_s = until - began
                message = AddFlows(epoch=step.epoch, flows=part.data, gone=part.gone)
                part = Part()
                added = await self.agents.ask(
                    to, ADD_FLOWS, message, Received, scope_id=scope_id, owner=owner, within_s=left_s
                )
                flows.lost += added.refused
                at += 1
                wanted = ReadPart(number=at, token=closed.token)
                part = await self._part(READ_FLOWS, scope_id, step.source, owner, wanted, within_s=left_s)
                took_s = _now() - began
        except NetloomError as error:
            flows.lost += sum(counts[at:])
            return part, f"connections that had just changed were not copied: {error}"
        flows.lost += sum(counts[at + 1 :])  # guard: connections-without-time-are-counted
        return part, ""

    async def _open(self, scope_id: str, step: Transfer, to: str, flows: _Flows, last: Part) -> str:
        """Open the gate on the target; a remark about it. Raises NetloomError when the target does not open."""
        message = Open(epoch=step.epoch, ready=flows.ready, flows=last.data, gone=last.gone)
        owner = step.held.owner
        try:
            opened = await self.agents.ask(
                to, OPEN, message, Received, scope_id=scope_id, owner=owner, within_s=_OPEN_S
            )
            flows.lost += opened.refused
            return ""
        except NetloomError as error:
            self.on_step(scope_id, f"asking {to} whether it has opened")
            ended = await self._withdraw(scope_id, to, step.epoch, owner)
            if ended == "open":
                return str(error)
            again = await self._open_again(scope_id, step, to, flows.token, ended)
            if isinstance(error, Refused):
                raise HostRefused(f"{error.message}; {again}", hint=error.hint or "repeat the command") from error
            if ended == "unknown":
                raise HostUnreachable(
                    f"{error}; if {to} has opened {scope_id}, {step.source} notices it and stays closed, else {again}",
                    hint="repeat the command when it answers",
                ) from error
            raise HostUnreachable(
                f"{error}, and did not open {scope_id}; {again}", hint="repeat the command"
            ) from error

    async def _withdraw(
        self, scope_id: str, host: str, epoch: int, owner: str
    ) -> Literal["open", "dropped", "unknown"]:
        """Let ``host`` forget the scope, unless it has opened it.

        Once it has forgotten the scope, it never opens it by this move, even if an ``open`` is still on its way.
        """
        ends = _now() + OPEN_WITHIN_S
        while True:
            try:
                await self.agents.tell(host, DROP, Drop(epoch=epoch), scope_id=scope_id, owner=owner)
                return "dropped"
            except Refused as refused:
                opened = refused.reply.gate == "open" and refused.reply.epoch == epoch
                return "open" if opened else "unknown"
            except NetloomError:
                if _now() > ends:
                    return "unknown"
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _give_up(self, scope_id: str, step: Transfer, to: str, token: str) -> str:
        """End a move whose ``open`` was not sent; says when the source serves the scope again."""
        ended = await self._withdraw(scope_id, to, step.epoch, step.held.owner)
        return await self._open_again(scope_id, step, to, token, ended)

    async def _open_again(self, scope_id: str, step: Transfer, to: str, token: str, ended: str) -> str:
        """Let the source open the gate if the target has forgotten the scope; says when the source serves it again."""
        by_itself = f"{step.source} serves it again within {CLOSED_S:.0f} s"
        if ended != "dropped":  # guard: a-source-opens-only-when-the-target-never-will
            return by_itself
        message = Reopen(epoch=step.epoch, to=to, token=token)
        try:
            await self.agents.tell(
                step.source, REOPEN, message, scope_id=scope_id, owner=step.held.owner, within_s=CLOSED_S
            )
        except NetloomError as error:
            return f"{by_itself} ({error})"
        return f"{step.source} serves it again"

    async def _finish(self, scope_id: str, host: str, to: str, epoch: int, owner: str) -> str:
        """Tell ``host`` that ``to`` serves the scope; a remark when that fails.

        It is tried until the host has decided by itself, because it must not open again.
        """
        ends = _now() + CLOSED_S
        while True:
            try:
                await self.agents.tell(
                    host, FINISH, Finish(epoch=epoch, to=to), scope_id=scope_id, owner=owner, within_s=BUILD_S
                )
                return ""
            except NetloomError as error:
                if _now() > ends or isinstance(error, Refused):
                    return f"{to} serves it, but {host} still has its copy: {error}; repeat the command to remove it"
            await asyncio.sleep(_LOOK_AGAIN_S)

    # ------------------------------------------------------------------------------------ without a serving host

    async def take_over(
        self,
        scope_id: str,
        source: str,
        held: HeldScope,
        epoch: int,
        to: str,
        *,
        fenced: bool = False,
        taken_from: str = "",
    ) -> Moved:
        """Let ``to`` continue the scope, which no host serves, with the state that ``source`` has.

        ``taken_from``: as for ``restore``. Raises NetloomError.
        """
        self.on_step(scope_id, f"reading it from {source}")
        state = await self.read_state(scope_id, source, held.owner)
        await self.restore(
            scope_id, to, epoch, held.owner, state.data, peer=held.peer, fenced=fenced, taken_from=taken_from
        )
        note = "" if source == to else await self._finish(scope_id, source, to, epoch, held.owner)
        return Moved(scope_id, source, to, epoch, note=note)

    async def restore(
        self,
        scope_id: str,
        to: str,
        epoch: int,
        owner: str,
        state: bytes,
        *,
        peer: str,
        fenced: bool = False,
        taken_from: str = "",
    ) -> None:
        """Let ``to`` serve the scope, which no host serves, with this state.

        It asks first who answers for the addresses, unless ``fenced``. ``taken_from``: a host that does not answer and
        may have a copy. Raises NetloomError; ``to`` has nothing of the scope then.
        """
        proof = await self.signer.sign(PlacementClaim(owner, scope_id, epoch, to))
        self.on_step(scope_id, f"building it on {to}")
        try:
            received = await self._receive(scope_id, to, epoch, proof, peer, state, owner)
            self.on_step(scope_id, "asking who answers for its addresses" if not fenced else "opening")
            message = Open(epoch=epoch, ready=received.ready, dead=True, fenced=fenced, taken_from=taken_from)
            await self.agents.tell(to, OPEN, message, scope_id=scope_id, owner=owner)
        except NetloomError:
            await self._drop(scope_id, to, epoch, owner)
            raise

    # -------------------------------------------------------------------------------------------------- leftovers

    async def _clear(self, scope_id: str, rest: list[Leftover]) -> str:
        """Remove what other hosts still have of the scope; a remark about those that failed."""
        return "; ".join(filter(None, [await self.clear(scope_id, it) for it in rest]))

    async def clear(self, scope_id: str, it: Leftover) -> str:
        """Remove one leftover; a remark when that fails."""
        self.on_step(scope_id, f"removing what {it.host} still has of it")
        owner = it.held.owner
        if it.held.gate == "incoming":
            return await self._drop(scope_id, it.host, it.held.epoch, owner)
        if it.held.gate == "open":  # it opened again because it could not see the other host
            message = Close(epoch=it.epoch, to=it.by, revision=it.held.revision)
            try:
                await self.agents.tell(it.host, CLOSE, message, scope_id=scope_id, owner=owner)
            except NetloomError as error:
                return f"{it.host} serves {scope_id} as well: {error}; repeat the command"
        return await self._finish(scope_id, it.host, it.by, it.epoch, owner)

    async def _drop(self, scope_id: str, host: str, epoch: int, owner: str) -> str:
        """Let ``host`` forget a scope that is incoming there; a remark when that fails.

        It forgets the scope by itself some minutes later, so an error is not reported otherwise.
        """
        try:
            await self.agents.tell(host, DROP, Drop(epoch=epoch), scope_id=scope_id, owner=owner, within_s=BUILD_S)
        except NetloomError as error:
            return f"{host} still has an unused copy: {error}"
        return ""


def _check_target(to: str, inventory: Inventory, force: bool) -> None:
    if to in inventory.failures:
        raise inventory.failures[to]
    if inventory.views[to].drained and not force:
        raise BadRequest(f"{to} is drained", hint=f"netloom undrain {to}, or --force")


def _now() -> float:
    return asyncio.get_running_loop().time()
