"""Let other hosts serve the scopes of a dead host.

A scope of which a copy is reachable goes on with its state: another host has it since an interrupted move, or since it
served the scope before, or an archive has it. A scope of a group with the dead host is served by the other host of the
group alone from now on, which may serve it already. For all others, each remaining host gets a signed record that it
may take any scope of the dead host. CloudStack's next command for such a scope builds it there, from what the command
says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from netloom.claimwire import EvacuationClaim
from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.extension.moves.archive import Archived, load_of
from netloom.extension.moves.backup import put_back
from netloom.extension.moves.inventory import Inventory, load, scope_order, serving_hosts
from netloom.extension.moves.move import Interrupted, Moved, Mover
from netloom.extension.ssh import Login, SshConnection
from netloom.placementwire import RECORD_S, SET_EVACUATED, HeldScope, SetEvacuated
from netloom.standbywire import LEAVE_GROUP, LeaveGroup

REACH_S = 8.0  # a host that was just powered off answers nothing
AT_ONCE = 4


@dataclass(frozen=True)
class Copy:
    """The newest copy of a scope of the dead host. ``host``: who has it; empty: the archive."""

    scope_id: str
    host: str
    held: HeldScope
    archived: Archived | None = None


@dataclass(frozen=True)
class Partner:
    """A scope whose group has the dead host, and the other host of that group, which serves it alone from now on.

    ``copy``: as that host has it. ``served``: it serves the scope now, and the dead host stood by.
    """

    scope_id: str
    host: str
    copy: HeldScope

    @property
    def served(self) -> bool:
        return self.copy.gate == "open"


@dataclass(frozen=True)
class Evacuation:
    """What an evacuation will do. ``targets``: the host of each copy. ``unknown``: scopes without a copy, as far as
    hosts know their ids. ``owner``: of the registration whose scopes may be built elsewhere."""

    dead: str
    copies: tuple[Copy, ...]
    partners: tuple[Partner, ...]
    targets: Mapping[str, str]
    unknown: tuple[str, ...]
    owner: str


async def refuse_if_it_answers(host: str, login: Login) -> None:
    """Raises HostRefused if the host answers on its SSH port, with whatever."""
    connection = SshConnection(host, login)
    try:
        async with asyncio.timeout(REACH_S):
            await connection.open()
    except (HostUnreachable, TimeoutError):
        if connection.is_silent:
            return
    finally:
        connection.close()
    raise HostRefused(f"{host} answers, so it is not dead", hint=f"netloom drain {host}; or power it off first")


def plan_evacuation(dead: str, inventory: Inventory, archived: Sequence[Archived], owner: str = "") -> Evacuation:
    """What to do with the scopes of ``dead``.

    ``owner``: of the registration; empty: the only one that hosts and the archive name.

    Raises NetloomError.
    """
    if not inventory.views:
        raise HostUnreachable("; ".join(map(str, inventory.failures.values())) or "--hosts names no other host")
    copies, partners, unknown = [], [], []
    told = {it for view in inventory.views.values() for it in view.scopes} | {it.scope_id for it in archived}
    by_id = {it.scope_id: it for it in archived}
    for scope_id in sorted(told, key=scope_order):
        copy = _newest_copy(dead, scope_id, inventory, by_id.get(scope_id))
        if (partner := _partner(dead, scope_id, inventory)) is not None:
            partners.append(partner)
        elif copy is not None:
            copies.append(copy)
        elif _was_there(dead, scope_id, inventory):
            unknown.append(scope_id)
    loads = inventory.loads()
    if not loads:
        raise HostRefused("all other hosts are drained", hint="netloom undrain HOST")
    owners = sorted({owner} if owner else {*inventory.owners(), *(it.owner for it in archived)})
    if len(owners) != 1:
        which = f"the hosts have networks of {', '.join(owners)}" if owners else "no host that answers has a network"
        raise BadRequest(f"{which}, so whose networks {dead} had is not known", hint="--owner NAME")
    targets = {}
    for copy in sorted(copies, key=lambda it: -_load(it)):
        target = copy.host if copy.host in loads else min(loads, key=lambda host: loads[host])
        targets[copy.scope_id] = target
        loads[target] = loads.get(target, 0) + _load(copy)
    return Evacuation(dead, tuple(copies), tuple(partners), targets, tuple(unknown), owners[0])


def _partner(dead: str, scope_id: str, inventory: Inventory) -> Partner | None:
    """The host whose group with the dead one has the scope; None: there is none, or a third host serves the scope.

    It comes before all other copies, also on a drained host: it serves the scope, or could still take over.
    """
    held = inventory.held_by(scope_id)
    for host, it in held.items():
        is_active = it.gate in ("open", "standby") and not it.peer and it.standby == dead
        stands_by = it.gate == "standby" and it.peer == dead
        others_serve = any(other.gate in ("open", "closed") for name, other in held.items() if name != host)
        if it.group and (is_active or stands_by) and not others_serve:  # guard: a-standby-is-not-bypassed
            return Partner(scope_id, host, it)
    return None


def _newest_copy(dead: str, scope_id: str, inventory: Inventory, archived: Archived | None) -> Copy | None:
    """The newest copy of a scope that the dead host served; None if a remaining host serves it, or there is no copy."""
    held = inventory.held_by(scope_id)
    if serving_hosts(held) or any(
        it.gate == "closed" for it in held.values()
    ):  # guard: what-is-served-is-not-evacuated
        return None
    copies = [Copy(scope_id, host, it) for host, it in held.items() if it.peer == dead]
    if archived is not None and archived.host == dead:
        as_held = HeldScope(
            scope_id=scope_id,
            owner=archived.owner,
            epoch=archived.epoch,
            revision=archived.revision,
            gate="passive",
            peer=dead,
        )
        copies.append(Copy(scope_id, "", as_held, archived))
    return max(copies, key=lambda it: (_state_epoch(it.held), it.held.revision), default=None)


def _state_epoch(held: HeldScope) -> int:
    """The epoch at which the state was served. An incoming scope has the epoch of the placement that is to come."""
    return held.epoch - 1 if held.gate == "incoming" else held.epoch


def _was_there(dead: str, scope_id: str, inventory: Inventory) -> bool:
    """Whether a host says that the scope went to ``dead``, and no host has it."""
    told = inventory.told_of(scope_id)
    return not inventory.held_by(scope_id) and any(it.peer == dead for it in told.values())


def _load(copy: Copy) -> int:
    return load_of(copy.archived) if copy.archived is not None else load(copy.held)


async def place_copies(
    mover: Mover,
    evacuation: Evacuation,
    inventory: Inventory,
    *,
    fenced: bool,
    done: Callable[[Moved], None] = lambda moved: None,
) -> list[Moved]:
    """Let the targets serve the copies, and the partners their scopes alone, several at once: the results in the order
    of the scopes.

    Unless ``fenced``, each target asks first whether somebody answers for the addresses, and after the first answer
    no further scope is placed. When another host is silent, too, it is asked even with ``fenced``: the operator's word
    is about one host. Without that word, a scope that a partner serves stays in its group.
    """
    is_off = fenced
    fenced = fenced and not inventory.failures  # guard: fencing-is-about-one-host
    stop = asyncio.Event()
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(it: Copy | Partner) -> Moved:
        async with limit:
            target = it.host if isinstance(it, Partner) else evacuation.targets[it.scope_id]
            if stop.is_set() or mover.stopping.is_set():
                error: NetloomError = Interrupted(f"{it.scope_id} was not placed")
                return Moved(it.scope_id, evacuation.dead, target, error=error)
            if isinstance(it, Partner):
                moved = await _continue_alone(mover, evacuation.dead, it, asks_first=not (fenced or it.served))
            else:
                moved = await _place(mover, evacuation.dead, it, target, inventory, fenced=fenced)
            if moved.error is not None and not fenced:
                stop.set()
            done(moved)
            return moved

    partners = [
        it
        for it in evacuation.partners
        if is_off or not it.served  # guard: a-group-ends-by-the-operators-word
    ]
    scopes: list[Copy | Partner] = [*evacuation.copies, *partners]
    scopes.sort(key=lambda it: scope_order(it.scope_id))
    return list(await asyncio.gather(*map(one, scopes)))


async def _continue_alone(mover: Mover, dead: str, it: Partner, *, asks_first: bool) -> Moved:
    mover.on_step(it.scope_id, f"ending its group with {dead}")
    message = LeaveGroup(group_id=it.copy.group, fenced=dead, asks_first=asks_first)
    try:
        reply = await mover.agents.tell(it.host, LEAVE_GROUP, message, scope_id=it.scope_id, owner=it.copy.owner)
    except NetloomError as error:
        return Moved(it.scope_id, dead, it.host, error=error)
    return Moved(it.scope_id, dead, it.host, reply.epoch, note=f"its group with {dead} has ended")


async def _place(mover: Mover, dead: str, copy: Copy, target: str, inventory: Inventory, *, fenced: bool) -> Moved:
    if copy.archived is not None:
        return await put_back(mover, copy.archived, target, inventory, peer=dead, fenced=fenced)
    epoch = inventory.epoch(copy.scope_id) + 1
    try:
        moved = await mover.take_over(
            copy.scope_id, copy.host, copy.held, epoch, target, fenced=fenced, taken_from=dead
        )
    except NetloomError as error:
        return Moved(copy.scope_id, dead, target, epoch, error=error)
    return Moved(copy.scope_id, dead, target, epoch, note=moved.note or f"from the copy on {copy.host}")


async def set_evacuated(mover: Mover, evacuation: Evacuation, hosts: Sequence[str]) -> dict[str, NetloomError]:
    """Tell the remaining hosts that they may take the scopes of the dead one; the errors, by host."""
    until = int(time.time()) + RECORD_S
    owner = evacuation.owner

    async def tell(host: str) -> NetloomError | None:
        try:
            proof = await mover.signer.sign(EvacuationClaim(owner, evacuation.dead, until, host))
            message = SetEvacuated(host=evacuation.dead, owner=owner, until=until, proof=proof)
            await mover.agents.tell(host, SET_EVACUATED, message, owner=owner)
        except NetloomError as error:
            return error
        return None

    answers = await asyncio.gather(*map(tell, hosts))
    return {host: error for host, error in zip(hosts, answers, strict=True) if error is not None}
