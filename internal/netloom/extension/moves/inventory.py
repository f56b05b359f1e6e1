"""What the hosts of a registration hold, and what the next step of a move is. Reads hosts; changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from netloom import names
from netloom.errors import HostRefused, HostUnreachable, NetloomError
from netloom.extension.moves.agents import Agents, Refused
from netloom.placementwire import PLACEMENTS, HeldScope, ListPlacements, Placements

# More than a host can have: a hostile one must not send pages without end.
_SCOPES_MAX = 100_000


def load(held: HeldScope) -> int:
    """The load of a scope: its networks, public addresses and NICs together, at least 1."""
    return max(1, held.networks + held.public_ips + held.nics)


@dataclass(frozen=True)
class HostView:
    """What one host says. ``scopes``: by id, with those that moved away (gate "moved")."""

    scopes: Mapping[str, HeldScope] = field(default_factory=dict)
    drained: bool = False
    evacuated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """What all hosts say: ``views`` of those that answered, ``failures`` of the others, both in the order asked."""

    views: Mapping[str, HostView]
    failures: Mapping[str, NetloomError] = field(default_factory=dict)

    def scope_ids(self) -> list[str]:
        """The scopes that a host holds, sorted by kind and number."""
        found = {it for view in self.views.values() for it, held in view.scopes.items() if held.gate != "moved"}
        return sorted(found, key=scope_order)

    def told_of(self, scope_id: str) -> dict[str, HeldScope]:
        """What each host says about the scope, by host. Hosts that know nothing of it are left out."""
        return {host: view.scopes[scope_id] for host, view in self.views.items() if scope_id in view.scopes}

    def held_by(self, scope_id: str) -> dict[str, HeldScope]:
        """:meth:`told_of` without hosts from which it moved away."""
        return {host: held for host, held in self.told_of(scope_id).items() if held.gate != "moved"}

    def epoch(self, scope_id: str) -> int:
        """The highest epoch that a host knows of the scope."""
        return max((held.epoch for held in self.told_of(scope_id).values()), default=0)

    def owners(self) -> list[str]:
        """The registrations whose scopes the hosts hold."""
        return sorted({held.owner for view in self.views.values() for held in view.scopes.values() if held.owner})

    def loads(self) -> dict[str, int]:
        """The load of each host that takes scopes: it answered, and is not drained."""
        return {
            host: sum(load(held) for held in view.scopes.values() if held.gate in ("open", "incoming"))
            for host, view in self.views.items()
            if not view.drained  # guard: a-drained-host-takes-no-scope
        }


def is_scope_id(text: str) -> bool:
    """Whether ``text`` names a scope: ``net-204``, ``vpc-7``."""
    kind, _, number = text.partition("-")
    return kind in ("net", "vpc") and names.ID.match(number) is not None


def scope_order(scope_id: str) -> tuple[str, int]:
    """A key that sorts ``net-9`` before ``net-10``."""
    kind, _, number = scope_id.partition("-")
    return kind, int(number)


async def take_inventory(agents: Agents) -> Inventory:
    """Ask all hosts in parallel. Never raises NetloomError: the failures are in the result."""
    answers = await asyncio.gather(*(_view(agents, host) for host in agents.hosts))
    pairs = list(zip(agents.hosts, answers, strict=True))
    return Inventory(
        {host: it for host, it in pairs if isinstance(it, HostView)},
        {host: it for host, it in pairs if isinstance(it, NetloomError)},
    )


async def _view(agents: Agents, host: str) -> HostView | NetloomError:
    try:
        return await view_of(agents, host)
    except NetloomError as error:
        return error


async def view_of(agents: Agents, host: str) -> HostView:
    """What one host says. Raises HostUnreachable or HostRefused."""
    scopes: dict[str, HeldScope] = {}
    after = ""
    while True:
        try:
            page = await agents.ask(host, PLACEMENTS, ListPlacements(after=after), Placements)
        except Refused as refused:
            if refused.reply.status == 1:  # guard: an-older-agent-is-named
                raise HostRefused(
                    f"{host}: its agent is older and knows no moves", hint=f"netloom agent install --hosts {host}"
                ) from refused
            raise
        new = {it.scope_id: it for it in page.scopes if is_scope_id(it.scope_id)}
        if len(new) != len(page.scopes) or not scopes.keys().isdisjoint(new) or len(scopes) > _SCOPES_MAX:
            raise HostRefused(f"{host}: its list of scopes is not one", hint="are all builds the same?")
        scopes |= new
        if not page.more or not page.scopes:
            return HostView(scopes, page.drained, page.evacuated)
        after = page.scopes[-1].scope_id


# ------------------------------------------------------------------------------------------------- the next step


@dataclass(frozen=True)
class Transfer:
    """Move the scope from ``source``, which serves it, or has closed it for this target, to the target.

    ``epoch``: the new one.
    """

    source: str
    held: HeldScope
    epoch: int


@dataclass(frozen=True)
class TakeOver:
    """No host serves the scope. Continue it on the target with the state of ``source``."""

    source: str
    held: HeldScope
    epoch: int


@dataclass(frozen=True)
class Await:
    """A move to another host has stopped halfway: ``source`` has closed the gate. Within seconds it opens again."""

    source: str


@dataclass(frozen=True)
class There:
    """The target serves the scope."""

    epoch: int


@dataclass(frozen=True)
class Leftover:
    """What ``host`` still has of a scope that ``by`` serves with ``epoch``."""

    host: str
    held: HeldScope
    by: str
    epoch: int


def leftovers(scope_id: str, inventory: Inventory) -> list[Leftover]:
    """What other hosts than the serving one still have of the scope, and can remove.

    Empty while no host serves the scope, or more than one with the same epoch.
    """
    held = inventory.held_by(scope_id)
    serving = serving_hosts(held)
    if len(serving) != 1:
        return []
    (by,) = serving
    epoch = held[by].epoch
    return [
        Leftover(host, it, by, epoch)
        for host, it in held.items()
        if host != by
        and it.gate in ("open", "closed", "passive", "incoming", "standby")
        and not stands_by(it, held[by])  # guard: a-standby-is-no-leftover
        and (it.gate == "incoming" or it.epoch < epoch)  # guard: a-newer-copy-is-not-removed
    ]


def stands_by(copy: HeldScope, served: HeldScope) -> bool:
    """Whether the host with this copy belongs to the group of the host that serves the scope."""
    return bool(copy.group) and copy.group == served.group


def serving_hosts(held: Mapping[str, HeldScope]) -> list[str]:
    """The hosts that serve the scope, of those with the highest epoch among them."""
    newest = max((it.epoch for it in held.values() if it.gate == "open"), default=0)
    return [host for host, it in held.items() if it.gate == "open" and it.epoch == newest]


def next_step(scope_id: str, to: str, inventory: Inventory) -> Transfer | TakeOver | Await | There:
    """What to do so that ``to`` serves the scope. Raises NetloomError, with a remedy, when that is not possible."""
    held = inventory.held_by(scope_id)
    serving = serving_hosts(held)
    if len(serving) > 1:
        raise two_serve(scope_id, serving, held)
    epoch = inventory.epoch(scope_id) + 1
    if serving:
        (source,) = serving
        if source == to:
            return There(held[source].epoch)
        return Transfer(source, held[source], epoch)
    if closed := [host for host, it in held.items() if it.gate == "closed"]:
        source = max(closed, key=lambda host: held[host].epoch)
        return Transfer(source, held[source], epoch) if held[source].peer == to else Await(source)
    return _unserved(scope_id, inventory, epoch)


def _unserved(scope_id: str, inventory: Inventory, epoch: int) -> TakeOver:
    held = inventory.held_by(scope_id)
    silent = [str(error) for error in inventory.failures.values()]
    passive = [host for host, it in held.items() if it.gate == "passive"]
    # Perhaps such a host serves it still, or takes it over.
    unreadable = any(it.gate in ("unreadable", "standby") for it in held.values())  # guard: a-standby-may-take-over
    if (
        passive
        and not silent  # guard: nothing-is-taken-over-while-a-host-is-silent
        and not unreadable
    ):
        newest = max(passive, key=lambda host: (held[host].epoch, held[host].revision))
        return TakeOver(newest, held[newest], epoch)
    if not held:
        gone = [
            f"{host} says that it went to {it.peer}"
            for host, it in inventory.told_of(scope_id).items()
            if it.peer not in inventory.views
        ]
        what = f"no host that answers has {scope_id}"
    else:
        gone = [f"{host} has it {_gate(it)}" for host, it in held.items()]
        what = f"no host that answers serves {scope_id}"
    line = "; ".join([what, *gone, *silent])
    if silent:
        raise HostUnreachable(line, hint="bring that host back; if it is dead: netloom evacuate <host>")
    if not held:
        raise HostRefused(line, hint="netloom where lists all; does --hosts name every host of the registration?")
    raise HostRefused(line, hint=f"netloom where {scope_id}")


def _gate(held: HeldScope) -> str:
    peer = f" from {held.peer}" if held.gate == "incoming" and held.peer else ""
    return held.gate + peer + (f" ({held.why})" if held.why else "")


def two_serve(scope_id: str, serving: list[str], held: Mapping[str, HeldScope]) -> HostRefused:
    """The error when hosts with the same epoch serve one scope."""
    return HostRefused(
        f"{' and '.join(serving)} both serve {scope_id} (epoch {held[serving[0]].epoch})",
        hint=f"CloudStack uses one of them: stop the agent of the other, and delete its state file of {scope_id}",
    )
