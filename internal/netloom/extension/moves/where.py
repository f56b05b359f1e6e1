"""Where scopes are, in rows, and what is wrong with that, in plain words with a remedy. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from netloom.extension.moves.inventory import (
    Inventory,
    leftovers,
    scope_order,
    serving_hosts,
    stands_by,
    two_serve,
)
from netloom.placementwire import GATEWAY, HeldScope


@dataclass(frozen=True)
class Place:
    """What one host says about one scope."""

    scope_id: str
    host: str
    held: HeldScope


def places(inventory: Inventory, scope_ids: Sequence[str] = ()) -> list[Place]:
    """The hosts of all scopes; of ``scope_ids`` also the hosts from which they moved away."""
    rows = []
    for scope_id in sorted(scope_ids or inventory.scope_ids(), key=scope_order):
        told = inventory.told_of(scope_id) if scope_ids else inventory.held_by(scope_id)
        newest_first = sorted(told.items(), key=lambda it: (it[1].gate != "open", -it[1].epoch))
        rows += [Place(scope_id, host, held) for host, held in newest_first]
    return rows


def remarks(scope_id: str, inventory: Inventory) -> list[str]:
    """What is wrong with the placement of a scope, each with a remedy.

    Empty when one host serves it, at most one other stands by for it, and no further host has anything of it.
    """
    return list(_remarks(scope_id, inventory))


def _remarks(scope_id: str, inventory: Inventory) -> Iterator[str]:
    held = inventory.held_by(scope_id)
    groups = Counter(it.group for it in held.values() if it.gate == "open" and it.group)
    if twice := [group for group, count in groups.items() if count > 1]:
        active = [host for host, it in held.items() if it.gate == "open" and it.group == twice[0]]
        yield (
            f"{' and '.join(active)} both say that they are active for {scope_id} in the group {twice[0]}: "
            f"look again; if they still do, stop the agent of the one with the lower epoch"
        )
        return
    serving = serving_hosts(held)
    if len(serving) > 1:
        yield str(two_serve(scope_id, serving, held))
        return
    if not serving:
        yield from _unserved(scope_id, inventory)
        return
    (by,) = serving
    removable = {it.host for it in leftovers(scope_id, inventory)}
    for host, it in held.items():
        if host == by:
            continue
        if it.gate == "standby" and stands_by(it, held[by]):
            if it.peer.lower() != by.lower():
                yield f"{host} stands by for {it.peer or 'nobody'}, but {by} serves {scope_id}: look again"
            continue
        remedy = f"netloom move {scope_id} --to {by} removes it"
        match it.gate:
            case "open":
                yield f"{host} serves {scope_id} too, with the older epoch {it.epoch}: {remedy}"
            case "incoming":
                yield (
                    f"{host} has a copy of {scope_id} from a move that is under way, or was interrupted: "
                    f"netloom move {scope_id} --to {host} repeats it, with --to {by} the copy is removed"
                )
            case "unreadable":
                yield f"{host} cannot read its state file of {scope_id}: repair or remove that file"
            case "standby" if host in removable:
                yield f"{host} stands by for {scope_id} in a group that {by} has left: {remedy}"
            case _ if host in removable:
                why = f" ({it.why})" if it.why else ""
                yield f"{host} has an old copy of {scope_id}, {it.gate}{why}: {remedy}"
            case _:
                yield (
                    f"{host} has a copy of {scope_id}, {it.gate}, that is not older than that of {by} "
                    f"(epoch {it.epoch}): delete its state file on the host that is wrong"
                )


def _unserved(scope_id: str, inventory: Inventory) -> Iterator[str]:
    held = inventory.held_by(scope_id)
    if not held:
        for host, it in inventory.told_of(scope_id).items():
            if it.peer in inventory.views:
                yield f"{host} gave {scope_id} to {it.peer}, which does not have it any more: it was deleted there"
            else:
                yield f"{host} gave {scope_id} to {it.peer}, which did not answer"
        return
    for host, it in held.items():
        match it.gate:
            case "unreadable":
                yield f"{host} cannot read its state file of {scope_id}, and leaves the network as it is: repair that"
            case "closed":
                yield (
                    f"{host} has closed {scope_id} for a move to {it.peer or 'another host'}, and opens it again "
                    f"within seconds unless the move ends: look again"
                )
            case "standby" if not it.peer:
                yield f"{host} is active for {scope_id} without a lease: it hears neither {it.standby} nor {_voter(it)}"
            case "standby" if it.peer not in inventory.views:
                why = f" ({it.behind})" if it.behind else ""
                yield (
                    f"{host} stands by for {it.peer}, which did not answer, and has not taken {scope_id} over{why}: "
                    f"bring {it.peer} or {_voter(it)} back; if {it.peer} is dead: netloom evacuate {it.peer}"
                )
            case "standby":
                yield f"{host} stands by for {it.peer}, which does not serve {scope_id}: look again"
            case "incoming":
                peer = it.peer or "its host"
                yield (
                    f"{host} has a copy of {scope_id} from an interrupted move, but {peer} does not serve it: "
                    f"if {peer} is dead, netloom evacuate {peer}"
                )
            case _:
                why = f" ({it.why})" if it.why else ""
                yield (
                    f"no host that answers serves {scope_id}; {host} has it, but stays passive{why}: when nobody "
                    f"uses its addresses any more, netloom move {scope_id} --to {host}"
                )


def _voter(it: HeldScope) -> str:
    """Who has the second vote in the group of a scope, in a sentence."""
    return "the gateway" if it.witness == GATEWAY else it.witness
