"""Whether this host serves a scope: what it does before the scope's gate opens, and where a scope went from here.

``state.Placement`` has the gates. All that changes a placement is here; ``Moves`` and the calls of CloudStack use it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from msgspec.structs import replace

from netloom.agent.host.occupied import Occupied
from netloom.agent.kernel.arp_probe import CLAIM_BYTES
from netloom.agent.log import Log
from netloom.agent.scopes.interfaces import Host, ScopeStore
from netloom.agent.scopes.roles import NO_GROUPS, Role, Roles
from netloom.agent.scopes.slot import Slot
from netloom.agent.scopes.store import HostRecord, Moved
from netloom.errors import HostRefused, NetloomError
from netloom.placementwire import HeldScope
from netloom.plan.steps import Step
from netloom.render.want import Want
from netloom.state import Placement, Scope
from netloom.wire import Call, Reply, StandbyReply

# These go to all hosts (extension/dispatch.py).
TO_ALL_HOSTS = frozenset({"destroy-network", "destroy-vpc", "shutdown-vpc"})
OCCUPIED_S = 0.3  # three ARP probes
_ASK_AGAIN_MAX = 6


class Placements:
    """The placements of all scopes of this host, and ``host_record``: what an operator said about the host.

    Methods with a slot are called in a worker thread that holds its lock, ``with_placement`` on the event loop.
    """

    def __init__(self, store: ScopeStore, host: Host, log: Log, roles: Roles = NO_GROUPS) -> None:
        self._store = store
        self._host = host
        self._log = log
        self.roles = roles
        self.in_group: Callable[[Slot, HeldScope], HeldScope] = lambda slot, held: (
            held
        )  # with what is known of its group
        self.behind: Callable[[str, Role], str] = lambda scope_id, role: ""  # why the standby has not the newest state
        self._random = os.urandom(CLAIM_BYTES - 4)
        self.host_record = HostRecord()

    def load(self) -> None:
        """Read what an operator said about this host."""
        try:
            self.host_record = self._store.host_record()
        except NetloomError as error:
            self._log.line(f"load failed: {error}")
            self.host_record = HostRecord(drained=True)  # the safe reading: nothing new is placed here

    def with_placement(self, reply: Reply, slot: Slot | None) -> Reply:
        """The reply with what this host knows of the scope's placement, and of its own."""
        reply = replace(reply, drained=self.host_record.drained, evacuated=self.host_record.evacuated)
        if slot is None:
            return reply
        if slot.scope is not None:
            it = slot.scope.placement
            reply = replace(
                reply,
                epoch=slot.epoch,
                gate=slot.gate,
                proof=it.proof,
                proof_from=it.proof_from,
                about_to_move=slot.about_to_move is not None,
            )
            role = self.roles.of(it)
            if role is None:
                return reply
            if reply.gate == "standby":
                return replace(reply, holds=False, moved_to=role.host)
            behind = self.behind(slot.scope_id, role)
            standby = StandbyReply(
                group_id=it.group,
                host=role.standby,
                witness=role.witness,
                term=role.term,
                serving=role.serves,
                behind=behind,
                standby_silent_s=int(role.standby_silent_s),
                witness_silent_s=int(role.witness_silent_s),
            )
            return replace(reply, standby=standby)
        if slot.moved is not None:
            return replace(reply, epoch=slot.moved.epoch, moved_to=slot.moved.to)
        return reply

    def check_gate(self, slot: Slot, call: Call) -> None:
        """Raise HostRefused, or ScopeMoving, if this host does not serve the scope; then nothing is executed.

        Commands that go to all hosts end the scope here, too, whatever is left of it.
        """
        ends = call.command in TO_ALL_HOSTS
        if slot.scope is None:
            if slot.moved is None:
                slot.unproved = call.epoch > 0  # its host has died: perhaps it has not
            elif ends or call.epoch > slot.moved.epoch:  # the scope is placed here again
                self._store.forget_moved(slot.scope_id)
                slot.moved = None
            else:
                raise HostRefused(  # guard: a-call-follows-a-move
                    f"{slot.scope_id} was moved to {slot.moved.to}", hint="the next call of CloudStack goes there"
                )
            return
        placement = slot.scope.placement
        role = self.roles.of(placement)
        if role is not None and placement.gate == "open":
            if not role.active:  # guard: a-standby-executes-nothing
                raise HostRefused(
                    f"{slot.scope_id} is served by {role.host or 'another host'}; this host stands by",
                    hint="netloom where shows which host serves it",
                )
            if ends:
                return
            if not role.serves:  # guard: a-host-without-a-lease-executes-nothing
                raise ScopeMoving(slot.decided)
        if placement.gate == "open" or ends:
            return
        if placement.gate == "closed":
            raise ScopeMoving(slot.decided)  # guard: a-call-waits-for-the-end-of-a-move
        if placement.gate == "passive" and call.epoch > placement.epoch:
            placement = self.placed_by(slot.scope, call).placement
            self.place(slot, replace(placement, gate="open", peer="", why=""))
            slot.unproved = True
            return
        raise not_served(slot.scope)

    def place(self, slot: Slot, placement: Placement) -> None:
        """Save the placement of the scope. Raises HostRefused; nothing has changed then."""
        assert slot.scope is not None
        scope = placed(slot.scope, placement)
        if scope != slot.scope:
            self._store.save(scope)
            slot.scope = scope

    def find_out_who_serves(self, slot: Slot, want: Want) -> tuple[Step, ...]:
        """Build a scope that is not on this host behind a closed gate, and ask for its addresses before it opens.

        While this host was down, the scope may have been placed on another one. If somebody answers, the scope becomes
        passive. Raises HostRefused when nobody can be asked; then the gate stays closed. Returns the steps.
        """
        in_group = bool(slot.scope is not None and slot.scope.placement.group)  # its lease tells who serves
        if in_group or slot.gate != "open" or not want.namespace or self._host.serves(want):
            slot.unproved = slot.gate != "open" and not in_group
            return ()
        gated = replace(want, gated=True)
        changes = self._host.converge(slot.scope_id, gated, slot.loaded_ruleset)
        slot.loaded_ruleset = want.ruleset
        found = self._occupied_at_last(slot, gated, may_be_unknown=True)
        if found.owners:  # guard: an-occupied-address-is-not-taken
            self.make_passive(slot, f"{found}; another host may serve {slot.scope_id}")
        elif found.probing or found.unknown:
            raise HostRefused(f"{slot.scope_id} waits behind a closed gate: {found}")
        slot.unproved = False
        return changes.steps

    def placed_by(self, scope: Scope, call: Call) -> Scope:
        """``scope`` after the call, with the number of the placement that the caller knows.

        A number that no move announced here comes with a call that follows an evacuation: another host served the
        scope. This includes a scope that this host restored from nothing if another one took it meanwhile.
        """
        if self.roles.epoch(scope.placement) >= call.epoch:
            return scope
        dead = self._evacuated(scope.owner)
        taken_from = tuple(dict.fromkeys((*scope.placement.taken_from, *dead)))
        from_dead = scope.placement.from_dead or bool(dead)
        # The proof is that of an earlier placement, here or elsewhere.
        placement = replace(scope.placement, epoch=call.epoch, host="", proof="")
        return placed(scope, replace(placement, from_dead=from_dead, taken_from=taken_from))

    def asks_first(self, scope: Scope) -> bool:
        """Whether each address that the scope gains is asked for: its host before may answer for it still.

        That ends with the permission to take scopes of the dead host: when an operator says that it is back, or after
        the seven days.
        """
        return scope.placement.from_dead and bool(self._evacuated(scope.owner))

    def ask_first(self, slot: Slot, have: Want, want: Want, owner: str) -> tuple[Step, ...]:
        """Ask for the addresses of ``want`` that ``have`` lacks, before the state with them is saved.

        ``have``: what the scope wants on this host now; ``want``: with the new state. The question needs the bridges
        of new ports. So these ports are built, behind closed gates and without addresses. Returns the steps.

        Raises HostRefused if somebody answers, or nobody can be asked. The host is as before then, and the scope goes
        on with the addresses that it has.
        """
        gained = tuple(it for it in want.announce if it not in have.announce)
        if not gained:
            return ()
        links = {port.link for port in have.ports}
        new = tuple(port for port in want.ports if port.link not in links)
        steps: tuple[Step, ...] = ()
        was_unconverged = slot.unconverged
        if new:
            slot.unconverged = True
            silent = replace(want, gated=True)
            if have.namespace:
                closed = frozenset(port.host_link for port in new)
                silent = replace(have, ports=(*have.ports, *new), gated_ports=closed)
            steps = self._host.converge(slot.scope_id, silent, slot.loaded_ruleset).steps
            slot.loaded_ruleset = silent.ruleset
        # A NIC that was down until now may need some seconds.
        found = self._occupied_at_last(slot, replace(want, announce=gained), may_be_unknown=not new)
        if not (found.owners or found.probing or found.unknown):
            return steps
        if new:
            self._host.converge(slot.scope_id, have, slot.loaded_ruleset)
            slot.loaded_ruleset, slot.unconverged = have.ruleset, was_unconverged
        dead = " and ".join(self._evacuated(owner))
        raise HostRefused(
            f"{found}, so {slot.scope_id} does not take the address; nothing was changed",
            hint=f"power {dead} off and repeat the command; if it is reachable: netloom undrain {dead}",
        )

    def _evacuated(self, owner: str) -> tuple[str, ...]:
        """The dead hosts whose scopes of this owner this host may take."""
        return self.host_record.dead_hosts(owner, time.time())

    def _occupied_at_last(self, slot: Slot, want: Want, *, may_be_unknown: bool) -> Occupied:
        """:meth:`occupied`, again for some seconds while another host asks with a stronger claim: it goes first.

        Also while nobody can be asked, unless ``may_be_unknown``.
        """
        found = self.occupied(slot, want)
        for _ in range(_ASK_AGAIN_MAX):
            if found.owners or not (found.probing or (found.unknown and not may_be_unknown)):
                break
            time.sleep(OCCUPIED_S)
            found = self.occupied(slot, want)
        return found

    def occupied(self, slot: Slot, want: Want) -> Occupied:
        """Who else answers for the addresses of the scope. Blocks. Raises HostRefused.

        Of two hosts that ask at the same moment, the one with the higher epoch goes first, else a random number tells.
        """
        return self._host.occupied(slot.scope_id, want, OCCUPIED_S, self.claim(slot))

    def claim(self, slot: Slot | None) -> bytes:
        """How strong this host's claim to the scope is, see ``arp_probe.ask``."""
        epoch = slot.epoch if slot is not None else 0
        return min(epoch, 0xFFFFFFFF).to_bytes(4, "big") + self._random

    def make_passive(self, slot: Slot, why: str) -> None:
        """Serve the scope no longer, because somebody else answers for its addresses. Raises HostRefused."""
        assert slot.scope is not None
        self.place(slot, replace(slot.scope.placement, gate="passive", why=why, group=""))
        self._log.line(f"scope={slot.scope_id} warning: passive: {why}")

    def retire(self, slot: Slot, moved: Moved | None = None) -> None:
        """This host serves the scope no longer: its state goes now, and its network with the next convergence.

        ``moved``: where the scope went; this is remembered, also of a scope that has no state here. Raises HostRefused.
        """
        if moved is not None:
            self._store.save_moved(slot.scope_id, moved)
            slot.moved = moved
            if slot.scope is None and not slot.ending:
                return
        self._store.retire(slot.scope_id)
        slot.scope, slot.ending, slot.unconverged = None, True, True


def placed(scope: Scope, placement: Placement) -> Scope:
    """``scope`` with this placement. Builds that do not know closed gates, or groups, must not read its file then."""
    schema = 1 if placement.gate == "open" else 2
    return replace(scope, placement=placement, schema=3 if placement.group else schema)


def not_served(scope: Scope) -> HostRefused:
    """The error of a call whose scope this host has, but does not serve."""
    placement = scope.placement
    if placement.gate == "incoming":
        return HostRefused(
            f"{scope.scope_id} is being moved here from {placement.peer}", hint="netloom where shows what holds"
        )
    return HostRefused(
        f"{scope.scope_id} is passive on this host: {placement.why}", hint="netloom where shows which host serves it"
    )


class ScopeMoving(HostRefused):
    """The scope is about to leave this host. ``decided`` is set when that is done, or given up."""

    def __init__(self, decided: asyncio.Event) -> None:
        super().__init__("the scope is being moved")
        self.decided = decided
