"""A network survives its host: take-overs with connections, and never two hosts that answer.

Each scenario is watched at every host and on both sides, each 5 ms (bed/observer.py), while TCP connections through
source NAT, static NAT and a forwarded port go on. The pages about standby hosts name these tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bed import faults
from bed.flows import FlowKind, Flows
from bed.lab import Cut, Direction, Host
from bed.machines import Machine, until
from bed.observer import Observer, never_two, outage
from bed.standby import FORWARDED, GATEWAY, PUBLIC_VLAN, STATIC_NAT, VLAN, StandbyBed, standby_bed
from e2e.commands import amid, commands, ready, with_commands
from e2e.networks import impatient
from e2e.takeovers import LEASE_S, TAKES_OVER_WITHIN_S, returns_as_standby, watched
from meanwhile import meanwhile
from netloom.ethernet import ETHERTYPE

HAND_OVER_WITHIN_S = 1.0
# The management server's connection to a dead host breaks after four seconds, and a new one gets no answer for longer.
FOLLOWS_WITHIN_S = 6.0


@pytest.fixture(scope="module")
def the_bed() -> Iterator[StandbyBed]:
    with standby_bed(details={"standby": "auto"}) as it:
        yield it


@pytest.fixture
def it(the_bed: StandbyBed, request: pytest.FixtureRequest) -> Iterator[StandbyBed]:
    with ready(the_bed, request) as it:
        yield it


Record = Callable[[str, object], None]


# --- power cuts


def power_cut_with_everything(it: StandbyBed) -> float:
    """600 connections and one more each millisecond until the cut; returns the outage."""
    with watched(it, "active", "standby", each=200, more=[it.opening(count=4000)]) as watch:
        halted = watch.flows.open_no_more()
        watch.active.power_cut()
        watch.observer.wait_for(watch.standby)
        # What was opened in the last moments may be lost: a reset, or a retry, and no connection that hangs.
        assert watch.flows.go_on(opened_before=halted - 0.05), watch.flows.story()
        outage_s = outage(watch.observer)
        assert watch.standby.name in watch.observer.serving()
        faults.boot(watch.active)
        returns_as_standby(it, watch.active, watch.standby)
    return outage_s


@pytest.mark.binary
def test_all_connections_survive_a_power_cut(it: StandbyBed, record_testsuite_property: Record) -> None:
    outage_s = power_cut_with_everything(it)
    record_testsuite_property("outage_s", round(outage_s, 3))
    assert outage_s < TAKES_OVER_WITHIN_S


@pytest.mark.long
def test_twenty_power_cuts(it: StandbyBed, record_testsuite_property: Record) -> None:
    """The hosts take turns: each is the active one ten times."""
    outages = []
    for _ in range(20):
        it.make_ready()
        outages.append(power_cut_with_everything(it))
    record_testsuite_property("outages_s", [round(each, 3) for each in outages])
    assert max(outages) < TAKES_OVER_WITHIN_S


def test_cloudstacks_next_command_follows_the_network(it: StandbyBed, record_testsuite_property: Record) -> None:
    """The helper's connection to the dead host is still open. The first command comes before the take-over."""
    active, standby = it.active, it.standby
    with watched(it, "active", "standby") as watch, impatient(it.cloud, timeout_s=25):
        active.power_cut()
        began = time.monotonic()
        rule = it.network.add_firewall_rule(it.network.addresses[0], "tcp", 443)
        command_s = time.monotonic() - began
        watch.takes_over(standby)
        assert not it.network.failures
        began = time.monotonic()
        assert it.network.ensure().ok
        ensure_s = time.monotonic() - began
        assert it.active is standby
        assert it.network.details["epoch"] > 0
        it.network.delete_firewall_rule(rule)
    record_testsuite_property("seconds", [round(command_s, 2), round(ensure_s, 2)])
    assert command_s < FOLLOWS_WITHIN_S + TAKES_OVER_WITHIN_S
    assert ensure_s < FOLLOWS_WITHIN_S


# --- frozen and killed


