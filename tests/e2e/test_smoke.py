"""The scenarios of CloudStack's smoke test of the reference extension, with logins by password.

The smoke test connects to VMs by SSH. Here a listener in the VM sends its name. test_04 is in test_shared.py, test_08
in test_isolated_actions.py.
"""

from __future__ import annotations

from collections import Counter

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.lab import Internet
from bed.payloads import AclItem
from e2e.networks import MakeLife, MakeVpc

CLOSED = {"timeout_s": 0.4}
ALLOW = [AclItem(1, "allow", "ingress", "all"), AclItem(2, "allow", "egress", "all")]


@pytest.fixture
def registered(bed: Bed, cloud: FakeCloudStack) -> FakeCloudStack:
    """Registered like the smoke test, with hosts, username and password only. Public VLANs are on the bed's eth2."""
    smoke = FakeCloudStack.on(bed.management, extension="extnet-isolated-x7k2qp")
    smoke.register(hosts=bed.hosts, **bed.login("root", by="password"))
    return smoke


@pytest.mark.binary
def test_smoke_05_isolated_network(registered: FakeCloudStack, make_life: MakeLife, internet: Internet) -> None:
    life = make_life(offering=ALL_SERVICES, with_cloud=registered, brisk=True)
    (one, first), (two, second) = life.vm("vm-1", 45), life.vm("vm-2", 46)
    network = life.network
    with one.serve_tcp(22), two.serve_tcp(22):
        static = network.associate(life.public(1))
        network.enable_static_nat(static, first)
        network.add_firewall_rule(static, "tcp", 22)
        assert internet.tcp(static.ip, 22).server == "vm-1"
        network.disable_static_nat(static)
        assert not internet.tcp(static.ip, 22, **CLOSED).ok
        forwarded = network.associate(life.public(2))
        rule = network.add_port_forward(forwarded, 22, first, open_firewall=True)
        assert internet.tcp(forwarded.ip, 22).server == "vm-1"
        network.delete_port_forward(rule)
        assert not internet.tcp(forwarded.ip, 22, **CLOSED).ok
        balanced = network.associate(life.public(3))
        network.add_firewall_rule(balanced, "tcp", 22)
        network.add_lb_rule(balanced, "ssh", 22, 22, [first, second])
        assert Counter(internet.tcp(balanced.ip, 22).server for _ in range(4)) == {"vm-1": 2, "vm-2": 2}
        network.add_port_forward(forwarded, 22, first, open_firewall=True)
        network.restart(cleanup=True)
        assert internet.tcp(forwarded.ip, 22).server == "vm-1"


@pytest.mark.binary
def test_smoke_06_vpc(make_vpc: MakeVpc, internet: Internet) -> None:
    """After the deletion of the first tier the balanced port of the second still works."""
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1), life.tier(2)
    (one, first), (two, second) = life.vm(web, "vm-1"), life.vm(app, "vm-2")
    web.replace_acl(ALLOW)
    app.replace_acl(ALLOW)
    with one.serve_tcp(22), two.serve_tcp(22):
        forwarded, static, balanced = (web.associate(life.public[1]), web.associate(life.public[2]), life.public[3])
        web.add_port_forward(forwarded, 22, first)
        web.enable_static_nat(static, first)
        app.add_lb_rule(app.associate(balanced), "ssh", 22, 22, [second])
        for _ in range(2):
            for address, server in ((forwarded, "vm-1"), (static, "vm-1"), (balanced, "vm-2")):
                assert internet.tcp(address.ip, 22).server == server
            life.vpc.restart(cleanup=True)
        web.disable_static_nat(static)
        assert not internet.tcp(static.ip, 22, **CLOSED).ok
        web.delete()
        assert internet.tcp(balanced.ip, 22).server == "vm-2"
        assert not internet.tcp(forwarded.ip, 22, **CLOSED).ok


def test_smoke_07_acls_created_after_the_vms(make_vpc: MakeVpc, internet: Internet) -> None:
    life = make_vpc()
    life.vpc.implement()
    web, app = life.tier(1), life.tier(2)
    (one, first), (two, second) = life.vm(web, "vm-1"), life.vm(app, "vm-2")
    with one.serve_tcp(22), two.serve_tcp(22):
        web.add_port_forward(web.associate(life.public[1]), 22, first)
        app.add_port_forward(app.associate(life.public[2]), 22, second)
        web.replace_acl([AclItem(1, "deny", "ingress", "tcp", 22), AclItem(2, "allow", "egress", "all")])
        app.replace_acl([AclItem(1, "allow", "ingress", "tcp", 22), AclItem(2, "allow", "egress", "all")])
        assert not internet.tcp(life.public[1].ip, 22, **CLOSED).ok
        assert internet.tcp(life.public[2].ip, 22).server == "vm-2"
        assert one.tcp(two.ip, 22).ok


@pytest.mark.binary
def test_smoke_09_source_nat_address_of_a_vpc_changed(make_vpc: MakeVpc, internet: Internet) -> None:
    """Static NAT, port forward and balanced port work before and after each change. One address has the flag."""
    life = make_vpc()
    life.vpc.implement()
    tier = life.tier(1)
    vm, nic = life.vm(tier, "vm-1")
    tier.replace_acl(ALLOW)
    with vm.serve_tcp(22):
        tier.enable_static_nat(tier.associate(life.public[1]), nic)
        tier.add_port_forward(tier.associate(life.public[2]), 2222, nic, 22)
        tier.add_lb_rule(life.public[2], "ssh", 2223, 22, [nic])
        for address in (life.public[0], life.public[3], life.public[2]):
            if address is not life.vpc.source_nat:
                life.vpc.change_source_nat(address)
            for where, port in ((life.public[1], 22), (life.public[2], 2222), (life.public[2], 2223)):
                assert internet.tcp(where.ip, port).server == "vm-1", (address.ip, where.ip, port)
            told = [line for line in life.vpc.custom_action("show").split("\\n") if "(source NAT)" in line]
            assert len(told) == 1 and address.ip in told[0]


@pytest.mark.binary
def test_smoke_10_custom_actions_on_a_vpc(make_vpc: MakeVpc) -> None:
    life = make_vpc()
    life.vpc.implement()
    life.tier(1).implement()
    act = life.vpc.custom_action
    assert "smoke" in act("pbr-create-table", table_id="100", table_name="smoke")
    assert "smoke" in act("pbr-list-tables")
    assert "192.0.2.0/24" in act("pbr-add-route", table="smoke", route="blackhole 192.0.2.0/24")
    assert "192.0.2.0/24" in act("pbr-list-routes", table="smoke")
    assert "198.51.100.0/24" in act("pbr-add-rule", table="smoke", rule="to 198.51.100.0/24")
    assert "198.51.100.0/24" in act("pbr-list-rules", table="smoke")
    assert "198.51.100.0/24" in act("pbr-delete-rule", table="smoke", rule="to 198.51.100.0/24")
    assert "192.0.2.0/24" in act("pbr-delete-route", table="smoke", route="blackhole 192.0.2.0/24")
    assert "smoke" in act("pbr-delete-table", table_name="smoke")
