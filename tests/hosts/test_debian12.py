"""Two hosts with Debian 12 on a trunk: networks of all kinds, and everything that happens to a host in its life."""

from __future__ import annotations

import re
import threading

import pytest

from bed import payloads
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.lab import Internet, Vm
from bed.machines import until
from bed.payloads import AclItem, Nic, VirtualMachine
from bed.shared import SharedNetwork
from binary.onefile import build_id, one_file
from e2e.networks import Life, MakeLife, MakeVpc, lease
from hosts.scenario import (
    SETTLE_S,
    is_reached,
    live,
    make_bare,
    objects,
    older,
    still_carries,
    traces,
    uninstall,
)

KINDS = ["debian12", "debian12"]

Lived = tuple[Life, Vm, EmulatedHost]


@pytest.fixture(scope="module")
def bare(bed: EmulatedBed) -> dict[str, dict[str, list[str]]]:
    """The objects of the hosts before netloom was there."""
    return {host.name: objects(host) for host in bed.emulated}


@pytest.fixture
def lived(make_life: MakeLife, internet: Internet, bare: object) -> Lived:
    """A network with one VM, the VM, and the host that both are on."""
    life = make_life()
    (vm,) = live(life, internet)
    assert isinstance(life.host, EmulatedHost)
    return life, vm, life.host


def test_a_removal_installs_nothing(
    bed: EmulatedBed, cloud: FakeCloudStack, bare: dict[str, dict[str, list[str]]]
) -> None:
    network = cloud.isolated_network(290, vlan=1290, cidr="10.90.0.0/24")
    for command in ("shutdown-network", "destroy-network"):
        sent = cloud.execute(command, {}, payloads.bare(network.facts))
        assert sent.ok, sent.output
    for host in bed.emulated:
        assert traces(host, bare[host.name]) == {}
        assert host.run("systemctl", "cat", "netloom-agent", check=False).status != 0


def test_two_vms_on_two_hosts_and_the_tags_on_the_wire(lived: Lived, bed: EmulatedBed, internet: Internet) -> None:
    life, one, host = lived
    other = life.network.deploy_vm("far", ip=f"{life.subnet}.46", mac="02:01:00:ff:00:46")
    two = life.plug(other, host=life.elsewhere)
    assert until(lambda: two.ping(one.ip, timeout_s=2.0).ok, seconds=SETTLE_S)
    assert f"lease of {two.ip}" in lease(two)
    vlan = life.network.facts.vlan
    seen = bed.frames_seen("eth1")
    assert seen[host.name].get(vlan, 0) > 0
    assert seen[life.elsewhere.name].get(vlan, 0) > 0
    assert {tag for tags in seen.values() for tag in tags} <= {vlan, "0"}, "only tagged frames of this network"
    assert bed.frames_seen("eth2")[host.name].get("101", 0) > 0
    assert "802.1Q" in host.sh(f"ip -d link show eth1.{vlan}")


def test_a_vpc_with_two_tiers(make_vpc: MakeVpc, internet: Internet) -> None:
    life = make_vpc()
    life.vpc.implement()
    web, data = life.tier(1), life.tier(2)
    (one, nic), (two, _) = life.vm(web, "web"), life.vm(data, "data")
    allowed = [AclItem(1, "allow", "ingress", "tcp", 22), AclItem(2, "allow", "egress", "all")]
    web.replace_acl(allowed)
    data.replace_acl([AclItem(1, "allow", "egress", "all")])
    web.add_port_forward(life.public[1], 2222, nic, 22)
    with one.serve_tcp(22, 23), two.serve_tcp(22):
        assert is_reached(life.public[1].ip, 2222, internet, "web")
        assert until(lambda: two.tcp(one.ip, 22).ok, seconds=SETTLE_S)
        assert two.tcp(one.ip, 23, timeout_s=2.0).outcome == "timeout"
        assert one.tcp(two.ip, 22, timeout_s=2.0).outcome == "timeout"


