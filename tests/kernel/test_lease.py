"""Leases: frames pass the ports of a scope only while its group's lease lives, and the kernel ends it by itself."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator, Sequence

import pytest

from kernel.agent_host import AgentHost, agent_host, wait_until
from kernel.gated_agent import MARK, GatedAgent, gated_agent
from kernel.gated_frames import (
    ADDRESS,
    BRIDGES,
    ENDS,
    EVERYBODY,
    FABRIC,
    FAR_MAC,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    LACP,
    LOGIN,
    NS,
    PORTS,
    PUBLIC,
    PUBLIC_MAC,
    TEST,
    VM_MAC,
    Stream,
    Traffic,
    frame,
    heard,
    learned,
    of,
    sent_numbers,
    taps,
)
from kernel.scratch import scratch, tool
from netloom.agent.host import lease
from netloom.agent.host.link_table import FAMILY
from netloom.agent.kernel import netlink, nft_netlink
from netloom.agent.kernel.netlink import Message, Socket
from netloom.ethernet import ETHERTYPE, MAGIC
from netns import inside

OTHER = MARK + 1
LONG_S = 60.0
_SO_RCVBUFFORCE = 33  # not in the socket module of Python 3.11


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1520", "eth1.101") as it:
        yield it


@pytest.fixture
def agent(host: AgentHost) -> Iterator[GatedAgent]:
    with gated_agent(host) as it:
        yield it


def up(host: AgentHost) -> None:
    wait_until(lambda: all(host.links()[it]["operstate"] == "UP" for it in ENDS))


def renew(agent: GatedAgent, life_s: float = LONG_S, mark: int = MARK) -> float:
    """Renew the lease; returns when it ends, ``time.monotonic``."""
    at = time.monotonic()
    assert agent(f"renew {mark} {life_s} {at!r}") is True
    return at + life_s


# ------------------------------------------------------------------------------------------------------ on a host


@pytest.mark.mutation("without-a-lease-nothing-comes-in", instead='("accept",)')
def test_no_frame_passes_without_a_lease_and_all_pass_with_it(host: AgentHost, agent: GatedAgent) -> None:
    with taps(host, ("", FABRIC[GUEST]), ("", FABRIC[PUBLIC])) as fabric:
        agent("converge leased")
        host.plug("vm", BRIDGES[GUEST], VM_MAC)
        up(host)
        traffic = Traffic(host)
        assert traffic.none, (traffic.out, traffic.into)
        assert not any(learned(host, link) for link in PORTS)
        # Nor has any passed since before the ports existed.
        assert not [it for tap in fabric for it in heard(tap) if it[6:12].hex(":") in PORTS.values()]
    renew(agent)
    traffic = Traffic(host)
    assert traffic.kinds("wire") >= {"0806", "0800", "88b6", "86dd"}
    assert traffic.kinds("public wire") >= {"0806", "0800", "88b6"}
    assert traffic.kinds("vm") >= {"0806", "88b6"}
    assert all(len(it) >= 4 for it in traffic.into.values())
    assert all(learned(host, link) for link in PORTS)
    agent(f"end {MARK}")
    assert Traffic(host).none


@pytest.mark.mutation("without-a-lease-a-port-emits-nothing", instead='("accept",)')
def test_a_lease_begins_and_ends_between_two_frames(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine):
        with Stream(mine) as stream:
            for _ in range(5):
                stream.pass_on()
                renew(agent)
                stream.pass_on()
                agent(f"end {MARK}")
                ended_at = stream.sent
            stream.pass_on()
        numbers = sent_numbers(heard(far))
    runs = sum(it != number + 1 for it, number in zip(numbers[1:], numbers, strict=False)) + 1
    assert runs == 5, numbers
    # The sender counts a frame after the bridge has it.
    assert numbers[-1] <= ended_at


def test_a_lease_ends_by_itself_while_the_agent_is_stopped(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine), Stream(mine) as stream:
        for life_s in (0.5, 0.2, 1.0):
            first = stream.sent
            end = renew(agent, life_s)
            agent.stopped(signal.SIGSTOP)
            wait_until(lambda first=first, end=end: stream.sent > first and stream.sent_at[-1] > end + 0.1)
            stream.pass_on()
            agent.stopped(signal.SIGCONT)
            numbers = sent_numbers(heard(far))
            assert numbers
            assert stream.sent_at[numbers[-1]] < end
            assert agent("alive") == {}


def test_renewals_lose_no_frame(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    renew(agent)
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine):
        far.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        with Stream(mine) as stream:
            for _ in range(300):
                renew(agent)
        assert sent_numbers(heard(far)) == list(range(stream.sent))


@pytest.mark.mutation("reserved-addresses-pass-no-port", instead='("accept",)')
def test_a_bridge_learns_nothing_from_frames_to_reserved_addresses(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    with taps(host, (NS, PUBLIC)) as (mine,):
        mine.send(frame(LACP, PUBLIC_MAC, LOGIN))
        assert not learned(host, PUBLIC)
        renew(agent)
        mine.send(frame(LACP, PUBLIC_MAC, LOGIN))
        assert learned(host, PUBLIC)


@pytest.mark.mutation("a-bridge-sends-nothing-without-a-lease", instead='("accept",)')
def test_spanning_tree_of_an_operators_bridge_stays_outside(host: AgentHost, agent: GatedAgent) -> None:
    bridge = BRIDGES[PUBLIC]
    host.ip("link", "add", bridge, "type", "bridge", "stp_state", "1", "forward_delay", "200", "hello_time", "100")
    host.ip("link", "set", "eth1.101", "master", bridge)
    host.ip("link", "set", bridge, "up")
    agent("converge leased")
    with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, inner):
        far.settimeout(20)
        seen = 0
        while seen < 3:  # the port of the scope has the same hello time
            seen += far.recv(2048)[:6].hex() == "0180c2000000"
        assert not [it for it in heard(inner) if it[:6].hex() == "0180c2000000"]


def sends(host: AgentHost) -> set[str]:
    """The ports of the scope that frames leave now."""
    with taps(host, ("", FABRIC[GUEST]), ("", FABRIC[PUBLIC]), (NS, GUEST), (NS, PUBLIC)) as (*far, guest, public):
        guest.send(frame(EVERYBODY, GUEST_MAC, TEST))
        public.send(frame(EVERYBODY, PUBLIC_MAC, TEST))
        return {link for (link, mac), tap in zip(PORTS.items(), far, strict=True) if of(mac, heard(tap))}


def test_groups_are_independent(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    agent(f"guard {ENDS[0]} {OTHER}")  # the guest port belongs to another group now
    assert agent("guarded") == {ENDS[0]: OTHER, ENDS[1]: MARK}
    assert sends(host) == set()
    renew(agent)
    assert sends(host) == {PUBLIC}
    renew(agent, mark=OTHER)
    assert sends(host) == {GUEST, PUBLIC}
    agent(f"end {MARK}")
    assert sends(host) == {GUEST}


def end_in(host: AgentHost, agent: GatedAgent, number: int) -> None:
    """Begin a lease, and end it in one of the two sets only."""
    agent("converge leased")
    up(host)
    renew(agent)
    assert sends(host) == {GUEST, PUBLIC}
    host.run("nft", "delete", "element", FAMILY, *lease.LIVES[number], f"{{ {MARK} }}")
    assert agent("alive") == {}


@pytest.mark.mutation("the-first-set-ends-a-lease", instead='"accept"')
def test_a_frame_passes_only_while_its_mark_is_in_the_first_set(host: AgentHost, agent: GatedAgent) -> None:
    end_in(host, agent, 0)
    assert sends(host) == set()


@pytest.mark.mutation("the-second-set-ends-a-lease", instead='"accept"')
def test_a_frame_passes_only_while_its_mark_is_in_the_second_set(host: AgentHost, agent: GatedAgent) -> None:
    end_in(host, agent, 1)
    assert sends(host) == set()


@pytest.mark.mutation("a-lease-leaves-no-mark", instead='"accept"')
def test_other_ports_and_the_marks_of_the_host_are_left_alone(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    host.plug("vm", BRIDGES[GUEST], VM_MAC)
    up(host)
    host.run(
        "nft",
        f"""
        table bridge theirs {{
            counter guest {{ }}
            counter marked {{ }}
            counter vm {{ }}
            chain first {{
                type filter hook prerouting priority -500;
                ether saddr {VM_MAC} meta mark set 5
            }}
            chain prerouting {{
                type filter hook prerouting priority -300;
                ether saddr {GUEST_MAC} ether type {TEST:#x} counter name guest
                ether saddr {GUEST_MAC} meta mark != 0 counter name marked
            }}
            chain postrouting {{
                type filter hook postrouting priority 300;
                oifname "eth1.1520" ether saddr {VM_MAC} ether type {TEST:#x} meta mark 5 counter name vm
                ether saddr {GUEST_MAC} meta mark != 0 counter name marked
            }}
        }}
        """,
    )
    for life_s, guests in ((0.0, 0), (LONG_S, 1)):
        if life_s:
            renew(agent, life_s)
        with taps(host, ("", FABRIC[GUEST]), ("vm", "eth0"), (NS, GUEST)) as (far, vm, guest):
            vm.send(frame(EVERYBODY, VM_MAC, TEST))
            far.send(frame(EVERYBODY, FAR_MAC, TEST))
            guest.send(frame(EVERYBODY, GUEST_MAC, TEST))
            assert len([it for it in of(VM_MAC, heard(far)) if it[12:14] == b"\x88\xb6"]) == 1
            assert len([it for it in of(FAR_MAC, heard(vm)) if it[12:14] == b"\x88\xb6"]) == 1
        assert packets(host, "guest") == guests
    assert packets(host, "vm") == 2
    assert packets(host, "marked") == 0


def packets(host: AgentHost, counter: str) -> int:
    return int(host.run("nft", "list", "counter", "bridge", "theirs", counter).partition("packets ")[2].split()[0])


# --------------------------------------------------------------------------------------------------------- converge


def test_one_plan_builds_releases_and_removes(host: AgentHost, agent: GatedAgent) -> None:
    leasing = f"let frames pass {', '.join(ENDS)} only with lease {MARK:08x}"
    releasing = f"let frames pass {', '.join(ENDS)} without a lease"
    built = agent("converge leased")
    assert built["steps"][0] == leasing
    assert agent("converge leased")["steps"] == []
    up(host)
    assert sends(host) == set()
    assert agent("converge") == {"steps": [releasing], "announce": [GATEWAY, ADDRESS]}
    assert "netloom_lease" not in host.run("nft", "list", "tables")
    assert sends(host) == {GUEST, PUBLIC}
    assert agent("converge")["steps"] == []
    assert agent("converge leased")["steps"] == [leasing]
    renew(agent)
    for harm in (
        "flush ruleset",
        "delete table bridge netloom_lease",
        "flush chain bridge netloom_lease postrouting",
        "flush chain bridge netloom_lease pass",
        "flush map bridge netloom_lease ports",
        f'delete element bridge netloom_lease ports {{ "{ENDS[0]}" }}',
        f'delete element bridge netloom_lease ports {{ "{ENDS[0]}" }}; '
        f'add element bridge netloom_lease ports {{ "{ENDS[0]}" : {OTHER} }}',
    ):
        host.run("nft", harm)
        assert agent("converge leased")["steps"][0].startswith("let frames pass")
        assert agent("guarded") == dict.fromkeys(ENDS, MARK)
        assert agent("converge leased")["steps"] == []
        if "table" in harm or "ruleset" in harm:
            assert agent("alive") == {}
            assert sends(host) == set()
            renew(agent)
        assert sends(host) == {GUEST, PUBLIC}
    removed = agent("converge gone")
    assert removed["steps"][-1] == releasing
    assert "netloom_lease" not in host.run("nft", "list", "tables")
    assert agent("tidy") == []


def test_a_port_with_a_gate_and_a_lease_needs_both(host: AgentHost, agent: GatedAgent) -> None:
    assert agent("converge gated leased")["announce"] == []
    up(host)
    assert sends(host) == set()
    renew(agent)
    assert sends(host) == set()
    agent("converge leased")
    assert sends(host) == {GUEST, PUBLIC}
    agent(f"end {MARK}")
    assert sends(host) == set()
    agent("converge gated leased")
    renew(agent)
    assert sends(host) == set()
    both = agent("converge")
    assert [it.split()[0] for it in both["steps"]] == ["let", "open"]
    assert both["announce"] == [GATEWAY, ADDRESS]
    assert sends(host) == {GUEST, PUBLIC}


def test_a_lease_holds_although_the_rest_cannot_be_done(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge")
    for link in ("eth1.101", "eth1"):
        host.ip("link", "del", link)
    assert "NIC eth1 does not exist" in agent("converge leased")["error"]
    assert agent("guarded") == dict.fromkeys(ENDS, MARK)


def test_a_tidy_forgets_the_leases_of_links_that_are_gone(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    host.ip("link", "del", ENDS[0])
    agent("tidy")
    assert agent("guarded") == dict.fromkeys(ENDS, MARK)  # the scope wants it, and a repair makes the link again
    agent("converge gone")
    assert agent("guarded") == {ENDS[0]: MARK}
    assert f"let frames pass {ENDS[0]} without a lease" in agent("tidy")
    assert "netloom_lease" not in host.run("nft", "list", "tables")


@pytest.mark.mutation("no-lease-without-its-agent")
def test_an_uninstall_leaves_no_lease(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    with gated_agent(host) as another:  # it wants no lease, and the links exist
        another("uninstall")
    assert "netloom" not in host.run("nft", "list", "tables")


def test_a_start_neither_opens_nor_closes(host: AgentHost, agent: GatedAgent) -> None:
    agent("converge leased")
    up(host)
    end = renew(agent)
    with gated_agent(host) as another:
        assert another("tidy") == []
        assert another("converge leased")["steps"] == []
        left = another("alive")[str(MARK)]
        assert time.monotonic() - LONG_S < end - left <= time.monotonic() + 1
        assert sends(host) == {GUEST, PUBLIC}
        another(f"end {MARK}")
    with gated_agent(host) as another:
        assert another("converge leased")["steps"] == []
        assert sends(host) == set()


@pytest.mark.mutation("lost-leases-are-put-back")
def test_a_lease_table_that_somebody_flushes_is_back_at_once_without_a_life(host: AgentHost) -> None:
    with gated_agent(host, "ip6", "watch") as agent:
        agent("converge leased")
        up(host)
        with taps(host, ("", FABRIC[PUBLIC]), (NS, PUBLIC)) as (far, mine), Stream(mine) as stream:
            passed = 0
            for harm in ("flush ruleset", "delete table bridge netloom_lease", "flush map bridge netloom_lease ports"):
                host.run("nft", harm)
                wait_until(lambda: agent("guarded") == dict.fromkeys(ENDS, MARK))
                stream.pass_on()
                passed += len(sent_numbers(heard(far)))
                stream.pass_on()
                assert sent_numbers(heard(far)) == []
        assert passed < 1000  # of one each millisecond


# ------------------------------------------------------------------------------------------------ in one namespace


@pytest.fixture
def namespace() -> Iterator[str]:
    with scratch() as name, inside(name):
        yield name


def test_guarding_and_releasing_again_changes_nothing(namespace: str) -> None:
    lease.release(ENDS)
    lease.remove()
    lease.guard({})
    assert tool(namespace, "nft", "list", "ruleset") == ""
    lease.guard({ENDS[0]: 1, ENDS[1]: MARK})
    before = tool(namespace, "nft", "list", "ruleset")
    lease.guard({ENDS[0]: 1})
    lease.release(["vnetg7"])
    assert tool(namespace, "nft", "list", "ruleset") == before
    assert lease.guarded() == {ENDS[0]: 1, ENDS[1]: MARK}
    lease.guard(dict.fromkeys(ENDS, 2))
    assert lease.guarded() == dict.fromkeys(ENDS, 2)
    lease.release([*ENDS, "vnetg7"])
    lease.release(ENDS)
    assert tool(namespace, "nft", "list", "ruleset") == ""


def test_thousands_of_ports_of_hundreds_of_groups(namespace: str) -> None:
    every = {f"vnetg{number}": number % 300 + 1 for number in range(1, 5001)}
    lease.guard(dict(list(every.items())[:10]))
    lease.guard(every)
    assert lease.guarded() == every
    lives = dict.fromkeys(range(1, 301), LONG_S)
    assert lease.renew(lives)
    assert lease.alive().keys() == lives.keys()
    lease.guard(dict.fromkeys(every, MARK))
    assert set(lease.guarded().values()) == {MARK}


def test_without_a_table_nothing_is_renewed_or_ended(namespace: str) -> None:
    assert not lease.renew({MARK: LONG_S})
    assert not lease.end([MARK])
    assert lease.alive() == {}
    assert lease.guarded() == {}
    assert tool(namespace, "nft", "list", "ruleset") == ""


def test_a_renewal_lengthens_and_shortens_a_life_and_begins_it_anew(namespace: str) -> None:
    lease.guard({"a": 1, "b": 2})
    for life_s in (10.0, 100.0, 5.0):
        assert lease.renew({1: life_s})
        assert life_s - 5 < lease.alive()[1] < life_s
    assert lease.renew({2: 50.0})
    assert lease.alive().keys() == {1, 2}
    assert lease.alive()[1] < 5
    for _ in range(3):
        lease.renew({1: 0.03})
        wait_until(lambda: lease.alive().keys() == {2})
    lease.renew({1: 10.0, 2: 0.0})
    assert lease.alive().keys() == {1}
    lease.renew({1: 10.0}, time.monotonic() - 10)
    assert lease.alive() == {}
    lease.end([1, 2, 3])
    lease.renew({1: 10.0})
    lease.end([2, 3])
    assert lease.alive().keys() == {1}
    lease.end([1])
    assert lease.alive() == {}


def test_expired_elements_are_replaced_before_the_kernel_has_removed_them(namespace: str) -> None:
    """Without a look at the set: that would remove them."""
    lease.guard({"a": 1})
    for _ in range(20):
        begun = time.monotonic()
        assert lease.renew({1: 0.025})
        while time.monotonic() < begun + 0.026:
            pass
        assert lease.renew({1: 0.025})


@pytest.mark.mutation("a-late-renewal-is-written-again", instead="True")
@pytest.mark.parametrize("slow", [(0,), (1,), (0, 1), (0, 2), (1, 2), (0, 1, 2, 3)])
def test_a_life_ends_in_time_although_the_agent_was_stopped_while_it_renewed(
    namespace: str, monkeypatch: pytest.MonkeyPatch, slow: Sequence[int]
) -> None:
    """The agent is late by more than the former life before its ``slow``-th changes, as after a SIGSTOP."""
    lease.guard({"a": 1})
    change, allowed, calls = nft_netlink.change, 0.0, 0

    def late(nfnetlink: Socket, messages: Sequence[Message]) -> None:
        nonlocal calls
        if calls in slow:
            time.sleep(0.15)
        calls += 1
        change(nfnetlink, messages)
        assert left(time.monotonic()) <= allowed

    def left(now: float) -> float:
        """When the lease ends at the earliest, if it lives."""
        with Socket(netlink.NETLINK_NETFILTER) as own:
            one, other = (nft_netlink.lives(own, FAMILY, *it) for it in lease.LIVES)
        return now + min(one[1], other[1]) / 1000 if 1 in one and 1 in other else 0.0

    monkeypatch.setattr(nft_netlink, "change", late)
    end = 0.0
    for life_s in (0.1, 0.4, 0.2):
        at = time.monotonic()
        allowed, calls = max(at + life_s, end), 0
        end = at + life_s
        lease.renew({1: life_s}, at)
        assert left(time.monotonic()) <= end


# ------------------------------------------------------------------------------------------------- heartbeats and VMs


def frames_between(name: str, kind: int, body: bytes) -> int:
    """How many of these frames reach ``vm-b`` when ``vm-a`` sends one, and then an ordinary one.

    Both are VMs of one bridge.
    """
    with inside(name):
        taken = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with taken, sender:
        taken.bind(("vm-b", 3))
        sender.bind(("vm-a", 0))
        taken.settimeout(10)
        sender.send(frame(EVERYBODY, VM_MAC, kind, body))
        sender.send(frame(EVERYBODY, VM_MAC, 0x88B6, b"the end"))
        seen = 0
        while b"the end" not in (received := taken.recv(2000)):
            seen += body in received
        return seen


@pytest.mark.mutation("vms-hear-no-heartbeats", instead="()")
def test_a_bridge_passes_no_heartbeats_on_a_host_of_a_group() -> None:
    with scratch() as name:
        tool(name, "ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        for vm in ("vm-a", "vm-b"):
            tool(name, "ip", "link", "add", vm, "type", "veth", "peer", "name", f"tap-{vm}")
            tool(name, "ip", "link", "set", f"tap-{vm}", "master", "br0", "up")
            tool(name, "ip", "link", "set", vm, "up")
        tool(name, "ip", "link", "set", "br0", "up")
        wait_until(lambda: tool(name, "bridge", "link").count("state forwarding") == 2)
        heartbeat = MAGIC + b"\2\1"
        assert frames_between(name, ETHERTYPE, heartbeat) == 1
        with inside(name):
            lease.hide_heartbeats(True)
        assert frames_between(name, ETHERTYPE, heartbeat) == 0
        assert frames_between(name, ETHERTYPE, b"of somebody else") == 1
        assert frames_between(name, 0x88B7, heartbeat) == 1
        with inside(name):
            lease.hide_heartbeats(False)
        assert frames_between(name, ETHERTYPE, heartbeat) == 1
        assert "netloom_lease" not in tool(name, "nft", "list", "tables")
