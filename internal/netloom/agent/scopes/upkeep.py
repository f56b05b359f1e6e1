"""The work on scopes that no call asks for: restore, repair, periodic check, retry, tidying up, announcements.

All of it is ``Scopes.converge`` under the lock of the scope, as in a call. A failure is logged in one line and tried
again with growing delays; no failure ends the agent.

=====================  ===========================================================  =======================
occasion               noticed by                                                   handled by
=====================  ===========================================================  =======================
start of the agent     ``serve``                                                    ``restore``
a kernel event         ``Watcher``                                                  ``repair``
time                   ``keep_checked``: rules, settings and processes, for which   ``keep_checked``
                       there are no events
time                   ``keep_counted``: nftables transactions                      ``repair``
end of a process       ``Supervisor``                                               ``revive``
a link has gone, or    ``Watcher``                                                  ``tidy_soon``
joined others' bridge
the host's firewall    ``Watcher``                                                  ``firewall_changed``
was changed
a password was taken   ``GuestProcess``                                             ``password_taken``
a failed convergence   ``Scopes``                                                   ``work_failed``
new addresses          ``Scopes``                                                   ``work_succeeded``
=====================  ===========================================================  =======================
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TypeVar

from netloom import names
from netloom.agent import exhausted
from netloom.agent.backoff import Backoff
from netloom.agent.budget import Checks
from netloom.agent.clock import Clock
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.log import Log
from netloom.agent.scopes.interfaces import Host, ScopeServices, ScopeWatcher
from netloom.agent.scopes.scopes import SCOPE_ID, WORKERS, Scopes
from netloom.agent.scopes.slot import Slot
from netloom.errors import NetloomError, one_line
from netloom.guestwire import PasswordTaken
from netloom.render.scope import guest_bridges
from netloom.render.want import Want

_T = TypeVar("_T")

RESTORING_AT_ONCE = WORKERS - 4  # the other workers are for calls that come meanwhile
RESTORING_BESIDE_CALLS = 2  # the others pause while calls run
RAMP_S = 0.3  # the others begin later
BACKOFF = Backoff.doubling(1.0, 60.0)
# More than once: the bridge port of a neighbour comes up together with ours, and until then it receives nothing.
ANNOUNCE_AFTER_S = (0.0, 0.7, 2.0)
TIDY_EVERY_S = 30.0  # while networks change; else while the budget suffices
TIDY_CPU_S = 0.001  # of a tidy, for each network; also the first guess of a whole one
TIDY_AFTER_S = 0.3
LOOK_EVERY_S = 0.5
REASON_MAX = 150  # characters
CHECK_EVERY_S = 45.0  # between two checks of the same scope, while the budget suffices (agent/budget.py)
CHECK_CPU_S = 0.008  # of one check; the first guess, until some were measured
CHECK_LOOP_CPU_S = 0.001  # of that, outside the worker thread
COUNTS_PER_CHECK = 9  # looks at the number of nftables transactions
COUNT_CPU_S = 0.0002
COUNT_LOOP_CPU_S = 0.0005  # of some scopes at once, outside the worker thread
COUNTED_AT_ONCE = 20


class Upkeep:
    """Handles the events of the agent (``EventHandler``) and runs its loops. Created and used on the event loop."""

    def __init__(
        self, scopes: Scopes, host: Host, services: ScopeServices, watcher: ScopeWatcher, log: Log, clock: Clock
    ) -> None:
        self._scopes = scopes
        self._host = host
        self._services = services
        self._watcher = watcher
        self._log = log
        self._clock = clock
        self._untidy = asyncio.Event()
        self._tidy_cpu_s = 0.0  # of the tidy that runs, so far
        self._unwatched = False  # the host could not be watched so far
        self._unrestored: set[str] = set()  # scopes that have not converged since the start
        self._reasons: dict[str, str] = {}  # of those, why they failed last
        self._with_vms: frozenset[str] = frozenset()  # bridges
        self._looked = -LOOK_EVERY_S  # when ``_with_vms`` was read
        self._tasks: set[asyncio.Task[object]] = set()

    # ------------------------------------------------------------------------------------------------- the loops

    async def prepare(self) -> None:
        """What comes before the first call: the host is prepared and watched.

        Never raises: without it the scopes report what is missing.
        """
        self._unrestored = self._unconverged()
        try:
            await self._scopes.in_worker(self._host.prepare)
        except NetloomError as error:
            self._log.line(f"the host cannot be prepared: {error}")
        except Exception as error:  # noqa: BLE001, a bug here must not keep the agent from its calls
            self._log.traceback("prepare", error)
        self._unwatched = True
        await self._watch_host()

    async def restore(self) -> None:
        """Adopt what runs and repair what does not, scope by scope. Errors are logged and tried again.

        Each worker takes the scope that is most urgent at that moment, see ``unrestored``. A call restores its own
        scope at once, and most workers pause while calls run, which would wait for the processor.
        """
        self._unrestored = self._unconverged()
        waiting, order, all_taken = set(self._unrestored), list[str](), asyncio.Event()
        ordered_by: frozenset[str] | None = None

        def most_urgent() -> str:
            nonlocal ordered_by
            if ordered_by != self._with_vms:
                ordered_by = self._with_vms
                order[:] = [it for it in reversed(self.unrestored()) if it in waiting]
            while order:
                scope_id = order.pop()
                waiting.discard(scope_id)
                if scope_id in self._unrestored:  # else a call has restored it
                    return scope_id
            all_taken.set()
            return ""

        async def restore_most_urgent(number: int) -> None:
            others, guards = number >= RESTORING_BESIDE_CALLS, number == RESTORING_BESIDE_CALLS
            if others:  # the calls that waited for the agent come now
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(RAMP_S):
                        await all_taken.wait()
            while True:
                if others:  # guard: a-restore-lets-calls-go-first
                    await self._scopes.no_call.wait()
                if guards:
                    guards = False
                    await self._tidy_links()  # guard: the-host-is-guarded-at-once
                    continue
                await self._look_for_vms()
                slot = self._scopes.get(scope_id := most_urgent())
                if slot is not None:
                    await self._reconcile(slot, "restore")
                elif not scope_id:
                    return

        await self._look_for_vms()
        at_once = RESTORING_AT_ONCE  # guard: a-restore-leaves-workers-for-calls
        await asyncio.gather(*(restore_most_urgent(it) for it in range(min(at_once, len(waiting)))))
        await self._tidy()

    def unrestored(self) -> list[str]:
        """The ids of the scopes that are not restored yet, the most urgent first.

        Scopes with a VM in their bridges come before the others, and scopes with many VMs before those with few.
        """
        slots = filter(None, map(self._scopes.get, sorted(self._unrestored)))
        return [slot.scope_id for slot in sorted(slots, key=self._urgency)]

    def missing(self) -> list[str]:
        """The scopes of ``unrestored``; those that failed, for example because a NIC is missing, with the reason."""
        reasons = ((it, self._reasons.get(it, "")) for it in self.unrestored())
        return [f"{scope_id} ({reason})" if reason else scope_id for scope_id, reason in reasons]

    def _unconverged(self) -> set[str]:
        return {it.scope_id for it in self._scopes.slots() if it.unconverged and (it.scope is not None or it.ending)}

    def _urgency(self, slot: Slot) -> tuple[bool, int]:
        networks = slot.scope.networks if slot.scope is not None else {}
        bridges = guest_bridges(slot.scope)
        plugged = not self._with_vms.isdisjoint(bridges)  # guard: networks-with-vms-are-restored-first
        return not plugged, -sum(len(it.nics) for it in networks.values())

    async def _look_for_vms(self) -> None:
        """Note which bridges have VMs: CloudStack's KVM agent plugs them in while the scopes are being restored."""
        if self._clock.time() - self._looked < LOOK_EVERY_S:
            return
        self._looked = self._clock.time()
        with contextlib.suppress(NetloomError):  # then the order is not the best
            self._with_vms = await self._scopes.in_worker(self._host.bridges_with_vms)

    async def keep_tidy(self, tidies: Checks) -> None:
        """Remove shared links that are not used any more, periodically and soon after a link of the host has gone.

        A VM's tap may go after its network, and with the tap the last use of the bridge.
        """
        tidied: dict[str, Want | None] | None = None  # what the scopes wanted at the last tidy; None: it failed
        began = self._clock.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(TIDY_EVERY_S):
                    await self._untidy.wait()
                await self._clock.sleep(TIDY_AFTER_S)  # other links often go at the same time
            wanted = {slot.scope_id: slot.rendered and slot.rendered[1] for slot in self._scopes.slots()}
            rested_s = self._clock.time() - began
            # A tidy looks at all links of the host. Its budget counts only while nothing changes.
            if not self._untidy.is_set() and wanted == tidied and rested_s < tidies.pause_s(1) - TIDY_AFTER_S:
                continue
            self._untidy.clear()
            began, self._tidy_cpu_s = self._clock.time(), 0.0
            tidied = wanted if await self._tidy() else None  # guard: a-failed-tidy-is-tried-again-soon
            tidies.used(self._tidy_cpu_s)

    async def keep_checked(self, checks: Checks) -> None:
        """Check every scope in turn: rules, settings and processes, for which there are no events.

        The checks are evenly spread over the time that a turn of all scopes takes.
        """
        while True:
            existing = [slot for slot in self._scopes.slots() if slot.scope is not None]
            await self._clock.sleep(checks.pause_s(max(1, len(existing))))
            existing = [slot for slot in self._scopes.slots() if slot.scope is not None]
            if not existing:
                continue
            slot = min(existing, key=lambda it: it.checked)  # guard: each-scope-is-checked-in-turn
            slot.checked = self._clock.time()
            if slot.retry is None:
                await self._maintain(slot, "check", partial(self._check, slot, checks), quiet=True)

    async def keep_counted(self, counts: Checks) -> None:
        """Ask the kernel how many nftables transactions each scope has had, and repair those with others' changes.

        It costs much less than a check, so it comes more often. Some scopes are asked for at once.
        """
        turn: list[str] = []  # the scopes whose turn is still to come
        while True:
            existing = [it.scope_id for it in self._scopes.slots() if it.scope is not None and it.retry is None]
            number = max(1, len(existing))
            await self._clock.sleep(counts.pause_s(number) * min(number, COUNTED_AT_ONCE))
            turn = turn or existing
            some, turn = turn[:COUNTED_AT_ONCE], turn[COUNTED_AT_ONCE:]
            if some:
                for scope_id in await self._counted(some, counts):
                    await self.repair(scope_id, "nftables changed")

    async def _counted(self, scope_ids: list[str], counts: Checks) -> list[str]:
        """Those of the scopes in whose namespace others have changed nftables. Never raises."""

        def counted() -> list[str]:
            began = time.thread_time()
            try:
                return self._host.changed_rulesets(scope_ids)
            finally:
                counts.used((time.thread_time() - began + COUNT_LOOP_CPU_S) / len(scope_ids))

        try:
            return await self._scopes.in_worker_uncounted(counted)
        except Exception as error:  # noqa: BLE001, a bug must not end the loop
            self._log.traceback("nftables transactions", error)
            return []

    def _check(self, slot: Slot, checks: Checks) -> HostChanges:
        """In a worker thread."""
        began = time.thread_time()
        try:
            return self._scopes.converge(slot, thorough=True)
        finally:
            checks.used(time.thread_time() - began + CHECK_LOOP_CPU_S)

    async def stop(self, wait_s: float) -> None:
        """Cancel all timers, and wait at most ``wait_s`` seconds for running work. The host stays as it is."""
        for slot in self._scopes.slots():
            for timer in (*slot.announcing, *([slot.retry] if slot.retry else [])):
                timer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=wait_s)

    # --------------------------------------------------------------------------- the events; see EventHandler

    def busy(self, scope_id: str) -> bool:
        """Whether a call or a repair works on the scope now."""
        return self._scopes.busy(scope_id)

    async def repair(self, scope_id: str, why: str) -> int | None:
        """Converge the scope and return the number of steps; None: it failed and is tried again."""
        slot = self._scopes.get(scope_id)
        if slot is None or slot.scope is None:
            return 0  # the scope has ended
        return await self._maintain(slot, why, partial(self._scopes.converge, slot), quiet=True)

    def tidy_soon(self) -> None:
        """Remove unused shared links within moments: a link of the host has gone, perhaps the last user of a bridge."""
        self._untidy.set()

    def firewall_changed(self) -> None:
        """Let the frames of our bridges pass the host's own firewall, which somebody has changed."""
        self.start_task(self._follow_firewall())

    def revive(self, scope_id: str, why: str) -> None:
        """Converge the scope, because a process of it has ended and is due to start again."""
        slot = self._scopes.get(scope_id)
        if slot is not None and slot.scope is not None:
            self.start_task(self._reconcile(slot, why))

    async def step_aside(self, scope_id: str, why: str) -> bool:
        """Serve the scope no longer, because another host does. Returns whether that is so; else it is to be repeated.

        The scope may have been moved or ended meanwhile; then nothing changes.
        """
        slot = self._scopes.get(scope_id)
        if slot is None:
            return True

        def yield_() -> HostChanges:
            if slot.gate != "open" or (slot.scope is not None and slot.scope.placement.group):
                return HostChanges()  # guard: the-lease-tells-who-serves-a-group
            self._scopes.placements.make_passive(slot, why)
            return self._scopes.converge(slot)

        return await self._maintain(slot, "another host serves it", yield_) is not None

    def password_taken(self, taken: PasswordTaken) -> None:
        """Erase a password that a VM has acknowledged, from the state file and from memory."""
        slot = self._scopes.get(taken.scope_id)
        if slot is not None:
            self.start_task(self._erase_until_done(slot, taken))

    def work_failed(self, slot: Slot) -> None:
        """Schedule a retry, unless one is scheduled, or the host is as it was.

        The retry is thorough: while one is scheduled there is no periodic check.
        """
        if not slot.unconverged or slot.retry is not None:
            return
        delay_s = BACKOFF.delay_s(slot.failures)
        slot.failures += 1

        def retry() -> None:
            slot.retry = None
            again = partial(self._scopes.converge, slot, thorough=True)
            self.start_task(self._maintain(slot, f"retry {slot.failures}", again, quiet=bool(slot.failed)))

        slot.retry = self._clock.call_later(delay_s, retry)  # guard: a-failed-convergence-is-tried-again

    def work_succeeded(self, slot: Slot, announcements: tuple[Announcement, ...]) -> None:
        """Cancel the retry if the scope has converged, and announce new addresses several times.

        A service may have failed that the work did not ask for. Then a retry is scheduled as after a failure.
        """
        self._reasons.pop(slot.scope_id, None)
        if slot.failed:
            self._unrestored.discard(slot.scope_id)
            self.work_failed(slot)
        else:
            slot.failures = 0
            if not slot.unconverged:
                self._unrestored.discard(slot.scope_id)
                if slot.retry is not None:
                    slot.retry.cancel()  # guard: a-success-cancels-the-retry
                    slot.retry = None
        if announcements:
            self.announce(slot, announcements)

    def announce(self, slot: Slot, announcements: tuple[Announcement, ...]) -> None:
        """Announce these addresses several times."""
        now = self._clock.time()
        slot.announcing = [timer for timer in slot.announcing if timer.when() > now]
        send = partial(self._send_arp, slot, announcements)
        slot.announcing += [self._clock.call_later(after_s, send) for after_s in ANNOUNCE_AFTER_S]

    # --------------------------------------------------------------------------------------------------- the work

    async def _reconcile(self, slot: Slot, why: str) -> None:
        await self._maintain(slot, why, partial(self._scopes.converge, slot))

    async def _maintain(
        self, slot: Slot, why: str, work: Callable[[], HostChanges], *, quiet: bool = False
    ) -> int | None:
        """Run the work when the calls of the scope that came earlier are done. Never raises.

        Returns the number of steps, or None when the work failed. ``quiet``: write no log line for no steps.
        """
        started = self._clock.time()
        try:
            async with self._scopes.turn(slot, why):
                _, changes = await self._scopes.run_and_settle(slot, lambda: (None, work()))
            ms = (self._clock.time() - started) * 1000
            if changes.count or not quiet:
                self._log.line(f"scope={slot.scope_id} {why}: steps={changes.count} ms={ms:.1f}")
            return changes.count
        except NetloomError as error:
            self._log.line(f"scope={slot.scope_id} {why} failed: {error}")
            if slot.scope_id in self._unrestored:
                self._reasons[slot.scope_id] = one_line(error.message, REASON_MAX)
        # A bug must not end the agent.
        except Exception as error:  # noqa: BLE001 # guard: a-bug-in-upkeep-does-not-end-the-agent
            refused = exhausted.refusal(error, f"scope={slot.scope_id} {why} failed")
            if refused is not None:
                self._log.line(str(refused))
            else:
                self._log.traceback(f"scope={slot.scope_id} {why}", error)
        return None

    async def _erase_until_done(self, slot: Slot, taken: PasswordTaken) -> None:
        failures = 0
        erase = partial(self._scopes.erase_password, slot, taken)
        while await self._maintain(slot, "password taken", erase) is None:  # guard: erasing-is-tried-again
            await self._clock.sleep(BACKOFF.delay_s(failures))
            failures += 1

    async def _watch_host(self) -> None:
        """Watch the host, unless that is so already. It fails for example without descriptors."""
        if not self._unwatched:
            return
        try:
            await self._scopes.in_worker(self._watcher.open)
            self._unwatched = False
        except (NetloomError, OSError) as error:
            self._log.line(f"the host cannot be watched: {error}")

    async def _tidy_links(self) -> bool:
        """Returns whether it has succeeded."""
        try:
            for step in await self._metered(self._host.tidy):
                self._log.line(f"tidy: {step}")
            await self._let_through()
            return True
        except NetloomError as error:
            self._log.line(f"tidy failed: {error}")
        except Exception as error:  # noqa: BLE001, a bug in one tidy must not be the end of all later ones
            self._log.traceback("tidy", error)
        return False

    async def _tidy(self) -> bool:
        """Returns whether everything has succeeded."""
        await self._watch_host()  # guard: a-host-that-could-not-be-watched-is-watched-later
        is_tidy = await self._tidy_links()
        try:
            with_services = await self._metered(self._services.scopes)
        except NetloomError as error:
            self._log.line(f"tidy failed: {error}")
            return False
        except Exception as error:  # noqa: BLE001, a bug in one tidy must not be the end of all later ones
            self._log.traceback("tidy", error)
            return False
        for scope_id in sorted(with_services - {slot.scope_id for slot in self._scopes.slots()}):
            if SCOPE_ID.match(scope_id):
                slot = self._scopes.slot(scope_id)
                stopped = await self._maintain(slot, "in no file", partial(self._stop_leftovers, slot), quiet=True)
                is_tidy = is_tidy and stopped is not None
        return is_tidy and not self._unwatched

    async def _metered(self, work: Callable[[], _T]) -> _T:
        """Run a part of a tidy in a worker thread."""

        def metered() -> _T:
            began = time.thread_time()
            try:
                return work()
            finally:
                self._tidy_cpu_s += time.thread_time() - began

        return await self._scopes.in_worker(metered)

    async def _let_through(self) -> None:
        """Let the frames of our bridges pass the host's own firewall. Raises HostRefused."""
        for change in await self._metered(self._host.let_through):
            self._log.line(f"host firewall: {change}")

    async def _follow_firewall(self) -> None:
        try:
            await self._let_through()
        except NetloomError as error:
            self._log.line(f"host firewall: {error}")
        except Exception as error:  # noqa: BLE001, a bug must not end the agent
            self._log.traceback("host firewall", error)

    def _stop_leftovers(self, slot: Slot) -> HostChanges:
        """In a worker thread: stop the services of a scope that has neither a state file nor a named namespace.

        If the namespace has its name, the state file may have been lost, so the services are left running.
        """
        if slot.scope is not None or self._host.namespace_exists(names.namespace(slot.scope_id)):
            return HostChanges()
        return HostChanges(services=tuple(self._services.stop(slot.scope_id)))

    def _send_arp(self, slot: Slot, announcements: tuple[Announcement, ...]) -> None:
        """Send those announcements whose address the scope still holds: another device may hold the others by now."""
        held = {it.ip for it in slot.rendered[1].announce} if slot.rendered else set()
        still_held = tuple(
            it
            for it in announcements
            if it.address in held  # guard: only-held-addresses-are-announced
        )
        self.start_task(self._scopes.in_worker(partial(self._host.send_arp, still_held)))

    def start_task(self, work: Coroutine[object, object, object]) -> None:
        """Run the work on the event loop; ``stop`` waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