def test_a_vm_with_ipv6(make_life: MakeLife, internet: Internet) -> None:
    life = make_life()
    network = life.network
    network.facts.ip6_gateway, network.facts.ip6_cidr = "2001:db8:50:1::1", "2001:db8:50:1::/64"
    network.implement()
    address = "2001:db8:50:1:1:ff:fecc:503"
    nic = Nic(
        "8101", "6b7c2a10-0000-4000-8000-000000008101", "02:01:00:cc:05:03", f"{life.subnet}.45",
        VirtualMachine("six-1", "9f000000-0000-4000-8000-000000000091"),
        ip6_address=address, ip6_gateway=network.facts.ip6_gateway, ip6_cidr=network.facts.ip6_cidr,
    )  # fmt: skip
    network.add_nic(nic)
    assert network.failures == []
    vm = life.plug(nic)
    vm.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")
    vm.sh(f"ip link set eth0 down; ip link set eth0 up; ip addr replace {nic.ip}/24 dev eth0")
    configured = "ip -6 -o addr show dev eth0 scope global -tentative"
    assert until(lambda: address in vm.sh(configured), seconds=SETTLE_S)
    assert until(lambda: "default via fe80::" in vm.sh("ip -6 route"), seconds=SETTLE_S)


def test_a_vxlan_network(bed: EmulatedBed, internet: Internet) -> None:
    """The tunnel goes over the untagged guest NIC, where both hosts have an address."""
    for host in bed.emulated:
        host.links("link set eth1 up", f"address add 192.0.2.{host.number}/24 dev eth1")
    cloud = FakeCloudStack.on(bed.management, extension="tunnels")
    cloud.register(hosts=bed.hosts, **bed.login("root"), **{"guest.isolation": "vxlan"})
    network = cloud.isolated_network(280, vlan=5280, cidr="10.80.0.0/24", offering=ALL_SERVICES, public_vlan=101)
    network.source_nat = network.associate("203.0.113.240")
    network.source_nat.source_nat = True
    network.ensures_always = False
    try:
        nic = network.deploy_vm("tunnel-1", ip="10.80.0.45", mac="02:01:00:80:00:45")
        assert network.failures == []
        (far,) = [host for host in bed.emulated if host.address != network.host]
        group = "239.0.20.160"
        far.links(
            f"link add vxlan5280 type vxlan id 5280 group {group} ttl 10 dev eth1",
            "link add brvx-5280 type bridge stp_state 0 mcast_snooping 0",
            "link set vxlan5280 master brvx-5280 up",
            "link set brvx-5280 up",
        )
        vm = far.vm("tunnel-1", vlan="untagged", bridge="brvx-5280", mac=nic.mac)
        assert "lease of 10.80.0.45 obtained" in lease(vm)
        vm.destroy()
        far.sh("ip link delete vxlan5280")
    finally:
        network.delete()
        for host in bed.emulated:
            host.links(f"address delete 192.0.2.{host.number}/24 dev eth1")


def test_a_shared_network(bed: EmulatedBed, internet: Internet) -> None:
    bed.add_segments([("eth1", "1990")])
    cloud = FakeCloudStack.on(bed.management, extension="shared").register(hosts=bed.hosts, **bed.login("root"))
    network = SharedNetwork(cloud, 990, vlan="1990", cidr="10.30.0.0/24", device_ip="10.30.0.5")
    try:
        nic = network.deploy_vm("sh-1", ip="10.30.0.61", mac="1e:00:aa:00:00:11")
        assert network.failures == []
        (host,) = [it for it in bed.emulated if it.address == network.host]
        vm = host.vm("sh-1", vlan="1990", mac=nic.mac)
        assert "lease of 10.30.0.61 obtained from 10.30.0.5" in lease(vm)
        vm.destroy()
    finally:
        network.delete()


