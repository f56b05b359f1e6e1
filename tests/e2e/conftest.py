"""One bed for all end-to-end tests: two hosts, a management server, an internet. Each test has its own network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from bed import Bed
from bed.cloudstack import NAT_SERVICES, FakeCloudStack, IsolatedNetwork
from bed.lab import Host, Internet, Vm, difference
from bed.payloads import Nic, Offering, PublicAddress, VpcFacts
from bed.places import until
from bed.vpc import TIER_SERVICES, Tier, Vpc
from netloom.commands.table import TABLE

PUBLIC_VLAN = 101
OUTSIDE = "198.51.100.1"  # an address of the internet that is not on the public VLAN


@pytest.fixture(scope="session", autouse=True)
def _every_command(request: pytest.FixtureRequest) -> Iterator[None]:
    """The scenarios that are marked for the one file bring every command of the protocol to success, together."""
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
    """The gateway of the public VLAN, with an address behind it, and a neighbour's address beside it."""
    return bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.1/24", also=[f"{OUTSIDE}/32", "198.51.100.2/32"])


@pytest.fixture(scope="session")
def cloud(bed: Bed) -> FakeCloudStack:
    """A CloudStack that logs in as root by key."""
    cloud = FakeCloudStack.on(bed.management)
    cloud.register(hosts=bed.hosts, **bed.login("root", by="key"))
    # Every candidate is asked, so both agents run from here on and belong to no test's traces.
    sent = cloud.isolated_network(200, vlan=1200, cidr="10.10.0.0/24", offering=NAT_SERVICES).ensure()
    assert sent.ok, sent.output
    return cloud


_numbers = itertools.count(1)


@dataclass
class Life:
    """A network of a test, its VMs, and the addresses that are its own."""

    bed: Bed
    cloud: FakeCloudStack
    number: int
    network: IsolatedNetwork
    vms: list[Vm] = field(default_factory=list)

    @property
    def subnet(self) -> str:
        return self.network.facts.cidr.rpartition(".")[0]

    @property
    def host(self) -> Host:
        """The host that the network lives on."""
        (host,) = [host for host in self.bed.hosts if host.address == self.network.host]
        return host

    @property
    def elsewhere(self) -> Host:
        """The other host."""
        (host,) = [host for host in self.bed.hosts if host.address != self.network.host]
        return host

    def public(self, digit: int) -> str:
        """The network's ``digit``-th public address, 0 being its source NAT address. Its own while it lives."""
        return f"203.0.113.{10 + 4 * (self.number % 60) + digit}"

    def vm(self, name: str, last: int = 45, *, host: Host | None = None) -> tuple[Vm, Nic]:
        """Deploy a VM: in CloudStack, and then, as KVM starts it once the network stands, on a host."""
        mac = f"02:01:00:{self.number:02x}:00:{last:02x}"
        ip = f"{self.subnet}.{last}"
        nic = self.network.deploy_vm(name, ip=ip, mac=mac)
        return self.plug(nic, host=host), nic

    def plug(self, nic: Nic, *, host: Host | None = None) -> Vm:
        """The VM of a NIC on a host's guest bridge."""
        host = host or self.host
        vm = host.vm(
            nic.vm.name,
            vlan=self.network.facts.vlan,
            mac=nic.mac,
            ip=f"{nic.ip}/24",
            gateway=self.network.facts.gateway,
        )
        self.vms.append(vm)
        return vm

    def end(self) -> None:
        for vm in self.vms:
            vm.destroy()
        self.vms = []
        network = self.network
        if network.facts.state == "implemented" or network.host:
            # The sequence is another test's subject: without rules and repeated questions this is the shortest one.
            network.ensures_always = False
            network.port_forwards, network.static_nats, network.firewall, network.addresses = [], [], [], []
            network.delete()
        noisy = {each.command for each in self.cloud.history if each.ok and each.output}
        assert noisy <= {"ensure-network-device", "custom-action"}, "on success no other prints"


