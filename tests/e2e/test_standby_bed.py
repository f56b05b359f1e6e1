"""The bed for take-overs shows who answers and which flows go on, and its faults are what they are called."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bed import faults
from bed.crafted import PORT as CRAFTED_PORT
from bed.crafted import crafted_flows
from bed.lab import Cut, Direction
from bed.machines import until
from bed.observer import gap, never_two, outage
from bed.standby import FORWARDED_PORT, GATEWAY, OUTSIDE, SOURCE_NAT, STATIC_NAT, TCP_KINDS, StandbyBed, standby_bed
from e2e.networks import impatient
from netloom.standbywire import PORT


@pytest.fixture(scope="module")
def the_bed() -> Iterator[StandbyBed]:
    with standby_bed() as it:
        yield it


@pytest.fixture
def it(the_bed: StandbyBed) -> Iterator[StandbyBed]:
    yield the_bed
    the_bed.settle()


def archive(it: StandbyBed) -> list[str]:
    """Write an archive of the network; the options that name it."""
    it.bed.management.write("/root/archive-password", "a password of the archive\n", mode=0o600)
    password = ["--archive-password-file", "/root/archive-password"]
    it.operator.run("export", "/root/backup", it.scope, *password, hosts=it.candidates)
    return ["--state", "/root/backup", *password]


# --- the observer


def test_all_flows_survive_a_move_and_two_hosts_never_answer(it: StandbyBed) -> None:
    old, new = it.active, it.passive[0]
    with it.observer() as observer, it.flows(each=20, udp=2, over6=2) as flows:
        flows.wait_open()
        time.sleep(2.5)  # UDP flows are assured then
        it.serve_on(new)
        observer.wait_for(new)
        assert flows.go_on(), flows.story()
        assert flows.disordered() == 0
        assert all(it.answers > 5 for it in flows.seen())
    never_two(observer, old, new)
    assert observer.turns()[-1].host == new.name
    assert outage(observer) < 2
    assert gap(observer, observer.turns()[0].first) >= outage(observer)


@pytest.mark.long
def test_a_network_that_comes_back_has_three_turns(it: StandbyBed) -> None:
    here, there = it.active, it.passive[0]
    with it.observer() as observer:
        observer.wait_for(here)
        it.serve_on(there)
        observer.wait_for(there)
        it.serve_on(here)
        observer.wait_for(here)
    never_two(observer, here, there, here)
    with pytest.raises(AssertionError, match="two hosts answered in turn"):
        never_two(observer)


def test_the_observer_sees_two_hosts_that_answer(it: StandbyBed) -> None:
    """The operator says that a host is fenced, and it is not: both gates are open."""
    old, new = it.active, it.passive[0]
    backup = archive(it)
    with it.observer() as observer:
        old.separate([*(host for host in it.bed.hosts if host is not old), it.internet, it.bed.management])
        told = it.operator.run("evacuate", old.address, "--fenced", *backup, hosts=it.candidates)
        assert told.status == 0
        assert until(lambda: len(observer.serving()) == 2), observer.story()
        (new,) = [host for host in it.candidates if host.name in observer.serving() and host is not old]
        assert {each.address for each in observer.answers(host=old)} == set(observer.addresses)
    with pytest.raises(AssertionError, match=rf"(?s)not \['{old.name}', '{new.name}'\].*{old.name}  1?\d answers"):
        never_two(observer, old, new)
    old.heal()
    with impatient(it.cloud, timeout_s=25):  # of which the silent connection to the dead host takes 15
        assert until(lambda: it.network.ensure().ok and it.active is new)
    it.operator.run("undrain", old.address, hosts=it.candidates)


@pytest.mark.long
def test_nobody_notices_the_observer(it: StandbyBed) -> None:
    """Neither the switch nor a neighbour table has its address."""
    with it.observer() as observer:
        observer.wait_for(it.active)
        observed = "02:4c:0b:5e:"
        assert observed not in it.bed.fabric.run("bridge", "fdb", "show").out
        with it.active.within(it.network.namespace) as namespace:
            assert observed not in namespace.run("ip", "-4", "neigh", "show").out
        assert observed not in it.internet.run("ip", "neigh", "show").out


# --- faults


def test_a_power_cut_ends_everything_at_once(it: StandbyBed) -> None:
    """No process of the host says goodbye: a peer with an open connection hears nothing."""
    old = it.active
    backup = archive(it)
    old.write("/tmp/serve.py", "import socket; s = socket.create_server(('', 7999)); s.accept()[0].recv(1); s.accept()")
    old.sh("python3 /tmp/serve.py </dev/null >/dev/null 2>&1 &")
    connected = (
        "import socket, sys, time\n"
        "def ask():\n"
        "    for _ in range(100):\n"
        "        try: return socket.create_connection((sys.argv[1], 7999))\n"
        "        except ConnectionRefusedError: time.sleep(0.05)\n"
        "it = ask(); it.settimeout(2)\n"
        "open('/tmp/connected', 'w').close()\n"
        "try: print('heard', it.recv(1))\n"
        "except TimeoutError: print('silence')\n"
    )
    peer = it.passive[0]
    peer.write("/tmp/ask.py", connected)
    with it.observer() as observer, it.flows(each=10) as flows:
        flows.wait_open()
        asking = peer.client.start("run", dict, argv=["python3", "/tmp/ask.py", old.address])
        assert until(lambda: "connected" in peer.listing("/tmp"))
        old.power_cut()
        cut = time.monotonic()
        assert asking.result()["out"] == "silence\n"
        assert all(each.at <= cut for each in observer.answers(host=old))
        assert not flows.go_on(seconds=0.5)
        it.operator.run("evacuate", old.address, *backup, hosts=it.candidates)
        assert until(lambda: observer.serving() != set())
        # Flows through static NAT go on without a copy of them, if they speak first (tcp_loose); others may not.
        assert observer.serving().isdisjoint({old.name})
    never_two(observer)
    with impatient(it.cloud, timeout_s=25):  # of which the silent connection to the dead host takes 15
        sent = it.network.ensure()
    assert sent.ok, sent.output
    faults.boot(old)
    it.operator.run("undrain", old.address, hosts=it.candidates)


@pytest.mark.long
@pytest.mark.parametrize("what", ["the agent", "all"])
def test_the_kernel_of_a_frozen_host_goes_on(it: StandbyBed, what: faults.What) -> None:
    host = it.active
    with it.observer(over6=False) as observer, it.flows(each=3) as flows:
        flows.wait_open()
        with faults.frozen(host, what):
            states = {pid: stat(pid) for pid in faults.agents_of(host)}
            assert set(states.values()) == {"T"}
            assert flows.go_on(), flows.story()
            assert observer.serving() == {host.name}
        assert until(lambda: {stat(pid) for pid in faults.agents_of(host)} == {"S"})
        assert it.network.ensure().ok
    never_two(observer, host)


def stat(pid: int) -> str:
    """The state of a process, as proc(5) has it: S is asleep, T is stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.long
