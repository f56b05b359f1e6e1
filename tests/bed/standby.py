"""A bed for take-overs: hosts with agents, a network with two VMs that outlive its host, and the flows through it.

    with standby_bed() as it:
        with it.observer() as observer, it.flows(each=10) as flows:
            flows.wait_open()
            it.active.power_cut()
            observer.wait_for(it.standby)
            assert flows.go_on(), flows.story()
        never_two(observer)

The last host has the VMs, and netloom is not told of it. So each candidate can fail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from bed import faults
from bed.cloudstack import ALL_SERVICES, FakeCloudStack, IsolatedNetwork, Sent
from bed.flows import FlowKind, Flows
from bed.lab import Bed, Host, Internet, Vm
from bed.machines import until
from bed.observer import Observer, Question
from bed.operator import Operator
from bed.payloads import Nic, VirtualMachine

VLAN, PUBLIC_VLAN = 1204, 101
GATEWAY, GATEWAY6, PREFIX6 = "10.10.1.1", "2001:db8:50:1::1", "2001:db8:50:1::/64"
SOURCE_NAT, STATIC_NAT, FORWARDED = "203.0.113.20", "203.0.113.21", "203.0.113.22"
OUTSIDE, OUTSIDE6 = "198.51.100.1", "2001:db8:ffff::1"
ROUTER6, PUBLIC6 = "2001:db8:99::1", "2001:db8:99::/64"
REGISTERED6 = {"public.ip6.gateway": ROUTER6, "public.ip6.address": PUBLIC6}
OUTWARD_PORT, STATIC_PORT, FORWARDED_PORT, UDP_PORT, OUTWARD_UDP_PORT = 8000, 8001, 2222, 8002, 8003
TCP_KINDS = ("source NAT", "static NAT", "port forward")
VM_IP, VM6, MAC = "10.10.1.45", "2001:db8:50:1:1:ff:fecc:3", "02:01:00:cc:00:03"
SECOND_IP, SECOND_MAC = "10.10.1.162", "02:01:00:cc:00:04"


def tcp_kinds(vm: Vm, second_vm: Vm, internet: Internet, each: int, *, every_s: float = 0.25) -> list[FlowKind]:
    """``each`` TCP flows through source NAT, static NAT and a forwarded port, see TCP_KINDS."""
    outward, static, forwarded = TCP_KINDS
    return [
        FlowKind(outward, second_vm, internet, OUTSIDE, OUTWARD_PORT, each, every_s=every_s),
        FlowKind(static, internet, vm, STATIC_NAT, STATIC_PORT, each, every_s=every_s),
        FlowKind(forwarded, internet, vm, FORWARDED, FORWARDED_PORT, each, every_s=every_s, listens_at=22),
    ]


class Device(Protocol):
    """A network or a VPC in CloudStack's database, as far as its host matters."""

    @property
    def details(self) -> dict[str, Any]: ...

    @property
    def host(self) -> str: ...

    @property
    def namespace(self) -> str: ...

    def ensure(self) -> Sent: ...

    def custom_action(self, action: str, **params: str) -> str: ...


