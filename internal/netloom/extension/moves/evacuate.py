"""Let other hosts serve the scopes of a dead host.

A scope of which a copy is reachable goes on with its state: another host has it since an interrupted move, or since it
served the scope before, or an archive has it. For all others, each remaining host gets a signed record that it may take
any scope of the dead host. CloudStack's next command for such a scope builds it there, from what the command says.
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
class Evacuation:
    """What an evacuation will do. ``targets``: the host of each copy. ``unknown``: scopes without a copy, as far as
    hosts know their ids. ``owners``: the registrations whose scopes may be built elsewhere."""

    dead: str
    copies: tuple[Copy, ...]
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
    copies, unknown = [], []
    told = {it for view in inventory.views.values() for it in view.scopes} | {it.scope_id for it in archived}
    by_id = {it.scope_id: it for it in archived}
    for scope_id in sorted(told, key=scope_order):
        copy = _newest_copy(dead, scope_id, inventory, by_id.get(scope_id))
        if copy is not None:
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
        stays = copy.host in loads or copy.held.gate == "standby"  # guard: a-standby-is-not-bypassed
        target = targets[copy.scope_id] = copy.host if stays else min(loads, key=lambda host: loads[host])
        loads[target] = loads.get(target, 0) + _load(copy)
    return Evacuation(dead, tuple(copies), targets, tuple(unknown), owners[0])


def _newest_copy(dead: str, scope_id: str, inventory: Inventory, archived: Archived | None) -> Copy | None:
    """The newest copy of a scope that the dead host served; None if a remaining host serves it, or there is no copy.

    That of a standby comes first, and goes on where it is, also on a drained host: the standby could still take over.
    """
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
    standbys = [it for it in copies if it.held.gate == "standby"]
    return max(standbys or copies, key=lambda it: (_state_epoch(it.held), it.held.revision), default=None)


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
    """Let the targets serve the copies, several at once: the results in the order of the scopes.

    Unless ``fenced``, each target asks first whether somebody answers for the addresses, and after the first answer
    no further scope is placed. When another host is silent, too, it is asked even with ``fenced``: the operator's word
    is about one host.
    """
    fenced = fenced and not inventory.failures  # guard: fencing-is-about-one-host
    stop = asyncio.Event()
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(copy: Copy) -> Moved:
        async with limit:
            target = evacuation.targets[copy.scope_id]
            if stop.is_set() or mover.stopping.is_set():
                error: NetloomError = Interrupted(f"{copy.scope_id} was not placed")
                return Moved(copy.scope_id, evacuation.dead, target, error=error)
            moved = await _place(mover, evacuation.dead, copy, target, inventory, fenced=fenced)
            if moved.error is not None and not fenced:
                stop.set()
            done(moved)
            return moved

    return list(await asyncio.gather(*map(one, evacuation.copies)))


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
