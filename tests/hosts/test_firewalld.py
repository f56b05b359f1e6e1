"""A host with firewalld, and then with ufw: both reject or drop forwarded packets."""

from __future__ import annotations

from bed.emulated import EmulatedHost
from bed.lab import Internet
from bed.machines import until
from e2e.networks import MakeLife
from hosts.scenario import SETTLE_S, live, still_carries, whole_life

KINDS = ["firewalld"]


def test_firewalld(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    host.sh("ufw disable; systemctl enable --now firewalld; firewall-cmd --zone=public --add-service=ssh")
    host.sh("modprobe br_netfilter")
    life = make_life()
    (vm,) = live(life, internet)
    host.sh("firewall-cmd --reload")
    still_carries(life, vm, internet)
    host.sh("systemctl restart firewalld")
    assert until(lambda: host.sh("firewall-cmd --state || true").strip() == "running", seconds=SETTLE_S)
    still_carries(life, vm, internet)


def test_life_beside_firewalld(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    host.reboot()  # without the empty tables that ufw's commands have made
    whole_life(host, make_life, internet)


def test_life_beside_ufw(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    host.sh("systemctl disable --now firewalld; ufw allow 22/tcp; ufw --force enable; modprobe br_netfilter")
    assert "DROP" in host.sh("iptables -S FORWARD | head -1")
    whole_life(host, make_life, internet)
