"""CloudStack's view of the networks: what it wants of each, and the commands that it sends for a change.

All networks have the same subnet, as tenants do. Each has its own guest VLAN, ten VMs, and public addresses: one for
source NAT, one for port forwards and balanced rules, two for static NAT.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from load.hosts import PREFIX_LENGTH, public_address, public_gateway

VMS = 10
FORWARDS = 10
GATEWAY = "10.1.1.1"
SUBNET = {"gateway": GATEWAY, "cidr": "10.1.1.0/24", "extension_ip": GATEWAY}
DNS = {"dns": "192.0.2.53", "domain": "cloud.test"}
FIRST_ID, FIRST_VLAN, FIRST_PUBLIC_VLAN = 3000, 1000, 101
NETWORKS_MAX = 4094 - FIRST_VLAN

Command = tuple[str, str, dict[str, Any]]  # number of the payload file, command, fields that differ from the file


def vm_ip(vm: int) -> str:
    return f"10.1.1.{11 + vm}"


class Shared:
    """A lock for many users at once, or one alone."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._users = 0  # -1: one, alone

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._users >= 0)
            self._users += 1
        try:
            yield
        finally:
            async with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._users == 0)
            self._users = -1
        try:
            yield
        finally:
            async with self._changed:
                self._users = 0
                self._changed.notify_all()


