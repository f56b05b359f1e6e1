"""Life cycle of an isolated network: the events in CloudStack and the executions of each."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, Failed, FakeCloudStack
from bed.lab import Internet
from bed.machines import until
from e2e.networks import OUTSIDE, Life, MakeLife, Traces, answers_arp, impatient, lease
from netloom.extension.agent_client import HEARD_S

CLOSED = {"timeout_s": 0.4}


def posix_cksum(text: str) -> int:
    done = subprocess.run(["cksum"], input=text, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


@pytest.mark.binary
def test_first_vm(life: Life, internet: Internet) -> None:
    vm, _ = life.vm("web-1")
    network = life.network
    assert network.failures == []
    assert life.cloud.commands(-9) == [
        "ensure-network-device",
        "ensure-network-device",
        "implement-network",
        "ensure-network-device",
        "assign-ip",
        "ensure-network-device",
        "apply-fw-rules",
        "ensure-network-device",
        "prepare-nic",
    ]
    assert "\n" not in network.stored
    assert network.details["namespace"] == f"cs-net-{network.facts.network_id}"
    preferred = life.bed.hosts[posix_cksum(network.facts.network_id) % 2]
    assert network.host == preferred.address, "the CRC32 of the id selects among the hosts that answer"
    assert vm.ping(network.facts.gateway).ok
    with internet.serve_tcp(80):
        assert vm.tcp(OUTSIDE, 80).saw == life.public(0)


def test_second_vm_on_another_host(life: Life, internet: Internet) -> None:
    one, nic = life.vm("web-1")
    before = len(life.cloud.history)
    other = life.network.deploy_vm("web-2", ip=f"{life.subnet}.46", mac="02:01:00:ff:00:46")
    two = life.plug(other, host=life.elsewhere)
    assert life.cloud.commands(before) == ["ensure-network-device", "prepare-nic"], (
        "with NAT services only, no other command is sent"
    )
    assert until(lambda: two.ping(nic.ip, timeout_s=1.0).ok)  # a new bridge port forwards within a second
    with internet.serve_tcp(80):
        assert two.tcp(OUTSIDE, 80).saw == life.public(0)
        assert one.tcp(OUTSIDE, 80).saw == life.public(0)


@pytest.mark.binary
def test_rules_created_and_deleted(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    assert internet.who_has(address.ip) == [], "an address without a rule is not assigned"
    with vm.serve_tcp(22, 8080, 8085):
        ssh = network.add_port_forward(address, 2222, nic, 22)
        assert answers_arp(internet, address.ip)
        assert internet.tcp(address.ip, 2222, **CLOSED).outcome == "timeout", "closed without a firewall rule"
        opened = network.add_firewall_rule(address, "tcp", 2222)
        answer = internet.tcp(address.ip, 2222)
        assert (answer.server, answer.port, answer.saw) == ("web-1", 22, "203.0.113.1")
        web = network.add_port_forward(address, "8080-8090", nic, open_firewall=True)
        assert [internet.tcp(address.ip, port).port for port in (8080, 8085)] == [8080, 8085]

        network.delete_firewall_rule(opened)
        assert internet.tcp(address.ip, 2222, **CLOSED).outcome == "timeout"
        network.delete_port_forward(ssh)
        assert internet.tcp(address.ip, 8085).ok, "the other forward still works"
        network.delete_port_forward(web)
        network.disassociate(address)
    assert internet.who_has(address.ip) == [], "the address is released with its last rule"


@pytest.mark.binary
def test_address_disassociated(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    address, kept = network.associate(life.public(1)), network.associate(life.public(2))
    with vm.serve_tcp(22):
        for each in (address, kept):
            network.add_port_forward(each, 22, nic, open_firewall=True)
            assert internet.tcp(each.ip, 22).ok
        network.disassociate(address)
        assert internet.tcp(address.ip, 22, **CLOSED).outcome in ("timeout", "unreachable")
        assert internet.tcp(kept.ip, 22).ok
    assert internet.who_has(address.ip) == []


@pytest.mark.binary
@pytest.mark.parametrize("how", ["without cleanup", "with cleanup, rolling", "with cleanup, not rolling"])
def test_restart(life: Life, internet: Internet, how: str) -> None:
    life.network.ensures_always = False
    vm, nic = life.vm("web-1")
    network = life.network
    address, static = network.associate(life.public(1)), network.associate(life.public(2))
    with vm.serve_tcp(22), internet.serve_tcp(80):
        network.add_port_forward(address, 2222, nic, 22, open_firewall=True)
        network.enable_static_nat(static, nic)
        network.add_firewall_rule(static, "tcp", 22)
        network.add_egress_rule("tcp", 25)
        host, stored = network.host, network.stored
        transfer = internet.transfer(address.ip, 2222, seconds=110)
        network.ensures_always = True
        network.restart(cleanup=how.startswith("with cleanup"), rolling="not" not in how)
        moved = transfer.stop()
        if "not" not in how:
            assert (moved.failure, moved.intact) == ("", True), "the restart does not affect open connections"
            assert network.stored == stored
        assert network.host == host
        assert network.failures == []
        assert internet.tcp(address.ip, 2222).server == "web-1"
        assert internet.tcp(static.ip, 22).server == "web-1"
        assert vm.tcp(OUTSIDE, 80).saw == static.ip
        assert internet.tcp(life.public(0), 22, **CLOSED).outcome == "timeout"


@pytest.mark.binary
def test_garbage_collection_and_reimplementation_on_another_vlan(life: Life, internet: Internet) -> None:
    before = Traces(life.bed)
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_port_forward(address, "8080-8090", nic, open_firewall=True)
    vm.destroy()
    assert network.garbage_collect()
    assert before.left() == {}, "a network that was shut down leaves nothing"
    assert internet.who_has(life.public(0)) == []
    assert network.stored == ""

    old_vlan, network.next_vlan = network.next_vlan, str(1500 + life.number)
    life.bed.add_segments([("eth1", network.next_vlan)])
    network.start_vm(nic)
    again = life.plug(nic)
    with again.serve_tcp(8081), internet.serve_tcp(80):
        assert internet.tcp(address.ip, 8081).server == "web-1"
        assert again.tcp(OUTSIDE, 80).saw == life.public(0)
    links = life.host.objects()["links"]
    assert not any(f"breth1-{old_vlan}" in link for link in links), "nothing of the old VLAN was restored"


@pytest.mark.binary
def test_network_deleted(life: Life) -> None:
    before = Traces(life.bed)
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_port_forward(address, 22, nic, open_firewall=True)
    assert before.differences() != {}
    vm.destroy()
    network.delete()
    assert network.failures == []
    assert before.left() == {}


@pytest.mark.binary
def test_network_deleted_before_it_was_implemented(life: Life) -> None:
    before = Traces(life.bed)
    life.network.delete()
    assert life.network.failures == []
    assert before.left() == {}


def test_a_bridge_with_a_vm_port_outlives_the_network(brisk_life: Life) -> None:
    """CloudStack's KVM agent also uses the bridge for VMs, so netloom must not delete it."""
    life = brisk_life
    vm, _ = life.vm("web-1")
    host, vlan = life.host, life.network.facts.vlan
    life.network.delete()
    links = host.objects()["links"]
    assert f"{vm.tap} in {vm.bridge}" in links
    assert f"eth1.{vlan} in {vm.bridge}" in links


