"""Export the states of scopes, and put exported scopes back that no host holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.extension.moves.archive import Archived, load_of
from netloom.extension.moves.inventory import Inventory, scope_order, serving_hosts, two_serve
from netloom.extension.moves.move import Moved, Mover

_AT_ONCE = 4


async def read_states(
    mover: Mover, inventory: Inventory, wanted: Sequence[str]
) -> tuple[list[Archived], list[NetloomError]]:
    """The states of the wanted scopes, or of all, and an error for each one that cannot be read.

    The state comes from the host that serves the scope. While none does, it comes from the newest copy.
    """
    known = inventory.scope_ids()
    errors: list[NetloomError] = list(inventory.failures.values())
    for scope_id in wanted:
        if scope_id not in known:
            errors.append(HostRefused(f"no host that answers has {scope_id}", hint="netloom where lists all"))
    chosen = [it for it in known if not wanted or it in wanted]
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(scope_id: str) -> Archived | NetloomError:
        held = inventory.held_by(scope_id)
        serving = serving_hosts(held)
        if len(serving) > 1:
            return two_serve(scope_id, serving, held)
        host = serving[0] if serving else max(held, key=lambda it: (held[it].epoch, held[it].revision))
        async with limit:
            try:
                state = await mover.read_state(scope_id, host, held[host].owner)
            except NetloomError as error:
                return error
        return Archived(
            scope_id=scope_id,
            owner=state.owner or held[host].owner,
            host=host,
            epoch=held[host].epoch,
            revision=state.revision,
            state=state.data,
        )

    answers = await asyncio.gather(*map(one, chosen))
    return (
        [it for it in answers if isinstance(it, Archived)],
        [*errors, *(it for it in answers if isinstance(it, NetloomError))],
    )


def plan_import(archived: Sequence[Archived], inventory: Inventory, to: str) -> list[tuple[Archived, str]]:
    """Which host gets which scope. ``to``: all of them; empty: each goes to the host with the lowest load.

    Raises NetloomError when a host holds one of the scopes, or does not answer, so that it might.
    """
    if inventory.failures:  # guard: an-import-asks-every-host
        silent = "; ".join(map(str, inventory.failures.values()))
        raise HostUnreachable(f"a host does not answer, and may hold these scopes: {silent}")
    for it in archived:
        held = inventory.held_by(it.scope_id)
        if held:  # guard: an-import-replaces-nothing
            raise HostRefused(
                f"{next(iter(held))} holds {it.scope_id}", hint="name the scopes that are to be imported, without it"
            )
    loads = inventory.loads()
    if to and to not in loads:
        raise BadRequest(f"{to} is drained", hint=f"netloom undrain {to}")
    if not loads:
        raise HostRefused("all hosts are drained", hint="netloom undrain HOST")
    plan = []
    for it in sorted(archived, key=lambda it: (-len(it.state), scope_order(it.scope_id))):
        target = to or min(loads, key=lambda host: loads[host])
        loads[target] += load_of(it)
        plan.append((it, target))
    return plan


async def put_back(mover: Mover, it: Archived, to: str, inventory: Inventory, *, peer: str, fenced: bool) -> Moved:
    """Let ``to`` serve an archived scope that no host serves. Never raises NetloomError: it is in the result."""
    epoch = max(it.epoch, inventory.epoch(it.scope_id)) + 1
    taken_from = "" if peer in inventory.views else peer  # guard: an-import-from-a-host-that-is-gone-is-claimed
    try:
        await mover.restore(it.scope_id, to, epoch, it.owner, it.state, peer=peer, fenced=fenced, taken_from=taken_from)
    except NetloomError as error:
        return Moved(it.scope_id, it.host, to, epoch, error=error)
    return Moved(it.scope_id, it.host, to, epoch, note="from the archive")
