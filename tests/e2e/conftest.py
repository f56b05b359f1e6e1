"""Fixtures: one bed for all end-to-end tests, with two hosts. Each test creates its own networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bed import Bed
from bed.cloudstack import NAT_SERVICES, FakeCloudStack
from bed.lab import Internet
from bed.machines import until
from e2e.networks import OUTSIDE, PUBLIC_VLAN, Life, MakeLife, MakeVpc, making_lives, making_vpcs
from netloom.commands.table import TABLE


@pytest.fixture(scope="session", autouse=True)
def _every_command(request: pytest.FixtureRequest) -> Iterator[None]:
    """Assert that the scenarios marked ``binary`` together bring every command of the protocol to success."""
    yield
    asked = request.config
    if (asked.option.markexpr, asked.option.keyword) == ("binary and not long", "") and "tests/e2e" in asked.args:
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

    network = cloud.isolated_network(200, vlan=1200, cidr="10.10.0.0/24", offering=NAT_SERVICES)
    network.facts.state = "implementing"  # other calls install nothing

    def agents_run() -> bool:
        # This call asks every candidate host, but waits only for some seconds for the slower ones.
        sent = network.ensure()
        assert sent.ok, sent.output
        return all(any("agent serve" in it for it in host.objects()["processes"]) for host in bed.hosts)

    assert until(agents_run, seconds=120), "both agents run before the first test records its traces"
    return cloud


@pytest.fixture
def make_life(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeLife]:
    """Make networks that are deleted after the test."""
    with making_lives(bed, cloud) as make:
        yield make


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
    """Make VPCs that are deleted after the test."""
    with making_vpcs(bed) as make:
        yield make
