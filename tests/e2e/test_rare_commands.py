"""Commands of the protocol that the current client never or rarely sends."""

from __future__ import annotations

import pytest

from bed import Bed, payloads
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.lab import Vm
from bed.machines import until
from e2e.networks import MakeLife, MakeVpc, Traces, lease


def _resolves(vm: Vm, server: str, name: str, answer: str) -> bool:
    """Whether the answer becomes this one. dnsmasq reads its files a moment after the command."""
    question = ["dig", "+short", "+tries=1", "+time=5", f"@{server}", name]
    return until(lambda: vm.run(*question, check=False).out.strip() == answer)


@pytest.mark.binary
def test_options_names_and_subnets_are_added_and_removed(make_life: MakeLife, bed: Bed, cloud: FakeCloudStack) -> None:
    everything = FakeCloudStack.on(bed.management, extension="rare").register(hosts=bed.hosts, **bed.login("root"))
    life = make_life(offering=ALL_SERVICES, with_cloud=everything, brisk=True)
    vm, nic = life.vm("web-1")
    network, facts = life.network, life.network.facts
    gateway, name = facts.gateway, f"web-1.{facts.domain}"
    network.send_or_fail("save-hypervisor-hostname", payloads.save_item(facts, nic, "hypervisor_hostname", "kvm-7"))
    assert vm.run("curl", "-s", "-m", "20", f"http://{gateway}/latest/meta-data/hypervisor-host-name").out == "kvm-7"
    about = payloads.network(facts)
    network.send_or_fail("set-dhcp-options", {**about, "nic_id": nic.nic_id, "options": '{"42":"192.0.2.9"}'})
    assert "ntpsrv=192.0.2.9" in lease(vm, options=["ntpsrv"])
    assert _resolves(vm, gateway, name, nic.ip)
    network.send_or_fail("remove-dns-entry", payloads.remove_dns_entry(facts, nic))
    assert _resolves(vm, gateway, name, "")
    network.send_or_fail("add-dns-entry", payloads.add_dns_entry(facts, nic))
    assert _resolves(vm, gateway, name, nic.ip)
    network.send_or_fail("remove-dns-subnet", {**about, "extension_ip": gateway})
    question = ["dig", "+short", "+tries=1", "+time=1", f"@{gateway}", name]
    assert until(lambda: nic.ip not in vm.run(*question, check=False).out)
    network.send_or_fail("remove-dhcp-subnet", {**about, "extension_ip": gateway})
    assert "lease of" not in lease(vm, tries=3)
    network.send_or_fail("config-dhcp-subnet", payloads.config_subnet(facts, nic))
    assert f"lease of {nic.ip}" in lease(vm)


@pytest.mark.binary
def test_destroy_vpc_removes_the_vpc_completely(make_vpc: MakeVpc, bed: Bed) -> None:
    life = make_vpc()
    tier = life.tier(1)
    before = Traces(bed)
    life.vpc.implement()
    tier.implement()
    life.vpc.send_or_fail("destroy-vpc", payloads.vpc(life.vpc.facts))
    life.vpc.tiers.clear()
    life.vpc.stored = ""
    assert before.left() == {}
