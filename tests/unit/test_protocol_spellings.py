"""Every other spelling of what CloudStack's client writes, older or documented, is accepted and means the same.

A row takes a payload file of the client and respells one thing in it. Compared is what the call does to a network that
nobody knew; of calls about VPCs and of custom actions, what is read.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from netloom.commands import Context, apply, check_payload
from netloom.protocol.envelope import read_envelope, scope_id_of
from unit.payload_player import OURS, PAYLOADS

COMMANDS = {it["file"][:3]: it["command"] for it in json.loads((PAYLOADS / "index.json").read_text())}
GONE = object()

# file, what is respelled (a path; of a new name the old one goes), and how it is written instead
ROWS: list[tuple[str, str, Any]] = [
    # the envelope
    ("020", "physical_network_extension_details=physical-network-extension-details", None),
    ("020", "network_extension_details=network-extension-details", None),
    ("500", "action_params=action-params", None),
    # older names of fields
    ("403", "payload.nic_ip6_address=payload.ip6_address", None),
    ("403", "payload.nic_ip6_gateway=payload.ip6_gateway", None),
    ("403", "payload.nic_ip6_cidr=payload.ip6_cidr", None),
    ("402", "payload.nic_ip6_address=payload.ip6_address", None),
    ("404", "payload.nic_ip6_address=payload.ip6_address", None),
    ("202", "payload.cidr=payload.vpc_cidr", None),
    ("234", "payload.cidr=payload.vpc_cidr", None),
    ("225", "payload.public_vlan", "101"),
    ("226", "payload.protocol", "TCP"),
    ("301", "payload.vlan", "vlan://1410"),
    ("500", "physical_network_extension_details=physical-network-extension-details", None),
    ("235", "payload.cidr=payload.vpc_cidr", None),
    # ports
    ("054", "payload.public_port", "8080:8090"),
    ("054", "payload.private_port", "8080:8090"),
    ("053", "payload.public_port", "2222-2222"),
    ("053", "payload.public_port", 2222),
    # broadcast URIs, with a scheme or without
    ("020", "payload.vlan", "VLAN://1204"),
    ("020", "payload.vlan", "vlan://1204"),
    ("020", "payload.vlan", 1204),
    ("317", "payload.vlan", "vlan://untagged"),
    ("317", "payload.vlan", "Untagged"),
    ("021", "payload.public_vlan", "101"),
    ("021", "payload.public_vlan", 101),
    ("052", "payload.public_vlan", "untagged"),
    # words in any case
    ("020", "payload.guest_type", "Isolated"),
    ("139", "payload.network_state", "Implemented"),
    ("053", "payload.protocol", "TCP"),
    ("070", "payload.fw_rules.rules.0.protocol", "TCP"),
    ("070", "payload.fw_rules.rules.0.type", "Ingress"),
    ("080", "payload.lb_rules.0.protocol", "TCP"),
    ("080", "payload.lb_rules.0.algorithm", "RoundRobin"),
    ("212", "payload.acl_rules.0.action", "Allow"),
    ("212", "payload.acl_rules.0.trafficType", "INGRESS"),
    ("212", "payload.acl_rules.0.protocol", "6"),
    ("212", "payload.acl_rules.0.protocol", 6),
    # folders and files of metadata, as the documentation names them
    ("035", "payload.vm_data.0.dir", "user-data"),
    ("035", "payload.vm_data.0.file", "user-data"),
    ("035", "payload.vm_data.1.dir", "meta-data"),
    ("035", "payload.vm_data.9.file", "public-keys/0/openssh-key"),
    ("024", "payload.restore_data.vms.0.vm_data.0.dir", "user-data"),
    ("024", "payload.restore_data.vms.0.vm_data.0.file", "user-data"),
    ("024", "payload.restore_data.vms.0.vm_data.1.dir", "meta-data"),
    ("600", "payload.options", {"15": "example.com", "119": "search.example.com"}),
    # numbers and booleans for text, and the other way round
    ("021", "payload.network_id", 204),
    ("021", "payload.zone_id", 1),
    ("021", "payload.source_nat", True),
    ("030", "payload.nic_id", 5101),
    ("030", "payload.device_id", 0),
    ("030", "payload.default_nic", True),
    ("030", "payload.default_nic", "TRUE"),
    ("024", "payload.restore_data.dhcp_enabled", "true"),
    ("024", "payload.restore_data.vms.0.default_nic", "true"),
    ("024", "payload.restore_data.vms.0.device_id", 0),
    ("070", "payload.fw_rules.default_egress_allow", "true"),
    ("070", "payload.fw_rules.rules.0.portStart", "2222"),
    ("070", "payload.fw_rules.rules.2.icmpType", "8"),
    ("080", "payload.lb_rules.0.revoke", "false"),
    ("080", "payload.lb_rules.0.id", "951"),
    ("080", "payload.lb_rules.0.backends.0.port", "8080"),
    ("212", "payload.acl_rules.0.number", "1"),
    ("212", "payload.acl_rules.0.portStart", "22"),
    # lists, with commas or as JSON has them
    ("032", "payload.dns", ["198.51.100.53", "198.51.100.54"]),
    ("032", "payload.dns", "198.51.100.53, 198.51.100.54"),
    ("301", "payload.cidr", ["10.30.0.0/24"]),
    # one value, several spellings
    ("030", "payload.mac", "02-01-00-CC-00-03"),
    ("032", "payload.domain", "cs2cloud.internal."),
    ("021", "payload.public_cidr", "203.0.113.20/24"),
    ("403", "payload.ip6_address", "2001:0DB8:0050:0001:0001:00FF:FECC:0503"),
    # absent, null and empty are the same
    ("141", "payload.extension_ip", ""),
    ("141", "payload.extension_ip", None),
    ("020", "payload.vpc_id", ""),
    ("072", "payload.fw_rules.cidr", GONE),
    ("037", "payload.hostname", ""),
]


def respelled(file: dict[str, Any], what: str, value: Any) -> dict[str, Any]:
    new, _, old = what.partition("=")
    *path, name = (old or new).split(".")
    place: Any = file
    for step in path:
        place = place[int(step) if isinstance(place, list) else step]
    if old:
        place[new.rpartition(".")[2]] = place.pop(name)
    elif value is GONE:
        del place[name]
    else:
        place[name] = value
    return file


def meaning(number: str, file: dict[str, Any]) -> object:
    command = COMMANDS[number]
    envelope = read_envelope(json.dumps(file).encode(), command)
    asked = check_payload(command, envelope.payload)
    scope_id = scope_id_of(command, envelope.payload)
    if command == "custom-action" or scope_id.startswith("vpc-"):
        return envelope.details, envelope.network_details, asked
    done = apply(command, None, asked, Context(scope_id=scope_id, registration=OURS))
    return envelope.details, envelope.network_details, done.scope or asked


@pytest.mark.parametrize(("number", "what", "value"), ROWS, ids=lambda it: str(it)[:40])
def test_another_spelling_means_the_same(number: str, what: str, value: Any) -> None:
    (path,) = PAYLOADS.glob(f"{number}-*.json")
    file = json.loads(path.read_text())
    other = respelled(json.loads(path.read_text()), what, value)
    assert other != file
    assert meaning(number, other) == meaning(number, file)
