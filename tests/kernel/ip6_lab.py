"""The lab of the VPC with IPv6: two tiers, of which the second may have no IPv6, and an isolated network, each with an
uplink.

All VMs have static addresses and permanent neighbour entries of their gateways, so every packet is really sent.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from kernel.vpc_lab import TIERS, VpcLab, vpc
from netloom import names
from netloom.state import AclItem, Nic, Outside6, Scope
from netns import inside

A, B, C = "2001:db8:50:1::/64", "2001:db8:50:2::/64", "2001:db8:50:4::/64"
GATEWAYS = {"a1": "2001:db8:50:1::1", "a2": "2001:db8:50:1::1", "b1": "2001:db8:50:2::1", "vm1": "2001:db8:50:4::1"}
HOMES = {"a1": "2001:db8:50:1::31", "a2": "2001:db8:50:1::32", "b1": "2001:db8:50:2::31", "vm1": "2001:db8:50:4::11"}
FAR, FARTHER, NEIGHBOUR = "2001:db8:ffff::1", "2001:db8:fffe::1", "2001:db8:99::99"
ROUTER, OURS = "2001:db8:99::1", "2001:db8:99::7"
OUTSIDE = Outside6(gateway=ROUTER, address=f"{OURS}/64")


class SixLab(VpcLab):
    """The VPC lab with IPv6 on its VMs, provider and internet."""

    def _build(self) -> None:
        super()._build()
        self.families = ("ipv4", "ipv6")
        for space in ("dev", "gw1", "inet", "nb", *HOMES):
            with inside(self.ns(space)):
                root = Path("/proc/sys/net/ipv6/conf")
                # An address under duplicate address detection is not used to resolve neighbours.
                for link in root.iterdir():
                    (link / "accept_dad").write_text("0")
                (root / "all/disable_ipv6").write_text("0")
                (root / "all/forwarding").write_text(str(int(space in ("gw1", "inet"))))
        owners = {"a1": "vpc-7", "a2": "vpc-7", "b1": "vpc-7", "vm1": "net-204"}
        for vm, address in HOMES.items():
            mac = names.mac("tests" if vm == "vm1" else "test", owners[vm], names.guest_link(TIERS.get(vm, "204")))
            self.ip(
                vm,
                f"addr add {address}/64 dev eth0 nodad",
                f"route add ::/0 via {GATEWAYS[vm]}",
                f"neigh replace {GATEWAYS[vm]} lladdr {mac} dev eth0 nud permanent",
            )
        self.ip("gw1", f"addr add {ROUTER}/64 dev eth0 nodad", "addr add 2001:db8:98::2/64 dev wan nodad")
        self.ip("inet", "addr add 2001:db8:98::1/64 dev up1 nodad", "route add ::/0 via 2001:db8:98::2")
        self.ip("inet", f"addr add {FAR}/128 dev lo", f"addr add {FARTHER}/128 dev lo")
        self.ip("nb", f"addr add {NEIGHBOUR}/64 dev eth0 nodad", f"addr add {HOMES['a2']}/128 dev lo")
        for prefix in (A, B, C):
            self.ip("gw1", f"route add {prefix} via {OURS}")
            self.ip("nb", f"route add {prefix} via {OURS}")
        self.ip("gw1", "route add ::/0 via 2001:db8:98::1")
        self.ip("nb", f"route add ::/0 via {ROUTER}")


def known(*vms: str) -> dict[str, Nic]:
    """NICs with the IPv6 addresses of these VMs: the device's ICMP messages to other addresses have a low rate."""
    nics = [Nic(mac=f"02:01:00:cc:06:{at:02x}", ip6=HOMES[vm]) for at, vm in enumerate(vms)]
    return {it.key: it for it in nics}


def tiers(acl_a: tuple[AclItem, ...] | None, acl_b: tuple[AclItem, ...] | None, *, both: bool) -> Scope:
    """The VPC of the IPv4 tests with an IPv6 uplink. ``both`` gives IPv6 to the second tier too."""
    scope = vpc(acl_a, acl_b)
    networks = scope.networks | {
        "310": replace(scope.networks["310"], ip6_cidr=A, ip6_gateway=GATEWAYS["a1"], nics=known("a1", "a2")),
    }
    if both:
        networks["311"] = replace(scope.networks["311"], ip6_cidr=B, ip6_gateway=GATEWAYS["b1"], nics=known("b1"))
    return replace(scope, networks=networks, outside6=OUTSIDE)
