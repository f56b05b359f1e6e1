"""Laws of the commands, held against random walks: whatever came before, in whatever order."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from model.calls import (
    GUESTS,
    IMPLEMENTS,
    NETWORK,
    PORTS,
    PUBLIC,
    Call,
    carry_out,
    content,
    some,
    text,
)
from netloom.commands import TABLE, Context, apply, check_payload, decode
from netloom.errors import NetloomError
from netloom.protocol.envelope import parse_current_details, read_envelope, scope_id_of
from netloom.render.guest import tables
from netloom.render.services import same_services, services
from netloom.secret import dec_hook
from netloom.state import Pbr, PortForward, Scope
from netloom.wire import Registration

PAYLOADS = Path(__file__).parents[1] / "payloads"


EMPTY = {"default_egress_allow": True, "rules": []}

STATIC_NATS = [{**public, "private_ip": guest} for public, guest in product(PUBLIC, GUESTS)]
FORWARDS = [
    {**static, "public_port": ports, "private_port": private, "protocol": protocol}
    for static, ports, private, protocol in product(
        STATIC_NATS, PORTS, ("22", "22", "8080-8090"), ("tcp", "tcp", "udp")
    )
]
RULES = [
    {"id": 1, "type": "ingress", "protocol": "tcp", "portStart": 22, "publicIp": "203.0.113.2"},
    {"id": 2, "type": "egress", "protocol": "icmp", "icmpType": -1, "sourceCidrs": ["10.10.1.0/24", "0.0.0.0/0"]},
    {"id": 2, "type": "egress", "protocol": "all"},
    {"id": 3, "type": "egress", "protocol": "udp", "portStart": 53, "portEnd": 60},
]
FIREWALLS = [
    {**NETWORK, "fw_rules": {"default_egress_allow": allow, "rules": list(rules)}}
    for allow, count in product((True, False), range(len(RULES) + 1))
    for rules in permutations(RULES, count)
] + [{**NETWORK, "fw_rules": {**EMPTY, "rules": [{**RULES[0], "portStart": 99999}]}}]
ROUTES = (
    "blackhole 192.0.2.0/24",
    "unreachable default",
    "default via 203.0.113.1",
    "default via 203.0.113.9 dev pub-101",
    "192.0.2.0/24 dev gst-204",
    "10.0.0.0/8 dev pub-102 src 203.0.113.2",
    "default via 203.0.113.2 dev eth0",
)
MARKED = ("to 192.0.2.0/24", "from all", "from 10.10.1.4 iif gst-204", "to 192.0.2.0/24 priority 10001", "fwmark 1")
TABLES: tuple[dict[str, str], ...] = (
    {"table-id": "100"},
    {"table-name": "a"},
    {"table-id": "100", "table-name": "a"},
    {"table": "b"},
    {"id": "101"},
)
POLICIES: dict[str, list[dict[str, Any]]] = {
    what: [
        {**NETWORK, "action-params": {**table, param: text}}
        for table, (param, text) in product(TABLES, [("note", "")] if what == "table" else [(what, it) for it in texts])
    ]
    for what, texts in (("table", ()), ("route", ROUTES), ("rule", MARKED))
}


def policy(verb: str, what: str) -> st.SearchStrategy[Call]:
    named = [{**it, "action": f"pbr-{verb}-{what}"} for it in POLICIES[what]]
    return some(["custom-action"], named)


deletes = st.one_of(
    some(["release-ip"], PUBLIC),
    some(["delete-static-nat"], STATIC_NATS),
    some(["delete-port-forward"], FORWARDS),
    policy("delete", "table"),
    policy("delete", "route"),
    policy("delete", "rule"),
)
changes = st.one_of(
    some(["implement-network"], IMPLEMENTS),
    some(["assign-ip", "assign-ip", "release-ip"], PUBLIC),
    some(["add-static-nat", "add-static-nat", "delete-static-nat"], STATIC_NATS),
    some(["add-port-forward", "add-port-forward", "delete-port-forward"], FORWARDS),
    some(["apply-fw-rules"], FIREWALLS),
    policy("create", "table") | policy("add", "route") | policy("add", "rule"),
    policy("delete", "route") | policy("delete", "rule") | policy("delete", "table"),
)
ends = some(["shutdown-network", "destroy-network"], [NETWORK])
calls = st.one_of(changes, changes, ends)
# A walk ends the network once at most: else none gets far.
walks = st.builds(
    lambda one, end, other: [*one, *end, *other],
    st.lists(changes, max_size=10),
    st.lists(ends, max_size=1),
    st.lists(changes, min_size=5, max_size=20),
)


def walked(walk: list[Call]) -> Scope | None:
    scope: Scope | None = None
    for call in walk:
        scope = carry_out(scope, call)
    return scope


def check_invariants(scope: Scope) -> None:
    held = scope.public_ips
    assert sum(it.source_nat for it in held.values()) <= 1
    assert {it.public_ip for it in scope.static_nats.values()} <= held.keys()
    assert {it.public_ip for it in scope.port_forwards.values()} <= held.keys()
    exits = {(it.vlan, it.gateway): it.exit for it in held.values()}
    assert all(exits[it.vlan, it.gateway] == it.exit for it in held.values())
    assert len(set(exits.values())) == len(exits)
    assert all(1 <= number <= 0xFFFF for number in exits.values())
    assert all(key == it.address for key, it in held.items())
    assert all(key == it.public_ip for key, it in scope.static_nats.items())
    assert all(key == it.key for key, it in scope.port_forwards.items())
    assert all(key == it.network_id for key, it in scope.networks.items())
    guests = [it.private_ip for it in scope.static_nats.values()]
    assert len(set(guests)) == len(guests)
    taken = [
        (it.public_ip, it.protocol, port)
        for it in scope.port_forwards.values()
        for port in range(it.public_ports.first, it.public_ports.last + 1)
    ]
    assert len(set(taken)) == len(taken)
    check_policy(scope.pbr)
    for it in scope.networks.values():
        assert not it.implemented or (it.vlan and it.cidr and it.gateway)


def check_policy(pbr: Pbr) -> None:
    numbers = [it.number for it in pbr.tables]
    assert numbers == sorted(set(numbers))
    assert all(1 <= it < 20000 and it not in (253, 254, 255) for it in numbers)
    assert len({it.name for it in pbr.tables}) == len(numbers)
    assert {it.table for it in pbr.routes} | {it.table for it in pbr.rules} <= set(numbers)
    assert len({(it.table, it.destination) for it in pbr.routes}) == len(pbr.routes)
    priorities = [it.priority for it in pbr.rules]
    assert priorities == sorted(set(priorities))
    assert all(10000 <= it < 20000 for it in priorities)


@given(walks)
def test_any_sequence_of_calls_keeps_the_invariants_and_each_change_raises_the_revision(walk: list[Call]) -> None:
    scope: Scope | None = None
    for call in walk:
        before, before_text = scope, text(scope)
        scope = carry_out(before, call)
        assert text(before) == before_text, "the call changed the previous state in place"
        if scope is None:
            continue
        check_invariants(scope)
        if before is None:
            assert scope.revision == 1
        elif content(scope) == content(before):
            assert scope == before
        else:
            assert scope.revision == before.revision + 1
    event(f"ends with {len(scope.public_ips) if scope else 'no'} addresses")


@given(walks, calls)
def test_a_repeated_call_changes_nothing_and_keeps_the_revision(walk: list[Call], call: Call) -> None:
    once = carry_out(walked(walk), call)
    assert carry_out(once, call) == once


@given(walks, st.lists(changes, min_size=3, max_size=10))
def test_states_that_are_said_to_have_the_same_services_have_them(walk: list[Call], more: list[Call]) -> None:
    before = walked(walk)
    for call in more:
        after = carry_out(before, call)
        if before is not None and after is not None and same_services(before, after):
            assert (services(after), tables(after)) == (services(before), tables(before))
            event("the same services" if after == before else "the same services of other states")
        before = after


@given(walks)
def test_a_state_is_the_same_after_it_was_written_and_read(walk: list[Call]) -> None:
    scope = walked(walk)
    assert msgspec.json.decode(text(scope), type=Scope | None, dec_hook=dec_hook) == scope


@given(walks, calls)
def test_the_exit_of_an_address_keeps_its_number(walk: list[Call], call: Call) -> None:
    before = walked(walk)
    after = carry_out(before, call)
    if before is None or after is None:
        return
    for address, held in before.public_ips.items():
        now = after.public_ips.get(address)
        if now is not None and (now.vlan, now.gateway) == (held.vlan, held.gateway):
            assert now.exit == held.exit


@given(walks, st.sampled_from(PUBLIC))
def test_assign_ip_and_release_ip_leave_the_state_as_it_was(walk: list[Call], asked: dict[str, Any]) -> None:
    before = carry_out(walked(walk), ("apply-fw-rules", {**NETWORK, "fw_rules": EMPTY}))
    assert before is not None
    asked = {**asked, "source_nat": "false"}  # the source-NAT role passes from one address to the other and not back
    if asked["public_ip"] not in before.public_ips:
        after = carry_out(carry_out(before, ("assign-ip", asked)), ("release-ip", asked))
        assert content(after) == content(before)


@given(walks, st.sampled_from(STATIC_NATS))
def test_adding_and_deleting_a_static_nat_leaves_the_state_as_it_was(walk: list[Call], asked: dict[str, Any]) -> None:
    before = carry_out(walked(walk), ("assign-ip", asked))
    assert before is not None
    taken = {it.private_ip for it in before.static_nats.values()}
    if asked["public_ip"] not in before.static_nats and asked["private_ip"] not in taken:
        after = carry_out(carry_out(before, ("add-static-nat", asked)), ("delete-static-nat", asked))
        assert content(after) == content(before)


@given(walks, st.sampled_from(FORWARDS))
def test_adding_and_deleting_a_forward_leaves_the_state_as_it_was(walk: list[Call], asked: dict[str, Any]) -> None:
    before = carry_out(walked(walk), ("assign-ip", asked))
    assert before is not None
    ports = asked["public_port"].replace(":", "-")
    if f"{asked['public_ip']}/{asked['protocol']}/{ports}" not in before.port_forwards:
        after = carry_out(carry_out(before, ("add-port-forward", asked)), ("delete-port-forward", asked))
        assert content(after) == content(before)


@given(walks, st.sampled_from(["table", "route", "rule"]).flatmap(lambda it: policy("delete", it)))
def test_adding_and_deleting_policy_routing_leaves_the_state_as_it_was(walk: list[Call], gone: Call) -> None:
    before, asked = walked(walk), gone[1]
    what = asked["action"].rpartition("-")[2]
    made = {**asked, "action": f"pbr-create-{what}" if what == "table" else f"pbr-add-{what}"}
    added = carry_out(before, ("custom-action", made))
    if added != before:
        assert content(carry_out(added, gone)) == content(before)


@given(walks, st.one_of(deletes, ends))
def test_a_repeated_deletion_changes_nothing(walk: list[Call], call: Call) -> None:
    assert carry_out(None, call) is None
    once = carry_out(walked(walk), call)
    again = carry_out(once, call)
    assert again == once


@given(walks)
def test_destroy_network_removes_the_whole_state(walk: list[Call]) -> None:
    assert carry_out(walked(walk), ("destroy-network", {**NETWORK, "vlan": "", "network_state": "allocated"})) is None


@given(walks, st.one_of(changes, deletes, deletes))
def test_a_call_about_one_address_keeps_the_rules_of_the_others(walk: list[Call], one: Call) -> None:
    """A call about one address changes nothing of the other addresses, except the source-NAT role."""
    before = walked(walk)
    after = carry_out(before, one)
    if before is None or after is None or "public_ip" not in one[1]:
        return
    address = one[1]["public_ip"]

    def of_others(scope: Scope) -> list[PortForward]:
        return sorted((it for it in scope.port_forwards.values() if it.public_ip != address), key=lambda it: it.key)

    assert of_others(after) == of_others(before)
    for key, held in before.public_ips.items():
        if key != address and not held.source_nat and held.network_id:
            assert after.public_ips[key] == held


# Any bytes, and any honest payload with a value of its own put somewhere into it.

commands = st.sampled_from(sorted(TABLE))
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=20),
        st.sampled_from(["", "../x", "-o", "\x00", "a\nb", "١", "9" * 5000, "x" * 100_000, "0.0.0.0/0", "1-70000"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
FILES: list[tuple[str, dict[str, Any]]] = [
    (row["command"], json.loads((PAYLOADS / row["file"]).read_text()))
    for row in json.loads((PAYLOADS / "index.json").read_text())
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value inside ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, it in inner for place in places(it, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: put(value[path[0]], path[1:], new)}
    return [put(it, path[1:], new) if index == path[0] else it for index, it in enumerate(value)]


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, bytes]:
    command, file = draw(st.sampled_from(FILES))
    for _ in range(draw(st.integers(1, 2))):
        file = put(file, draw(st.sampled_from(places(file))), draw(values))
    data = json.dumps(file, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return command, data


def refusal(deed: Callable[[], object]) -> str:
    """The one line by which ``deed`` was refused; empty when it was done. Anything but a NetloomError is a bug."""
    try:
        deed()
    except NetloomError as refused:
        event(type(refused).__name__)
        return str(refused)
    event("done")
    return ""


def check_line(line: str) -> None:
    assert "\n" not in line
    assert line.isascii()
    assert len(line) < 400


def swallow(command: str, data: bytes) -> None:
    """Read a file and carry it out on nothing, as far as it lets itself."""
    envelope = read_envelope(data, command)
    scope_id = scope_id_of(command, envelope.payload)
    asked = check_payload(command, envelope.payload)
    scope = apply(command, None, asked, Context(scope_id=scope_id, registration=Registration(owner="zone-a"))).scope
    assert msgspec.json.decode(text(scope), type=Scope | None, dec_hook=dec_hook) == scope


@settings(max_examples=400)
@given(spoilt())
def test_any_file_is_carried_out_or_refused_in_one_line(file: tuple[str, bytes]) -> None:
    check_line(refusal(lambda: swallow(*file)))


@given(commands, st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(command: str, data: bytes) -> None:
    check_line(refusal(lambda: swallow(command, data)))
    check_line(refusal(lambda: decode(command, data)))
    parse_current_details(data.decode("utf-8", "surrogateescape"))


@settings(max_examples=300)
@given(commands, st.dictionaries(st.sampled_from(["network_id", "vpc_id", "vlan", "cidr", "options", "x"]), values))
def test_any_json_is_refused_or_read(command: str, payload: dict[str, Any]) -> None:
    check_line(refusal(lambda: decode(command, json.dumps(payload).encode())))


@given(st.text())
def test_current_details_are_never_a_failure(told: str) -> None:
    parse_current_details(told)
    parse_current_details(json.dumps({"host": told, "namespace": told, "epoch": told, "previous": told}))
