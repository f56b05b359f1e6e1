"""Kill a process after the N-th effect of a call, recover, and compare the host with that of an undisturbed run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import processes
from crash.effects import Effect, Tracer
from crash.host import CrashHost, Found, Look, Relay, State
from crash.sequences import BESIDE, VLANS, Sequence, Step
from kernel.agent_host import done, wait_until
from netloom.wire import Call, Reply

SETTLE_S_MAX = 20.0
FAULTS_MAX = 5  # in one walk

# What follows the kill: the management server repeats the call over a new connection, or somebody restarts the agent.
# ``cut``: no process is killed but the connection, so the agent goes on.
Recovery = Literal["repeat", "restart", "cut"]


@dataclass
class Moment:
    """The host between two calls of an undisturbed run. ``effects``: those of the call before."""

    state: State
    found: Found
    effects: list[Effect] = field(default_factory=list)


@dataclass(frozen=True)
class Kill:
    """Kill whoever is about to have another effect after so many effects of a call, and what comes then."""

    after: int
    recovery: Recovery


class Scene:
    """A host with a network beside, on which a sequence was carried out once without a fault."""

    def __init__(self, host: CrashHost, sequence: Sequence) -> None:
        self.host = host
        self.sequence = sequence
        self._at = 0  # the moment that the host is at
        host.start()
        for step in BESIDE:
            done(host.repeated(step.call()))
        self.moments = [Moment(host.state(), self._settled())]
        for step in sequence.steps:
            with host.relay() as relay:
                self._open_flows(step)
                with host.tracer.watching(lambda _: False) as effects:
                    reply = relay.answer(step.call())
                assert reply is not None
                assert not reply.status, f"{step.name}: {reply.error}"
            self.moments.append(Moment(host.state(), self._settled(), effects))

    def walk(self, kills: Mapping[int, Kill]) -> dict[int, Effect | None]:
        """Carry out the sequence once more, with a kill in these steps. Compare the host after each of them.

        Returns by step the effect that did not happen; None: the call was answered before so many effects. Raises
        AssertionError with all faults, after the last step.
        """
        struck: dict[int, Effect | None] = {}
        faults: list[str] = []
        for number in range(max(kills) + 1):
            if number not in kills:
                self._go_to(number + 1)
                continue
            self._go_to(number)
            try:
                struck[number] = self.kill(number, kills[number])
            except AssertionError as fault:
                faults.append(f"step {number} ({self.sequence.steps[number].name}), {kills[number]}: {fault}")
                assert len(faults) < FAULTS_MAX, "\n".join(faults)
                self._rebuild(number + 1)
        assert not faults, "\n".join(faults)
        return struck

    def kill(self, number: int, kill: Kill) -> Effect | None:
        """Carry out a step with a kill, recover, and compare. The host is at the moment before the step.

        Returns the effect that did not happen; None: the call was answered before.
        """
        host, step, recovery = self.host, self.sequence.steps[number], kill.recovery
        before, then = self.moments[number], self.moments[number + 1]
        call = step.call()
        self._at = -1
        with host.relay() as relay:
            self._open_flows(step)
            beside = host.look().beside
            reply, struck = self._struck(relay, call, kill)
        if recovery == "restart":
            host.kill_agents()
            host.start()
            state = host.state()
            assert state in (before.state, then.state), difference(before.state, state)
            self._assert_found(before if state == before.state else then, beside)
        if reply is None or reply.status or recovery == "restart":
            again = call if reply is None and recovery != "restart" else step.call()
            done(host.repeated(again))
        self._assert_found(then, beside)
        assert not (changed := difference(then.state, host.state())), changed
        self._at = number + 1
        return struck

    def _struck(self, relay: Relay, call: Call, kill: Kill) -> tuple[Reply | None, Effect | None]:
        struck: list[Effect] = []
        count = 0

        def strike(effect: Effect) -> bool:
            nonlocal count
            if struck or count < kill.after:
                count += 1
                return False
            struck.append(effect)
            if kill.recovery != "cut":
                return True
            processes.kill(relay.process.pid)
            return False

        with self.host.tracer.watching(strike):
            reply = relay.answer(call)
        return reply, struck[0] if struck else None

    def _go_to(self, number: int) -> None:
        """Carry out the steps before this one without a fault, from the beginning if the host is beyond them."""
        if self._at > number or self._at < 0:
            self._rebuild(number)
        for at in range(self._at, number):
            step = self.sequence.steps[at]
            with self.host.client() as client:
                client.send(step.call())
                reply = client.receive()
            assert isinstance(reply, Reply)
            assert not reply.status, f"{step.name}: {reply.error}"
            self._at = at + 1

    def _rebuild(self, number: int) -> None:
        """Make the host what it was before a step: the agent builds what its state files say."""
        moment = self.moments[number]
        if f"{self.sequence.scope_id}.json" not in moment.state:
            done(self.host.repeated(self.sequence.last.call()))
        if self.host.state() != moment.state:
            self.host.kill_agents()
            self.host.put_state(moment.state)
            self.host.start()
        self._assert_found(moment)
        self._at = number

    def _open_flows(self, step: Step) -> None:
        for flow in step.flows:
            self.host.run("conntrack", "-I", *flow.split(), namespace=self.sequence.namespace)

    def _settled(self) -> Found:
        """What the host has when two looks are the same."""
        looks = [self.host.look().found]

        def same() -> bool:
            looks.append(self.host.look().found)
            return looks[-1] == looks[-2]

        wait_until(same, SETTLE_S_MAX)
        return looks[-1]

    def _assert_found(self, moment: Moment, beside: Found | None = None) -> None:
        """Fails if the host does not become the same within a moment: replaced processes end a little later."""
        looks: list[Look] = []

        def same() -> bool:
            looks.append(self.host.look())
            return looks[-1].found == moment.found

        try:
            wait_until(same, SETTLE_S_MAX)
        except AssertionError:
            raise AssertionError(difference(moment.found, looks[-1].found)) from None
        assert beside is None or not (changed := difference(beside, looks[-1].beside)), changed


def difference(want: object, have: object) -> str:
    """The entries of two dictionaries that differ, for people."""
    assert isinstance(want, dict)
    assert isinstance(have, dict)
    lines = []
    for key in sorted({*want, *have}):
        wanted, had = want.get(key), have.get(key)
        if wanted == had:
            continue
        if isinstance(wanted, list) and isinstance(had, list):
            lines += [f"{key}: missing {it}" for it in (Counter(wanted) - Counter(had)).elements()]
            lines += [f"{key}: too much {it}" for it in (Counter(had) - Counter(wanted)).elements()]
        else:
            lines.append(f"{key}: {wanted!r} became {had!r}")
    return "\n".join(lines)


@contextlib.contextmanager
def scene(sequence: Sequence) -> Iterator[Scene]:
    """A new host for a sequence."""
    tracer = Tracer()
    host = CrashHost(tracer, VLANS)
    try:
        yield Scene(host, sequence)
    finally:
        host.close()
        tracer.close()
