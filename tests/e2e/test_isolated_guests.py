"""What a VM meets when it boots: lease, names, metadata, password, balanced load; with real clients."""

from __future__ import annotations

from collections import Counter

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.lab import Internet, Vm, agent_command
from bed.places import until
from e2e.conftest import OUTSIDE, Life, MakeLife, Traces


@pytest.fixture(scope="module")
def full(bed: Bed, cloud: FakeCloudStack) -> FakeCloudStack:
    """A CloudStack that leaves nothing out; after ``cloud``, whose first call has started the agents."""
    return FakeCloudStack.on(bed.management, extension="full").register(hosts=bed.hosts, **bed.login("root", by="key"))


@pytest.fixture
def served(make_life: MakeLife, full: FakeCloudStack) -> Life:
    return make_life(offering=ALL_SERVICES, with_cloud=full, brisk=True)


def _lease(vm: Vm) -> str:
    """What busybox udhcpc says of the lease that it gets."""
    done = vm.run(
        "busybox", "udhcpc", "-f", "-q", "-n", "-t", "5", "-T", "1", "-i", "eth0", "-s", "/bin/true", check=False
    )
    return done.out + done.err


def _get(vm: Vm, url: str, *options: str) -> str:
    return vm.run("curl", "-s", "-m", "5", *options, url, check=False).out


def _lookup(vm: Vm, server: str, name: str) -> str:
    return vm.run("busybox", "nslookup", name, server, check=False).out


def test_first_vm_of_a_network_with_all_services(make_life: MakeLife, full: FakeCloudStack) -> None:
    life = make_life(offering=ALL_SERVICES, with_cloud=full)
    before = len(full.history)
    vm, nic = life.vm("web-1")
    sent = [each for each in full.commands(before) if each != "ensure-network-device"]
    assert len(full.history) - before == 21
    assert sent == [
        "implement-network", "assign-ip", "apply-fw-rules", "restore-network", "prepare-nic", "config-dhcp-subnet",
        "add-dhcp-entry", "config-dns-subnet", "add-dns-entry", "save-vm-data",
    ]  # fmt: skip
    assert life.network.failures == []
    gateway = life.network.facts.gateway
    assert f"lease of {nic.ip} obtained from {gateway}" in _lease(vm)
    assert nic.ip in _lookup(vm, gateway, f"web-1.{life.network.facts.domain}")
    assert _get(vm, f"http://{gateway}/latest/meta-data/local-hostname") == "web-1"


def test_stop_start_and_expunge(served: Life) -> None:
    vm, nic = served.vm("web-1")
    other, _ = served.vm("web-2", 46)
    network, gateway = served.network, served.network.facts.gateway
    network.stop_vm(nic)
    assert nic.ip in _lookup(other, gateway, f"web-1.{network.facts.domain}"), "a stopped VM keeps its name"
    network.start_vm(nic)
    assert f"lease of {nic.ip} obtained" in _lease(vm)
    network.stop_vm(nic)
    network.expunge_vm(nic)
    assert "obtained" not in _lease(vm), "who is gone is ignored"
    assert until(lambda: nic.ip not in _lookup(other, gateway, f"web-1.{network.facts.domain}"))
    assert _get(vm, f"http://{gateway}/latest/meta-data/local-hostname") == ""


def test_password_reset(served: Life) -> None:
    vm, nic = served.vm("web-1")
    other, _ = served.vm("web-2", 46)
    url = f"http://{served.network.facts.gateway}:8080/"
    served.network.reset_password(nic, "n3w $ecret")
    assert _get(other, url, "-H", "DomU_Request: send_my_password") == "saved_password", "a VM reads its own only"
    assert _get(vm, url, "-H", "DomU_Request: send_my_password").strip() == "n3w $ecret"
    state = f"/var/lib/netloom/scopes/net-{served.network.facts.network_id}.json"
    assert "n3w $ecret" in served.host.read(state)
    _get(vm, url, "-H", "DomU_Request: saved_password")
    assert until(lambda: "n3w $ecret" not in served.host.read(state)), "erased once it was acknowledged"
    assert _get(vm, url, "-H", "DomU_Request: send_my_password") == "saved_password"


