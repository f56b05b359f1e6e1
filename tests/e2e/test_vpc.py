"""Life cycle of VPCs and their tiers: the events in CloudStack and the executions of each."""

from __future__ import annotations

import pytest

from bed import Bed
from bed.lab import Internet
from bed.payloads import AclItem
from e2e.networks import OUTSIDE, MakeVpc, Traces, VpcLife, lease

CLOSED = {"timeout_s": 0.4}
ALLOW = [AclItem(1, "allow", "ingress", "all"), AclItem(2, "allow", "egress", "all")]


def rows(life: VpcLife, filter: str = "") -> str:
    """The ACLs, translations and balanced ports of the VPC as the host lists them."""
    return life.vpc.custom_action("list-firewall-rules", filter=filter)


@pytest.mark.binary
def test_creating_a_vpc_with_an_address(make_vpc: MakeVpc) -> None:
    life = make_vpc()
    life.vpc.implement()
    assert life.vpc.details["namespace"] == life.vpc.namespace
    assert life.vpc.details["vpc_id"] == life.vpc.facts.vpc_id
    assert life.public[0].ip in life.host.within(life.vpc.namespace).sh("ip -4 -o addr")


@pytest.mark.binary
def test_creating_a_vpc_whose_address_comes_with_its_first_tier(make_vpc: MakeVpc, internet: Internet) -> None:
    life = make_vpc(source_nat=False)
    life.vpc.implement()
    life.vpc.source_nat = life.public[0]
    life.public[0].source_nat = True
    vm, _ = life.vm(life.tier(1), "app-1")
    with internet.serve_tcp(80):
        assert vm.tcp(OUTSIDE, 80).saw == life.public[0].ip


@pytest.mark.binary
def test_first_vm_in_a_tier_and_second_tier(make_vpc: MakeVpc, internet: Internet) -> None:
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1, brisk=False), life.tier(2)
    before = len(life.cloud.history)
    one, _ = life.vm(web, "web-1")
    assert [it for it in life.cloud.commands(before) if it != "ensure-network-device"] == [
        "implement-network", "assign-ip", "restore-network", "prepare-nic", "config-dhcp-subnet", "add-dhcp-entry",
        "config-dns-subnet", "add-dns-entry", "save-vm-data",
    ]  # fmt: skip
    two, _ = life.vm(app, "app-1")
    assert web.failures == app.failures == []
    assert f"obtained from {web.facts.gateway}" in lease(one)
    assert app.facts.gateway in one.run("ip", "route", "get", app.facts.gateway).out
    with internet.serve_tcp(80), two.serve_tcp(22):
        assert one.tcp(OUTSIDE, 80).saw == two.tcp(OUTSIDE, 80).saw == life.public[0].ip
        assert not one.tcp(two.ip, 22, **CLOSED).ok, "a tier without an ACL is closed"
        assert one.ping(web.facts.gateway).ok


@pytest.mark.binary
def test_replacing_changing_and_removing_an_acl(make_vpc: MakeVpc, internet: Internet) -> None:
    """Between tiers both the egress ACL of the source and the ingress ACL of the target apply."""
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1), life.tier(2)
    one, _ = life.vm(web, "web-1")
    two, _ = life.vm(app, "app-1")
    with two.serve_tcp(22, 8080), internet.serve_tcp(80):
        app.replace_acl([AclItem(1, "allow", "ingress", "tcp", 8080, cidrs=(web.facts.cidr,))])
        assert one.tcp(two.ip, 8080).saw == one.ip
        assert not one.tcp(two.ip, 22, **CLOSED).ok
        kept = one.open(two.ip, 8080)
        web.replace_acl([AclItem(1, "deny", "egress", "tcp", 8080), AclItem(2, "allow", "egress", "all")])
        assert not one.tcp(two.ip, 8080, **CLOSED).ok, "the egress ACL of the source tier denies"
        assert kept.ask(timeout_s=0.5) != "answered", "the connection it had allowed has ended"
        web.replace_acl([])
        assert one.tcp(two.ip, 8080).ok, "an ACL without egress items allows egress"
        app.replace_acl([AclItem(1, "deny", "ingress", "tcp", 8080), AclItem(2, "allow", "ingress", "all")])
        assert not one.tcp(two.ip, 8080, **CLOSED).ok, "the first match decides"
        assert one.tcp(two.ip, 22).ok
        app.replace_acl([])
        assert not one.tcp(two.ip, 22, **CLOSED).ok


