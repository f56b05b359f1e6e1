"""CloudStack's usual layout: the traffic label is a bridge with the NIC, or a bond, as a port; with NetworkManager."""

from __future__ import annotations

from bed.cloudstack import FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.lab import Internet
from bed.machines import until
from e2e.networks import MakeLife
from hosts.scenario import SETTLE_S, carries, install, live, still_carries, whole_life

KINDS = ["networkmanager"]

_BRIDGES = """
systemctl disable --now NetworkManager
for n in 0 1; do
    ip link add cloudbr$n type bridge
    ip link set eth$((2 - n)) master cloudbr$n
    ip link set eth$((2 - n)) up
    ip link set cloudbr$n up
done
"""


def managed(host: EmulatedHost) -> list[str]:
    """What NetworkManager manages of a network: bridges, VLAN links, our ports and taps."""
    devices = host.sh("nmcli -t -f DEVICE,STATE device").splitlines()
    return [it for it in devices if it.startswith(("br", "eth1.", "vnet")) and not it.endswith(":unmanaged")]


def registered(bed: EmulatedBed, guest: str, public: str) -> FakeCloudStack:
    cloud = FakeCloudStack.on(bed.management, extension=guest)
    return cloud.register(hosts=bed.hosts, guest_nic=guest, public_nic=public, **bed.login("root"))


def test_the_traffic_label_is_a_bridge(
    host: EmulatedHost, bed: EmulatedBed, make_life: MakeLife, internet: Internet
) -> None:
    host.sh(_BRIDGES)
    life = make_life(with_cloud=registered(bed, "cloudbr1", "cloudbr0"))
    live(life, internet)
    vlan = life.network.facts.vlan
    assert host.listing(f"/sys/class/net/breth1-{vlan}/brif") != []
    assert host.listing(f"/sys/class/net/brcloudbr1-{vlan}/brif") == []
    life.end()
    host.sh("ip link delete cloudbr0; ip link delete cloudbr1")


def test_vms_above_the_label_keep_working(
    host: EmulatedHost, bed: EmulatedBed, make_life: MakeLife, internet: Internet
) -> None:
    """Earlier versions put the VLAN above the bridge, and VMs were plugged in there by hand."""
    host.sh(
        "ip link set eth1 up; ip link add cloudbr1 type bridge; ip link set eth1 master cloudbr1;"
        " ip link set cloudbr1 up"
    )
    life = make_life(with_cloud=registered(bed, "cloudbr1", "eth2"))
    vlan, subnet = 1200 + life.number, life.subnet  # CloudStack chooses the VLAN when the network is implemented
    bridge = f"brcloudbr1-{vlan}"
    host.sh(
        f"ip link add link cloudbr1 name cloudbr1.{vlan} type vlan id {vlan}; ip link add {bridge} type bridge;"
        f" ip link set cloudbr1.{vlan} master {bridge}; ip link set cloudbr1.{vlan} up; ip link set {bridge} up"
    )
    vm = host.vm(
        f"old-{life.number}", vlan="untagged", bridge=bridge, mac="02:01:00:98:00:45", ip=f"{subnet}.45/24",
        gateway=life.network.facts.gateway,
    )  # fmt: skip
    life.vms.append(vm)
    install(life.network)
    life.network.deploy_vm(f"old-{life.number}", ip=f"{subnet}.45", mac="02:01:00:98:00:45")
    assert life.network.failures == []
    carries(life, vm, internet)
    life.end()
    host.sh(f"ip link delete {bridge}; ip link delete cloudbr1.{vlan}; ip link delete cloudbr1")


def test_the_traffic_label_is_a_bridge_above_a_bond(
    host: EmulatedHost, bed: EmulatedBed, make_life: MakeLife, internet: Internet
) -> None:
    host.sh(
        "modprobe bonding max_bonds=0; ip link set eth1 down; ip link add bond0 type bond mode active-backup;"
        " ip link set eth1 master bond0; ip link set bond0 up; ip link add cloudbr1 type bridge;"
        " ip link set bond0 master cloudbr1; ip link set cloudbr1 up"
    )
    life = make_life(with_cloud=registered(bed, "cloudbr1", "eth2"))
    number = life.number
    nic = life.network.deploy_vm(f"web-{number}", ip=f"{life.subnet}.45", mac="02:01:00:99:00:45")
    vlan = life.network.facts.vlan
    # Our bridge, with the name that the KVM agent gives it.
    vm = host.vm(
        f"web-{number}", vlan="untagged", bridge=f"brbond0-{vlan}", mac=nic.mac, ip=f"{nic.ip}/24",
        gateway=life.network.facts.gateway,
    )  # fmt: skip
    life.vms.append(vm)
    address = life.network.associate(life.public(1))
    life.network.add_port_forward(address, 2222, nic, 22, open_firewall=True)
    still_carries(life, vm, internet)
    life.end()
    host.sh("ip link delete cloudbr1; ip link delete bond0; ip link set eth1 up")


def test_network_manager_leaves_our_links_alone(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    host.sh("systemctl enable --now NetworkManager")
    life = make_life()
    (vm,) = live(life, internet)
    assert until(lambda: managed(host) == [], seconds=SETTLE_S), managed(host)
    host.sh("nmcli networking off; nmcli networking on")
    still_carries(life, vm, internet)


def test_networkd_leaves_our_links_alone(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    host.sh("systemctl disable --now NetworkManager")
    host.write("/etc/systemd/network/10-ssh.network", "[Match]\nName=eth0\n[Link]\nUnmanaged=yes\n")
    host.write("/etc/systemd/network/50-all.network", "[Match]\nName=*\n[Network]\nLinkLocalAddressing=no\n")
    host.sh("systemctl start systemd-networkd")
    life = make_life()
    (vm,) = live(life, internet)
    host.sh("networkctl reload; systemctl restart systemd-networkd")
    still_carries(life, vm, internet)
    host.sh("systemctl stop systemd-networkd; rm /etc/systemd/network/*.network")


def test_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