def test_an_agent_is_killed_and_started(it: StandbyBed) -> None:
    host = it.active
    (before,) = faults.agents_of(host)
    faults.kill_agent(host)
    assert faults.agents_of(host) == []
    faults.start_agent(host)
    (after,) = faults.agents_of(host)
    assert before != after
    assert it.network.ensure().ok


CUTS: list[tuple[Cut, Direction, bool, bool, bool]] = [
    # What is cut, which way; then whether a ping answers over management, the guests' VLAN, the public VLAN.
    ("mgmt", "both", False, True, True),
    ("vlan", "both", True, False, True),
    ("public", "both", True, True, False),
    ("guest", "both", True, False, False),
    ("all", "from", False, False, False),
    ("all", "to", False, False, False),
    ("all", "both", False, False, False),
]


@pytest.mark.long
@pytest.mark.parametrize(("what", "direction", "mgmt", "vlan", "public"), CUTS)
def test_a_partition_cuts_what_it_says(
    it: StandbyBed, what: Cut, direction: Direction, mgmt: bool, vlan: bool, public: bool
) -> None:
    """The observer asks on the host's own wires, so it hears the host all the time."""
    host = it.active

    def reached(yes: bool) -> dict[str, float]:
        return {"timeout_s": 20 if yes else 0.3}

    with it.observer() as observer:
        host.partition(what, direction)
        assert it.bed.management.ping(host.address, **reached(mgmt)).ok == mgmt
        assert it.vm.ping(GATEWAY, **reached(vlan)).ok == vlan
        assert (it.internet.who_has(SOURCE_NAT, timeout_s=0.5) != []) == public
        assert observer.serving() == {host.name}
        host.heal()
        assert it.bed.management.ping(host.address).ok
        assert it.vm.ping(GATEWAY).ok


