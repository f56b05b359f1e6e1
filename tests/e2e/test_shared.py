"""Life cycle of a shared network and the first VM of a dual-stack network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.lab import Host, Internet, Vm
from bed.machines import until
from bed.payloads import Nic, VirtualMachine
from bed.shared import SharedNetwork
from e2e.networks import MakeLife, Traces, lease

VLAN = "1990"


@pytest.fixture
def shared(bed: Bed, internet: Internet, cloud: FakeCloudStack) -> Iterator[SharedNetwork]:
    bed.add_segments([("eth1", VLAN)])
    everything = FakeCloudStack.on(bed.management, extension="shared").register(hosts=bed.hosts, **bed.login("root"))
    network = SharedNetwork(everything, 990, vlan=VLAN, cidr="10.30.0.0/24", device_ip="10.30.0.5")
    yield network
    if network.stored:
        network.delete()


def _host(bed: Bed, network: SharedNetwork) -> Host:
    (host,) = [it for it in bed.hosts if it.address == network.host]
    return host


def _plugged(bed: Bed, network: SharedNetwork, nic: Nic) -> Vm:
    host = _host(bed, network)
    return host.vm(nic.vm.name, vlan=VLAN, mac=nic.mac, ip=f"{nic.ip}/24", gateway=network.facts.gateway)


@pytest.mark.binary
def test_shared_network_from_first_vm_to_deletion(shared: SharedNetwork, bed: Bed) -> None:
    """CloudStack does not implement it. The first VM command builds it, and its deletion leaves nothing."""
    before = Traces(bed)
    one = shared.deploy_vm("sh-1", ip="10.30.0.61", mac="1e:00:aa:00:00:11")
    assert shared.failures == []
    two = shared.deploy_vm("sh-2", ip="10.30.0.62", mac="1e:00:aa:00:00:12")
    first, second = _plugged(bed, shared, one), _plugged(bed, shared, two)
    try:
        assert "lease of 10.30.0.61 obtained from 10.30.0.5" in lease(first)
        url = "http://10.30.0.5/latest/meta-data/local-hostname"
        assert first.run("curl", "-s", "-m", "20", url).out == "sh-1"
        assert second.run("curl", "-s", "-m", "20", url).out == "sh-2"
        question = ["busybox", "nslookup", "sh-2.shared.example.internal", "10.30.0.5"]
        assert until(lambda: "10.30.0.62" in first.run(*question, check=False).out)
        # The device is not a router here: traffic between tenants or to their router does not pass it.
        assert first.ping("10.30.0.62").ok
        shared.stop_vm(one)
        shared.start_vm(one)
        assert "lease of 10.30.0.61" in lease(first)
        shared.restart()
        assert first.run("curl", "-s", "-m", "20", url).out == "sh-1"
        shared.expunge_vm(one)
        assert "lease of" not in lease(first, tries=3)
        assert "lease of 10.30.0.62" in lease(second)
        shared.expunge_vm(two)
    finally:
        first.destroy()
        second.destroy()
    shared.delete()
    assert before.left() == {}


def test_first_vm_of_a_dual_stack_network(make_life: MakeLife, bed: Bed, internet: Internet) -> None:
    """CloudStack sends no config-dns-subnet for a NIC with IPv6. The VM configures the address that it computed."""
    everything = FakeCloudStack.on(bed.management, extension="six").register(hosts=bed.hosts, **bed.login("root"))
    life = make_life(offering=ALL_SERVICES, with_cloud=everything)
    network = life.network
    network.facts.ip6_gateway, network.facts.ip6_cidr = "2001:db8:50:1::1", "2001:db8:50:1::/64"
    network.implement()
    address = "2001:db8:50:1:1:ff:fecc:503"
    nic = Nic(
        "8101", "6b7c2a10-0000-4000-8000-000000008101", "02:01:00:cc:05:03", f"{life.subnet}.45",
        VirtualMachine("six-1", "9f000000-0000-4000-8000-000000000091"),
        ip6_address=address, ip6_gateway=network.facts.ip6_gateway, ip6_cidr=network.facts.ip6_cidr,
    )  # fmt: skip
    before = len(everything.history)
    network.add_nic(nic)
    assert "config-dns-subnet" not in everything.commands(before)
    assert network.failures == []
    vm = life.plug(nic)
    vm.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")
    vm.sh("ip link set eth0 down; ip link set eth0 up; ip addr replace " + f"{nic.ip}/24 dev eth0")
    assert until(lambda: address in vm.sh("ip -6 -o addr show dev eth0 scope global -tentative"))
    assert until(lambda: "default via fe80::" in vm.sh("ip -6 route"))

    def resolves(*server: str) -> bool:
        question = ["dig", "+short", "+tries=1", "+time=5", *server, "six-1.cs2cloud.internal", "AAAA"]
        return until(lambda: vm.run(*question, check=False).out.strip() == address)

    assert resolves("-6", "@2001:db8:50:1::1")
    network.restart(cleanup=True)
    assert resolves(f"@{network.facts.gateway}")
