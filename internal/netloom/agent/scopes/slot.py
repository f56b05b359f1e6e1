"""A scope in the memory of the agent, and a call that waits for its turn on it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import msgspec

from netloom.agent.clock import Timer
from netloom.agent.processes.failures import ServiceFailure
from netloom.agent.scopes.handover import Handover
from netloom.agent.scopes.roles import NO_GROUPS, Roles
from netloom.agent.scopes.store import Moved
from netloom.commands.transition import Transitioned
from netloom.render.ruleset import Ruleset
from netloom.render.want import Want
from netloom.state import Scope
from netloom.wire import Call, Reply


class Slot:
    """A scope in the memory of the agent.

    ``users``, ``retry``, ``failures``, ``announcing`` and ``checked`` belong to the event loop, all else to the holder
    of ``lock``.
    """

    def __init__(self, scope_id: str, roles: Roles = NO_GROUPS) -> None:
        self.scope_id = scope_id
        self._roles = roles
        self.lock = asyncio.Lock()  # guard: one-call-of-a-scope-at-a-time
        self.users = 0  # calls and tasks that hold the lock or wait for it
        self.scope: Scope | None = None
        self.state_read = False
        self.unreadable = False  # the scope has a state file, but it cannot be used
        self.ending = False  # a command ended the scope, and parts of it may still exist on the host
        self.unconverged = False  # the host may differ from the state
        self.failed: tuple[ServiceFailure, ...] = ()  # the services that do not do what the state says
        self.told: frozenset[str] = frozenset()  # the names of those that a reply has named
        self.rendered: tuple[Scope | None, Want] | None = None
        self.missing_helpers: tuple[str, ...] = ()  # of conntrack; without them it was rendered
        self.enforced_scope: Scope | None = None  # the state that open flows were last checked against; None: not known
        self.revoked = True  # with that: whether a flow may be revoked
        self._loaded_ruleset: Ruleset | Callable[[], Ruleset | None] | None = None
        self.blocked: list[str] = []  # what keeps frames from passing the host's firewall, as it was logged
        self.blocked_untold: list[str] = []  # of that, what no reply has named yet
        self.failures = 0  # convergences that failed in a row
        self.retry: Timer | None = None
        self.announcing: list[Timer] = []
        self.checked = -math.inf  # when the last periodic check began
        self.current_work = ""  # for the error message of a call that waits too long
        self.waiting: list[WaitingCall] = []  # calls that no turn has taken yet
        self.moved: Moved | None = None  # where the scope went from here
        self.unproved = False  # restored from nothing: perhaps another host serves it by now
        self.decided = asyncio.Event()  # is set, and replaced, when a closed gate has opened or the scope is gone
        self.handover = Handover()  # while the scope moves away
        self.undecided: Timer | None = None  # ends the time in which a move must be decided
        self.about_to_move: Timer | None = None  # ends the time in which a move may begin

    @property
    def loaded_ruleset(self) -> Ruleset | None:
        """The ruleset that was loaded last, as far as the agent knows."""
        if callable(self._loaded_ruleset):
            self._loaded_ruleset = self._loaded_ruleset()
        return self._loaded_ruleset

    @loaded_ruleset.setter
    def loaded_ruleset(self, ruleset: Ruleset | Callable[[], Ruleset | None] | None) -> None:
        """A function is called when somebody asks."""
        self._loaded_ruleset = ruleset

    @property
    def idle(self) -> bool:
        """Whether the slot has no information that would be lost with it."""
        nothing = self.scope is None and not self.ending and not self.unreadable
        return nothing and not self.users and self.retry is None and self.moved is None

    @property
    def gate(self) -> str:
        """The gate as in ``Roles.gate``; empty without a state."""
        scope = self.scope
        return self._roles.gate(scope.placement) if scope is not None else ""

    @property
    def epoch(self) -> int:
        """The number of the placement now; 0 without a state."""
        scope = self.scope
        return self._roles.epoch(scope.placement) if scope is not None else 0


class WaitingCall:
    """A call that waits for its turn; afterwards it has a reply or an error. ``steps``: what was done on the host."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.payload: msgspec.Struct | None = None
        self.outcome: Transitioned | None = None
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.steps = 0

    @property
    def decoded(self) -> msgspec.Struct:
        assert self.payload is not None
        return self.payload

    @property
    def new_scope(self) -> Scope | None:
        """The state after the call."""
        assert self.outcome is not None
        return self.outcome.scope

    def result(self) -> tuple[Reply, int]:
        """The reply and the steps. Raises the error."""
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        return self.reply, self.steps
