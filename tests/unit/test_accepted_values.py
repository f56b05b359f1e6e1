"""Values that CloudStack stores: each row of docs/operators/accepted-values.md, and lists with an item left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.commands import Transitioned
from netloom.errors import BadRequest
from netloom.render.acl import acl_of, egress_lines, ingress_lines
from netloom.render.describe import segment_name
from netloom.render.firewall import verdicts
from netloom.state import AclItem, FirewallRule, Ports, PublicIp, Scope
from unit.payload_player import call, implement

PAGE = Path(__file__).parents[2] / "docs" / "operators" / "accepted-values.md"
PUBLIC: dict[str, Any] = {
    "public_ip": "203.0.113.21",
    "public_vlan": "vlan://101",
    "public_gateway": "203.0.113.1",
    "public_cidr": "203.0.113.0/24",
}
TIER: dict[str, Any] = {"scope_id": "vpc-7", "vpc_id": "7"}
INGRESS = {"id": 2, "type": "ingress", "protocol": "tcp", "publicIp": "203.0.113.20", "sourceCidrs": []}
DENIED = {"id": 2, "type": "egress", "protocol": "tcp"}
ITEM = {"number": 5, "action": "allow", "trafficType": "ingress", "protocol": "tcp", "sourceCidrs": ["192.0.2.0/24"]}
BALANCED = {"id": 2, "name": "web", "publicIp": "203.0.113.20", "publicPort": 8080, "protocol": "tcp", "backends": []}
FORWARD: dict[str, Any] = {
    **PUBLIC,
    "public_port": "22",
    "private_port": "22",
    "private_ip": "10.10.1.45",
    "protocol": "tcp",
}
VM = {
    "hostname": "web",
    "ip": "10.10.1.45",
    "mac": "02:01:00:cc:00:03",
    "netmask": "255.255.255.0",
    "extension_ip": "10.10.1.1",
}


def firewall(*rules: dict[str, Any], allow: bool = True, **more: Any) -> Transitioned:
    listed = {"default_egress_allow": allow, "rules": list(rules)}
    return call(implemented(), "apply-fw-rules", fw_rules=listed, **more)


def acl(*rules: dict[str, Any], **more: Any) -> Transitioned:
    return call(None, "apply-network-acl", **TIER, acl_rules=list(rules), **more)


def balance(*rules: dict[str, Any], **more: Any) -> Transitioned:
    return call(implemented(), "apply-lb-rules", lb_rules=list(rules), **more)


def implemented() -> Scope:
    scope = implement().scope
    assert scope is not None
    done = call(scope, "assign-ip", **{**PUBLIC, "public_ip": "203.0.113.20", "source_nat": "true"}).scope
    assert done is not None
    return done


def left_out(done: Transitioned) -> list[str]:
    assert done.scope is not None
    return [reason for reasons in done.scope.left_out.values() for reason in reasons]


def forward(fields: dict[str, Any]) -> Transitioned:
    return call(implemented(), "add-port-forward", **fields)


# The second column of a table's head, the item without the value, and how a good item and this one are sent.
GOOD = {
    "firewall": {**INGRESS, "id": 1, "portStart": 22},
    "egress": {**DENIED, "id": 1, "portStart": 25},
    "acl": {**ITEM, "number": 9, "protocol": "udp"},
    "lb": {**BALANCED, "id": 1, "publicPort": 80},
}
SENDERS: dict[str, tuple[dict[str, Any], Any]] = {
    "field of an ingress rule": (INGRESS, lambda it, **more: firewall(GOOD["firewall"], it, **more)),
    "field of an egress rule that denies": (DENIED, lambda it, **more: firewall(GOOD["egress"], it, **more)),
    "field of an item that allows": (ITEM, lambda it, **more: acl(GOOD["acl"], it, **more)),
    "field of an item that denies": ({**ITEM, "action": "deny"}, lambda it, **more: acl(GOOD["acl"], it, **more)),
    "field of a rule": (BALANCED, lambda it, **more: balance(GOOD["lb"], it, **more)),
    "field of a forward": (FORWARD, forward),
    "field of a VM": (VM, lambda it: call(implemented(), "add-dhcp-entry", **it)),
}
SINGLE = ("field of a forward", "field of a VM")


def rows() -> list[tuple[str, dict[str, Any], str]]:
    """The head of the table, the fields with their values, and the word of each row of the page's tables."""
    found: list[tuple[str, dict[str, Any], str]] = []
    head = ""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) != 4 or cells[0].startswith("---"):
            continue
        if cells[0].startswith("field"):
            head = cells[0]
            continue
        names, values = re.findall(r"`(.+?)`", cells[0]), re.findall(r"`(.+?)`", cells[1])
        found.append((head, dict(zip(names, map(json.loads, values), strict=True)), cells[2]))
    return found


