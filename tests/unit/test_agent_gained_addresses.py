"""A host that took a scope from a dead one asks for each address that the scope gains, before it uses it."""

from __future__ import annotations

import time

import msgspec
import pytest

from fakehost import REGISTRATION, Agent, simulated
from netloom import placementwire as wire
from netloom.agent.scopes.store import HostRecord, Moved
from netloom.wire import Call, Evacuated, Reply

NET = "net-204"
GATEWAY, SOURCE_NAT, SECOND, UNTAGGED = "10.10.1.1", "203.0.113.20", "203.0.113.21", "198.51.100.20"
SOMEBODY = "02:00:00:00:00:01"


def record(*, left_s: float = 600, owner: str = "test") -> HostRecord:
    until = int(time.time() + left_s)
    return HostRecord(evacuated=(Evacuated(host="h1", until=until, proof="p", owner=owner),))


async def take(agent: Agent, told: HostRecord, *, epoch: int = 1) -> None:
    """Build the network as the next commands after an evacuation do: with its guest gateway only."""
    agent.store.record = told
    agent.restart()
    assert (await agent.call("020", "implement-network", epoch=epoch)).status == 0
    await agent.clock.advance(60)
    agent.host.asked.clear()
    agent.forget()


async def send(agent: Agent, command: str, message: msgspec.Struct) -> Reply:
    payload = wire.packed(message)
    return await agent.moves.execute(
        Call(call_id="m", command=command, scope_id=NET, registration=REGISTRATION, payload=payload)
    )


async def assign(agent: Agent, fixture: str = "021") -> Reply:
    return await agent.call(fixture, "assign-ip", epoch=1)


@simulated
@pytest.mark.mutation("gained-addresses-are-asked-for")
async def test_a_gained_address_that_somebody_uses_is_refused_and_nothing_changes(agent: Agent) -> None:
    await take(agent, record())
    state, built = agent.store.files[NET], agent.host.present[NET]
    agent.host.owners[SOURCE_NAT] = SOMEBODY
    reply = await assign(agent)
    assert reply.status == 3
    assert reply.error == f"{SOURCE_NAT} is answered by {SOMEBODY}, so {NET} does not take the address; " + (
        "nothing was changed"
    )
    assert reply.hint == "power h1 off and repeat the command; if it is reachable: netloom undrain h1"
    assert agent.host.asked == [{SOURCE_NAT}]
    assert agent.store.files[NET] == state
    assert agent.host.present[NET] == built
    assert (reply.gate, reply.revision) == ("open", 0)
    assert f"save {NET}" not in agent.did
    await agent.clock.advance(60)
    assert agent.host.arp == []
    assert agent.host.present[NET] == built
    # The scope goes on with what it has.
    assert (await agent.call("030", "prepare-nic", epoch=1)).status == 0
    del agent.host.owners[SOURCE_NAT]
    assert (await assign(agent)).status == 0
    assert SOURCE_NAT in agent.store.files[NET].public_ips
    await agent.clock.advance(1)
    assert [addresses for _, addresses in agent.host.arp][:1] == [[SOURCE_NAT]]


@simulated
async def test_new_ports_are_built_behind_a_closed_gate_without_addresses(agent: Agent) -> None:
    await take(agent, record())
    before = agent.host.present[NET]
    agent.workers.hold()
    silent = []
    usual = agent.host.occupied

    def occupied(scope_id, want, timeout_s, claim):  # type: ignore[no-untyped-def]
        silent.append(agent.host.present[NET])
        return usual(scope_id, want, timeout_s, claim)

    agent.host.occupied = occupied  # type: ignore[method-assign]
    call = agent.send("021", "assign-ip", epoch=1)
    await agent.workers.release()
    assert (await call).status == 0
    (during,) = silent
    after = agent.host.present[NET]
    assert set(during.ports) == set(after.ports) > set(before.ports)
    assert during.closed_ends == {it.host_link for it in set(after.ports) - set(before.ports)}
    assert (during.addresses, during.announce) == (before.addresses, before.announce)
    assert during.ruleset == before.ruleset
    assert not after.closed_ends


@simulated
async def test_only_gained_addresses_are_asked_for_and_only_while_a_host_counts_as_dead(agent: Agent) -> None:
    await take(agent, record())
    await assign(agent)
    await assign(agent)
    await agent.call("030", "prepare-nic", epoch=1)
    await assign(agent, "050")
    assert agent.host.asked == [{SOURCE_NAT}, {SECOND}]
    agent.scopes.placements.host_record = HostRecord()
    await assign(agent, "052")
    assert len(agent.host.asked) == 2


@simulated
@pytest.mark.parametrize("told", [record(left_s=-1), record(owner="other"), HostRecord()])
async def test_without_a_dead_host_of_its_owner_no_address_is_asked_for(agent: Agent, told: HostRecord) -> None:
    await take(agent, told)
    assert (await assign(agent)).status == 0
    assert agent.host.asked == []


@simulated
async def test_a_scope_of_this_host_asks_for_nothing(agent: Agent) -> None:
    agent.store.record = record()
    agent.restart()
    await agent.live()
    assert (await agent.call("050", "assign-ip")).status == 0
    assert agent.host.asked == []


