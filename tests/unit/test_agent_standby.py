"""A scope of a group on two simulated hosts: what the standby gets, when calls are answered, and how a turn begins."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from fakehost import REGISTRATION, Agent, simulated
from netloom import pairwire, placementwire, standbywire
from netloom.agent.scopes import upstream, wire_questions
from netloom.agent.scopes.standby_commands import FORGOTTEN_AFTER_S, MOVE_BEGINS_WITHIN_S, SILENT_S
from netloom.agent.scopes.standby_groups import WIRES_EVERY_S
from netloom.agent.scopes.store import Moved
from netloom.agent.scopes.wire_questions import ASK_EVERY_S
from netloom.errors import HostRefused
from netloom.guestwire import PasswordTaken
from netloom.netobjects import Neighbour, Route
from netloom.render.want import Port, Segment, Want
from netloom.secret import Secret
from netloom.standbywire import GroupHost, GroupSpec, JoinGroup, LeaveGroup, SetGroup
from netloom.wire import Call, Reply
from unit.conntrack_messages import UDP, record

NET = "net-204"
GROUP = GroupSpec(
    group_id="0badcafe",
    owner="test",
    first=GroupHost(name="h1", address="192.0.2.1"),
    second=GroupHost(name="h2", address="192.0.2.2"),
    witness=GroupHost(name="h3", address="192.0.2.3"),
    secret=Secret("ab" * 32),
)


async def send(agent: Agent, command: str, message: msgspec.Struct, scope_id: str = NET) -> Reply:
    call = Call(
        call_id=f"g{next(agent.numbers)}",
        command=command,
        scope_id=scope_id,
        registration=REGISTRATION,
        payload=standbywire.packed(message),
    )
    task = agent.start(agent.standbys.execute(call))
    for _ in range(40):
        await agent.clock.settle()
        if task.done():
            break
        await agent.clock.advance(0.1)
    return await task  # type: ignore[no-any-return]


def turn(agents: tuple[Agent, ...], active: str, term: int, *, serves: bool = True) -> None:
    """It is the turn of this host, as all of these agents see it."""
    for agent in agents:
        view = agent.engine.groups[GROUP.group_id]
        serving = serves and view.me == active
        agent.engine.groups[GROUP.group_id] = replace(view, active=active, term=term, released=False, serves=serving)
        agent.standbys.changed(GROUP.group_id)


async def grouped(agent: Agent, group: GroupSpec = GROUP) -> Agent:
    """The network of the agent gets a standby: the result."""
    await agent.live()
    standby = Agent(agent.clock, "h2")
    for it in (agent, standby):
        reply = await send(it, standbywire.SET_GROUP, SetGroup(host=it.name, group=group), "")
        assert reply.status == 0, reply
        it.start(it.standbys.run())
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    join = JoinGroup(group_id=GROUP.group_id, epoch=1, proof="p1", standby_proof="p2")
    reply = await send(agent, standbywire.JOIN_GROUP, join)
    assert reply.status == 0, reply
    await agent.clock.advance(1)
    return standby


@simulated
async def test_the_standby_has_the_state_with_its_own_proof_and_builds_it(agent: Agent) -> None:
    standby = await grouped(agent)
    here, there = agent.store.files[NET], standby.store.files[NET]
    assert there == replace(here, placement=replace(here.placement, host="h2", proof="p2", partner_proof="p1"))
    assert agent.host.present[NET] == standby.host.present[NET]
    assert standby.host.present[NET].lease == GROUP.mark
    assert standby.services.of == {NET: "cs-net-204"}


@simulated
async def test_a_call_is_answered_when_the_standby_has_stored_it(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.workers.hold()
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.advance(0.5)
    assert not task.done()
    await standby.workers.release()
    await agent.clock.settle()
    reply = await task
    assert reply.status == 0 and not reply.note
    assert standby.store.files[NET].revision == reply.revision


@simulated
async def test_the_standby_gets_a_state_before_the_host_is_changed(agent: Agent) -> None:
    """So both hosts work at the same time, and a call takes hardly longer than without a standby."""
    standby = await grouped(agent)
    agent.host.fail(NET, HostRefused("a link is busy"))
    reply = await agent.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.status != 0
    assert standby.store.files[NET].revision == agent.store.files[NET].revision


@simulated
async def test_a_standby_that_does_not_answer_delays_one_call_and_is_behind(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.Stored,)
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.advance(1.1)
    reply = await task
    assert reply.status == 0 and "h2" in reply.note
    assert reply.standby is not None and reply.standby.behind
    await agent.clock.advance(0.5)
    assert agent.engine.local[GROUP.group_id].partner_behind
    # The next one does not wait for it.
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.98")
    await agent.clock.settle()
    assert task.done()
    # It compares from time to time, and catches up.
    standby.pairs.dropped = ()
    await agent.clock.advance(31)
    assert standby.store.files[NET].revision == agent.store.files[NET].revision
    assert not agent.engine.local[GROUP.group_id].partner_behind


@simulated
async def test_a_standby_catches_up_when_it_is_connected_again(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    reply = await agent.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.status == 0
    assert standby.store.files[NET].revision < reply.revision
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert standby.store.files[NET].revision == reply.revision
    assert not standby.engine.local[GROUP.group_id].behind


@pytest.mark.mutation("a-standby-executes-nothing")
@simulated
async def test_a_standby_refuses_calls_and_says_whose_turn_it_is(agent: Agent) -> None:
    standby = await grouped(agent)
    reply = await standby.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.elsewhere and reply.moved_to == "h1" and reply.gate == "standby"
    assert reply.epoch == 1


@pytest.mark.mutation("a-turn-begins-with-known-gateways", instead="None")
@simulated
async def test_a_turn_begins_with_announcements_and_nothing_to_build(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.forget()
    agent.pairs.cut()
    turn((standby,), "h2", 1)
    await agent.clock.settle()
    assert standby.host.arp
    assert standby.host.looked_for == {"203.0.113.1"}
    assert not [it for it in standby.did if it.startswith(("save", "close", "open"))]
    reply = await standby.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99", epoch=2)
    assert reply.status == 0 and reply.gate == "open"
    assert (reply.epoch, reply.proof, reply.proof_from) == (2, "p2", 1)
    assert standby.store.files[NET].placement.epoch == 1  # the term counts


@simulated
async def test_a_turn_begins_with_all_backends_of_balanced_ports(agent: Agent) -> None:
    """The checks of the standby's haproxy have failed so far: none of their frames passed."""
    standby = await grouped(agent)
    assert (await agent.call("080", "apply-lb-rules")).status == 0
    await agent.clock.advance(1)
    agent.pairs.cut()
    turn((standby,), "h2", 1)
    await agent.clock.settle()
    assert standby.did.count(f"revive backends {NET}") == 1
    assert f"revive backends {NET}" not in agent.did


