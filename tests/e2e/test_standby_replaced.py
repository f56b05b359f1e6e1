"""A standby or a witness that is dead for good is replaced, where there are four candidates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bed import faults
from bed.lab import Host
from bed.machines import until
from bed.observer import never_two
from bed.standby import StandbyBed, standby_bed
from netloom.extension.standby import REPLACE_AFTER_S


@pytest.fixture(scope="module")
def the_bed() -> Iterator[StandbyBed]:
    with standby_bed(candidates=4, details={"standby": "auto"}) as it:
        yield it


@pytest.fixture
def it(the_bed: StandbyBed) -> StandbyBed:
    the_bed.make_ready()
    return the_bed


def witness(it: StandbyBed) -> Host:
    address = it.shown().partition(" is the witness")[0].split()[-1]
    return it.host(address)


@pytest.mark.long
def test_a_standby_that_is_dead_is_replaced_and_does_not_come_between(it: StandbyBed) -> None:
    """The new standby takes over from the active host. The old one is back then, with a copy, and serves nothing."""
    active, dead = it.active, it.standby
    dead.power_cut()
    with it.observer() as observer, it.flows(3, every_s=0.1) as flows:
        flows.wait_open()
        assert until(lambda: it.is_ready() and it.standby is not dead, seconds=REPLACE_AFTER_S + 90), it.shown()
        new = it.standby
        assert it.active is active and witness(it) is not dead
        assert flows.go_on(), flows.story()
        active.power_cut()
        observer.wait_for(new)
        assert flows.go_on(), flows.story()
        faults.boot(dead)
        it.network.ensure()
        assert it.active is new
        faults.boot(active)
        assert until(lambda: it.is_ready() and it.standby is active, seconds=90), it.shown()
        copy = f"{it.scope}.json"
        assert until(lambda: copy not in dead.listing("/var/lib/netloom/scopes"), seconds=60), "its group is dissolved"
        assert observer.serving() == {new.name}
    never_two(observer, active, new)


def test_a_witness_that_is_dead_is_replaced_and_the_standby_stays(it: StandbyBed) -> None:
    active, standby, dead = it.active, it.standby, witness(it)
    dead.power_cut()
    with it.observer() as observer:
        assert until(lambda: it.is_ready() and witness(it) is not dead, seconds=REPLACE_AFTER_S + 90), it.shown()
        assert it.active is active and it.standby is standby
        active.power_cut()
        observer.wait_for(standby)
    never_two(observer, active, standby)
