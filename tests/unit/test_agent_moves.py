"""Moves of a scope between two simulated hosts: what each agent does with each message, and who may be open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import TypeVar

import msgspec
import pytest

from fakehost import REGISTRATION, Agent, simulated
from netloom import placementwire as wire
from netloom.agent.host.changes import Announcement
from netloom.agent.kernel import conntrack_copy
from netloom.agent.kernel.conntrack_copy import Record
from netloom.agent.processes.failures import ServiceFailure
from netloom.agent.scopes.store import Moved
from netloom.errors import HostRefused
from netloom.render.want import Want
from netloom.state import Placement, Scope
from netloom.wire import Call, Evacuated, Reply

T = TypeVar("T")
NET = "net-204"
NAMESPACE = "cs-net-204"


async def send(agent: Agent, command: str, message: msgspec.Struct, scope_id: str = NET) -> Reply:
    call = Call(
        call_id=f"m{next(agent.numbers)}",
        command=command,
        scope_id=scope_id,
        registration=REGISTRATION,
        payload=wire.packed(message),
    )
    task = agent.start(agent.moves.execute(call))
    await agent.clock.settle()
    reply = await task
    assert isinstance(reply, Reply)
    return reply


async def ask(agent: Agent, command: str, message: msgspec.Struct, shape: type[T], scope_id: str = NET) -> T:
    reply = await send(agent, command, message, scope_id)
    assert reply.status == 0, reply
    return wire.unpacked(reply.data, shape)


async def state_of(agent: Agent) -> wire.Part:
    part = await ask(agent, wire.READ_STATE, wire.ReadPart(), wire.Part)
    data = part.data
    for number in range(1, part.parts):
        data += (await ask(agent, wire.READ_STATE, wire.ReadPart(number=number, token=part.token), wire.Part)).data
    return msgspec.structs.replace(part, data=data)


async def received(old: Agent, new: Agent, epoch: int = 1) -> tuple[wire.Part, wire.Received]:
    state = await state_of(old)
    receive = wire.Receive(epoch=epoch, host="h2", proof="proof", peer="h1", state=state.data)
    return state, await ask(new, wire.RECEIVE, receive, wire.Received)


async def closed(old: Agent, state: wire.Part, token: str = "", epoch: int = 1) -> wire.Closed:
    close = wire.Close(epoch=epoch, to="h2", revision=state.revision, token=token)
    return await ask(old, wire.CLOSE, close, wire.Closed)


async def moved(old: Agent, new: Agent, epoch: int = 1) -> None:
    state, ready = await received(old, new, epoch)
    await closed(old, state, epoch=epoch)
    assert (await send(new, wire.OPEN, wire.Open(epoch=epoch, ready=ready.ready))).status == 0
    assert (await send(old, wire.FINISH, wire.Finish(epoch=epoch, to="h2"))).status == 0


def serves(agent: Agent) -> bool:
    want = agent.host.present.get(NET)
    return want is not None and not want.gated


@simulated
async def test_a_scope_moves_with_its_state_and_announces_itself(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    before = agent.store.files[NET]
    await moved(agent, new)
    after = new.store.files[NET]
    assert after == msgspec.structs.replace(before, placement=Placement(epoch=1, host="h2", proof="proof"))
    assert serves(new)
    assert NET not in agent.host.present
    assert agent.store.files == {} and agent.store.retired == set()
    await new.clock.advance(3)
    assert [sorted(set(addresses)) for _, addresses in new.host.arp][:1] == [["10.10.1.1", "203.0.113.20"]]


@simulated
@pytest.mark.mutation("an-open-gate-is-announced-at-once")
async def test_an_opened_scope_is_announced_before_anything_else_is_done(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    new.workers.hold()
    reply = new.start(new.moves.execute(_open_call(new, ready.ready)))
    await new.clock.settle()
    await new.workers.step()
    assert [sorted(set(addresses)) for _, addresses in new.host.arp] == [["10.10.1.1", "203.0.113.20"]]
    assert (await reply).status == 0, "the announcer is not closed yet"
    assert "announced" not in new.did
    await new.workers.release()
    await new.clock.settle()
    assert "announced" in new.did


def _open_call(agent: Agent, ready: str) -> Call:
    payload = wire.packed(wire.Open(epoch=1, ready=ready))
    return Call(call_id="open", command=wire.OPEN, scope_id=NET, registration=REGISTRATION, payload=payload)


@simulated
async def test_connections_of_processes_are_reset_while_their_packets_still_leave(agent: Agent) -> None:
    await agent.live()
    state, _ = await received(agent, Agent())
    await closed(agent, state)
    assert agent.did[-3:] == [f"save {NET}", f"reset {NAMESPACE}", f"close {NET}"]


@simulated
async def test_until_it_opens_the_new_host_has_everything_and_lets_nothing_pass(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    await received(agent, new)
    assert new.host.present[NET].gated
    assert f"services {NET}" in new.did
    assert new.host.arp == []
    assert serves(agent)
    new.restart()
    await new.clock.settle()
    assert new.scopes.slot(NET).gate == "incoming"


@simulated
async def test_a_call_waits_while_a_scope_is_handed_over_and_then_follows_it(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    waiting = agent.send("050", "assign-ip")
    await agent.clock.settle()
    assert not waiting.done()
    await send(new, wire.OPEN, wire.Open(epoch=1, ready=ready.ready))
    await send(agent, wire.FINISH, wire.Finish(epoch=1, to="h2"))
    reply = await waiting
    assert (reply.status, reply.moved_to, reply.epoch) == (3, "h2", 1)
    assert reply.error == "net-204 was moved to h2"
    assert NET not in agent.host.present


@simulated
@pytest.mark.mutation("a-call-waits-for-the-end-of-a-move")
async def test_a_call_that_waited_is_executed_where_the_scope_stays(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, _ = await received(agent, new)
    await closed(agent, state)
    waiting = agent.send("050", "assign-ip")
    await agent.clock.advance(wire.CLOSED_S + 1)
    assert (await waiting).status == 0
    assert serves(agent)
    assert agent.scopes.slot(NET).gate == "open"


@simulated
async def test_a_call_waits_for_a_move_only_as_long_as_it_may(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, _ = await received(agent, new)
    await closed(agent, state)
    waiting = agent.send("050", "assign-ip", remaining_ms=2000)
    await agent.clock.advance(2.5)
    reply = await waiting
    assert (reply.status, reply.error) == (3, "net-204 is being moved to h2")
    assert not serves(agent)


@simulated
async def test_nobody_finishes_a_move_and_the_new_host_answers(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    await send(new, wire.OPEN, wire.Open(epoch=1, ready=ready.ready))
    agent.host.owners["10.10.1.1"] = "02:00:00:00:00:01"
    await agent.clock.advance(wire.CLOSED_S + 1)
    assert agent.scopes.slot(NET).gate == "passive"
    assert NET not in agent.host.present
    assert (await send(agent, wire.FINISH, wire.Finish(epoch=1, to="h2"))).status == 0
    assert agent.store.went == {NET: Moved(to="h2", epoch=1)}


async def _closed_with_token(old: Agent) -> wire.Reopen:
    """Close the scope for a move to h2; returns what opens it again."""
    state = await state_of(old)
    token = (await ask(old, wire.READ_FLOWS, wire.ReadPart(), wire.Part)).token
    await closed(old, state, token)
    return wire.Reopen(epoch=1, to="h2", token=token)


@simulated
async def test_the_old_host_opens_at_once_when_the_new_one_never_will(agent: Agent) -> None:
    await agent.live()
    reopen = await _closed_with_token(agent)
    waiting = agent.send("050", "assign-ip")
    await agent.clock.settle()
    assert not serves(agent) and not waiting.done()
    for _ in range(2):
        assert (await send(agent, wire.REOPEN, reopen)).status == 0
        assert serves(agent)
    assert (await waiting).status == 0
    placement = agent.store.files[NET].placement
    assert (placement.gate, placement.peer) == ("open", "")
    await agent.clock.advance(3)
    assert agent.host.arp, "its addresses are announced"


@simulated
@pytest.mark.mutation("a-host-that-closed-for-another-move-stays-closed")
async def test_the_old_host_opens_only_for_the_move_that_closed_it_last(agent: Agent) -> None:
    await agent.live()
    reopen = await _closed_with_token(agent)
    for other in ({"epoch": 2}, {"to": "h3"}, {"token": ""}, {"token": "x"}):
        assert (await send(agent, wire.REOPEN, msgspec.structs.replace(reopen, **other))).status == 3
    await _closed_with_token(agent)  # by another operator
    reply = await send(agent, wire.REOPEN, reopen)
    assert (reply.status, reply.error) == (3, "net-204 was closed for another move, or by an earlier agent")
    reopen = await _closed_with_token(agent)
    agent.restart()
    assert (await send(agent, wire.REOPEN, reopen)).status == 3
    assert not serves(agent)


@simulated
async def test_a_host_without_a_token_or_a_scope_opens_nothing(agent: Agent) -> None:
    await agent.live()
    await closed(agent, await state_of(agent))
    assert (await send(agent, wire.REOPEN, wire.Reopen(epoch=1, to="h2", token=""))).status == 3
    assert (await send(agent, wire.FINISH, wire.Finish(epoch=1, to="h2"))).status == 0
    reply = await send(agent, wire.REOPEN, wire.Reopen(epoch=1, to="h2", token=""))
    assert (reply.status, reply.error) == (3, "net-204 was moved to h2")


@simulated
@pytest.mark.mutation("an-opened-scope-is-not-dropped")
async def test_drop_does_not_deny_that_the_scope_was_opened(agent: Agent) -> None:
    """It was opened here, and has moved on: another host serves it."""
    await agent.live()
    new = Agent()
    await moved(agent, new)
    assert (
        await send(new, wire.CLOSE, wire.Close(epoch=2, to="h3", revision=new.store.files[NET].revision))
    ).status == 0
    assert (await send(new, wire.FINISH, wire.Finish(epoch=2, to="h3"))).status == 0
    reply = await send(new, wire.DROP, wire.Drop(epoch=1))
    assert (reply.status, reply.error) == (3, "net-204 was opened here, and moved to h3")
    assert (await send(new, wire.DROP, wire.Drop(epoch=3))).status == 0


@simulated
async def test_the_old_host_does_not_open_while_it_cannot_ask(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, _ = await received(agent, new)
    await closed(agent, state)
    agent.host.unknown["10.10.1.1"] = "eth1.1204 has no link"
    await agent.clock.advance(wire.CLOSED_S + 1)
    assert not serves(agent)
    agent.host.unknown.clear()
    await agent.clock.advance(wire.CLOSED_S + 1)
    assert serves(agent)


@pytest.mark.mutation("a-gate-that-did-not-open-is-asked-about")
@simulated
async def test_a_gate_that_did_not_open_opens_later_only_if_nobody_answers(agent: Agent) -> None:
    """The state was saved as open. The operator fails, too, and the old host opens again."""
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    open_gate = new.host.open_gate

    def refused(scope_id: str, want: Want) -> tuple[Announcement, ...]:
        raise HostRefused("Cannot allocate memory")

    new.host.open_gate = refused  # type: ignore[method-assign]
    assert (await send(new, wire.OPEN, wire.Open(epoch=1, ready=ready.ready))).status == 3
    new.host.open_gate = open_gate  # type: ignore[method-assign]
    assert not serves(new)
    await agent.clock.advance(wire.CLOSED_S + 1)
    assert serves(agent)
    new.host.owners["10.10.1.1"] = "02:00:00:00:00:01"
    await new.clock.advance(60)
    assert not serves(new)
    assert new.scopes.slot(NET).gate == "passive"


@simulated
@pytest.mark.mutation("no-opening-after-its-time")
async def test_a_host_does_not_open_when_its_time_is_over(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    boot, at, reception = ready.ready.split(" ")
    for late in (f"{boot} {int(at) - 6_000_000_000}", f"other {at}", "", "x y", f"{boot} {int(at) + 10**12}"):
        reply = await send(new, wire.OPEN, wire.Open(epoch=1, ready=f"{late} {reception}"))
        assert (reply.status, reply.error) == (3, "net-204 was not opened in time")
    assert not serves(new)


@simulated
@pytest.mark.mutation("no-opening-by-an-earlier-reception")
async def test_a_host_does_not_open_by_an_earlier_reception(agent: Agent) -> None:
    """An ``open`` that was on its way for long comes after the scope was dropped, and received once more."""
    await agent.live()
    new = Agent()
    _, ready = await received(agent, new)
    assert (await send(new, wire.DROP, wire.Drop(epoch=1))).status == 0
    assert (await send(new, wire.OPEN, wire.Open(epoch=1, ready=ready.ready))).status == 3
    state, ready_again = await received(agent, new)
    for earlier in (ready.ready, ready.ready.rpartition(" ")[0], ""):
        reply = await send(new, wire.OPEN, wire.Open(epoch=1, ready=earlier))
        assert (reply.status, reply.error) == (3, "net-204 was received anew, or the agent restarted")
    added = await ask(new, wire.ADD_FLOWS, wire.AddFlows(epoch=1), wire.Received)
    await closed(agent, state)
    assert added.ready.split()[2] == ready_again.ready.split()[2]
    assert (await send(new, wire.OPEN, wire.Open(epoch=1, ready=added.ready))).status == 0


@simulated
async def test_a_state_that_changed_is_not_handed_over(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, _ = await received(agent, new)
    await agent.call("050", "assign-ip", public_ip="203.0.113.77")
    reply = await send(agent, wire.CLOSE, wire.Close(epoch=1, to="h2", revision=state.revision))
    assert (reply.status, reply.error) == (3, "net-204 has changed meanwhile")
    assert reply.revision != state.revision
    assert serves(agent)
    await moved(agent, new)
    assert "203.0.113.77" in new.store.files[NET].public_ips


@simulated
async def test_a_lost_reply_to_open_is_asked_for_again(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    state, ready = await received(agent, new)
    await closed(agent, state)
    for _ in range(2):
        assert (await send(new, wire.OPEN, wire.Open(epoch=1, ready=ready.ready))).status == 0
    for _ in range(2):
        assert (await send(agent, wire.FINISH, wire.Finish(epoch=1, to="h2"))).status == 0


@simulated
@pytest.mark.parametrize("gate", ["incoming", "closed"])
async def test_an_agent_that_restarts_in_a_move_keeps_the_gate_and_decides_in_time(agent: Agent, gate: str) -> None:
    await agent.live()
    new = Agent()
    state, _ = await received(agent, new)
    await closed(agent, state)
    it = agent if gate == "closed" else new
    it.restart()
    await it.upkeep.restore()
    await it.clock.settle()
    assert it.host.present[NET].gated
    await it.clock.advance(wire.INCOMING_S + 1)
    assert serves(it) is (gate == "closed")
    assert (NET in it.store.files) is (gate == "closed")


@simulated
async def test_an_old_host_that_died_in_finish_removes_the_scope_when_it_starts(agent: Agent) -> None:
    await agent.live()
    agent.store.save_moved(NET, Moved(to="h2", epoch=1))
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.settle()
    assert NET not in agent.host.present
    assert agent.store.files == {} and agent.store.retired == set()
    assert (await agent.call("050", "assign-ip")).moved_to == "h2"


@simulated
@pytest.mark.mutation("a-call-follows-a-move")
async def test_after_a_move_only_the_end_or_a_newer_placement_is_executed(agent: Agent) -> None:
    await agent.live()
    await moved(agent, Agent())
    fixtures = {"implement-network": "020", "assign-ip": "050", "release-ip": "060", "shutdown-network": "126"}
    for command, fixture in fixtures.items():
        reply = await agent.call(fixture, command)
        assert (reply.status, reply.moved_to, reply.epoch) == (3, "h2", 1), command
    assert (await agent.call("020", "locate")).moved_to == "h2"
    assert NET not in agent.host.present
    assert (await agent.call("131", "destroy-network")).status == 0
    assert agent.store.went == {}


@simulated
@pytest.mark.mutation("an-occupied-address-is-not-taken")
async def test_a_host_that_was_off_asks_before_it_serves_again(agent: Agent) -> None:
    await agent.live()
    agent.host.present.clear()  # a power cut
    agent.host.owners["10.10.1.1"] = "02:00:00:00:00:01"
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.settle()
    assert agent.did.index(f"converge {NET}") < agent.did.index(f"ask {NET}")
    assert NET not in agent.host.present
    assert agent.host.arp == []
    assert agent.scopes.slot(NET).gate == "passive"
    assert "10.10.1.1 is answered by 02:00:00:00:00:01" in " ".join(agent.log.lines)
    reply = await agent.call("050", "assign-ip")
    assert (reply.status, reply.gate) == (3, "passive")
    assert "passive on this host: 10.10.1.1 is answered by" in reply.error
    held = await ask(agent, wire.PLACEMENTS, wire.ListPlacements(), wire.Placements, "")
    assert [(it.scope_id, it.gate) for it in held.scopes] == [(NET, "passive")]
    agent.host.owners.clear()
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.advance(1000)
    assert NET not in agent.host.present  # until an operator decides


@simulated
async def test_a_host_that_was_off_serves_what_nobody_else_serves(agent: Agent) -> None:
    await agent.live()
    agent.host.present.clear()
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.advance(3)
    assert serves(agent)
    assert agent.did.count(f"ask {NET}") == 1
    assert agent.host.arp
    agent.restart()  # the agent alone: the network stayed
    await agent.upkeep.restore()
    assert f"ask {NET}" not in agent.did


@simulated
async def test_a_host_without_a_link_waits_behind_its_gate(agent: Agent) -> None:
    await agent.live()
    agent.host.present.clear()
    agent.host.unknown["203.0.113.20"] = "eth2.101 has no link"
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.settle()
    assert agent.host.present[NET].gated
    agent.host.unknown.clear()
    await agent.clock.advance(2)
    assert serves(agent)


@simulated
async def test_a_dead_hosts_scope_opens_where_nobody_answers(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    await received(agent, new)
    new.host.owners["10.10.1.1"] = "02:00:00:00:00:01"
    reply = await send(new, wire.OPEN, wire.Open(epoch=1, dead=True))
    assert reply.status == 3 and "10.10.1.1 is answered by 02:00:00:00:00:01" in reply.error
    assert not serves(new)
    assert (await send(new, wire.OPEN, wire.Open(epoch=1, dead=True, fenced=True))).status == 0
    assert serves(new)


@simulated
async def test_a_scope_comes_back_to_the_host_that_it_left(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    await moved(agent, new)
    state = await state_of(new)
    receive = wire.Receive(epoch=2, host="h1", proof="again", peer="h2", state=state.data)
    ready = await ask(agent, wire.RECEIVE, receive, wire.Received)
    await ask(new, wire.CLOSE, wire.Close(epoch=2, to="h1", revision=state.revision), wire.Closed)
    await send(agent, wire.OPEN, wire.Open(epoch=2, ready=ready.ready))
    await send(new, wire.FINISH, wire.Finish(epoch=2, to="h1"))
    assert serves(agent) and not serves(new)
    assert agent.store.went == {}
    reply = await agent.call("020", "locate")
    assert (reply.holds, reply.epoch, reply.proof, reply.gate) == (True, 2, "again", "open")


@pytest.mark.mutation("what-is-served-here-was-not-moved", instead="False")
@simulated
async def test_an_agent_that_died_after_it_had_opened_a_scope_forgets_where_that_was(agent: Agent) -> None:
    await agent.live()
    scope = agent.store.files[NET]
    agent.store.files[NET] = msgspec.structs.replace(scope, placement=msgspec.structs.replace(scope.placement, epoch=2))
    agent.store.went[NET] = Moved(to="h2", epoch=1)
    agent.restart()
    await agent.upkeep.restore()
    await agent.clock.settle()
    assert serves(agent)
    assert agent.store.went == {}


@simulated
async def test_an_old_epoch_is_refused_and_a_foreign_scope_too(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    await moved(agent, new, epoch=3)
    state = await state_of(new)
    again = wire.Receive(epoch=3, host="h1", proof="", peer="h2", state=state.data)
    reply = await send(agent, wire.RECEIVE, again)
    assert (reply.status, reply.error) == (3, "net-204 has epoch 3 already, so 3 is not a new one")
    other = Agent()
    await other.live()
    reply = await send(other, wire.RECEIVE, msgspec.structs.replace(again, epoch=9))
    assert reply.error == "net-204 is open here with epoch 0"
    foreign = state.data.replace(b'"owner": "test"', b'"owner": "somebody"')
    await received(new, other_host := Agent(), 4)
    reply = await send(other_host, wire.RECEIVE, msgspec.structs.replace(again, epoch=9, state=foreign))
    assert "belongs to test on this host, not to somebody" in reply.error


@simulated
async def test_a_state_that_cannot_be_read_is_refused(agent: Agent) -> None:
    for state in (b"", b"{}", b'{"schema": 99}', b"\xff", b'{"schema":1,"scope_id":"net-9","owner":"x"}'):
        receive = wire.Receive(epoch=1, host="h2", proof="", peer="h1", state=state)
        reply = await send(agent, wire.RECEIVE, receive)
        assert reply.status == 3 and "the state of net-204 from h1" in reply.error
    assert agent.store.files == {}


@simulated
@pytest.mark.mutation("a-passive-copy-outlives-an-attempt-to-open-it")
@pytest.mark.parametrize("end", ["drop", "time", "service"])
async def test_the_only_copy_is_kept_when_it_cannot_be_opened(agent: Agent, end: str) -> None:
    await agent.live()
    agent.scopes.placements.make_passive(agent.scopes.slot(NET), "02:00:00:00:00:01 answers for 203.0.113.20")
    state = await state_of(agent)
    if end == "service":
        agent.services.failed.append(
            ServiceFailure(name="dnsmasq", message="dnsmasq is not installed", serves=frozenset({"dhcp"}))
        )
    receive = wire.Receive(epoch=1, host="h1", proof="", peer="", state=state.data)
    why = "02:00:00:00:00:01 answers for 203.0.113.20"
    for _ in range(2):
        assert (await send(agent, wire.RECEIVE, receive)).status == (3 if end == "service" else 0)
        receive = msgspec.structs.replace(receive, epoch=receive.epoch + 1)
        placement = agent.store.files[NET].placement
        assert (placement.why, placement.was_passive) == ((why, "") if end == "service" else ("", why))
    agent.host.owners["203.0.113.20"] = "02:00:00:00:00:01"
    if end == "drop":
        assert (await send(agent, wire.OPEN, wire.Open(epoch=2, dead=True))).status == 3
        assert (await send(agent, wire.DROP, wire.Drop(epoch=2))).status == 0
    elif end == "time":
        await agent.clock.advance(wire.INCOMING_S + 1)
    placement = agent.store.files[NET].placement
    assert (placement.gate, placement.epoch) == ("passive", 2)
    assert (placement.why, placement.was_passive) == (why, "")
    assert NET not in agent.host.present


@simulated
async def test_a_host_where_a_service_fails_does_not_take_the_scope(agent: Agent) -> None:
    await agent.live()
    new = Agent()
    new.services.failed.append(
        ServiceFailure(name="dnsmasq", message="dnsmasq is not installed", serves=frozenset({"dhcp"}))
    )
    state = await state_of(agent)
    receive = wire.Receive(epoch=1, host="h2", proof="", peer="h1", state=state.data)
    reply = await send(new, wire.RECEIVE, receive)
    assert reply.status == 3 and "dnsmasq is not installed" in reply.error
    assert new.store.files == {} and NET not in new.host.present


@simulated
async def test_drained_and_evacuated_are_kept_and_told_in_each_reply(agent: Agent) -> None:
    await send(agent, wire.SET_DRAINED, wire.SetDrained(drained=True), "")
    evacuated = wire.SetEvacuated(host="h9", owner="test", until=99, proof="p")
    await send(agent, wire.SET_EVACUATED, evacuated, "")
    agent.restart()
    reply = await agent.call("020", "locate")
    record = Evacuated(host="h9", until=99, proof="p", owner="test")
    assert (reply.drained, reply.evacuated) == (True, (record,))
    other = msgspec.structs.replace(evacuated, owner="other", proof="q")
    await send(agent, wire.SET_EVACUATED, other, "")
    reply = await agent.call("020", "locate")
    assert reply.evacuated == (record, msgspec.structs.replace(record, owner="other", proof="q"))
    held = await ask(agent, wire.PLACEMENTS, wire.ListPlacements(), wire.Placements, "")
    assert (held.drained, held.evacuated) == (True, ("h9",))
    await send(agent, wire.SET_EVACUATED, wire.SetEvacuated(host="h9"), "")
    await send(agent, wire.SET_DRAINED, wire.SetDrained(drained=False), "")
    assert (await agent.call("020", "locate")).evacuated == ()


@simulated
async def test_a_scope_that_replaces_one_of_a_dead_host_has_the_next_epoch_and_asks_first(agent: Agent) -> None:
    call = agent.call("020", "implement-network", epoch=1)
    assert (await call).status == 0
    assert agent.store.files[NET].placement.epoch == 1
    assert f"ask {NET}" in agent.did


@simulated
async def test_messages_that_cannot_be_read_change_nothing(agent: Agent) -> None:
    await agent.live()
    for command in wire.COMMANDS:
        for payload in (b"", b"\xff", b"{}", b"\x80"):
            scope_id = NET if command in wire.SCOPE_COMMANDS else ""
            call = Call(call_id="x", command=command, scope_id=scope_id, registration=REGISTRATION, payload=payload)
            reply = await agent.moves.execute(call)
            if payload != b"\x80" or command not in wire.READING:
                assert reply.status == 3, (command, payload)
    assert serves(agent)
    await asyncio.sleep(0)


@simulated
async def test_a_large_state_and_many_connections_are_encoded_once_and_read_in_parts(agent: Agent) -> None:
    await agent.live()
    scope = agent.scopes.slot(NET).scope
    assert scope is not None
    encoded = json.dumps({"of": "any content"}).encode() * 100_000
    records = [Record(bytes([4, 6, 0, 0]) + number.to_bytes(12, "big") + bytes(14)) for number in range(40_000)]
    agent.host.flows[NAMESPACE] = records
    calls: list[str] = []

    def state(_: Scope) -> bytes:
        calls.append("state")
        return encoded

    def listed(_: Iterable[Record]) -> list[bytes]:
        calls.append("flows")
        return chunks

    chunks = conntrack_copy.encode(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.store, "encoded", state)
        patch.setattr(conntrack_copy, "encode", listed)
        assert (await state_of(agent)).data == encoded
        first = await ask(agent, wire.READ_FLOWS, wire.ReadPart(), wire.Part)
        rest = [
            await ask(agent, wire.READ_FLOWS, wire.ReadPart(number=it, token=first.token), wire.Part)
            for it in range(1, first.parts)
        ]
    assert [it.data for it in (first, *rest)] == chunks
    assert first.parts > 2 and len(encoded) > 2 * wire.PART_BYTES_MAX
    assert calls == ["state", "flows"]