@simulated
async def test_a_lease_that_comes_back_brings_all_backends_of_balanced_ports(agent: Agent) -> None:
    standby = await grouped(agent)
    assert (await agent.call("080", "apply-lb-rules")).status == 0
    await agent.clock.advance(1)
    turn((agent, standby), "h1", 0, serves=False)
    await agent.clock.advance(1)
    assert f"revive backends {NET}" not in agent.did
    turn((agent, standby), "h1", 0)
    await agent.clock.advance(1)
    assert agent.did.count(f"revive backends {NET}") == 1


@simulated
async def test_the_old_host_returns_as_standby_and_gets_the_newer_state(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    turn((standby,), "h2", 1)
    reply = await standby.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.status == 0
    turn((agent,), "h2", 1)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert agent.store.files[NET].revision == reply.revision
    assert agent.store.files[NET].placement.proof == "p1"
    assert (await agent.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.97")).moved_to == "h2"


@pytest.mark.mutation("a-host-without-a-lease-executes-nothing")
@simulated
async def test_a_host_without_its_lease_executes_nothing_until_it_is_decided(agent: Agent) -> None:
    standby = await grouped(agent)
    turn((agent, standby), "h1", 0, serves=False)
    await agent.clock.settle()
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.advance(1)
    assert not task.done()
    turn((agent, standby), "h2", 1)
    await agent.clock.settle()
    reply = await task
    assert reply.elsewhere and reply.moved_to == "h2" and reply.epoch == 2


@simulated
async def test_a_call_that_waits_for_a_lease_in_vain_says_who_is_missing(agent: Agent) -> None:
    standby = await grouped(agent)
    turn((agent, standby), "h1", 0, serves=False)
    await agent.clock.settle()
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99", remaining_ms=2000)
    await agent.clock.advance(2.5)
    reply = await task
    assert (reply.status, reply.hint) == (3, "bring h2 or h3 back; CloudStack may repeat the call")
    assert "this host has no lease" in reply.error


@pytest.mark.mutation("a-question-needs-no-standby")
@simulated
async def test_a_question_does_not_fail_because_the_standby_lacks_a_state(agent: Agent) -> None:
    """The call that made it has failed. CloudStack learns from the answer that nobody serves the network."""
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.Stored,)
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.advance(0.2)
    turn((agent, standby), "h1", 0, serves=False)
    await agent.clock.advance(1.1)
    assert (await task).status != 0
    answer = await agent.call("021", "locate")
    assert answer.status == 0 and answer.standby is not None and not answer.standby.serving


@simulated
async def test_a_turn_that_is_lost_during_a_call_fails_it(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.Stored,)
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.advance(0.2)
    turn((agent, standby), "h2", 1)
    await agent.clock.advance(1.1)
    reply = await task
    assert reply.status != 0
    assert reply.moved_to == "h2"


@simulated
async def test_a_scope_that_ends_is_forgotten_by_the_standby(agent: Agent) -> None:
    standby = await grouped(agent)
    assert (await agent.call("110", "destroy-network")).status == 0
    await agent.clock.advance(1)
    assert not standby.store.files and NET not in standby.host.present


@simulated
async def test_what_ended_while_the_standby_was_away_is_forgotten_when_it_is_back(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    assert (await agent.call("110", "destroy-network")).status == 0
    assert standby.store.files
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert not standby.store.files and NET not in standby.host.present


@simulated
async def test_an_unreadable_state_removes_no_copy(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    agent.store.unreadable.add(NET)
    agent.restart()
    agent.start(agent.standbys.run())
    await agent.clock.advance(1)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert NET in standby.store.files


@simulated
async def test_a_scope_that_has_moved_away_hides_no_end_of_another_one(agent: Agent) -> None:
    """It has no state here, so nothing of the group can be unknown."""
    standby = await grouped(agent)
    agent.pairs.cut()
    assert (await agent.call("110", "destroy-network")).status == 0
    agent.store.save_moved("net-300", Moved(to="h3", epoch=4))
    agent.restart()
    agent.start(agent.standbys.run())
    await agent.clock.advance(1)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert NET not in standby.store.files and NET not in standby.host.present


@simulated
async def test_a_scope_leaves_when_its_standby_has_forgotten_it(agent: Agent) -> None:
    standby = await grouped(agent)
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))
    assert reply.status == 0, reply
    await agent.clock.advance(1)
    placement = agent.store.files[NET].placement
    assert (placement.group, placement.leaving, placement.epoch) == ("", False, 1)
    assert agent.host.present[NET].lease == 0
    assert not standby.store.files and NET not in standby.host.present


@simulated
async def test_a_scope_stays_in_its_group_while_the_standby_does_not_answer(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.GoneDone,)
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))
    assert reply.status != 0
    assert agent.store.files[NET].placement.group == GROUP.group_id
    assert agent.host.present[NET].lease == GROUP.mark


def silence(agents: tuple[Agent, ...], host: str, silent_s: float) -> None:
    """The host was not heard for so long, as all of these agents see it."""
    for agent in agents:
        view = agent.engine.groups[GROUP.group_id]
        agent.engine.groups[GROUP.group_id] = replace(view, silent_s={host: silent_s})


@simulated
async def test_a_scope_leaves_a_standby_that_is_dead(agent: Agent) -> None:
    """The witness promises that the standby never serves. The standby removes its copy when it is back."""
    standby = await grouped(agent)
    agent.pairs.cut()
    silence((agent,), "h2", 90.0)
    reply = await agent.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.standby is not None and reply.standby.standby_silent_s == 90
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))
    assert reply.status == 0, reply
    placement = agent.store.files[NET].placement
    assert (placement.group, placement.leaving, placement.epoch) == ("", False, 1)
    assert agent.host.present[NET].lease == 0
    assert standby.store.files
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert not standby.store.files and NET not in standby.host.present


@pytest.mark.mutation("a-silent-standby-that-may-serve-keeps-its-group", instead="True")
@simulated
async def test_a_scope_stays_in_its_group_while_nobody_promises_to_dissolve_it(agent: Agent) -> None:
    await grouped(agent)
    agent.pairs.cut()
    silence((agent,), "h2", 90.0)
    agent.engine.promises = False
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))
    assert reply.status != 0
    assert agent.store.files[NET].placement.group == GROUP.group_id
    assert agent.host.present[NET].lease == GROUP.mark


