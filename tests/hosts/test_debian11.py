"""Debian 11, the oldest platform: Linux 5.10, nft 0.9.8, systemd 247, dnsmasq 2.85, haproxy 2.2."""

from __future__ import annotations

from bed.emulated import EmulatedHost
from bed.lab import Internet
from bed.machines import until
from bed.payloads import AclItem
from e2e.networks import MakeLife, MakeVpc
from hosts.scenario import SETTLE_S, is_reached, whole_life

KINDS = ["debian11"]


def test_a_vpc(host: EmulatedHost, make_vpc: MakeVpc, internet: Internet) -> None:
    """Forwards, static NAT, a balanced port and lists: every kind of map and set in the ruleset."""
    life = make_vpc()
    life.vpc.implement()
    web = life.tier(1)
    one, nic = life.vm(web, "web")
    web.replace_acl([AclItem(1, "allow", "ingress", "tcp", 22), AclItem(2, "allow", "ingress", "udp", 53)])
    web.add_port_forward(life.public[1], 2222, nic, 22)
    web.add_port_forward(life.public[1], 53, nic, 53, protocol="udp")
    web.enable_static_nat(life.public[2], nic)
    with one.serve_tcp(22), one.serve_udp(53):
        assert is_reached(life.public[1].ip, 2222, internet, "web")
        assert is_reached(life.public[2].ip, 22, internet, "web")
        assert until(lambda: internet.udp(life.public[1].ip, 53).server == "web", seconds=SETTLE_S)


def test_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
