"""A host that is cut off, was declared dead, and lives: it stops within seconds after it can hear the others again.

Three simulated hosts with real agents, operators' commands and signatures. h1 is cut off: it hears nobody, and nobody
hears it. It is evacuated with --fenced, which is a lie, and then it is healed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakehosts import CREDENTIALS, Hosts, in_virtual_time
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.scopes.claims import EVERY_S
from netloom.claimwire import EvacuationClaim, payloads, signatures_in
from netloom.errors import HostRefused
from netloom.extension.moves.archive import Archived
from netloom.extension.moves.backup import put_back, read_states
from netloom.extension.moves.drain import undrain
from netloom.extension.moves.evacuate import place_copies, plan_evacuation, set_evacuated
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.moves.move import Moved
from netloom.placementwire import SET_DRAINED, SetDrained

NET = "net-204"
ADDRESS = "203.0.113.20"
OWNER = "test"
OTHERS = ("h2", "h3")
SOON_S = 2 * EVERY_S  # after the healing


async def living(hosts: Hosts) -> list[Archived]:
    """A network on h1, whose agent knows the keys; its state in an archive."""
    hosts.with_claims()
    await hosts["h1"].live()
    operator = hosts.operator()
    for name in hosts.agents:  # any command brings the keys
        await operator.agents.tell(name, SET_DRAINED, SetDrained(drained=False), owner=OWNER)
    archived, errors = await read_states(operator, await take_inventory(operator.agents), [])
    assert not errors
    operator.agents.close()
    return archived


def cut_off(hosts: Hosts, *names: str) -> None:
    hosts.dead |= set(names)
    hosts.blind |= set(names)


def heal(hosts: Hosts) -> None:
    hosts.dead.clear()
    hosts.blind.clear()


async def evacuate(hosts: Hosts, dead: str, archived: Iterable[Archived], to: tuple[str, ...] = OTHERS) -> None:
    """``netloom evacuate --fenced``."""
    operator = hosts.operator(*to)
    inventory = await take_inventory(operator.agents)
    plan = plan_evacuation(dead, inventory, list(archived), OWNER)
    moved = await place_copies(operator, plan, inventory, fenced=True)
    assert [it.error for it in moved] == [None] * len(moved)
    assert await set_evacuated(operator, plan, to) == {}
    operator.agents.close()


async def move(hosts: Hosts, to: str) -> Moved:
    operator = hosts.operator()
    moved = await operator.move(NET, to, await take_inventory(operator.agents))
    operator.agents.close()
    return moved


def gate(hosts: Hosts, name: str) -> str:
    scope = hosts[name].store.files.get(NET)
    return scope.placement.gate if scope is not None else ""


def lines(hosts: Hosts, name: str) -> list[str]:
    return [it for it in hosts[name].log.lines if "claim" in it or "passive" in it]


def test_a_host_that_was_declared_dead_and_lives_stops_when_it_hears_the_new_one() -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived)
        (taker,) = hosts.serving(NET)
        await asyncio.sleep(30)
        assert gate(hosts, "h1") == "open"  # it notices nothing
        heal(hosts)
        assert sorted(hosts.serving(NET)) == ["h1", taker]
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == [taker]
        assert gate(hosts, "h1") == "passive"
        assert hosts["h1"].host.present[NET].gated
        why = hosts["h1"].store.files[NET].placement.why
        assert f"is answered by {taker}; {taker} has a proof that it serves {NET} now" in why
        await asyncio.sleep(100)
        assert hosts.serving(NET) == [taker] and gate(hosts, "h1") == "passive"
        assert NET not in hosts["h1"].host.present
        # Undrain ends the claims.
        operator = hosts.operator()
        await undrain(operator, "h1", await take_inventory(operator.agents))
        assert gate(hosts, "h1") == ""
        assert hosts[taker].store.files[NET].placement.taken_from == ()
        sent = len(hosts[taker].sockets.sent)
        await asyncio.sleep(10)
        assert len(hosts[taker].sockets.sent) == sent
        operator.agents.close()

    in_virtual_time(scenario)


def test_a_scope_that_was_built_under_a_record_is_claimed_too() -> None:
    async def scenario(hosts: Hosts) -> None:
        await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", [])
        assert (await hosts["h3"].call("020", "implement-network", epoch=1)).status == 0
        assert (await hosts["h3"].call("021", "assign-ip", epoch=1, vlan="1204", public_ip=ADDRESS)).status == 0
        assert hosts["h3"].store.files[NET].placement.taken_from == ("h1",)
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == ["h3"]
        assert gate(hosts, "h1") == "passive"

    in_virtual_time(scenario)


@pytest.mark.parametrize("restarted", ["h1", "h2", "h3", "all"])
def test_agents_that_restart_claim_and_hear_as_before(restarted: str) -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived)
        (taker,) = hosts.serving(NET)
        for name in hosts.agents:
            if restarted in (name, "all"):
                hosts.restart(name)
        await asyncio.sleep(5)
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == [taker]
        assert gate(hosts, "h1") == "passive"

    in_virtual_time(scenario)


@pytest.mark.parametrize("order", ["h1 first", "h2 first", "both"])
def test_of_three_hosts_that_took_it_one_after_the_other_the_last_one_stays(order: str) -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived, ("h2",))
        operator = hosts.operator("h2")
        again, _ = await read_states(operator, await take_inventory(operator.agents), [])
        operator.agents.close()
        cut_off(hosts, "h2")
        await evacuate(hosts, "h2", again, ("h3",))
        assert hosts["h3"].store.files[NET].placement.taken_from == ("h1", "h2")
        for name in {"h1 first": ("h1", "h2"), "h2 first": ("h2", "h1")}.get(order, ()):
            hosts.dead.discard(name)
            hosts.blind.discard(name)
            await asyncio.sleep(SOON_S)
            assert gate(hosts, name) == "passive"
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == ["h3"]

    in_virtual_time(scenario)


def test_the_claims_go_with_the_scope_when_it_is_moved() -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived, ("h2",))
        operator = hosts.operator(*OTHERS)
        moved = await operator.move(NET, "h3", await take_inventory(operator.agents))
        operator.agents.close()
        assert moved.error is None
        assert hosts["h3"].store.files[NET].placement.taken_from == ("h1",)
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == ["h3"]
        # Moved back to the host that was dead, it is claimed no more.
        assert (await move(hosts, "h1")).error is None
        assert hosts["h1"].store.files[NET].placement.taken_from == ()
        await asyncio.sleep(10)
        assert hosts.serving(NET) == ["h1"] and gate(hosts, "h1") == "open"

    in_virtual_time(scenario)


def recorded(hosts: Hosts, *names: str) -> list[tuple[ClaimWire, bytes]]:
    return list(dict.fromkeys(it for name in names for it in hosts[name].sockets.sent))


@pytest.mark.mutation("records-about-a-host-that-is-back-are-over", instead="0")
@pytest.mark.parametrize("copy", ["an archive", "no copy"])
def test_claims_that_somebody_has_recorded_change_nothing_after_the_scope_is_back(copy: str) -> None:
    """The attacker answers ARP for the address."""

    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived if copy == "an archive" else [], ("h2",))
        if copy == "no copy":
            assert (await hosts["h2"].call("020", "implement-network", epoch=1)).status == 0
            assert (await hosts["h2"].call("021", "assign-ip", epoch=1, vlan="1204", public_ip=ADDRESS)).status == 0
        heal(hosts)
        await asyncio.sleep(3)
        assert gate(hosts, "h1") == "passive"
        replayed = recorded(hosts, "h2")
        operator = hosts.operator()
        await undrain(operator, "h1", await take_inventory(operator.agents))
        operator.agents.close()
        assert (await move(hosts, "h1")).error is None
        hosts["h1"].host.owners[ADDRESS] = "02:00:00:00:00:99"
        hosts["h1"].forget()
        assert replayed
        for _ in range(5):
            for wire, payload in replayed:
                hosts.broadcast(wire, payload)
            await asyncio.sleep(2)
        assert gate(hosts, "h1") == "open" and hosts.serving(NET) == ["h1"]
        assert hosts["h1"].did.count(f"ask {NET}") == 0
        assert lines(hosts, "h1") == []
        # A later evacuation counts again.
        until = int(time.time()) + 8 * 86_400
        claim = EvacuationClaim(OWNER, "h1", until, "h3")
        proof = await CREDENTIALS.sign(claim)
        (payload,), _ = payloads(NET, claim, signatures_in(proof))
        hosts.broadcast(replayed[0][0], payload)
        await asyncio.sleep(1)
        assert gate(hosts, "h1") == "passive"

    in_virtual_time(scenario)


def test_the_claims_do_not_end_before_the_copies_of_the_dead_host_are_removed() -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", archived)
        (taker,) = hosts.serving(NET)
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert gate(hosts, "h1") == "passive"
        operator = hosts.operator()
        inventory = await take_inventory(operator.agents)
        hosts["h1"].store.save_moved = refused  # type: ignore[assignment,method-assign]
        with pytest.raises(HostRefused, match="h1 stays drained"):
            await undrain(operator, "h1", inventory)
        assert hosts[taker].store.files[NET].placement.taken_from == ("h1",)
        del hosts["h1"].store.save_moved
        await undrain(operator, "h1", await take_inventory(operator.agents))
        assert hosts[taker].store.files[NET].placement.taken_from == ()
        assert "h1" not in (await take_inventory(operator.agents)).views[taker].evacuated
        operator.agents.close()

    in_virtual_time(scenario)


def refused(*_: object) -> None:
    raise HostRefused("the disk is full")


@pytest.mark.mutation("an-import-from-a-host-that-is-gone-is-claimed", instead="''")
@pytest.mark.parametrize("old", ["answers", "is gone"])
def test_an_import_is_claimed_if_its_host_is_gone(old: str) -> None:
    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        operator = hosts.operator(*(("h1", *OTHERS) if old == "answers" else OTHERS))
        if old == "answers":
            hosts["h1"].store.files.clear()
            hosts["h1"].host.present.clear()
            hosts.restart("h1")
        else:
            cut_off(hosts, "h1")
        inventory = await take_inventory(operator.agents)
        moved = await put_back(operator, archived[0], "h2", inventory, peer="h1", fenced=False)
        assert moved.error is None
        assert hosts["h2"].store.files[NET].placement.taken_from == (() if old == "answers" else ("h1",))
        heal(hosts)
        await asyncio.sleep(SOON_S)
        assert hosts.serving(NET) == ["h2"]
        operator.agents.close()

    in_virtual_time(scenario)


def test_a_move_while_all_hosts_answer_is_not_claimed() -> None:
    async def scenario(hosts: Hosts) -> None:
        await living(hosts)
        assert (await move(hosts, "h2")).error is None
        await asyncio.sleep(10)
        assert all(hosts[name].sockets.sent == [] for name in hosts.agents)

    in_virtual_time(scenario)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["cut h1", "cut h2", "heal", "restart h1", "restart h2", "restart h3", "wait"]),
            st.floats(0.1, 8.0),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_after_any_partitions_one_host_serves_seconds_after_the_last_healing(
    steps: list[tuple[str, float]], built: bool
) -> None:
    """h1 is evacuated in the first partition."""

    async def scenario(hosts: Hosts) -> None:
        archived = await living(hosts)
        cut_off(hosts, "h1")
        await evacuate(hosts, "h1", [] if built else archived, ("h3",))
        if built:
            assert (await hosts["h3"].call("020", "implement-network", epoch=1)).status == 0
            assert (await hosts["h3"].call("021", "assign-ip", epoch=1, vlan="1204", public_ip=ADDRESS)).status == 0
        for what, seconds in steps:
            match what.split():
                case ["cut", name]:
                    cut_off(hosts, name)
                case ["restart", name]:
                    hosts.restart(name)
                case ["heal"]:
                    heal(hosts)
            await asyncio.sleep(seconds)
        heal(hosts)
        await asyncio.sleep(2 * SOON_S)
        assert hosts.serving(NET) == ["h3"]
        assert gate(hosts, "h1") == "passive"

    in_virtual_time(scenario)