@pytest.mark.mutation("a-standby-that-is-heard-keeps-its-group")
@simulated
async def test_a_standby_that_is_heard_keeps_its_group(agent: Agent) -> None:
    """Its connection is lost for a moment. The other scopes of the group keep their standby."""
    await grouped(agent)
    agent.pairs.cut()
    silence((agent,), "h2", 1.0)
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))
    assert reply.status != 0
    assert not agent.engine.groups[GROUP.group_id].dissolved


@simulated
async def test_all_scopes_leave_a_dissolved_group(agent: Agent) -> None:
    """Also those of an agent that was ended in between."""
    await grouped(agent)
    agent.pairs.cut()
    agent.restart()
    agent.engine.dissolve(GROUP.group_id)
    agent.start(agent.standbys.run())
    await agent.clock.advance(2)
    assert agent.store.files[NET].placement.group == ""
    assert agent.host.present[NET].lease == 0


@pytest.mark.mutation("a-dissolved-group-is-not-used-again", instead="same and mine")
@pytest.mark.mutation("a-dissolved-group-takes-no-scope")
@simulated
async def test_a_dissolved_group_is_not_used_again(agent: Agent) -> None:
    await grouped(agent)
    await agent.live("300")
    agent.engine.dissolve(GROUP.group_id)
    other = replace(GROUP, group_id="0000002a")
    reply = await send(agent, standbywire.SET_GROUP, SetGroup(host="h1", group=other, reuses=True), "")
    assert standbywire.unpacked(reply.data, standbywire.GroupAnswer).group == other
    join = JoinGroup(group_id=GROUP.group_id, epoch=1, proof="p1", standby_proof="p2")
    reply = await send(agent, standbywire.JOIN_GROUP, join, "net-300")
    assert "dissolved" in reply.error
    assert agent.store.files["net-300"].placement.group == ""


@pytest.mark.mutation("a-member-that-forgot-votes-no-more")
@simulated
async def test_a_member_that_has_forgotten_a_group_does_not_come_back_into_it(agent: Agent) -> None:
    witness = Agent(agent.clock, "h3")
    reply = await send(witness, standbywire.SET_GROUP, SetGroup(host="h3", group=GROUP, exists=True), "")
    assert "not known here any more" in reply.error and not witness.engine.groups
    for exists in (False, True):
        reply = await send(witness, standbywire.SET_GROUP, SetGroup(host="h3", group=GROUP, exists=exists), "")
        assert reply.status == 0


@simulated
async def test_a_group_that_is_empty_for_long_is_forgotten_by_all(agent: Agent) -> None:
    standby = await grouped(agent)
    assert (await agent.call("110", "destroy-network")).status == 0
    await agent.clock.advance(1)
    assert not standby.store.files
    await agent.clock.advance(500)
    assert not agent.engine.groups[GROUP.group_id].dissolved
    await agent.clock.advance(110)
    assert agent.engine.groups[GROUP.group_id].dissolved
    standby.engine.dissolve(GROUP.group_id)  # it hears of it
    await agent.clock.advance(65)
    assert agent.engine.forgotten == [GROUP.group_id]
    await agent.clock.advance(120)
    assert standby.engine.forgotten == [GROUP.group_id]


@simulated
async def test_a_dissolved_group_waits_for_a_standby_that_is_away(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    silence((agent,), "h2", 90.0)
    assert (await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))).status == 0
    await agent.clock.advance(300)
    assert not agent.engine.forgotten
    agent.pairs.connect(standby.pairs)
    silence((agent,), "h2", 0.0)
    await agent.clock.advance(50)
    assert not agent.engine.forgotten
    await agent.clock.advance(15)
    assert agent.engine.forgotten == [GROUP.group_id]


@pytest.mark.mutation("a-group-that-may-have-scopes-stays", instead="slots")
@simulated
async def test_a_group_that_may_have_scopes_stays(agent: Agent) -> None:
    """A state that cannot be read may name the group. Without the group, its network would stop."""
    standby = await grouped(agent)
    agent.store.unreadable.add(NET)
    agent.restart()
    agent.start(agent.standbys.run())
    agent.engine.dissolve(GROUP.group_id)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(70)
    assert not agent.engine.forgotten


@simulated
async def test_a_witness_forgets_a_dissolved_group_when_the_active_host_has(agent: Agent) -> None:
    witness = Agent(agent.clock, "h3")
    assert (await send(witness, standbywire.SET_GROUP, SetGroup(host="h3", group=GROUP), "")).status == 0
    witness.start(witness.standbys.run())
    silence((witness,), "h1", 61.0)
    await agent.clock.advance(1)
    assert not witness.engine.forgotten
    witness.engine.dissolve(GROUP.group_id)
    await agent.clock.advance(1)
    assert witness.engine.forgotten == [GROUP.group_id]


@simulated
async def test_an_agent_goes_on_with_leaving(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.GoneDone,)
    task = agent.start(send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id)))
    await agent.clock.advance(0.5)
    assert agent.store.files[NET].placement.leaving
    task.cancel()
    agent.pairs.cut()
    standby.pairs.dropped = ()
    agent.restart()
    standby.start(standby.standbys.run())
    agent.start(agent.standbys.run())
    await agent.clock.advance(1)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(2)
    assert agent.store.files[NET].placement.group == ""
    assert agent.host.present[NET].lease == 0


@simulated
async def test_a_scope_joins_under_a_lease_alone(agent: Agent) -> None:
    await agent.live()
    assert (await send(agent, standbywire.SET_GROUP, SetGroup(host="h1", group=GROUP), "")).status == 0
    turn((agent,), "h1", 0, serves=False)
    join = JoinGroup(group_id=GROUP.group_id, epoch=1, proof="p1", standby_proof="p2")
    task = agent.start(send(agent, standbywire.JOIN_GROUP, join))
    await agent.clock.advance(10)
    reply = await task
    assert reply.status != 0 and "lease" in reply.error
    assert agent.store.files[NET].placement.group == ""


