"""Networks and VPCs of the end-to-end tests, with their VMs and public addresses, and a check for leftovers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bed import Bed
from bed.cloudstack import NAT_SERVICES, FakeCloudStack, IsolatedNetwork
from bed.lab import Host, Internet, Vm, difference
from bed.machines import until
from bed.payloads import Nic, Offering, PublicAddress, VpcFacts
from bed.vpc import TIER_SERVICES, Tier, Vpc

PUBLIC_VLAN = 101
OUTSIDE = "198.51.100.1"  # an address of the internet that is not on the public VLAN


@dataclass
class Life:
    """One network of a test, with its VMs and its own public addresses."""

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
        """The host of the network."""
        (host,) = [host for host in self.bed.hosts if host.address == self.network.host]
        return host

    @property
    def elsewhere(self) -> Host:
        """The other host."""
        (host,) = [host for host in self.bed.hosts if host.address != self.network.host]
        return host

    def public(self, digit: int) -> str:
        """The ``digit``-th public address of this network; 0 is its source NAT address. No other network uses it."""
        return f"203.0.113.{10 + 4 * (self.number % 60) + digit}"

    def vm(self, name: str, last: int = 45, *, host: Host | None = None) -> tuple[Vm, Nic]:
        """Deploy a VM in CloudStack, then start it on a host, in the order in which KVM does."""
        mac = f"02:01:00:{self.number:02x}:00:{last:02x}"
        ip = f"{self.subnet}.{last}"
        nic = self.network.deploy_vm(name, ip=ip, mac=mac)
        return self.plug(nic, host=host), nic

    def plug(self, nic: Nic, *, host: Host | None = None) -> Vm:
        """Start the VM of a NIC on a host's guest bridge."""
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
            # Other tests check the sequence of a deletion. Without rules and repeated ensures it is shortest.
            network.ensures_always = False
            network.port_forwards, network.static_nats, network.firewall, network.addresses = [], [], [], []
            network.delete()
        noisy = {each.command for each in self.cloud.history if each.ok and each.output}
        assert noisy <= {"ensure-network-device", "custom-action"}, "no other command prints on success"


@contextmanager
def impatient(cloud: FakeCloudStack, timeout_s: int = 8) -> Iterator[None]:
    """Shorten CloudStack's deadline of 60 s, for hosts that do not answer. A call waits 5 s for their first packet."""
    usual, cloud.timeout_s = cloud.timeout_s, timeout_s
    try:
        yield
    finally:
        cloud.timeout_s = usual


MakeLife = Callable[..., Life]

_numbers = itertools.count(1)


@contextmanager
def making_lives(bed: Bed, cloud: FakeCloudStack) -> Iterator[MakeLife]:
    """Make networks that are deleted at the end of the block.

    Each has its own id, VLAN, public addresses and 10.10.<n>.0/24. ``brisk`` sends ensure-network-device only while no
    details are stored. Tests of packets use it to save time.
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


@dataclass
class VpcLife:
    """One VPC of a test, with its VMs and four public addresses of its own; ``public[0]`` is for source NAT."""

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
        """Deploy a VM in a tier in CloudStack, then start it on the host."""
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


@contextmanager
def making_vpcs(bed: Bed) -> Iterator[MakeVpc]:
    """Make VPCs that are deleted at the end of the block, by default with a source-NAT address from their creation."""
    lives: list[VpcLife] = []
    cloud = FakeCloudStack.on(bed.management, extension="vpcs")
    cloud.register(hosts=bed.hosts, **bed.login("root", by="key"))

    def make(*, source_nat: bool = True) -> VpcLife:
        number = next(_numbers)
        vpc = Vpc(cloud, VpcFacts(str(700 + number), f"10.{100 + number}.0.0/16"), PUBLIC_VLAN)
        public = [vpc.associate(f"203.0.113.{10 + 4 * (number % 60) + digit}") for digit in range(4)]
        if source_nat:
            vpc.source_nat = public[0]
            public[0].source_nat = True
        lives.append(VpcLife(bed, cloud, number, vpc, public))
        return lives[-1]

    yield make
    for life in lives:
        life.end()


Differences = dict[str, dict[str, dict[str, list[str]]]]
"""Objects that were added (``+``) or removed (``-``), by host and category."""


class Traces:
    """The objects of every host at the time of construction, to compare with later."""

    # What follows a command or the end of a VM a moment later: processes end, the agent removes the guard of a bridge
    # that is gone, and conntrack entries of closed connections are removed.
    LATE = frozenset({"processes", "nftables", "conntrack"})

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self._before = {host.name: settled_objects(host) for host in bed.hosts}

    def differences(self) -> Differences:
        """Objects that were added or removed since the construction; empty when there are none."""
        found = {host.name: difference(self._before[host.name], settled_objects(host)) for host in self.bed.hosts}
        return {name: changes for name, changes in found.items() if changes}

    def left(self) -> Differences:
        """The differences, if necessary those after some seconds: what may go late is waited for, and nothing else."""
        found: list[Differences] = []

        def settled() -> bool:
            found[:] = [self.differences()]
            return any(changes.keys() - self.LATE for changes in found[0].values()) or not found[0]

        until(settled)
        return found[0]


def settled_objects(host: Host) -> dict[str, list[str]]:
    """The objects of the host once two reads agree, apart from conntrack, and no process is a relay of the last call.

    The client does not wait for the end of relays. Programs that the agent runs end within moments.
    """
    reads: list[dict[str, list[str]]] = [{}, {}]

    def settled() -> bool:
        reads[:] = reads[1], host.objects()
        known, now = ({**read, "conntrack": []} for read in reads)
        return known == now and not any("agent connect" in it for it in now["processes"])

    assert until(settled), difference(*reads)
    return reads[1]


LEASE_TOLD = """#!/bin/sh
[ "$1" = bound ] && env >&2
exit 0
"""


def lease(vm: Vm, *, tries: int = 20, options: Sequence[str] = ()) -> str:
    """Run busybox udhcpc with a try each second. Returns its output and the variables of its lease, one per line.

    ``tries``: fewer where no lease may come. ``options``: further DHCP options to ask for, by udhcpc's names.
    """
    vm.write("/tmp/lease", LEASE_TOLD, mode=0o755)
    words = ["-f", "-q", "-n", "-t", str(tries), "-T", "1", "-i", "eth0", "-s", "/tmp/lease"]
    done = vm.run("busybox", "udhcpc", *words, *(f"-O{it}" for it in options), check=False)
    return done.out + done.err


def answers_arp(machine: Internet, address: str) -> bool:
    """Whether a machine answers ARP for the address, within a generous time."""
    return until(lambda: machine.who_has(address) != [])
