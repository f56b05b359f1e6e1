"""The fake CloudStack sends the same calls as the real one, in the same order, and handles the details in the same way.

A recorder replaces the executable. The calls are compared with the payload files, which are given by their numbers.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from bed import payloads as cs
from bed.cloudstack import (
    ALL_SERVICES,
    NAT_SERVICES,
    Failed,
    FakeCloudStack,
    IsolatedNetwork,
    UnreadableDetails,
    succeeded,
)
from bed.machines import Execution
from bed.payloads import AclItem, Offering, VpcFacts
from bed.shared import SharedNetwork
from bed.vpc import Tier, Vpc
from unit.recorded_calls import KEY, WEB, Recorder, as_fixtures, fixture, sent, without_ensures


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cloud(recorder: Recorder) -> FakeCloudStack:
    cloud = FakeCloudStack(recorder)
    return cloud.register(
        hosts=["192.0.2.11", " 192.0.2.12"],
        username="root",
        port="22",
        sshkey=KEY,
    )


@pytest.fixture
def network(cloud: FakeCloudStack) -> IsolatedNetwork:
    return cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20")


def test_first_vm_is_deployed_in_21_executions(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB, password="FAKE-pass-4711")
    implementing = ["010", "011", "020", "011", "021", "011", "022", "011", "024"]
    nic = ["012", "030", "012", "031", "012", "032", "012", "033", "012", "034", "012", "035"]
    assert len(cloud.history) == 21
    assert sent(cloud) == as_fixtures(*implementing, *nic)


def test_second_vm_makes_12_executions(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    before = len(cloud.history)
    network.deploy_vm("web-2", ip="10.10.1.46", mac="02:01:00:cc:00:06")
    assert len(cloud.history) - before == 12


def test_without_guest_services_no_dhcp_dns_or_restore_is_sent(recorder: Recorder) -> None:
    cloud = FakeCloudStack(recorder).register(hosts=["192.0.2.11"])
    network = cloud.isolated_network(
        204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20", offering=NAT_SERVICES
    )
    network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    assert without_ensures(cloud) == ["implement-network", "assign-ip", "apply-fw-rules", "prepare-nic"]


def test_the_first_rule_assigns_an_address_and_the_last_releases_it(
    cloud: FakeCloudStack, network: IsolatedNetwork
) -> None:
    network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    before = len(cloud.history)
    address = network.associate("203.0.113.21")
    assert len(cloud.history) == before, "acquiring an address sends nothing"
    ssh = network.add_port_forward(address, "2222", "10.10.1.45", "22")
    ports = network.add_port_forward(address, "8080-8090", "10.10.1.45")
    assert sent(cloud, before) == as_fixtures("012", "051", "012", "050", "012", "053", "012", "054")
    before = len(cloud.history)
    network.delete_port_forward(ssh)
    network.delete_port_forward(ports)
    released = ["delete-port-forward", "delete-port-forward", "assign-ip", "release-ip"]
    assert without_ensures(cloud, before) == released, "in the middle of a round"
    assert sent(cloud, before)[1] == as_fixtures("056")[0]
    assert sent(cloud, before)[-1] == as_fixtures("060")[0]


def test_static_nat_brings_its_own_address_only(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    before = len(cloud.history)
    address = network.associate("203.0.113.22")
    network.enable_static_nat(address, "10.10.1.162")
    network.disable_static_nat(address)
    assert sent(cloud, before)[:6] == as_fixtures("012", "057", "012", "058", "012", "059")
    assert without_ensures(cloud, before) == ["assign-ip", "add-static-nat", "delete-static-nat", "release-ip"]


def test_disassociating_revokes_each_rule_and_releases_the_address(
    cloud: FakeCloudStack, network: IsolatedNetwork
) -> None:
    network.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:cc:00:03")
    address = network.associate("203.0.113.21")
    network.add_port_forward(address, "2222", "10.10.1.45", "22", open_firewall=True)
    before = len(cloud.history)
    network.disassociate(address)
    assert without_ensures(cloud, before) == ["delete-port-forward", "apply-fw-rules", "assign-ip", "release-ip"]
    before = len(cloud.history)
    network.disassociate(network.associate("203.0.113.22"))
    assert cloud.commands(before) == [], "an address without rules is not released"


def test_a_restart_sends_rules_before_their_addresses(cloud: FakeCloudStack) -> None:
    network = cloud.isolated_network(760, vlan=1760, cidr="10.77.1.0/24", source_nat="203.0.113.80")
    vm = cs.VirtualMachine("rb-0", "9f000000-0000-4000-8000-000000000190")
    guest = cs.Nic("1901", "6b7c2a10-0000-4000-8000-000000001901", "02:01:00:cc:77:01", "10.77.1.10", vm)
    network.add_nic(guest)
    forward, static = network.associate("203.0.113.81"), network.associate("203.0.113.82")
    network.add_port_forward(forward, 22, guest, open_firewall=True)
    network.enable_static_nat(static, guest)
    network.add_firewall_rule(static, "tcp", 22)
    before = len(cloud.history)
    network.restart()
    assert without_ensures(cloud, before) == [
        "implement-network", "assign-ip", "apply-fw-rules", "add-static-nat", "apply-fw-rules", "add-port-forward",
        "restore-network",
    ]  # fmt: skip
    payloads = [it["payload"] for it in sent(cloud, before)]
    bare = [it for it in payloads if "current_details" not in it]  # type: ignore[operator]
    for at, number in ((0, "730"), (1, "731"), (3, "733"), (5, "734")):
        assert bare[at] == fixture(number)["payload"]


def test_load_balancing_sends_the_whole_list_between_two_rounds(
    cloud: FakeCloudStack, network: IsolatedNetwork
) -> None:
    web = network.add_nic(WEB)
    address = network.associate("203.0.113.21")
    first = network.add_lb_rule(address, "lb-web", 80, 8080, [web])
    before = len(cloud.history)
    second = network.add_lb_rule(address, "lb-api", 443, 8443, [web])
    around = ["assign-ip", "assign-ip", "apply-lb-rules", "assign-ip", "assign-ip"]
    assert without_ensures(cloud, before) == around
    lists = [it.payload["lb_rules"] for it in cloud.history[before:] if it.command == "apply-lb-rules"]
    assert [[(rule["id"], rule["revoke"]) for rule in it] for it in lists] == [
        [(first.rule_id, False), (second.rule_id, False)]
    ]
    before = len(cloud.history)
    network.delete_lb_rule(second)
    assert without_ensures(cloud, before) == around
    lists = [it.payload["lb_rules"] for it in cloud.history[before:] if it.command == "apply-lb-rules"]
    assert [[(rule["id"], rule["revoke"]) for rule in it] for it in lists] == [
        [(first.rule_id, False), (second.rule_id, True)]
    ]


def test_moving_the_source_nat_address_names_the_new_one_only(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB)
    before = len(cloud.history)
    network.change_source_nat(network.associate("203.0.113.24"), shut_down=False)
    assert sent(cloud, before)[2:5] == as_fixtures("720", "012", "721")


def test_restart_without_cleanup_sends_no_shutdown(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB)
    before = len(cloud.history)
    network.restart()
    assert without_ensures(cloud, before) == ["implement-network", "assign-ip", "apply-fw-rules", "restore-network"]
    assert sent(cloud, before)[:5] == as_fixtures("012", "012", "137", "012", "051")


def test_rolling_restart_with_cleanup_implements_twice(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB)
    before = len(cloud.history)
    network.restart(cleanup=True)
    assert without_ensures(cloud, before).count("implement-network") == 2
    assert "shutdown-network" not in cloud.commands(before)


def test_restart_with_cleanup_forgets_the_details_and_keeps_the_vlan(
    cloud: FakeCloudStack, network: IsolatedNetwork
) -> None:
    network.add_nic(WEB)
    before = len(cloud.history)
    network.restart(cleanup=True, rolling=False)
    commands = cloud.commands(before)
    shutdown = before + commands.index("shutdown-network")
    assert sent(cloud, shutdown)[0] == as_fixtures("127")[0]
    after = cloud.history[shutdown + 1]
    assert after.command == "ensure-network-device"
    assert after.payload["current_details"] == "{}"
    assert (after.payload["vlan"], after.payload["network_state"]) == ("1204", "implemented")


def test_garbage_collection_and_reimplementation(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB)
    address = network.associate("203.0.113.21")
    network.add_port_forward(address, "8080-8090", "10.10.1.45")
    before = len(cloud.history)
    assert network.garbage_collect()
    down = ["120", "121", "120", None, "120", "125", "120", "060", "120", "126"]
    for got, number in zip(sent(cloud, before), down, strict=True):
        if number == "060":
            assert json.dumps(got["payload"]).replace("shutdown", "implemented") == json.dumps(
                fixture("060")["payload"]
            )
        elif number:
            assert got == as_fixtures(number)[0]
    assert network.stored == ""
    network.next_vlan = "1377"
    before = len(cloud.history)
    network.start_vm(WEB)
    assert sent(cloud, before)[0] == as_fixtures("135")[0]
    assert sent(cloud, before)[2] == as_fixtures("136")[0]


def test_deletion_of_a_network_that_was_shut_down(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.add_nic(WEB)
    network.garbage_collect()
    before = len(cloud.history)
    network.delete()
    assert sent(cloud, before) == as_fixtures("130", "131")


def test_deletion_of_a_network_that_was_never_implemented(cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    network.delete()
    assert sent(cloud) == as_fixtures("130", "132")


def test_a_failed_implement_is_shut_down(recorder: Recorder, cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    recorder.fails = {"implement-network", "ensure-network-device"}
    with pytest.raises(Failed):
        network.add_nic(WEB)
    assert without_ensures(cloud)[-1] == "shutdown-network"
    assert sent(cloud)[-1] == as_fixtures("128")[0]
    assert network.facts.state == "allocated"


def test_a_failed_shutdown_keeps_details_and_state(
    recorder: Recorder, cloud: FakeCloudStack, network: IsolatedNetwork
) -> None:
    network.add_nic(WEB)
    recorder.fails = {"shutdown-network"}
    assert not network.garbage_collect()
    assert (network.facts.state, network.host) == ("implemented", "192.0.2.11")


def test_a_failing_prepare_nic_is_ignored(recorder: Recorder, cloud: FakeCloudStack, network: IsolatedNetwork) -> None:
    recorder.fails = {"prepare-nic"}
    network.add_nic(WEB)
    assert cloud.commands()[-1] == "save-vm-data"


class TestDetails:
    def test_empty_output_means_unchanged(self, recorder: Recorder, network: IsolatedNetwork) -> None:
        network.ensure()
        recorder.prints = ""
        network.ensure()
        assert network.host == "192.0.2.11"

    def test_a_failed_first_ensure_stores_braces_and_the_command_goes_on(
        self, recorder: Recorder, cloud: FakeCloudStack, network: IsolatedNetwork
    ) -> None:
        recorder.fails = {"ensure-network-device"}
        network.send("implement-network", cs.implement_network(network.facts))
        assert network.stored == "{}"
        assert cloud.commands() == ["ensure-network-device", "implement-network"]

    def test_more_than_1024_characters_are_not_stored(self, recorder: Recorder, network: IsolatedNetwork) -> None:
        recorder.prints = json.dumps({"host": "192.0.2.11", "padding": "x" * 1024})
        network.ensure()
        assert network.stored == ""

    def test_a_warning_line_poisons_the_network(self, recorder: Recorder, network: IsolatedNetwork) -> None:
        recorder.prints = 'warning: x\n{"host":"192.0.2.11"}'
        network.ensure()
        with pytest.raises(UnreadableDetails):
            network.ensure()


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "", True),
        (0, "not JSON", True),
        (0, '{"host":"h"}', True),
        (0, '{"status":"success"}', True),
        (0, '{"status":"SUCCESS"}', True),
        (0, '{"status":""}', True),
        (0, '{"status":"error"}', False),
        (0, '{"status":1}', False),
        (0, '["status"]', True),
        (1, '{"status":"success"}', False),
    ],
)
def test_success_needs_exit_status_0_and_no_failure_in_the_output(status: int, output: str, *, expected: bool) -> None:
    assert succeeded(Execution(status, output, 0.1, "")) is expected


def test_offerings_without_firewall_never_send_apply_fw_rules(recorder: Recorder) -> None:
    cloud = FakeCloudStack(recorder).register(hosts=["192.0.2.11"])
    offering = Offering.of(*(ALL_SERVICES.services - {"Firewall"}))
    network = cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", source_nat="203.0.113.20", offering=offering)
    network.add_nic(WEB)
    network.garbage_collect()
    assert "apply-fw-rules" not in cloud.commands()


# --- VPCs (tests/payloads/2*)

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


def test_a_vpc_without_an_address_gets_one_with_its_first_tier(vpc: Vpc, tier: Tier) -> None:
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
def test_an_acl_is_sent_as_a_whole(tier: Tier, items: list[AclItem], number: str, state: cs.State) -> None:
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
    assert sent(vpc.cloud)[-1] == as_fixtures("227")[0]


def test_deleting_a_tier_keeps_the_details_of_its_vpc(vpc: Vpc, tier: Tier) -> None:
    vpc.implement()
    tier.acl = ALLOW_ALL
    tier.implement()
    before = len(vpc.cloud.history)
    tier.delete()
    assert sent(vpc.cloud, before) == as_fixtures("201", "216", "201", "232", "201", "233")
    vpc.delete()
    assert sent(vpc.cloud)[-1] == as_fixtures("235")[0]
    assert not vpc.stored


def test_source_nat_change_and_restart_of_a_vpc(vpc: Vpc, tier: Tier) -> None:
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


# --- shared networks (tests/payloads/3*)

SHARED_VM = cs.Nic(
    "7101",
    "6b7c2a10-0000-4000-8000-000000007101",
    "1e:00:aa:00:00:11",
    "10.30.0.61",
    cs.VirtualMachine("sh-1", "9f000000-0000-4000-8000-000000000071"),
)


@pytest.fixture
def shared() -> SharedNetwork:
    recorder = Recorder()
    recorder.prints = '{"host":"192.0.2.11","namespace":"cs-net-410"}'
    cloud = FakeCloudStack(recorder).register(hosts=["192.0.2.11"])
    return SharedNetwork(cloud, 410, vlan=1410, cidr="10.30.0.0/24", device_ip="10.30.0.5")


def test_lifecycle_of_a_shared_network(shared: SharedNetwork) -> None:
    shared.add_nic(SHARED_VM)
    said = sent(shared.cloud)
    commands = [it for it in said if "current_details" not in it["payload"]]  # type: ignore[operator]
    assert said[0] == as_fixtures("300")[0]
    assert commands[:5] == as_fixtures("301", "302", "303", "304", "305")
    before = len(shared.cloud.history)
    shared.restart()
    assert without_ensures(shared.cloud, before) == ["implement-network", "restore-network"]
    assert sent(shared.cloud, before)[2] == as_fixtures("314")[0]
    before = len(shared.cloud.history)
    shared.expunge_vm(SHARED_VM)
    said = sent(shared.cloud, before)
    assert [said[1], said[3], said[5]] == as_fixtures("311", "310", "312")
    shared.delete()
    assert sent(shared.cloud)[-1] == as_fixtures("316")[0]
    assert not shared.stored
