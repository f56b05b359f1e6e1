"""Source NAT that moves to an address on another public segment: another VLAN, or a VXLAN. With packets, and IPv6."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest

from kernel.agent_host import AgentHost, done, wait_until
from kernel.greeting import connected, greeted, serving, tell_address
from netloom.wire import Registration

FORMER, LATER = "203.0.113.20", "198.51.100.20"
OUTSIDE, OUTSIDE6 = "192.0.2.10", "2001:db8:99::10"
MAC = "02:01:00:cc:05:03"
REGISTRATION = Registration(
    owner="test", guest_nic="eth1", public_nic="eth2", ip6_gateway="fe80::1", ip6_address="2001:db8:98::/64"
)
IP6 = {"network_ip6_gateway": "2001:db8:50:1::1", "network_ip6_cidr": "2001:db8:50:1::/64"}
ALL = [
    {"number": at, "action": "allow", "trafficType": way, "protocol": "all", "sourceCidrs": ["0.0.0.0/0", "::/0"]}
    for at, way in enumerate(("ingress", "egress"), 1)
]
# Kind: the subnet of the VM, its VLAN, namespace, the payload files that build the network, and the one that moves.
KINDS: dict[str, tuple[str, str, str, dict[str, str], tuple[str, str], dict[str, str]]] = {
    "isolated": (
        "10.10.1", "1204", "cs-net-204", {"020": "implement-network", "021": "assign-ip", "022": "apply-fw-rules"},
        ("021", "assign-ip"), {},
    ),
    "tier": (
        "10.20.1", "1310", "cs-vpc-7",
        {"202": "implement-vpc", "210": "implement-network", "211": "assign-ip", "213": "apply-network-acl"},
        ("234", "update-vpc-source-nat-ip"), {"vpc_id": "7", "network_id": "310"},
    ),
}  # fmt: skip


def public(address: str, vlan: str) -> dict[str, str]:
    net = address.rpartition(".")[0]
    return {"public_ip": address, "public_vlan": vlan, "public_gateway": f"{net}.1", "public_cidr": f"{net}.0/24"}


class World:
    """One host with a network of ``kind``, its VM, and a provider that has a gateway on each public segment."""

    def __init__(self, host: AgentHost, kind: str, later: str) -> None:
        self.host, self.kind = host, kind
        self.net, vlan, self.namespace, self.building, self.moving, self.ids = KINDS[kind]
        self.link = {FORMER: "sw-eth2.101", LATER: "sw-eth2.102" if later == "vlan://102" else "vxlan1000"}
        self.vlans = {FORMER: "vlan://101", LATER: later}
        self._provide()
        for fixture, command in self.building.items():
            changes: dict[str, Any] = public(FORMER, "vlan://101") if fixture in ("021", "202", "211") else {}
            self.call(fixture, command, **changes, **({"acl_rules": ALL} if fixture == "213" else {}))
        host.plug("vm", "", MAC, f"{self.net}.45/24")
        for key in ("all", "eth0"):
            host.run("sysctl", "-qw", f"net/ipv6/conf/{key}/disable_ipv6=0", namespace="vm")
        host.run("sysctl", "-qw", "net/ipv6/conf/eth0/dad_transmits=0", namespace="vm")
        host.ip("-n", "vm", "route", "add", "default", "via", f"{self.net}.1")
        host.ip("link", "set", "tap-vm", "master", f"breth1-{vlan}")

    def _provide(self) -> None:
        def fabric(words: str) -> None:
            self.host.run(*words.split(), pid=self.host.fabric)

        fabric("sysctl -qw net/ipv6/conf/all/forwarding=1 net/ipv4/conf/all/rp_filter=0")
        if self.link[LATER] == "vxlan1000":
            self.host.ip("link", "del", "eth2")
            self.host.ip("link", "add", "eth2", "type", "veth", "peer", "name", "eth2", "netns", str(self.host.fabric))
            self.host.ip("addr", "add", "10.99.0.11/24", "dev", "eth2")
            fabric("ip addr add 10.99.0.12/24 dev eth2")
            fabric("ip link set eth2 up")
            fabric("ip link add vxlan1000 type vxlan id 1000 group 239.0.3.232 ttl 10 dev eth2")
        fabric(f"ip addr add {OUTSIDE}/32 dev lo")
        fabric(f"ip -6 addr add {OUTSIDE6}/128 dev lo nodad")
        for address, link in self.link.items():
            fabric(f"sysctl -qw net/ipv4/conf/{link}/rp_filter=0 net/ipv6/conf/{link}/dad_transmits=0")
            fabric(f"ip link set {link} up")
            fabric(f"ip addr add {address.rpartition('.')[0]}.1/24 dev {link}")
            fabric(f"ip -6 addr add fe80::1/64 dev {link} nodad")
        # A provider drops packets whose source is not an address of the segment.
        fabric(
            "nft table ip strays { chain stray { type filter hook prerouting priority -300; "
            f"iifname {self.link[FORMER]} ip saddr != 203.0.113.0/24 drop; "
            f"iifname {self.link[LATER]} ip saddr != 198.51.100.0/24 drop; }}; }}"
        )

    def call(self, fixture: str, command: str, **changes: Any) -> None:
        changes = {**(IP6 if "vpc" not in command else {}), **changes}
        done(self.host.call(fixture, command, registration=REGISTRATION, **changes))

    def rule(self, command: str) -> None:
        fields = public(FORMER, "vlan://101") | {
            "public_port": "2222", "private_port": "22", "protocol": "tcp", "private_ip": f"{self.net}.45",
        }  # fmt: skip
        self.call("226" if self.kind == "tier" else "053", command, **fields)
        if self.kind == "isolated":
            opened = {
                "id": 1, "type": "ingress", "protocol": "tcp", "portStart": 2222, "publicIp": FORMER,
                "sourceCidrs": ["0.0.0.0/0"],
            }  # fmt: skip
            listed = [opened] if command == "add-port-forward" else []
            self.call("070", "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": listed})

    def move(self, address: str) -> None:
        fixture, command = self.moving
        self.call(fixture, command, **public(address, self.vlans[address]))
        if self.kind == "tier":
            self.call("211", "assign-ip", **public(address, self.vlans[address]))

    def is_answered(self, address: str, patience_s: int = 1) -> bool:
        """Whether somebody answers ARP for the address on its segment."""
        words = ["arping", "-c", "1", "-w", str(patience_s), "-I", self.link[address], address]
        return "reply from" in self.host.run(*words, pid=self.host.fabric, check=False)


def talk(client: socket.socket) -> None:
    """Tell the client its address, and then repeat what it sends."""
    tell_address(client)
    while data := client.recv(100):
        client.sendall(data)


def carries(client: socket.socket) -> bool:
    client.sendall(b"more")
    return client.recv(100) == b"more"


@pytest.mark.parametrize(("kind", "later"), [("isolated", "vxlan://1000"), ("tier", "vlan://102")])
def test_source_nat_moves_to_another_segment(kind: str, later: str) -> None:
    with contextlib.closing(AgentHost(("eth1.1204", "eth1.1310", "eth2.101", "eth2.102"))) as host:
        host.start()
        world = World(host, kind, later)
        with serving(host, "vm", 22, talk), serving(host, "", 80, talk):

            def leaves_with(address: str, patience_s: float = 2) -> bool:
                return greeted(host, OUTSIDE, 80, "vm", patience_s=patience_s) == address

            def leaves_by_ip6() -> bool:
                return greeted(host, OUTSIDE6, 80, "vm", patience_s=2).startswith("2001:db8:50:1:")

            def route_back(address: str) -> None:
                """The provider's route of the network's prefix, to the device's address on the segment."""
                segment = world.vlans[address].removeprefix("vlan://").replace("vxlan://", "vx")
                words = host.run("ip", "-6", "-o", "addr", "show", f"pub-{segment}", "scope", "global",
                                 namespace=world.namespace).split()  # fmt: skip
                via = words[words.index("inet6") + 1].partition("/")[0]
                host.run("ip", "-6", "route", "replace", "2001:db8:98::/64", "dev", world.link[address],
                         pid=host.fabric)  # fmt: skip
                host.run("ip", "-6", "route", "replace", IP6["network_ip6_cidr"], "via", via, "dev",
                         world.link[address], pid=host.fabric)  # fmt: skip

            route_back(FORMER)
            wait_until(lambda: leaves_with(FORMER))
            wait_until(leaves_by_ip6)
            world.rule("add-port-forward")
            with connected(host, FORMER, 2222, source=OUTSIDE) as kept:
                assert kept.recv(100).decode() == OUTSIDE
                world.move(LATER)
                wait_until(lambda: leaves_with(LATER))
                assert carries(kept), "the forward still uses the former address"
            wait_until(lambda: greeted(host, FORMER, 2222, source=OUTSIDE, patience_s=2) == OUTSIDE)
            assert world.is_answered(FORMER, 20)
            route_back(LATER)
            wait_until(leaves_by_ip6)
            world.rule("delete-port-forward")
            assert not world.is_answered(FORMER)
            assert "pub-101" not in host.links(world.namespace)
            assert leaves_with(LATER, 20)
            world.move(FORMER)
            wait_until(lambda: leaves_with(FORMER))
            assert not world.is_answered(LATER)
            assert not {"vxlan1000", "brvx-1000"} & host.links().keys()