@pytest.mark.parametrize("how", ["systemctl restart netloom-agent", "systemctl kill -s KILL netloom-agent"])
def test_the_agent_restarts(lived: Lived, internet: Internet, how: str) -> None:
    life, vm, host = lived
    before = host.sh("systemctl show -p MainPID --value netloom-agent").strip()
    with vm.serve_tcp(22):
        transfer = internet.transfer(life.public(1), 2222, seconds=110)
        host.sh(how)
        assert until(
            lambda: host.sh("systemctl show -p MainPID --value netloom-agent").strip() not in ("0", before),
            seconds=SETTLE_S,
        )
        assert until(lambda: host.sh("systemctl is-active netloom-agent || true").strip() == "active", seconds=SETTLE_S)
        moved = transfer.stop()
        assert (moved.failure, moved.intact) == ("", True)
    still_carries(life, vm, internet)


def test_the_agent_is_stopped_and_started_by_the_next_call(lived: Lived, internet: Internet) -> None:
    life, vm, host = lived
    host.sh("systemctl stop netloom-agent")
    assert vm.ping(life.network.facts.gateway).ok
    address = life.network.associate(life.public(2))
    life.network.add_port_forward(address, 80, life.network.nics[0], open_firewall=True)
    assert host.sh("systemctl is-active netloom-agent").strip() == "active"
    still_carries(life, vm, internet)


def test_an_agent_that_hangs_is_replaced(lived: Lived, internet: Internet) -> None:
    """It is stopped, as by SIGSTOP or a deadlock. The next call succeeds within its deadline."""
    life, vm, host = lived
    hung = host.sh("systemctl show -p MainPID --value netloom-agent").strip()
    host.sh(f"kill -STOP {hung}")
    address = life.network.associate(life.public(2))
    life.network.add_port_forward(address, 80, life.network.nics[0], open_firewall=True)
    assert life.network.failures == []
    assert host.sh("systemctl show -p MainPID --value netloom-agent").strip() != hung
    still_carries(life, vm, internet)


def test_systemd_ends_an_agent_that_hangs(lived: Lived, internet: Internet) -> None:
    """No call comes. The agent misses its beats, is aborted, and started again."""
    life, vm, host = lived
    hung = host.sh("systemctl show -p MainPID --value netloom-agent").strip()
    # Without a relay, which would end the agent earlier.
    host.sh(f"pkill -f 'netloom agent [c]onnect'; kill -STOP {hung}")
    assert until(
        lambda: host.sh("systemctl show -p MainPID --value netloom-agent").strip() not in ("0", hung), seconds=SETTLE_S
    )
    assert "Watchdog timeout" in host.journal("-b", "-u", "netloom-agent")
    still_carries(life, vm, internet)


def test_the_guard_of_the_host_is_back_at_once(lived: Lived) -> None:
    """``systemctl restart nftables`` executes ``flush ruleset``. The periodic check would need up to 30 s."""
    _, _, host = lived
    guard = "nft list tables | grep -c ' netloom$' || true"
    tables = host.sh(guard)
    assert int(tables) > 0
    waits_s = []
    for _ in range(3):
        host.sh("systemctl restart nftables")
        began, ended = host.sh(
            f"cat /proc/uptime; until [ $({guard}) = {tables.strip()} ]; do sleep 0.1; done; cat /proc/uptime"
        ).splitlines()
        waits_s.append(float(ended.split()[0]) - float(began.split()[0]))
    assert max(waits_s) < 4, waits_s
    host.sh("nft delete table inet filter")  # of the file that was loaded


def test_a_reboot_brings_everything_back(lived: Lived, internet: Internet) -> None:
    """Without a call of CloudStack. The VM is started again by its own agent."""
    life, _, host = lived
    host.reboot()
    life.vms = []
    vm = life.plug(life.network.nics[0])
    still_carries(life, vm, internet)
    assert "degraded" not in host.sh("systemctl is-system-running || true")


def test_a_power_cut_loses_nothing(lived: Lived, internet: Internet) -> None:
    life, _, host = lived
    host.power_cut()
    host.boot()
    life.vms = []
    vm = life.plug(life.network.nics[0])
    still_carries(life, vm, internet)