def unchanged(before: Traces) -> bool:
    """Whether nothing has changed but conntrack entries: those of transfers. Agents may have been restarted."""
    for changes in before.differences().values():
        # The one-file program may be started by its own path or by the path of the active build.
        agents = changes.pop("processes", {})
        ended, started = ([it.partition(" ")[2] for it in agents.get(sign, [])] for sign in "-+")
        if ended != started or set(changes) - {"conntrack"}:
            return False
    return True


def test_repeated_commands_change_nothing(brisk_life: Life, internet: Internet) -> None:
    life = brisk_life
    vm, nic = life.vm("web-1")
    network = life.network
    first = len(life.cloud.history)
    address, static = network.associate(life.public(1)), network.associate(life.public(2))
    network.add_port_forward(address, "8080-8090", nic, open_firewall=True)
    network.enable_static_nat(static, nic)
    network.add_firewall_rule(static, "icmp", icmp_type=8, icmp_code=0)
    before = Traces(life.bed)
    with vm.serve_tcp(8080):
        transfer = internet.transfer(address.ip, 8080, seconds=110)
        for sent in life.cloud.history[first:]:
            again = life.cloud.execute_text(sent.command, sent.text)
            assert (again.ok, again.output) == (True, sent.output)
        assert transfer.stop().failure == ""
    assert until(lambda: unchanged(before)), before.differences()


