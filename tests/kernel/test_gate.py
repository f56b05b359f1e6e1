"""Gates: a scope is complete behind a closed one, and no frame passes it in either direction."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, agent_host, wait_until
from kernel.gated_agent import GatedAgent, gated_agent
from kernel.gated_frames import (
    ADDRESS,
    BRIDGES,
    ENDS,
    FABRIC,
    GATEWAY,
    GUEST,
    LACP,
    LOGIN,
    NS,
    PORTS,
    PUBLIC,
    PUBLIC_MAC,
    VM_MAC,
    Stream,
    Traffic,
    frame,
    heard,
    learned,
    sent_numbers,
    taps,
)
from kernel.scratch import scratch, tool
from netloom.agent.host import gate, link_table
from netloom.agent.kernel import netlink, nft_netlink
from netloom.agent.kernel.netlink import NetlinkError, Socket
from netns import inside


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1520", "eth1.101") as it:
        yield it


@pytest.fixture
def agent(host: AgentHost) -> Iterator[GatedAgent]:
    with gated_agent(host) as it:
        yield it


@pytest.mark.mutation("a-closed-gate-lets-nothing-in", instead='(f"oifname @{_CLOSED} accept",)')
def test_no_frame_passes_a_closed_gate_and_all_pass_an_open_one(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    host.plug("vm", BRIDGES[GUEST], VM_MAC)
    wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in ENDS))
    traffic = Traffic(host)
    assert traffic.none, (traffic.out, traffic.into)
    assert not any(learned(host, link) for link in PORTS)
    assert agent("open") == [GATEWAY, ADDRESS]
    traffic = Traffic(host)
    assert traffic.kinds("wire") >= {"0806", "0800", "88b6", "86dd"}
    assert traffic.kinds("public wire") >= {"0806", "0800", "88b6"}
    assert traffic.kinds("vm") >= {"0806", "88b6"}
    for place, address in (("wire", GATEWAY), ("public wire", ADDRESS), ("vm", GATEWAY)):
        answers = [it for it in traffic.out[place] if it[12:14].hex() == "0806" and it[20:22] == b"\0\2"]
        assert socket.inet_aton(address) in {it[28:32] for it in answers}
    assert all(len(it) >= 4 for it in traffic.into.values())
    assert all(learned(host, link) for link in PORTS)


# ------------------------------------------------------------------------------------------------ in one namespace


@pytest.fixture
def namespace() -> Iterator[str]:
    with scratch() as name, inside(name):
        yield name


def test_closing_and_opening_again_changes_nothing(namespace: str) -> None:
    gate.open_(ENDS)
    gate.remove()
    assert tool(namespace, "nft", "list", "ruleset") == ""
    gate.close([])
    assert tool(namespace, "nft", "list", "ruleset") == ""
    gate.close(ENDS)
    before = tool(namespace, "nft", "list", "ruleset")
    gate.close(ENDS)
    gate.open_(["vnetg7"])
    assert tool(namespace, "nft", "list", "ruleset") == before
    gate.open_([*ENDS, "vnetg7"])
    gate.open_(ENDS)
    assert tool(namespace, "nft", "list", "ruleset") == ""


def test_thousands_of_gates_close_and_open_at_once(namespace: str) -> None:
    every = [f"vnetg{number}" for number in range(1, 5001)]
    gate.close(every[:10])
    gate.close(every)
    assert gate.closed() == set(every)
    gate.open_(every[1:])
    assert gate.closed() == {every[0]}


def test_a_refused_change_changes_nothing(namespace: str) -> None:
    gate.close(["a"])
    with Socket(netlink.NETLINK_NETFILTER) as nfnetlink:
        both = [
            *nft_netlink.add_link_names(link_table.FAMILY, gate.TABLE.name, "closed", ["b"]),
            *nft_netlink.delete_link_names(link_table.FAMILY, gate.TABLE.name, "closed", ["a", "nowhere"]),
        ]
        for _ in range(3):
            with pytest.raises(NetlinkError, match="change set closed of table bridge netloom_gate: No such file"):
                nft_netlink.change(nfnetlink, both)
            assert gate.closed() == {"a"}
        nft_netlink.change(nfnetlink, both[:1])
    assert gate.closed() == {"a", "b"}


def test_threads_and_others_change_gates_at_the_same_time(namespace: str) -> None:
    """Each thread closes its own gate again after somebody has deleted the table, and no other is lost by that."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with inside(namespace):
                for _ in range(50):
                    gate.close([f"t{number}", "shared"])
                    gate.open_([f"t{number}"])
                gate.close([f"t{number}"])
        except BaseException as error:  # noqa: BLE001, it fails the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for it in threads:
        it.start()
    while any(it.is_alive() for it in threads[:2]):
        subprocess.run(["nft", "flush", "ruleset"], check=True)
    for it in threads:
        it.join()
    gate.close([f"t{number}" for number in range(4)])
    assert failures == []
    assert gate.closed() >= {f"t{number}" for number in range(4)}


# ------------------------------------------------------------------------------------------------------ on a host


@pytest.mark.mutation("a-closed-gate-emits-nothing", instead='(f"iifname @{_CLOSED} accept",)')
def test_a_gate_opens_and_closes_between_two_frames(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in ENDS))
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine):
        with Stream(mine) as stream:
            for _ in range(5):
                stream.pass_on()
                agent("open")
                stream.pass_on()
                agent("close")
                closed_at = stream.sent
            stream.pass_on()
        numbers = sent_numbers(heard(far))
    runs = sum(it != number + 1 for it, number in zip(numbers[1:], numbers, strict=False)) + 1
    assert runs == 5, numbers
    # The sender counts a frame after the bridge has it.
    assert numbers[-1] <= closed_at