@simulated
async def test_a_difference_of_what_two_hosts_make_of_a_state_shows(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.host.without_helpers = frozenset({"ftp"})
    agent.registration = replace(REGISTRATION, conntrack_helpers=("ftp",))
    reply = await agent.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    assert reply.status == 0
    await agent.clock.advance(1)
    assert [it for it in agent.log.lines if "makes something else" in it]


@simulated
async def test_a_difference_shows_when_the_standby_returns_as_another_build(agent: Agent) -> None:
    standby = await grouped(agent)
    assert not [it for it in agent.log.lines if "makes something else" in it]
    agent.pairs.cut()
    slot = standby.scopes.get(NET)
    assert slot is not None and slot.rendered is not None
    slot.rendered = slot.rendered[0], msgspec.structs.replace(slot.rendered[1], namespace="cs-other")
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert [it for it in agent.log.lines if "makes something else" in it]


@pytest.mark.mutation("a-copy-replaces-nothing-that-is-served")
@simulated
async def test_a_standby_never_takes_the_state_of_a_network_that_it_serves(agent: Agent) -> None:
    standby = await grouped(agent)
    await standby.live("300")
    before = standby.store.files["net-300"]
    forged = replace(agent.store.files[NET], scope_id="net-300")
    message = pairwire.State(scope_id="net-300", epoch=1, joined=0, revision=1, data=standby.store.encoded(forged))
    agent.pairs.send(GROUP.group_id, message)
    await agent.clock.advance(1)
    assert standby.store.files["net-300"] == before


# --------------------------------------------------------------------------------------- leaving, and what is forgotten


async def half_left(agent: Agent) -> Agent:
    """The network was leaving its group when its host lost the turn; its standby has not heard of it. The standby."""
    standby = await grouped(agent)
    agent.pairs.dropped = (pairwire.Gone,)
    task = agent.start(send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id)))
    await agent.clock.settle()
    turn((agent, standby), "h2", 1)
    assert agent.store.files[NET].placement.leaving
    assert (await task).moved_to == "h2"
    agent.pairs.dropped = ()
    return standby


@pytest.mark.mutation("a-standby-is-not-about-to-leave")
@simulated
async def test_a_scope_that_was_leaving_stays_when_the_other_host_serves_it(agent: Agent) -> None:
    standby = await half_left(agent)
    await agent.clock.advance(31)
    assert agent.store.files[NET].placement.group == GROUP.group_id
    assert not agent.store.files[NET].placement.leaving
    assert standby.store.files[NET].placement.group == GROUP.group_id


@simulated
async def test_the_other_host_ends_a_scope_that_was_leaving_here(agent: Agent) -> None:
    standby = await half_left(agent)
    slot = agent.scopes.slot(NET)
    assert slot.scope is not None
    slot.scope = replace(slot.scope, placement=replace(slot.scope.placement, leaving=True))  # it has not heard yet
    assert (await standby.call("110", "destroy-network", epoch=2)).status == 0
    await agent.clock.advance(1)
    assert not agent.store.files and NET not in agent.host.present


@pytest.mark.mutation("a-scope-that-leaves-is-not-lost")
@simulated
async def test_a_scope_that_its_standby_forgot_just_before_it_took_over_is_not_lost(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.GoneDone,)
    task = agent.start(send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id)))
    await agent.clock.settle()
    assert not standby.store.files
    turn((agent, standby), "h2", 1)
    await task
    await agent.clock.advance(31)
    placement = agent.store.files[NET].placement
    assert (placement.group, placement.leaving) == ("", False)
    assert agent.host.present[NET].lease == 0 and not standby.store.files


@simulated
async def test_only_the_standby_of_a_scope_can_say_that_it_has_forgotten_it(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.pairs.dropped = (pairwire.GoneDone,)
    other = replace(GROUP, group_id="00000002")
    assert (await send(agent, standbywire.SET_GROUP, SetGroup(host="h1", group=other), "")).status == 0
    task = agent.start(send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id)))
    await agent.clock.settle()
    agent.standbys.pair_received(other.group_id, pairwire.GoneDone(scope_id=NET))
    assert (await task).status != 0
    assert agent.store.files[NET].placement.group == GROUP.group_id


@pytest.mark.mutation("a-host-speaks-for-scopes-of-its-group")
@simulated
async def test_the_hosts_of_another_group_get_no_state(agent: Agent) -> None:
    await grouped(agent)
    other = replace(GROUP, group_id="00000002")
    assert (await send(agent, standbywire.SET_GROUP, SetGroup(host="h1", group=other), "")).status == 0
    agent.pairs.sent.clear()
    agent.standbys.pair_received(other.group_id, pairwire.Wanted(scope_ids=(NET,)))
    agent.standbys.pair_received(other.group_id, pairwire.FlowsWanted(scope_id=NET))
    assert agent.pairs.sent == []


