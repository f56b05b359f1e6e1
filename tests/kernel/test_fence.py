"""Fenced uplinks: the network is cut off from other hosts, and serves the VMs on its own. Also: who is heard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kernel.agent_host import AgentHost, act, agent_host, message, wait_until
from kernel.gated_agent import GatedAgent, gated_agent
from kernel.gated_frames import (
    ADDRESS,
    BRIDGES,
    ENDS,
    EVERYBODY,
    FABRIC,
    FAR_MAC,
    GATEWAY,
    GUEST,
    LACP,
    LLDP,
    NS,
    PORTS,
    PUBLIC,
    TEST,
    VM_MAC,
    arp_request,
    frame,
    heard,
    of,
    taps,
)
from kernel.isolated_network import live
from kernel.scratch import scratch, tool
from netloom.agent.host import fence
from netloom.agent.host.outside import Listener, Outside
from netns import inside

UPLINKS = {GUEST: "eth1.1520", PUBLIC: "eth1.101"}


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host(*UPLINKS.values()) as it:
        yield it


@pytest.fixture
def agent(host: AgentHost) -> Iterator[GatedAgent]:
    with gated_agent(host) as it:
        it("converge")
        host.plug("vm", BRIDGES[GUEST], VM_MAC)
        wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in (*ENDS, *UPLINKS.values())))
        yield it


@dataclass
class Passed:
    """Which frames pass between the guest port and a VM on this host, and between the ports and other hosts."""

    vm: bool
    guest_out: bool
    guest_in: bool
    public_out: bool
    public_in: bool


NONE = Passed(vm=True, guest_out=False, guest_in=False, public_out=False, public_in=False)
ALL = Passed(vm=True, guest_out=True, guest_in=True, public_out=True, public_in=True)


def passed(host: AgentHost) -> Passed:
    with taps(host, ("", FABRIC[GUEST]), ("", FABRIC[PUBLIC]), ("vm", "eth0"), (NS, GUEST), (NS, PUBLIC)) as open_:
        far_guest, far_public, vm, guest, public = open_
        guest.send(frame(EVERYBODY, PORTS[GUEST], TEST))
        public.send(frame(EVERYBODY, PORTS[PUBLIC], TEST))
        vm.send(arp_request(VM_MAC, "10.50.1.5", GATEWAY))
        far_guest.send(arp_request(FAR_MAC, "10.50.1.6", GATEWAY))
        far_public.send(arp_request(FAR_MAC, "203.0.113.1", ADDRESS))
        into, answers = heard(guest), heard(vm)
        return Passed(
            vm=bool(of(VM_MAC, into)) and bool(of(PORTS[GUEST], answers)),
            guest_out=bool(of(PORTS[GUEST], heard(far_guest))),
            guest_in=bool(of(FAR_MAC, into)),
            public_out=bool(of(PORTS[PUBLIC], heard(far_public))),
            public_in=bool(of(FAR_MAC, heard(public))),
        )


def fenced(host: AgentHost) -> frozenset[str]:
    with host.inside_host():
        return fence.TABLE.links()


def do(host: AgentHost, what: str, *links: str) -> None:
    with host.inside_host():
        getattr(fence.TABLE, what)(links)


@pytest.mark.mutation("a-fenced-uplink-lets-nothing-in")
@pytest.mark.mutation("a-fenced-uplink-lets-nothing-out")
def test_no_frame_passes_a_fenced_uplink_and_vms_on_this_host_are_served(host: AgentHost, agent: GatedAgent) -> None:
    assert passed(host) == ALL
    do(host, "add", UPLINKS[GUEST])
    assert passed(host) == Passed(vm=True, guest_out=False, guest_in=False, public_out=True, public_in=True)
    do(host, "add", *UPLINKS.values())
    assert passed(host) == NONE
    do(host, "discard", UPLINKS[PUBLIC])
    assert passed(host) == Passed(vm=True, guest_out=False, guest_in=False, public_out=True, public_in=True)
    do(host, "discard", UPLINKS[GUEST])
    assert passed(host) == ALL


@pytest.mark.mutation("no-fence-without-its-agent")
def test_an_uninstall_leaves_no_fence(host: AgentHost, agent: GatedAgent) -> None:
    do(host, "add", *UPLINKS.values())
    agent("converge gone")
    agent("uninstall")
    assert "netloom_fence" not in host.run("nft", "list", "tables")


def test_fencing_and_lifting_changes_nothing() -> None:
    with scratch() as name, inside(name):
        fence.TABLE.discard(["a"])
        fence.TABLE.remove()
        fence.TABLE.add(["a", "b"])
        before = tool(name, "nft", "list", "ruleset")
        fence.TABLE.add(["b"])
        assert tool(name, "nft", "list", "ruleset") == before
        assert fence.TABLE.links() == {"a", "b"}
        fence.TABLE.discard(["a", "b"])
        assert tool(name, "nft", "list", "ruleset") == ""


# ------------------------------------------------------------------------------------------------------- who is heard


@pytest.mark.mutation("spanning-tree-frames-are-nobody", instead="(0x15, 0, 1, 0)")
def test_a_listener_hears_others_and_neither_itself_nor_a_switch_that_does_not_forward(host: AgentHost) -> None:
    link = UPLINKS[GUEST]
    host.run("sysctl", "-qw", f"net/ipv6/conf/{FABRIC[GUEST]}/disable_ipv6=1", pid=host.fabric)  # it would send, too
    host.ip("link", "set", link, "up")
    wait_until(lambda: host.links()[link]["operstate"] == "UP")
    with host.inside_host():
        listener = Listener(link)
    try:
        listener.heard()  # what the kernel of the other end has sent
        with taps(host, ("", FABRIC[GUEST]), ("-", link)) as (far, mine):
            mine.send(frame(EVERYBODY, VM_MAC, TEST))
            for destination in (LACP, LLDP):
                far.send(frame(destination, FAR_MAC, TEST))
            assert len(of(FAR_MAC, heard(mine))) == 2  # they have arrived
            assert not listener.heard()
            far.send(frame(EVERYBODY, FAR_MAC, TEST))
            heard(mine)
            assert listener.heard()
            assert not listener.heard()
        host.ip("link", "set", link, "down")
        assert not listener.heard()
        host.ip("link", "set", link, "up")
        wait_until(lambda: host.links()[link]["operstate"] == "UP")
        with taps(host, ("", FABRIC[GUEST])) as (far,):
            wait_until(lambda: far.send(frame(EVERYBODY, FAR_MAC, TEST)) and listener.heard())
        host.ip("link", "delete", link)
        with pytest.raises(OSError):
            listener.heard()
    finally:
        listener.close()


def test_a_listener_needs_a_link() -> None:
    with scratch() as name, inside(name), pytest.raises(OSError, match="No such device"):
        Listener("eth9")


# ------------------------------------------------------------------------------------------------------ with an agent

CABLES = ("mgmt0", "eth1.1204", "eth2.101")


def plugged(host: AgentHost, state: str) -> None:
    """Plug the cables of the host in, or pull them: ``up`` or ``down``."""
    for link in CABLES:
        host.run("ip", "link", "set", f"sw-{link}", state, pid=host.fabric)


def answered(host: AgentHost) -> bool:
    """Whether another host behind the guest VLAN gets an answer to an ARP request for the gateway."""
    with taps(host, ("", "sw-eth1.1204")) as (far,):
        far.send(arp_request(FAR_MAC, "10.10.1.6", "10.10.1.1"))
        return any(it[12:14] == b"\x08\x06" and it[20:22] == b"\0\2" for it in heard(far))


def test_a_fence_outlives_its_agent_and_the_next_one_asks_before_it_lifts_it() -> None:
    with agent_host() as host:
        host.start()
        live(host)
        wait_until(lambda: answered(host))
        plugged(host, "down")
        wait_until(lambda: fenced(host) == {"eth1.1204", "eth2.101"})
        told = message(act(host, "check"))
        assert "uplink eth1.1204 is fenced: this host hears nobody there" in told
        host.kill()
        plugged(host, "up")
        assert not answered(host)
        host.start()
        wait_until(lambda: answered(host))
        assert "fenced: an earlier agent was cut off" in host.log()
        wait_until(lambda: re.search("eth1.1204.* is fenced no longer: nobody else answers", host.log()))
        assert "eth1.1204" not in message(act(host, "check"))


def test_a_fence_that_somebody_deletes_is_back_at_once() -> None:
    with agent_host() as host:
        host.start()
        live(host)
        plugged(host, "down")
        wait_until(lambda: fenced(host) == {"eth1.1204", "eth2.101"})
        for harm in ("delete table bridge netloom_fence", "flush ruleset", "flush chain bridge netloom_fence inwards"):
            host.run("nft", harm)
            wait_until(lambda: fenced(host) == {"eth1.1204", "eth2.101"})


# ------------------------------------------------------------------------------------------------------ who is heard


class Ways:
    """Links with addresses of the host's own, each with another machine, and what the host hears of them."""

    def __init__(self, host: AgentHost, number: int) -> None:
        self._host = host
        self._outside = Outside(lambda scope_id, want: want)
        for at in range(number):
            host.add_vlan(f"way{at}")
            host.run("sysctl", "-qw", f"net/ipv6/conf/sw-way{at}/disable_ipv6=1", pid=host.fabric)
            host.ip("addr", "add", f"198.18.{at}.1/24", "dev", f"way{at}")
            host.ip("link", "set", f"way{at}", "up")
            host.run("ip", "addr", "add", f"198.18.{at}.2/24", "dev", f"sw-way{at}", pid=host.fabric)
        wait_until(lambda: all(host.links()[f"way{at}"]["operstate"] == "UP" for at in range(number)))
        with host.inside_host():
            self._outside.watch({})
        wait_until(lambda: not self("heard"))  # what the kernels sent when the links came up

    def __call__(self, asked: str) -> bool:
        with self._host.inside_host():
            return bool(getattr(self._outside, asked)())

    def frame_on(self, *ways: int) -> None:
        """Another machine sends a frame on each of these."""
        with taps(self._host, *[("", f"sw-way{at}") for at in ways]) as open_:
            for it in open_:
                it.send(frame(EVERYBODY, FAR_MAC, TEST))


