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


class Strike:
    """Decides for each effect whether to kill the process that is about to have it: once, after so many effects.

    ``instead``: the process to kill, and the effect happens; 0: that of the effect.
    """

    def __init__(self, after: int, instead: int = 0) -> None:
        self.effect: Effect | None = None
        self._left = after
        self._instead = instead

    def __call__(self, effect: Effect) -> bool:
        if self.effect is not None or self._left:
            self._left = max(0, self._left - 1)
            return False
        self.effect = effect
        if not self._instead:
            return True
        processes.kill(self._instead)
        return False


class Scene:
    """A host with a network beside, on which a sequence was carried out once without a fault."""

    def __init__(self, host: CrashHost, sequence: Sequence) -> None:
        self.host = host
        self.sequence = sequence
        self._at = -1  # the number of the moment that the host is at; -1: of none
        self.started: list[Effect] = []  # the effects of the last start or repair
        host.start()
        with host.relay() as relay:
            for step in BESIDE:
                self._carry_out(relay, step)
            self.moments = [Moment(host.state(), self._settled())]
            for step in sequence.steps:
                self._open_flows(step)
                with host.tracer.watching(lambda _: False) as effects:
                    self._carry_out(relay, step)
                self.moments.append(Moment(host.state(), self._settled(), effects))
        self._at = len(sequence.steps)

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
                self.rebuild(number + 1)
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
        strike = Strike(kill.after, relay.process.pid if kill.recovery == "cut" else 0)
        with self.host.tracer.watching(strike):
            reply = relay.answer(call)
        return reply, strike.effect

    def kill_start(self, after: int) -> Effect | None:
        """Boot the host, kill whoever is about to have another effect after so many of the agent's start, start it.

        Returns the effect that did not happen. The host is at the last moment that ``rebuild`` made.
        """
        moment = self.moments[self._at]
        self.host.lose_everything()
        strike = Strike(after)
        with self.host.tracer.watching(strike) as self.started:
            before = self.host.log().count(" restored")
            with self.host.relay():
                wait_until(lambda: strike.effect or self.host.log().count(" restored") > before, 60)
        self.host.kill_agents()
        self.host.start()
        self._assert_found(moment)
        return strike.effect

    def kill_repair(self, after: int, *harm: str) -> Effect | None:
        """Damage the host, kill whoever is about to have another effect after so many of the repair, start an agent.

        Returns the effect that did not happen.
        """
        moment = self.moments[self._at]
        strike = Strike(after)
        with self.host.tracer.watching(strike) as self.started:
            self.host.run(*harm)
            wait_until(lambda: strike.effect or self.host.look().found == moment.found, 60)
        self.host.kill_agents()
        self.host.start()
        self._assert_found(moment)
        return strike.effect

    def _go_to(self, number: int) -> None:
        """Carry out the steps before this one without a fault, from the beginning if the host is beyond them."""
        if self._at > number or self._at < 0:
            self.rebuild(number)
        if self._at < number:
            with self.host.relay() as relay:
                for step in self.sequence.steps[self._at : number]:
                    self._carry_out(relay, step)
            self._at = number

    def rebuild(self, number: int) -> None:
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

    @staticmethod
    def _carry_out(relay: Relay, step: Step) -> None:
        reply = relay.answer(step.call())
        assert reply is not None
        assert not reply.status, f"{step.name}: {reply.error}"

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
