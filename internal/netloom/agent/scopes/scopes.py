"""The scopes of this host in memory, and the calls that change them.

Theory of operation
===================

Each scope has a ``Slot`` with a lock. All work on the scope holds this lock. Calls of one scope that wait for it are
executed together, in the order in which they came: their transitions one after the other, then one convergence.
Different scopes run at the same time, each in a worker thread.

A call takes these steps. All but the first and the last run in one worker thread:

1. ``execute`` waits until the earlier calls of the scope are done, at most for the time that the caller has left.
2. If the scope is just moving to another host, ``execute`` waits until that is decided. If it has moved, the reply says
   where to, and the call is not executed.
3. The state is read from disk (the first time). ``CallBatches`` decodes the payload and computes the new state.
4. The new state is written to disk. Until then nothing has changed, and an error leaves everything as it was. New
   addresses of a scope whose host was declared dead are asked for by ARP before that.
5. ``converge`` makes the host what the state says: the kernel objects, then the open flows, then the processes.
   If nothing changed and the host is as it should be, this costs one observation of the kernel. A process that does
   not start fails the call only if the call asked for it (``commands/asked.py``).
6. ``run_and_settle`` reports to ``WorkHandler`` whether the work failed; ``Upkeep`` then tries again later, or
   announces new addresses. The watcher compares the kernel events that came during the work.
7. In a group, ``execute`` waits until the standby has the new state on its disk, or does not answer in time.
8. ``execute`` returns the reply. It never raises.

``Upkeep`` runs the same ``converge`` when no call asks for it: at the start of the agent, in the periodic check, after
a kernel event, after the end of a process. It waits for the same lock.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from netloom.agent import exhausted
from netloom.agent.actions.builtin import ActionContext, Actions
from netloom.agent.actions.hooks import Hook
from netloom.agent.clock import Clock
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.log import Log
from netloom.agent.processes.failures import ServiceFailure, ServicesFailed
from netloom.agent.scopes.call_batch import CallBatches
from netloom.agent.scopes.interfaces import Host, ScopeServices, ScopeStore, ScopeWatcher
from netloom.agent.scopes.placements import Placements, ScopeMoving
from netloom.agent.scopes.roles import NO_GROUPS, Roles
from netloom.agent.scopes.slot import Slot, WaitingCall
from netloom.agent.scopes.store import HostRecord, Unreadable
from netloom.commands import pbr, table, userdata
from netloom.commands.transition import Context, with_network
from netloom.errors import BadRequest, HostRefused, NetloomError, one_line
from netloom.guestwire import PasswordTaken
from netloom.plan.steps import Step
from netloom.protocol.custom import CustomAction
from netloom.render import helpers
from netloom.render.ruleset import Ruleset
from netloom.render.scope import outline, render
from netloom.render.want import Want
from netloom.state import Placement, Scope
from netloom.state.served import Served
from netloom.wire import Call, Reply

_T = TypeVar("_T")

WORKERS = 16
HOOKS_AT_ONCE = 16

SCOPE_ID = re.compile(r"(?:net|vpc)-(?:0|[1-9][0-9]{0,9})\Z")
FIREWALL_SEEN_S = 900.0  # longer than a tidy of a large host waits, so tidy looks for all scopes
_NIC = re.compile(r"(?!\.)[A-Za-z0-9_.:@-]{1,15}\Z")


class WorkHandler(Protocol):
    """Is called on the event loop after every work on a scope. The lock of the slot is held."""

    def work_failed(self, slot: Slot) -> None: ...
    def work_succeeded(self, slot: Slot, announcements: tuple[Announcement, ...]) -> None: ...


class Replication(Protocol):
    """Copies the states of scopes to their standbys. ``StateSender`` implements it."""

    async def settled(self, scope_id: str, reply: Reply, within_s: float) -> Reply:
        """The reply to a call that was executed, when the standby has what the call has changed."""


class Scopes:
    """The slots of all scopes. Executes calls. Created and used on the event loop.

    ``load`` comes first. ``workers`` runs everything that blocks.
    """

    def __init__(
        self,
        store: ScopeStore,
        host: Host,
        services: ScopeServices,
        watcher: ScopeWatcher,
        actions: Actions,
        handler: WorkHandler,
        log: Log,
        clock: Clock,
        workers: Executor,
        roles: Roles = NO_GROUPS,
    ) -> None:
        self._store = store
        self._host = host
        self._services = services
        self._watcher = watcher
        self._actions = actions
        self._handler = handler
        self._log = log
        self._clock = clock
        self._workers = workers
        self._hooks = ThreadPoolExecutor(HOOKS_AT_ONCE, thread_name_prefix="hook")
        self._slots: dict[str, Slot] = {}
        self._roles = roles
        self.placements = Placements(store, host, log, roles)
        self.replication: Replication | None = None  # None: no scope belongs to a group
        self.describe_group: Callable[[Scope], list[str]] = lambda scope: []  # in lines for people
        self._batches = CallBatches(store, services, self.placements, self, log)
        self.no_call = asyncio.Event()  # set while no call is executed; a hook of an action does not count
        self.no_call.set()
        self._calls = 0
        self.work_done = 0  # works that worker threads have ended
        self._record_changes = asyncio.Lock()

    def load(self) -> None:
        """Read every state file and claim the shared bridges of every scope, before anything on the host changes."""
        self.placements.load()
        for scope_id, moved in self._store.moved().items():
            self.slot(scope_id).moved = moved
        for scope_id in self._store.ended():
            slot = self.slot(scope_id)
            slot.ending = slot.unconverged = True
        living = self._store.living()
        for slot in self.slots():
            slot.state_read = slot.scope_id not in living  # else there is none
        for scope_id in living:
            slot = self.slot(scope_id)
            slot.unconverged = slot.unproved = True
            try:
                self.read_state(slot)
                if slot.moved is not None and slot.scope is not None and slot.moved.epoch > slot.epoch:
                    self.placements.retire(slot)  # the agent was ended in the middle of ``finish``
                    continue
                # A thousand rulesets would take a second, in which no call is answered.
                slot.loaded_ruleset = partial(self._ruleset_of, slot, slot.scope)
                self._host.claim(scope_id, outline(slot.scope))
                if slot.moved is not None and slot.gate == "open":  # guard: what-is-served-here-was-not-moved
                    self._store.forget_moved(scope_id)  # the agent was ended at the end of ``open``
                    slot.moved = None
            except NetloomError as error:
                self._log.line(f"scope={scope_id} load failed: {error}")
            except Exception as error:  # noqa: BLE001, a bug that one scope triggers must not stop the others
                self._log.traceback(f"scope={scope_id} load", error)

    # ------------------------------------------------------------------------------------------------------- slots

    def slot(self, scope_id: str) -> Slot:
        """The slot of the scope, created if there is none."""
        return self._slots.setdefault(scope_id, Slot(scope_id, self._roles))

    def get(self, scope_id: str) -> Slot | None:
        """The slot of the scope, None if there is none."""
        return self._slots.get(scope_id)

    def slots(self) -> list[Slot]:
        """All slots, in the order in which they were created."""
        return list(self._slots.values())

    def busy(self, scope_id: str) -> bool:
        """Whether a call or a repair works on the scope now."""
        slot = self._slots.get(scope_id)
        return slot is not None and slot.lock.locked()

    def _drop_if_idle(self, slot: Slot) -> None:
        if slot.idle and self._slots.get(slot.scope_id) is slot:
            del self._slots[slot.scope_id]

    def _holds(self, scope_id: str) -> bool:
        slot = self._slots.get(scope_id)
        return slot is not None and (slot.scope is not None or slot.unreadable)

    async def change_record(self, change: Callable[[HostRecord], HostRecord]) -> None:
        """Save what an operator said about this host, as ``change`` makes it from what was said before.

        Raises HostRefused; nothing has changed then.
        """
        async with self._record_changes:
            record = change(self.placements.host_record)
            await self.in_worker(lambda: self._store.save_host_record(record))
            self.placements.host_record = record

    # ------------------------------------------------------------------------------------------------------- calls

    async def execute(self, call: Call) -> Reply:
        """Execute the call and return its reply. Never raises: the reply has the error."""
        started = self._clock.time()
        steps = 0
        try:
            reply, steps = await self._dispatch(call)
            if self.replication is not None and call.command != "locate":  # guard: a-question-needs-no-standby
                within_s = call.remaining_ms / 1000 - (self._clock.time() - started)
                reply = await self.replication.settled(call.scope_id, reply, within_s)
        except NetloomError as error:
            reply = self.refused(call, error)
        # A bug: the log gets the traceback, the caller gets one line.
        except Exception as error:  # noqa: BLE001 # guard: a-bug-in-a-call-becomes-its-reply
            reply = self.refused(call, self.explained(call, error))
        reply = self.placements.with_placement(reply, self.get(call.scope_id))
        ms = (self._clock.time() - started) * 1000
        outcome = f" error={reply.error}" if reply.status else ""
        self._log.line(
            f"call={call.call_id} command={call.command} scope={call.scope_id} "
            f"steps={steps} ms={ms:.1f} status={reply.status}{outcome}"
        )
        return reply

    async def answered(self, call: Call, work: Coroutine[Any, Any, bytes]) -> Reply:
        """The reply with the data that ``work`` returns, or with its error. Never raises."""
        try:
            return Reply(call_id=call.call_id, data=await work)
        except NetloomError as error:
            return self.refused(call, error)
        except Exception as error:  # noqa: BLE001, the reply has it
            return self.refused(call, self.explained(call, error))

    def explained(self, call: Call, error: Exception) -> NetloomError:
        """What the caller is told of an error that nobody expected. A bug goes to the log with its traceback."""
        refused = exhausted.refusal(error, call.command)
        if refused is not None:
            return refused
        self._log.traceback(f"call={call.call_id}", error)
        return HostRefused(
            f"the agent failed: {type(error).__name__} in {call.command}",
            hint="its log has the traceback under the call's id",
        )

    def refused(self, call: Call, error: NetloomError) -> Reply:
        """The reply with the error."""
        return Reply(
            call_id=call.call_id,
            status=error.exit_code,
            error=one_line(error.message),
            hint=one_line(error.hint or exhausted.remedy(error)),
            holds=self._holds(call.scope_id),
        )

    async def _dispatch(self, call: Call) -> tuple[Reply, int]:
        """The reply, and the number of steps that were done on the host."""
        if not SCOPE_ID.match(call.scope_id):
            raise BadRequest(
                f"scope {call.scope_id!r} is not a scope id", hint="net-<id> or vpc-<id>, ten digits at most"
            )
        if call.command == "locate":
            slot = self.get(call.scope_id)
            revision = slot.scope.revision if slot and slot.scope else 0
            error = slot.scope.placement.why if slot and slot.scope else ""
            holds = self._holds(call.scope_id)
            return Reply(call_id=call.call_id, holds=holds, revision=revision, error=error), 0
        for detail, nic in (
            ("guest.network.device", call.registration.guest_nic),
            ("public.network.device", call.registration.public_nic),
        ):
            if not _NIC.match(nic):
                raise BadRequest(f"registration detail {detail}: {nic!r} is not a link name")
        if call.command == "custom-action":
            return await self._custom_action(call)
        return await self._run_with_others(call)

    async def _custom_action(self, call: Call) -> tuple[Reply, int]:
        """A hook runs without the lock: it may take all the time of its call, and no other call waits for it."""
        ends = time.monotonic() + call.remaining_ms / 1000
        (result, revision), changes = await self._run_in_turn(call, lambda slot: self._run_action(slot, call))
        if isinstance(result, Hook):
            result = await asyncio.get_running_loop().run_in_executor(self._hooks, result.run, ends)
        reply = Reply(call_id=call.call_id, output=result, holds=self._holds(call.scope_id), revision=revision)
        return reply, changes.count

    async def _run_in_turn(self, call: Call, work: Callable[[Slot], tuple[_T, HostChanges]]) -> tuple[_T, HostChanges]:
        """Run the work when the earlier calls of the scope are done. Raises HostRefused when that takes too long.

        While the scope moves away, the call waits until that is decided: for moments, unless something fails.
        """
        slot = self.slot(call.scope_id)
        ends = self._clock.time() + call.remaining_ms / 1000
        while True:
            try:
                async with self._executed(), self.turn(slot, call.command, within_s=ends - self._clock.time()):
                    return await self.run_and_settle(slot, lambda: work(slot))
            except ScopeMoving as moving:
                await self._await_decision(slot, moving.decided, ends - self._clock.time())

    async def _run_with_others(self, call: Call) -> tuple[Reply, int]:
        """Run the call, together with those of its scope that have come until its turn. The reply, and the steps.

        Their transitions are applied in the order in which they came, then the state is saved and the host converges:
        once for all of them.
        """
        slot, mine = self.slot(call.scope_id), WaitingCall(call)
        ends = self._clock.time() + call.remaining_ms / 1000
        while True:
            slot.waiting.append(mine)
            try:
                async with self._executed(), self.turn(slot, call.command, within_s=ends - self._clock.time()):
                    if mine in slot.waiting:
                        await self._run_waiting(slot)
                return mine.result()
            except ScopeMoving as moving:
                mine.error = None
                await self._await_decision(slot, moving.decided, ends - self._clock.time())
            finally:
                if mine in slot.waiting:
                    slot.waiting.remove(mine)

    @asynccontextmanager
    async def _executed(self) -> AsyncIterator[None]:
        """While a call is executed, or waits for its turn."""
        self._calls += 1
        self.no_call.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self.no_call.set()

    async def _run_waiting(self, slot: Slot) -> None:
        """Run all waiting calls of the scope. Each of them has its reply or its error afterwards."""
        rest, slot.waiting = deque(slot.waiting), []
        while rest:
            count = len(rest)
            try:
                await self.run_and_settle(slot, lambda: (None, self._batches.apply_some(slot, rest)))
            except Exception as error:  # noqa: BLE001, the calls report it
                if len(rest) == count:
                    for it in rest:
                        it.error = error
                    rest.clear()

    def _undecided(self, slot: Slot) -> HostRefused:
        placement = slot.scope.placement if slot.scope else Placement()
        role = self._roles.of(placement)
        if role is not None and placement.gate == "open":
            others = f"{role.standby} or {role.witness}" if role.witness else role.standby
            return HostRefused(
                f"{slot.scope_id}: this host has no lease, because no other member of its group answers it",
                hint=f"bring {others} back; CloudStack may repeat the call",
            )
        return HostRefused(
            f"{slot.scope_id} is being moved to {placement.peer or 'another host'}",
            hint="CloudStack may repeat the call; netloom where shows what holds",
        )

    async def _await_decision(self, slot: Slot, decided: asyncio.Event, within_s: float) -> None:
        slot.users += 1
        try:
            async with self._clock.timeout(within_s):
                await decided.wait()
        except TimeoutError:
            raise self._undecided(slot) from None
        finally:
            slot.users -= 1

    # ------------------------------------------------------------------------------- for calls, and for Upkeep

    @asynccontextmanager
    async def turn(self, slot: Slot, work: str, *, within_s: float | None = None) -> AsyncIterator[None]:
        """Hold the lock of the slot for ``work``. Raises HostRefused when it is not free within ``within_s`` seconds.

        The slot is not dropped before.
        """
        slot.users += 1
        try:
            try:
                async with self._clock.timeout(within_s):
                    await slot.lock.acquire()
            except TimeoutError:
                busy_with = slot.current_work or "other calls"
                raise HostRefused(
                    f"{slot.scope_id} is busy with {busy_with}, for longer than this call had time",
                    hint="CloudStack may repeat it",
                ) from None
            try:
                slot.current_work = work
                yield
            finally:
                slot.current_work = ""
                slot.lock.release()
        finally:
            slot.users -= 1
            self._drop_if_idle(slot)

    async def run_and_settle(self, slot: Slot, work: Callable[[], tuple[_T, HostChanges]]) -> tuple[_T, HostChanges]:
        """Run the work in a worker thread, then report its end to the handler and the watcher. The lock is held."""
        try:
            result, changes = await self.in_worker(work)
        except BaseException:
            self._handler.work_failed(slot)
            raise
        finally:
            self._watcher.work_done(slot.scope_id)
        self._handler.work_succeeded(slot, changes.announcements)
        return result, changes

    async def in_worker(self, work: Callable[[], _T]) -> _T:
        """Run the work in a worker thread and return its result."""
        try:
            return await self.in_worker_uncounted(work)
        finally:
            self.work_done += 1

    async def in_worker_uncounted(self, work: Callable[[], _T]) -> _T:
        """:meth:`in_worker` for a work that does not count in ``work_done``."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    # ------------------------------------------------------------------- in a worker thread, the lock is held

    def _run_action(self, slot: Slot, call: Call) -> tuple[tuple[str | Hook, int], HostChanges]:
        """The output or the hook that makes it, and the revision of the scope."""
        self.read_state(slot)
        self.placements.check_gate(slot, call)
        action = table.decode(call.command, call.payload)
        assert isinstance(action, CustomAction)
        if action.action in pbr.ACTIONS:
            reply, changes = self._batches.apply(slot, call, action)
            return (reply.output, reply.revision), changes
        context = Context(scope_id=call.scope_id, registration=call.registration)
        table.check_scope(call.command, slot.scope, action, context)
        action_context = ActionContext(
            scope=slot.scope,
            want=self._leased(slot.scope, self._want(slot)),
            known=slot.loaded_ruleset,
            missing_helpers=slot.missing_helpers,
            services=self._services,
            converge=lambda: self.converge(slot),
            failed=lambda: slot.failed,
            standby=lambda: self.describe_group(slot.scope) if slot.scope is not None else [],
        )
        result, changes = self._actions.run(call, action, action_context)
        return (result, slot.scope.revision if slot.scope else 0), changes

    def converge(self, slot: Slot, *, thorough: bool = False, asked: frozenset[Served] | None = None) -> HostChanges:
        """Make the host what the state says. The network comes first: it is right even if a service then fails.

        A service that fails is recorded in ``slot.failed``, and the scope is converged again later. ``asked``: the
        services that the caller waits for; None: all. ``thorough`` as in ``Host.converge``.
        Raises HostRefused or ForeignScope.
        """
        slot.unconverged = True
        built: tuple[Step, ...] = ()
        try:
            if slot.unproved:
                built = self.placements.find_out_who_serves(slot, self.placed_want(slot))
            want = self.placed_want(slot, anew=thorough)
        except NetloomError:
            self._watch_for_nics(slot)  # guard: a-bridge-without-a-nic-is-watched
            raise
        did: list[str] = []
        if want.namespace:
            # From now on events are compared with the new want, so the changes that follow match it.
            self._watcher.watch(slot.scope_id, want)
        else:
            # Processes and sockets would keep a namespace alive that loses its name.
            self._watcher.unwatch(slot.scope_id)
            did += self._services.stop(slot.scope_id)
        try:
            changes = self._host.converge(slot.scope_id, want, slot.loaded_ruleset, thorough=thorough)
        finally:
            if want.namespace:
                # The namespace may be new, and a watch belongs to one namespace.
                self._watcher.watch(slot.scope_id, want)
        slot.loaded_ruleset = want.ruleset
        if any(step.shared for step in built + changes.steps):
            self._let_through(slot, want)
        elif thorough:  # tidy lets frames through, for all scopes at once
            self._note_blocked(slot, self._blocked(want))
        if slot.scope is not None:
            if want.namespace and slot.enforced_scope is not slot.scope:
                slot.revoked = self._host.enforce_flows(
                    want.namespace, slot.enforced_scope, slot.scope, revoked=slot.revoked
                )
            slot.enforced_scope = slot.scope
            failed: tuple[ServiceFailure, ...] = ()
            if want.namespace:
                try:
                    did += self._services.converge(slot.scope, want.namespace, asked, settled=changes.settled)
                except ServicesFailed as error:
                    did += error.did
                    failed = error.failures
            self._note_failed(slot, failed)
        else:
            slot.failed = ()
            slot.enforced_scope = None
            self._store.forget(slot.scope_id)
            slot.ending = False
        slot.unconverged = bool(slot.failed)  # guard: a-failed-service-is-tried-again
        return replace(changes, steps=built + changes.steps, services=tuple(did))

    def placed_want(self, slot: Slot, *, anew: bool = False) -> Want:
        """What the scope wants on this host, with its NICs and its gate. Nothing while it is passive.

        ``anew`` as in ``Host.placed``. Raises HostRefused.
        """
        gate = slot.gate
        if gate == "passive":
            return render(None)
        want = self._host.placed(slot.scope_id, self._want(slot), anew=anew)
        want = self._leased(slot.scope, want)
        return replace(want, gated=True) if gate in ("incoming", "closed") else want

    def _leased(self, scope: Scope | None, want: Want) -> Want:
        """``want`` with the mark of the scope's group: frames pass its ports only while this host has the lease."""
        role = self._roles.of(scope.placement) if scope is not None else None
        return replace(want, lease=role.mark) if role is not None and want.namespace else want

    def placed_want_of(self, scope: Scope) -> Want:
        """What the scope would want on this host with this state. Raises HostRefused."""
        want = self._host.placed(scope.scope_id, _rendered(scope, self._missing_helpers(scope)))
        return self._leased(scope, want)

    def _watch_for_nics(self, slot: Slot) -> None:
        """Watch a scope that could not be built, because its NIC may appear later, or its bridge may get one."""
        want = self._want(slot)
        with suppress(NetloomError):
            want = self.placed_want(slot)
        if want.namespace:
            self._watcher.watch(slot.scope_id, want)

    def _let_through(self, slot: Slot, want: Want) -> None:
        """Let frames pass the host's own firewall, and note what keeps them from passing."""
        try:
            for change in self._host.let_through():
                self._log.line(f"host firewall: {change}")
        except NetloomError as error:
            self._note_blocked(slot, [f"the host's firewall: {error}"])
        else:
            self._note_blocked(slot, self._blocked(want))

    def _blocked(self, want: Want) -> list[str]:
        """What keeps frames from passing the host's own firewall, as it was last seen."""
        try:
            return self._host.blocked(want.ports, seen_within_s=FIREWALL_SEEN_S)
        except NetloomError as error:
            return [f"the host's firewall: {error}"]

    def _note_blocked(self, slot: Slot, blocked: list[str]) -> None:
        """Log what keeps frames from passing, once. It fails no call."""
        for reason in blocked:
            if reason not in slot.blocked:
                slot.blocked_untold.append(reason)
                self._log.line(f"scope={slot.scope_id} warning: {reason}")
        slot.blocked = blocked

    def _note_failed(self, slot: Slot, failed: tuple[ServiceFailure, ...]) -> None:
        """Record the services that failed. The log gets a line when a failure begins, changes or ends."""
        had = {it.name: str(it) for it in slot.failed}
        for it in failed:
            if had.pop(it.name, "") != str(it):
                self._log.line(f"scope={slot.scope_id} failed: {it}; only calls that need it fail; it is tried again")
        for name in had.keys() - {it.name for it in failed}:
            self._log.line(f"scope={slot.scope_id} {name} works again")
        slot.failed = failed
        slot.told &= {it.name for it in failed}

    def erase_password(self, slot: Slot, taken: PasswordTaken) -> HostChanges:
        """Remove a password that a VM has acknowledged from the state file and from memory.

        Raises HostRefused when the file cannot be written, for example on a full disk: it still has the password.
        """
        self.read_state(slot)
        scope = slot.scope
        network = scope.networks.get(taken.network_id) if scope is not None else None
        if scope is None or network is None or not taken.password_id.isdigit():
            return HostChanges()
        without = userdata.password_taken(network, taken.nic, int(taken.password_id))
        if without is network:
            return HostChanges()
        scope = replace(with_network(scope, without), revision=scope.revision + 1)
        self._store.save(scope)
        slot.scope = scope
        return self.converge(slot)

    def read_state(self, slot: Slot) -> None:
        """Read the state from disk, once, and again if it is unknown whether it lasts. Raises Unreadable.

        If that fails, the next call tries again.
        """
        if slot.state_read and not self._store.unsettled(
            slot.scope_id
        ):  # guard: a-state-that-may-not-last-is-read-again
            return
        try:
            slot.scope = self._store.load(slot.scope_id)
        except Unreadable:
            slot.unreadable = True
            raise
        slot.unreadable = False
        slot.state_read = True

    def _want(self, slot: Slot) -> Want:
        """What the scope wants on the host. Rendered once per state, because most calls change nothing."""
        scope = slot.scope
        missing = self._missing_helpers(scope)
        if slot.rendered is None or slot.rendered[0] is not scope or slot.missing_helpers != missing:
            if missing and slot.missing_helpers != missing:
                for reason in helpers.not_offered(missing):
                    self._log.line(f"scope={slot.scope_id} warning: not in force: {reason}")
            slot.rendered, slot.missing_helpers = (scope, _rendered(scope, missing)), missing
        return slot.rendered[1]

    def _ruleset_of(self, slot: Slot, scope: Scope | None) -> Ruleset | None:
        """The ruleset of a state that is the scope's, or was it."""
        if scope is slot.scope:
            return self._want(slot).ruleset
        return _rendered(scope, self._missing_helpers(scope)).ruleset

    def _missing_helpers(self, scope: Scope | None) -> tuple[str, ...]:
        return self._host.missing_helpers(scope.helpers) if scope is not None and scope.helpers else ()


def _rendered(scope: Scope | None, missing: tuple[str, ...]) -> Want:
    """What the scope wants without these helpers. With one that the kernel lacks, it would refuse the whole ruleset."""
    if scope is not None and missing:
        scope = replace(scope, helpers=tuple(it for it in scope.helpers if it not in missing))
    return render(scope)


def start_workers() -> ThreadPoolExecutor:
    """The worker threads. All are started now: a thread started inside another namespace would stay in it."""
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="worker")
    barrier = threading.Barrier(WORKERS + 1)
    for _ in range(WORKERS):
        pool.submit(barrier.wait)
    barrier.wait()
    return pool