@simulated
async def test_an_address_that_nobody_can_be_asked_for_is_refused(agent: Agent) -> None:
    await take(agent, record())
    agent.host.unknown[SOURCE_NAT] = "eth2 has no link"
    reply = await assign(agent)
    assert reply.error.startswith(f"nobody can be asked for {SOURCE_NAT}: eth2 has no link, so {NET} does not take")
    assert not agent.store.files[NET].public_ips


@simulated
@pytest.mark.mutation("a-call-that-may-be-refused-late-comes-alone", instead="outcome.scope is None")
async def test_of_calls_that_wait_together_only_the_one_with_the_used_address_fails(agent: Agent) -> None:
    await take(agent, record())
    agent.host.owners[SECOND] = SOMEBODY
    agent.workers.hold()
    first = agent.send("030", "prepare-nic", epoch=1)
    await agent.clock.settle()
    calls = [agent.send(it, "assign-ip", epoch=1) for it in ("021", "050", "052")]
    await agent.workers.release()
    assert [(await it).status for it in (first, *calls)] == [0, 0, 3, 0]
    assert set(agent.store.files[NET].public_ips) == {SOURCE_NAT, UNTAGGED}
    await agent.clock.advance(1)
    assert {it for _, addresses in agent.host.arp for it in addresses} == {SOURCE_NAT, UNTAGGED}


@simulated
@pytest.mark.mutation("what-a-scope-has-comes-before-what-it-gains")
async def test_after_a_restart_the_first_call_restores_the_scope_and_then_asks(agent: Agent) -> None:
    await take(agent, record())
    agent.host.owners[SOURCE_NAT] = SOMEBODY
    agent.restart()
    agent.host.asked.clear()
    assert (await assign(agent)).status == 3  # the agent alone was restarted: the scope is served, nothing is asked
    assert agent.host.asked == [{SOURCE_NAT}]
    agent.host.present.clear()
    agent.restart()
    agent.host.asked.clear()
    assert (await assign(agent)).status == 3  # after a power cut
    assert agent.host.asked == [{GATEWAY}, {SOURCE_NAT}]
    assert GATEWAY in {it.ip for it in agent.host.present[NET].announce}
    assert not agent.store.files[NET].public_ips
    await agent.clock.advance(1)
    assert [addresses for _, addresses in agent.host.arp][:1] == [[GATEWAY]]


@simulated
async def test_a_scope_without_a_namespace_is_built_behind_a_closed_gate(agent: Agent) -> None:
    agent.store.record = record()
    agent.store.went[NET] = Moved(to="h9", epoch=1)
    agent.restart()
    agent.host.owners[GATEWAY] = SOMEBODY
    reply = await agent.call("020", "implement-network", epoch=2)
    assert reply.error.startswith(f"{GATEWAY} is answered by {SOMEBODY}")
    assert agent.store.files == {}
    assert agent.host.present == {}
    assert agent.services.of == {}


@simulated
async def test_a_copy_of_an_earlier_placement_asks_too(agent: Agent) -> None:
    """This host died, lost the scope, returned, and takes the scope back from a host that is declared dead."""
    await agent.live()
    agent.scopes.placements.host_record = record()
    agent.host.owners[SECOND] = SOMEBODY
    assert (await agent.call("050", "assign-ip", epoch=2)).status == 3
    assert agent.store.files[NET].placement.epoch == 0
    agent.host.owners.clear()
    assert (await agent.call("050", "assign-ip", epoch=2)).status == 0
    assert agent.store.files[NET].placement.epoch == 2


@simulated
async def test_a_full_disk_after_the_question_leaves_no_port(agent: Agent) -> None:
    await take(agent, record())
    before = agent.host.present[NET]
    agent.store.full = True
    assert (await assign(agent)).status == 3
    await agent.clock.advance(2)
    assert agent.host.present[NET] == before


@simulated
async def test_a_scope_that_was_moved_on_still_asks(agent: Agent) -> None:
    await take(agent, record())
    part = wire.unpacked((await send(agent, wire.READ_STATE, wire.ReadPart())).data, wire.Part)
    new = Agent()
    new.store.record = record()
    new.restart()
    receive = wire.Receive(epoch=2, host="h3", proof="p", peer="h2", state=part.data)
    ready = wire.unpacked((await send(new, wire.RECEIVE, receive)).data, wire.Received)
    assert (await send(new, wire.OPEN, wire.Open(epoch=2, ready=ready.ready))).status == 0
    new.host.owners[SOURCE_NAT] = SOMEBODY
    assert (await new.call("021", "assign-ip", epoch=2)).status == 3


@simulated
@pytest.mark.parametrize("fenced", [False, True])
async def test_a_scope_of_an_archive_asks_unless_its_host_was_certainly_off(agent: Agent, *, fenced: bool) -> None:
    await agent.live()
    part = wire.unpacked((await send(agent, wire.READ_STATE, wire.ReadPart())).data, wire.Part)
    new = Agent()
    new.store.record = record()
    new.restart()
    receive = wire.Receive(epoch=1, host="h2", proof="p", peer="h1", state=part.data)
    assert (await send(new, wire.RECEIVE, receive)).status == 0
    assert (await send(new, wire.OPEN, wire.Open(epoch=1, dead=True, fenced=fenced))).status == 0
    new.host.owners[SECOND] = SOMEBODY
    assert (await new.call("050", "assign-ip", epoch=1)).status == (0 if fenced else 3)