def segments() -> list[tuple[str, str]]:
    """Each value of ``public_vlan`` in the table of segments, with its word."""
    table = PAGE.read_text().partition("| value of `public_vlan` |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in table]
    return [(value, word.strip()) for values, word, _ in rows for value in re.findall(r"`(.+?)`", values)]


ROWS = rows()


def of(done: Transitioned) -> tuple[Any, ...]:
    """The items of the list in the state, by what they are; the good one is among them."""
    assert done.scope is not None
    network = done.scope.networks["204"]
    listed = (*(network.firewall.rules if network.firewall else ()), *(network.acl or ()))
    return (
        *listed, *done.scope.lb_rules.values(), *done.scope.port_forwards.values(), *network.nics.values(),
    )  # fmt: skip


def test_the_page_has_rows_of_every_kind() -> None:
    assert {head for head, _, _ in ROWS} == SENDERS.keys()
    assert {word for _, _, word in ROWS} == {"carried out", "no match", "left out", "widened", "refused"}
    assert len(ROWS) > 60
    assert len(segments()) > 8


@pytest.mark.parametrize(("head", "fields", "word"), ROWS, ids=lambda it: str(it)[:60])
def test_a_row_of_the_page_is_true(head: str, fields: dict[str, Any], word: str) -> None:
    item, send = SENDERS[head]
    if word == "refused":
        with pytest.raises(BadRequest, match=r"payload\."):
            send({**item, **fields})
        return
    done = send({**item, **fields})
    good = 0 if head in SINGLE else 1
    reasons = left_out(done)
    assert (len(of(done)) > good) == (word in ("carried out", "widened"))
    assert bool(reasons) == (word in ("left out", "widened"))
    assert all(len(it) < 320 and it.isprintable() for it in reasons)
    # The next list takes the reasons away.
    assert left_out(send(item)) == []


@pytest.mark.parametrize(("value", "word"), segments())
def test_a_row_of_the_segments_is_true(value: str, word: str) -> None:
    fields = {**PUBLIC, "public_vlan": value, "source_nat": "false"}
    if word == "refused":
        with pytest.raises(BadRequest, match=r"payload\.public_vlan"):
            call(implemented(), "assign-ip", **fields)
        return
    scope = call(implemented(), "assign-ip", **fields).scope
    assert scope is not None
    names = {"VLAN untagged": "the NIC itself"}
    found = segment_name(scope.public_ips["203.0.113.21"].vlan)
    assert names.get(found, found) == word


@pytest.mark.parametrize(("head", "fields", "word"), [it for it in ROWS if it[0] not in SINGLE], ids=str)
def test_no_item_stops_a_network_that_is_being_implemented(head: str, fields: dict[str, Any], word: str) -> None:
    item, send = SENDERS[head]
    done = send({**item, **fields}, network_state="implementing")
    assert len(of(done)) >= 1
    assert bool(left_out(done)) == (word in ("left out", "widened", "refused"))


def test_all_ports_from_0_on_are_any_port() -> None:
    assert of(firewall({**INGRESS, "portStart": 0, "portEnd": 65535})) == of(firewall(INGRESS))
    assert of(firewall({**INGRESS, "portStart": 0, "portEnd": 80}))[0].ports == Ports(0, 80)


def test_a_last_port_alone_opens_no_port_above_it() -> None:
    assert of(firewall({**INGRESS, "portEnd": 80}))[0].ports == Ports(0, 80)
    assert of(firewall({**DENIED, "portEnd": 80}, allow=False))[0].ports == Ports(0, 80)


def test_a_port_of_sctp_opens_that_port_only() -> None:
    (rule,) = of(firewall({**INGRESS, "protocol": "132", "portStart": 80}))
    assert (rule.protocol, rule.ports) == ("132", Ports(80, 80))
    (line,) = verdicts([rule], "accept", "x")[0]
    assert line == "meta l4proto 132 th dport 80 accept"


def test_ports_of_all_protocols_open_tcp_and_udp_only() -> None:
    opened = of(firewall({**INGRESS, "protocol": "all", "portStart": 80}))
    assert [(it.protocol, it.ports) for it in opened] == [("tcp", Ports(80, 80)), ("udp", Ports(80, 80))]
    denied = of(firewall({**DENIED, "protocol": "all", "portStart": 80}))
    assert [(it.protocol, it.ports) for it in denied] == [("all", None)]


def test_a_deny_item_that_cannot_be_read_denies_every_protocol_at_its_place() -> None:
    done = acl(
        {**ITEM, "number": 9, "protocol": "all"},
        {**ITEM, "action": "deny", "protocol": "tc", "portStart": 5, "portEnd": 6},
        {**ITEM, "number": 1, "protocol": "udp"},
    )
    assert [(it.number, it.action, it.protocol, it.ports, it.cidrs) for it in of(done)] == [
        (1, "allow", "udp", None, ("192.0.2.0/24",)),
        (5, "deny", "all", None, ("192.0.2.0/24",)),
        (9, "allow", "all", None, ("192.0.2.0/24",)),
    ]


@pytest.mark.mutation("left-out-items-open-no-egress")
@pytest.mark.parametrize("odd", [{"protocol": "t"}, {"protocol": "icmp", "icmpType": 300}, {"protocol": "x"}])
def test_a_list_whose_egress_items_are_left_out_still_denies_egress(odd: dict[str, Any]) -> None:
    done = acl({**ITEM, "trafficType": "egress", **odd}, network_state="implementing")
    assert done.scope is not None
    assert egress_lines(acl_of(done.scope.networks["204"], open_without=False))[0] == "drop"
    assert ingress_lines(acl_of(done.scope.networks["204"], open_without=False)) == ["drop"]


odd_items = st.fixed_dictionaries(
    {
        "number": st.integers(-5, 5),
        "action": st.sampled_from(("allow", "deny")),
        "trafficType": st.sampled_from(("ingress", "egress")),
        "protocol": st.sampled_from(("t", ",", "", " ", "udp,", "icmp", "47", "0", "tcp,udp", "0132", "all")),
        "icmpType": st.sampled_from((None, -1, 8, 300)),
        "sourceCidrs": st.lists(st.sampled_from(("10.0.0.0/08", "::/0", " 192.0.2.7/24")), max_size=2),
    }
)


@given(st.lists(odd_items, max_size=6), st.lists(odd_items, max_size=6))
def test_items_that_cannot_be_carried_out_change_no_other_item(before: list[Any], behind: list[Any]) -> None:
    low, high = {**ITEM, "number": 7, "protocol": "udp"}, {**ITEM, "number": 8, "action": "deny"}
    listed = of(acl(*before, low, high, *behind))
    places = [listed.index(it) for it in of(acl(low, high))]
    assert places == sorted(places)
    denies = [it for it in (*before, *behind) if it["action"] == "deny" and it["icmpType"] != 300]
    assert len([it for it in listed if isinstance(it, AclItem) and it.action == "deny"]) >= len(denies)


@given(st.sampled_from(("t", ",", "", "udp,")), st.sampled_from(("tcp", "udp", "icmp", "47")))
def test_an_egress_rule_that_denies_denies_at_least_every_protocol_it_could_mean(odd: str, meant: str) -> None:
    rules: tuple[FirewallRule, ...] = of(firewall({**DENIED, "protocol": odd, "portStart": 5}))
    assert [it.protocol for it in rules] == ["all"], meant


@pytest.mark.parametrize("odd", [{"publicPort": 70000}, {"publicIp": "x"}, {"name": 5.5}, {"backends": [1]}])
def test_a_rule_that_could_not_be_added_can_be_revoked(odd: dict[str, Any]) -> None:
    scope = balance(BALANCED).scope
    revoked = call(scope, "apply-lb-rules", lb_rules=[{**BALANCED, **odd, "revoke": True}])
    assert revoked.scope is not None
    assert revoked.scope.lb_rules == {}
    assert left_out(revoked) == []


NO_RULES: dict[str, Any] = {"default_egress_allow": True, "rules": []}
TAKERS: list[tuple[str, dict[str, Any]]] = [
    ("apply-lb-rules", {"lb_rules": [{**BALANCED, "publicIp": "203.0.113.77"}]}),
    (
        "apply-fw-rules",
        {"fw_rules": {"default_egress_allow": True, "rules": [{**INGRESS, "publicIp": "203.0.113.77"}]}},
    ),
    ("add-port-forward", {**FORWARD, "public_ip": "203.0.113.77"}),
    ("add-static-nat", {**PUBLIC, "public_ip": "203.0.113.77", "private_ip": "10.10.1.45"}),
]


@pytest.mark.parametrize(("command", "fields"), TAKERS)
def test_a_rule_of_any_kind_takes_its_address_and_release_ip_gives_it_up(command: str, fields: dict[str, Any]) -> None:
    scope = call(implemented(), command, **fields).scope
    assert scope is not None
    assert scope.public_ips["203.0.113.77"] == PublicIp(
        address="203.0.113.77", vlan="101", gateway="203.0.113.1", cidr="203.0.113.0/24", exit=1, network_id="204"
    )
    released = call(scope, "release-ip", **{**PUBLIC, "public_ip": "203.0.113.77"}).scope
    assert released is not None
    assert set(released.public_ips) == {"203.0.113.20"}
    # The full list comes again while CloudStack shuts the network down.
    if command == "apply-fw-rules":
        again = call(released, command, **fields, network_state="shutdown").scope
        assert again is not None
        assert set(again.public_ips) == {"203.0.113.20"}


REMOVALS: list[tuple[str, dict[str, Any]]] = [
    ("delete-port-forward", {**FORWARD, "public_port": "0-70000"}),
    ("delete-port-forward", {**FORWARD, "protocol": "sctp", "private_port": "x"}),
    ("delete-port-forward", {**FORWARD, "public_ip": "224.0.0.1"}),
    ("delete-static-nat", {**PUBLIC, "public_vlan": "lswitch://x", "private_ip": "1.2.3"}),
    ("release-ip", {**PUBLIC, "public_ip": "x"}),
    ("release-nic", {"mac": "01:00:00:00:00:00"}),
    ("remove-dhcp-entry", {"mac": "x", "ip": "10.10.1.999", "hostname": "vm_1"}),
    ("remove-dns-entry", {"nic_uuid": "../x"}),
    ("remove-dhcp-subnet", {"dns": "null,x", "vlan": "cs-net-1"}),
    ("remove-dns-subnet", {"domain": "a..b", "gateway": "x"}),
]


@pytest.mark.mutation("a-removal-reads-what-it-can", instead="convert(payload, shape, root='')")
@pytest.mark.parametrize(("command", "fields"), REMOVALS)
def test_a_removal_of_what_could_never_be_stored_succeeds(command: str, fields: dict[str, Any]) -> None:
    scope = implemented()
    assert call(scope, command, **fields).scope == scope
    assert call(None, command, **fields).scope is None


@pytest.mark.parametrize("command", ["shutdown-network", "destroy-network"])
def test_a_network_ends_whatever_its_fields_are(command: str) -> None:
    assert call(implemented(), command, vlan="lswitch://x", cidr="x", gateway=[5], zone_id="z").scope is None


def test_a_removal_uses_the_fields_that_can_be_read() -> None:
    nic: dict[str, Any] = {"nic_uuid": "u-1", "mac": "02:01:00:cc:00:03", "ip": "10.10.1.45"}
    scope = call(implemented(), "add-dhcp-entry", **nic).scope
    done = call(scope, "remove-dhcp-entry", **{**nic, "ip": "x", "hostname": "vm_1"}).scope
    assert done is not None
    assert done.networks["204"].nics == {}


def test_the_deletion_of_a_replaced_forward_leaves_the_one_in_force() -> None:
    scope = forward(FORWARD).scope
    scope = call(scope, "add-port-forward", **{**FORWARD, "private_ip": "10.10.1.46"}).scope
    assert scope is not None
    assert call(scope, "delete-port-forward", **FORWARD).scope == scope
    done = call(scope, "delete-port-forward", **{**FORWARD, "private_ip": "10.10.1.46"}).scope
    assert done is not None
    assert done.port_forwards == {}
