"""A VPC and a shared network for take-overs, on one bed: the candidates of both are the same three hosts.

with kinds_bed() as make:
    vpc, shared = make.vpc(1), make.shared(1)
    vpc.build()
    vpc.make_ready()
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bed.cloudstack import FakeCloudStack
from bed.flows import FlowKind
from bed.lab import Bed, Host, Internet, Vm
from bed.machines import Machine
from bed.observer import Question
from bed.operator import Operator
from bed.payloads import AclItem, Nic, PublicAddress, VirtualMachine, VpcFacts
from bed.shared import SharedNetwork
from bed.standby import (
    OUTSIDE,
    OUTSIDE6,
    PUBLIC_VLAN,
    REGISTERED6,
    ScopeBed,
    candidates_bed,
    connect6,
    wait_for_address6,
)
from bed.vpc import Tier, Vpc

WEB_PORT, APP_PORT, OUTWARD_PORT, FORWARDED_PORT, BALANCED_PORT = 8001, 8004, 8000, 2222, 80
WEB_UDP_PORT, APP_UDP_PORT, OUTWARD_UDP_PORT = 8002, 8006, 8003
NEW_WEB_PORT, NEW_APP_PORT = 8011, 8014  # for connections beside the flows
CLOSED_PORT = 8005  # no ACL allows it
TIER_KINDS = ("source NAT", "static NAT", "port forward", "web to app", "app to web")
ANYWHERE = ("0.0.0.0/0", "::/0")

_BOUND = """#!/bin/sh
[ "$1" = bound ] && env | grep -E '^(ip|mask|router|dns|domain|search|serverid|lease|hostname|mtu|staticroutes)='
exit 0
"""


# Sends a router solicitation, and prints the router's address and its advertisement (RFC 4861 sections 4.1 and 4.2).
_SOLICIT = r"""
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as it:
    number = socket.if_nametoindex("eth0")
    it.setsockopt(socket.IPPROTO_ICMPV6, 1, b"\xff" * 16 + b"\xbf" + b"\xff" * 15)  # ICMPV6_FILTER: only 134
    it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, number)
    it.settimeout(1.0)
    for _ in range(20):
        it.sendto(bytes((133, 0, 0, 0, 0, 0, 0, 0)), ("ff02::2", 0, 0, number))
        try:
            data, sender = it.recvfrom(2048)
        except TimeoutError:
            continue
        print(sender[0].partition("%")[0], data[:2].hex(), data[4:].hex())  # without the checksum
        break
"""


def advertised(vm: Machine) -> str:
    """The router's address and its advertisement in hexadecimal, as a guest gets it for a solicitation."""
    return vm.run("python3", "-c", _SOLICIT).out


