"""A network begins and ends: values in, values out."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from netloom.commands import Transitioned
from netloom.commands.network import broadcast_domain
from netloom.errors import BadRequest, ForeignScope
from netloom.state import Balancing, Network, Scope, Uplinks
from netloom.wire import Registration
from unit.payload_player import OURS, call, implement, network, play


def test_implement_network_as_the_client_sends_it() -> None:
    done = play(None, "020")
    assert done == Transitioned(
        scope=Scope(
            scope_id="net-204",
            owner="zone-a",
            revision=1,
            uplinks=Uplinks(guest="eth1", public="eth2"),
            networks={
                "204": Network(
                    network_id="204",
                    implemented=True,
                    vlan="1204",
                    cidr="10.10.1.0/24",
                    gateway="10.10.1.1",
                    extension_ip="10.10.1.1",
                )
            },
        ),
        output="",
    )


def test_implement_network_twice_changes_nothing() -> None:
    once = play(None, "020")
    assert play(once.scope, "020") == once


def test_restart_with_cleanup_keeps_all_that_the_network_has() -> None:
    scope = None
    for name in ("020", "021", "070", "050", "053", "057", "058"):
        scope = play(scope, name).scope
    assert play(scope, "137").scope == scope


def test_firewall_absent_opens_ingress() -> None:
    done = play(None, "020", msgspec.structs.replace(OURS, ingress_open=True))
    assert done.scope is not None
    assert done.scope.ingress_open


@pytest.mark.mutation("a-network-has-a-vlan")
def test_defect_43_an_empty_vlan_names_its_cause() -> None:
    with pytest.raises(BadRequest, match=r"payload\.vlan is empty.*network\.isolation\.method.*14077"):
        implement(vlan="")


def test_an_empty_vlan_means_the_one_that_is_known() -> None:
    assert network(implement(implement().scope, vlan="")).vlan == "1204"
    remembered = call(None, "delete-static-nat", public_ip="203.0.113.5").scope
    assert remembered is None
    told_before = call(None, "apply-fw-rules", vlan="1204", fw_rules={"default_egress_allow": True, "rules": []}).scope
    assert network(implement(told_before, vlan="")).vlan == "1204"


def test_another_tag_may_come_on_a_living_network() -> None:
    again = implement(implement().scope, vlan="vlan://1377")
    assert network(again).vlan == "1377"
    assert again.scope is not None
    assert again.scope.revision == 2


@pytest.mark.mutation("a-vlan-may-be-untagged")
def test_defect_44_an_untagged_guest_network() -> None:
    assert network(implement(vlan="vlan://untagged")).vlan == "untagged"


def test_a_network_without_an_address_of_its_own() -> None:
    done = network(implement(extension_ip=""))
    assert (done.extension_ip, done.gateway != "") == ("", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cidr": ""}, r"payload\.cidr is missing"),
        ({"gateway": ""}, r"payload\.gateway is missing"),
        ({"gateway": "10.10.2.1"}, r"payload\.gateway: 10\.10\.2\.1 is not in the network's 10\.10\.1\.0/24"),
        ({"extension_ip": "10.10.2.1"}, r"payload\.extension_ip: 10\.10\.2\.1 is not in"),
        ({"cidr": "10.10.1.0/24,10.10.2.0/24"}, r"payload\.cidr: 2 values, where a network has one"),
        ({"vlan": "5001"}, r"5001 is not a VLAN tag \(1 to 4094\).*guest\.isolation=vxlan"),
    ],
)
def test_what_an_isolated_network_needs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        implement(**fields)


@pytest.mark.parametrize(
    ("broadcast", "vlan", "output"),
    [
        ("vlan", "1204", '{"network.broadcast_domain_type":"Vlan","network.broadcast_uri":"vlan://1204"}'),
        ("vlan", "untagged", '{"network.broadcast_domain_type":"Vlan","network.broadcast_uri":"vlan://untagged"}'),
        ("vxlan", "vx1204", '{"network.broadcast_domain_type":"Vxlan","network.broadcast_uri":"vxlan://1204"}'),
        ("vxlan", "1204", '{"network.broadcast_domain_type":"Vxlan","network.broadcast_uri":"vxlan://1204"}'),
        ("", "1204", ""),
    ],
)
def test_the_tag_is_printed_when_the_registration_asks(broadcast: str, vlan: str, output: str) -> None:
    assert broadcast_domain(vlan, broadcast) == output
    assert broadcast_domain("", broadcast) == ""


@pytest.mark.parametrize("name", ["126", "127", "128", "131", "132"])
def test_an_isolated_network_ends_whole(name: str) -> None:
    scope = None
    for before in ("020", "021", "070", "053"):
        scope = play(scope, before).scope
    assert play(scope, name) == Transitioned(scope=None, output="")
    assert play(None, name) == Transitioned(scope=None, output="")


def test_second_life_knows_nothing_of_the_first() -> None:
    first = play(play(None, "020").scope, "053").scope
    second = play(play(first, "126").scope, "136")
    assert network(second).vlan == "1377"
    assert second.scope is not None
    assert second.scope.port_forwards == {}
    assert second.scope.revision == 1


def test_a_tier_takes_only_what_is_its_own() -> None:
    scope = msgspec.json.decode(
        json.dumps(
            {
                "scope_id": "vpc-7",
                "owner": "zone-a",
                "networks": {it: {"network_id": it} for it in ("310", "311")},
                "public_ips": {
                    it: {
                        "address": it,
                        "vlan": "101",
                        "gateway": "",
                        "cidr": "203.0.113.0/24",
                        "exit": 1,
                        "network_id": net,
                    }
                    for it, net in (
                        ("203.0.113.30", ""),
                        ("203.0.113.31", "310"),
                        ("203.0.113.32", "310"),
                        ("203.0.113.33", "311"),
                    )
                },
                "static_nats": {
                    it: {"public_ip": it, "private_ip": "10.20.1.5", "network_id": net}
                    for it, net in (("203.0.113.31", "310"), ("203.0.113.32", "311"))
                },
            }
        ),
        type=Scope,
    )
    registration = Registration(owner="zone-a")
    for command in ("shutdown-network", "destroy-network"):
        left = call(scope, command, registration, "vpc-7", network_id="310", vpc_id="7").scope
        assert left is not None
        assert set(left.networks) == {"311"}
        assert set(left.public_ips) == {"203.0.113.30", "203.0.113.32", "203.0.113.33"}
        assert set(left.static_nats) == {"203.0.113.32"}


def test_a_scope_of_somebody_else_is_refused_with_a_remedy() -> None:
    scope = play(None, "020").scope
    for name in ("020", "021", "126", "131", "060"):
        with pytest.raises(ForeignScope, match=r"net-204 belongs to 'zone-a', not to 'zone-b' \(.*owner"):
            play(scope, name, msgspec.structs.replace(OURS, owner="zone-b"))


def test_a_changed_registration_is_taken_over() -> None:
    scope = play(None, "020").scope
    changed = msgspec.structs.replace(OURS, public_nic="eth3", ingress_open=True, lb_idle_s=50, lb_connections_max=900)
    done = play(scope, "060", changed).scope
    assert done is not None
    assert (done.uplinks, done.ingress_open, done.revision) == (Uplinks(guest="eth1", public="eth3"), True, 2)
    assert done.balancing == Balancing(idle_s=50, connections_max=900)


def test_a_payload_about_another_scope_is_refused() -> None:
    with pytest.raises(BadRequest, match="the payload is about net-204, the call about net-205"):
        call(None, "shutdown-network", scope_id="net-205")


@pytest.mark.parametrize("command", ["assign-ip", "apply-fw-rules"])
def test_what_comes_while_a_network_goes_begins_nothing(command: str) -> None:
    rules = {"fw_rules": {"default_egress_allow": True, "rules": []}}
    public = {"public_ip": "203.0.113.20", "public_vlan": "101", "public_cidr": "203.0.113.0/24"}
    fields: dict[str, Any] = {**rules, **public}
    assert call(None, command, network_state="shutdown", **fields).scope is None
    assert call(None, command, network_state="allocated", **fields).scope is not None


@pytest.mark.mutation("port-forwards-end-with-their-tier", instead="dict(scope.port_forwards)")
def test_defect_38_nothing_of_a_tier_outlives_it_and_nothing_of_a_vpc_its_end() -> None:
    scope = None
    for name in ("202", "210", "211", "213", "230", "225", "226", "227", "228"):
        scope = play(scope, name).scope
    left = play(scope, "232").scope
    assert left is not None
    assert set(left.networks) == {"311"}
    assert (left.static_nats, left.port_forwards, left.lb_rules) == ({}, {}, {})
    assert [it.address for it in left.public_ips.values()] == ["203.0.113.30"]
    assert play(scope, "235").scope is None
