"""The scopes of this host: one queue each, one worker thread at a time each, all of them side by side.

The life of a call: decode, transition, write the state, converge the host, judge the flows, see to what runs beside the
kernel, answer. A call that changes nothing on a host where all is right costs one look.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from netloom import names
from netloom.agent.actions.builtin import ActionContext, Actions
from netloom.agent.actions.hooks import Hook
from netloom.agent.host import flows
from netloom.agent.host.converge import Announcement, Host, HostChanges, prepare
from netloom.agent.host.watcher import Watcher
from netloom.agent.kernel import arp, namespaces
from netloom.agent.log import Log
from netloom.agent.processes.services import Services
from netloom.agent.store import Store, Unreadable
from netloom.commands import pbr, table, userdata
from netloom.commands.transition import Context, with_network
from netloom.errors import BadRequest, HostRefused, NetloomError, one_line
from netloom.guestwire import PasswordTaken
from netloom.protocol.custom import CustomAction
from netloom.protocol.lb import ApplyLbRules
from netloom.render.ruleset import Ruleset
from netloom.render.scope import render
from netloom.render.want import Want
from netloom.state import Scope
from netloom.wire import Call, Reply

_T = TypeVar("_T")

WORKERS = 16
HOOKS_AT_ONCE = 16
RESTORING_AT_ONCE = WORKERS - 4  # the others are for calls that come meanwhile
RETRY_S_MAX = 60.0
ANNOUNCE_AFTER_S = (0.0, 0.7, 2.0)  # a neighbour may be deaf for a moment: its port comes up with ours
TIDY_EVERY_S = 30.0
TIDY_AFTER_S = 0.3
CHECK_EVERY_S = 45.0  # each scope, one after the other
ENDINGS = frozenset({"shutdown-network", "destroy-network", "shutdown-vpc", "destroy-vpc"})

_SCOPE_ID = re.compile(r"(?:net|vpc)-(?:0|[1-9][0-9]{0,9})\Z")
_NIC = re.compile(r"(?!\.)[A-Za-z0-9_.:@-]{1,15}\Z")


class _Slot:
    """A scope as the agent has it in memory. Touched by whoever holds ``lock``."""

    def __init__(self, scope_id: str) -> None:
        self.scope_id = scope_id
        self.lock = asyncio.Lock()  # guard: one-call-of-a-scope-at-a-time
        self.users = 0
        self.scope: Scope | None = None
        self.loaded = False
        self.unreadable = False  # there is a file, and it cannot be used
        self.ended = False  # its end was asked for and is not carried out yet
        self.behind = False  # the host may not be what the state says
        self.rendered: tuple[Scope | None, Want] | None = None
        self.judged: Scope | None = None  # the state that the flows were last held against; None: nobody knows
        self.known: Ruleset | None = None  # what was loaded last, as far as we know
        self.failures = 0
        self.retry: asyncio.TimerHandle | None = None
        self.announcing: list[asyncio.TimerHandle] = []
        self.doing = ""

    @property
    def idle(self) -> bool:
        nothing = self.scope is None and not self.ended and not self.unreadable
        return nothing and not self.users and self.retry is None


class Scopes:
    """Carries out calls. Made and used on the event loop; ``load`` first, then ``restore`` in the background."""

    _services: Services
    _watcher: Watcher

    def __init__(self, store: Store, host: Host, log: Log) -> None:
        self._store = store
        self._host = host
        self._log = log
        self._slots: dict[str, _Slot] = {}
        self._pool = _started_pool()
        self._actions = Actions(host, store.directory.parent / "hooks")
        self._hooks = ThreadPoolExecutor(HOOKS_AT_ONCE, thread_name_prefix="hook")
        self._tasks: set[asyncio.Task[object]] = set()
        self._untidy = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ at start

    def load(self, services: Services, watcher: Watcher) -> None:
        """Reads every scope's file and notes what they want, before anything is done to the host."""
        self._services, self._watcher = services, watcher
        for scope_id in self._store.ended():
            self._slot(scope_id).ended = True
        for scope_id in self._store.living():
            slot = self._slot(scope_id)
            try:
                self._read(slot)
                slot.known = self._want(slot).ruleset
                self._host.claim(scope_id, self._want(slot))
            except NetloomError as error:
                self._log.line(f"scope={scope_id} load failed: {error}")
            except Exception as error:  # noqa: BLE001, one scope that trips us must not keep the others down
                self._log.traceback(f"scope={scope_id} load", error)

    async def restore(self) -> None:
        """Adopts what runs and repairs what does not, scope by scope; errors are logged and tried again."""
        await self._work(prepare)
        try:
            await self._work(self._watcher.open)
        except NetloomError as error:
            self._log.line(f"the host cannot be watched: {error}")
        gate = asyncio.Semaphore(RESTORING_AT_ONCE)

        async def one(slot: _Slot) -> None:
            async with gate:
                await self._reconcile(slot, "restore")

        await asyncio.gather(*(one(slot) for slot in list(self._slots.values()) if slot.scope or slot.ended))
        await self._tidy()

    async def keep_tidy(self) -> None:
        """Takes away what others left of our bridges, again and again: a VM's tap goes after its network."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._untidy.wait(), TIDY_EVERY_S)
                # Links seldom go alone.
                await asyncio.sleep(TIDY_AFTER_S)
            self._untidy.clear()
            await self._tidy()

    def tidy_soon(self) -> None:
        """A link of the host has gone: perhaps it was the last reason for a bridge of ours, or for its guard."""
        self._untidy.set()

    async def keep_checked(self, every_s: float = CHECK_EVERY_S) -> None:
        """Looks at every scope in turn, for what no watch tells: rules, settings, processes."""
        while True:
            standing = [slot for slot in self._slots.values() if slot.scope is not None]
            if not standing:
                await asyncio.sleep(every_s)
            for slot in standing:
                await asyncio.sleep(every_s / len(standing))
                if slot.scope is not None and slot.retry is None:
                    await self._alone(slot, "check", partial(self._converge, slot, thorough=True), quiet=True)

    def busy(self, scope_id: str) -> bool:
        """Whether somebody works on the scope right now."""
        slot = self._slots.get(scope_id)
        return slot is not None and slot.lock.locked()

    async def heal(self, scope_id: str, why: str) -> int | None:
        """Puts back what the scope has lost: how many steps that took, None when it failed."""
        slot = self._slots.get(scope_id)
        if slot is None or slot.scope is None:
            return 0  # it has ended meanwhile
        return await self._alone(slot, why, partial(self._converge, slot), quiet=True)

    async def _tidy(self) -> None:
        try:
            for step in await self._work(self._host.tidy):
                self._log.line(f"tidy: {step}")
        except NetloomError as error:
            self._log.line(f"tidy failed: {error}")
        for scope_id in sorted(await self._work(self._services.scopes) - self._slots.keys()):
            if _SCOPE_ID.match(scope_id):
                slot = self._slot(scope_id)
                await self._alone(slot, "in no file", partial(self._end_nobodys, slot), quiet=True)

    def _end_nobodys(self, slot: _Slot) -> HostChanges:
        """In a worker thread: ends what runs for a scope that nobody knows, in a namespace that has lost its name.

        One that has its name was perhaps forgotten with a state that got lost, and goes on.
        """
        if slot.scope is not None or namespaces.exists(names.namespace(slot.scope_id)):
            return HostChanges()
        return HostChanges(services=tuple(self._services.stop(slot.scope_id)))

    # -------------------------------------------------------------------------------------------------- a call

    async def carry_out(self, call: Call) -> Reply:
        """The reply to the call, when it is done. Never raises: what went wrong is in the reply."""
        started = time.monotonic()
        steps: list[int] = []
        try:
            reply = await self._carry_out(call, steps)
        except NetloomError as error:
            reply = Reply(
                call_id=call.call_id,
                status=error.exit_code,
                error=one_line(error.message),
                hint=one_line(error.hint),
                holds=self._holds(call.scope_id),
            )
        except Exception as error:  # noqa: BLE001, a bug: it keeps its traceback in the log, the caller gets a line
            self._log.traceback(f"call={call.call_id}", error)
            reply = Reply(
                call_id=call.call_id,
                status=3,
                error=one_line(f"the agent failed: {type(error).__name__} in {call.command}"),
                hint="its log has the traceback under the call's id",
                holds=self._holds(call.scope_id),
            )
        ms = (time.monotonic() - started) * 1000
        outcome = f" error={reply.error}" if reply.status else ""
        self._log.line(
            f"call={call.call_id} command={call.command} scope={call.scope_id} "
            f"steps={sum(steps)} ms={ms:.1f} status={reply.status}{outcome}"
        )
        return reply

    async def _carry_out(self, call: Call, steps: list[int]) -> Reply:
        if not _SCOPE_ID.match(call.scope_id):
            raise BadRequest(f"scope {call.scope_id!r} is no scope", hint="net-<id> or vpc-<id>, ten digits at most")
        if call.command == "locate":
            slot = self._slots.get(call.scope_id)
            revision = slot.scope.revision if slot and slot.scope else 0
            return Reply(call_id=call.call_id, holds=self._holds(call.scope_id), revision=revision)
        for detail, nic in (
            ("guest.network.device", call.registration.guest_nic),
            ("public.network.device", call.registration.public_nic),
        ):
            if not _NIC.match(nic):
                raise BadRequest(f"registration detail {detail}: {nic!r} is no name of a link")
        if call.command == "custom-action":
            return await self._act(call, steps)
        return await self._locked(call, lambda slot: self._transition(slot, call, steps))

    async def _locked(self, call: Call, work: Callable[[_Slot], tuple[_T, HostChanges]]) -> _T:
        """Does the work when the scope's earlier calls are done. Raises HostRefused when that takes too long."""
        slot = self._slot(call.scope_id)
        slot.users += 1
        try:
            try:
                async with asyncio.timeout(call.remaining_ms / 1000):
                    await slot.lock.acquire()
            except TimeoutError:
                raise HostRefused(
                    f"{call.scope_id} is busy with {slot.doing or 'other calls'}, for longer than this call had time",
                    hint="CloudStack may repeat it",
                ) from None
            try:
                slot.doing = call.command
                return await self._hold(slot, lambda: work(slot))
            finally:
                slot.doing = ""
                slot.lock.release()
        finally:
            slot.users -= 1
            self._drop_if_idle(slot)

    async def _act(self, call: Call, steps: list[int]) -> Reply:
        """A custom action. A hook runs without the lock: it may take all its time, and no VM's start waits for it."""
        ends = time.monotonic() + call.remaining_ms / 1000
        begun, revision = await self._locked(call, lambda slot: self._begin(slot, call, steps))
        if isinstance(begun, Hook):
            begun = await asyncio.get_running_loop().run_in_executor(self._hooks, begun.run, ends)
        return Reply(call_id=call.call_id, output=begun, holds=self._holds(call.scope_id), revision=revision)

    def _begin(self, slot: _Slot, call: Call, steps: list[int]) -> tuple[tuple[str | Hook, int], HostChanges]:
        """In a worker thread."""
        self._read(slot)
        asked = table.decode(call.command, call.payload)
        assert isinstance(asked, CustomAction)
        if asked.action in pbr.ACTIONS:
            reply, done = self._transition(slot, call, steps)
            return (reply.output, reply.revision), done
        context = Context(scope_id=call.scope_id, registration=call.registration)
        table.check_scope(call.command, slot.scope, asked, context)
        action_context = ActionContext(
            scope=slot.scope,
            want=self._want(slot),
            known=slot.known,
            services=self._services,
            converge=lambda: self._converge(slot),
        )
        begun, done = self._actions.run(call, asked, action_context)
        steps.append(done.count)
        return (begun, slot.scope.revision if slot.scope else 0), done

    def _transition(self, slot: _Slot, call: Call, steps: list[int]) -> tuple[Reply, HostChanges]:
        """In a worker thread. Until the state is written, nothing has happened."""
        self._read(slot)
        payload = table.decode(call.command, call.payload)
        context = Context(scope_id=call.scope_id, registration=call.registration)
        outcome = table.apply(call.command, slot.scope, payload, context)
        if outcome.scope is None:
            if slot.scope is not None:
                self._store.retire(slot.scope_id)
            # A lost state may have left its network behind; only the word for its end takes that away.
            if slot.scope is not None or call.command in ENDINGS:
                slot.ended = True
            slot.scope = None
        elif outcome.scope != slot.scope:
            self._store.save(outcome.scope)  # guard: state-is-saved-first
            slot.scope, slot.ended = outcome.scope, False
        done = self._converge(slot) if slot.scope is not None or slot.ended else HostChanges()
        steps.append(done.count)
        revision = slot.scope.revision if slot.scope else 0
        reply = Reply(call_id=call.call_id, output=outcome.output, holds=slot.scope is not None, revision=revision)
        refused = outcome.refused or self._not_balanced(slot, payload)
        if refused is not None:
            error = refused
            reply = replace(reply, status=error.exit_code, error=one_line(error.message), hint=one_line(error.hint))
        return reply, done

    def _not_balanced(self, slot: _Slot, payload: object) -> HostRefused | None:
        """What to say of rules of this call that have to wait for their port: to no other call do they matter."""
        if not isinstance(payload, ApplyLbRules):
            return None
        waiting = self._services.waiting(slot.scope_id)
        named = [f"rule {int(it.id)} ({waiting[int(it.id)]})" for it in payload.lb_rules.rules if int(it.id) in waiting]
        if not named:
            return None
        return HostRefused(
            f"somebody else in {names.namespace(slot.scope_id)} has the port of {', '.join(named[:5])}",
            hint="the other rules are in force; ss -ltnp in the namespace tells who it is",
        )

    def _converge(self, slot: _Slot, *, thorough: bool = False) -> HostChanges:
        """In a worker thread: makes the host what the state says: the network first, whatever becomes of the rest."""
        slot.behind = True
        want = self._want(slot)
        did: list[str] = []
        if want.namespace:
            self._watcher.watch(slot.scope_id, want)
        else:
            # Processes and sockets would keep a namespace alive that loses its name.
            self._watcher.unwatch(slot.scope_id)
            did += self._services.stop(slot.scope_id)
        try:
            done = self._host.converge(slot.scope_id, want, slot.known, thorough=thorough)
        finally:
            if want.namespace:
                self._watcher.watch(slot.scope_id, want)
        slot.known = want.ruleset
        if slot.scope is not None:
            if want.namespace and slot.judged is not slot.scope:
                flows.enforce(want.namespace, slot.judged, slot.scope)
            slot.judged = slot.scope
            if want.namespace:
                did += self._services.converge(slot.scope, want.namespace)
        else:
            slot.judged = None
            self._store.forget(slot.scope_id)
            slot.ended = False
        slot.behind = False
        return replace(done, services=tuple(did))

    async def _hold(self, slot: _Slot, work: Callable[[], tuple[_T, HostChanges]]) -> _T:
        """Does the work in a worker thread; the slot's lock is held. A failure is tried again later."""
        try:
            result, done = await self._work(work)
        except BaseException:
            if slot.behind and slot.retry is None:
                self._retry_later(slot)
            raise
        finally:
            self._watcher.work_done(slot.scope_id)
        slot.failures = 0
        if slot.retry is not None and not slot.behind:
            slot.retry.cancel()
            slot.retry = None
        self._announce(slot, done.announcements)
        return result

    # ------------------------------------------------------------------------------------- what services report

    def revive(self, scope_id: str, why: str) -> None:
        """A process of the scope has ended, and it is time to start it again."""
        slot = self._slots.get(scope_id)
        if slot is not None and slot.scope is not None:
            self._background(self._reconcile(slot, why))

    def password_taken(self, taken: PasswordTaken) -> None:
        """A VM has acknowledged its password: it is to be in no file any more, and in no memory."""
        slot = self._slots.get(taken.scope_id)
        if slot is not None:
            self._background(self._erase_later(slot, taken))

    async def _erase_later(self, slot: _Slot, taken: PasswordTaken) -> None:
        wait_s = 1.0
        while await self._alone(slot, "password taken", lambda: self._erase(slot, taken)) is None:
            await asyncio.sleep(wait_s)
            wait_s = min(RETRY_S_MAX, 2 * wait_s)

    def _erase(self, slot: _Slot, taken: PasswordTaken) -> HostChanges:
        """In a worker thread. A full disk keeps the password in the file, so the caller tries again."""
        self._read(slot)
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
        return self._converge(slot)

    # ---------------------------------------------------------------------------------------- what comes after

    def _retry_later(self, slot: _Slot) -> None:
        slot.failures += 1
        wait_s = min(RETRY_S_MAX, 2.0 ** (slot.failures - 1))
        loop = asyncio.get_running_loop()

        def again() -> None:
            slot.retry = None
            self._background(self._reconcile(slot, f"retry {slot.failures}"))

        slot.retry = loop.call_later(wait_s, again)

    async def _reconcile(self, slot: _Slot, why: str) -> None:
        await self._alone(slot, why, lambda: self._converge(slot))

    async def _alone(
        self, slot: _Slot, why: str, work: Callable[[], HostChanges], *, quiet: bool = False
    ) -> int | None:
        """Does the work of our own accord, when the scope's calls leave a gap. Never raises.

        The number of steps, None when it failed. ``quiet``: nothing done is nothing said.
        """
        slot.users += 1
        started = time.monotonic()
        try:
            async with slot.lock:
                slot.doing = why
                try:
                    count = await self._hold(slot, lambda: _counted(work()))
                finally:
                    slot.doing = ""
            ms = (time.monotonic() - started) * 1000
            if count or not quiet:
                self._log.line(f"scope={slot.scope_id} {why}: steps={count} ms={ms:.1f}")
            return count
        except Exception as error:  # noqa: BLE001, the agent lives on
            if isinstance(error, NetloomError):
                self._log.line(f"scope={slot.scope_id} {why} failed: {error}")
            else:
                self._log.traceback(f"scope={slot.scope_id} {why}", error)
            return None
        finally:
            slot.users -= 1
            self._drop_if_idle(slot)

    def _announce(self, slot: _Slot, announcements: tuple[Announcement, ...]) -> None:
        if not announcements:
            return
        loop = asyncio.get_running_loop()

        def tell() -> None:
            want = slot.rendered[1].announce if slot.rendered else ()
            held = {it.ip for it in want}  # what was given back may be somebody else's by now
            self._background(self._work(lambda: _tell(tuple(it for it in announcements if it.address in held))))

        now = loop.time()
        slot.announcing = [handle for handle in slot.announcing if handle.when() > now]
        slot.announcing += [loop.call_later(after_s, tell) for after_s in ANNOUNCE_AFTER_S]

    async def stop(self, wait_s: float) -> None:
        """Waits for what is being done, that long at most. The host stays as it is."""
        for slot in self._slots.values():
            for handle in (*slot.announcing, *([slot.retry] if slot.retry else [])):
                handle.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=wait_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------------- slots

    def _slot(self, scope_id: str) -> _Slot:
        return self._slots.setdefault(scope_id, _Slot(scope_id))

    def _drop_if_idle(self, slot: _Slot) -> None:
        if slot.idle and self._slots.get(slot.scope_id) is slot:
            del self._slots[slot.scope_id]

    def _holds(self, scope_id: str) -> bool:
        slot = self._slots.get(scope_id)
        return slot is not None and (slot.scope is not None or slot.unreadable)

    def _read(self, slot: _Slot) -> None:
        """The state from disk, once; a file that could not be read is tried again with every call."""
        if slot.loaded:
            return
        try:
            slot.scope = self._store.load(slot.scope_id)
        except Unreadable:
            slot.unreadable = True
            raise
        slot.unreadable = False
        slot.loaded = True

    def _want(self, slot: _Slot) -> Want:
        """The rendered state; rendered once, for most calls change nothing."""
        if slot.rendered is None or slot.rendered[0] is not slot.scope:
            slot.rendered = (slot.scope, render(slot.scope))
        return slot.rendered[1]

    async def _work(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _background(self, work: Coroutine[object, object, object]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _counted(done: HostChanges) -> tuple[int, HostChanges]:
    return done.count, done


def _tell(announcements: tuple[Announcement, ...]) -> None:
    for it in announcements:
        try:
            arp.gratuitous(it.namespace, it.link, it.address, it.mac)
        except (OSError, NetloomError):
            return  # the link is gone again: nobody has to know it any more


def _started_pool() -> ThreadPoolExecutor:
    """All threads now: one that is started inside another namespace would stay there for good."""
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="worker")
    barrier = threading.Barrier(WORKERS + 1)
    for _ in range(WORKERS):
        pool.submit(barrier.wait)
    barrier.wait()
    return pool
