"""Whether another host uses the addresses of a scope: asked below the bridges, with the scope's gate closed or open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kernel.agent_host import AgentHost, agent_host, wait_until
from kernel.gated_agent import GatedAgent, gated_agent
from kernel.raw_frames import wire
from kernel.scratch import carried, descriptors, joined, tool
from netloom.agent.host import answers
from netloom.agent.host.answers import Neighbours
from netloom.netobjects import Route
from netloom.render.want import Port, Segment, Want
from netns import inside

# The golden scenario ip6.
GATEWAY, ADDRESS = "10.50.1.1", "203.0.113.20"
GUEST_MAC, PUBLIC_MAC = "0a:97:3e:a2:e0:51", "0a:1a:27:c8:5b:f9"
GUEST_WIRE, PUBLIC_WIRE = "eth1.1520", "eth1.101"
FREE: dict[str, dict[str, str]] = {"owners": {}, "probing": {}, "unknown": {}}
ASK = "occupied 0.3"
PATIENTLY_S = 20.0


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host(GUEST_WIRE, PUBLIC_WIRE) as it:
        # Several links of the fabric are in the same subnets.
        it.run("sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1", pid=it.fabric)
        yield it


@pytest.fixture
def agent(host: AgentHost) -> Iterator[GatedAgent]:
    with gated_agent(host) as it:
        yield it


def running(host: AgentHost) -> bool:
    return all(host.links()[it]["operstate"] == "UP" for it in (GUEST_WIRE, PUBLIC_WIRE))


def elsewhere(host: AgentHost, link: str, address: str, mac: str = "") -> str:
    """Let another host behind a link of this host use the address; returns its MAC address."""
    peer = f"sw-{link}"
    if mac:
        host.run("ip", "link", "set", peer, "address", mac, pid=host.fabric)
    host.run("ip", "addr", "add", f"{address}/24", "dev", peer, pid=host.fabric)
    found: str = json.loads(host.run("ip", "-j", "link", "show", peer, pid=host.fabric))[0]["address"]
    return found


@pytest.mark.parametrize("state", ["converge gated", "converge"])
def test_addresses_that_nobody_uses_are_free_also_while_the_scope_itself_answers(
    host: AgentHost, agent: GatedAgent, state: str
) -> None:
    agent(state)
    wait_until(lambda: running(host))
    assert agent(ASK) == FREE


@pytest.mark.parametrize("mac", ["", PUBLIC_MAC], ids=["another MAC", "the MAC of our port"])
def test_another_host_is_heard_behind_the_closed_gate(host: AgentHost, agent: GatedAgent, mac: str) -> None:
    agent("converge gated")
    wait_until(lambda: running(host))
    public, guest = elsewhere(host, PUBLIC_WIRE, ADDRESS, mac), elsewhere(host, GUEST_WIRE, GATEWAY)
    assert agent(ASK) == FREE | {"owners": {ADDRESS: public, GATEWAY: guest}}
    entries = host.run("bridge", "fdb", "show", "dev", "vnetpn520.101")
    assert PUBLIC_MAC not in entries


def test_another_host_is_heard_before_the_scope_is_built(host: AgentHost, agent: GatedAgent) -> None:
    public = elsewhere(host, PUBLIC_WIRE, ADDRESS)
    for link in (GUEST_WIRE, PUBLIC_WIRE):
        host.ip("link", "add", f"br{link.replace('.', '-')}", "type", "bridge")
        host.ip("link", "set", link, "master", f"br{link.replace('.', '-')}", "up")
    wait_until(lambda: running(host))
    assert agent(ASK) == FREE | {"owners": {ADDRESS: public}}


def unknown(found: dict[str, Any]) -> dict[str, str]:
    assert found["owners"] == found["probing"] == {}
    reasons: dict[str, str] = found["unknown"]
    return reasons


@pytest.mark.mutation("a-link-without-carrier-proves-nothing")
def test_what_cannot_be_asked_is_not_known(host: AgentHost, agent: GatedAgent) -> None:
    assert unknown(agent(ASK)) == {
        GATEWAY: "the bridge of vnetg520 does not exist",
        ADDRESS: "the bridge of vnetpn520.101 does not exist",
    }
    agent("converge gated")
    wait_until(lambda: running(host))
    host.run("ip", "link", "set", f"sw-{PUBLIC_WIRE}", "down", pid=host.fabric)
    wait_until(lambda: not running(host))
    assert unknown(agent(ASK)) == {ADDRESS: f"{PUBLIC_WIRE} has no link"}
    host.ip("link", "set", GUEST_WIRE, "nomaster")
    host.ip("link", "set", "vnetpn520.101", "nomaster")
    assert unknown(agent(ASK)) == {
        GATEWAY: "bridge breth1-1520 has no uplink",
        ADDRESS: f"{PUBLIC_WIRE} has no link",
    }


@pytest.mark.mutation("a-link-that-fails-proves-nothing")
def test_a_link_that_goes_down_meanwhile_proves_nothing(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge gated")
    wait_until(lambda: running(host))
    with wire(host, f"sw-{PUBLIC_WIRE}", fabric=True) as far:
        far.settimeout(20)
        asking = agent.start("occupied 12")
        while far.recv(2048)[12:14] != b"\x08\x06":
            pass
    host.ip("link", "set", PUBLIC_WIRE, "down")
    elsewhere(host, GUEST_WIRE, GATEWAY)  # the next probe is answered, so nothing is left to wait for
    assert asking()["unknown"] == {ADDRESS: f"{PUBLIC_WIRE}: Network is down"}


def test_a_bridge_of_others_is_asked_on_its_uplink_and_not_on_its_vms(host: AgentHost, agent: GatedAgent) -> None:
    for link, bridge in ((PUBLIC_WIRE, "breth1-101"), (GUEST_WIRE, "breth1-1520")):
        host.ip("link", "add", bridge, "type", "bridge")
        host.ip("link", "set", link, "master", bridge, "up")
        host.ip("link", "set", bridge, "up")
    agent("converge gated")
    host.plug("vm", "breth1-1520", "02:01:00:cc:00:03", f"{GATEWAY}/24")
    wait_until(lambda: running(host))
    assert agent(ASK) == FREE  # a VM of this host that takes the gateway's address is no other host
    guest = elsewhere(host, GUEST_WIRE, GATEWAY)
    assert agent(ASK) == FREE | {"owners": {GATEWAY: guest}}


# --- a sign of life

# The golden scenario guests.
VM, VM_WIRE, GATEWAY_WIRE = "10.10.1.45", "eth1.1204", "eth2.101"


@pytest.mark.mutation("a-link-without-carrier-answers-nobody")
def test_vms_and_gateways_behind_an_uplink_are_asked_for_a_sign_of_life() -> None:
    with agent_host(VM_WIRE, GATEWAY_WIRE) as host, gated_agent(host, "guests") as agent:
        assert agent("answers gst-204") is None, "there is no bridge yet"
        agent("converge leased")  # without a lease no frame passes
        wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in (VM_WIRE, GATEWAY_WIRE)))
        assert agent("answers gst-204") is False
        assert agent("answers pub-101") is False
        elsewhere(host, VM_WIRE, VM)
        elsewhere(host, GATEWAY_WIRE, "203.0.113.1")
        assert agent("answers gst-204") is True
        assert agent("answers pub-101") is True
        host.run("ip", "link", "set", f"sw-{GATEWAY_WIRE}", "down", pid=host.fabric)
        wait_until(lambda: host.links()[GATEWAY_WIRE]["operstate"] != "UP")
        assert agent("answers pub-101") is False


def test_vms_on_this_host_are_no_sign_of_life() -> None:
    with agent_host(VM_WIRE, GATEWAY_WIRE) as host, gated_agent(host, "guests") as agent:
        host.ip("link", "add", "breth1-1204", "type", "bridge")
        host.ip("link", "set", VM_WIRE, "master", "breth1-1204", "up")
        host.ip("link", "set", "breth1-1204", "up")
        host.plug("vm", "breth1-1204", "02:01:00:cc:00:03", f"{VM}/24")
        agent("converge")
        wait_until(lambda: host.links()[VM_WIRE]["operstate"] == "UP")
        assert agent("answers gst-204") is False


def test_where_nobody_is_known_nobody_can_be_asked(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge")
    wait_until(lambda: running(host))
    assert agent("answers gst-520") is None


@pytest.mark.mutation("after-silence-the-uplinks-are-looked-up", instead="self._look_at")
def test_the_uplinks_of_a_port_are_looked_up_after_silence_and_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sockets stay open. ``looks``: how often the uplinks were looked up."""
    segment = Segment(bridge="brleft-204", nic="left", vlan="204", vlan_link="left.204")
    port = Port(link="gst-1", host_link="vnetg1", mac="02:00:00:00:00:01", segment=segment)
    route = Route(table=1, destination="0.0.0.0/0", link="gst-1", via="10.9.0.2")
    want = Want(namespace="cs-1", ports=(port,), routes=(route,))
    looks = 0

    def find() -> Want:
        nonlocal looks
        looks += 1
        return want

    with joined() as (left, right), inside(left), Neighbours(find) as neighbours:
        for line in (
            "set left down",
            "set left name left.204",  # as the VLAN link below this bridge
            "set left.204 up",
            "add brleft-204 type bridge",
            "set brleft-204 up",
            "set left.204 master brleft-204",
        ):
            tool(left, "ip", "link", *line.split())
        carried(left, "left.204")
        monkeypatch.setattr(answers, "LOOK_EVERY_S", 1000.0)
        assert neighbours.anybody_answers(PATIENTLY_S)
        open_ = descriptors()
        assert all(neighbours.anybody_answers(PATIENTLY_S) for _ in range(3))
        assert (looks, descriptors()) == (1, open_)
        tool(right, "ip", "link", "set", "right", "down")
        assert not neighbours.anybody_answers(0.1)
        assert neighbours.anybody_answers(0.1) is False, "no carrier"
        assert looks == 2
        tool(right, "ip", "link", "set", "right", "up")
        monkeypatch.setattr(answers, "LOOK_EVERY_S", 0.0)
        wait_until(lambda: neighbours.anybody_answers(0.3))
        tool(left, "ip", "link", "set", "left.204", "nomaster")
        assert neighbours.anybody_answers(PATIENTLY_S) is None
        neighbours.close()
        assert descriptors() < open_
