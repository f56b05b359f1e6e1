"""A network begins and ends: values in, values out."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from netloom.commands import Transitioned
from netloom.commands.network import broadcast_domain
from netloom.errors import BadRequest, ForeignScope
from netloom.guestwire import GuestNic
from netloom.render.guest import tables
from netloom.render.scope import render
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
        ({"gateway": "172.16.1.1"}, r"payload\.gateway: 172\.16\.1\.1 is not in the network's 10\.10\.1\.0/24"),
        ({"extension_ip": "172.16.1.1"}, r"payload\.extension_ip: 172\.16\.1\.1 is not in"),
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
        ("vlan", "vx1204", '{"network.broadcast_domain_type":"Vxlan","network.broadcast_uri":"vxlan://1204"}'),
        ("vxlan", "untagged", '{"network.broadcast_domain_type":"Vlan","network.broadcast_uri":"vlan://untagged"}'),
        ("vxlan", "1204", '{"network.broadcast_domain_type":"Vxlan","network.broadcast_uri":"vxlan://1204"}'),
        ("", "1204", ""),
    ],
)
def test_the_tag_is_printed_when_the_registration_asks(broadcast: str, vlan: str, output: str) -> None:
    assert broadcast_domain(vlan, broadcast) == output
    assert broadcast_domain("", broadcast) == ""


@pytest.mark.mutation("a-vlan-is-not-read-as-a-vxlan")
@pytest.mark.parametrize(
    ("isolation", "sent", "segment"),
    [
        ("vlan", "1204", "VLAN 1204"),
        ("vlan", "vlan://1204", "VLAN 1204"),
        ("vlan", "VLAN://untagged", "VLAN untagged"),
        ("vlan", "vxlan://1204", ""),
        ("vlan", "vxlan://5000", ""),
        ("vlan", "5000", ""),
        ("vlan", "vlan://5000", ""),
        ("vxlan", "1204", "VXLAN 1204"),
        ("vxlan", "5000", "VXLAN 5000"),
        ("vxlan", "vxlan://1204", "VXLAN 1204"),
        ("vxlan", "vlan://1204", ""),
        ("vxlan", "vlan://5000", ""),
        ("vxlan", "vlan://untagged", "VLAN untagged"),
        *((isolation, f"{scheme}://7", "") for isolation in ("vlan", "vxlan") for scheme in ("lswitch", "vs", "gre")),
    ],
)
def test_the_scheme_of_a_guest_segment_is_carried_out_or_refused(isolation: str, sent: str, segment: str) -> None:
    registration = msgspec.structs.replace(OURS, isolation=isolation)
    if not segment:
        with pytest.raises(BadRequest, match=r"payload\.vlan: "):
            implement(None, registration, vlan=sent)
        return
    made = implement(None, registration, vlan=sent).scope
    assert made is not None
    (port,) = (it for it in render(made).ports if it.link == "gst-204")
    kind = "VXLAN" if port.segment.kind == "vxlan" else "VLAN"
    assert f"{kind} {port.segment.vlan}" == segment


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
                        "source_nat": not net,
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


# --- IP reservation: ``cidr`` is a part of the subnet (docs/protocol.md, section 2)

RESERVED: dict[str, Any] = {"gateway": "10.70.1.1", "extension_ip": "10.70.1.1", "cidr": "10.70.1.64/26"}
NIC: dict[str, Any] = {
    "nic_id": "1",
    "nic_uuid": "u-1",
    "mac": "02:01:00:cc:70:03",
    "ip": "10.70.1.70",
    "netmask": "255.255.255.0",
}


@pytest.mark.parametrize(
    ("cidr", "gateway", "subnet"),
    [
        ("10.70.1.64/26", "10.70.1.1", "10.70.1.0/25"),
        ("10.70.1.0/25", "10.70.1.1", "10.70.1.0/25"),
        ("10.70.1.0/25", "10.70.1.254", "10.70.1.0/24"),
        ("10.70.1.32/27", "10.70.1.63", "10.70.1.0/25"),  # 10.70.1.63 is the last address of 10.70.1.0/26
        ("10.70.1.96/27", "10.70.1.64", "10.70.1.0/25"),  # 10.70.1.64 is the first address of 10.70.1.64/26
        ("10.200.1.0/24", "10.0.0.1", "10.0.0.0/8"),
        ("10.70.1.0/31", "10.70.1.0", "10.70.1.0/31"),
    ],
)
def test_the_first_guess_of_a_reserved_subnet_has_its_gateway(cidr: str, gateway: str, subnet: str) -> None:
    guessed = implement(gateway=gateway, extension_ip=gateway, cidr=cidr)
    assert (network(guessed).cidr, network(guessed).device_ip) == (subnet, gateway)
    assert network(call(guessed.scope, "assign-ip", **RESERVED_PUBLIC)).cidr == subnet


RESERVED_PUBLIC: dict[str, Any] = {
    "public_ip": "203.0.113.70",
    "public_vlan": "vlan://101",
    "public_cidr": "203.0.113.0/24",
}


@pytest.mark.mutation("a-netmask-is-the-whole-subnet", instead="str(smallest)")
@pytest.mark.parametrize("command", ["prepare-nic", "add-dhcp-entry", "config-dhcp-subnet", "add-dns-entry"])
@pytest.mark.parametrize("cidr", ["10.70.1.64/26", "10.70.1.0/25"])
def test_the_netmask_of_a_nic_shows_the_whole_subnet_and_a_restart_keeps_it(command: str, cidr: str) -> None:
    fields = {**RESERVED, "cidr": cidr}
    told = call(implement(**fields).scope, command, **fields, **NIC)
    assert network(told).cidr == "10.70.1.0/24"
    assert network(implement(told.scope, **fields)).cidr == "10.70.1.0/24"
    first = call(None, command, network_state="implemented", vlan="1700", **fields, **NIC)  # on another host
    assert (network(first).cidr, network(first).is_active) == ("10.70.1.0/24", True)


def test_a_reservation_on_a_living_network_changes_nothing() -> None:
    full = {**RESERVED, "cidr": "10.70.1.0/24"}
    living = implement(**full)
    assert implement(living.scope, **RESERVED).scope == living.scope
    assert network(call(living.scope, "prepare-nic", **RESERVED, **NIC)).cidr == "10.70.1.0/24"


@pytest.mark.parametrize("command", ["implement-network", "assign-ip", "apply-fw-rules"])
def test_a_reservation_that_is_taken_back_lets_the_subnet_grow(command: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "implement-network": {"vlan": "1204"},
        "assign-ip": RESERVED_PUBLIC,
        "apply-fw-rules": {"fw_rules": {"default_egress_allow": True, "rules": []}},
    }
    grown = call(implement(**RESERVED).scope, command, **{**RESERVED, "cidr": "10.70.1.0/24"}, **more[command])
    assert network(grown).cidr == "10.70.1.0/24"


def test_another_subnet_replaces_the_known_one() -> None:
    moved = implement(implement(**RESERVED).scope, gateway="10.80.1.1", extension_ip="10.80.1.1", cidr="10.80.1.0/24")
    assert network(moved).cidr == "10.80.1.0/24"


@pytest.mark.parametrize("netmask", ["0.0.0.0", "254.0.0.0", "255.255.255.224"])
def test_a_netmask_that_cannot_be_the_subnets_changes_nothing(netmask: str) -> None:
    told = call(implement(**RESERVED).scope, "prepare-nic", **RESERVED, **{**NIC, "netmask": netmask})
    assert network(told).cidr == "10.70.1.0/25"


def test_a_nic_of_an_older_state_shows_the_whole_subnet() -> None:
    """An older version stored the part of the subnet as the network's, and the netmask with the NIC."""
    fields = {**RESERVED, "cidr": "10.70.1.0/25"}
    told = call(implement(**fields).scope, "prepare-nic", **fields, **NIC).scope
    assert told is not None
    older = replace(told, networks={"204": replace(told.networks["204"], cidr="10.70.1.0/25")})
    assert network(call(older, "assign-ip", **fields, **RESERVED_PUBLIC)).cidr == "10.70.1.0/24"
    assert network(implement(older, **fields)).cidr == "10.70.1.0/24"