def test_deletes_of_unknown_objects_succeed_and_create_nothing(life: Life) -> None:
    before = Traces(life.bed)
    network = life.network
    network.facts.vlan, network.facts.state = network.next_vlan, "shutdown"
    address = network.associate(life.public(1))
    network.add_port_forward(address, 22, f"{life.subnet}.45")
    network.enable_static_nat(address, f"{life.subnet}.45")
    assert network.garbage_collect()
    assert network.failures == []
    assert {"delete-port-forward", "delete-static-nat", "release-ip"} < set(life.cloud.commands())
    assert before.left() == {}


def test_two_networks_with_the_same_cidr_on_one_host(
    make_life: MakeLife, bed: Bed, cloud: FakeCloudStack, internet: Internet
) -> None:
    registration = dict(cloud.registration)
    cloud.registration["hosts"] = bed.hosts[0].address
    try:
        lives = [make_life(cidr="10.77.0.0/24") for _ in range(2)]
        vms = [life.vm(f"web-{life.number}") for life in lives]
        assert {life.network.host for life in lives} == {bed.hosts[0].address}
        addresses = []
        with internet.serve_tcp(80):
            for life, (vm, nic) in zip(lives, vms, strict=True):
                service = vm.serve_tcp(22)
                address = life.network.associate(life.public(1))
                life.network.add_port_forward(address, 22, nic, open_firewall=True)
                addresses.append((life, vm, address, service))
            for life, vm, address, _ in addresses:
                assert vm.tcp(OUTSIDE, 80).saw == life.public(0)
                assert internet.tcp(address.ip, 22).server == vm.name
        lives[0].network.delete()
        _, vm, address, _ = addresses[1]
        assert internet.tcp(address.ip, 22).server == vm.name, "the other network is not affected"
    finally:
        cloud.registration = registration


def test_many_networks_at_once(make_life: MakeLife, internet: Internet) -> None:
    """CloudStack calls from many threads. Networks do not wait for each other, and no call is lost."""
    lives = [make_life(brisk=True) for _ in range(4)]
    with ThreadPoolExecutor(len(lives)) as pool:
        vms = [vm for vm, _ in pool.map(lambda life: life.vm(f"web-{life.number}"), lives)]
    with internet.serve_tcp(80):
        answers = [vm.tcp(OUTSIDE, 80) for vm in vms]
    assert [answer.saw for answer in answers] == [life.public(0) for life in lives]


@pytest.mark.binary
def test_an_agent_restart_changes_nothing(brisk_life: Life, internet: Internet) -> None:
    life = brisk_life
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_port_forward(address, 22, nic, open_firewall=True)
    host = life.host
    before = Traces(life.bed)
    with vm.serve_tcp(22):
        transfer = internet.transfer(address.ip, 22, seconds=110)
        host.sh("pkill -9 -f '[a]gent serve --log'")
        assert until(lambda: not any("agent serve" in line for line in host.objects()["processes"]))
        assert network.ensure().ok
        assert transfer.stop().failure == ""
        assert internet.tcp(address.ip, 22).ok
    assert until(lambda: unchanged(before)), before.differences()


@pytest.mark.binary
def test_networks_are_restored_after_a_power_cut(brisk_life: Life, internet: Internet) -> None:
    life = brisk_life
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_port_forward(address, 22, nic, open_firewall=True)
    host = life.host
    vm.destroy()
    host.power_cut()
    time.sleep(HEARD_S)  # until then the helper answers for a host that has just replied
    with impatient(life.cloud):
        sent = network.ensure()
    assert sent.execution.status == 2, "the host of the network does not answer"
    assert host.address in sent.output
    assert json.loads(network.stored)["host"] == host.address, "the network is not moved silently"
    host.boot()
    assert network.ensure().ok
    # The first call starts the agent, and the agent restores every scope.
    assert until(lambda: f"cs-net-{network.facts.network_id}" in host.objects()["namespaces"])
    again = life.plug(nic)
    with again.serve_tcp(22):
        assert until(lambda: internet.tcp(address.ip, 22, **CLOSED).ok)


def test_an_empty_vlan_is_refused_and_named(brisk_life: Life) -> None:
    life = brisk_life
    before = Traces(life.bed)
    life.network.next_vlan = ""
    with pytest.raises(Failed) as refused:
        life.network.implement()
    assert "vlan" in refused.value.execution.output.lower()
    assert before.left() == {}