@pytest.mark.binary
def test_tiers_share_addresses_and_have_their_own_rules(make_vpc: MakeVpc, internet: Internet) -> None:
    """Several services on one address, also on the VPC's own. The tier's ACL matches the private port."""
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1), life.tier(2)
    one, first = life.vm(web, "web-1")
    two, second = life.vm(app, "app-1")
    web.replace_acl(ALLOW)
    app.replace_acl([AclItem(1, "allow", "ingress", "tcp", 22), AclItem(2, "allow", "ingress", "tcp", 8080)])
    shared, static, own = web.associate(life.public[1]), web.associate(life.public[2]), web.associate(life.public[0])
    app.addresses.append(own)
    with one.serve_tcp(22, 8080), two.serve_tcp(22, 23, 8080), internet.serve_tcp(80):
        web.add_port_forward(shared, 2222, first, 22)
        web.add_lb_rule(shared, "web", 80, 8080, [first])
        web.enable_static_nat(static, first)
        web.add_port_forward(own, 2200, first, 22)
        app.add_port_forward(own, 2201, second, 22)
        app.add_lb_rule(own, "app", 81, 8080, [second])
        for address, port, server in (
            (shared, 2222, "web-1"),
            (shared, 80, "web-1"),
            (static, 22, "web-1"),
            (own, 2200, "web-1"),
            (own, 2201, "app-1"),
            (own, 81, "app-1"),
        ):
            assert internet.tcp(address.ip, port).server == server, (address.ip, port)
        assert one.tcp(OUTSIDE, 80).saw == static.ip
        assert two.tcp(OUTSIDE, 80).saw == own.ip
        app.replace_acl([AclItem(1, "deny", "ingress", "tcp", 8080, cidrs=("203.0.113.0/24",))])
        assert not internet.tcp(own.ip, 2201, **CLOSED).ok
        assert not internet.tcp(own.ip, 81, **CLOSED).ok, "the ACL sees the client address of balanced traffic"
        web.disassociate(shared)
        assert internet.tcp(own.ip, 2200).ok


@pytest.mark.binary
def test_removing_a_tier_loses_no_packet_of_the_others(make_vpc: MakeVpc, internet: Internet) -> None:
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1), life.tier(2)
    one, first = life.vm(web, "web-1")
    life.vm(app, "app-1")
    web.replace_acl(ALLOW)
    app.replace_acl(ALLOW)
    web.add_port_forward(web.associate(life.public[1]), 22, first)
    with one.serve_tcp(22), internet.serve_udp(53):
        kept = internet.open(life.public[1].ip, 22)
        flood = one.flood_udp(OUTSIDE, [53], count=4000)
        app.garbage_collect()
        app.delete()
        counted = flood.result()
        assert counted.lost(53) == 0
        assert kept.ask() == "answered"
        assert one.ping(OUTSIDE).ok
    assert life.public[0].ip in life.host.within(life.vpc.namespace).sh("ip -4 -o addr")


@pytest.mark.binary
def test_a_deleted_vpc_leaves_nothing(make_vpc: MakeVpc, bed: Bed) -> None:
    life = make_vpc()
    tier = life.tier(1)
    before = Traces(bed)
    life.vpc.implement()
    vm, nic = life.vm(tier, "web-1")
    tier.replace_acl(ALLOW)
    tier.add_port_forward(tier.associate(life.public[1]), 22, nic)
    tier.add_lb_rule(tier.associate(life.public[2]), "web", 80, 8080, [nic])
    vm.destroy()
    life.vms.remove(vm)
    tier.delete()
    life.vpc.delete()
    assert before.left() == {}


