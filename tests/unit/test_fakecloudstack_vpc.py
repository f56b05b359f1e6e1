"""What the fake CloudStack sends for VPCs is what the real one sends, in its order (tests/payloads/2*)."""

from __future__ import annotations

import dataclasses

import pytest

from bed import payloads as cs
from bed.cloudstack import FakeCloudStack
from bed.payloads import AclItem, VpcFacts
from bed.vpc import Tier, Vpc
from unit.recorded_calls import Recorder, as_fixtures, fixture, sent, without_ensures

ALLOW_ALL = [AclItem(1, "allow", "ingress", "all"), AclItem(2, "allow", "egress", "all")]
DENY_ALL = [AclItem(1, "deny", "ingress", "all"), AclItem(2, "deny", "egress", "all")]
CUSTOM = [
    AclItem(1, "allow", "ingress", "tcp", 22, cidrs=("198.51.100.0/24",)),
    AclItem(2, "deny", "ingress", "tcp", 22),
    AclItem(3, "allow", "ingress", "tcp", 8000, 8100, cidrs=("10.20.2.0/24", "203.0.113.0/24")),
    AclItem(4, "allow", "ingress", "icmp", icmp_type=-1, icmp_code=-1),
    AclItem(5, "allow", "ingress", "47", cidrs=("192.0.2.0/24",)),
    AclItem(6, "deny", "egress", "udp", 53, cidrs=("198.51.100.53/32",)),
    AclItem(7, "allow", "egress", "all"),
    AclItem(8, "allow", "ingress", "all", cidrs=()),
]
APP = cs.Nic(
    "6101",
    "6b7c2a10-0000-4000-8000-000000006101",
    "02:01:00:cc:01:03",
    "10.20.1.31",
    cs.VirtualMachine("app-1", "9f000000-0000-4000-8000-000000000061"),
)


@pytest.fixture
def vpc() -> Vpc:
    recorder = Recorder()
    recorder.prints = '{"host":"192.0.2.12","namespace":"cs-vpc-7","vpc_id":"7"}'
    cloud = FakeCloudStack(recorder).register(hosts=["192.0.2.11", "192.0.2.12"])
    return Vpc(cloud, VpcFacts("7", "10.20.0.0/16"))


@pytest.fixture
def tier(vpc: Vpc) -> Tier:
    tier = vpc.add_tier("310", vlan=1310, cidr="10.20.1.0/24")
    tier.facts.domain = "vpc7.example.internal"
    return tier


def test_a_vpc_without_an_address_gets_it_with_its_first_tier(vpc: Vpc, tier: Tier) -> None:
    vpc.implement()
    assert sent(vpc.cloud) == as_fixtures("200", "203")
    vpc.source_nat = vpc.associate("203.0.113.30")
    vpc.source_nat.source_nat = True
    tier.acl = ALLOW_ALL
    before = len(vpc.cloud.history)
    tier.implement()
    assert sent(vpc.cloud, before) == as_fixtures("201", "201", "210", "201", "211", "201", "213")


def test_a_vpc_with_an_address_chosen_at_creation(vpc: Vpc) -> None:
    vpc.source_nat = vpc.associate("203.0.113.30")
    vpc.implement()
    assert sent(vpc.cloud) == as_fixtures("200", "202")


def test_the_first_vm_of_a_tier(vpc: Vpc, tier: Tier) -> None:
    vpc.implement()
    tier.implement()
    before = len(vpc.cloud.history)
    tier.add_nic(APP)
    said = [it for it in sent(vpc.cloud, before) if "current_details" not in it["payload"]]  # type: ignore[operator]
    assert said[0] == as_fixtures("220")[0]
    assert said[2:5] == as_fixtures("221", "222", "223")
    assert without_ensures(vpc.cloud, before) == [
        "prepare-nic",
        "config-dhcp-subnet",
        "add-dhcp-entry",
        "config-dns-subnet",
        "add-dns-entry",
        "save-vm-data",
    ]


@pytest.mark.parametrize(
    ("items", "number", "state"),
    [(CUSTOM, "212", "implemented"), (DENY_ALL, "214", "implementing"), ([], "215", "implemented")],
)
def test_a_list_is_sent_whole(tier: Tier, items: list[AclItem], number: str, state: cs.State) -> None:
    facts = dataclasses.replace(tier.facts, state=state, vlan="1310")
    assert cs.without_nulls(cs.acl_rules(facts, items)) == fixture(number)["payload"]


def test_addresses_and_rules_of_a_tier(vpc: Vpc, tier: Tier) -> None:
    vpc.implement()
    tier.implement()
    before = len(vpc.cloud.history)
    address = tier.associate("203.0.113.31")
    forward = tier.add_port_forward(address, "443", "10.20.1.31", "8443")
    assert sent(vpc.cloud, before) == as_fixtures("201", "225", "201", "226")
    before = len(vpc.cloud.history)
    tier.delete_port_forward(forward)
    assert without_ensures(vpc.cloud, before) == ["delete-port-forward", "release-ip"]
    assert sent(vpc.cloud, before)[-1] == as_fixtures("231")[0]
    tier.enable_static_nat(tier.associate("203.0.113.32"), "10.20.1.31")
    assert sent(vpc.cloud)[-3] == as_fixtures("227")[0]


def test_a_tier_ends_and_its_vpc_keeps_the_details(vpc: Vpc, tier: Tier) -> None:
    vpc.implement()
    tier.acl = ALLOW_ALL
    tier.implement()
    before = len(vpc.cloud.history)
    tier.delete()
    assert sent(vpc.cloud, before) == as_fixtures("201", "216", "201", "232", "201", "233")
    vpc.delete()
    assert sent(vpc.cloud)[-1] == as_fixtures("235")[0]
    assert not vpc.stored


def test_another_source_nat_address_and_a_restart(vpc: Vpc, tier: Tier) -> None:
    vpc.source_nat = vpc.associate("203.0.113.30")
    vpc.implement()
    before = len(vpc.cloud.history)
    vpc.change_source_nat(vpc.associate("203.0.113.34"))
    assert vpc.cloud.commands(before) == ["update-vpc-source-nat-ip", "ensure-network-device", "implement-vpc"]
    assert sent(vpc.cloud, before)[0] == as_fixtures("234")[0]
    tier.implement()
    before = len(vpc.cloud.history)
    vpc.restart(cleanup=True, rolling=False)
    assert sent(vpc.cloud, before)[:4] == as_fixtures("201", "238", "236", "200")