def test_a_lease_of_a_reserved_network_has_the_netmask_of_the_whole_subnet() -> None:
    restored = {"dhcp_enabled": True, "vms": [{"ip": "10.70.1.70", "mac": NIC["mac"], "nic_uuid": "u-1"}]}
    guessed = call(implement(**RESERVED).scope, "restore-network", **RESERVED, restore_data=restored)
    assert [(it.prefix_len, it.gateway) for it in leases(guessed)] == [(25, "10.70.1.1")]
    other = {**NIC, "nic_id": "2", "nic_uuid": "u-2", "mac": "02:01:00:cc:70:04", "ip": "10.70.1.71"}
    told = call(guessed.scope, "add-dhcp-entry", **RESERVED, **other)
    assert [(it.prefix_len, it.gateway) for it in leases(told)] == [(24, "10.70.1.1")] * 2
    # The netmask of the reservation, as a provider of an external kind would get it, does not cut the VM off.
    short = call(told.scope, "add-dhcp-entry", **RESERVED, **{**other, "netmask": "255.255.255.192"})
    assert [(it.prefix_len, it.gateway) for it in leases(short)] == [(24, "10.70.1.1")] * 2


def leases(outcome: Transitioned) -> list[GuestNic]:
    assert outcome.scope is not None
    (table,) = tables(outcome.scope)
    return [it for it in table.nics if it.dhcp]


@pytest.mark.mutation("a-prefix-can-be-advertised")
@pytest.mark.parametrize("cidr", ["2001:db8:50::/48", "2001:db8:50:1::/65", "::/0"])
def test_an_ipv6_prefix_that_cannot_be_advertised_is_refused(cidr: str) -> None:
    """dnsmasq would not start with it. CloudStack accepts prefixes of 64 bits alone."""
    with pytest.raises(BadRequest, match=r"network_ip6_cidr: \S+ is not a prefix of 64 bits"):
        implement(network_ip6_cidr=cidr)
