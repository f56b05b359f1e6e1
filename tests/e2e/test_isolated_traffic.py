"""Traffic of an isolated network after events in CloudStack: NAT, firewall, egress rules, revocation."""

from __future__ import annotations

import pytest

from bed import Bed
from bed.cloudstack import NAT_SERVICES
from bed.lab import Internet
from bed.payloads import Offering, PublicAddress
from e2e.networks import OUTSIDE, Life, MakeLife

CLOSED = {"timeout_s": 0.4}
BESIDE = "198.51.100.2"


@pytest.fixture
def life(brisk_life: Life) -> Life:
    return brisk_life


def test_source_nat_works_for_every_protocol(life: Life, internet: Internet) -> None:
    vm, _ = life.vm("web-1")
    with internet.serve_tcp(80), internet.serve_udp(53):
        assert vm.tcp(OUTSIDE, 80).saw == life.public(0)
        assert vm.udp(OUTSIDE, 53).saw == life.public(0)
        assert vm.ping(OUTSIDE, count=3).ok
        assert vm.udp(OUTSIDE, 54).outcome == "refused", "related ICMP errors are forwarded"


def test_new_connections_need_a_firewall_rule(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    forwarded, static = network.associate(life.public(1)), network.associate(life.public(2))
    with vm.serve_tcp(22), vm.serve_udp(53):
        network.add_port_forward(forwarded, 22, nic)
        network.add_port_forward(network.addresses[0], 22, nic)
        network.enable_static_nat(static, nic)
        targets = [life.public(0), forwarded.ip, static.ip]
        answers = internet.tcp_many([{"address": ip, "port": 22, **CLOSED} for ip in targets])
        assert [answer.outcome for answer in answers] == ["timeout"] * 3
        assert [internet.ping(ip, timeout_s=0.3).answered for ip in targets] == [0, 0, 0]
        assert internet.udp(static.ip, 53, **CLOSED).outcome == "timeout"

        network.add_firewall_rule(static, "tcp", 22, sources=[f"{BESIDE}/32"])
        assert internet.tcp(static.ip, 22, source=BESIDE).ok, "the source of the rule is admitted"
        assert internet.tcp(static.ip, 22, source=OUTSIDE, **CLOSED).outcome == "timeout", (
            "other sources are not admitted"
        )
        network.add_firewall_rule(static, "icmp", icmp_type=8, icmp_code=0)
        assert internet.ping(static.ip).ok
        assert internet.ping(static.ip, kind=13, timeout_s=0.3).answered == 0, "another ICMP type is dropped"
        network.add_firewall_rule(static, "all")
        assert internet.udp(static.ip, 53).server == "web-1"
        assert internet.ping(static.ip, kind=13).ok


def test_an_offering_without_firewall_is_open_from_the_start(make_life: MakeLife, internet: Internet, bed: Bed) -> None:
    from bed.cloudstack import FakeCloudStack

    open_cloud = FakeCloudStack.on(bed.management, extension="open")
    open_cloud.register(hosts=bed.hosts, **bed.login("root"), firewall="absent", owner="open")
    life = make_life(offering=Offering.of("SourceNat", "PortForwarding"), with_cloud=open_cloud, brisk=True)
    vm, nic = life.vm("web-1")
    address = life.network.associate(life.public(1))
    life.network.add_port_forward(address, 22, nic)
    with vm.serve_tcp(22):
        assert internet.tcp(address.ip, 22).server == "web-1"


@pytest.mark.binary
def test_static_nat_works_both_ways_and_overrides_source_nat(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    static = network.associate(life.public(1))
    network.enable_static_nat(static, nic)
    network.add_firewall_rule(static, "tcp", 22)
    with vm.serve_tcp(22), internet.serve_tcp(80):
        assert internet.tcp(static.ip, 22).saw == "203.0.113.1", "the VM sees the address of the client"
        assert vm.tcp(OUTSIDE, 80).saw == static.ip
        network.disable_static_nat(static)
        assert vm.tcp(OUTSIDE, 80).saw == life.public(0)


@pytest.mark.binary
def test_port_forwards_map_one_to_one_or_shifted(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_firewall_rule(address, "tcp", 1, 65535)
    network.add_port_forward(address, "2222", nic, "22")
    network.add_port_forward(address, "8080-8090", nic, "8080-8090")
    network.add_port_forward(address, "4000-4003", nic, "5000-5003")
    with vm.serve_tcp(22, 8080, 8085, 8090, 5000, 5001, 5002, 5003):
        asked = [2222, 8080, 8085, 8090, 4000, 4001, 4002, 4003]
        answers = internet.tcp_many([{"address": address.ip, "port": port} for port in asked])
        assert [answer.port for answer in answers] == [22, 8080, 8085, 8090, 5000, 5001, 5002, 5003]
        outside = internet.tcp_many([{"address": address.ip, "port": port, **CLOSED} for port in (8079, 8091, 22)])
        assert not any(answer.ok for answer in outside)


def test_vms_reach_public_addresses_of_their_own_network(life: Life) -> None:
    """Hairpin: VMs reach the public addresses of other VMs and their own."""
    one, nic = life.vm("web-1", 45)
    two, other = life.vm("web-2", 46)
    network = life.network
    forwarded, static = network.associate(life.public(1)), network.associate(life.public(2))
    network.add_port_forward(forwarded, 2222, nic, 22, open_firewall=True)
    network.enable_static_nat(static, other)
    network.add_firewall_rule(static, "tcp", 22)
    with one.serve_tcp(22), two.serve_tcp(22):
        assert two.tcp(forwarded.ip, 2222).server == "web-1"
        assert one.tcp(forwarded.ip, 2222).server == "web-1", "the VM reaches itself"
        assert one.tcp(static.ip, 22).server == "web-2"
        assert two.tcp(static.ip, 22).server == "web-2", "the VM reaches itself"


@pytest.mark.parametrize("default", ["allow", "deny"])
def test_egress_rules_invert_the_default(make_life: MakeLife, internet: Internet, default: str) -> None:
    """Rules deny when the default is allow, and allow when it is deny. They match destinations."""
    services = NAT_SERVICES.services
    life = make_life(offering=Offering.of(*services, default_egress_allow=default == "allow"), brisk=True)
    vm, _ = life.vm("web-1")
    network = life.network
    with internet.serve_tcp(25, 443):
        unnamed = vm.tcp(OUTSIDE, 443, **CLOSED).ok
        assert unnamed is (default == "allow")
        network.add_egress_rule("tcp", 25, destinations=[f"{OUTSIDE}/32"])
        assert vm.tcp(OUTSIDE, 25, **CLOSED).ok is (default == "deny")
        assert vm.tcp(BESIDE, 25, **CLOSED).ok is (default == "allow")
        assert vm.tcp(OUTSIDE, 443, **CLOSED).ok is (default == "allow")
        assert vm.ping(network.facts.gateway).ok, "the device itself is always reachable"


@pytest.mark.parametrize("speaker", ["client", "server"])
def test_a_revocation_ends_only_the_flows_it_allowed(life: Life, internet: Internet, speaker: str) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    with vm.serve_tcp(22) as ssh, vm.serve_tcp(23) as kept_service:
        forward = network.add_port_forward(address, 22, nic, open_firewall=True)
        network.add_port_forward(address, 23, nic, open_firewall=True)
        gone, kept = internet.open(address.ip, 22), internet.open(address.ip, 23)
        assert gone.ask() == kept.ask() == "answered"
        network.delete_port_forward(forward)
        if speaker == "client":
            assert gone.ask(timeout_s=0.5) in ("timeout", "reset", "closed")
            assert kept.ask() == "answered"
        else:
            ssh.say("still there")
            kept_service.say("still there")
            assert gone.hear(0.5) in ("<timeout>", "<reset>", "<closed>")
            assert kept.hear() == "still there"
        gone.close(abruptly=True)
        kept.close()


def test_a_long_transfer_survives_changes_of_other_rules(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    network = life.network
    address = network.associate(life.public(1))
    network.add_port_forward(address, 22, nic, open_firewall=True)
    with vm.serve_tcp(22), internet.serve_tcp(80):
        inward = internet.transfer(address.ip, 22, seconds=100)
        outward = vm.transfer(OUTSIDE, 80, seconds=100)
        for port in (1001, 1002, 1003):
            rule = network.add_port_forward(address, port, nic, open_firewall=True)
            network.delete_firewall_rule(network.firewall[-1])
            network.delete_port_forward(rule)
        for moved in (inward.stop(), outward.stop()):
            assert (moved.failure, moved.intact) == ("", True)
            assert moved.sent > 0


def test_a_new_address_is_announced_by_gratuitous_arp(life: Life, internet: Internet) -> None:
    _, nic = life.vm("web-1")
    address = life.network.associate(life.public(1))
    watch = internet.watch_arp(seconds=60, announced=address.ip)
    life.network.add_port_forward(address, 22, nic)
    frames = watch.result()
    assert any(frame.gratuitous and frame.broadcast and frame.sender == address.ip for frame in frames)


def test_a_neighbour_with_a_route_cannot_bypass_the_firewall(life: Life, internet: Internet) -> None:
    vm, nic = life.vm("web-1")
    with vm.serve_tcp(22):
        route = f"{life.subnet}.0/24 via {life.public(0)} dev eth0"
        internet.links(f"route add {route}")
        assert internet.tcp(nic.ip, 22, **CLOSED).outcome == "timeout"
        assert internet.ping(nic.ip, timeout_s=0.3).answered == 0
        assert internet.ping(life.network.facts.gateway, timeout_s=0.3).answered == 0
        internet.links(f"route delete {route}")


def test_replies_use_the_exit_of_the_request(life: Life, bed: Bed) -> None:
    """Two more public VLANs, one of them untagged, with different gateways."""
    vm, nic = life.vm("web-1")
    network = life.network
    second = bed.internet(vlan=102, address="192.0.2.1/24", name="second")
    untagged = bed.internet(vlan="untagged", address="192.0.3.1/24", name="untagged")
    tagged = PublicAddress("192.0.2.20", "vlan://102", "192.0.2.1", "192.0.2.0/24")
    plain = PublicAddress("192.0.3.20", "vlan://untagged", "192.0.3.1", "192.0.3.0/24")
    with vm.serve_tcp(22), second.serve_tcp(80):
        for address in (tagged, plain):
            network.associate(address)
            network.add_port_forward(address, 22, nic, open_firewall=True)
        for place, address in ((second, tagged), (untagged, plain)):
            place.links("address add 198.18.77.1/32 dev lo")
            assert place.tcp(address.ip, 22).server == "web-1"
            answer = place.tcp(address.ip, 22, source="198.18.77.1")
            assert answer.saw == "198.18.77.1", "only this gateway has a route to the address"


def test_tenants_cannot_reach_sockets_of_the_host(life: Life) -> None:
    """Neither by the addresses of the host over the guest bridge nor by IPv6 link-local addresses."""
    vm, _ = life.vm("web-1")
    host = life.host
    bridge_mac = host.read(f"/sys/class/net/{vm.bridge}/address").strip()
    vm.links(
        f"route add {host.address}/32 dev eth0",
        f"neigh replace {host.address} lladdr {bridge_mac} dev eth0 nud permanent",
    )
    assert life.bed.management.tcp(host.address, 22).ok, "sshd is listening"
    assert vm.tcp(host.address, 22, **CLOSED).outcome == "timeout"
    assert vm.ping(host.address, timeout_s=0.3).answered == 0
    assert "fe80" not in host.sh(f"ip -6 address show dev {vm.bridge}")