def test_uninstalling_with_a_vm_plugged_in_says_what_stays(lived: Lived, bare: dict[str, dict[str, list[str]]]) -> None:
    life, vm, host = lived
    bridge = vm.bridge
    life.network.delete()
    told = host.netloom("agent", "uninstall").out
    assert bridge in told
    assert host.listing(f"/sys/class/net/{bridge}/brif") != []
    assert " netloom" not in host.sh("nft list tables")
    vm.destroy()
    life.vms = []
    for command in re.findall(r"ip link delete \S+", told):
        host.sh(f"{command} 2>/dev/null || true")  # the KVM agent may have deleted the bridge
    assert traces(host, bare[host.name]) == {}


def test_networks_outlive_an_uninstall_that_leaves_them(lived: Lived, internet: Internet) -> None:
    """The next call that builds something installs netloom again."""
    life, vm, host = lived
    told = host.netloom("agent", "uninstall", "--networks", "leave").out
    assert "they run on" in told
    assert host.run("systemctl", "cat", "netloom-agent", check=False).status != 0
    assert vm.ping(life.network.facts.gateway).ok
    with vm.serve_tcp(22):
        assert is_reached(life.public(1), 2222, internet, vm.name)
    address = life.network.associate(life.public(2))
    life.network.add_port_forward(address, 80, life.network.nics[0], open_firewall=True)
    assert life.network.failures == [], life.network.failures
    still_carries(life, vm, internet)


def test_a_power_cut_in_the_middle_of_an_install(
    bed: EmulatedBed, make_life: MakeLife, internet: Internet, bare: dict[str, dict[str, list[str]]]
) -> None:
    """The upload is cut. The next call installs the program, and the network is complete."""
    for host in bed.emulated:
        make_bare(host)
    (first,) = bed.emulated[:1]
    life = make_life(with_cloud=FakeCloudStack.on(bed.management, extension="cut").register(
        hosts=[first], **bed.login("root")
    ))  # fmt: skip
    life.network.facts.state = "implementing"  # other calls install nothing
    upload = threading.Thread(target=life.network.ensure)
    upload.start()
    directory = "/usr/local/libexec/netloom"
    assert until(lambda: ".part-" in first.sh(f"ls -A {directory}/* 2>/dev/null || true"), seconds=SETTLE_S)
    first.power_cut()
    first.boot()
    upload.join(SETTLE_S)
    assert not upload.is_alive()
    life.network.facts.state = "allocated"
    (vm,) = live(life, internet)
    vm.destroy()
    life.end()
    uninstall(first)
    assert traces(first, bare[first.name]) == {}


def test_upgrade_and_rollback(bed: EmulatedBed, make_life: MakeLife, internet: Internet) -> None:
    (first,) = bed.emulated[:1]
    program, before = older(one_file(), one_file().parent / "hosts")  # the management server has its own /tmp
    cloud = FakeCloudStack.on(bed.management, extension="old", program=program, agent="")
    life = make_life(with_cloud=cloud.register(hosts=[first], **bed.login("root")))
    (vm,) = live(life, internet)
    assert first.netloom("agent", "status").out.count(before) > 0
    newer = FakeCloudStack.on(bed.management, extension="old", program=one_file(), agent="")
    newer.register(hosts=[first], **bed.login("root"))
    life.network.cloud = newer
    # The next call that builds something upgrades the host.
    address = life.network.associate(life.public(2))
    life.network.add_port_forward(address, 80, life.network.nics[0], open_firewall=True)
    assert until(lambda: build_id() in first.sh("readlink /usr/local/libexec/netloom/current"), seconds=SETTLE_S)
    still_carries(life, vm, internet)
    first.netloom("agent", "rollback")
    assert before in first.sh("readlink /usr/local/libexec/netloom/current")
    still_carries(life, vm, internet)


def test_uninstalling_leaves_no_trace(bed: EmulatedBed, bare: dict[str, dict[str, list[str]]]) -> None:
    for host in bed.emulated:
        make_bare(host)
        assert traces(host, bare[host.name]) == {}