@pytest.mark.parametrize("what", ["all", pytest.param("the agent", marks=pytest.mark.long)])
@with_commands
def test_a_frozen_host_falls_silent_before_the_standby_serves(it: StandbyBed, what: faults.What) -> None:
    """The kernel of a frozen host goes on; its lease ends by itself. Thawed, the host notices and stands by."""
    with watched(it, "active", "standby") as watch:
        with faults.frozen(watch.active, what):
            watch.takes_over(watch.standby)
        watch.goes_on(watch.standby)
        returns_as_standby(it, watch.active, watch.standby)


@pytest.mark.parametrize("pause_s", [0.3, pytest.param(0.0, marks=pytest.mark.long)])
@with_commands
def test_an_agent_that_is_back_within_the_lease_goes_on(it: StandbyBed, pause_s: float) -> None:
    """The test is repeated when the machine was too busy to start the agent so soon."""
    assert any(_goes_on_after_a_restart(it, pause_s) for _ in range(3))


def _goes_on_after_a_restart(it: StandbyBed, pause_s: float) -> bool:
    assert until(it.is_ready, seconds=90)
    with watched(it) as watch:
        if not watch.restarted_in_time(watch.active, pause_s):
            return False
        watch.goes_on(watch.active)
        never_two(watch.observer, watch.active)
    return True


@with_commands
def test_an_agent_that_is_back_too_late_stands_by(it: StandbyBed) -> None:
    with watched(it, "active", "standby") as watch:
        watch.active.separate([it.bed.management])  # a command would start the agent
        faults.kill_agent(watch.active)
        time.sleep(1.5 * LEASE_S)
        faults.start_agent(watch.active)
        watch.active.heal()
        watch.takes_over(watch.standby)
        returns_as_standby(it, watch.active, watch.standby)