def test_a_failed_vpc_is_deleted_with_its_tiers(make_vpc: MakeVpc, bed: Bed) -> None:
    """The tiers are destroyed with the VPC. The second shutdown-vpc, without stored details, does nothing."""
    life = make_vpc()
    tier = life.tier(1)
    before = Traces(bed)
    life.vpc.implement()
    tier.implement()
    life.vpc.delete()
    life.vpc.delete()
    life.vpc.tiers.clear()
    assert before.left() == {}


@pytest.mark.binary
@pytest.mark.parametrize("how", ["without cleanup", "with cleanup, rolling", "with cleanup, not rolling"])
def test_restart_of_a_vpc_ends_in_the_same_state(make_vpc: MakeVpc, internet: Internet, how: str) -> None:
    life = make_vpc()
    life.vpc.implement()
    tier = life.tier(1)
    vm, nic = life.vm(tier, "web-1")
    tier.replace_acl(ALLOW)
    tier.add_port_forward(tier.associate(life.public[1]), 2222, nic, 22)
    tier.enable_static_nat(tier.associate(life.public[2]), nic)
    with vm.serve_tcp(22, 8080):
        tier.add_lb_rule(tier.associate(life.public[3]), "web", 80, 8080, [nic])
        before = rows(life)
        kept = internet.open(life.public[1].ip, 2222)
        life.vpc.restart(cleanup="with cleanup" in how, rolling="not" not in how)
        if "not rolling" in how:
            # The restart of the VPC does not restore its tiers, so each needs its own restart.
            tier.restart()
        else:
            assert kept.ask() == "answered"
        assert rows(life) == before
        for address, port in ((life.public[1], 2222), (life.public[2], 22), (life.public[3], 80)):
            assert internet.tcp(address.ip, port).server == "web-1"


@pytest.mark.parametrize("how", ["without cleanup", "with cleanup, rolling", "with cleanup, not rolling"])
def test_restart_of_a_tier_ends_in_the_same_state(make_vpc: MakeVpc, internet: Internet, how: str) -> None:
    life = make_vpc()
    life.vpc.implement()
    tier, other = life.tier(1), life.tier(2)
    vm, nic = life.vm(tier, "web-1")
    beside, _ = life.vm(other, "app-1")
    tier.replace_acl(ALLOW)
    tier.add_port_forward(tier.associate(life.public[1]), 2222, nic, 22)
    before = rows(life)
    with vm.serve_tcp(22), internet.serve_tcp(80):
        tier.restart(cleanup="with cleanup" in how, rolling="not" not in how)
        assert rows(life) == before
        assert internet.tcp(life.public[1].ip, 2222).server == "web-1"
        assert beside.tcp(OUTSIDE, 80).saw == life.public[0].ip


@pytest.mark.binary
def test_changing_the_source_nat_address(make_vpc: MakeVpc, internet: Internet) -> None:
    """There is one source-NAT address. The previous one keeps its forwards, and goes if it has none."""
    life = make_vpc()
    life.vpc.implement()
    tier = life.tier(1)
    vm, nic = life.vm(tier, "web-1")
    tier.replace_acl(ALLOW)
    old, new = life.public[0], life.public[3]
    tier.add_port_forward(tier.associate(old), 2222, nic, 22)
    with vm.serve_tcp(22), internet.serve_tcp(80):
        for address, former in ((new, old), (old, new)):
            life.vpc.change_source_nat(address)
            assert vm.tcp(OUTSIDE, 80).saw == address.ip
            lines = [line for line in rows(life).split("\\n") if "source-nat" in line]
            assert [former.ip in line for line in lines] == [False] * len(lines)
            assert internet.tcp(old.ip, 2222).server == "web-1"
    assert internet.who_has(new.ip) == [], "no rule uses it, and nobody releases it"


def test_custom_actions_on_a_vpc_and_on_its_tier(make_vpc: MakeVpc) -> None:
    life = make_vpc()
    life.vpc.implement()
    tier = life.tier(1)
    tier.implement()
    assert life.vpc.facts.vpc_id in life.vpc.custom_action("show")
    assert "nothing to do" in tier.custom_action("check")
    assert life.public[0].ip in life.vpc.custom_action("dump-config")
