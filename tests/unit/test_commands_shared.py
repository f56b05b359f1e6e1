"""Shared and L2 networks, and first contact: which call builds what, and which builds nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from netloom.errors import BadRequest
from netloom.render.guest import tables
from netloom.render.scope import render
from netloom.state import Network, Scope, Subnet
from unit.payload_player import OURS, call, play

SH_1, SH_2 = "6b7c2a10-0000-4000-8000-000000007101", "6b7c2a10-0000-4000-8000-000000007102"
PLAIN: dict[str, Any] = {
    "network_id": "410",
    "vlan": "1410",
    "guest_type": "shared",
    "network_state": "setup",
    "gateway": "10.30.0.1",
    "cidr": "10.30.0.0/24",
    "extension_ip": "10.30.0.5",
}
NIC: dict[str, Any] = {"nic_uuid": SH_1, "mac": "1e:00:aa:00:00:11", "ip": "10.30.0.61", "netmask": "255.255.255.0"}


def played(*names: str) -> Scope | None:
    scope = None
    for name in names:
        scope = play(scope, name).scope
    return scope


def shared(*names: str) -> Network:
    scope = played(*names)
    assert scope is not None
    return scope.networks["410"]


@pytest.mark.parametrize("first", ["301", "302", "303", "304", "305", "306", "307", "308", "314", "315"])
def test_a_plain_shared_network_is_built_by_whatever_comes_first(first: str) -> None:
    network = shared(first)
    assert network.is_active
    assert (network.vlan, network.cidr, network.extension_ip) == ("1410", "10.30.0.0/24", "10.30.0.5")
    assert render(played(first)).namespace == "cs-net-410"


@pytest.mark.parametrize("first", ["309", "310", "311", "312", "313", "316"])
def test_nothing_is_built_to_remove_something(first: str) -> None:
    assert played(first) is None


@pytest.mark.parametrize("state", ["shutdown", "allocated", "destroy", "implementing", ""])
def test_a_network_that_is_not_in_use_is_not_built(state: str) -> None:
    scope = call(None, "prepare-nic", scope_id="net-410", **{**PLAIN, **NIC, "network_state": state}).scope
    assert scope is None or not scope.networks["410"].implemented


def test_the_second_range_is_learnt_from_its_first_nic() -> None:
    network = shared("301", "307", "308")
    assert network.ranges == (Subnet("10.30.0.0/24", "10.30.0.1"), Subnet("10.31.0.0/25", "10.31.0.1"))
    assert shared("307", "301") == shared("301", "307")


def test_ranges_that_come_as_lists() -> None:
    lists = {"gateway": "10.31.0.1,10.30.0.1", "cidr": "10.31.0.0/25,10.30.0.0/24"}
    scope = call(None, "config-dhcp-subnet", scope_id="net-410", **{**PLAIN, **lists}).scope
    assert scope is not None
    assert scope.networks["410"].ranges == shared("307", "301").ranges


def test_a_range_that_was_split_is_two_from_the_first_call_on() -> None:
    """The call names one part, and its NIC is in the other, which the former range held too."""
    wide = call(None, "prepare-nic", scope_id="net-410", **{**PLAIN, **NIC, "cidr": "10.30.0.0/15"}).scope
    once = play(wide, "308").scope
    assert once is not None
    assert [it.cidr for it in once.networks["410"].ranges] == ["10.30.0.0/24", "10.31.0.0/25"]
    assert play(once, "308").scope == once


def test_each_nic_has_the_mask_and_the_router_of_its_own_range() -> None:
    (table,) = tables(played("301", "303", "308") or Scope(scope_id="", owner=""))
    assert [(it.ip, it.prefix_len, it.gateway, it.dhcp) for it in table.nics] == [
        ("10.30.0.61", 24, "10.30.0.1", True),
        ("10.31.0.9", 25, "10.31.0.1", True),
    ]
    # The way to the device itself is direct (RFC 3442: a router of 0.0.0.0), and then all else has to be said, too.
    assert table.nics[0].options == {}
    assert table.nics[1].options == {121: b"\x20\x0a\x1e\x00\x05\0\0\0\0" + b"\x00\x0a\x1f\x00\x01"}


def test_a_nic_restored_without_mask_has_that_of_its_range_or_no_lease() -> None:
    known, unknown = (tables(played(*names, "315") or Scope(scope_id="", owner=""))[0] for names in (["307"], []))
    assert [(it.ip, it.prefix_len, it.gateway, it.dhcp) for it in known.nics][1] == ("10.31.0.9", 25, "10.31.0.1", True)
    assert [(it.ip, it.dhcp) for it in unknown.nics] == [("10.30.0.61", True), ("10.31.0.9", False)]
    # It is reached all the same: its metadata is served while its lease lasts.
    assert "10.31.0.9/32" in {it.destination for it in render(played("315")).routes}


@pytest.mark.parametrize(("removal", "service"), [("312", "dns"), ("309", "dns"), ("313", "dhcp")])
def test_the_end_of_one_range_leaves_the_others_served(removal: str, service: str) -> None:
    both = ("303", "305", "308")
    assert getattr(shared(*both, removal), service)
    assert getattr(shared(*both, "311", removal), service)
    assert not getattr(shared("303", "305", "311", removal), service)


def test_a_vm_that_is_gone_takes_all_it_had_with_it() -> None:
    before = shared("301", "303", "305", "306")
    assert before.nics[SH_1].metadata["local-hostname"] == "sh-1"
    assert shared("301", "303", "305", "306", "310") == before
    assert shared("301", "303", "305", "306", "311").nics == {}


def test_a_restart_changes_nothing_that_is_right() -> None:
    before = shared("301", "302", "303", "304", "305", "306", "307", "308")
    after = shared("301", "302", "303", "304", "305", "306", "307", "308", "314", "315")
    assert (after.ranges, after.device_ip, after.nics.keys()) == (before.ranges, before.device_ip, before.nics.keys())
    assert played("301", "306", "315", "316") is None


def test_an_untagged_shared_network() -> None:
    (port,) = render(played("317")).ports
    assert (port.segment.vlan, port.segment.nic) == ("untagged", "eth1")


@pytest.mark.parametrize("vlan", ["1412-i2412", "pvlan://1412-c2412", "1412-p1412"])
def test_a_private_vlan_is_refused_with_the_remedy(vlan: str) -> None:
    with pytest.raises(BadRequest, match=r"private VLAN, which a Linux bridge cannot carry.*plain VLAN 1412"):
        call(None, "prepare-nic", scope_id="net-410", **{**PLAIN, **NIC, "vlan": vlan})
    with pytest.raises(BadRequest, match="private VLAN"):
        play(None, "318")


@pytest.mark.parametrize("name", ["320", "409"])
def test_without_an_address_of_the_device_the_network_is_not_active(name: str) -> None:
    scope = play(None, name).scope
    assert scope is not None
    (network,) = scope.networks.values()
    assert len(network.nics) == 1
    assert render(scope).namespace == ""
    assert tables(scope) == ()


def test_the_routers_address_on_a_shared_network_is_never_ours_to_take() -> None:
    scope = call(None, "implement-network", scope_id="net-410", **{**PLAIN, "extension_ip": ""}).scope
    assert render(scope).namespace == ""


def test_a_device_outside_of_the_network_is_refused() -> None:
    with pytest.raises(
        BadRequest, match=r"payload\.extension_ip: 10\.99\.0\.5 is not in the network's 10\.30\.0\.0/24"
    ):
        call(None, "prepare-nic", scope_id="net-410", **{**PLAIN, **NIC, "extension_ip": "10.99.0.5"})
    with pytest.raises(BadRequest, match=r"payload\.extension_ip: 10\.99\.0\.5"):
        call(
            played("301"),
            "save-password",
            scope_id="net-410",
            **{**PLAIN, **NIC, "extension_ip": "10.99.0.5"},
            password="x",
        )


def test_the_device_of_a_plain_network_forwards_and_translates_nothing() -> None:
    want = render(played("301", "308"))
    assert want.sysctls["net.ipv4.ip_forward"] == "0"
    assert [it.destination for it in want.routes] == ["10.31.0.0/25", "0.0.0.0/0"]
    assert want.ruleset is not None
    assert {it.name: it.rules for it in want.ruleset.chains}["through"] == ()
    assert {it.kind for it in want.ruleset.sets} == {"set"}  # no map, so nothing is translated


def test_a_shared_network_whose_gateway_is_the_device_lives_as_an_isolated_one() -> None:
    fields: dict[str, Any] = {**PLAIN, "extension_ip": "10.30.0.1", "network_state": "implementing"}
    want = render(call(None, "implement-network", scope_id="net-410", **fields).scope)
    assert want.ruleset is not None
    assert "egress_410" in {it.name for it in want.ruleset.chains}
    assert want.sysctls["net.ipv4.ip_forward"] == "1"


# ---- isolated networks


def test_a_provider_without_source_nat() -> None:
    plain, gateway = render(played("140")), render(played("141"))
    assert [it.cidr for it in plain.addresses] == ["10.11.1.7/24"]
    assert [it.via for it in plain.routes] == ["10.11.1.1"]
    assert plain.sysctls["net.ipv4.ip_forward"] == "0"
    assert [it.cidr for it in gateway.addresses] == ["10.12.1.1/24"]


def test_after_a_failover_the_first_call_about_a_vm_builds_the_network() -> None:
    scope = play(None, "139").scope
    assert scope is not None
    network = scope.networks["204"]
    assert network.is_active
    assert msgspec.structs.replace(network, nics={}) == play(None, "020").scope.networks["204"]  # type: ignore[union-attr]


USED: dict[str, Any] = {"vlan": "1204", "gateway": "10.10.1.1", "cidr": "10.10.1.0/24", "network_state": "implemented"}
PUBLIC: dict[str, Any] = {"public_ip": "203.0.113.20", "public_vlan": "101", "public_cidr": "203.0.113.0/24"}
RULES: list[tuple[str, dict[str, Any]]] = [
    (
        "add-port-forward",
        {**PUBLIC, "public_port": "22", "private_port": "22", "private_ip": "10.10.1.4", "protocol": "tcp"},
    ),
    ("add-static-nat", {**PUBLIC, "private_ip": "10.10.1.4"}),
    ("apply-fw-rules", {"fw_rules": {"default_egress_allow": True, "rules": []}}),
    ("apply-lb-rules", {"lb_rules": [{"id": 1, "publicIp": "203.0.113.20", "publicPort": 80}]}),
    ("assign-ip", {**PUBLIC, "source_nat": "false"}),
]


@pytest.mark.parametrize(("command", "fields"), RULES, ids=lambda it: it if isinstance(it, str) else "")
def test_a_rule_builds_only_where_the_device_is_surely_the_gateway(command: str, fields: dict[str, Any]) -> None:
    alone = call(None, command, **USED, **fields).scope
    assert alone is not None
    assert not alone.networks["204"].implemented
    source: dict[str, Any] = {**PUBLIC, "public_ip": "203.0.113.2", "source_nat": "true"}
    behind = call(
        call(None, "assign-ip", **source, **{**USED, "network_state": "implementing"}).scope, command, **USED, **fields
    )
    assert behind.scope is not None
    assert behind.scope.networks["204"].is_active
    assert render(behind.scope).addresses[0].cidr == "10.10.1.1/24"


def test_what_was_remembered_of_an_earlier_life_gives_way() -> None:
    before = call(None, "apply-fw-rules", **USED, fw_rules={"default_egress_allow": True, "rules": []}).scope
    nic: dict[str, Any] = {"mac": "02:01:00:cc:00:03", "extension_ip": "10.10.1.1"}
    scope = call(before, "prepare-nic", **{**USED, "vlan": "1377"}, **nic).scope
    assert scope is not None
    assert (scope.networks["204"].vlan, scope.networks["204"].implemented) == ("1377", True)


def test_a_vxlan_id_needs_its_detail() -> None:
    with pytest.raises(BadRequest, match=r"5001 is not a VLAN tag.*guest\.isolation=vxlan"):
        call(None, "prepare-nic", scope_id="net-410", **{**PLAIN, **NIC, "vlan": "5001"})
    vxlan = msgspec.structs.replace(OURS, isolation="vxlan")
    scope = call(None, "prepare-nic", vxlan, "net-410", **{**PLAIN, **NIC, "vlan": "16777215"}).scope
    assert scope is not None
    assert scope.networks["410"].is_active