@dataclass
class ScopeBed(ABC):
    """A bed whose ``candidates``, the hosts of the registration, serve a network or a VPC. The VMs are on ``vm_host``.

    ``each``, ``udp``, ``over6``: how many flows of each kind of TCP, of UDP and of IPv6. ``has_commands``: CloudStack
    sends commands while the bed is watched.
    """

    bed: Bed
    cloud: FakeCloudStack
    internet: Internet
    operator: Operator
    candidates: list[Host]
    has_commands: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def device(self) -> Device:
        """What the candidates serve."""

    @property
    def scope(self) -> str:
        return self.device.namespace.removeprefix("cs-")

    @property
    def vm_host(self) -> Host:
        return self.bed.hosts[-1]

    def host(self, address: str) -> Host:
        (found,) = [it for it in self.bed.hosts if it.address == address]
        return found

    @property
    def active(self) -> Host:
        """The host that CloudStack was told last."""
        return self.host(self.device.host)

    @property
    def standby(self) -> Host:
        """The host that stands by, as CloudStack was told last."""
        return self.host(str(self.device.details["standby"]))

    @property
    def witness(self) -> Host:
        """The candidate that is neither. It is the only one where there are three."""
        (found,) = [it for it in self.candidates if it not in (self.active, self.standby)]
        return found

    @property
    def passive(self) -> list[Host]:
        """The candidates that do not serve the network."""
        return [it for it in self.candidates if it is not self.active]

    def state(self, host: Host) -> str:
        """The state file of the network on a host."""
        return host.read(f"/var/lib/netloom/scopes/{self.scope}.json")

    def shown(self) -> str:
        """What the active host says about the network and its standby."""
        return self.device.custom_action("show")

    def is_ready(self) -> bool:
        """CloudStack asks who serves. Whether the standby could take over now: it has the state and the flows, makes
        the same of the state, and hears the other two."""
        self.device.ensure()
        return bool(self.device.details.get("standby")) and "standby: ready" in self.shown()

    # --- packets

    @abstractmethod
    def questions(self, *, over6: bool = True) -> list[Question]:
        """The addresses of the network on all sides. One host answers for all of them."""

    def observer(self, *, over6: bool = True) -> Observer:
        return Observer(self.bed, self.questions(over6=over6), hosts=self.candidates)

    def kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """TCP over IPv4."""
        return []

    def udp_kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """UDP over IPv4. conntrack calls such flows assured after two seconds."""
        return []

    def kinds6(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """TCP over IPv6."""
        return []

    def flows(self, each: int = 1, *more: FlowKind, every_s: float = 0.25, udp: int = 0, over6: int = 0) -> Flows:
        """``each`` flows of each kind of TCP, ``udp`` of each kind of UDP, ``over6`` over IPv6, and ``more``."""
        kinds = self.kinds(each, every_s=every_s) if each else []
        kinds += self.udp_kinds(udp, every_s=every_s) if udp else []
        kinds += self.kinds6(over6, every_s=every_s) if over6 else []
        return Flows([*kinds, *more])

    # --- what is needed before a test

    def settle(self) -> None:
        """Power on, heal and thaw every host, and start every agent; CloudStack then asks who serves."""
        for host in self.bed.hosts:
            if not host.running:
                host.boot()
            host.heal()
            if host in self.candidates:
                faults.thaw(host)
                if not faults.agents_of(host):
                    faults.start_agent(host)
        self.device.ensure()

    def make_ready(self) -> None:
        """The same, and wait until the standby is ready."""
        self.settle()
        assert until(self.is_ready, seconds=60), self.shown()

    def serve_on(self, host: Host) -> None:
        """Move the network to a host, unless it is there."""
        if self.active is not host:
            self.operator.run("move", self.scope, "--to", host.address, hosts=self.candidates)
            self.device.ensure()


@dataclass
class StandbyBed(ScopeBed):
    """What ``standby_bed`` makes: an isolated network with two VMs."""

    network: IsolatedNetwork
    vm: Vm  # it has the static NAT, the forwarded port, and IPv6
    second_vm: Vm  # it leaves by source NAT
    nics: list[Nic] = field(default_factory=list)

    @property
    def device(self) -> IsolatedNetwork:
        return self.network

    def questions(self, *, over6: bool = True) -> list[Question]:
        """Both sides: the guests' gateway and the public addresses, and the gateway of IPv6."""
        asked = [Question("eth1", VLAN, GATEWAY)]
        asked += [Question("eth2", PUBLIC_VLAN, it) for it in (SOURCE_NAT, STATIC_NAT)]
        return [*asked, Question("eth1", VLAN, GATEWAY6)] if over6 else asked

    def kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """TCP through source NAT, static NAT and a forwarded port: ``each`` so many."""
        return tcp_kinds(self.vm, self.second_vm, self.internet, each, every_s=every_s)

    def udp_kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """UDP through source NAT and static NAT."""
        return [
            FlowKind("UDP out", self.second_vm, self.internet, OUTSIDE, OUTWARD_UDP_PORT, each, "udp", every_s),
            FlowKind("UDP in", self.internet, self.vm, STATIC_NAT, UDP_PORT, each, "udp", every_s),
        ]

    def kinds6(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """TCP over IPv6, from the VM."""
        return [FlowKind("IPv6", self.vm, self.internet, OUTSIDE6, OUTWARD_PORT, each, every_s=every_s)]

    def opening(self, *, per_s: float = 1000.0, count: int = 3000) -> FlowKind:
        """Further TCP connections through static NAT, one each millisecond, until ``open_no_more``."""
        return FlowKind(
            "opened each ms", self.internet, self.vm, STATIC_NAT, STATIC_PORT, count, every_s=1.0, per_s=per_s
        )


@contextmanager
def candidates_bed(
    candidates: int, *, details: Mapping[str, str] | None = None
) -> Iterator[tuple[Bed, FakeCloudStack, Internet]]:
    """A bed of so many candidates and one more host for VMs, and a CloudStack with these ``details`` registered."""
    with Bed(hosts=candidates + 1, vlans=[VLAN], public_vlans=[PUBLIC_VLAN]) as bed:
        internet = bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])
        cloud = FakeCloudStack.on(bed.management)
        cloud.register(hosts=bed.hosts[:candidates], **bed.login("root", by="key"), **(details or {}))
        yield bed, cloud, internet


