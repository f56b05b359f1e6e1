"""What the tests of standby hosts watch: who serves a network, and whether its connections go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bed import faults
from bed.flows import FlowKind, Flows
from bed.lab import Host
from bed.machines import until
from bed.observer import Observer, gap, never_two, outage
from bed.standby import ScopeBed
from e2e.commands import amid
from netloom.standbywire import LEASE_MS

LEASE_S = LEASE_MS / 1000
# Machines are shared and noisy: these limits are loose. The measured times go into the report of the tests.
TAKES_OVER_WITHIN_S = 4 * LEASE_S
# From the kill of an agent to the start of the next one. The lease was renewed a heartbeat before the kill, and the new
# agent needs an acknowledgement to renew it.
IN_TIME_S = 0.75 * LEASE_S
NOBODY_TAKES_OVER_S = 4 * LEASE_S  # so long nothing may happen


@dataclass
class Watch:
    """What the observer and the flows have seen of one scenario."""

    it: ScopeBed
    observer: Observer
    flows: Flows
    active: Host
    standby: Host
    others: list[Host]  # the candidates that are neither

    @property
    def witness(self) -> Host:
        (found,) = self.others
        return found

    def takes_over(self, by: Host, *, within_s: float = TAKES_OVER_WITHIN_S, flows: bool = True) -> float:
        """Assert that the host serves soon, and the connections go on; returns the outage in seconds."""
        self.observer.wait_for(by)
        assert self.observer.turns()[-1].host == by.name, self.observer.story()
        assert outage(self.observer) < within_s, self.observer.story()
        assert not flows or self.flows.go_on(), self.flows.story()
        return outage(self.observer)

    def goes_on(self, host: Host, *, seconds: float = NOBODY_TAKES_OVER_S, gap_s: float = 0.5 * LEASE_S) -> None:
        """Assert that this host, and no other, serves for so long, without a gap."""
        since = time.monotonic()
        time.sleep(seconds)
        assert {each.host for each in self.observer.answers(since=since)} == {host.name}, self.observer.story()
        assert self.flows.go_on(), self.flows.story()
        late = [ended for _, ended in self.observer.late() if ended > since]  # then gaps say nothing
        assert late or gap(self.observer, since) < gap_s, self.observer.story()

    def restarted_in_time(self, host: Host, pause_s: float = 0.0) -> bool:
        """Kill the host's agent and start another one. False: it came too late for the lease, so the standby serves.

        A busy machine may need more than a second to start an agent. Then the take-over is right.
        """
        killed = faults.kill_agent(host)
        time.sleep(pause_s)
        was_late = faults.start_agent(host) - killed > IN_TIME_S
        return not (was_late and until(lambda: self.observer.turns()[-1].host != self.active.name, seconds=3 * LEASE_S))

    def stops(self, host: Host) -> None:
        """Assert that the host stops serving by itself, and nobody else begins."""
        assert until(lambda: self.observer.serving() == set(), seconds=TAKES_OVER_WITHIN_S), self.observer.story()
        time.sleep(NOBODY_TAKES_OVER_S)
        assert self.observer.turns()[-1].host == host.name
        assert self.observer.serving() == set()


@contextmanager
def watched(
    it: ScopeBed, *turns: str, each: int = 3, udp: int = 1, over6: int = 1, more: Sequence[FlowKind] = ()
) -> Iterator[Watch]:
    """Watch the block. At its end the hosts have served in these ``turns``, "active", "standby", never two at once."""
    active, standby = it.active, it.standby
    others = [each for each in it.candidates if each not in (active, standby)]
    with it.observer() as observer, it.flows(each, *more, udp=udp, over6=over6, every_s=0.1) as flows:
        flows.wait_open()
        time.sleep(2.5)  # UDP is assured from then on, and the copies have arrived
        with amid(it):
            yield Watch(it, observer, flows, active, standby, others)
        assert flows.disordered() == 0
    hosts = {"active": active, "standby": standby}
    never_two(observer, *(hosts[name] for name in turns))


def returns_as_standby(it: ScopeBed, host: Host, serving: Host) -> None:
    """Assert that a host that is back stands by, without serving for a moment, and is ready again."""
    assert until(lambda: it.is_ready() and it.standby is host and it.active is serving, seconds=90), it.shown()