@contextmanager
def impatient(cloud: FakeCloudStack, timeout_s: int = 8) -> Iterator[None]:
    """A shorter deadline than CloudStack's 60 s, for hosts that do not answer."""
    usual, cloud.timeout_s = cloud.timeout_s, timeout_s
    try:
        yield
    finally:
        cloud.timeout_s = usual


MakeLife = Callable[..., Life]


@pytest.fixture
def make_life(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeLife]:
    """Makes networks that end with the test: own id, VLAN and public addresses, 10.10.<n>.0/24 unless told.

    ``brisk``: ensure-network-device only while nothing is stored, for tests of packets and not of sequences.
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
    """A network whose events make every execution that CloudStack makes of them."""
    return make_life()


@pytest.fixture
def brisk_life(make_life: MakeLife) -> Life:
    """A network of a test whose subject is not the sequence."""
    return make_life(brisk=True)


@dataclass
class VpcLife:
    """A VPC of a test, its tiers' VMs, and four public addresses that are its own; ``public[0]`` is for source NAT."""

    bed: Bed
    cloud: FakeCloudStack
    number: int
    vpc: Vpc
    public: list[PublicAddress]
    vms: list[Vm] = field(default_factory=list)

    @property
    def host(self) -> Host:
        (host,) = [host for host in self.bed.hosts if host.address == self.vpc.host]
        return host

    def tier(self, digit: int, *, offering: Offering = TIER_SERVICES, brisk: bool = True) -> Tier:
        """The ``digit``-th tier, 10.<n>.<digit>.0/24, not implemented yet."""
        vlan = 2000 + 10 * self.number + digit
        self.bed.add_segments([("eth1", str(vlan))])
        cidr = f"10.{100 + self.number}.{digit}.0/24"
        tier = self.vpc.add_tier(f"{7000 + 10 * self.number + digit}", vlan=vlan, cidr=cidr, offering=offering)
        tier.ensures_always = not brisk
        return tier

    def vm(self, tier: Tier, name: str, last: int = 45) -> tuple[Vm, Nic]:
        """Deploy a VM in a tier: in CloudStack, and then, as KVM starts it once the network stands, on the host."""
        mac = f"02:02:{self.number:02x}:{int(tier.facts.network_id) % 10:02x}:00:{last:02x}"
        nic = tier.deploy_vm(name, ip=f"{tier.facts.cidr.rpartition('.')[0]}.{last}", mac=mac)
        gateway = tier.facts.gateway
        vm = self.host.vm(name, vlan=tier.facts.vlan, mac=mac, ip=f"{nic.ip}/24", gateway=gateway)
        self.vms.append(vm)
        return vm, nic

    def end(self) -> None:
        for vm in self.vms:
            vm.destroy()
        self.vms = []
        for tier in list(self.vpc.tiers):
            tier.ensures_always = False
            tier.port_forwards, tier.static_nats, tier.lb_rules, tier.addresses, tier.acl = [], [], [], [], None
            tier.delete()
        if self.vpc.stored:
            self.vpc.delete()


MakeVpc = Callable[..., VpcLife]


@pytest.fixture
def make_vpc(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeVpc]:
    """Makes VPCs that end with the test, by default with a source-NAT address chosen at their creation."""
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


class Traces:
    """What every host has when this is made; ``left`` is what came or went since."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self._settle()
        self._before = {host.name: host.objects() for host in bed.hosts}

    def left(self) -> dict[str, dict[str, dict[str, list[str]]]]:
        """What came and went."""
        self._settle()
        found = {host.name: difference(self._before[host.name], host.objects()) for host in self.bed.hosts}
        return {name: changes for name, changes in found.items() if changes}

    def _settle(self) -> None:
        """The relays of the last call have ended: the client does not wait for those."""
        until(lambda: not any("agent connect" in it for host in self.bed.hosts for it in host.objects()["processes"]))
