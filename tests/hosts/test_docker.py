"""A host with Docker, which sets iptables' policy for forwarded packets to drop and turns on bridge netfilter."""

from __future__ import annotations

from bed.emulated import EmulatedHost
from bed.lab import Internet
from bed.machines import until
from e2e.networks import MakeLife
from hosts.scenario import SETTLE_S, live, still_carries, whole_life

KINDS = ["docker"]
DROPS = "iptables -S FORWARD | grep -c -e '-P FORWARD DROP' || true"
BRIDGE_NETFILTER = "cat /proc/sys/net/bridge/bridge-nf-call-iptables"


def test_the_host_drops_what_it_forwards(host: EmulatedHost) -> None:
    host.sh("modprobe br_netfilter")
    assert until(lambda: host.sh(DROPS).strip() == "1", seconds=SETTLE_S), "Docker has started"
    assert host.sh(BRIDGE_NETFILTER).strip() == "1"


def test_networks_work_in_spite_of_it(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    life = make_life()
    (vm,) = live(life, internet)
    said = host.netloom("agent", "selftest").out
    assert "chain FORWARD, policy drop; netloom accepts the frames of its own bridges there" in said, said
    # The host's own firewall is as strict as before.
    assert host.sh(DROPS).strip() == "1"
    assert host.sh(BRIDGE_NETFILTER).strip() == "1"
    host.sh("systemctl restart docker")
    assert until(lambda: host.sh(DROPS).strip() == "1", seconds=SETTLE_S)
    still_carries(life, vm, internet)


def test_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    rules = "iptables-save | grep -v '^#' | sed 's/\\[.*\\]//'"
    before = host.sh(rules)
    whole_life(host, make_life, internet)
    assert host.sh(rules) == before
