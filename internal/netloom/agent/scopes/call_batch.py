"""Calls of one scope that have waited for the same turn: their transitions in order, one convergence, a reply each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec.structs import replace

from netloom import names
from netloom.agent.host.changes import HostChanges
from netloom.agent.log import Log
from netloom.agent.processes.failures import ServiceFailure
from netloom.agent.scopes.interfaces import ScopeServices, ScopeStore
from netloom.agent.scopes.placements import Placements, ScopeMoving, not_served
from netloom.agent.scopes.slot import Slot, WaitingCall
from netloom.commands import table
from netloom.commands.asked import Asked
from netloom.commands.transition import Context, Transitioned
from netloom.errors import HostRefused, one_line
from netloom.plan.steps import Step
from netloom.protocol.lb import ApplyLbRules
from netloom.render.want import Want
from netloom.state import Scope
from netloom.state.served import Served
from netloom.wire import Call, Reply

# These commands end a scope even if its state is lost.
END_COMMANDS = frozenset({"shutdown-network", "destroy-network", "shutdown-vpc", "destroy-vpc"})


class Convergence(Protocol):
    """What a batch needs of ``Scopes``, which describes the methods."""

    def read_state(self, slot: Slot) -> None: ...
    def converge(self, slot: Slot, *, asked: frozenset[Served]) -> HostChanges: ...
    def placed_want(self, slot: Slot) -> Want: ...
    def placed_want_of(self, scope: Scope) -> Want: ...


class CallBatches:
    """Applies calls, in a worker thread that holds the lock of the slot."""

    def __init__(
        self, store: ScopeStore, services: ScopeServices, placements: Placements, scopes: Convergence, log: Log
    ) -> None:
        self._store = store
        self._services = services
        self._placements = placements
        self._scopes = scopes
        self._log = log

    def apply_some(self, slot: Slot, rest: deque[WaitingCall]) -> HostChanges:
        """Take the first of these calls, and those that can be applied together with it. Raises their error.

        Each of them has its reply or its error afterwards. If the state cannot be read, ``rest`` is as before.
        """
        self._scopes.read_state(slot)
        waiting = list(rest)
        group = self._transitions(slot, rest)
        if not group:
            assert waiting[-1].error is not None
            raise waiting[-1].error
        if (
            slot.unproved and slot.scope is not None and self._asks_first(group)
        ):  # guard: what-a-scope-has-comes-before-what-it-gains
            rest.extendleft(reversed(group))
            return self._scopes.converge(slot, asked=frozenset())
        try:
            changes = self._settle(slot, group)
        except Exception as error:
            for it in group:
                it.error = error
            raise
        group[0].steps = changes.count
        return changes

    def apply(self, slot: Slot, call: Call, payload: msgspec.Struct) -> tuple[Reply, HostChanges]:
        """Apply one call, whose state has been read and whose gate has been checked."""
        it = WaitingCall(call)
        it.payload, it.outcome = payload, self._change(slot.scope, call, payload)
        changes = self._settle(slot, [it])
        reply, _ = it.result()
        return reply, changes

    def _transitions(self, slot: Slot, rest: deque[WaitingCall]) -> list[WaitingCall]:
        """Take calls that can be saved at once from ``rest``, and compute their states, each from the one before.

        A call that is refused gets its error and changes nothing. One that creates or ends the scope comes alone, and
        one whose new addresses may turn out to be in use.
        """
        group: list[WaitingCall] = []
        while rest and (not group or slot.scope is not None):
            it = rest[0]
            try:
                if it.payload is None:
                    it.payload = table.decode(it.call.command, it.call.payload)
                self._placements.check_gate(slot, it.call)
                outcome = self._change(group[-1].new_scope if group else slot.scope, it.call, it.payload)
            except ScopeMoving as moving:
                for waiting in rest:
                    waiting.error = moving
                rest.clear()
                break
            except Exception as error:  # noqa: BLE001, the call reports it
                rest.popleft().error = error
                continue
            alone = outcome.scope is None or self._placements.asks_first(
                outcome.scope
            )  # guard: a-call-that-may-be-refused-late-comes-alone
            if alone and group:
                break
            it.outcome = outcome
            group.append(rest.popleft())
            if alone:
                break
        return group

    def _asks_first(self, group: Sequence[WaitingCall]) -> bool:
        scope = group[-1].new_scope
        return scope is not None and self._placements.asks_first(scope)

    def _change(self, scope: Scope | None, call: Call, payload: msgspec.Struct) -> Transitioned:
        """The transition of a call, with the number of the placement that the caller knows."""
        context = Context(scope_id=call.scope_id, registration=call.registration)
        outcome = table.apply(call.command, scope, payload, context)
        if outcome.scope is None:
            return outcome
        return replace(outcome, scope=self._placements.placed_by(outcome.scope, call))

    def _settle(self, slot: Slot, group: Sequence[WaitingCall]) -> HostChanges:
        """Save the state after the last of these calls, converge once, and make the replies.

        Until the state is saved, nothing has changed.
        """
        scope = group[-1].new_scope
        built: tuple[Step, ...] = ()
        if scope is None:
            if slot.scope is not None:
                self._store.retire(slot.scope_id)
            # If the state was lost, its network may still exist on the host. Only an end command removes that.
            if slot.scope is not None or group[-1].call.command in END_COMMANDS:
                slot.ending = True
            slot.scope = None
        elif scope != slot.scope:
            # A scope that is new here is asked for as a whole, behind closed gates.
            if self._asks_first(group) and not slot.unproved:  # guard: gained-addresses-are-asked-for
                have, want = self._scopes.placed_want(slot), self._scopes.placed_want_of(scope)
                built = self._placements.ask_first(slot, have, want, scope.owner)
            self._store.save(scope)  # guard: state-is-saved-first
            for command, reasons in scope.left_out.items():
                if slot.scope is None or slot.scope.left_out.get(command) != reasons:
                    for reason in reasons:
                        self._log.line(f"scope={slot.scope_id} warning: not in force: {command}: {reason}")
            slot.scope, slot.ending = scope, False
        asked = [table.asked_of_services(it.call.command, it.decoded) for it in group]
        changes = HostChanges()
        if slot.scope is not None or slot.ending:
            changes = self._scopes.converge(slot, asked=frozenset().union(*(it.serve | it.end for it in asked)))
        if slot.scope is not None and slot.scope.placement.gate == "passive":
            raise not_served(slot.scope)  # another host was found when the scope was built
        for it, services in zip(group, asked, strict=True):
            it.reply = self._reply(slot, it, services)
        return replace(changes, steps=built + changes.steps)

    def _reply(self, slot: Slot, it: WaitingCall, asked: Asked) -> Reply:
        """The reply to a call whose state is saved and applied."""
        scope = it.new_scope
        reply = Reply(
            call_id=it.call.call_id,
            output=it.outcome.output if it.outcome is not None else "",
            holds=scope is not None,
            revision=scope.revision if scope is not None else 0,
        )
        network_id = str(getattr(it.decoded, "network_id", ""))
        failure = _failure_of(slot, asked, network_id)
        if failure is not None:
            slot.told |= {failure.name}
        error = self._unbalanced_rules(slot, it.decoded) if failure is None else failure.error
        if error is not None:
            reply = replace(reply, status=error.exit_code, error=one_line(error.message), hint=one_line(error.hint))
        return replace(reply, note=_untold(slot))

    def _unbalanced_rules(self, slot: Slot, payload: object) -> HostRefused | None:
        """The error if load-balancer rules of this call wait for their port. Other calls do not report them."""
        if not isinstance(payload, ApplyLbRules):
            return None
        waiting = self._services.waiting(slot.scope_id)
        named = [f"rule {int(it.id)} ({waiting[int(it.id)]})" for it in payload.lb_rules.items if int(it.id) in waiting]
        if not named:
            return None
        return HostRefused(
            f"another process in {names.namespace(slot.scope_id)} uses the port of {', '.join(named[:5])}",
            hint="the other rules are in force; ss -ltnp in the namespace shows that process",
        )


def _failure_of(slot: Slot, asked: Asked, network_id: str) -> ServiceFailure | None:
    """The failed service that the call asked for, if there is one: in its own network, or in the whole scope."""
    for it in slot.failed:
        needed = asked.serve | (asked.end if it.stale else frozenset())
        if it.serves & needed and it.network_id in ("", network_id):  # guard: a-call-fails-for-what-it-asked
            return it
    return None


def _untold(slot: Slot) -> str:
    """The services that fail, and what the host's firewall drops, in one line, without what an earlier reply named."""
    new = [it for it in slot.failed if it.name not in slot.told]
    slot.told |= {it.name for it in new}
    dropped, slot.blocked_untold = slot.blocked_untold, []
    return one_line("; ".join([*map(str, new), *dropped]))