@pytest.mark.parametrize("member", ["standby", pytest.param("witness", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "fault",
    [
        Host.power_cut,
        pytest.param(faults.kill_agent, marks=pytest.mark.long),
        pytest.param(faults.freeze, marks=pytest.mark.long),
    ],
    ids=["power", "kill", "freeze"],
)
@with_commands
def test_nothing_happens_while_one_of_the_others_is_dead(
    it: StandbyBed, member: str, fault: Callable[[Host], object]
) -> None:
    with watched(it, "active") as watch:
        fault(getattr(watch, member))
        watch.goes_on(watch.active)


@with_commands
def test_an_active_host_without_both_others_stops(it: StandbyBed) -> None:
    """Nobody acknowledges it, and it cannot tell that from being cut off. It serves again when one of them is back."""
    with watched(it, "active", each=1, udp=0, over6=0) as watch:
        watch.standby.power_cut()
        watch.witness.power_cut()
        watch.stops(watch.active)
        faults.boot(watch.witness)
        watch.observer.wait_for(watch.active, seconds=60)
        assert watch.flows.go_on(), watch.flows.story()


@pytest.mark.long
@with_commands
def test_an_agent_that_is_killed_while_its_standby_is_dead_serves_again(it: StandbyBed) -> None:
    """Nobody else may serve meanwhile: the witness has no state."""
    with watched(it, "active", each=1, udp=0, over6=0) as watch:
        watch.standby.power_cut()
        watch.active.separate([it.bed.management])  # a command would start the agent
        faults.kill_agent(watch.active)
        assert until(lambda: watch.observer.serving() == set())
        faults.start_agent(watch.active)
        watch.active.heal()
        watch.observer.wait_for(watch.active)
        assert watch.flows.go_on(), watch.flows.story()


# --- partitions

# Who is cut off from what, which way; whether the standby takes over.
PARTITIONS: list[tuple[str, Cut, Direction, bool]] = [
    ("active", "mgmt", "both", False),  # heartbeats go on over the VLAN
    ("active", "vlan", "both", True),  # the active host gives its turn away
    ("active", "all", "to", True),  # it is heard, and hears nobody: no acknowledgement reaches it
]
MORE_PARTITIONS: list[tuple[str, Cut, Direction, bool]] = [
    ("active", "mgmt", "from", False),
    ("active", "mgmt", "to", False),
    ("active", "vlan", "from", True),
    ("active", "vlan", "to", True),
    ("active", "public", "both", True),
    ("active", "guest", "both", True),
    ("active", "all", "both", True),
    ("active", "all", "from", True),  # it hears, and nobody hears it
    ("standby", "mgmt", "both", False),
    ("standby", "vlan", "both", False),
    ("standby", "all", "both", False),
    ("standby", "all", "from", False),
    ("standby", "all", "to", False),
    ("witness", "all", "both", False),
    ("witness", "all", "from", False),
    ("witness", "all", "to", False),
]


@pytest.mark.parametrize(
    ("member", "what", "direction", "moves"),
    [*PARTITIONS, *(pytest.param(*it, marks=pytest.mark.long) for it in MORE_PARTITIONS)],
)
@with_commands
def test_a_partition_and_its_healing(it: StandbyBed, member: str, what: Cut, direction: Direction, moves: bool) -> None:
    turns = ["active", "standby"] if moves else ["active"]
    with watched(it, *turns) as watch:
        cut_off: Host = getattr(watch, member)
        cut_off.partition(what, direction)
        if moves:
            watch.takes_over(watch.standby)
        else:
            watch.goes_on(watch.active)
        cut_off.heal()
        serving = watch.standby if moves else watch.active
        watch.goes_on(serving)
        if moves:
            returns_as_standby(it, watch.active, watch.standby)


@contextmanager
def unplugged(it: StandbyBed, host: Host, nic: str, vlan: int) -> Iterator[None]:
    """The host's link to a VLAN has no carrier."""
    port = host.port(nic, vlan)
    it.bed.fabric.links(f"link set {port} down")
    try:
        yield
    finally:
        it.bed.fabric.links(f"link set {port} up")


@pytest.mark.parametrize(
    ("nic", "vlan"),
    [
        pytest.param("eth1", VLAN, id="guests"),
        pytest.param("eth2", PUBLIC_VLAN, id="public", marks=pytest.mark.long),
    ],
)
@with_commands
def test_an_active_host_that_loses_a_carrier_gives_its_turn_away_at_once(
    it: StandbyBed, nic: str, vlan: int, record_testsuite_property: Record
) -> None:
    with watched(it, "active", "standby") as watch:
        cut = time.monotonic()
        with unplugged(it, watch.active, nic, vlan):
            outage_s = watch.takes_over(watch.standby)
            first = min(each.at for each in watch.observer.answers(since=cut) if each.host == watch.standby.name)
            record_testsuite_property(f"no_carrier_{nic}_s", [round(each, 3) for each in (first - cut, outage_s)])
        watch.goes_on(watch.standby)
        returns_as_standby(it, watch.active, watch.standby)


@pytest.mark.long
@with_commands
def test_a_standby_that_loses_a_carrier_changes_nothing(it: StandbyBed) -> None:
    with watched(it, "active") as watch:
        with unplugged(it, watch.standby, "eth1", VLAN):
            watch.goes_on(watch.active)
        watch.goes_on(watch.active)
    assert until(it.is_ready, seconds=60), it.shown()


@pytest.mark.long
@with_commands
def test_active_host_and_standby_do_not_hear_each_other(it: StandbyBed) -> None:
    """The witness hears both. It has promised the active host, so the standby gets no vote."""
    with watched(it, "active") as watch:
        watch.standby.separate([watch.active])
        watch.goes_on(watch.active)
        watch.standby.heal()
        watch.goes_on(watch.active)


@pytest.mark.long
@with_commands
def test_active_host_and_witness_are_cut_off_together(it: StandbyBed) -> None:
    """The standby is alone and gets no vote, so the active host serves those who reach it."""
    with watched(it, "active") as watch:
        for host in (watch.active, watch.witness):
            host.separate([watch.standby])
        watch.goes_on(watch.active)


def serving_alone(it: StandbyBed, observer: Observer) -> Host:
    """Wait until one host serves; returns it."""
    found: set[str] = set()

    def one() -> bool:
        found.clear()
        found.update(observer.serving())
        return len(found) == 1

    assert until(one), observer.story()
    return next(host for host in it.candidates if host.name in found)


@pytest.mark.long
@with_commands
def test_a_link_that_comes_and_goes(it: StandbyBed) -> None:
    """The active host is cut off again and again, for less and for more than its lease. There are never two."""
    with it.observer() as observer, amid(it):
        for pause_s in (0.2, 0.5, 0.9, 1.0, 1.1, 1.3, 2.0):
            active = serving_alone(it, observer)
            active.partition("all")
            time.sleep(pause_s * LEASE_S)
            active.heal()
            # A host whose lease had not ended may give way to a standby that was about to take over.
            time.sleep(LEASE_S)
        serving_alone(it, observer)
    # Hosts may come back here; each turn ends before the next one begins, so there are few.
    assert len(observer.turns()) <= 8, observer.story()


# --- reboots of both


@pytest.mark.parametrize("order", [("active", "standby"), pytest.param(("standby", "active"), marks=pytest.mark.long)])
@with_commands
def test_both_hosts_reboot(it: StandbyBed, order: tuple[str, str]) -> None:
    """The one that served last serves again, whichever is back first. Connections start anew."""
    with watched(it, "active", each=0, udp=1, over6=0) as watch:
        watch.standby.power_cut()
        watch.active.power_cut()
        for name in order:
            faults.boot(getattr(watch, name))
            time.sleep(0.2)
        watch.observer.wait_for(watch.active, seconds=60)
        watch.goes_on(watch.active, gap_s=float("inf"))


@pytest.mark.long
@with_commands
def test_the_standby_alone_comes_back_after_both_died(it: StandbyBed) -> None:
    """It was not behind, and the witness votes for it. The other one stands by when it is back."""
    with watched(it, "active", "standby", each=0, udp=1, over6=0) as watch:
        watch.active.power_cut()
        watch.standby.power_cut()
        faults.boot(watch.standby)
        watch.observer.wait_for(watch.standby, seconds=60)
        faults.boot(watch.active)
        returns_as_standby(it, watch.active, watch.standby)


@pytest.mark.long
def test_an_operator_says_that_the_active_host_is_dead_while_the_witness_is_dead_too(it: StandbyBed) -> None:
    """The standby asks who answers before it serves, because the operator's word is about one host."""
    with watched(it, "active", "standby") as watch:
        watch.witness.power_cut()
        watch.active.power_cut()
        watch.stops(watch.active)
        # The witness does not answer, says the exit status.
        it.operator.run("evacuate", watch.active.address, "--fenced", hosts=it.candidates, check=False)
        watch.takes_over(watch.standby, within_s=float("inf"))
        assert it.network.ensure().ok
        assert it.active is watch.standby
        faults.boot(watch.active)
        faults.boot(watch.witness)
        watch.goes_on(watch.standby)
        it.operator.run("undrain", watch.active.address, hosts=it.candidates)
        assert until(lambda: it.is_ready() and it.active is watch.standby, seconds=90), it.shown()


@with_commands
def test_a_host_that_returns_has_no_stale_connections(it: StandbyBed) -> None:
    """What ended on the other host meanwhile is not in its table when its turn comes again."""
    with watched(it, "active", "standby", "active", each=5) as watch:
        with faults.frozen(watch.active, "all"):
            watch.takes_over(watch.standby)
        with Flows([FlowKind("ended meanwhile", it.internet, it.vm, STATIC_NAT, 8005, 5)]) as ended_meanwhile:
            ended_meanwhile.wait_open()
        returns_as_standby(it, watch.active, watch.standby)
        it.operator.run("move", it.scope, "--to", watch.active.address, hosts=it.candidates)
        watch.observer.wait_for(watch.active)
        assert watch.flows.go_on(), watch.flows.story()
        established = conntrack(it, watch.active, "ESTABLISHED")
        assert established == 5 * 3 + 1, "the connections of this test, and the one over IPv6"


def conntrack(it: StandbyBed, host: Host, state: str) -> int:
    """The number of TCP connections in this state in the network's namespace on a host."""
    count = 0
    with host.within(it.network.namespace) as inside:
        for family in ("ipv4", "ipv6"):
            count += inside.run("conntrack", "-L", "-f", family, "-p", "tcp", check=False).out.count(state)
    return count


# --- the state


@with_commands
def test_a_standby_that_is_behind_does_not_take_over(it: StandbyBed) -> None:
    """It missed one change. When it has caught up, it takes over with the change."""
    (address,) = [each for each in it.network.addresses if each.ip == FORWARDED]
    with watched(it, "active", "standby") as watch, it.vm.serve_tcp(8443):
        rule = it.network.add_firewall_rule(address, "tcp", 8443)
        with faults.frozen(watch.standby):
            forward = it.network.add_port_forward(address, 8443, it.nics[0])
        assert until(it.is_ready)
        watch.active.power_cut()
        watch.takes_over(watch.standby)
        assert it.internet.tcp(FORWARDED, 8443).ok
        it.network.delete_port_forward(forward)
        it.network.delete_firewall_rule(rule)


def test_a_standby_that_is_behind_serves_if_nobody_else_has_the_revision(it: StandbyBed) -> None:
    """The host that has it is dead, so the standby serves with what it has, after a longer wait."""
    with watched(it, "active", "standby", each=1, udp=0, over6=0) as watch:
        watch.standby.separate([watch.active])
        with impatient(it.cloud, timeout_s=25):
            it.network.add_firewall_rule(it.network.addresses[0], "tcp", 8444)
        assert "behind" in it.shown()
        watch.active.power_cut()
        watch.standby.heal()
        watch.takes_over(watch.standby, within_s=8 * LEASE_S)


def test_both_hosts_have_the_same_state(it: StandbyBed) -> None:
    """But each has its own name, and its own proof first."""
    one, other = (json.loads(it.state(host)) for host in (it.active, it.standby))
    mine, theirs = one["placement"], other["placement"]
    assert (mine.pop("host"), theirs.pop("host")) == (it.active.address, it.standby.address)
    assert (mine["proof"], mine["partner_proof"]) == (theirs.pop("partner_proof"), theirs.pop("proof"))
    del mine["proof"], mine["partner_proof"]
    assert one == other


def test_a_password_that_was_taken_is_gone_on_both_hosts(it: StandbyBed) -> None:
    it.network.reset_password(it.nics[0], "correct horse")
    asked = ["curl", "-s", "-m", "20", "-H"]
    assert it.vm.run(*asked, "DomU_Request: send_my_password", f"http://{GATEWAY}:8080/").out == "correct horse"
    it.vm.run(*asked, "DomU_Request: saved_password", f"http://{GATEWAY}:8080/")
    standby = it.standby
    assert until(lambda: "correct horse" not in it.state(standby), seconds=5), "some milliseconds on an idle machine"
    it.active.power_cut()
    with it.observer() as observer:
        observer.wait_for(standby)
        told = it.vm.run(*asked, "DomU_Request: send_my_password", f"http://{GATEWAY}:8080/").out
        assert told.strip() == "saved_password"


def test_services_are_the_same_after_a_take_over(it: StandbyBed) -> None:
    """A lease, metadata and names, without a command of CloudStack."""

    def served() -> tuple[str, str, str]:
        lease = it.vm.run("busybox", "udhcpc", "-fqn", "-t20", "-T1", "-ieth0", "-s/bin/true", check=False)
        metadata = it.vm.run("curl", "-s", "-m", "20", f"http://{GATEWAY}/latest/meta-data/local-hostname").out
        domain = it.network.facts.domain
        name = it.vm.run("dig", f"@{GATEWAY}", "+short", "+time=5", "+tries=4", f"db-1.{domain}").out
        assert "lease of 10.10.1.45 obtained" in lease.out + lease.err
        return it.vm.ip, metadata, name

    before = served()
    with watched(it, "active", "standby", each=1, udp=0, over6=0) as watch:
        watch.active.power_cut()
        watch.takes_over(watch.standby)
        assert served() == before


# --- hand-overs


@pytest.mark.parametrize(
    "words", [["move", "{scope}", "--to", "{standby}"], ["drain", "{active}"]], ids=["move", "drain"]
)
@with_commands
def test_a_network_with_a_standby_is_handed_over(
    it: StandbyBed, words: list[str], record_testsuite_property: Record
) -> None:
    """A drain takes the host with the lowest load, which may be another one than the standby."""
    active, standby = it.active, it.standby
    with it.observer() as observer, it.flows(3, udp=1, over6=1, every_s=0.1) as flows, amid(it):
        flows.wait_open()
        time.sleep(2.5)
        names = {"scope": it.scope, "active": active.address, "standby": standby.address}
        it.operator.run(*(word.format(**names) for word in words), hosts=it.candidates)
        assert it.network.ensure().ok
        taker = it.active
        assert taker is (standby if words[0] == "move" else taker) is not active
        observer.wait_for(taker)
        assert flows.go_on(), flows.story()
        assert outage(observer) < HAND_OVER_WITHIN_S, observer.story()
        record_testsuite_property("hand_over_ms", round(outage(observer) * 1000, 1))
        it.operator.run("undrain", active.address, hosts=it.candidates)
        assert until(lambda: it.is_ready() and it.active is taker, seconds=90), it.shown()
    never_two(observer, active, taker)


@with_commands
def test_both_agents_are_replaced_one_after_the_other(it: StandbyBed) -> None:
    """As an upgrade does it: the new agent is there within the lease. No datagram is lost.

    The test is repeated when the machine was too busy to start an agent so soon.
    """
    assert any(_are_replaced_within_the_lease(it) for _ in range(3))


def _are_replaced_within_the_lease(it: StandbyBed) -> bool:
    assert until(it.is_ready, seconds=90)
    with watched(it) as watch, it.vm.serve_udp(53):
        steady = it.internet.steady_udp(STATIC_NAT, 53)
        for host in (watch.standby, watch.active):
            if not watch.restarted_in_time(host):
                steady.stop()
                return False
            watch.goes_on(watch.active)
        measured = steady.stop()
    assert measured.sent - measured.answered <= 1, "the last one may be on its way"
    return True


# --- CloudStack's commands


def test_commands_in_the_middle_of_a_power_cut(it: StandbyBed) -> None:
    """``with_commands`` does the same in the middle of other events."""
    with watched(it, "active", "standby", each=1) as watch, commands(it):
        watch.active.power_cut()
        watch.takes_over(watch.standby)


# --- load, and intruders


@pytest.mark.long
@with_commands
def test_a_busy_machine_raises_no_suspicion(it: StandbyBed) -> None:
    """Eight busy loops for a minute."""
    seconds = 15 if it.has_commands else 60
    loop = f"import time; until = time.monotonic() + {seconds}\nwhile time.monotonic() < until: pass"
    with watched(it, "active") as watch:
        running = [it.vm_host.client.start("run", dict, argv=["python3", "-c", loop]) for _ in range(8)]
        watch.goes_on(watch.active, seconds=seconds, gap_s=float("inf"))
        for each in running:
            each.result()


def heartbeats(machine: Machine, link: str) -> list[str]:
    """The frames with heartbeats that arrive there within a second.

    A bridge takes the frames of its ports before a socket for one EtherType sees them. So all are captured.
    """
    frames = machine.capture(link, seconds=1.0).result()
    return [it for it in frames if it[24:28] == f"{ETHERTYPE:04x}"]


@with_commands
def test_a_vm_neither_hears_nor_forges_heartbeats(it: StandbyBed) -> None:
    """It sends recorded heartbeats of all members while the active host is dead: the standby takes over."""
    recorded = heartbeats(it.bed.fabric, it.active.port("eth1", 1204))
    assert recorded, "the active host sends heartbeats on the VLAN"
    with it.standby.vm("listener", vlan=1204) as listener:
        assert heartbeats(listener, "eth0") == []
    with it.witness.vm("intruder", vlan=1204) as intruder:
        assert heartbeats(intruder, "eth0") == []

        def forge() -> None:
            for frame in recorded[-20:]:
                intruder.send_frame(frame)

        with watched(it, "active", "standby") as watch, meanwhile(forge):
            watch.goes_on(watch.active)
            watch.active.power_cut()
            watch.takes_over(watch.standby)


def test_a_recorded_heartbeat_does_not_keep_a_dead_host_alive(it: StandbyBed) -> None:
    """Somebody on the wire repeats frames, also those over management, that the members themselves have sent."""
    port = it.active.port("eth1", 1204)
    recorded = heartbeats(it.bed.fabric, port)
    with watched(it, "active", "standby") as watch:

        def repeat() -> None:
            for frame in recorded:
                for host in (watch.standby, watch.witness):
                    it.bed.fabric.send_frame(frame, link=host.port("eth1", 1204))

        watch.active.power_cut()
        with meanwhile(repeat):
            watch.takes_over(watch.standby)