@pytest.mark.mutation("an-unreadable-state-removes-no-copy")
@simulated
async def test_a_list_that_may_lack_something_removes_no_copy(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.standbys.pair_received(GROUP.group_id, pairwire.HoldsWanted())  # answered, and complete
    standby.standbys.pair_received(GROUP.group_id, pairwire.Holds(scopes=(), more=False, complete=False))
    await agent.clock.advance(1)
    assert NET in standby.store.files


# ------------------------------------------------------------------------------------------------ a turn in the middle


@pytest.mark.mutation("an-active-host-takes-no-state")
@simulated
async def test_a_state_that_waited_until_the_turn_began_is_not_taken(agent: Agent) -> None:
    standby = await grouped(agent)
    before = standby.store.files[NET]
    slot = standby.scopes.slot(NET)
    async with standby.scopes.turn(slot, "another work"):
        task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
        await agent.clock.settle()
        view = standby.engine.groups[GROUP.group_id]
        standby.engine.groups[GROUP.group_id] = replace(view, active="h2", term=1, serves=True)  # the loop comes later
    await agent.clock.settle()
    assert standby.store.files[NET] == before
    await agent.clock.advance(1.1)
    assert (await task).note


@pytest.mark.mutation("a-scope-joins-under-a-lease")
@simulated
async def test_a_scope_does_not_join_when_the_lease_ends_meanwhile(agent: Agent) -> None:
    await agent.live()
    assert (await send(agent, standbywire.SET_GROUP, SetGroup(host="h1", group=GROUP), "")).status == 0
    agent.workers.hold()
    join = JoinGroup(group_id=GROUP.group_id, epoch=1, proof="p1", standby_proof="p2")
    task = agent.start(send(agent, standbywire.JOIN_GROUP, join))
    await agent.clock.settle()
    turn((agent,), "h1", 0, serves=False)
    await agent.workers.release()
    reply = await task
    assert reply.status != 0 and "lease" in reply.error
    assert agent.store.files[NET].placement.group == ""


@pytest.mark.mutation("the-lease-tells-who-serves-a-group")
@simulated
async def test_an_answer_to_arp_does_not_make_a_scope_of_a_group_passive(agent: Agent) -> None:
    await grouped(agent)
    assert await agent.upkeep.step_aside(NET, "203.0.113.20 is answered by 02:00:00:00:00:99")
    assert agent.store.files[NET].placement.gate == "open"
    assert not agent.host.present[NET].gated


@simulated
async def test_a_state_that_cannot_be_stored_does_not_stop_the_next_one(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.workers.hold()
    damaged = pairwire.State(scope_id=NET, epoch=1, joined=0, revision=99, data=b"damaged")
    standby.standbys.pair_received(GROUP.group_id, damaged)
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.settle()
    await standby.workers.release()
    reply = await task
    assert [it for it in standby.log.lines if it.startswith(f"scope={NET} standby: ")]
    assert not reply.note and standby.store.files[NET].revision == reply.revision


@simulated
async def test_what_the_standby_makes_of_a_state_may_be_known_first(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.host.without_helpers = frozenset({"ftp"})
    agent.registration = replace(REGISTRATION, conntrack_helpers=("ftp",))
    agent.workers.hold()
    task = agent.send("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")
    await agent.clock.settle()
    # The standby is told before the work here has ended.
    early = pairwire.Digest(scope_id=NET, revision=agent.store.files[NET].revision + 1, digest=b"something else")
    agent.standbys.pair_received(GROUP.group_id, early)
    assert not [it for it in agent.log.lines if "makes something else" in it]
    standby.pairs.dropped = (pairwire.Digest,)
    await agent.workers.release()
    await task
    await agent.clock.advance(1)
    assert [it for it in agent.log.lines if "makes something else" in it]


# ----------------------------------------------------------------------------------------------------------- the flows


FLOW, OTHER_FLOW = record(), record(UDP)


@simulated
async def test_a_standby_asks_for_the_connections_when_it_has_built_the_scope(agent: Agent) -> None:
    standby = await grouped(agent)
    assert agent.flows.followed == {"cs-net-204"}
    assert [it[:2] for it in standby.flows.did] == [("begin", "cs-net-204"), ("end", "cs-net-204")]
    standby.flows.did.clear()
    agent.flows.changed("cs-net-204", [FLOW], [])
    agent.flows.changed("cs-net-204", [], [OTHER_FLOW])
    agent.flows.changed("cs-net-300", [FLOW], [])  # nobody wants it
    await agent.clock.settle()
    assert standby.flows.did == [
        ("change", "cs-net-204", [FLOW], []),
        ("change", "cs-net-204", [], [OTHER_FLOW]),
    ]


@simulated
async def test_a_standby_that_returns_asks_for_the_connections_as_soon_as_it_has_built_the_scope(agent: Agent) -> None:
    """The other host has said before that the state has not changed."""
    standby = await grouped(agent)
    agent.pairs.cut()
    slot = standby.scopes.get(NET)
    assert slot is not None
    slot.unconverged = True
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert agent.flows.followed == frozenset()
    slot.unconverged = False
    await agent.clock.advance(1)
    assert agent.flows.followed == {"cs-net-204"}


@simulated
async def test_all_connections_are_sent_again_after_a_gap(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.flows.listed["cs-net-204"] = [FLOW]
    for lost in ("messages", "events"):
        standby.flows.did.clear()
        if lost == "messages":
            agent.standbys.pair_gap(GROUP.group_id)
        else:
            agent.flows.gap(frozenset({"cs-net-204"}))
        await agent.clock.settle()
        assert standby.flows.did == [
            ("begin", "cs-net-204"),
            ("change", "cs-net-204", [FLOW], []),
            ("end", "cs-net-204"),
        ]


@simulated
async def test_connections_are_followed_only_while_a_standby_wants_them(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.cut()
    assert agent.flows.followed == frozenset()
    standby.flows.did.clear()
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert agent.flows.followed == {"cs-net-204"}
    assert [it[0] for it in standby.flows.did] == ["begin", "end"]
    assert (await agent.call("110", "destroy-network")).status == 0
    await agent.clock.advance(1)
    assert agent.flows.followed == frozenset()


@simulated
async def test_a_turn_begins_with_the_connections_and_the_old_host_flushes_its_own(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.flows.did.clear()
    standby.flows.did.clear()
    turn((agent, standby), "h2", 1)
    await agent.clock.advance(1)
    assert standby.flows.did == [("serve", "cs-net-204")]
    assert [it[:2] for it in agent.flows.did] == [
        ("flush", "cs-net-204"),
        ("begin", "cs-net-204"),
        ("end", "cs-net-204"),
    ]
    assert agent.flows.followed == frozenset() and standby.flows.followed == {"cs-net-204"}


# ------------------------------------------------------------------------------ other commands about a scope of a group


@simulated
async def test_a_password_that_the_vm_acknowledged_is_gone_on_both_hosts(agent: Agent) -> None:
    standby = await grouped(agent)
    await agent.call("030", "prepare-nic")
    await agent.call("090", "save-password")
    files = agent.store.files, standby.store.files
    (nic,) = files[0][NET].networks["204"].nics
    assert all(it[NET].networks["204"].nics[nic].password for it in files)
    agent.upkeep.password_taken(PasswordTaken(scope_id=NET, network_id="204", nic=nic, password_id="1"))
    await agent.clock.settle()
    assert not any(it[NET].networks["204"].nics[nic].password for it in files)


async def move(agent: Agent, command: str, message: msgspec.Struct) -> Reply:
    call = Call(
        call_id=f"m{next(agent.numbers)}",
        command=command,
        scope_id=NET,
        registration=REGISTRATION,
        payload=placementwire.packed(message),
    )
    return await agent.moves.execute(call)


@simulated
async def test_a_scope_of_a_group_is_not_closed_for_a_move(agent: Agent) -> None:
    await grouped(agent)
    revision = agent.store.files[NET].revision
    reply = await move(agent, placementwire.CLOSE, placementwire.Close(epoch=2, to="h3", revision=revision))
    assert reply.status != 0 and "standby" in reply.error
    assert agent.store.files[NET].placement.gate == "open"


@simulated
async def test_a_scope_of_a_group_is_not_removed_or_received_where_it_is_served(agent: Agent) -> None:
    await grouped(agent)
    finish = placementwire.Finish(epoch=9, to="h3")
    assert (await move(agent, placementwire.FINISH, finish)).status != 0
    state = agent.store.encoded(agent.store.files[NET])
    receive = placementwire.Receive(epoch=9, host="h1", proof="p", peer="h3", state=state)
    assert (await move(agent, placementwire.RECEIVE, receive)).status != 0
    assert agent.store.files[NET].placement.group == GROUP.group_id


@simulated
async def test_a_standby_gives_its_copy_up_for_a_newer_placement(agent: Agent) -> None:
    standby = await grouped(agent)
    old = placementwire.Finish(epoch=1, to="h3")
    assert (await move(standby, placementwire.FINISH, old)).status != 0
    agent.pairs.cut()
    assert (await move(standby, placementwire.FINISH, placementwire.Finish(epoch=9, to="h3"))).status == 0
    assert not standby.store.files and standby.store.went[NET].to == "h3"


@simulated
async def test_a_standby_destroys_nothing_that_another_host_serves(agent: Agent) -> None:
    standby = await grouped(agent)
    reply = await standby.call("110", "destroy-network")
    assert reply.moved_to == "h1" and reply.elsewhere
    assert NET in standby.store.files and NET in agent.store.files


@simulated
async def test_people_see_who_serves_and_what_a_take_over_would_lack(agent: Agent) -> None:
    standby = await grouped(agent)
    (slot,) = agent.scopes.slots()
    assert slot.scope is not None
    lines = agent.scopes.describe_group(slot.scope)
    assert lines[0] == "standby: ready"
    assert "h1 serves in term 0, h2 stands by, h3 is the witness" in lines[1]
    agent.pairs.cut()
    assert "h2 is behind" in agent.scopes.describe_group(slot.scope)[0]
    assert agent.scopes.describe_group(standby.store.files[NET])


# ------------------------------------------------------------------------------------------------------------- the end


@simulated
async def test_an_end_is_answered_when_the_standby_has_forgotten_the_scope(agent: Agent) -> None:
    standby = await grouped(agent)
    standby.workers.hold()
    task = agent.send("110", "destroy-network")
    await agent.clock.advance(0.5)
    assert not task.done() and NET in standby.store.files
    await standby.workers.release()
    reply = await task
    assert reply.status == 0 and not reply.note
    assert not standby.store.files


@simulated
async def test_an_end_does_not_wait_for_a_standby_that_is_away(agent: Agent) -> None:
    await grouped(agent)
    agent.pairs.cut()
    task = agent.send("110", "destroy-network")
    await agent.clock.settle()
    reply = await task
    assert reply.status == 0 and "standby" in reply.note


@pytest.mark.mutation("an-end-that-the-active-host-does-not-know-is-no-success")
@simulated
async def test_an_end_that_the_next_active_host_does_not_know_fails(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.pairs.dropped = (pairwire.Gone,)
    task = agent.send("110", "destroy-network")
    await agent.clock.advance(0.2)
    turn((agent, standby), "h2", 1)
    await agent.clock.advance(1.1)
    assert (await task).status != 0
    assert (await standby.call("110", "destroy-network", epoch=2)).status == 0  # CloudStack's repetition
    assert not standby.store.files


@pytest.mark.mutation("each-turn-begins", instead="active and not was_active")
@simulated
async def test_a_turn_of_the_other_host_that_nobody_noticed_is_made_up_for(agent: Agent) -> None:
    standby = await grouped(agent)
    agent.host.arp.clear()
    agent.flows.did.clear()
    standby.flows.did.clear()
    turn((agent, standby), "h1", 2)  # term 1 is over already
    await agent.clock.advance(1)
    assert agent.host.arp and agent.flows.did == [("serve", "cs-net-204")]
    assert [it[0] for it in standby.flows.did] == ["flush", "begin", "end"]


async def joins_anew(agent: Agent, standby: Agent) -> None:
    """The network ends on the standby, whose turn it was, and begins on the first host, with the same group."""
    agent.pairs.cut()
    turn((agent, standby), "h2", 1)
    await agent.clock.advance(1)
    agent.pairs.connect(standby.pairs)
    await agent.clock.advance(1)
    assert (await standby.call("110", "destroy-network", epoch=2)).status == 0
    await agent.clock.advance(1)
    assert not agent.store.files
    turn((agent, standby), "h1", 2)
    await agent.live()
    standby.flows.did.clear()
    join = JoinGroup(group_id=GROUP.group_id, epoch=9, proof="p1", standby_proof="p2")
    assert (await send(agent, standbywire.JOIN_GROUP, join)).status == 0
    await agent.clock.advance(1)


@pytest.mark.mutation("a-host-that-served-takes-connections-again")
@simulated
async def test_a_host_that_served_the_network_before_takes_its_connections(agent: Agent) -> None:
    standby = await grouped(agent)
    await joins_anew(agent, standby)
    assert [it[0] for it in standby.flows.did] == ["flush", "begin", "end"]


@simulated
async def test_a_standby_gets_the_connections_of_a_network_that_another_group_had_before(agent: Agent) -> None:
    standby = await grouped(agent)
    assert (await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id))).status == 0
    other = replace(GROUP, group_id="0badbeef")
    for it in (agent, standby):
        assert (await send(it, standbywire.SET_GROUP, SetGroup(host=it.name, group=other), "")).status == 0
    standby.flows.did.clear()
    join = JoinGroup(group_id="0badbeef", epoch=2, proof="p1", standby_proof="p2")
    assert (await send(agent, standbywire.JOIN_GROUP, join)).status == 0
    await agent.clock.advance(1)
    assert [it[0] for it in standby.flows.did] == ["begin", "end"]


# --- the VLANs that carry heartbeats


def segments_of(agent: Agent) -> dict[int, str]:
    """The links that carry heartbeats, by the number of their segment."""
    return {number: wire.link for wire, number in agent.engine.wires[GROUP.group_id].items()}


def silent(agent: Agent, *segments: int) -> None:
    """Heartbeats do not arrive there, as the engine sees it."""
    view = agent.engine.groups[GROUP.group_id]
    agent.engine.groups[GROUP.group_id] = replace(view, silent=frozenset(segments))
    agent.standbys.changed(GROUP.group_id)


@simulated
async def test_both_hosts_choose_the_same_guest_and_public_segments_for_heartbeats(agent: Agent) -> None:
    standby = await grouped(agent)
    await agent.clock.advance(WIRES_EVERY_S + 1)
    segments = segments_of(agent)
    assert segments == segments_of(standby)
    assert sorted(segments.values()) == ["eth11204", "eth2101"]
    assert 0 not in segments


@simulated
async def test_neighbours_are_asked_while_a_segment_is_silent_and_not_otherwise(agent: Agent) -> None:
    await grouped(agent)
    await agent.clock.advance(WIRES_EVERY_S + 1)
    assert not agent.engine.answers
    (public,) = [number for number, link in segments_of(agent).items() if link == "eth2101"]
    silent(agent, public, 99)
    await agent.clock.settle()
    assert agent.engine.answers == [(public, True)], "at once"
    agent.host.answering = False
    await agent.clock.advance(ASK_EVERY_S + 0.01)
    assert agent.engine.answers == [(public, True), (public, False)]
    agent.host.answering = None
    await agent.clock.advance(2 * ASK_EVERY_S)
    assert agent.engine.answers[2:] == [(public, None)] * 2
    assert {it for it in agent.host.did if it.startswith("neighbours")} == {"neighbours of pub-101"}
    silent(agent)
    count = len(agent.engine.answers)
    await agent.clock.advance(5)
    assert len(agent.engine.answers) == count
    lines = [it.partition("; ")[2] for it in agent.log.lines if "no heartbeats of h2 on the VLAN" in it]
    assert lines == ["neighbours answer this host", "nobody answers this host", "there is nobody to ask"]


@simulated
async def test_a_question_that_fails_is_asked_again(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await grouped(agent)
    await agent.clock.advance(WIRES_EVERY_S + 1)
    public = min(segments_of(agent))

    def refuse(*_: object) -> None:
        raise HostRefused("no links today")

    with monkeypatch.context() as failing:
        failing.setattr(agent.host, "anybody_answers", refuse)
        silent(agent, public)
        await agent.clock.advance(1)
    assert agent.engine.answers == []
    await agent.clock.advance(1)
    assert (public, True) in agent.engine.answers


@simulated
@pytest.mark.mutation("a-lost-carrier-is-asked-about-at-once")
async def test_a_lost_carrier_of_such_a_segment_is_told_at_once(agent: Agent) -> None:
    await grouped(agent)
    await agent.clock.advance(WIRES_EVERY_S + 1)
    agent.standbys.uplink_changed("eth3", False)
    agent.standbys.uplink_changed("eth2101", True)
    assert agent.engine.suspected == []
    agent.standbys.uplink_changed("eth2101", False)
    assert [segments_of(agent)[it] for it in agent.engine.suspected] == ["eth2101"]


def test_segments_are_those_where_somebody_can_be_asked() -> None:
    def port(link: str, vlan: str) -> Port:
        segment = Segment(bridge=f"br{vlan}", nic="eth1", vlan=vlan, vlan_link=f"eth1.{vlan}")
        return Port(link=link, host_link=f"v{link}", mac="02:00:00:00:00:01", segment=segment)

    empty = Want(namespace="cs-net-1", ports=(port("gst-1", "1"), port("pub-9", "9")))
    vms = replace(
        empty,
        namespace="cs-net-2",
        ports=(port("gst-2", "2"),),
        neighbours=(Neighbour(link="gst-2", address="10.1.1.5", mac="02:00:00:00:00:02"),),
    )
    chosen = wire_questions.segments({"net-2": vms, "net-1": empty})
    assert [(it.scope_id, [port.link for port in it.want.ports]) for it in chosen] == [
        ("net-2", ["gst-2"]),
        ("net-1", ["pub-9"]),
    ]
    assert chosen == wire_questions.segments({"net-1": empty, "net-2": vms})
    moved = replace(vms, ports=(port("gst-2", "3"),))
    assert wire_questions.segments({"net-2": moved})[0].number != chosen[0].number
    assert wire_questions.segments({}) == []


@simulated
async def test_a_member_of_a_group_hides_heartbeats_from_its_vms(agent: Agent) -> None:
    """The witness has no scope of the group, and VMs on its bridges."""
    agent.start(agent.standbys.run())
    await agent.clock.advance(1)
    assert not agent.host.hides_heartbeats
    assert (await send(agent, standbywire.SET_GROUP, SetGroup(host="h3", group=GROUP), "")).status == 0
    await agent.clock.advance(1)
    assert agent.host.hides_heartbeats
    agent.engine.groups.clear()
    await agent.clock.advance(1)
    assert not agent.host.hides_heartbeats


# --- without a witness

PAIR = replace(GROUP, witness=None)


def asked_addresses(wants: dict[str, Want]) -> tuple[str, list[str]] | None:
    """The link on which the upstream is asked, and for which addresses."""
    segment = upstream.upstream(wants)
    if segment is None:
        return None
    (port,) = segment.want.ports
    return port.link, [it.via for it in segment.want.routes] + [it.address for it in segment.want.neighbours]


def test_the_upstream_is_a_public_gateway_else_one_of_guests_else_vms() -> None:
    def port(link: str, vlan: str) -> Port:
        segment = Segment(bridge=f"br{vlan}", nic="eth1", vlan=vlan, vlan_link=f"eth1.{vlan}")
        return Port(link=link, host_link=f"v{link}", mac="02:00:00:00:00:01", segment=segment)

    vm = Neighbour(link="gst-1", address="10.1.1.5", mac="02:00:00:00:00:02")
    six = Neighbour(link="gst-1", address="2001:db8::5", mac="02:00:00:00:00:02")
    public = Route(table=1, destination="0.0.0.0/0", link="pub-9", via="203.0.113.1")
    guests = Route(table=1, destination="0.0.0.0/0", link="gst-1", via="10.1.1.1")
    want = Want(namespace="cs-net-1", ports=(port("gst-1", "1"), port("pub-9", "9")), neighbours=(vm, six))
    assert asked_addresses({"net-1": replace(want, routes=(public,))}) == ("pub-9", ["203.0.113.1"])
    assert asked_addresses({"net-1": replace(want, routes=(guests, public))}) == ("pub-9", ["203.0.113.1"])
    assert asked_addresses({"net-1": replace(want, routes=(guests,))}) == ("gst-1", ["10.1.1.1"])
    assert asked_addresses({"net-1": want}) == ("gst-1", ["10.1.1.5"])
    assert asked_addresses({"net-1": replace(want, neighbours=(six,))}) is None
    assert asked_addresses({}) is None


@simulated
async def test_without_a_witness_the_upstream_is_asked_and_the_engine_hears_its_answers(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(agent.standbys._upstreams, "_start", started.append)
    await grouped(agent, PAIR)
    await agent.clock.advance(WIRES_EVERY_S + 1)
    assert len(started) == 1
    upstreams, engine = agent.standbys._upstreams, agent.engine
    assert upstreams.knows(PAIR.group_id)
    assert upstreams.ask(PAIR.group_id) == pytest.approx(upstream.ASK_EVERY_S)
    assert engine.votes == [engine.time]
    assert agent.host.did[-1] == "neighbours of pub-101"
    assert agent.host.open_neighbours == 1
    agent.host.answering = False
    assert upstreams.ask(PAIR.group_id) is not None
    with monkeypatch.context() as failing:

        def refuse(*_: object) -> None:
            raise HostRefused("no links today")

        failing.setattr(agent.host, "anybody_answers", refuse)
        for _ in range(3):
            assert upstreams.ask(PAIR.group_id) is not None
    assert len([it for it in agent.log.lines if "no links today" in it]) == 1
    assert engine.votes == [engine.time]
    segment = upstreams._segments[PAIR.group_id]
    upstreams.follow(PAIR.group_id, replace(segment, number=segment.number + 1))
    upstreams.ask(PAIR.group_id)
    assert agent.host.open_neighbours == 1
    upstreams.follow(PAIR.group_id, None)
    count = len(agent.host.did)
    assert upstreams.ask(PAIR.group_id) == upstream.ASK_EVERY_S and len(agent.host.did) == count
    assert agent.host.open_neighbours == 0
    upstreams.follow(PAIR.group_id, segment)
    upstreams.ask(PAIR.group_id)
    del engine.groups[PAIR.group_id]
    assert upstreams.ask(PAIR.group_id) is None
    assert not upstreams.knows(PAIR.group_id)
    upstreams._run(PAIR.group_id)
    assert agent.host.open_neighbours == 0


@simulated
async def test_without_a_witness_people_read_of_the_gateway(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.standbys._upstreams, "_start", lambda _: None)
    await grouped(agent, PAIR)
    slot = agent.scopes.slot(NET)
    assert slot.scope is not None
    lines = agent.scopes.describe_group(slot.scope)
    assert "no gateway answers this host" in lines[0]
    assert lines[1].endswith("h1 serves in term 0, h2 stands by, the gateway has the second vote")
    view = agent.engine.groups[PAIR.group_id]
    agent.engine.groups[PAIR.group_id] = replace(view, upstream_s=0.1)
    assert "gateway" not in agent.scopes.describe_group(slot.scope)[0]
    held = agent.scopes.placements.in_group(slot, placementwire.HeldScope(scope_id=NET))
    assert (held.standby, held.witness) == ("h2", placementwire.GATEWAY)


@simulated
@pytest.mark.mutation("a-standby-may-have-it", instead="True")
async def test_a_scope_leaves_a_standby_that_forgot_it_only_after_a_long_silence(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word of the management side that the standby does not have the scope may be some seconds old."""
    monkeypatch.setattr(agent.standbys._upstreams, "_start", lambda _: None)
    await grouped(agent, PAIR)
    agent.pairs.cut()
    agent.engine.promises = False
    leave = LeaveGroup(group_id=PAIR.group_id, is_forgotten=True)
    view = agent.engine.groups[PAIR.group_id]
    agent.engine.groups[PAIR.group_id] = replace(view, silent_s={"h2": FORGOTTEN_AFTER_S - 1})
    reply = await send(agent, standbywire.LEAVE_GROUP, leave)
    remedy = "repeat it when the standby answers; if h2 is off for good: netloom evacuate h2 --fenced"
    assert (reply.status, reply.hint) == (3, remedy)
    agent.engine.groups[PAIR.group_id] = replace(view, silent_s={"h2": FORGOTTEN_AFTER_S})
    reply = await send(agent, standbywire.LEAVE_GROUP, replace(leave, is_forgotten=False))
    assert reply.status != 0
    reply = await send(agent, standbywire.LEAVE_GROUP, leave)
    assert reply.status == 0 and agent.store.files[NET].placement.group == ""


# --- the other host is off, as an operator says


def not_heard(agent: Agent, seconds: float) -> str:
    """The agent has not heard the other host of the group for so long, and has no connection to it; its name."""
    view = agent.engine.groups[GROUP.group_id]
    partner = view.spec.names.partner(view.me)
    agent.pairs.cut()
    agent.engine.groups[GROUP.group_id] = replace(view, silent_s={partner: seconds})
    return partner


@pytest.mark.parametrize("group", [GROUP, PAIR], ids=["with a witness", "without"])
@pytest.mark.parametrize("name", ["h1", "h2"])
@simulated
async def test_a_host_whose_partner_is_off_serves_alone(
    agent: Agent, name: str, group: GroupSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was the active host or stood by, and without an answer of anybody."""
    standby = await grouped(agent, group)
    for each in (agent, standby):
        monkeypatch.setattr(each.standbys._upstreams, "_start", lambda _: None)
    it = agent if name == "h1" else standby
    it.engine.promises = False
    dead = not_heard(it, SILENT_S)
    epoch = it.scopes.slot(NET).epoch
    reply = await send(it, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id, fenced=dead))
    assert reply.status == 0, reply
    placement = it.store.files[NET].placement
    assert (placement.group, placement.gate) == ("", "open") and placement.epoch > epoch
    assert it.host.present[NET].lease == 0
    assert (await it.call("021", "assign-ip", vlan="1204", public_ip="203.0.113.99")).status == 0


@pytest.mark.mutation("a-host-that-was-heard-is-not-off")
@simulated
async def test_a_host_that_was_heard_a_moment_ago_is_not_off(agent: Agent) -> None:
    standby = await grouped(agent)
    dead = not_heard(standby, SILENT_S - 1)
    reply = await send(standby, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id, fenced=dead))
    assert reply.status == 3 and "was heard here" in reply.error
    assert standby.store.files[NET].placement.group == GROUP.group_id


@simulated
async def test_only_the_other_host_of_the_group_can_be_off(agent: Agent) -> None:
    await grouped(agent)
    not_heard(agent, SILENT_S)
    reply = await send(agent, standbywire.LEAVE_GROUP, LeaveGroup(group_id=GROUP.group_id, fenced="h3"))
    assert (reply.status, reply.error) == (3, "net-204 has no group with h3 on this host")


@pytest.mark.mutation("a-standby-asks-before-it-continues-alone")
@simulated
async def test_a_standby_asks_who_answers_unless_its_partner_is_fenced(agent: Agent) -> None:
    standby = await grouped(agent)
    dead = not_heard(standby, SILENT_S)
    rendered = standby.scopes.slot(NET).rendered
    assert rendered is not None
    standby.host.owners = {rendered[1].announce[0].ip: "02:00:00:00:00:01"}
    leave = LeaveGroup(group_id=GROUP.group_id, fenced=dead, asks_first=True)
    reply = await send(standby, standbywire.LEAVE_GROUP, leave)
    assert reply.status == 3 and "is not served here" in reply.error, reply
    assert standby.store.files[NET].placement.group == GROUP.group_id
    reply = await send(standby, standbywire.LEAVE_GROUP, replace(leave, asks_first=False))
    assert reply.status == 0, reply


# --- a move begins


@pytest.mark.mutation("a-scope-that-is-about-to-move-joins-no-group")
@simulated
async def test_a_scope_that_left_its_group_for_a_move_joins_none_for_a_minute(agent: Agent) -> None:
    """CloudStack's next call would give it a standby again, and the move could not close its gate."""
    await grouped(agent)
    leave = LeaveGroup(group_id=GROUP.group_id, moves=True)
    reply = await send(agent, standbywire.LEAVE_GROUP, leave)
    assert reply.status == 0 and reply.about_to_move
    join = JoinGroup(group_id=GROUP.group_id, epoch=reply.epoch + 1, proof="p1", standby_proof="p2")
    refused = await send(agent, standbywire.JOIN_GROUP, join)
    assert (refused.status, refused.error) == (3, "net-204 is about to move")
    await agent.clock.advance(MOVE_BEGINS_WITHIN_S)
    reply = await send(agent, standbywire.JOIN_GROUP, join)
    assert reply.status == 0 and not reply.about_to_move
