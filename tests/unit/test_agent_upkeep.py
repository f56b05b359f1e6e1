"""The work without a call: restore, repair, check, retry, tidy, announcements. Host and time are simulated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from fakehost import Agent, simulated
from netloom.agent.budget import Budget, Checks
from netloom.agent.scopes.upkeep import (
    ANNOUNCE_AFTER_S,
    CHECK_CPU_S,
    RAMP_S,
    RESTORING_AT_ONCE,
    RESTORING_BESIDE_CALLS,
    TIDY_EVERY_S,
)
from netloom.errors import HostRefused
from netloom.guestwire import PasswordTaken
from netloom.names import guest_link

NIC = "6b7c2a10-0000-4000-8000-000000005101"
REFUSED = HostRefused("no such bridge")


def converged(agent: Agent) -> list[str]:
    """The converges of the host, in order."""
    return [it for it in agent.did if it.startswith("converge ")]


# -------------------------------------------------------------------------------------------------------------- retry


@pytest.mark.mutation("a-failed-convergence-is-tried-again")
@simulated
async def test_a_failed_call_is_tried_again_with_growing_delays(agent: Agent) -> None:
    agent.host.fail("net-204", *[REFUSED] * 9)
    assert (await agent.call("020", "implement-network")).status == 3
    agent.forget()
    retries: list[float] = []
    for half_second in range(1, 1000):
        await agent.clock.advance(0.5)
        if len(agent.log.lines) > len(retries):
            retries.append(half_second / 2)
    assert retries == list(itertools.accumulate([1, 2, 4, 8, 16, 32, 60, 60, 60]))
    assert agent.log.lines[:2] == [
        "scope=net-204 retry 1 failed: no such bridge",
        "scope=net-204 retry 2 failed: no such bridge",
    ]
    assert agent.log.lines[-1] == "scope=net-204 retry 9: steps=3 ms=0.0"
    assert len(converged(agent)) == 9


@simulated
async def test_the_delays_start_again_after_a_success(agent: Agent) -> None:
    agent.host.fail("net-204", *[REFUSED] * 4)
    await agent.call("020", "implement-network")
    await agent.clock.advance(20)
    assert "net-204" in agent.host.present
    agent.host.fail("net-204", REFUSED)
    await agent.call("050", "assign-ip")
    agent.forget()
    await agent.clock.advance(1)
    assert agent.log.lines == ["scope=net-204 retry 1: steps=1 ms=0.0"]


@pytest.mark.mutation("a-success-cancels-the-retry")
@simulated
async def test_a_retry_is_cancelled_by_a_success(agent: Agent) -> None:
    agent.host.fail("net-204", REFUSED)
    await agent.call("020", "implement-network")
    await agent.clock.advance(0.5)
    assert (await agent.call("020", "implement-network")).status == 0
    agent.forget()
    await agent.clock.advance(100)
    assert agent.did == []
    (slot,) = agent.scopes.slots()
    assert slot.retry is None


@simulated
async def test_a_call_that_converges_nothing_does_not_cancel_the_retry(agent: Agent) -> None:
    agent.host.fail("net-204", REFUSED)
    await agent.call("020", "implement-network")
    assert (await agent.call("501", "custom-action", action="leases")).status == 0
    await agent.clock.advance(1)
    assert "net-204" in agent.host.present


@simulated
async def test_failures_before_the_retry_schedule_no_second_one(agent: Agent) -> None:
    agent.host.fail("net-204", *[REFUSED] * 3)
    for _ in range(3):
        await agent.call("020", "implement-network")
    agent.forget()
    await agent.clock.advance(100)
    assert converged(agent) == ["converge net-204 thoroughly"]


@simulated
async def test_a_call_that_failed_before_it_changed_the_host_is_not_tried_again(agent: Agent) -> None:
    await agent.live()
    assert (await agent.call("050", "assign-ip", public_vlan="nonsense")).status == 1
    await agent.clock.advance(100)
    assert agent.did == []


# ------------------------------------------------------------------------------------------------------ announcements


@simulated
async def test_a_new_address_is_announced_three_times(agent: Agent) -> None:
    await agent.live()
    started = agent.clock.time()
    await agent.call("050", "assign-ip")
    await agent.clock.advance(60)
    assert agent.host.arp == [(started + after_s, ["203.0.113.21"]) for after_s in ANNOUNCE_AFTER_S]
    assert ANNOUNCE_AFTER_S == (0.0, 0.7, 2.0)
    agent.forget()
    await agent.call("050", "assign-ip")
    await agent.clock.advance(60)
    assert agent.host.arp == []


@pytest.mark.mutation("only-held-addresses-are-announced")
@simulated
async def test_an_address_that_was_released_is_not_announced_any_more(agent: Agent) -> None:
    await agent.live()
    await agent.call("050", "assign-ip")
    await agent.call("057", "assign-ip", public_ip="203.0.113.22")
    await agent.clock.advance(0.5)
    await agent.call("060", "release-ip")
    await agent.clock.advance(5)
    later = [addresses for _, addresses in agent.host.arp[2:]]
    assert later == [[], ["203.0.113.22"], [], ["203.0.113.22"]]


@simulated
async def test_a_scope_that_has_ended_announces_nothing(agent: Agent) -> None:
    await agent.live()
    await agent.call("050", "assign-ip")
    await agent.clock.advance(0.5)
    await agent.call("131", "destroy-network")
    await agent.clock.advance(5)
    assert [addresses for _, addresses in agent.host.arp] == [["203.0.113.21"], [], []]


# ---------------------------------------------------------------------------------------------------------- passwords


async def with_password(agent: Agent) -> PasswordTaken:
    await agent.live()
    await agent.call("030", "prepare-nic")
    await agent.call("090", "save-password")
    agent.forget()
    return PasswordTaken(scope_id="net-204", network_id="204", nic=NIC, password_id="1")


def password(agent: Agent) -> str:
    secret = agent.store.files["net-204"].networks["204"].nics[NIC].password
    return secret.reveal() if secret is not None else ""


@simulated
async def test_a_password_that_was_taken_is_erased(agent: Agent) -> None:
    taken = await with_password(agent)
    assert password(agent)
    agent.upkeep.password_taken(taken)
    await agent.clock.settle()
    assert password(agent) == ""
    assert agent.did[:3] == ["save net-204", "watch net-204", "converge net-204"]
    assert agent.log.lines == ["scope=net-204 password taken: steps=0 ms=0.0"]
    agent.forget()
    agent.upkeep.password_taken(taken)
    await agent.clock.settle()
    assert agent.did == []


@pytest.mark.mutation("erasing-is-tried-again")
@simulated
async def test_a_password_is_erased_when_the_disk_has_space_again(agent: Agent) -> None:
    taken = await with_password(agent)
    agent.store.full = True
    agent.upkeep.password_taken(taken)
    await agent.clock.advance(0.5)
    assert agent.did == ["save net-204"]
    assert "No space left on device" in agent.log.lines[0]
    for delay_s in (1, 2, 4, 8, 16, 32, 60, 60):
        before = agent.did.count("save net-204")
        await agent.clock.advance(delay_s)
        assert agent.did.count("save net-204") == before + 1
    assert password(agent)
    agent.store.full = False
    await agent.clock.advance(60)
    assert password(agent) == ""
    agent.forget()
    await agent.clock.advance(200)
    assert agent.did == []


@dataclass
class Kept:
    """An acknowledgement that erases nothing."""

    network_id: str = "204"
    nic: str = NIC
    password_id: str = "1"


@pytest.mark.parametrize(
    "row", [Kept(password_id="2"), Kept(password_id=""), Kept(nic="other"), Kept(network_id="205")], ids=str
)
@simulated
async def test_a_password_that_was_not_acknowledged_stays(agent: Agent, row: Kept) -> None:
    await with_password(agent)
    taken = PasswordTaken(scope_id="net-204", network_id=row.network_id, nic=row.nic, password_id=row.password_id)
    agent.upkeep.password_taken(taken)
    await agent.clock.advance(100)
    assert password(agent)
    assert agent.did == []
    assert agent.log.lines == ["scope=net-204 password taken: steps=0 ms=0.0"]


@simulated
async def test_a_password_of_an_unknown_scope_is_ignored(agent: Agent) -> None:
    agent.upkeep.password_taken(PasswordTaken(scope_id="net-204", network_id="204", nic=NIC, password_id="1"))
    await agent.clock.advance(100)
    assert (agent.did, agent.scopes.slots()) == ([], [])


# ------------------------------------------------------------------------------------------------- repair and revival


@simulated
async def test_a_repair_returns_its_steps_and_is_silent_without_any(agent: Agent) -> None:
    await agent.live()
    assert await agent.upkeep.repair("net-204", "watch: pub-101") == 0
    assert agent.log.lines == []
    del agent.host.present["net-204"]
    assert await agent.upkeep.repair("net-204", "watch: pub-101") == 3
    assert agent.log.lines == ["scope=net-204 watch: pub-101: steps=3 ms=0.0"]


@simulated
async def test_a_failed_repair_is_tried_again(agent: Agent) -> None:
    await agent.live()
    del agent.host.present["net-204"]
    agent.host.fail("net-204", REFUSED)
    assert await agent.upkeep.repair("net-204", "watch: pub-101") is None
    await agent.clock.advance(1)
    assert agent.log.lines == [
        "scope=net-204 watch: pub-101 failed: no such bridge",
        "scope=net-204 retry 1: steps=3 ms=0.0",
    ]


@simulated
async def test_a_scope_that_ended_before_its_repair_stays_ended(agent: Agent) -> None:
    await agent.live()
    agent.workers.hold()
    end = agent.send("131", "destroy-network")
    await agent.clock.settle()
    repair = agent.start(agent.upkeep.repair("net-204", "watch: pub-101"))
    await agent.clock.settle()
    await agent.workers.release()
    assert (end.result().status, repair.result()) == (0, 0)
    assert (agent.host.present, agent.services.of, agent.watcher.watched) == ({}, {}, {})
    assert (agent.scopes.slots(), agent.store.files, agent.store.retired) == ([], {}, set())
    assert await agent.upkeep.repair("net-204", "watch: pub-101") == 0
    assert agent.scopes.slots() == []


@simulated
async def test_a_scope_that_ends_during_its_repair_is_removed_after_it(agent: Agent) -> None:
    await agent.live()
    del agent.host.present["net-204"]
    agent.workers.hold()
    repair = agent.start(agent.upkeep.repair("net-204", "watch: pub-101"))
    await agent.clock.settle()
    end = agent.send("131", "destroy-network")
    await agent.clock.settle()
    await agent.workers.release()
    assert (end.result().status, repair.result()) == (0, 3)
    assert (agent.host.present, agent.services.of, agent.scopes.slots()) == ({}, {}, [])


@simulated
async def test_a_process_that_died_is_started_again(agent: Agent) -> None:
    await agent.live()
    agent.services.of.clear()
    agent.upkeep.revive("net-204", "dns died")
    agent.upkeep.revive("net-999", "dns died")
    await agent.clock.settle()
    assert agent.services.of == {"net-204": "cs-net-204"}
    assert agent.log.lines == ["scope=net-204 dns died: steps=1 ms=0.0"]


@simulated
async def test_no_process_of_a_scope_that_is_being_removed_is_started_again(agent: Agent) -> None:
    await agent.live()
    agent.host.fail("net-204", REFUSED)
    await agent.call("131", "destroy-network")
    agent.forget()
    agent.upkeep.revive("net-204", "dns died")
    await agent.clock.settle()
    assert agent.did == []


@simulated
async def test_a_failed_repair_of_an_ended_scope_keeps_its_slot_until_the_retry(agent: Agent) -> None:
    """Otherwise a new slot of the same scope, with another lock, could be used at the same time."""
    await agent.live()
    agent.workers.hold()
    agent.send("131", "destroy-network")
    await agent.clock.settle()
    agent.start(agent.upkeep.repair("net-204", "watch: pub-101"))
    await agent.clock.settle()
    (slot,) = agent.scopes.slots()
    await agent.workers.step()
    agent.host.fail("net-204", REFUSED)
    await agent.workers.release()
    assert agent.scopes.slots() == [slot]
    await agent.clock.advance(1)
    assert agent.scopes.slots() == []


@pytest.mark.mutation("a-bug-in-upkeep-does-not-end-the-agent")
@simulated
async def test_a_bug_during_a_repair_becomes_lines_in_the_log_and_is_tried_again(agent: Agent) -> None:
    await agent.live()
    agent.host.fail("net-204", RuntimeError("FAKE-secret"))
    assert await agent.upkeep.repair("net-204", "watch: pub-101") is None
    assert agent.log.lines[0] == "scope=net-204 watch: pub-101 bug: RuntimeError"
    assert "FAKE-secret" not in "".join(agent.log.lines)
    await agent.clock.advance(1)
    assert agent.log.lines[-1] == "scope=net-204 retry 1: steps=0 ms=0.0"


# ------------------------------------------------------------------------------------------------------------ restore


@simulated
async def test_the_host_is_prepared_and_watched_before_calls(agent: Agent) -> None:
    await agent.live()
    agent.restart()
    agent.did.clear()
    await agent.upkeep.prepare()
    assert agent.did == ["prepare", "open"]


@pytest.mark.mutation("the-host-is-guarded-at-once")
@simulated
async def test_bridges_are_guarded_while_scopes_are_still_restored(agent: Agent) -> None:
    networks = [str(number) for number in range(300, 310 + RESTORING_AT_ONCE)]
    await agent.live(*networks)
    agent.restart()
    agent.did.clear()
    agent.host.fail("tidy", REFUSED)
    agent.workers.hold()
    agent.start(agent.upkeep.restore())
    await agent.clock.settle()
    await agent.workers.step()  # the look for VMs
    await agent.clock.advance(RAMP_S)
    for _ in range(RESTORING_AT_ONCE + 1):
        await agent.workers.step()
    assert "tidy" in agent.did
    assert "tidy failed: no such bridge" in agent.log.lines
    assert agent.upkeep.unrestored()
    await agent.workers.release()


@pytest.mark.mutation("a-restore-leaves-workers-for-calls", instead="999")
@simulated
async def test_a_restore_takes_the_scopes_in_order_and_leaves_workers_for_calls(agent: Agent) -> None:
    networks = [str(number) for number in range(300, 300 + RESTORING_AT_ONCE + 3)]
    await agent.live(*networks)
    agent.restart()
    assert agent.did == [f"claim net-{it}" for it in networks]
    agent.did.clear()
    agent.workers.hold()
    restoring = agent.start(agent.upkeep.restore())
    await agent.clock.settle()
    assert len(agent.workers.pending) == 1  # the look for VMs
    await agent.workers.step()
    assert len(agent.workers.pending) == RESTORING_BESIDE_CALLS
    await agent.clock.advance(RAMP_S)
    assert len(agent.workers.pending) == RESTORING_AT_ONCE
    await agent.workers.step()
    assert len(agent.workers.pending) == RESTORING_AT_ONCE
    assert agent.upkeep.unrestored() == [f"net-{it}" for it in networks[1:]]
    await agent.workers.release()
    assert converged(agent) == [f"converge net-{it}" for it in networks]
    assert agent.did[-1] == "tidy"
    assert restoring.done()
    assert agent.upkeep.unrestored() == []
    assert all("restore: steps=0 ms=" in line for line in agent.log.lines)


@pytest.mark.mutation("networks-with-vms-are-restored-first", instead="False")
@simulated
async def test_networks_with_vms_are_restored_first(agent: Agent) -> None:
    """First those with a VM in their bridge now, also if it is plugged in during the restore, then those with most VMs.

    The public bridge has VMs of others, which says nothing.
    """
    networks = [str(number) for number in range(300, 330 + RESTORING_AT_ONCE)]
    await agent.live(*networks)
    for network_id in (networks[-2], networks[-3]):
        for fixture, command in (("030", "prepare-nic"), ("032", "add-dhcp-entry")):
            assert (await agent.call(fixture, command, network_id=network_id)).status == 0
    bridges = {
        it: next(port.segment.bridge for port in agent.host.present[f"net-{it}"].ports if port.link == guest_link(it))
        for it in networks
    }
    agent.restart()
    agent.host.with_vms = {bridges[networks[-1]], "breth2-1204"}
    agent.workers.hold()
    agent.start(agent.upkeep.restore())
    await agent.clock.settle()
    await agent.workers.step()  # the look for VMs; then the workers take one scope each
    await agent.clock.advance(RAMP_S)
    for _ in range(2):
        await agent.workers.step()
    last, *with_vms = networks[-1], networks[-3], networks[-2]
    assert converged(agent) == [f"converge net-{last}", f"converge net-{with_vms[0]}"]
    untouched = agent.upkeep.unrestored()[-1]
    assert untouched == f"net-{networks[-4]}"
    agent.host.with_vms = {bridges[networks[-4]]}
    await agent.clock.advance(1)
    await agent.workers.step()  # the workers look again before they take the next scope
    await agent.workers.release()
    order = converged(agent)
    assert sorted(order) == [f"converge net-{it}" for it in networks]
    assert order.index(f"converge {untouched}") < order.index(f"converge net-{networks[-5]}")
    assert agent.upkeep.unrestored() == []


@simulated
async def test_a_call_restores_its_scope_at_once_and_alone(agent: Agent) -> None:
    networks = [str(number) for number in range(300, 310 + RESTORING_AT_ONCE)]
    await agent.live(*networks)
    agent.restart()
    agent.host.present.clear()
    agent.workers.hold()
    agent.start(agent.upkeep.restore())
    await agent.clock.settle()
    await agent.workers.step()
    await agent.clock.advance(RAMP_S)
    last = networks[-1]
    call = agent.send("020", "implement-network", network_id=last, vlan=str(1204 + len(networks) - 1))
    await agent.clock.settle()
    # Its work has a worker of its own: as many wait before it as are restored at once, not all the others.
    assert len(agent.workers.pending) == RESTORING_AT_ONCE + 1
    work = agent.workers.pending.pop()
    work()
    await agent.clock.settle()
    assert call.done()
    assert agent.host.present.keys() == {f"net-{last}"}
    assert f"net-{last}" not in agent.upkeep.unrestored()
    agent.did.clear()
    await agent.workers.release()
    assert f"converge net-{last}" not in agent.did
    assert len(agent.host.present) == len(networks)


@pytest.mark.mutation("a-restore-lets-calls-go-first")
@simulated
async def test_most_workers_of_a_restore_pause_while_a_call_runs(agent: Agent) -> None:
    networks = [str(number) for number in range(300, 310 + RESTORING_AT_ONCE)]
    await agent.live(*networks)
    agent.restart()
    agent.workers.hold()
    restoring = agent.start(agent.upkeep.restore())
    await agent.clock.settle()
    await agent.workers.step()
    call = agent.send("020", "implement-network", network_id=networks[-1], vlan=str(1204 + len(networks) - 1))
    await agent.clock.advance(RAMP_S)
    assert len(agent.workers.pending) == RESTORING_BESIDE_CALLS + 1
    work = agent.workers.pending.pop()
    work()
    await agent.clock.settle()
    assert call.done()
    assert len(agent.workers.pending) == RESTORING_AT_ONCE
    await agent.workers.release()
    assert restoring.done()
    assert agent.upkeep.unrestored() == []


@pytest.mark.mutation("a-bridge-without-a-nic-is-watched")
@simulated
async def test_a_scope_that_waits_for_a_nic_is_watched_and_named_with_the_reason(agent: Agent) -> None:
    await agent.live("300", "301")
    agent.restart()
    reason = "bridge cloudbr1 has no NIC"
    agent.host.unplaced["net-300"] = reason
    await agent.upkeep.restore()
    assert agent.upkeep.missing() == [f"net-300 ({reason})"]
    assert "net-300" in agent.watcher.watched
    del agent.host.unplaced["net-300"]
    assert await agent.upkeep.repair("net-300", "watch: eth1") is not None
    assert agent.upkeep.missing() == []


@simulated
async def test_a_scope_that_cannot_be_restored_keeps_no_other_back(agent: Agent) -> None:
    await agent.live("204", "205", "206")
    agent.restart()
    agent.host.present.clear()
    agent.watcher.error = HostRefused("no netlink")
    agent.host.fail("net-204", REFUSED)
    agent.host.fail("net-205", RuntimeError("bug"))
    await agent.upkeep.prepare()
    await agent.upkeep.restore()
    assert agent.log.lines[0] == "the host cannot be watched: no netlink"
    assert agent.host.present.keys() == {"net-206"}
    assert agent.upkeep.unrestored() == ["net-204", "net-205"]
    await agent.clock.advance(1)
    assert agent.host.present.keys() == {"net-204", "net-205", "net-206"}
    assert agent.upkeep.unrestored() == []


@pytest.mark.mutation("a-host-that-could-not-be-watched-is-watched-later")
@simulated
async def test_a_host_that_could_not_be_watched_is_watched_later(agent: Agent) -> None:
    agent.watcher.error = HostRefused("Too many open files")
    await agent.upkeep.prepare()
    agent.start(agent.upkeep.keep_tidy(tidies()))
    agent.watcher.error = None
    agent.did.clear()
    await agent.clock.advance(2 * TIDY_EVERY_S + 1)
    assert agent.did.count("open") == 1


# -------------------------------------------------------------------------------------------------------------- check


def dear(every_s: float, cpu_s: float) -> Checks:
    """Checks on a budget of a thousandth of a CPU. They have this cost: no CPU time passes in a simulated one."""
    made = Budget(share=0.001).checks(every_s, cpu_s)
    made.used = lambda cpu_s: None  # type: ignore[method-assign]
    return made


def tidies() -> Checks:
    return checks(TIDY_EVERY_S)


def checks(every_s: float) -> Checks:
    """On a budget that suffices on any machine."""
    return Budget(share=1000.0).checks(every_s, CHECK_CPU_S)


@pytest.mark.mutation("each-scope-is-checked-in-turn", instead="existing[0]")
@simulated
async def test_each_scope_is_checked_once_in_a_period_and_evenly(agent: Agent) -> None:
    await agent.live("204", "205", "206")
    agent.start(agent.upkeep.keep_checked(checks(45.0)))
    for network_id in ("204", "205", "206", "204"):
        agent.did.clear()
        await agent.clock.advance(14.9)
        assert agent.did == []
        await agent.clock.advance(0.1)
        assert converged(agent) == [f"converge net-{network_id} thoroughly"]
    assert agent.log.lines == []
    del agent.host.present["net-205"]
    await agent.clock.advance(15)
    assert agent.log.lines == ["scope=net-205 check: steps=3 ms=0.0"]


@simulated
async def test_dear_checks_become_rarer_and_a_fault_is_noticed_in_the_time_that_follows(agent: Agent) -> None:
    await agent.live("204", "205")
    # Two checks of 0.1 s in ten seconds are 2% of a CPU, and the budget is 0.1%: ten seconds become 200.
    agent.start(agent.upkeep.keep_checked(dear(10.0, cpu_s=0.1)))
    for _ in range(3):
        for network_id in ("204", "205"):
            agent.did.clear()
            await agent.clock.advance(99.9)
            assert agent.did == []
            await agent.clock.advance(0.1)
            assert converged(agent) == [f"converge net-{network_id} thoroughly"]


@simulated
async def test_the_transactions_of_each_scope_are_counted_in_turn_and_changes_are_repaired(agent: Agent) -> None:
    networks = [str(204 + at) for at in range(50)]
    await agent.live(*networks)
    agent.start(agent.upkeep.keep_counted(checks(5.0)))
    agent.host.changed = {"net-230"}
    await agent.clock.advance(1.9)
    assert agent.host.counted == []
    for _ in range(31):
        await agent.clock.advance(0.1)
    assert [len(it) for it in agent.host.counted] == [20, 20]
    assert converged(agent) == ["converge net-230"]
    await agent.clock.advance(2)
    assert sorted(it for some in agent.host.counted for it in some) == sorted(f"net-{it}" for it in networks)
    assert len(agent.host.counted[2]) == 10


@simulated
async def test_one_scope_is_counted_at_the_shortest_interval_and_an_error_does_not_end_it(agent: Agent) -> None:
    await agent.live()
    agent.start(agent.upkeep.keep_counted(checks(5.0)))
    agent.host.fail("count", ZeroDivisionError())
    await agent.clock.advance(5)
    assert any("ZeroDivisionError" in it for it in agent.log.lines)
    agent.host.changed = {"net-204"}
    await agent.clock.advance(5)
    assert agent.host.counted == [["net-204"], ["net-204"]]
    assert converged(agent) == ["converge net-204"]


@simulated
async def test_a_new_scope_does_not_wait_for_a_turn_of_all_others(agent: Agent) -> None:
    await agent.live("204", "205")
    agent.start(agent.upkeep.keep_checked(checks(40.0)))
    await agent.clock.advance(25)
    await agent.live("206")
    agent.did.clear()
    await agent.clock.advance(16)
    assert converged(agent) == ["converge net-206 thoroughly"]


@simulated
async def test_the_check_waits_for_the_first_scope(agent: Agent) -> None:
    agent.start(agent.upkeep.keep_checked(checks(45.0)))
    await agent.clock.advance(44)
    await agent.live()
    await agent.clock.advance(45)
    assert converged(agent) == ["converge net-204 thoroughly"]


@simulated
async def test_a_scope_that_waits_for_its_retry_or_has_ended_is_not_checked(agent: Agent) -> None:
    await agent.live("204", "205")
    agent.start(agent.upkeep.keep_checked(checks(2.0)))
    await agent.clock.advance(0.5)
    agent.host.fail("net-204", REFUSED)
    await agent.call("050", "assign-ip")
    await agent.call("131", "destroy-network", network_id="205")
    agent.did.clear()
    await agent.clock.advance(0.9)  # the check of 204 is due after half a second, its retry after one
    assert agent.did == []
    await agent.clock.advance(0.1)
    assert converged(agent) == ["converge net-204 thoroughly"]
    await agent.clock.advance(0.9)
    assert converged(agent) == ["converge net-204 thoroughly"]


@simulated
async def test_a_bug_does_not_end_the_checks(agent: Agent) -> None:
    await agent.live()
    agent.start(agent.upkeep.keep_checked(checks(10.0)))
    agent.host.fail("net-204", RuntimeError("bug"))
    await agent.clock.advance(10)
    assert agent.log.lines[0] == "scope=net-204 check bug: RuntimeError"
    agent.forget()
    await agent.clock.advance(10)
    assert converged(agent) == ["converge net-204 thoroughly", "converge net-204 thoroughly"]


# --------------------------------------------------------------------------------------------------------------- tidy


@simulated
async def test_the_host_is_tidied_periodically_and_soon_after_links_have_gone(agent: Agent) -> None:
    agent.start(agent.upkeep.keep_tidy(tidies()))
    await agent.clock.advance(29.9)
    assert agent.did == []
    await agent.clock.advance(0.1)
    assert agent.did == ["tidy"]
    agent.upkeep.tidy_soon()
    await agent.clock.advance(0.2)
    agent.upkeep.tidy_soon()  # joins the first
    assert agent.did == ["tidy"]
    agent.host.unused = ["vnetg204"]
    await agent.clock.advance(0.1)
    assert agent.did == ["tidy", "tidy"]
    assert agent.log.lines == ["tidy: remove stray link vnetg204"]
    await agent.clock.advance(29)
    assert agent.did == ["tidy", "tidy"]


@pytest.mark.mutation("a-failed-tidy-is-tried-again-soon", instead="(await self._tidy(), wanted)[1]")
@simulated
async def test_a_tidy_of_a_large_host_is_rare_while_nothing_changes(agent: Agent) -> None:
    await agent.live("204")
    agent.start(agent.upkeep.keep_tidy(dear(TIDY_EVERY_S, cpu_s=0.3)))  # so it is due once in 300 s
    await agent.clock.advance(35)
    agent.did.clear()
    await agent.clock.advance(240)
    assert "tidy" not in agent.did
    await agent.clock.advance(60)
    assert agent.did.count("tidy") == 1
    assert (await agent.call("020", "implement-network", network_id="205", vlan="1205")).status == 0
    await agent.clock.advance(31)
    assert agent.did.count("tidy") == 2  # of a host with new links
    agent.host.fail("tidy", HostRefused("busy"))
    agent.upkeep.tidy_soon()
    await agent.clock.advance(1)
    assert agent.log.lines[-1] == "tidy failed: busy"
    await agent.clock.advance(31)
    assert agent.did.count("tidy") == 4


@simulated
async def test_frames_are_let_through_another_firewall_and_an_error_is_logged(agent: Agent) -> None:
    agent.host.blocking_changes = ("accept the frames of breth1-1204 in table ip filter",)
    agent.upkeep.firewall_changed()
    await agent.clock.settle()
    agent.host.fail("let through", HostRefused("not permitted"))
    agent.upkeep.firewall_changed()
    await agent.clock.settle()
    assert agent.log.lines == [
        "host firewall: accept the frames of breth1-1204 in table ip filter",
        "host firewall: not permitted",
    ]


@simulated
async def test_a_failed_tidy_is_logged_and_the_next_one_comes(agent: Agent) -> None:
    agent.start(agent.upkeep.keep_tidy(tidies()))
    agent.host.fail("tidy", HostRefused("busy"))
    await agent.clock.advance(60)
    assert agent.log.lines == ["tidy failed: busy"]
    assert agent.did == ["tidy", "tidy"]


@simulated
async def test_a_bug_in_tidy_has_its_traceback_in_the_log_and_the_next_one_comes(agent: Agent) -> None:
    agent.start(agent.upkeep.keep_tidy(tidies()))
    agent.host.fail("tidy", RuntimeError("a bug"))
    await agent.clock.advance(60)
    assert agent.did == ["tidy", "tidy"]
    assert agent.log.lines[0] == "tidy bug: RuntimeError"


@dataclass
class Leftover:
    """A scope that has services but no state, and whether they go on."""

    scope_id: str
    namespace_has_its_name: bool
    stays: bool


@pytest.mark.parametrize(
    "row",
    [
        Leftover("net-9", namespace_has_its_name=False, stays=False),
        Leftover("net-9", namespace_has_its_name=True, stays=True),  # the state may have been lost
        Leftover("selftest", namespace_has_its_name=False, stays=True),  # no scope
    ],
    ids=str,
)
@simulated
async def test_services_without_a_state_end_when_their_namespace_has_no_name(agent: Agent, row: Leftover) -> None:
    await agent.live()
    agent.services.of[row.scope_id] = f"cs-{row.scope_id}"
    if row.namespace_has_its_name:
        agent.host.named.add(f"cs-{row.scope_id}")
    agent.start(agent.upkeep.keep_tidy(tidies()))
    await agent.clock.advance(30)
    assert (row.scope_id in agent.services.of) == row.stays
    assert "net-204" in agent.services.of
    assert [slot.scope_id for slot in agent.scopes.slots()] == ["net-204"]
    assert agent.log.lines == ([] if row.stays else [f"scope={row.scope_id} in no file: steps=1 ms=0.0"])


@simulated
async def test_services_of_a_scope_with_an_unreadable_state_go_on(agent: Agent) -> None:
    agent.store.unreadable.add("net-204")
    agent.services.of["net-204"] = "cs-net-204"
    agent.restart()
    agent.start(agent.upkeep.keep_tidy(tidies()))
    await agent.clock.advance(30)
    assert "net-204" in agent.services.of


# --------------------------------------------------------------------------------------------------------------- stop


@simulated
async def test_no_timer_fires_after_the_stop(agent: Agent) -> None:
    await agent.live("204", "205")
    agent.host.fail("net-205", REFUSED)
    await agent.call("050", "assign-ip")
    await agent.call("050", "assign-ip", network_id="205")
    await agent.upkeep.stop(5.0)
    agent.forget()
    await agent.clock.advance(100)
    assert (agent.did, agent.host.arp) == ([], [])


@simulated
async def test_the_stop_waits_for_running_work(agent: Agent) -> None:
    await agent.live()
    agent.services.of.clear()
    agent.workers.hold()
    agent.upkeep.revive("net-204", "dns died")
    await agent.clock.settle()
    stopping = agent.start(agent.upkeep.stop(5.0))
    await agent.clock.settle()
    assert not stopping.done()
    await agent.workers.release()
    assert stopping.done()
    assert "net-204" in agent.services.of