@dataclass
class CloudNetwork:
    """What CloudStack has in its database for a network. ``where``: the host that it stored.

    ``resolves``: VMs get names and a resolver. ``balances``: the network may have balanced rules. ``parts``: a lock for
    each part of it that CloudStack changes by itself: commands of one part come one after the other.
    """

    number: int
    public_vlans: int
    resolves: bool
    balances: bool
    where: str
    exists: bool = False
    life: Shared = field(default_factory=Shared)
    parts: dict[str, asyncio.Lock] = field(default_factory=dict)

    vms: dict[int, int] = field(default_factory=dict)  # number -> which VM of this number it is
    gone: dict[int, int] = field(default_factory=dict)  # VMs that were expunged
    passwords: dict[int, str] = field(default_factory=dict)
    forwards: dict[int, int] = field(default_factory=dict)  # public port -> VM
    static_nats: dict[int, int] = field(default_factory=dict)  # address 2 or 3 -> VM
    rules: list[int] = field(default_factory=list)  # ports that the firewall admits
    backends: list[int] = field(default_factory=list)  # VMs of the balanced rule; empty: no rule

    @property
    def network_id(self) -> str:
        return str(FIRST_ID + self.number)

    @property
    def scope_id(self) -> str:
        return f"net-{self.network_id}"

    @property
    def namespace(self) -> str:
        return f"cs-{self.scope_id}"

    @property
    def vlan(self) -> str:
        return str(FIRST_VLAN + self.number)

    @property
    def bridge(self) -> str:
        return f"breth1-{self.vlan}"

    def part(self, name: str) -> asyncio.Lock:
        return self.parts.setdefault(name, asyncio.Lock())

    def address(self, at: int) -> str:
        return public_address(self.number % self.public_vlans, self.number // self.public_vlans * 4 + at)

    def mac(self, vm: int) -> str:
        return f"02:01:{self.number >> 8:02x}:{self.number & 255:02x}:{self.vms[vm] & 255:02x}:{vm:02x}"

    def fields(self) -> dict[str, Any]:
        return {"network_id": self.network_id, "vlan": self.vlan, **SUBNET, **DNS}

    def public(self, at: int) -> dict[str, Any]:
        """The fields of public address ``at`` of the network."""
        vlan = self.number % self.public_vlans
        return {
            "public_ip": self.address(at),
            "public_vlan": f"vlan://{FIRST_PUBLIC_VLAN + vlan}",
            "public_gateway": public_gateway(vlan),
            "public_cidr": f"{public_gateway(vlan)}/{PREFIX_LENGTH}",
            "source_nat": str(at == 0).lower(),
        }

    def nic(self, vm: int) -> dict[str, Any]:
        """The fields of a VM's NIC."""
        number = self.number * VMS + vm
        return {
            "nic_id": str(100_000 + number * 256 + self.vms[vm] % 256),
            "nic_uuid": f"{number:08x}-0000-4000-8000-{self.vms[vm]:012x}",
            "mac": self.mac(vm),
            "ip": vm_ip(vm),
            "netmask": "255.255.255.0",
            "hostname": f"vm-{vm}-{self.vms[vm]}",
        }

    # ------------------------------------------------------------------------------------------------ the commands

    def build(self) -> Iterator[Command]:
        """The network comes into being, with all VMs at once."""
        yield "020", "implement-network", {}
        yield "021", "assign-ip", self.public(0)
        yield "022", "apply-fw-rules", {}
        yield from self.restore()

    def restart(self) -> Iterator[Command]:
        yield "137", "implement-network", {}
        yield from self.restore()

    def restore(self) -> Iterator[Command]:
        vms = []
        for vm in sorted(self.vms):
            nic = self.nic(vm)
            data = [{"dir": "metadata", "file": "instance-id", "content": nic["nic_uuid"]}]
            data += [
                {"dir": "userdata", "file": "user_data", "content": f"#cloud-config\nhostname: {nic['hostname']}\n"}
            ]
            named = {key: nic[key] for key in ("nic_uuid", "mac", "ip", "hostname")}
            vms.append({**named, **DNS, "default_nic": True, "device_id": "0", "vm_data": data})
        told = {"dhcp_enabled": True, "dns_enabled": self.resolves, "userdata_enabled": True, "vms": vms}
        yield "110", "restore-network", {"restore_data": told}

    def end(self) -> Iterator[Command]:
        yield "126", "shutdown-network", {}
        yield "131", "destroy-network", {"vlan": ""}

    def renew(self) -> None:
        """What the network is at its beginning: with other VMs than before, but for VM 0, which may have a link."""
        self.vms = {vm: vm and self.vms.get(vm, self.gone.get(vm, 0)) + 1 for vm in range(VMS)}
        self.passwords, self.forwards, self.static_nats = {}, {}, {}
        self.rules, self.backends = [], []

    def toggle_forward(self, chance: random.Random) -> Iterator[Command]:
        at = chance.randrange(FORWARDS)
        port, vm = 2000 + at, at % VMS
        told = {"public_port": str(port), "private_port": "22", "private_ip": vm_ip(vm), "protocol": "tcp"}
        if self.forwards.pop(port, None) is not None:
            yield "056", "delete-port-forward", {**self.public(1), **told}
        else:
            self.forwards[port] = vm
            yield "053", "add-port-forward", {**self.public(1), **told}

    def toggle_static_nat(self, chance: random.Random) -> Iterator[Command]:
        at = chance.choice((2, 3))
        vm = at  # each VM has one static NAT
        if self.static_nats.pop(at, None) is not None:
            yield "059", "delete-static-nat", {**self.public(at), "private_ip": vm_ip(vm)}
            yield "060", "release-ip", self.public(at)
        else:
            self.static_nats[at] = vm
            yield "057", "assign-ip", self.public(at)
            yield "058", "add-static-nat", {**self.public(at), "private_ip": vm_ip(vm)}

    def change_rules(self, chance: random.Random) -> Iterator[Command]:
        self.rules = sorted(chance.sample(range(2000, 2000 + FORWARDS), chance.randrange(FORWARDS)))
        rules = [
            {
                "id": port,
                "type": "ingress",
                "protocol": "tcp",
                "portStart": port,
                "portEnd": port,
                "publicIp": self.address(1),
                "sourceCidrs": ["0.0.0.0/0"],
            }
            for port in self.rules
        ]
        yield "070", "apply-fw-rules", {"fw_rules": {"default_egress_allow": True, "rules": rules}}

    def replace_vm(self, chance: random.Random) -> Iterator[Command]:
        """A VM is expunged, or a new one is deployed in its place."""
        vm = chance.randrange(1, VMS)
        if vm in self.vms and chance.random() < 0.5:
            nic = self.nic(vm)
            generation = self.vms.pop(vm)
            self.passwords.pop(vm, None)
            self.gone[vm] = generation
            yield "101", "remove-dhcp-entry", {"nic_id": nic["nic_id"], "mac": nic["mac"], "ip": nic["ip"]}
            return
        if vm in self.vms:
            return
        self.vms[vm] = self.gone.pop(vm, 0) + 1
        nic = self.nic(vm)
        yield "030", "prepare-nic", nic
        yield "032", "add-dhcp-entry", nic
        if self.resolves:
            yield "034", "add-dns-entry", nic
        data = [{"dir": "metadata", "file": "instance-id", "content": nic["nic_uuid"]}]
        yield "035", "save-vm-data", {**nic, "vm_data": data}

    def save_password(self, chance: random.Random) -> Iterator[Command]:
        if not self.vms:
            return
        vm = chance.choice(sorted(self.vms))
        self.passwords[vm] = f"pw-{chance.randrange(10**9)}"
        yield "090", "save-password", {**self.nic(vm), "password": self.passwords[vm]}

    def change_balancing(self, chance: random.Random) -> Iterator[Command]:
        if self.backends and chance.random() < 0.4:
            backends, self.backends = self.backends, []
        else:
            backends = self.backends = sorted(chance.sample(range(VMS), chance.randint(1, 4)))
        rule = {
            "id": int(self.network_id),
            "name": "web",
            "publicIp": self.address(1),
            "publicPort": 80,
            "privatePort": 8080,
            "protocol": "tcp",
            "algorithm": "roundrobin",
            "revoke": not self.backends,
            "backends": [{"ip": vm_ip(vm), "port": 8080, "revoked": False} for vm in backends],
        }
        yield "057", "assign-ip", self.public(1)
        yield "080", "apply-lb-rules", {"lb_rules": [rule]}

    # ------------------------------------------------------------------------------------------------ the result

    def wrong(self, state: dict[str, Any]) -> list[str]:
        """Where the state of the network on its host differs from CloudStack's database."""
        network = state["networks"].get(self.network_id, {})
        nics = {it["ip"]: it for it in network.get("nics", {}).values() if it.get("leased")}
        found: dict[str, Any] = {
            "forwards": {
                str(it["public_ports"]["first"]): it["private_ip"] for it in state.get("port_forwards", {}).values()
            },
            "static NATs": {ip: it["private_ip"] for ip, it in state.get("static_nats", {}).items()},
            "firewall": sorted(str(it["ports"]["first"]) for it in (network.get("firewall") or {}).get("rules", ())),
            "VMs": {ip: it["mac"] for ip, it in nics.items()},
            "passwords": {ip: it["password"] for ip, it in nics.items() if it.get("password")},
            "balanced": sorted(
                backend["ip"] for rule in state.get("lb_rules", {}).values() for backend in rule["backends"]
            ),
        }
        want: dict[str, Any] = {
            "forwards": {str(port): vm_ip(vm) for port, vm in self.forwards.items()},
            "static NATs": {self.address(at): vm_ip(vm) for at, vm in self.static_nats.items()},
            "firewall": [str(port) for port in self.rules],
            "VMs": {vm_ip(vm): self.mac(vm) for vm in self.vms},
            "passwords": {vm_ip(vm): it for vm, it in self.passwords.items()},
            "balanced": sorted(vm_ip(vm) for vm in self.backends),
        }
        return [
            f"{self.scope_id}: {what}: {json.dumps(found[what])} instead of {json.dumps(want[what])}"
            for what in want
            if found[what] != want[what]
        ]