@pytest.mark.long
@pytest.mark.parametrize("direction", ["from", "to"])
def test_a_cut_in_one_direction_leaves_the_other_one(it: StandbyBed, direction: Direction) -> None:
    host, other = it.candidates[:2]
    with host.serve_udp(PORT) as service:
        assert other.udp(host.address, PORT).ok
        host.partition("mgmt", direction)
        assert not other.udp(host.address, PORT, timeout_s=0.5).ok
        assert service.received() == (2 if direction == "from" else 1), "datagrams to the host"
        host.heal()
        assert other.udp(host.address, PORT).ok


# --- the network of the bed


def test_hosts_reach_each_other_over_the_management_network(it: StandbyBed) -> None:
    """Agents of a group talk on this port."""
    for host in it.candidates:
        with host.serve_tcp(PORT), host.serve_udp(PORT):
            for other in it.candidates:
                if other is not host:
                    assert other.tcp(host.address, PORT).saw == other.address
                    assert other.udp(host.address, PORT).saw == other.address


def test_the_three_kinds_of_flow_take_their_ways(it: StandbyBed) -> None:
    with it.vm.serve_tcp(22), it.internet.serve_tcp(80):
        assert it.vm.tcp(OUTSIDE, 80).saw == STATIC_NAT, "static NAT is the VM's way out"
        assert it.second_vm.tcp(OUTSIDE, 80).saw == SOURCE_NAT


@pytest.mark.long
def test_six_hundred_flows_and_one_more_each_millisecond(it: StandbyBed) -> None:
    with it.flows(200, it.opening(count=1000), every_s=1.0) as flows:
        assert until(lambda: sum(each.last > 0 for each in flows.seen() if each.kind in TCP_KINDS) == 600)
        halted = flows.open_no_more()
        assert len([each for each in flows.seen() if 0 < each.opened < halted]) > 700
        assert flows.go_on(opened_before=halted), flows.story()
        assert flows.disordered() == 0


def test_a_flow_that_ends_is_reported(it: StandbyBed) -> None:
    """The rule of the forwarded port is deleted: its connections are reset, and the others go on."""
    (forward,) = it.network.port_forwards
    with it.flows(each=2) as flows:
        flows.wait_open()
        it.network.delete_port_forward(forward)
        assert not flows.go_on(seconds=20)
        stuck = flows.stuck(time.monotonic() - 1)
        assert {each.kind for each in stuck} == {"port forward"} and len(stuck) == 2, flows.story()
    it.network.add_port_forward(forward.address, FORWARDED_PORT, it.nics[0], 22, open_firewall=False)


@pytest.mark.long
def test_crafted_flows_are_assured_in_the_network(it: StandbyBed) -> None:
    with (
        crafted_flows(
            it.internet, it.vm, STATIC_NAT, it.vm.ip, gateway=GATEWAY, per_s=2000, seconds=1, stays=True
        ) as running,
        it.active.within(it.network.namespace) as namespace,
    ):
        made = running.result()
        listed = namespace.run("conntrack", "-L", "-p", "tcp", "--dport", str(CRAFTED_PORT)).out.splitlines()
    assert made > 1000
    assert len([line for line in listed if "ESTABLISHED" in line and "ASSURED" in line]) == made


@pytest.mark.long
def test_a_host_reboots_and_the_observer_hears_it_again(it: StandbyBed) -> None:
    """No other host serves meanwhile. The kernel's state is gone, the file with the network's state is not."""
    host = it.active
    state = it.state(host)
    with it.observer(over6=False) as observer:
        observer.wait_for(host)
        faults.reboot(host)
        assert it.network.namespace not in host.listing("/run/netns")
        assert it.state(host) == state
        observer.wait_for(host, seconds=60)
    never_two(observer, host)
    assert gap(observer, observer.turns()[0].first) > 0.1
