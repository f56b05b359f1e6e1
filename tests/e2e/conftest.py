"""Fixtures: one bed for all end-to-end tests, with two hosts. Each test creates its own networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from bed import Bed
from bed.cloudstack import NAT_SERVICES, FakeCloudStack
from bed.lab import Internet
from bed.machines import until
from bed.payloads import Offering, VpcFacts
from bed.vpc import Vpc
from e2e.networks import OUTSIDE, Life, MakeLife, MakeVpc, VpcLife
from netloom.commands.table import TABLE

PUBLIC_VLAN = 101


@pytest.fixture(scope="session", autouse=True)
def _every_command(request: pytest.FixtureRequest) -> Iterator[None]:
    """Assert that the scenarios marked ``binary`` together bring every command of the protocol to success."""
    yield
    asked = request.config
    if (asked.option.markexpr, asked.option.keyword) == ("binary", "") and "tests/e2e" in asked.args:
        assert FakeCloudStack.carried_out >= TABLE.keys()


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    with Bed(hosts=2, public_vlans=[PUBLIC_VLAN]) as bed:
        yield bed


@pytest.fixture(scope="session")
def internet(bed: Bed) -> Internet:
    """The gateway of the public VLAN. Its other addresses are on lo and represent hosts behind it."""
    return bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.1/24", also=[f"{OUTSIDE}/32", "198.51.100.2/32"])


@pytest.fixture(scope="session")
def cloud(bed: Bed) -> FakeCloudStack:
    """A CloudStack that logs in as root by key."""
    cloud = FakeCloudStack.on(bed.management)
    cloud.register(hosts=bed.hosts, **bed.login("root", by="key"))

    def agents_run() -> bool:
        # This call asks every candidate host, but waits only for some seconds for the slower ones.
        sent = cloud.isolated_network(200, vlan=1200, cidr="10.10.0.0/24", offering=NAT_SERVICES).ensure()
        assert sent.ok, sent.output
        return all(any("agent serve" in it for it in host.objects()["processes"]) for host in bed.hosts)

    assert until(agents_run, seconds=120), "both agents run before the first test records its traces"
    return cloud


_numbers = itertools.count(1)


@pytest.fixture
def make_life(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeLife]:
    """Make networks that are deleted after the test. Each has its own id, VLAN, public addresses and 10.10.<n>.0/24.

    ``brisk`` sends ensure-network-device only while no details are stored. Tests of packets use it to save time.
    """
    lives: list[Life] = []

    def make(
        *,
        cidr: str = "",
        offering: Offering = NAT_SERVICES,
        with_cloud: FakeCloudStack | None = None,
        brisk: bool = False,
    ) -> Life:
        number = next(_numbers)
        vlan = 1200 + number
        bed.add_segments([("eth1", str(vlan))])
        network = (with_cloud or cloud).isolated_network(
            200 + number, vlan=vlan, cidr=cidr or f"10.10.{number}.0/24", offering=offering, public_vlan=PUBLIC_VLAN
        )
        life = Life(bed, with_cloud or cloud, number, network)
        network.ensures_always = not brisk
        network.source_nat = network.associate(life.public(0))
        network.source_nat.source_nat = True
        lives.append(life)
        return life

    yield make
    for life in lives:
        life.end()


@pytest.fixture
def life(make_life: MakeLife) -> Life:
    """A network with the complete sequence of executions of CloudStack."""
    return make_life()


@pytest.fixture
def brisk_life(make_life: MakeLife) -> Life:
    """A network for tests that do not check the sequence of executions."""
    return make_life(brisk=True)


@pytest.fixture
def make_vpc(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeVpc]:
    """Make VPCs that are deleted after the test, by default with a source-NAT address from their creation."""
    lives: list[VpcLife] = []
    everything = FakeCloudStack.on(bed.management, extension="vpcs")
    everything.register(hosts=bed.hosts, **bed.login("root", by="key"))

    def make(*, source_nat: bool = True) -> VpcLife:
        number = next(_numbers)
        vpc = Vpc(everything, VpcFacts(str(700 + number), f"10.{100 + number}.0.0/16"), PUBLIC_VLAN)
        public = [vpc.associate(f"203.0.113.{10 + 4 * (number % 60) + digit}") for digit in range(4)]
        if source_nat:
            vpc.source_nat = public[0]
            public[0].source_nat = True
        lives.append(VpcLife(bed, everything, number, vpc, public))
        return lives[-1]

    yield make
    for life in lives:
        life.end()