@pytest.fixture
def ways(host: AgentHost) -> Ways:
    return Ways(host, 12)


def test_frames_on_ways_where_some_came_lately_are_heard_without_a_look_at_all(ways: Ways) -> None:
    ways.frame_on(11)
    assert not ways("heard_lately")  # of 13 ways it is the last one
    assert ways("heard")
    for _ in range(3):
        assert not ways("heard_lately")
        ways.frame_on(11)
        assert ways("heard_lately")
    assert not ways("heard")


@pytest.mark.mutation("an-old-counter-is-no-sign-of-life", instead="now != had")
def test_what_came_before_the_last_look_is_no_sign_of_life(ways: Ways) -> None:
    ways.frame_on(3, 5)
    assert ways("heard")
    ways.frame_on(3)
    assert ways("heard_lately")
    ways.frame_on(3, 5)
    assert ways("heard_lately")  # the first one tells, so the other counters are not read
    assert not ways("heard_lately")
    ways.frame_on(5)
    assert ways("heard_lately")


def test_neighbours_of_the_host_are_asked_and_answer(host: AgentHost, ways: Ways) -> None:
    for at in (2, 7):
        there = json.loads(host.run("ip", "-j", "link", "show", f"sw-way{at}", pid=host.fabric))[0]["address"]
        host.ip("neigh", "replace", f"198.18.{at}.2", "lladdr", there, "dev", f"way{at}")
    assert not ways("heard")
    assert ways("call_neighbours")
    wait_until(lambda: ways("heard"))