@pytest.mark.mutation("reserved-addresses-pass-no-gate", instead='(f"iifname @{_CLOSED} accept",)')
def test_a_bridge_learns_nothing_from_frames_to_reserved_addresses(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in ENDS))
    with taps(host, (NS, PUBLIC)) as (mine,):
        mine.send(frame(LACP, PUBLIC_MAC, LOGIN))
        assert not learned(host, PUBLIC)
        agent("open")
        mine.send(frame(LACP, PUBLIC_MAC, LOGIN))
        assert learned(host, PUBLIC)


def test_one_plan_builds_opens_closes_and_removes(host: AgentHost, agent: GatedAgent) -> None:
    closing, opening = (f"{it} the gate of {', '.join(ENDS)}" for it in ("close", "open"))
    built = agent("converge gated")
    assert built["steps"][0] == closing
    assert built["announce"] == []
    assert agent("converge gated")["steps"] == []
    assert agent("converge") == {"steps": [opening], "announce": [GATEWAY, ADDRESS]}
    assert "netloom_gate" not in host.run("nft", "list", "tables")
    assert agent("converge") == {"steps": [], "announce": []}
    assert agent("converge gated") == {"steps": [closing], "announce": []}
    for harm in (
        "flush ruleset",
        "delete table bridge netloom_gate",
        "flush chain bridge netloom_gate postrouting",
        "flush set bridge netloom_gate closed",
        f'delete element bridge netloom_gate closed {{ "{ENDS[0]}" }}',
    ):
        host.run("nft", harm)
        assert agent("converge gated")["steps"][0].startswith("close the gate of")
        assert agent("closed") == ENDS
        assert agent("converge gated")["steps"] == []
    removed = agent("converge gone")
    assert removed["steps"][-1] == opening
    assert "netloom_gate" not in host.run("nft", "list", "tables")
    assert agent("tidy") == []


@pytest.mark.mutation("a-gated-scope-announces-nothing")
def test_nothing_is_announced_until_the_gate_opens(agent: GatedAgent) -> None:
    assert agent("converge gated")["announce"] == []
    assert agent("converge")["announce"] == [GATEWAY, ADDRESS]


@pytest.mark.mutation("an-open-gate-stays-open")
def test_a_gate_that_was_opened_apart_from_a_plan_stays_open(agent: GatedAgent) -> None:
    agent("converge gated")
    assert agent("open") == [GATEWAY, ADDRESS]
    assert agent("tidy") == []
    assert agent("closed") == []
    assert agent("converge")["steps"] == []
    agent("close")
    assert agent("tidy") == []
    assert agent("converge gated")["steps"] == []


@pytest.mark.mutation("a-gate-closes-whatever-else-fails")
def test_a_gate_closes_although_the_rest_cannot_be_done(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge")
    for link in ("eth1.101", "eth1"):
        host.ip("link", "del", link)
    assert "NIC eth1 does not exist" in agent("converge gated")["error"]
    assert agent("closed") == ENDS


def test_a_tidy_forgets_the_gates_of_links_that_are_gone(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    host.ip("link", "del", ENDS[0])
    agent("tidy")
    assert agent("closed") == ENDS  # the scope wants it closed, and a repair makes the link again
    agent("converge gone")
    assert agent("closed") == [ENDS[0]]
    assert f"open the gate of {ENDS[0]}" in agent("tidy")
    assert "netloom_gate" not in host.run("nft", "list", "tables")


@pytest.mark.mutation("no-gate-without-its-agent")
def test_an_uninstall_leaves_no_gate(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    with gated_agent(host) as another:  # it wants no gate closed, and the links exist
        another("uninstall")
    assert "netloom" not in host.run("nft", "list", "tables")


@pytest.mark.mutation("a-gate-without-its-rules-is-open", instead="True")
def test_a_gate_whose_rules_are_gone_is_not_closed(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    host.run("nft", "flush", "chain", "bridge", "netloom_gate", "prerouting")
    assert agent("closed") == []
    assert agent("tidy") == [f"close the gate of {', '.join(ENDS)}"]
    assert agent("closed") == ENDS


@pytest.mark.mutation("a-bridge-sends-nothing-through-a-gate", instead='(f"oifname @{_CLOSED} accept",)')
def test_spanning_tree_of_an_operators_bridge_stays_outside(host: AgentHost, agent: GatedAgent) -> None:
    bridge = BRIDGES[PUBLIC]
    host.ip("link", "add", bridge, "type", "bridge", "stp_state", "1", "forward_delay", "200", "hello_time", "100")
    host.ip("link", "set", "eth1.101", "master", bridge)
    host.ip("link", "set", bridge, "up")
    agent("converge gated")
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, inside):
        far.settimeout(20)
        seen = 0
        while seen < 3:  # the port of the scope has the same hello time
            seen += far.recv(2048)[:6].hex() == "0180c2000000"
        assert not [it for it in heard(inside) if it[:6].hex() == "0180c2000000"]


@pytest.mark.mutation("closed-gates-close-at-once")
def test_closed_gates_are_closed_again_when_somebody_flushes_all_rules(host: AgentHost) -> None:
    with gated_agent(host, "ip6", "watch") as agent:
        agent("converge gated")
        wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in ENDS))
        with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine), Stream(mine) as stream:
            passed = 0
            for harm in ("flush ruleset", "flush set bridge netloom_gate closed", "delete table bridge netloom_gate"):
                host.run("nft", harm)
                wait_until(lambda: agent("closed") == ENDS)
                stream.pass_on()
                passed += len(sent_numbers(heard(far)))
                stream.pass_on()
                assert sent_numbers(heard(far)) == []
        assert passed < 1000  # of one each millisecond
