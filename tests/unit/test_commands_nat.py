"""Public addresses, static NAT and port forwards: values in, values out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from netloom.errors import BadRequest
from netloom.render.scope import render
from netloom.state import PortForward, Ports, PublicIp, Scope, StaticNat
from unit.payload_player import call, implement, play


def public(address: str, vlan: str = "vlan://101", gateway: str = "203.0.113.1", **more: Any) -> dict[str, Any]:
    return {
        "public_ip": address,
        "public_vlan": vlan,
        "public_gateway": gateway,
        "public_cidr": "203.0.113.0/24",
        "source_nat": "false",
        **more,
    }


def after(scope: Scope | None, command: str, **fields: Any) -> Scope:
    done = call(scope, command, **fields).scope
    assert done is not None
    return done


def implemented_scope() -> Scope:
    scope = implement().scope
    assert scope is not None
    return after(scope, "assign-ip", **public("203.0.113.20", source_nat="true"))


def forward(address: str, ports: str, private_ports: str = "22", **more: Any) -> dict[str, Any]:
    return {
        **public(address),
        "public_port": ports,
        "private_port": private_ports,
        "private_ip": "10.10.1.45",
        "protocol": "tcp",
        **more,
    }


def test_assign_ip_as_the_client_sends_it() -> None:
    scope = play(play(None, "020").scope, "021").scope
    assert scope is not None
    assert scope.public_ips == {
        "203.0.113.20": PublicIp(
            address="203.0.113.20",
            vlan="101",
            gateway="203.0.113.1",
            cidr="203.0.113.0/24",
            exit=1,
            source_nat=True,
            network_id="204",
        )
    }


def test_assign_ip_before_implement_is_remembered() -> None:
    scope = play(None, "021").scope
    assert scope is not None
    assert not scope.networks["204"].implemented
    implemented = play(scope, "020").scope
    assert implemented is not None
    assert implemented.networks["204"].implemented
    assert implemented.public_ips == scope.public_ips


def test_there_is_one_source_nat_address() -> None:
    scope = after(implemented_scope(), "assign-ip", **public("203.0.113.21", source_nat=True))
    assert {it.address for it in scope.public_ips.values() if it.source_nat} == {"203.0.113.21"}


# --- the former source-NAT address

MOVED = public("203.0.113.29", source_nat=True)
FORMER = "203.0.113.20"
LB = {"id": 1, "name": "a", "publicIp": FORMER, "publicPort": 81, "privatePort": 80, "protocol": "tcp"}
FW = {"id": 1, "type": "ingress", "protocol": "tcp", "portStart": 22, "publicIp": FORMER}
USES: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "static NAT": (
        ("add-static-nat", {**public(FORMER), "private_ip": "10.10.1.45"}),
        ("delete-static-nat", public(FORMER)),
    ),
    "port forward": (("add-port-forward", forward(FORMER, "22")), ("delete-port-forward", forward(FORMER, "22"))),
    "load balancing": (
        ("apply-lb-rules", {"lb_rules": [LB]}),
        ("apply-lb-rules", {"lb_rules": [{**LB, "revoke": True}]}),
    ),
    "firewall": (
        ("apply-fw-rules", {"fw_rules": {"default_egress_allow": True, "rules": [FW]}}),
        ("apply-fw-rules", {"fw_rules": {"default_egress_allow": True, "rules": []}}),
    ),
}


@pytest.mark.mutation("a-former-source-nat-address-goes")
def test_a_former_source_nat_address_goes_when_another_comes() -> None:
    scope = after(implemented_scope(), "assign-ip", **public(FORMER, source_nat=True))
    scope = after(scope, "assign-ip", **public("203.0.113.21"))  # an ordinary address waits for its first rule
    assert set(after(scope, "assign-ip", **MOVED).public_ips) == {"203.0.113.21", "203.0.113.29"}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_former_source_nat_address_goes_with_its_last_rule(use: str, when: str) -> None:
    (add, added), (delete, deleted) = USES[use]
    scope = after(implemented_scope(), "assign-ip", **public(FORMER, source_nat=True))
    scope = after(after(scope, add, **added), "assign-ip", **MOVED)
    assert set(scope.public_ips) == {FORMER, "203.0.113.29"}
    assert not scope.public_ips[FORMER].source_nat
    if when == "after":  # a rule that comes later counts, too
        other = forward(FORMER, "80")
        scope = after(after(scope, "add-port-forward", **other), delete, **deleted)
        assert FORMER in scope.public_ips
        delete, deleted = "delete-port-forward", other
    assert set(after(scope, delete, **deleted).public_ips) == {"203.0.113.29"}


def test_a_former_source_nat_address_that_a_network_gets_is_an_ordinary_one() -> None:
    scope = after(implemented_scope(), "assign-ip", **public(FORMER, source_nat=True))
    scope = after(after(scope, "add-port-forward", **forward(FORMER, "22")), "assign-ip", **MOVED)
    scope = after(scope, "assign-ip", **public(FORMER))
    scope = after(scope, "delete-port-forward", **forward(FORMER, "22"))
    assert FORMER in scope.public_ips, "its release-ip will come"
    assert FORMER not in after(scope, "release-ip", **public(FORMER)).public_ips


def test_a_source_nat_address_may_come_back() -> None:
    scope = after(implemented_scope(), "assign-ip", **public(FORMER, source_nat=True))
    scope = after(after(scope, "assign-ip", **MOVED), "assign-ip", **public(FORMER, source_nat=True))
    assert {it.address: it.source_nat for it in scope.public_ips.values()} == {FORMER: True}


@pytest.mark.mutation("a-restart-keeps-no-unused-address")
def test_a_former_source_nat_address_of_an_earlier_version_goes_at_the_restart() -> None:
    """Earlier versions did not mark it, so it looks like an ordinary address without rules."""
    scope = after(implemented_scope(), "assign-ip", **public("203.0.113.28"))
    scope = after(scope, "add-port-forward", **forward("203.0.113.21", "22"))
    rules = [{**FW, "publicIp": "203.0.113.22"}]
    scope = after(scope, "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": rules})
    assert "203.0.113.28" in scope.public_ips, "an ordinary address waits for its first rule"
    restarted = implement(scope).scope
    assert restarted is not None
    assert set(restarted.public_ips) == {"203.0.113.20", "203.0.113.21", "203.0.113.22"}


@pytest.mark.mutation("a-missing-public-field-is-named")
@pytest.mark.parametrize("missing", ["public_ip", "public_vlan", "public_cidr"])
@pytest.mark.parametrize("command", ["assign-ip", "add-static-nat"])
def test_defect_55_a_missing_public_field_is_named(missing: str, command: str) -> None:
    with pytest.raises(BadRequest, match=f"payload.{missing} is missing"):
        call(implemented_scope(), command, **{**public("203.0.113.21"), missing: ""}, private_ip="10.10.1.45")


def test_all_public_fields_missing() -> None:
    with pytest.raises(BadRequest, match=r"payload: public_ip, public_vlan, public_cidr are missing"):
        call(implemented_scope(), "assign-ip")
    scope = implemented_scope()
    for command in ("release-ip", "delete-static-nat", "delete-port-forward"):
        assert call(scope, command).scope == scope


def test_an_address_without_a_gateway() -> None:
    scope = after(implemented_scope(), "assign-ip", **public("203.0.113.21", gateway=""))
    assert (scope.public_ips["203.0.113.21"].gateway, scope.public_ips["203.0.113.21"].exit) == ("", 2)


@pytest.mark.parametrize("field", ["public_ip", "public_gateway"])
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.2", "224.0.0.5", "255.255.255.255"])
def test_an_address_that_no_machine_has_is_refused(field: str, address: str) -> None:
    with pytest.raises(BadRequest, match=rf"payload\.{field}: '{address}' is not the address of a machine"):
        call(implemented_scope(), "assign-ip", **{**public("203.0.113.21"), field: address})


def test_an_address_that_could_not_be_routed_is_refused_before_anything_is_touched() -> None:
    with pytest.raises(BadRequest, match=r"payload\.public_gateway: 203\.0\.113\.1 is a public address of the guests'"):
        call(None, "assign-ip", **public("203.0.113.1"))
    with pytest.raises(
        BadRequest, match=r"payload\.public_ip: 203\.0\.113\.1 is the gateway of another public address"
    ):
        call(implemented_scope(), "assign-ip", **public("203.0.113.1", gateway="203.0.113.9"))
    with pytest.raises(
        BadRequest, match=r"payload\.public_gateway: 203\.0\.113\.20 is a public address of the guests'"
    ):
        call(implemented_scope(), "assign-ip", **public("203.0.113.21", gateway="203.0.113.20"))
    with pytest.raises(BadRequest, match=r"payload\.public_cidr: no public VLAN has the subnet 0\.0\.0\.0/0"):
        call(implemented_scope(), "assign-ip", **{**public("203.0.113.21"), "public_cidr": "0.0.0.0/0"})


@pytest.mark.parametrize("vlan", ["5001", "101-i201"])
def test_a_public_vlan_is_a_tag(vlan: str) -> None:
    with pytest.raises(BadRequest, match=r"payload\.public_vlan: .* is not a VLAN tag"):
        call(implemented_scope(), "assign-ip", **public("203.0.113.21", vlan))


@pytest.mark.mutation("an-exit-has-one-vlan-and-gateway", instead="assigned.vlan == vlan")
def test_defect_32_each_way_out_keeps_its_number() -> None:
    scope = implemented_scope()
    for address, vlan, gateway in (
        ("203.0.113.21", "101", "203.0.113.1"),
        ("203.0.113.22", "102", "203.0.113.1"),
        ("203.0.113.23", "untagged", "203.0.113.1"),
        ("203.0.113.24", "102", "203.0.113.2"),
    ):
        scope = after(scope, "assign-ip", **public(address, vlan, gateway))
    assert [it.exit for it in scope.public_ips.values()] == [1, 1, 2, 3, 4]
    scope = after(scope, "release-ip", **public("203.0.113.22"))
    assert [it.exit for it in scope.public_ips.values()] == [1, 1, 3, 4]
    scope = after(scope, "assign-ip", **public("203.0.113.25", "untagged", "203.0.113.9"))
    assert scope.public_ips["203.0.113.25"].exit == 2
    scope = after(scope, "release-ip", **public("203.0.113.20"))
    assert scope.public_ips["203.0.113.21"].exit == 1


def test_an_address_that_moves_to_another_vlan_frees_its_number_first() -> None:
    scope = after(implemented_scope(), "assign-ip", **public("203.0.113.20", "102", source_nat="true"))
    assert (scope.public_ips["203.0.113.20"].vlan, scope.public_ips["203.0.113.20"].exit) == ("102", 1)


def test_what_is_kept_can_be_written_down() -> None:
    scope: Scope | None = None
    for name in ("020", "021", "070", "050", "054", "057", "058"):
        scope = play(scope, name).scope
    assert msgspec.json.decode(msgspec.json.encode(scope), type=Scope) == scope


@pytest.mark.mutation("release-ip-is-no-prefix-match", instead="not it.public_ip.startswith(address)")
def test_defect_33_release_ip_is_not_a_prefix_match() -> None:
    scope = implemented_scope()
    for address in ("203.0.113.2", "203.0.113.21"):
        scope = after(scope, "add-port-forward", **forward(address, "22"))
    scope = after(scope, "release-ip", **public("203.0.113.2"))
    assert set(scope.public_ips) == {"203.0.113.20", "203.0.113.21"}
    assert set(scope.port_forwards) == {"203.0.113.21/tcp/22"}


@pytest.mark.mutation("release-ip-ends-static-nat")
def test_defect_34_release_ip_takes_what_the_address_was_translated_to_and_nothing_else() -> None:
    before = implemented_scope()
    scope = after(before, "add-static-nat", **public("203.0.113.21"), private_ip="10.10.1.45")
    scope = after(scope, "add-port-forward", **forward("203.0.113.21", "80"))
    scope = after(scope, "release-ip", **public("203.0.113.21"))
    assert (scope.static_nats, scope.port_forwards) == ({}, {})
    assert scope.public_ips == before.public_ips
    assert scope.public_ips["203.0.113.20"].source_nat


def test_rules_of_an_address_that_never_came_bring_it() -> None:
    scope = after(
        implemented_scope(), "add-static-nat", **public("203.0.113.22", source_nat=True), private_ip="10.10.1.45"
    )
    assert scope.static_nats == {
        "203.0.113.22": StaticNat(public_ip="203.0.113.22", private_ip="10.10.1.45", network_id="204")
    }
    assert not scope.public_ips["203.0.113.22"].source_nat
    assert scope.public_ips["203.0.113.20"].source_nat


def test_a_rule_does_not_take_the_source_nat_from_its_address() -> None:
    scope = play(play(play(None, "020").scope, "021").scope, "055").scope
    assert scope is not None
    assert scope.public_ips["203.0.113.20"].source_nat
    assert {it.public_ip for it in scope.port_forwards.values()} == {"203.0.113.20"}


def test_a_guest_has_one_static_nat_address() -> None:
    scope = after(implemented_scope(), "add-static-nat", **public("203.0.113.21"), private_ip="10.10.1.45")
    scope = after(scope, "add-static-nat", **public("203.0.113.22"), private_ip="10.10.1.45")
    assert set(scope.static_nats) == {"203.0.113.22"}


@pytest.mark.mutation("a-range-is-forwarded-whole", instead="Ports(ports.first, ports.first)")
@pytest.mark.parametrize("sent", ["8080-8090", "8080:8090"])
def test_defect_29_a_range_is_forwarded(sent: str) -> None:
    scope = after(implemented_scope(), "add-port-forward", **forward("203.0.113.20", sent, sent))
    assert scope.port_forwards == {
        "203.0.113.20/tcp/8080-8090": PortForward(
            public_ip="203.0.113.20",
            protocol="tcp",
            public_ports=Ports(8080, 8090),
            private_ip="10.10.1.45",
            private_ports=Ports(8080, 8090),
            network_id="204",
        )
    }
    assert after(scope, "delete-port-forward", **forward("203.0.113.20", "8080-8090")).port_forwards == {}


def test_a_range_may_lead_to_one_port_and_not_to_two() -> None:
    scope = after(implemented_scope(), "add-port-forward", **forward("203.0.113.20", "8080-8090", "80"))
    assert scope.port_forwards["203.0.113.20/tcp/8080-8090"].private_ports == Ports(80, 80)
    with pytest.raises(BadRequest, match=r"payload\.private_port: 80-81 is neither one port nor as many as 9000-9002"):
        call(scope, "add-port-forward", **forward("203.0.113.20", "9000-9002", "80-81"))


def test_the_same_ports_with_another_target_lead_there() -> None:
    scope = after(implemented_scope(), "add-port-forward", **forward("203.0.113.20", "22"))
    scope = after(scope, "add-port-forward", **forward("203.0.113.20", "22", private_ip="10.10.1.46"))
    assert [it.private_ip for it in scope.port_forwards.values()] == ["10.10.1.46"]


@pytest.mark.parametrize("ports", ["8090-8100", "8080", "8000-9000", "8085-8086"])
def test_ports_that_overlap_are_refused_and_both_named(ports: str) -> None:
    scope = after(implemented_scope(), "add-port-forward", **forward("203.0.113.20", "8080-8090", "8080-8090"))
    with pytest.raises(BadRequest, match=rf"203\.0\.113\.20/tcp/{ports} overlaps 203\.0\.113\.20/tcp/8080-8090"):
        call(scope, "add-port-forward", **forward("203.0.113.20", ports, "80"))
    for other in ({"protocol": "udp"}, {"public_ip": "203.0.113.21"}):
        assert len(after(scope, "add-port-forward", **forward("203.0.113.20", ports, "80", **other)).port_forwards) == 2


@pytest.mark.parametrize("command", ["add-static-nat", "add-port-forward"])
@pytest.mark.parametrize("scope", [None, "implemented"])
def test_a_guest_is_in_its_network(command: str, scope: str | None) -> None:
    fields = {**forward("203.0.113.20", "22", private_ip="10.10.2.45"), "cidr": "10.10.1.0/24"}
    with pytest.raises(BadRequest, match=r"payload\.private_ip: 10\.10\.2\.45 is not in the network's 10\.10\.1\.0/24"):
        call(implemented_scope() if scope else None, command, **fields)


@pytest.mark.parametrize("command", ["add-static-nat", "add-port-forward"])
def test_a_guest_beside_an_ip_reservation_shows_a_larger_subnet(command: str) -> None:
    """A secondary address, after a failover: no NIC has shown the whole subnet yet."""
    part: dict[str, Any] = {"cidr": "10.10.1.64/26", "gateway": "10.10.1.1"}
    before = implement(None, **part, extension_ip="10.10.1.1").scope
    assert before is not None and before.networks["204"].cidr == "10.10.1.0/25"
    fields = {**forward("203.0.113.20", "22", private_ip="10.10.1.200"), **part}
    assert after(before, command, **fields).networks["204"].cidr == "10.10.1.0/24"
    nic = {"nic_id": "5101", "ip": "10.10.1.70", "mac": "02:01:00:cc:00:09", "netmask": "255.255.255.128"}
    known = after(before, "prepare-nic", **part, **nic)
    taken = replace(before, networks=before.networks | {"205": replace(before.networks["204"], network_id="205",
                                                                       cidr="10.10.1.192/26")})  # fmt: skip
    for scope, address in ((known, "10.10.1.200"), (taken, "10.10.1.200"), (before, "11.10.1.45")):
        with pytest.raises(BadRequest, match=r"payload\.private_ip: "):
            call(scope, command, **(fields | {"private_ip": address}))


@pytest.mark.parametrize("name", ["056", "059", "060", "121", "124", "125"])
def test_a_delete_of_what_never_was_changes_and_builds_nothing(name: str) -> None:
    assert play(None, name).scope is None
    scope = implement().scope
    assert scope is not None
    registration_as_sent = play(scope, name).scope
    assert registration_as_sent == scope


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("public_port", it) for it in ("65536", "80-", "", "-1", "90-80")),
        *(("private_port", it) for it in ("70000", "-1")),
        *(("protocol", it) for it in ("icmp", "", "tcp,udp", "sctp")),
        ("private_ip", "10.10.1.256"),
        ("public_ip", "127.0.0.1"),
    ],
)
def test_a_deletion_succeeds_for_values_that_an_addition_refuses(field: str, value: str) -> None:
    """Otherwise CloudStack could never remove the forward that it stored before it asked us."""
    scope = implemented_scope()
    wrong = {**forward("203.0.113.20", "22"), field: value}
    with pytest.raises(BadRequest, match=rf"payload\.{field}"):
        call(scope, "add-port-forward", **wrong)
    assert call(scope, "delete-port-forward", **wrong).scope == scope


def test_port_0_is_a_port() -> None:
    scope = call(implemented_scope(), "add-port-forward", **forward("203.0.113.20", "0-65535")).scope
    assert scope is not None
    (made,) = scope.port_forwards.values()
    assert made.public_ports == Ports(0, 65535)
    after = call(scope, "delete-port-forward", **forward("203.0.113.20", "0-65535")).scope
    assert after is not None
    assert after.port_forwards == {}


def test_a_deletion_for_another_guest_keeps_the_newer_forward() -> None:
    first = call(implemented_scope(), "add-port-forward", **forward("203.0.113.20", "80", private_ip="10.10.1.5")).scope
    newer = forward("203.0.113.20", "80", private_ip="10.10.1.6")
    second = call(first, "add-port-forward", **newer).scope
    assert call(second, "delete-port-forward", **{**newer, "private_ip": "10.10.1.5"}).scope == second
    gone = call(second, "delete-port-forward", **newer).scope
    assert gone is not None
    assert gone.port_forwards == {}


def test_a_public_vxlan_is_a_segment_of_its_own() -> None:
    fields = {**public("203.0.113.21"), "public_vlan": "vxlan://1000"}
    scope = after(implemented_scope(), "assign-ip", **fields)
    assert scope.public_ips["203.0.113.21"].vlan == "vx1000"
    want = render(replace(scope, networks={"204": replace(scope.networks["204"], implemented=True)}))
    port = next(it for it in want.ports if it.link == "pub-vx1000")
    assert (port.segment.kind, port.segment.vlan, port.segment.bridge) == ("vxlan", "1000", "brvx-1000")
    assert port.host_link == "vnetxn204.1000"


@pytest.mark.parametrize("vlan", ["lswitch://7", "vs://7", "pvlan://1412-i2412", "4095", "vxlan://0"])
def test_a_public_segment_that_cannot_be_made_is_refused(vlan: str) -> None:
    with pytest.raises(BadRequest, match=r"payload\.public_vlan: "):
        call(implemented_scope(), "assign-ip", **{**public("203.0.113.21"), "public_vlan": vlan})
