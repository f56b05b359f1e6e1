"""The payload file as a whole."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from netloom import standbywire
from netloom.errors import BadRequest
from netloom.names import CONNTRACK_HELPERS
from netloom.protocol.envelope import (
    Envelope,
    StoredDetails,
    parse_current_details,
    read_envelope,
    scope_id_of,
)
from netloom.protocol.reader import load_object
from netloom.render import helpers

PHYSICAL = {"hosts": "192.0.2.11, 192.0.2.12", "physicalnetworkname": "Physical Network 1"}


def envelope(*, stored: object = None, **details: Any) -> Envelope:
    file = {
        "physical-network-extension-details": {**PHYSICAL, **details},
        "network-extension-details": {} if stored is None else stored,
        "payload": {"network_id": "204"},
    }
    return read_envelope(json.dumps(file).encode(), "shutdown-network")


def test_defaults() -> None:
    details = envelope().details
    assert details.candidates == ("192.0.2.11", "192.0.2.12")
    assert (details.port, details.username, details.guest_nic, details.public_nic) == (22, "root", "eth1", "eth1")
    assert (details.sshkey, details.password) == (None, None)
    assert (details.firewall, details.isolation, details.broadcast) == ("present", "vlan", None)
    assert (details.lb_idle_timeout, details.lb_max_conn, details.conntrack_max_per_vm) == (600, 8000, 32_000)


@pytest.mark.mutation("a-share-of-connections-can-be-sampled")
@pytest.mark.parametrize(
    ("detail", "accepted", "refused"),
    [
        ("loadbalancer.idle.timeout", "3600", ("4", "604801", "1h")),
        ("loadbalancer.max.conn", "20000", ("99", "200001")),
        ("conntrack.max.per.vm", "1000", ("-1", "1", "999", "1000001", "1e9x")),
        ("conntrack.max.per.vm", "0", ()),
    ],
)
def test_limits_of_connections_have_bounds(detail: str, accepted: str, refused: tuple[str, ...]) -> None:
    details = envelope(**{detail: accepted}).details
    assert accepted in map(str, (details.lb_idle_timeout, details.lb_max_conn, details.conntrack_max_per_vm))
    for value in refused:
        with pytest.raises(BadRequest, match=detail):
            envelope(**{detail: value})


def test_the_details_of_the_standby() -> None:
    details = envelope().details
    assert (details.standby, details.standby_alone, details.standby_port) == ("auto", "stop", standbywire.PORT)
    for policy in ("auto", "off", "required"):
        assert envelope(standby=policy.upper()).details.standby == policy
    assert envelope(**{"standby.alone": "Gateway"}).details.standby_alone == "gateway"
    assert envelope(**{"standby.port": "9000"}).details.standby_port == 9000
    for wrong, text in (
        ({"standby": "yes"}, "standby: 'yes' is none of auto, off, required"),
        ({"standby.alone": "go"}, "standby.alone: 'go' is none of stop, gateway"),
        ({"standby.port": "0"}, "standby.port: '0' is not a port that a program can listen on"),
    ):
        with pytest.raises(BadRequest) as raised:
            envelope(**wrong)
        assert text in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.mutation("the-hosts-do-not-meet-at-the-port-of-ssh")
def test_the_hosts_of_a_group_do_not_meet_at_the_port_of_ssh() -> None:
    with pytest.raises(BadRequest, match="standby.port and port are both 2222, and SSH listens there"):
        envelope(**{"standby.port": "2222", "port": "2222"})


def test_empty_and_null_details_are_absent_ones() -> None:
    details = envelope(port="", username=None, sshkey="", host="", **{"guest.network.device": ""}).details
    assert details == envelope().details


def test_host_is_used_when_hosts_is_absent() -> None:
    assert envelope(hosts="", host="kvm-1.example.org").details.candidates == ("kvm-1.example.org",)
    assert envelope(host="kvm-1.example.org").details.candidates == ("192.0.2.11", "192.0.2.12")


@pytest.mark.mutation("a-number-may-be-a-json-number")
@pytest.mark.parametrize("port", ["2222", 2222])
def test_defect_67_a_port_that_is_a_json_number_is_the_port(port: object) -> None:
    assert envelope(port=port).details.port == 2222


@pytest.mark.mutation("a-key-gets-its-lines-back")
def test_defect_23_a_key_keeps_its_lines_and_gets_its_last_newline() -> None:
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
    for sent in (key, key.rstrip(), key.replace("\n", "\r\n"), key.strip().replace("\n", "\\n"), f"\n{key}\n\n"):
        told = envelope(sshkey=sent).details.sshkey
        assert told is not None
        assert told.reveal() == key


@pytest.mark.mutation("a-password-keeps-every-character", instead="cls(text.strip())")
def test_defect_24_a_password_may_hold_any_character() -> None:
    password = "a\"b\\c é €  $(id) 'x' <&>=\n"
    told = envelope(password=password).details.password
    assert told is not None
    assert told.reveal() == password


def test_every_further_detail_of_ours() -> None:
    details = envelope(
        hostkeys="192.0.2.11 ssh-ed25519 AAAA\n192.0.2.12 ssh-ed25519 BBBB",
        owner="zone-a",
        firewall="Absent",
        **{
            "guest.isolation": "VXLAN",
            "network.broadcast": "vlan",
            "public.ip6.gateway": "2001:db8::1",
            "public.ip6.address": "2001:db8::2/64",
            "conntrack.helpers": "tftp, FTP,ftp,",
            "metrics.listen": "127.0.0.1:9100",
        },
    ).details
    assert (details.owner, details.firewall, details.isolation) == ("zone-a", "absent", "vxlan")
    assert (details.broadcast, details.public_ip6_gateway) == ("vlan", "2001:db8::1")
    assert details.conntrack_helpers == ("ftp", "tftp")
    assert details.hostkeys.count("\n") == 1


@pytest.mark.mutation("a-conntrack-helper-is-known", instead="()")
def test_an_unknown_conntrack_helper_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match=r"conntrack\.helpers: .*netbios.* is none of amanda, ftp, irc, pptp"):
        envelope(**{"conntrack.helpers": "ftp,netbios-ns"})
    assert set(CONNTRACK_HELPERS) == {name for name in CONNTRACK_HELPERS if helpers.objects([name])}


@pytest.mark.parametrize(
    ("detail", "value"),
    [
        ("hosts", "192.0.2.11,-oProxyCommand=touch /tmp/x"),
        ("hosts", "192.0.2.11 192.0.2.12"),
        ("port", "ssh"),
        ("port", 0),
        ("port", True),
        ("username", "-oProxyCommand=x"),
        ("guest.network.device", "-eth1"),
        ("public.network.device", "eth1; id"),
        ("firewall", "open"),
        ("guest.isolation", "gre"),
        ("conntrack.helpers", "ftp,snmp"),
        ("conntrack.helpers", "ftp tftp"),
        ("conntrack.helpers", 21),
        ("conntrack.helpers", ["ftp"]),
        ("owner", "a\nb"),
        ("owner", ["a"]),
    ],
)
def test_a_wrong_detail_is_named(detail: str, value: object) -> None:
    with pytest.raises(BadRequest) as refused:
        envelope(**{detail: value})
    assert str(refused.value).startswith(f"physical-network-extension-details.{detail}: ")


@pytest.mark.parametrize("detail", ["password", "sshkey"])
@pytest.mark.parametrize("value", ["hunter2" * 3000, "hunter2\0", ["hunter2"], {"hunter2": 1}, 7_200_000_001])
def test_a_wrong_secret_is_named_and_not_quoted(detail: str, value: object) -> None:
    with pytest.raises(BadRequest) as refused:
        envelope(**{detail: value})
    assert detail in str(refused.value)
    assert "hunter2" not in str(refused.value)
    assert "7200000001" not in str(refused.value)


def test_secrets_do_not_print() -> None:
    shown = repr(envelope(password="hunter2", sshkey="-----BEGIN KEY-----\nc2VjcmV0\n-----END KEY-----"))
    assert "hunter2" not in shown
    assert "c2VjcmV0" not in shown


def test_no_host_is_told_with_a_remedy() -> None:
    with pytest.raises(BadRequest, match=r"hosts is missing .*register"):
        envelope(hosts=" , ")


@pytest.mark.parametrize("file", [{}, {"payload": {}}, {"physical-network-extension-details": "x", "payload": {}}])
def test_missing_details_are_named(file: object) -> None:
    with pytest.raises(BadRequest, match="physical-network-extension-details: "):
        read_envelope(json.dumps(file).encode(), "implement-network")


@pytest.mark.parametrize("payload", [None, "", "x", [], 5])
def test_a_payload_that_is_not_an_object_is_refused(payload: object) -> None:
    file = {"physical-network-extension-details": PHYSICAL, "payload": payload}
    with pytest.raises(BadRequest, match="payload: "):
        read_envelope(json.dumps(file).encode(), "implement-network")


def test_underscore_spelling_of_both_details() -> None:
    file = {
        "physical_network_extension_details": PHYSICAL,
        "network_extension_details": {"host": "192.0.2.11", "namespace": "cs-net-204"},
        "payload": {"network_id": "204"},
    }
    told = read_envelope(json.dumps(file).encode(), "implement-network")
    assert told.details.candidates == ("192.0.2.11", "192.0.2.12")
    assert told.network_details == StoredDetails(host="192.0.2.11", namespace="cs-net-204")


def test_custom_action_is_flat_and_loses_both_details() -> None:
    file = {
        "network_id": "204",
        "action": "dump-config",
        "action-params": {"note": "", "x": "é"},
        "physical-network-extension-details": {**PHYSICAL, "password": "hunter2"},
        "network-extension-details": {"host": "192.0.2.11"},
    }
    told = read_envelope(json.dumps(file).encode(), "custom-action")
    assert told.payload == {
        "network_id": "204",
        "action": "dump-config",
        "action-params": {"note": "", "x": "é"},
    }


GARBAGE: list[object] = [
    "x",
    5,
    [],
    [1],
    {"host": 5},
    {"host": "-oProxyCommand=x"},
    {"host": "192.0.2.11", "epoch": -1},
    {"host": "192.0.2.11", "namespace": {"a": 1}},
    {"host": "192.0.2.11,192.0.2.12"},
    {"host": "192.0.2.11", "previous": "a b"},
]


@pytest.mark.parametrize("stored", GARBAGE)
def test_stored_garbage_is_unknown_and_no_failure(stored: object) -> None:
    assert envelope(stored=stored).network_details.host == ""
    assert parse_current_details(json.dumps(stored)).host == ""


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "null", "OK\n{}", '{"host": "a", "host": "b"}', "\ud800", "[" * 100_000]
)
def test_garbled_current_details_are_unknown(text: str) -> None:
    assert parse_current_details(text) == StoredDetails()


def test_current_details_as_we_print_them() -> None:
    text = '{"host":"192.0.2.12","namespace":"cs-vpc-7","vpc_id":"7","epoch":3,"previous":["192.0.2.11"]}'
    wanted = StoredDetails(host="192.0.2.12", namespace="cs-vpc-7", epoch=3, previous=("192.0.2.11",))
    assert parse_current_details(text) == wanted
    assert parse_current_details(text, "vpc-7") == wanted


def test_current_details_of_another_scope_are_unknown() -> None:
    assert parse_current_details('{"host":"192.0.2.12","namespace":"cs-net-9"}', "net-204") == StoredDetails()
    assert parse_current_details('{"host":"192.0.2.12","standby":"kvm2"}').standby == "kvm2"


@pytest.mark.parametrize(
    ("payload", "scope_id"),
    [
        ({"network_id": "204"}, "net-204"),
        ({"network_id": 204, "vpc_id": ""}, "net-204"),
        ({"network_id": "310", "vpc_id": "7"}, "vpc-7"),
        ({"vpc_id": "7"}, "vpc-7"),
    ],
)
def test_the_scope_of_a_payload(payload: object, scope_id: str) -> None:
    assert scope_id_of("assign-ip", load_object(json.dumps(payload).encode(), root="payload")) == scope_id


@pytest.mark.mutation("a-payload-names-its-scope")
def test_defect_55_a_missing_network_id_is_named() -> None:
    with pytest.raises(BadRequest, match=r"payload\.network_id is missing"):
        scope_id_of("assign-ip", {})
    with pytest.raises(BadRequest, match=r"payload\.network_id: '\.\./x' is not an id"):
        scope_id_of("assign-ip", {"network_id": "../x"})


@pytest.mark.mutation("a-payload-has-bounded-structures")
@pytest.mark.parametrize("many", [b"[" + b"{}," * 600_000 + b"{}]", b'{"a":' + b"[" * 300_000 + b"]" * 300_000 + b"}"])
def test_more_objects_than_a_network_can_have_are_refused(many: bytes) -> None:
    with pytest.raises(BadRequest, match=r"payload: more than 500000 objects and lists|nested too deeply"):
        load_object(b'{"x":' + many + b"}", root="payload")


@pytest.mark.mutation(
    "an-open-string-is-read-once", instead=r"""re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{\[]+', re.DOTALL)"""
)
def test_the_time_for_a_string_without_an_end_is_linear() -> None:
    """A search that began again at each quote took ten seconds for this text."""
    began = time.process_time()
    with pytest.raises(BadRequest, match="not JSON"):
        load_object(b'{"a":"' + b'\\"' * 2_000 + b"[" * 500_001, root="payload")
    assert time.process_time() - began < 3


def test_braces_in_user_data_are_not_counted() -> None:
    text = '{"[' * 600_000
    assert load_object(json.dumps({"userdata": text + '\\"'}).encode(), root="payload") == {"userdata": text + '\\"'}
