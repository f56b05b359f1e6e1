"""The boot of a host with many networks: calls are answered at once, and networks with VMs come first."""

from __future__ import annotations

import re

from bed.cloudstack import NAT_SERVICES, FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.machines import until
from hosts.scenario import SETTLE_S, install

KINDS = ["debian12"]

NETWORKS = 12


def test_the_unit_is_ready_before_all_networks_are_restored(
    host: EmulatedHost, bed: EmulatedBed, cloud: FakeCloudStack
) -> None:
    networks = []
    for number in range(NETWORKS):
        vlan = 1300 + number
        network = cloud.isolated_network(300 + number, vlan=vlan, cidr=f"10.13.{number}.0/24", offering=NAT_SERVICES)
        networks.append(network)
    install(networks[0])
    for network in networks:
        network.ensures_always = False
        network.implement()
    host.reboot()
    assert until(lambda: host.sh("systemctl is-active netloom-agent || true").strip() == "active", seconds=SETTLE_S)
    assert "restoring" in host.sh("systemctl show -p StatusText --value netloom-agent") or _restored(host)
    host.netloom("agent", "status", "--wait", "110")
    assert _restored(host)
    ready_us = int(host.sh("systemctl show -p ActiveEnterTimestampMonotonic --value netloom-agent"))
    (restored_s,) = re.findall(r"\[ *([0-9.]+)\] \S+ netloom\[\d+\]: restored$", host.journal("-b"), re.MULTILINE)
    assert ready_us < float(restored_s) * 1e6
    # The agent's own lines, not only those of dnsmasq.
    assert "netloom[" in host.sh("systemctl --no-pager status netloom-agent")
    for network in networks:
        network.delete()


def _restored(host: EmulatedHost) -> bool:
    return f"{NETWORKS} networks" in host.sh("systemctl show -p StatusText --value netloom-agent")
