"""Moves with real agents on simulated hosts: an interruption at any message, then the same command again.

The laws: at no moment two hosts serve one scope; after one repeat the target serves it, with everything that CloudStack
was told before; nothing of it is left on other hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fakehosts import Cut, Hosts, in_virtual_time
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.moves.move import Moved
from netloom.placementwire import CLOSED_S, INCOMING_S
from netloom.state import Placement
from netloom.wire import Call

NET = "net-204"
What = Literal["operator", "connection", "agent"]


async def move(hosts: Hosts, to: str, scope_id: str = NET) -> Moved | None:
    """``netloom move``, in a process of its own. None: it was ended."""
    operator = hosts.operator()

    async def work() -> Moved:
        return await operator.move(scope_id, to, await take_inventory(operator.agents))

    try:
        return await hosts.run(work())
    finally:
        operator.agents.close()


def assert_only_on(hosts: Hosts, name: str, addresses: set[str]) -> None:
    """The host serves the scope with these public addresses, and the others have nothing of it."""
    assert hosts.wrong == []
    assert hosts.serving(NET) == [name]
    scope = hosts[name].store.files[NET]
    assert (scope.placement.gate, scope.placement.peer) == ("open", "")
    assert addresses <= scope.public_ips.keys()
    for other, agent in hosts.agents.items():
        if other != name:
            assert NET not in agent.store.files and NET not in agent.host.present
            assert agent.store.retired == set()


def test_a_move_takes_few_messages_and_leaves_nothing() -> None:
    async def scenario(hosts: Hosts) -> list[str]:
        await hosts["h1"].live()
        before = hosts["h1"].store.files[NET]
        moved = await move(hosts, "h2")
        assert moved is not None and moved.error is None
        assert (moved.source, moved.target, moved.epoch) == ("h1", "h2", 1)
        assert_only_on(hosts, "h2", {"203.0.113.20"})
        after = hosts["h2"].store.files[NET]
        assert after.placement.epoch == 1 and after.placement.proof
        assert replace(after, placement=Placement()) == before
        assert hosts["h1"].store.went[NET].to == "h2"
        return [it for it in hosts.messages if "placements" not in it]

    assert in_virtual_time(scenario) == [
        "read-state > h1",
        "read-state < h1",
        "receive > h2",
        "receive < h2",
        "read-flows > h1",
        "read-flows < h1",
        "add-flows > h2",
        "add-flows < h2",
        "close > h1",
        "close < h1",
        "open > h2",
        "open < h2",
        "finish > h1",
        "finish < h1",
    ]


def messages_of_a_move() -> int:
    async def scenario(hosts: Hosts) -> int:
        await hosts["h1"].live()
        await move(hosts, "h2")
        return len(hosts.messages)

    return in_virtual_time(scenario)


def interruptions() -> Iterator[tuple[What, int]]:
    count = messages_of_a_move()
    whats: tuple[What, ...] = ("operator", "connection", "agent")
    for what in whats:
        for at in range(1, count + 1):
            yield what, at


@pytest.mark.parametrize("later_s", [0, 2, CLOSED_S + 0.5, INCOMING_S + 1])
@pytest.mark.parametrize(("what", "at"), list(interruptions()))
def test_after_any_interruption_one_repeat_completes_the_move(what: What, at: int, later_s: float) -> None:
    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live()
        hosts.cut = Cut(at, what)
        first = await move(hosts, "h2")
        assert len(hosts.messages) >= at
        hosts.cut = Cut()
        if what == "connection":  # it is opened again, and the call is repeated
            assert first is not None and first.error is None
        await hosts["h1"].clock.advance(later_s)
        assert len(hosts.serving(NET)) == 1 or later_s <= CLOSED_S
        moved = await move(hosts, "h2")
        assert moved is not None and moved.error is None and moved.note == ""
        assert_only_on(hosts, "h2", {"203.0.113.20"})

    in_virtual_time(scenario)


@pytest.mark.mutation("a-scope-leaves-when-no-older-copy-can-open", instead="''")
@pytest.mark.parametrize("slow_s", [0.001, 4.5])
@pytest.mark.parametrize("at", range(1, messages_of_a_move() + 1))
def test_after_any_interruption_the_scope_can_go_elsewhere_or_back(at: int, slow_s: float) -> None:
    """Slowly: at the moment when nobody serves it, a host from the interrupted move may decide to open again."""

    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live()
        hosts.cut = Cut(at)
        await move(hosts, "h2")
        hosts.cut = Cut()
        addresses = {"203.0.113.20"}
        for name in hosts.serving(NET):
            await hosts[name].call("050", "assign-ip", public_ip="203.0.113.77")
            addresses.add("203.0.113.77")
        await hosts["h1"].clock.advance(2)
        hosts.slow = {"open >": slow_s}
        for to in ("h3", "h1"):
            moved = await move(hosts, to)
            assert moved is not None and moved.error is None and moved.note == ""
            assert_only_on(hosts, to, addresses)

    in_virtual_time(scenario)


@pytest.mark.parametrize("slow", ["add-flows <", "close >", "close <", "open >", "open <", "finish >", "finish <"])
@pytest.mark.parametrize("seconds", [1.0, 2.4, 4.9, 5.1, 5.9, 6.1, 7.5, 11.0, 30.0])
def test_a_slow_message_moves_the_scope_or_leaves_it(slow: str, seconds: float) -> None:
    """``open`` reaches the new host before, between or after the moments when it, and the old host, give up."""

    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live()
        hosts.slow = {slow: seconds}
        moved = await move(hosts, "h2")
        assert moved is not None
        if moved.error is None:
            assert hosts.serving(NET) == ["h2"]
        else:
            assert moved.error.hint
        await hosts["h1"].clock.advance(40)
        assert len(hosts.serving(NET)) == 1
        hosts.slow = {}
        moved = await move(hosts, "h2")
        assert moved is not None and moved.error is None, moved
        assert_only_on(hosts, "h2", {"203.0.113.20"})

    in_virtual_time(scenario)


@pytest.mark.mutation("a-changed-state-is-read-again")
def test_a_change_during_the_move_is_not_lost() -> None:
    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live()
        changed = False

        def change(host: str, call: Call) -> None:
            nonlocal changed
            if call.command == "close" and not changed:
                changed = True
                hosts["h1"].send("050", "assign-ip", public_ip="203.0.113.77")

        hosts.before_call = change
        moved = await move(hosts, "h2")
        assert moved is not None and moved.error is None
        assert hosts.messages.count("receive > h2") == 2
        assert_only_on(hosts, "h2", {"203.0.113.20", "203.0.113.77"})

    in_virtual_time(scenario)


ACTIONS = st.one_of(
    st.tuples(
        st.just("move"),
        st.sampled_from(["h1", "h2", "h3"]),
        st.sampled_from(["operator", "connection", "agent"]),
        st.integers(0, 24),
        st.sampled_from(["", "receive", "add-flows", "close >", "close <", "open >", "open <", "finish"]),
        st.sampled_from([0.5, 2.0, 4.5, 5.5, 6.5, 9.0]),
    ),
    st.tuples(st.just("call"), st.integers(30, 99)),
    st.tuples(st.just("pass"), st.sampled_from([0.1, 3.0, CLOSED_S + 1, INCOMING_S + 1])),
    st.tuples(st.just("restart"), st.sampled_from(["h1", "h2", "h3"])),
    st.tuples(st.just("two operators"), st.sampled_from(["h1", "h2"]), st.sampled_from(["h2", "h3"])),
)


@settings(max_examples=300, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking takes minutes
@given(st.lists(ACTIONS, max_size=8))
def test_any_moves_interruptions_and_calls_end_with_one_host_and_no_lost_change(
    actions: list[tuple[object, ...]],
) -> None:
    async def scenario(hosts: Hosts) -> None:
        await hosts["h1"].live()
        addresses = {"203.0.113.20"}
        for action in actions:
            match action:
                case (
                    "move",
                    str(to),
                    ("operator" | "connection" | "agent") as what,
                    int(at),
                    str(slow),
                    float(slow_s),
                ):
                    hosts.slow = {slow: slow_s}
                    hosts.cut = Cut(at, what)
                    await move(hosts, to)
                    hosts.slow, hosts.cut = {}, Cut()
                case ("two operators", str(one), str(other)):
                    first = hosts["h1"].start(move(hosts, one))
                    await move(hosts, other)
                    await first
                case ("call", int(last)):
                    for name in hosts.serving(NET):
                        address = f"203.0.113.{last}"
                        reply = await hosts[name].call("050", "assign-ip", public_ip=address)
                        if reply.status == 0:
                            addresses.add(address)
                case ("pass", float(seconds)):
                    await hosts["h1"].clock.advance(seconds)
                case ("restart", str(name)):
                    hosts.restart(name)
            assert hosts.wrong == []
        moved = await move(hosts, "h2")
        if moved is not None and moved.error is not None:  # what was under way has ended since
            await hosts["h1"].clock.advance(CLOSED_S)
            moved = await move(hosts, "h2")
        assert moved is not None and moved.error is None, moved
        await hosts["h1"].clock.advance(60)
        assert_only_on(hosts, "h2", addresses)

    in_virtual_time(scenario)