def address6(prefix: str, mac: str) -> str:
    """The address that a guest with this MAC address computes from a prefix of 64 bits (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return str(ipaddress.IPv6Network(prefix)[int.from_bytes(identifier)])


def served(vm: Machine, server: str, names: dict[str, str]) -> dict[str, str]:
    """What a guest gets from ``server``: its lease, its metadata, and the addresses of ``names``, by name."""
    vm.write("/tmp/bound", _BOUND, mode=0o755)
    dhcp = ["busybox", "udhcpc", "-fqn", "-t20", "-T1", "-ieth0", "-s/tmp/bound", "-Ohostname", "-Omtu"]
    lease = vm.run(*dhcp).out
    url = f"http://{server}/latest"
    got = {"lease": "\n".join(sorted(lease.split("\n")))}
    for name in ("meta-data/local-hostname", "meta-data/instance-id", "meta-data/public-keys", "user-data"):
        got[name] = vm.run("curl", "-sf", "-m", "20", f"{url}/{name}").out
    for name, address in names.items():
        told = vm.run("dig", f"@{server}", "+short", "+time=5", "+tries=4", name).out.strip()
        assert told == address, f"{name} is {told!r}, not {address}"
    return got


def _guest(name: str, number: str) -> VirtualMachine:
    uuid = f"9f000000-0000-4000-8000-{number:0>12}"
    return VirtualMachine(name, uuid, user_data=f"IyEgL2Jpbi9zaCAj{number:0>4}", public_key=f"ssh-ed25519 AAAA{name}")


@dataclass
class VpcBed(ScopeBed):
    """A VPC with the tiers web and app, both with IPv6, a VM in each, ACLs, and source NAT.

    The VM of web has the static NAT, that of app a forwarded and a balanced port on one address. ``number``: of the
    VPC, from 1 to 9. No two have an address or a VLAN in common.
    """

    number: int
    vpc: Vpc
    public: list[PublicAddress]  # for source NAT, for static NAT, for forwarded ports
    tiers: list[Tier] = field(default_factory=list)
    vms: list[Vm] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)

    @property
    def device(self) -> Vpc:
        return self.vpc

    def add_tier(self, digit: int, *, over6: bool = False) -> Tier:
        """Add a tier, 10.<100+n>.<digit>.0/24. Its first VM implements it.

        ``over6``: with 2001:db8:7<n>:<digit>::/64, too.
        """
        vlan = 2000 + 10 * self.number + digit
        self.bed.add_segments([("eth1", str(vlan))])
        cidr = f"10.{100 + self.number}.{digit}.0/24"
        tier = self.vpc.add_tier(7000 + 10 * self.number + digit, vlan=vlan, cidr=cidr)
        tier.facts.domain = f"tier{digit}.example.internal"
        tier.ensures_always = False
        if over6:
            prefix = f"2001:db8:7{self.number}:{digit}::"
            tier.facts.ip6_gateway, tier.facts.ip6_cidr = f"{prefix}1", f"{prefix}/64"
        self.tiers.append(tier)
        return tier

    def add_vm(self, tier: Tier, name: str, last: int = 45) -> Vm:
        """Deploy a VM in CloudStack, and start it."""
        digit = int(tier.facts.network_id) % 10
        subnet = tier.facts.cidr.rpartition(".")[0]
        mac = f"02:02:{self.number:02x}:{digit:02x}:00:{last:02x}"
        number = f"{self.number}{digit}{last}"
        nic = Nic(number, f"6b7c2a10-0000-4000-8000-{number:0>12}", mac, f"{subnet}.{last}", _guest(name, number))
        if prefix := tier.facts.ip6_cidr:
            nic.ip6_address, nic.ip6_gateway, nic.ip6_cidr = address6(prefix, mac), tier.facts.ip6_gateway, prefix
        tier.add_nic(nic)
        vm = self.vm_host.vm(name, vlan=tier.facts.vlan, mac=mac, ip=f"{nic.ip}/24", gateway=tier.facts.gateway)
        if prefix:
            vm.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")
        self.nics.append(nic)
        self.vms.append(vm)
        return vm

    def build(self) -> None:
        """Let CloudStack create everything."""
        self.vpc.implement()
        web, app = self.add_tier(1, over6=True), self.add_tier(2, over6=True)
        self.add_vm(web, f"web-{self.number}")
        self.add_vm(app, f"app-{self.number}")
        allowed = [AclItem(9, "allow", "egress", "all", cidrs=ANYWHERE)]
        of_web = (web.facts.cidr, web.facts.ip6_cidr)
        web.replace_acl(
            [
                AclItem(1, "allow", "ingress", "tcp", WEB_PORT, cidrs=ANYWHERE),
                AclItem(2, "allow", "ingress", "tcp", NEW_WEB_PORT, cidrs=ANYWHERE),
                AclItem(3, "allow", "ingress", "udp", WEB_UDP_PORT),
                *allowed,
            ]
        )
        app.replace_acl(
            [
                AclItem(1, "allow", "ingress", "tcp", 22),
                AclItem(2, "allow", "ingress", "tcp", APP_PORT, cidrs=of_web),
                AclItem(3, "allow", "ingress", "tcp", NEW_APP_PORT, cidrs=of_web),
                AclItem(4, "allow", "ingress", "udp", APP_UDP_PORT, cidrs=(web.facts.cidr,)),
                AclItem(5, "allow", "ingress", "tcp", BALANCED_PORT),
                *allowed,
            ]
        )
        _, static, forwarded = self.public
        web.enable_static_nat(web.associate(static), self.nics[0])
        app.add_port_forward(app.associate(forwarded), FORWARDED_PORT, self.nics[1], 22)
        self.app.serve_tcp(BALANCED_PORT)  # while the VM lives: the balancer asks for it all the time
        app.add_lb_rule(forwarded, "balanced", BALANCED_PORT, BALANCED_PORT, [self.nics[1]])
        connect6(self.internet, self.vpc.custom_action("show"), *of_web[1:], app.facts.ip6_cidr)
        for vm, address in ((self.web, self.web6), (self.app, self.app6)):
            wait_for_address6(vm, address)

    def delete(self) -> None:
        """End the VMs, and let CloudStack delete everything."""
        for vm in self.vms:
            vm.destroy()
        for tier in list(self.vpc.tiers):
            tier.delete()
        self.vpc.delete()

    @property
    def web(self) -> Vm:
        return self.vms[0]

    @property
    def app(self) -> Vm:
        return self.vms[1]

    @property
    def web6(self) -> str:
        return self.nics[0].ip6_address

    @property
    def app6(self) -> str:
        return self.nics[1].ip6_address

    def questions(self, *, over6: bool = True) -> list[Question]:
        """The gateways of each tier, and the public addresses."""
        tiers = [it.facts for it in self.vpc.tiers if it.facts.vlan]
        asked = [Question("eth1", it.vlan, it.gateway) for it in tiers]
        asked += [Question("eth1", it.vlan, it.ip6_gateway) for it in tiers if over6 and it.ip6_gateway]
        return asked + [Question("eth2", PUBLIC_VLAN, it.ip) for it in self.public]

    def kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """See TIER_KINDS. Flows between tiers are routed by the VPC, without NAT."""
        outward, static, forwarded, forth, back = TIER_KINDS
        _, static_ip, forwarded_ip = (it.ip for it in self.public)
        web, app, internet = self.web, self.app, self.internet
        return [
            FlowKind(outward, app, internet, OUTSIDE, OUTWARD_PORT, each, every_s=every_s),
            FlowKind(static, internet, web, static_ip, WEB_PORT, each, every_s=every_s),
            FlowKind(forwarded, internet, app, forwarded_ip, FORWARDED_PORT, each, every_s=every_s, listens_at=22),
            FlowKind(forth, web, app, app.ip, APP_PORT, each, every_s=every_s),
            FlowKind(back, app, web, web.ip, WEB_PORT, each, every_s=every_s),
        ]

    def udp_kinds(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """UDP through source NAT and static NAT, and between the tiers."""
        web, app, internet = self.web, self.app, self.internet
        return [
            FlowKind("UDP out", app, internet, OUTSIDE, OUTWARD_UDP_PORT, each, "udp", every_s),
            FlowKind("UDP in", internet, web, self.public[1].ip, WEB_UDP_PORT, each, "udp", every_s),
            FlowKind("UDP between tiers", web, app, app.ip, APP_UDP_PORT, each, "udp", every_s),
        ]

    def kinds6(self, each: int = 1, *, every_s: float = 0.25) -> list[FlowKind]:
        """TCP over IPv6: to the internet, from it, and between the tiers."""
        web, app, internet = self.web, self.app, self.internet
        return [
            FlowKind("IPv6 out", app, internet, OUTSIDE6, OUTWARD_PORT, each, every_s=every_s),
            FlowKind("IPv6 in", internet, web, self.web6, WEB_PORT, each, every_s=every_s),
            FlowKind("IPv6 between tiers", web, app, self.app6, APP_PORT, each, every_s=every_s),
        ]

    def served(self) -> list[dict[str, str]]:
        """What each VM gets from its tier. Names of the VMs of its own tier are resolved."""
        found = []
        for vm, nic, tier in self._places():
            name = f"{nic.vm.name}.{tier.facts.domain}"
            got = served(vm, tier.facts.gateway, {name: nic.ip})
            if server := tier.facts.ip6_gateway:
                got["AAAA"] = vm.run("dig", f"@{server}", "+short", "+time=5", "+tries=4", "AAAA", name).out.strip()
                got["router advertisement"] = advertised(vm)
                assert got["AAAA"] == nic.ip6_address
                assert ipaddress.IPv6Address(server).packed.hex() in got["router advertisement"], "its own resolver"
            found.append(got)
        return found

    def _places(self) -> Iterator[tuple[Vm, Nic, Tier]]:
        for vm, nic in zip(self.vms, self.nics, strict=True):
            for tier in self.vpc.tiers:
                if nic in tier.nics:
                    yield vm, nic, tier


@dataclass
class SharedBed(ScopeBed):
    """A shared network with two VMs. Its device has DHCP, names and metadata, and forwards nothing."""

    network: SharedNetwork
    number: int
    vms: list[Vm] = field(default_factory=list)

    @property
    def device(self) -> SharedNetwork:
        return self.network

    @property
    def device_ip(self) -> str:
        return self.network.facts.reserved_ip

    @property
    def vlan(self) -> str:
        return self.network.facts.vlan

    def add_vm(self, name: str, last: int) -> Vm:
        """Deploy a VM in CloudStack, and start it. The first one builds the network."""
        number = f"{self.number}{last:0>3}"
        ip = f"{self.device_ip.rpartition('.')[0]}.{last}"
        mac = f"1e:00:aa:{self.number:02x}:00:{last:02x}"
        nic = Nic(number, f"6b7c2a10-0000-4000-9000-{number:0>12}", mac, ip, _guest(name, number))
        self.network.add_nic(nic)
        vm = self.vm_host.vm(name, vlan=self.vlan, mac=mac, ip=f"{ip}/24", gateway=self.network.facts.gateway)
        self.vms.append(vm)
        return vm

    def build(self) -> None:
        """Let CloudStack deploy the VMs."""
        self.add_vm(f"sh-{self.number}-1", 61)
        self.add_vm(f"sh-{self.number}-2", 62)

    def delete(self) -> None:
        """End the VMs, and let CloudStack delete everything."""
        for vm in self.vms:
            vm.destroy()
        for nic in list(self.network.nics):
            self.network.expunge_vm(nic)
        self.network.delete()

    def questions(self, *, over6: bool = True) -> list[Question]:
        """The address of the device."""
        return [Question("eth1", self.vlan, self.device_ip)]

    def served(self) -> list[dict[str, str]]:
        """What each VM gets from the device, with the names of all."""
        names = {f"{it.vm.name}.{self.network.facts.domain}": it.ip for it in self.network.nics}
        return [served(vm, self.device_ip, names) for vm in self.vms]


@dataclass(frozen=True)
class KindsBed:
    """Makes VPCs and shared networks with standby hosts. They are not built yet."""

    bed: Bed
    cloud: FakeCloudStack
    internet: Internet
    operator: Operator
    candidates: list[Host]

    def vpc(self, number: int) -> VpcBed:
        vpc = Vpc(self.cloud, VpcFacts(str(700 + number), f"10.{100 + number}.0.0/16"), PUBLIC_VLAN)
        public = [vpc.associate(f"203.0.113.{30 + 4 * number + digit}") for digit in range(3)]
        vpc.source_nat = public[0]
        public[0].source_nat = True
        places = (self.bed, self.cloud, self.internet, self.operator, self.candidates)
        return VpcBed(*places, number, vpc, public)

    def shared(self, number: int) -> SharedBed:
        vlan, net = 1990 + number, f"10.{30 + number}.0"
        self.bed.add_segments([("eth1", str(vlan))])
        network = SharedNetwork(self.cloud, 990 + number, vlan=vlan, cidr=f"{net}.0/24", device_ip=f"{net}.5")
        places = (self.bed, self.cloud, self.internet, self.operator, self.candidates)
        return SharedBed(*places, network, number)


@contextmanager
def kinds_bed() -> Iterator[KindsBed]:
    """A bed of three candidates and a host for the VMs, whose networks get a standby."""
    with candidates_bed(3, details={"standby": "auto", **REGISTERED6}) as (bed, cloud, internet):
        yield KindsBed(bed, cloud, internet, Operator(bed), bed.hosts[:3])