def wait_for_agents(it: ScopeBed) -> None:
    """Wait until all candidates have an agent. Raises TimeoutError."""
    if not until(lambda: it.device.ensure().ok and all(faults.agents_of(host) for host in it.candidates), seconds=120):
        raise TimeoutError("not all agents run")


@contextmanager
def standby_bed(candidates: int = 3, *, details: Mapping[str, str] | None = None) -> Iterator[StandbyBed]:
    """A bed of so many candidates, and a host for the VMs.

    ``details`` are further ones of the registration. The network has source NAT, static NAT, a forwarded port, IPv6
    and two VMs.
    """
    with candidates_bed(candidates, details={**REGISTERED6, **(details or {})}) as (bed, cloud, internet):
        network = cloud.isolated_network(
            204, vlan=VLAN, cidr="10.10.1.0/24", offering=ALL_SERVICES, source_nat=SOURCE_NAT, public_vlan=PUBLIC_VLAN
        )
        network.ensures_always = False
        network.facts.ip6_gateway, network.facts.ip6_cidr = GATEWAY6, PREFIX6
        network.implement()
        nics = [
            network.add_nic(_nic("8101", MAC, VM_IP, "web-1", ip6=VM6)),
            network.deploy_vm("db-1", ip=SECOND_IP, mac=SECOND_MAC),
        ]
        vm, second_vm = [
            bed.hosts[-1].vm(nic.vm.name, vlan=VLAN, mac=nic.mac, ip=f"{nic.ip}/24", gateway=GATEWAY) for nic in nics
        ]
        static, forwarded = network.associate(STATIC_NAT), network.associate(FORWARDED)
        network.enable_static_nat(static, nics[0])
        network.add_firewall_rule(static, "all")
        network.add_port_forward(forwarded, FORWARDED_PORT, nics[0], 22, open_firewall=True)
        hosts = bed.hosts[:candidates]
        it = StandbyBed(bed, cloud, internet, Operator(bed), hosts, network, vm, second_vm, nics)
        _connect6(it)
        wait_for_agents(it)
        yield it


def _nic(number: str, mac: str, ip: str, name: str, *, ip6: str) -> Nic:
    vm = VirtualMachine(name, f"9f000000-0000-4000-8000-00000000{number}")
    uuid = f"6b7c2a10-0000-4000-8000-00000000{number}"
    return Nic(number, uuid, mac, ip, vm, ip6_address=ip6, ip6_gateway=GATEWAY6, ip6_cidr=PREFIX6)


def _connect6(it: StandbyBed) -> None:
    """Give the VM its address and the internet its route to the guests, as a provider does."""
    it.vm.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")
    # It computes the same address from the router advertisement, if that has come.
    it.vm.links(f"address replace {VM6}/64 dev eth0 nodad", f"route replace ::/0 via {GATEWAY6} dev eth0")
    wait_for_address6(it.vm, VM6)
    connect6(it.internet, it.network.custom_action("show"), PREFIX6)


def wait_for_address6(vm: Vm, address: str) -> None:
    """Wait until the VM sends from the address: it has computed it, and nobody else uses it. Raises TimeoutError.

    A connection that is opened earlier comes from the link-local address, and is never answered.
    """
    shown = ("ip", "-6", "address", "show", "dev", "eth0", "-tentative")
    if not until(lambda: address in vm.run(*shown).out):
        raise TimeoutError(f"{vm.name} has not got {address}")


def connect6(internet: Internet, shown: str, *prefixes: str) -> None:
    """Let the internet route these prefixes to the device, as a provider does. ``shown``: what it says of itself."""
    for name in ("all", "default", "eth0", "lo"):
        internet.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", "0")
    internet.sysctl("net.ipv6.conf.all.forwarding", "1")
    device = shown.partition("IPv6 leaves as ")[2].split()[0].partition("/")[0]
    internet.links(
        f"address replace {ROUTER6}/64 dev eth0 nodad",
        f"address replace {OUTSIDE6}/128 dev lo nodad",
        *(f"route replace {it} via {device} dev eth0" for it in prefixes),
    )