@pytest.mark.binary
@pytest.mark.mutation("a-former-source-nat-address-goes")
def test_the_former_source_nat_address_is_free_for_others(brisk_life: Life, internet: Internet) -> None:
    """Nobody releases it, and CloudStack may give it to another network: only one host may answer ARP for it."""
    life, network = brisk_life, brisk_life.network
    vm, nic = life.vm("web-1")
    former, second, third = network.addresses[0], network.associate(life.public(1)), network.associate(life.public(2))
    with vm.serve_tcp(22), internet.serve_tcp(80):
        kept = vm.open(OUTSIDE, 80)
        assert kept.ask() == "answered"
        network.change_source_nat(second, shut_down=False)
        assert internet.who_has(former.ip) == []
        assert kept.ask(timeout_s=0.5) != "answered", "as after release-ip"
        assert vm.tcp(OUTSIDE, 80).saw == second.ip
        network.associate(former)
        rule = network.add_port_forward(second, 22, nic, open_firewall=True)
        network.change_source_nat(third, shut_down=False)
        assert vm.tcp(OUTSIDE, 80).saw == third.ip
        assert internet.tcp(second.ip, 22).server == "web-1", "a rule still uses it"
        network.delete_port_forward(rule)
        assert answers_arp(internet, second.ip), "a firewall rule still uses it"
        network.delete_firewall_rule(network.firewall[0])
        assert internet.who_has(second.ip) == []
        network.change_source_nat(former)
        assert internet.who_has(third.ip) == []
        assert vm.tcp(OUTSIDE, 80).saw == former.ip


@pytest.mark.binary
@pytest.mark.mutation("a-netmask-is-the-whole-subnet", instead="str(smallest)")
@pytest.mark.parametrize("reserved", ["64/26", "0/25"], ids=["gateway outside", "gateway inside"])
def test_machines_beside_an_ip_reservation_reach_the_device(
    make_life: MakeLife, bed: Bed, internet: Internet, reserved: str
) -> None:
    everything = FakeCloudStack.on(bed.management, extension="reserved")
    everything.register(hosts=bed.hosts, **bed.login("root", by="key"))
    life = make_life(offering=ALL_SERVICES, with_cloud=everything, brisk=True)
    network = life.network
    whole = network.facts.cidr
    network.reserve(f"{life.subnet}.{reserved}")
    vm, _ = life.vm("web-1", 70)
    other = life.host.vm(
        "printer",
        vlan=network.facts.vlan,
        mac=f"02:01:00:{life.number:02x}:00:c8",
        ip=f"{life.subnet}.200/24",
        gateway=network.facts.gateway,
    )
    life.vms.append(other)
    device = life.host.within(network.namespace)

    def all_reach_each_other() -> None:
        for machine in (vm, other):
            assert machine.ping(network.facts.gateway).ok
            assert machine.tcp(OUTSIDE, 80).saw == life.public(0)
            assert f"dev gst-{network.facts.network_id}" in device.sh(f"ip route get {machine.ip}")

    with internet.serve_tcp(80):
        all_reach_each_other()
        assert "subnet=255.255.255.0\n" in lease(vm)
        kept = other.open(OUTSIDE, 80)
        network.restart()
        all_reach_each_other()
        network.reserve(whole)
        network.restart(cleanup=True)
        all_reach_each_other()
        assert kept.ask() == "answered"


def test_the_gateway_of_an_ip_reservation_answers_before_the_first_nic(brisk_life: Life) -> None:
    """Nobody knows the whole subnet yet. VMs of the reserved part reach the gateway all the same."""
    life, network = brisk_life, brisk_life.network
    network.reserve(f"{life.subnet}.64/26")
    network.implement()
    vm = life.host.vm(
        "early",
        vlan=network.facts.vlan,
        mac=f"02:01:00:{life.number:02x}:00:46",
        ip=f"{life.subnet}.70/24",
        gateway=network.facts.gateway,
    )
    life.vms.append(vm)
    assert vm.ping(network.facts.gateway).ok
    life.vm("web-1", 71)
    assert vm.ping(network.facts.gateway).ok
    assert f"inet {network.facts.gateway}/24 " in life.host.within(network.namespace).sh("ip -4 -o addr")
