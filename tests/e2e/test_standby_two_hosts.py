"""Two hosts without a witness: the public gateway has the second vote (``standby.alone=gateway``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from bed import faults
from bed.lab import Host
from bed.machines import until
from bed.observer import never_two
from bed.standby import StandbyBed, standby_bed
from e2e.commands import ready, with_commands
from e2e.takeovers import NOBODY_TAKES_OVER_S, TAKES_OVER_WITHIN_S, returns_as_standby, watched

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def the_bed() -> Iterator[StandbyBed]:
    with standby_bed(candidates=2, details={"standby": "auto", "standby.alone": "gateway"}) as it:
        yield it


@pytest.fixture
def it(the_bed: StandbyBed, request: pytest.FixtureRequest) -> Iterator[StandbyBed]:
    with ready(the_bed, request) as it:
        yield it


def log(host: Host) -> str:
    """The log of its agent."""
    return host.read("/var/log/netloom/agent.log")


@with_commands
def test_all_connections_survive_a_power_cut(it: StandbyBed, record_testsuite_property: Record) -> None:
    assert "the gateway has the second vote" in it.shown()
    with watched(it, "active", "standby") as watch:
        watch.active.power_cut()
        outage_s = watch.takes_over(watch.standby)
        record_testsuite_property("two_hosts_outage_s", round(outage_s, 3))
        watch.goes_on(watch.standby)  # alone
        faults.boot(watch.active)
        returns_as_standby(it, watch.active, watch.standby)
    assert ": no heartbeat of" in it.shown() and "the gateway answers this host" in it.shown()
    where = it.operator.run("where", it.scope, hosts=it.candidates)
    assert "gateway" in where.out


@with_commands
@pytest.mark.long
def test_the_active_host_goes_on_without_its_standby(it: StandbyBed) -> None:
    with watched(it, "active") as watch:
        watch.standby.power_cut()
        watch.goes_on(watch.active)
        faults.boot(watch.standby)
        returns_as_standby(it, watch.standby, watch.active)


@pytest.mark.long
def test_an_operator_says_that_the_standby_is_dead_for_good(it: StandbyBed) -> None:
    """The network leaves the group without a gap. When the dead host is back, it serves nothing, and stands by anew."""
    with watched(it, "active") as watch:
        watch.standby.power_cut()
        watch.goes_on(watch.active)
        told = it.operator.run("evacuate", watch.standby.address, hosts=it.candidates)
        assert f"Still in a group with {watch.standby.address}: {it.scope}. --fenced ends that." in told.out
        it.operator.run("evacuate", watch.standby.address, "--fenced", hosts=it.candidates)
        watch.goes_on(watch.active)
        assert it.network.ensure().ok
        assert "standby" not in it.network.details and it.active is watch.active
        rule = it.network.add_firewall_rule(it.network.addresses[0], "tcp", 443)
        it.network.delete_firewall_rule(rule)
        faults.boot(watch.standby)
        it.operator.run("undrain", watch.standby.address, hosts=it.candidates)
        returns_as_standby(it, watch.standby, watch.active)
        watch.goes_on(watch.active)


@pytest.mark.long
def test_an_operator_says_that_the_active_host_is_dead_while_the_gateway_does_not_answer(it: StandbyBed) -> None:
    """The standby serves with all connections. The dead host is back later, and does not serve for a moment."""
    with watched(it, "active", "standby") as watch:
        watch.standby.separate([it.internet])
        watch.active.power_cut()
        watch.stops(watch.active)
        it.operator.run("evacuate", watch.active.address, "--fenced", hosts=it.candidates)
        watch.observer.wait_for(watch.standby)
        watch.standby.heal()
        watch.goes_on(watch.standby)
        assert it.network.ensure().ok
        assert it.active is watch.standby
        faults.boot(watch.active)
        watch.goes_on(watch.standby)
        it.operator.run("undrain", watch.active.address, hosts=it.candidates)
        returns_as_standby(it, watch.active, watch.standby)


@with_commands
@pytest.mark.long
def test_an_active_host_that_is_cut_off_from_everything_stops_and_the_standby_serves(it: StandbyBed) -> None:
    with watched(it, "active", "standby") as watch:
        watch.active.partition("all")
        watch.takes_over(watch.standby)
        watch.goes_on(watch.standby)
        watch.active.heal()
        watch.goes_on(watch.standby)
        returns_as_standby(it, watch.active, watch.standby)


@pytest.mark.long
def test_two_hosts_that_do_not_hear_each_other_on_management_go_on(it: StandbyBed) -> None:
    """Their heartbeats arrive on the VLANs."""
    with watched(it, "active") as watch:
        watch.standby.partition("mgmt")
        watch.goes_on(watch.active)
        watch.standby.heal()
        watch.goes_on(watch.active)


@pytest.mark.long
def test_a_host_that_nobody_answers_stops_and_goes_on_later(it: StandbyBed) -> None:
    """The standby is dead, and then the gateway."""
    with watched(it, "active", each=0, udp=0, over6=0) as watch:
        watch.standby.power_cut()
        watch.goes_on(watch.active)
        watch.active.separate([it.internet])
        watch.stops(watch.active)
        watch.active.heal()
        watch.observer.wait_for(watch.active)


@pytest.mark.long
def test_both_serve_while_they_are_split_and_one_stops_when_they_hear_each_other(it: StandbyBed) -> None:
    """This is the limit of two hosts: each of them reaches the gateway, and not the other one."""
    active, standby = it.active, it.standby
    both = {active.name, standby.name}
    with it.observer() as observer:
        standby.separate([active])
        assert until(lambda: observer.serving() == both, seconds=TAKES_OVER_WITHIN_S), observer.story()
        standby.heal()
        assert until(lambda: observer.serving() == {standby.name}, seconds=TAKES_OVER_WITHIN_S), observer.story()
        healed = time.monotonic()
        time.sleep(NOBODY_TAKES_OVER_S)
        assert {each.host for each in observer.answers(since=healed)} == {standby.name}, observer.story()
    returns_as_standby(it, active, standby)


@pytest.mark.long
def test_a_busy_machine_ends_no_lease_of_the_gateway(it: StandbyBed) -> None:
    """Eight busy loops for 20 s, while the standby is dead: each lease is one of the gateway."""
    loop = "import time; until = time.monotonic() + 20\nwhile time.monotonic() < until: pass"
    with watched(it, "active") as watch:
        watch.standby.power_cut()
        watch.goes_on(watch.active)
        ran_out = log(watch.active).count("has run out")
        running = [it.bed.hosts[-1].client.start("run", dict, argv=["python3", "-c", loop]) for _ in range(8)]
        watch.goes_on(watch.active, seconds=20, gap_s=float("inf"))  # the observer is late, too
        for each in running:
            each.result()
        assert log(watch.active).count("has run out") == ran_out, log(watch.active)[-4000:]


@pytest.mark.long
def test_a_witness_comes_and_goes() -> None:
    """The third host is registered no more, and then again. Then two hosts are to have no standby."""
    with standby_bed(candidates=3, details={"standby": "auto", "standby.alone": "gateway"}) as it:
        it.make_ready()
        active = it.active
        three = it.cloud.registration["hosts"]
        two = ",".join((active.address, it.standby.address))
        with it.observer() as observer, it.flows(3, every_s=0.1) as flows:
            flows.wait_open()
            for hosts, has_witness in ((two, False), (three, True), (two, False)):
                it.cloud.registration["hosts"] = hosts
                vote = "is the witness" if has_witness else "the gateway has the second vote"
                # An attempt may come a minute after the one before.
                assert until(it.is_ready, seconds=90) and vote in it.shown(), it.shown()
                assert flows.go_on(), flows.story()
            it.cloud.registration["standby.alone"] = "stop"
            it.device.ensure()
            assert "standby" not in it.device.details
            assert flows.go_on(), flows.story()
        never_two(observer, active)
