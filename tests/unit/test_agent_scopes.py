"""Calls of scopes: their order, their errors, and what they do to the host. On a simulated host, in simulated time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from fakehost import Agent, simulated
from netloom.agent.actions.hooks import Hook, Hooks
from netloom.agent.scopes.events import Events
from netloom.commands import table
from netloom.errors import HostRefused
from netloom.wire import Reply


@simulated
async def test_a_call_is_saved_applied_and_answered(agent: Agent) -> None:
    reply = await agent.call("020", "implement-network")
    assert reply == Reply(call_id="c1", status=0, holds=True, revision=1, gate="open")
    assert agent.did == [
        "save net-204",
        "watch net-204",
        "converge net-204",
        "watch net-204",
        "flows None 1",
        "services net-204",
    ]
    assert agent.log.lines == ["call=c1 command=implement-network scope=net-204 steps=3 ms=0.0 status=0"]
    assert agent.watcher.done == ["net-204"]


@simulated
async def test_a_repeated_call_saves_nothing_and_takes_no_steps(agent: Agent) -> None:
    await agent.live()
    assert (await agent.call("021", "assign-ip")).revision == 2
    assert agent.did == ["watch net-204", "converge net-204", "watch net-204", "services net-204"]
    assert "steps=0" in agent.log.lines[0]
    assert agent.store.loads == 1


@simulated
async def test_open_flows_are_checked_when_the_state_has_changed(agent: Agent) -> None:
    await agent.live()
    await agent.call("050", "assign-ip")
    await agent.call("050", "assign-ip")
    assert [it for it in agent.did if it.startswith("flows")] == ["flows 2 3"]


@simulated
async def test_each_check_of_the_flows_knows_what_the_last_one_left(agent: Agent) -> None:
    await agent.live()
    for port, left in (("2001", False), ("2002", False), ("2003", True), ("2004", False)):
        agent.host.revoked = left
        await agent.call("053", "add-port-forward", public_port=port)
    assert agent.host.told_revoked[-4:] == [True, False, False, True]


# ------------------------------------------------------------------------------------------------------------- order


@simulated
async def test_calls_that_wait_for_one_scope_are_applied_in_their_order_and_converged_once(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    calls = [agent.send("053", "add-port-forward", public_port=str(port)) for port in (2001, 2002, 2003)]
    await agent.clock.settle()
    for done in (1, 3):
        assert len(agent.workers.pending) == 1
        await agent.workers.step()
        assert [call.done() for call in calls] == [number < done for number in range(3)]
    assert [call.result().revision for call in calls] == [3, 4, 5]
    assert [it for it in agent.did if it.startswith(("save", "converge"))] == ["save net-204", "converge net-204"] * 2


@simulated
async def test_a_refused_call_stops_none_of_those_that_wait_with_it(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    first = agent.send("050", "assign-ip")
    await agent.clock.settle()
    calls = [agent.send("053", "add-port-forward", public_port=port) for port in ("2001", "no port", "2003")]
    await agent.workers.release()
    assert first.result().status == 0
    assert [call.result().status for call in calls] == [0, 1, 0]
    assert [call.result().revision for call in calls] == [4, 0, 5]
    forwards = agent.store.files["net-204"].port_forwards.values()
    assert sorted(it.public_ports.first for it in forwards) == [2001, 2003]


@simulated
async def test_a_call_that_is_refused_after_a_new_network_does_not_keep_it_from_being_announced(agent: Agent) -> None:
    agent.workers.hold()
    first = agent.send("131", "destroy-network")
    await agent.clock.settle()
    calls = [agent.send("020", "implement-network"), agent.send("053", "add-port-forward", public_port="no port")]
    await agent.workers.release()
    assert first.result().status == 0
    assert [call.result().status for call in calls] == [0, 1]
    await agent.clock.advance(1)
    assert [addresses for _, addresses in agent.host.arp][:1] == [["10.10.1.1"]]


@simulated
async def test_all_calls_that_wait_together_fail_when_the_state_cannot_be_saved(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    first = agent.send("050", "assign-ip")
    await agent.clock.settle()
    calls = [agent.send("053", "add-port-forward", public_port=port) for port in ("2001", "2002")]
    await agent.clock.settle()
    await agent.workers.step()
    assert first.done()
    agent.store.full = True
    await agent.workers.release()
    assert [call.result().status for call in calls] == [3, 3]
    assert not agent.store.files["net-204"].port_forwards


@simulated
async def test_an_end_in_the_middle_is_carried_out_between_the_others(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    first = agent.send("050", "assign-ip")
    await agent.clock.settle()
    calls = [
        agent.send("053", "add-port-forward"),
        agent.send("131", "destroy-network"),
        agent.send("020", "implement-network"),
    ]
    await agent.workers.release()
    assert first.result().status == 0
    assert [call.result().status for call in calls] == [0, 0, 0]
    assert [call.result().holds for call in calls] == [True, False, True]
    assert [it for it in agent.did if it.startswith(("save", "retire", "forget"))][-4:] == [
        "save net-204",
        "retire net-204",
        "forget net-204",
        "save net-204",
    ]
    assert not agent.store.files["net-204"].port_forwards


@simulated
async def test_calls_of_different_scopes_run_at_the_same_time(agent: Agent) -> None:
    await agent.live("204", "205", "206")
    agent.workers.hold()
    calls = [agent.send("050", "assign-ip", network_id=network_id) for network_id in ("204", "205", "206")]
    await agent.clock.settle()
    assert len(agent.workers.pending) == 3
    assert all(map(agent.scopes.busy, ("net-204", "net-205", "net-206")))
    await agent.workers.release()
    assert [call.result().status for call in calls] == [0, 0, 0]
    assert not agent.scopes.busy("net-204")


@pytest.mark.parametrize("busy_with", ["assign-ip", "watch: pub-101"])
@simulated
async def test_a_call_that_waits_too_long_is_refused_and_names_the_work_in_its_way(
    agent: Agent, busy_with: str
) -> None:
    await agent.live()
    agent.workers.hold()
    if busy_with == "assign-ip":
        agent.send("050", "assign-ip")
    else:
        agent.start(agent.upkeep.repair("net-204", busy_with))
    await agent.clock.settle()
    late = agent.send("053", "add-port-forward", remaining_ms=1000)
    patient = agent.send("057", "assign-ip", remaining_ms=5000)
    await agent.clock.advance(0.9)
    assert not late.done()
    await agent.clock.advance(0.2)
    assert late.result() == Reply(
        call_id=late.result().call_id,
        status=3,
        error=f"net-204 is busy with {busy_with}, for longer than this call had time",
        hint="CloudStack may repeat it",
        holds=True,
        gate="open",
    )
    # The refused call is never executed; the others are.
    await agent.workers.release()
    assert patient.result().status == 0
    assert agent.store.files["net-204"].port_forwards == {}
    assert not agent.scopes.busy("net-204")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.mutation("state-is-saved-first")
@simulated
async def test_nothing_happens_when_the_state_cannot_be_saved(agent: Agent) -> None:
    await agent.live()
    agent.store.full = True
    reply = await agent.call("050", "assign-ip")
    assert (reply.status, reply.holds) == (3, True)
    assert reply.error.endswith("No space left on device")
    assert agent.did == ["save net-204"]
    agent.store.full = False
    # The state in memory is the old one as well, and there is nothing to try again.
    await agent.clock.advance(100)
    assert agent.did == ["save net-204"]
    assert (await agent.call("050", "assign-ip")).revision == 3


@pytest.mark.mutation("a-state-that-may-not-last-is-read-again", instead="slot.state_read")
@simulated
async def test_a_state_that_may_not_last_fails_calls_until_it_does(agent: Agent) -> None:
    """The file has the new state, and the kernel has made the disk read-only."""
    await agent.live()
    agent.store.unflushed = True
    for _ in range(2):  # the repeat would change nothing more, and is no success either
        reply = await agent.call("050", "assign-ip")
        assert (reply.status, reply.holds) == (3, True)
    assert agent.did == ["save net-204"]
    agent.store.unflushed = False
    agent.did.clear()
    reply = await agent.call("050", "assign-ip")
    assert (reply.status, reply.revision) == (0, 3)
    assert "save net-204" not in agent.did
    assert agent.did != []  # the host follows the state


@simulated
async def test_a_removal_that_may_not_last_fails_and_its_repeat_completes_it(agent: Agent) -> None:
    await agent.live()
    agent.store.unflushed = True
    assert (await agent.call("131", "destroy-network")).status == 3
    assert agent.did == ["retire net-204"]
    agent.store.unflushed = False
    assert (await agent.call("131", "destroy-network")).status == 0
    assert agent.did[-1] == "forget net-204"
    assert agent.scopes.slots() == []


@simulated
async def test_a_bad_payload_changes_nothing(agent: Agent) -> None:
    reply = await agent.call("020", "implement-network", cidr="nonsense")
    assert reply.status == 1
    assert (agent.did, agent.scopes.slots()) == ([], [])


@pytest.mark.mutation("a-bug-in-a-call-becomes-its-reply")
@simulated
async def test_a_bug_becomes_one_line_for_the_caller_and_the_next_call_works(agent: Agent) -> None:
    agent.host.fail("net-204", RuntimeError("FAKE-secret"))
    reply = await agent.call("020", "implement-network")
    assert (reply.status, reply.error) == (3, "the agent failed: RuntimeError in implement-network")
    assert agent.log.lines[0] == "call=c1 bug: RuntimeError"
    assert agent.log.lines[-1].endswith("status=3 error=the agent failed: RuntimeError in implement-network")
    assert "FAKE-secret" not in "".join(agent.log.lines)
    assert agent.watcher.done == ["net-204"]
    assert (await agent.call("020", "implement-network")).status == 0


@simulated
async def test_an_unreadable_state_is_tried_again_with_every_call(agent: Agent) -> None:
    await agent.live("204", "205")
    agent.store.unreadable.add("net-204")
    agent.restart()
    assert agent.log.lines == ["scope=net-204 load failed: state file net-204.json cannot be read"]
    assert agent.did == ["claim net-205"]
    reply = await agent.call("050", "assign-ip")
    assert (reply.status, reply.holds) == (3, True)
    assert (await agent.call("050", "assign-ip", network_id="205")).status == 0
    agent.store.unreadable.clear()
    assert (await agent.call("050", "assign-ip")).revision == 3


@simulated
async def test_a_scope_whose_unreadable_file_was_removed_is_unknown(agent: Agent) -> None:
    agent.store.unreadable.add("net-204")
    agent.restart()
    assert (await agent.call("020", "locate")).holds
    agent.store.unreadable.clear()
    assert not (await agent.call("056", "delete-port-forward")).holds
    assert agent.scopes.slots() == []


# ------------------------------------------------------------------------------------------------------------- slots


@dataclass
class Gone:
    """Calls after which the agent has no slot. ``network``: there is one before."""

    fixture: str
    command: str
    network: bool = False


@pytest.mark.parametrize(
    "row",
    [
        Gone("056", "delete-port-forward"),
        Gone("131", "destroy-network"),
        Gone("131", "destroy-network", network=True),
        Gone("501", "custom-action"),
    ],
    ids=str,
)
@simulated
async def test_a_slot_without_information_is_dropped(agent: Agent, row: Gone) -> None:
    if row.network:
        await agent.live()
    await agent.call(row.fixture, row.command)
    assert agent.scopes.slots() == []
    assert (agent.store.files, agent.store.retired, agent.host.present, agent.services.of) == ({}, set(), {}, {})


@simulated
async def test_a_slot_that_a_call_waits_for_is_not_dropped(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    agent.send("131", "destroy-network")
    again = agent.send("020", "implement-network")
    await agent.clock.settle()
    (slot,) = agent.scopes.slots()
    await agent.workers.step()
    assert agent.scopes.slots() == [slot]
    await agent.workers.release()
    assert again.result().status == 0
    assert agent.scopes.slots() == [slot]


@simulated
async def test_nothing_is_rendered_before_a_scope_is_needed(agent: Agent) -> None:
    """Then the host is told which ruleset it has, that of the state at the start, before a call has changed it."""
    await agent.live("204", "205")
    before = agent.host.present["net-204"].ruleset
    agent.restart()
    assert [it.rendered for it in agent.scopes.slots()] == [None, None]
    agent.host.known.clear()
    assert (await agent.call("053", "add-port-forward", public_port="2001")).status == 0
    assert agent.host.known == [before]
    assert agent.host.present["net-204"].ruleset != before


@simulated
async def test_the_end_of_a_scope_is_remembered_until_nothing_of_it_is_left(agent: Agent) -> None:
    await agent.live()
    agent.host.fail("net-204", HostRefused("a link is busy"), HostRefused("a link is busy"))
    reply = await agent.call("131", "destroy-network")
    assert (reply.status, reply.holds) == (3, False)
    assert agent.store.retired == {"net-204"}
    agent.restart()
    await agent.upkeep.restore()
    assert agent.log.lines == ["scope=net-204 restore failed: a link is busy"]
    await agent.clock.advance(1)
    assert (agent.store.retired, agent.host.present, agent.scopes.slots()) == (set(), {}, [])


@simulated
async def test_only_an_end_command_removes_what_a_lost_state_left_behind(agent: Agent) -> None:
    await agent.live()
    agent.store.files.clear()
    agent.restart()
    await agent.call("056", "delete-port-forward")
    assert "net-204" in agent.host.present
    await agent.call("131", "destroy-network")
    assert agent.host.present == {}


@simulated
async def test_locate_takes_no_turn(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    agent.send("050", "assign-ip")
    await agent.clock.settle()
    assert await agent.call("020", "locate") == Reply(call_id="c4", holds=True, revision=2, gate="open")


# ----------------------------------------------------------------------------------------------------- custom actions


@pytest.mark.parametrize(
    ("fixture", "command", "changes"),
    [
        ("050", "assign-ip", {}),
        ("501", "custom-action", {"action": "leases"}),
        ("500", "custom-action", {"action": "pbr-create-table", "action-params": {"table": "one"}}),
    ],
)
@simulated
async def test_a_payload_is_decoded_once(
    agent: Agent, fixture: str, command: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await agent.live()
    decoded: list[str] = []
    decode = table.decode

    def counted(command: str, payload: bytes) -> msgspec.Struct:
        decoded.append(command)
        return decode(command, payload)

    monkeypatch.setattr(table, "decode", counted)
    reply = await agent.call(fixture, command, **changes)
    assert (reply.status, reply.error) == (0, "")
    assert decoded == [command]


@simulated
async def test_a_hook_runs_without_the_lock(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await agent.live()
    may_end = threading.Event()
    monkeypatch.setattr(Hooks, "names", lambda hooks: ["wait"])
    monkeypatch.setattr(Hooks, "path", lambda hooks, action: "/hook")
    monkeypatch.setattr(Hook, "run", lambda hook, ends: f"ended {may_end.wait(60)}")
    with_hook = agent.send("501", "custom-action", action="wait")
    await agent.clock.settle()
    other = agent.send("050", "assign-ip")
    await agent.clock.settle()
    finished = (with_hook.done(), other.done())
    may_end.set()
    assert (await with_hook).output == "ended True"
    assert finished == (False, True)


def test_an_event_before_there_is_a_handler_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="an event before connect"):
        Events().tidy_soon()


@pytest.mark.mutation("a-missing-helper-is-named")
@simulated
async def test_a_helper_that_the_kernel_lacks_is_left_out_and_named(agent: Agent) -> None:
    await agent.live()
    agent.host.without_helpers = frozenset({"pptp"})
    agent.registration = msgspec.structs.replace(agent.registration, conntrack_helpers=("ftp", "pptp"))
    for call, command in (("021", "assign-ip"), ("060", "release-ip")):
        assert (await agent.call(call, command, public_ip="203.0.113.20")).status == 0
        want = agent.host.present["net-204"]
        assert want.ruleset is not None and [it.type for it in want.ruleset.helpers] == ["ftp"]
    reason = "conntrack.helpers: the kernel of this host has no helper for pptp (modprobe -a nf_conntrack_pptp"
    named = f"not in force: {reason} nf_nat_pptp)"
    assert named in (await agent.call("501", "custom-action", action="check")).output
    assert len([it for it in agent.log.lines if named in it]) == 1
    agent.host.without_helpers = frozenset()
    assert "pptp" not in (await agent.call("501", "custom-action", action="check")).output