def test_balanced_load(served: Life, internet: Internet) -> None:
    one, first = served.vm("web-1")
    two, second = served.vm("web-2", 46)
    network, address = served.network, served.network.associate(served.public(1))
    with one.serve_tcp(8080), two.serve_tcp(8080):
        rule = network.add_lb_rule(address, "web", 80, 8080, [first, second])
        assert internet.tcp(address.ip, 80, timeout_s=0.5).outcome == "timeout", "no firewall rule, no way in"
        network.add_firewall_rule(address, "tcp", 80)
        told = Counter(internet.tcp(address.ip, 80).server for _ in range(6))
        assert told == {"web-1": 3, "web-2": 3}
        with internet.open(address.ip, 80) as kept:
            network.delete_lb_rule(rule)
            assert kept.ask() != "answered", "a revoked rule ends what it allowed"
        assert not internet.tcp(address.ip, 80, timeout_s=0.5).ok
    running = " ".join(served.host.objects()["processes"])
    assert "haproxy" not in running, "the last rule's end is haproxy's end"


def test_restart_and_deletion_leave_nothing(make_life: MakeLife, full: FakeCloudStack, bed: Bed) -> None:
    life = make_life(offering=ALL_SERVICES, with_cloud=full, brisk=True)
    before = Traces(bed)
    vm, nic = life.vm("web-1")
    life.network.restart(cleanup=True, rolling=False)
    assert f"lease of {nic.ip} obtained" in _lease(vm), "restore-network brings everything back"
    assert _get(vm, f"http://{life.network.facts.gateway}/latest/meta-data/local-hostname") == "web-1"
    vm.destroy()
    life.network.delete()
    assert until(lambda: before.left() == {}), before.left()


def test_a_smaller_uplink_is_told_to_the_vms_and_clamped(served: Life, internet: Internet) -> None:
    for host in served.bed.hosts:
        host.links(f"link set eth1.{served.network.next_vlan} mtu 1400")
    vm, nic = served.vm("web-1")
    vm.write("/tmp/told", '#!/bin/sh\n[ "$1" != bound ] || echo "mtu is $mtu" >&2\n', mode=0o755)
    words = ["udhcpc", "-f", "-q", "-n", "-t", "5", "-T", "1", "-i", "eth0", "-O", "mtu", "-s", "/tmp/told"]
    assert "mtu is 1400" in vm.run("busybox", *words).err
    address = served.network.associate(served.public(1))
    with vm.serve_tcp(22):
        served.network.add_port_forward(address, 22, nic, open_firewall=True)
        # The VM itself still believes in 1500: what it is sent must be small enough all the same.
        capture = vm.capture("eth0", seconds=3)
        assert internet.tcp(address.ip, 22).ok
        opening = [bytes.fromhex(frame) for frame in capture.result()]
    sizes = [size for frame in opening if (size := _mss(frame))]
    assert sizes and max(sizes) <= 1360, sizes


def _mss(frame: bytes) -> int:
    """The MSS that a TCP segment with SYN announces as its first option (RFC 9293 section 3.7.1); 0: it is none."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return 0
    tcp = frame[14 + (frame[14] & 15) * 4 :]
    return int.from_bytes(tcp[22:24], "big") if tcp[13] & 2 and tcp[20:22] == b"\x02\x04" and not tcp[13] & 16 else 0


def test_a_power_cut_is_survived_without_cloudstack() -> None:
    """On a bed of its own: the host is another one afterwards, to whoever counts its processes."""
    with Bed(hosts=1, vlans=[1204], public_vlans=[101]) as bed:
        internet = bed.internet(vlan=101, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])
        cloud = FakeCloudStack.on(bed.management).register(hosts=bed.hosts, **bed.login("netadmin", by="password"))
        network = cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20")
        nic = network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
        calls = len(cloud.history)
        (host,) = bed.hosts
        host.power_cut()
        host.boot()
        host.sh(f"{agent_command()} serve </dev/null >/dev/null 2>&1 &")
        vm = host.vm("web-1", vlan=1204, mac=nic.mac, ip=f"{nic.ip}/24", gateway="10.10.1.1")
        assert until(lambda: f"lease of {nic.ip} obtained" in _lease(vm), seconds=30)
        assert _get(vm, "http://10.10.1.1/latest/meta-data/local-hostname") == "web-1"
        with internet.serve_tcp(80):
            assert until(lambda: vm.tcp(OUTSIDE, 80).saw == "203.0.113.20")
        assert len(cloud.history) == calls, "nobody asked CloudStack"
