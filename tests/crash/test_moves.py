"""A move is killed after each effect of its agents and relays, on both hosts. One repeat of the move completes it.

The network goes to and fro, so each move begins where the last one has ended.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from crash.choice import chosen
from crash.effects import Effect, Tracer
from crash.host import CrashHost, Found, Relay
from crash.points import SETTLE_S_MAX, Strike, difference
from crash.sequences import BESIDE, ISOLATED, VLANS
from kernel.agent_host import done, wait_until
from netloom.claimwire import Claim
from netloom.errors import HostUnreachable, NetloomError
from netloom.extension.moves.agents import Agents
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.moves.move import Moved, Mover
from netloom.extension.ssh import ConnectionLost
from netloom.wire import Call, Reply

SCOPE = ISOLATED.scope_id
LIVED = 21  # steps: the network has all its services, addresses and rules


class Channel:
    """A channel to the agent of a host, by a relay."""

    def __init__(self, name: str, host: CrashHost) -> None:
        self._name, self._host = name, host
        self._relay: Relay | None = None
        self.is_broken = False

    async def open(self) -> None:
        self._relay = await asyncio.to_thread(self._host.open_relay)
        if not self._relay.greeted:
            raise self.silence(0)

    async def call(self, call: Call) -> Reply:
        assert self._relay is not None
        reply = await asyncio.to_thread(self._relay.answer, call)
        if reply is None:
            self.is_broken = True
            raise ConnectionLost(f"{self._name}: the connection broke")
        return reply

    def silence(self, waited_s: float) -> HostUnreachable:
        return HostUnreachable(f"{self._name}: no agent answers")

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()


async def no_signers(owner: str, host: str) -> None:
    """The agents of this test verify nothing."""


class Signer:
    async def sign(self, claim: Claim) -> str:
        return "proof"


class Pair:
    """Two hosts, each with a network beside. ``at``: the host that has the network now."""

    def __init__(self, hosts: dict[str, CrashHost]) -> None:
        self.hosts = hosts
        self.at, self.to = hosts
        for host in hosts.values():
            host.start()
            for step in BESIDE:
                done(host.repeated(step.call()))
        with hosts[self.at].relay() as relay:
            for step in ISOLATED.steps[:LIVED]:
                reply = relay.answer(step.call())
                assert reply is not None
                done(reply)
        # After a move to and fro both hosts remember where the network went.
        for _ in range(2):
            self._go()
        self._found = {}
        for _ in range(2):
            self._go()
            for name, host in hosts.items():
                self._found[name, name == self.at] = self._look(host)
        self._state = self._stored()
        self._beside = {name: host.look().beside for name, host in hosts.items()}

    def kill(self, after: int) -> tuple[Effect | None, list[Effect]]:
        """Move the network, kill whoever is about to have another effect after so many, and move it once more."""
        strike = Strike(after)
        with next(iter(self.hosts.values())).tracer.watching(strike) as effects:
            self._move()
        self._go()
        for name, host in self.hosts.items():
            want = self._found[name, name == self.at]
            try:
                wait_until(lambda host=host, want=want: self._look(host) == want, SETTLE_S_MAX)
            except AssertionError:
                raise AssertionError(f"after {after}: {name}: {difference(want, self._look(host))}") from None
            assert not (changed := difference(self._beside[name], host.look().beside)), changed
        assert self._stored() == self._state
        return strike.effect, effects

    def _go(self) -> None:
        """Move the network to the other host. Fails if that fails."""
        moved = self._move()
        assert moved is not None and moved.error is None, moved
        self.at, self.to = self.to, self.at

    def _move(self) -> Moved | None:
        """``netloom move``; None: it could not ask the hosts."""

        async def work() -> Moved:
            agents = Agents(self.hosts, lambda name: Channel(name, self.hosts[name]), no_signers)
            try:
                return await Mover(agents, Signer()).move(SCOPE, self.to, await take_inventory(agents))
            finally:
                agents.close()

        try:
            return asyncio.run(work())
        except NetloomError:
            return None

    def _look(self, host: CrashHost) -> Found:
        """What a host has. The contents of state files have the epoch, which grows with each move."""
        found = host.look().found
        return {**found, "contents": [it for it in found["contents"] if not it.startswith("/var/lib/netloom/")]}

    def _stored(self) -> dict[str, object]:
        """The state of the network without its placement."""
        state: dict[str, object] = json.loads(self.hosts[self.at].state()[f"{SCOPE}.json"])
        return {key: value for key, value in state.items() if key != "placement"}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    tracer = Tracer()
    hosts: dict[str, CrashHost] = {}
    try:
        for name in ("h1", "h2"):
            hosts[name] = CrashHost(tracer, VLANS)
        yield Pair(hosts)
    finally:
        for host in hosts.values():
            host.close()
        tracer.close()


def test_one_repeat_completes_a_move_that_was_killed(pair: Pair) -> None:
    struck, effects = pair.kill(1 << 30)
    assert struck is None
    assert {"file", "namespace", "netlink", "nft", "process", "sent"} <= {it.kind for it in effects}
    for after in chosen(effects, 8):
        pair.kill(after)
