"""Payload shapes: what CloudStack's client writes, what its documentation writes, and what nobody should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netloom.commands import TABLE, Context, apply, check_payload, decode
from netloom.errors import BadRequest, HostRefused, NetloomError
from netloom.protocol.acl import ApplyNetworkAcl
from netloom.protocol.custom import CustomAction
from netloom.protocol.dhcp import AddDhcpEntry, SetDhcpOptions
from netloom.protocol.envelope import read_envelope, scope_id_of
from netloom.protocol.firewall import ApplyFwRules
from netloom.protocol.lb import ApplyLbRules
from netloom.protocol.nat import AddPortForward, AssignIp
from netloom.protocol.network import NetworkPayload
from netloom.protocol.reader import convert, load_object
from netloom.protocol.restore import RestoreNetwork
from netloom.protocol.userdata import SavePassword, SaveUserdata, SaveVmData
from netloom.protocol.vpc import ImplementVpc
from netloom.wire import Registration

PAYLOADS = Path(__file__).parents[1] / "payloads"
INDEX: list[dict[str, str]] = json.loads((PAYLOADS / "index.json").read_text())
NETWORK = {"network_id": "204"}


def payload(shape: type[msgspec.Struct], **fields: object) -> Any:
    return convert(load_object(json.dumps({**NETWORK, **fields}).encode(), root="payload"), shape, root="payload")


def refusal(shape: type[msgspec.Struct], **fields: object) -> str:
    with pytest.raises(BadRequest) as refused:
        payload(shape, **fields)
    return str(refused.value)


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row["file"])
def test_every_payload_of_the_client_is_read_and_checked(row: dict[str, str]) -> None:
    command = row["command"]
    envelope = read_envelope((PAYLOADS / row["file"]).read_bytes(), command)
    assert envelope.details.candidates
    asked = check_payload(command, envelope.payload)
    assert isinstance(asked, TABLE[command].payload)
    scope_id = scope_id_of(command, envelope.payload)
    context = Context(scope_id=scope_id, registration=Registration(owner="zone-a"))
    if TABLE[command].kind == "extension":
        with pytest.raises(BadRequest, match="answered where CloudStack runs"):
            apply(command, None, asked, context)
    elif TABLE[command].kind == "acts":
        with pytest.raises((BadRequest, HostRefused), match=r"it reads the host|nothing is known of net-204"):
            apply(command, None, asked, context)


def test_every_command_of_the_protocol_has_a_row() -> None:
    assert {row["command"] for row in INDEX} <= TABLE.keys()
    assert len(TABLE) == 35


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row["file"])
def test_numbers_and_booleans_in_either_form(row: dict[str, str]) -> None:
    """Every number as text and every boolean as text means the same."""

    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spelled(it) for key, it in value.items()}
        if isinstance(value, list):
            return [spelled(it) for it in value]
        if isinstance(value, bool):
            return str(value).lower()
        return str(value) if isinstance(value, int) else value

    command = row["command"]
    told = read_envelope((PAYLOADS / row["file"]).read_bytes(), command).payload
    assert decode(command, json.dumps(spelled(told)).encode()) == check_payload(command, told)


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row["file"])
def test_unknown_null_and_empty_fields_say_nothing(row: dict[str, str]) -> None:
    command = row["command"]
    told = read_envelope((PAYLOADS / row["file"]).read_bytes(), command).payload
    more = {name: ("", None)[index % 2] for index, name in enumerate(TABLE[command].payload.__struct_encode_fields__)}
    assert decode(command, json.dumps({**more, "novelty": {"a": [1]}, **told}).encode()) == check_payload(command, told)


def test_older_spellings_of_ipv6_fields() -> None:
    told = payload(
        AddDhcpEntry,
        mac="02:01:00:cc:00:03",
        nic_ip6_address="2001:DB8::5",
        nic_ip6_gateway="2001:db8::1",
        nic_ip6_cidr="2001:db8::/64",
    )
    assert (told.ip6_address, told.ip6_gateway, told.ip6_cidr) == ("2001:db8::5", "2001:db8::1", "2001:db8::/64")


def test_a_newer_spelling_wins_over_an_older_one() -> None:
    told = payload(AddDhcpEntry, nic_id="1", nic_ip6_address="2001:db8::5", ip6_address="2001:db8::6")
    assert told.ip6_address == "2001:db8::6"


def test_older_spelling_of_a_vpcs_cidr() -> None:
    told = payload(ImplementVpc, vpc_id="7", cidr="10.20.0.0/16")
    assert told.vpc_cidr == ("10.20.0.0/16",)


def test_ranges_of_a_shared_network() -> None:
    told = payload(NetworkPayload, gateway="10.30.0.1,10.31.0.1", cidr="10.30.0.0/24, 10.31.0.0/25")
    assert told.gateway == ("10.30.0.1", "10.31.0.1")
    assert told.cidr == ("10.30.0.0/24", "10.31.0.0/25")


@pytest.mark.mutation("a-flag-may-be-a-json-bool")
@pytest.mark.parametrize(("sent", "meant"), [(True, True), ("true", True), ("TRUE", True), (False, False), ("", False)])
def test_defect_50_source_nat_as_json_true(sent: object, meant: bool) -> None:
    assert bool(payload(AssignIp, source_nat=sent).source_nat) is meant


@pytest.mark.mutation(
    "a-range-has-a-dash-or-a-colon", instead=r're.compile(r"([1-9][0-9]{0,9})(?:[:]([1-9][0-9]{0,9}))?\Z")'
)
@pytest.mark.parametrize("ports", ["80-90", "80:90"])
def test_defect_29_both_spellings_of_a_port_range(ports: str) -> None:
    told = payload(AddPortForward, public_port=ports, private_port=ports, private_ip="10.10.1.45", protocol="TCP")
    assert (told.public_port.first, told.public_port.last, told.protocol) == (80, 90, "tcp")


def fw(**rule: object) -> dict[str, object]:
    good = {"type": "egress", "protocol": "tcp"}
    return {"default_egress_allow": True, "rules": [good, good, good, {**good, **rule}]}


@pytest.mark.mutation("ports-of-a-rule-are-checked")
@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"portStart": 99999}, "payload.fw_rules.rules[3].portStart: 99999 is not a port (0 to 65535)"),
        ({"protocol": "tls"}, "payload.fw_rules.rules[3].protocol: 'tls' is none of tcp, udp, icmp, all"),
        ({"sourceCidrs": [""]}, "payload.fw_rules.rules[3].sourceCidrs[0]: '' is not a network with prefix"),
        ({"sourceCidrs": "10.0.0.0/8"}, "payload.fw_rules.rules[3].sourceCidrs: expected a list, got str"),
        ({"portStart": 90, "portEnd": 80}, "payload.fw_rules.rules[3]: ports 90-80 end before they begin"),
        ({"type": "sideways"}, "payload.fw_rules.rules[3].type: 'sideways' is none of ingress, egress"),
    ],
)
def test_defect_07_a_wrong_rule_refuses_the_whole_call(rule: dict[str, object], told: str) -> None:
    assert refusal(ApplyFwRules, fw_rules=fw(**rule)).startswith(told)


@pytest.mark.mutation("an-invalid-item-does-not-stop-a-network", instead="invalid")
@pytest.mark.parametrize("wrong", [{"portStart": 99999}, {"sourceCidrs": ["10.0.0.0/33"]}, {"protocol": "tls"}])
def test_a_wrong_rule_does_not_stop_a_network_that_is_being_implemented(wrong: dict[str, object]) -> None:
    told = payload(ApplyFwRules, network_state="implementing", fw_rules=fw(**wrong)).fw_rules
    assert len(told.invalid) == 1
    # Egress rules deny here, so the wrong one is widened: it keeps the fields that can be read.
    kept = {"protocol": ("all",)} if "protocol" in wrong else {"protocol": ("tcp",)}
    assert [it.protocol for it in told.items] == [("tcp",)] * 3 + [kept["protocol"]]
    assert (told.items[3].port_start, told.items[3].source_cidrs) == (None, ())
    allowing = {**fw(**wrong), "default_egress_allow": False}
    told = payload(ApplyFwRules, network_state="implementing", fw_rules=allowing).fw_rules
    assert (len(told.items), len(told.invalid)) == (3, 1)


def test_a_wrong_item_of_a_list_does_not_stop_a_tier_that_is_being_implemented() -> None:
    good = {"number": 1, "action": "allow", "trafficType": "ingress", "protocol": "tcp", "portStart": 22, "portEnd": 22}
    rules = [good, {**good, "number": 2, "portEnd": 99999}, {**good, "number": 3, "action": "deny", "portEnd": 99999}]
    told = payload(ApplyNetworkAcl, vpc_id="7", network_state="implementing", acl_rules=rules).acl_rules
    assert [(int(it.number), it.action, it.port_end) for it in told.items] == [(1, "allow", 22), (3, "deny", None)]
    assert len(told.invalid) == 2
    assert "99999" in refusal(ApplyNetworkAcl, vpc_id="7", network_state="implemented", acl_rules=rules)


@pytest.mark.mutation("fw-rules-is-an-object-that-must-be-there")
@pytest.mark.parametrize("sent", [{}, {"fw_rules": None}, {"fw_rules": ""}])
def test_defect_08_missing_fw_rules_are_refused(sent: dict[str, object]) -> None:
    assert refusal(ApplyFwRules, **sent) == "payload.fw_rules is missing"


@pytest.mark.mutation("fw-rules-is-an-object-that-must-be-there")
@pytest.mark.parametrize("sent", ["[]", [], 5, True, "{}"])
def test_defect_09_fw_rules_that_are_no_object_are_refused(sent: object) -> None:
    assert refusal(ApplyFwRules, fw_rules=sent).startswith("payload.fw_rules: expected an object")


@pytest.mark.parametrize("missing", ["default_egress_allow", "rules"])
def test_a_firewall_that_does_not_say_all_is_refused(missing: str) -> None:
    sent = fw()
    del sent[missing]
    assert refusal(ApplyFwRules, fw_rules=sent) == f"payload.fw_rules.{missing} is missing"


@pytest.mark.mutation("a-metadata-name-stays-below")
@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/x", "a\nb", "..", "x" * 256])
def test_defect_14_hostile_names_of_metadata(name: str) -> None:
    item = {"dir": "metadata", "file": name, "content": "x"}
    (given,) = payload(SaveVmData, nic_id="1", vm_data=[item]).vm_data
    assert given.valid_item() is None


@pytest.mark.mutation("a-metadata-directory-is-known")
@pytest.mark.parametrize("directory", ["../x", "/etc", "", "userdata/../password"])
def test_defect_14_hostile_directories_of_metadata(directory: str) -> None:
    item = {"dir": directory, "file": "x", "content": "x"}
    (given,) = payload(SaveVmData, nic_id="1", vm_data=[item]).vm_data
    assert given.valid_item() is None


def test_one_hostile_name_does_not_keep_a_restore_down() -> None:
    items = [
        {"dir": "metadata", "file": "../x", "content": "x"},
        {"dir": "metadata", "file": "vm-id", "content": "y"},
        {"dir": "user-data", "file": "user_data", "content": ""},
    ]
    told = payload(RestoreNetwork, restore_data={"vms": [{"mac": "02:01:00:cc:00:03", "vm_data": items}]})
    checked = [item.valid_item() for item in told.restore_data.vms.items[0].vm_data]
    assert checked[0] is None
    assert [(item.dir, item.file) for item in checked[1:]] == [("metadata", "vm-id"), ("userdata", "user_data")]


@pytest.mark.mutation("a-host-name-is-a-label", instead='re.compile("(?s).*")')
@pytest.mark.parametrize("hostname", ["web\n6.6.6.6 www.bank.example", "web 1", "-web", "web,1"])
def test_defect_15_a_host_name_is_a_host_name(hostname: str) -> None:
    assert refusal(AddDhcpEntry, nic_id="1", hostname=hostname).startswith("payload.hostname: ")


@pytest.mark.mutation("a-domain-is-made-of-labels")
def test_defect_15_a_domain_is_a_domain() -> None:
    assert refusal(AddDhcpEntry, nic_id="1", domain="example\naddress=/#/6.6.6.6").startswith("payload.domain: ")


@pytest.mark.mutation("a-payload-is-an-object")
@pytest.mark.parametrize("text", [b"", b"{", b'{"network_id": "204"', b"[]", b"\xff", b"null"])
def test_defect_57_a_malformed_payload_is_one_line(text: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        decode("assign-ip", text)
    assert str(refused.value).startswith("payload")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("number", "field"),
    [
        ("020", "network_id"), ("020", "vlan"), ("020", "cidr"), ("020", "gateway"), ("021", "public_ip"),
        ("021", "public_vlan"), ("021", "source_nat"), ("053", "public_port"), ("053", "protocol"),
        ("032", "mac"), ("032", "hostname"), ("034", "domain"), ("202", "vpc_id"), ("403", "ip6_address"),
    ],
)  # fmt: skip
def test_a_megabyte_in_a_field_is_refused_in_a_short_line(number: str, field: str) -> None:
    (path,) = PAYLOADS.glob(f"{number}-*.json")
    told = json.loads(path.read_text())["payload"]
    assert field in told
    command = next(it["command"] for it in INDEX if it["file"] == path.name)
    with pytest.raises(BadRequest) as refused:
        decode(command, json.dumps({**told, field: "1" * 1_000_000}).encode())
    assert str(refused.value).startswith(f"payload.{field}")
    assert len(str(refused.value)) < 300


@pytest.mark.mutation(
    "user-data-keeps-every-byte", instead="cls(string(value, limit=CONTENT_CHARACTERS_MAX, secret=True).rstrip())"
)
def test_defect_48_user_data_is_kept_byte_for_byte() -> None:
    text = "#cloud-config\r\n\x00café \U0001f600\n\n"
    assert payload(SaveUserdata, nic_id="1", userdata=text).userdata.reveal() == text
    assert payload(SaveUserdata, nic_id="1", userdata="").userdata.reveal() == ""


def test_a_vms_password_does_not_print() -> None:
    told = payload(SavePassword, nic_id="1", password="hunter2")
    assert told.password.reveal() == "hunter2"
    assert "hunter2" not in repr(told)
    data = payload(SaveVmData, nic_id="1", vm_data=[{"dir": "password", "file": "vm_password", "content": "hunter2"}])
    assert "hunter2" not in repr(data)
    assert "hunter2" not in refusal(SavePassword, nic_id="1", password=["hunter2"])
    assert "hunter2" not in refusal(SavePassword, nic_id="1", password="hunter2\nhunter2")


def test_acl_rules() -> None:
    rule = {"number": "5", "action": "ALLOW", "trafficType": "Ingress", "protocol": 47, "sourceCidrs": ["::/0"]}
    told = payload(ApplyNetworkAcl, acl_rules=[rule]).acl_rules.items[0]
    assert (told.number, told.action, told.traffic_type, told.protocol) == (5, "allow", "ingress", ("47",))
    assert refusal(ApplyNetworkAcl) == "payload.acl_rules is missing"
    assert refusal(ApplyNetworkAcl, acl_rules=[{**rule, "protocol": "256"}]).startswith("payload.acl_rules[0].protocol")


@pytest.mark.parametrize(("name", "spoken"), [("web [udp]", "udp"), ("x[tcp-proxy] ", "tcp-proxy"), ("udp", "tcp")])
def test_a_rules_name_says_what_the_client_cannot(name: str, spoken: str) -> None:
    rule = {"id": 1, "name": name, "publicIp": "203.0.113.5", "publicPort": 80, "protocol": "tcp"}
    assert payload(ApplyLbRules, lb_rules=[rule]).lb_rules.items[0].effective_protocol == spoken


@pytest.mark.mutation("an-unreadable-rule-keeps-no-other-out")
def test_a_rule_that_cannot_be_read_keeps_no_other_out_and_is_named() -> None:
    good = {"id": 1, "name": "x", "publicIp": "203.0.113.5", "publicPort": 80, "protocol": "tcp"}
    told = payload(ApplyLbRules, lb_rules=[{**good, "publicPort": 0}, good, {**good, "algorithm": "random"}]).lb_rules
    assert [int(it.id) for it in told.items] == [1]
    assert [it.partition(":")[0] for it in told.invalid] == [
        "payload.lb_rules[0].publicPort",
        "payload.lb_rules[2].algorithm",
    ]
    assert refusal(ApplyLbRules, lb_rules=["x"]).startswith("payload.lb_rules: expected a list of objects")
    assert payload(ApplyLbRules, lb_rules=[]).lb_rules.items == ()


@pytest.mark.parametrize("options", ['{"15":"example.com","26":1400}', {"15": "example.com", "26": "1400"}])
def test_dhcp_options_as_text_and_as_object(options: object) -> None:
    assert payload(SetDhcpOptions, nic_id="5101", options=options).options == {15: "example.com", 26: "1400"}


@pytest.mark.parametrize("options", ["x", "[]", [], {"0": "x"}, {"255": "x"}, {"x": "y"}, {"15": "a\nb"}, "[" * 50_000])
def test_wrong_dhcp_options(options: object) -> None:
    assert refusal(SetDhcpOptions, nic_id="5101", options=options).startswith("payload.options")


def test_custom_action() -> None:
    told = payload(CustomAction, action="pbr-add-route", **{"action-params": {"table-id": 101, "note": ""}})
    assert told.params == {"table-id": "101", "note": ""}
    assert refusal(CustomAction, action="../x").startswith("payload.action: ")
    told = payload(CustomAction, action="Restart VPN", **{"action-params": {"a b": "c\nd"}})
    assert (told.action, told.params) == ("Restart-VPN", {"a b": "c\nd"})
    for wrong in ({"a\nb": ""}, {" ": ""}, {"a": "b\x1b[31m"}):
        assert refusal(CustomAction, action="x", **{"action-params": wrong}).startswith("payload.action-params: ")


def test_a_quoted_value_is_short_and_on_one_line() -> None:
    message = refusal(NetworkPayload, vlan="\x1b[31m\n" * 200_000)
    assert len(message) < 140
    assert message.isascii()
    assert message.isprintable()


def test_every_refusal_derives_from_the_one_error() -> None:
    with pytest.raises(NetloomError):
        decode("no-such-command", b"{}")
    with pytest.raises(BadRequest, match="'no-such-command' is not a command"):
        decode("no-such-command", b"{}")
