"""Networks and VPCs of the end-to-end tests, with their VMs and public addresses, and a check for leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bed import Bed
from bed.cloudstack import FakeCloudStack, IsolatedNetwork
from bed.lab import Host, Vm, difference
from bed.machines import until
from bed.payloads import Nic, Offering, PublicAddress
from bed.vpc import TIER_SERVICES, Tier, Vpc

OUTSIDE = "198.51.100.1"  # an address of the internet that is not on the public VLAN


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
