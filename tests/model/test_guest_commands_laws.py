"""Properties of the commands for VMs under random sequences: NICs, DHCP, DNS, data, passwords, load balancing."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from model.calls import IMPLEMENTS, NETWORK, PUBLIC, Call, carry_out, content, some, text
from netloom.render.guest import tables
from netloom.render.services import services
from netloom.secret import dec_hook
from netloom.state import Nic, Scope

# Few values, so that NICs often get the address or the MAC of another NIC. A few values are invalid.
WHO = [
    {**NETWORK, "nic_uuid": uuid, "mac": f"02:01:00:cc:00:0{mac}", "ip": f"10.10.1.{ip}", "nic_id": nic_id}
    for uuid, mac, ip, nic_id in product(("a", "b", ""), (3, 4), (45, 46), ("5101", "5102"))
]
STARTS = [
    {**who, "hostname": name, "default_nic": flag} for who, name, flag in product(WHO, ("x", "y"), ("true", "false"))
]
BARE = [*WHO, *({**NETWORK, "nic_id": it} for it in ("5101", "5102", "9"))]
ITEMS: list[list[dict[str, str]]] = [
    [],
    [{"dir": "metadata", "file": "instance-id", "content": "i-1"}],
    [{"dir": "userdata", "file": "user_data", "content": ""}],
    [{"dir": "password", "file": "vm_password", "content": "FAKE-1"}],
    [{"dir": "metadata", "file": "../x", "content": "x"}],
]
DATA = [{**who, "vm_data": items} for who, items in product(WHO, ITEMS)]
PASSWORDS = [{**who, "password": it} for who, it in product(WHO, ("FAKE-1", "FAKE-2"))]
TEXTS = [{**who, "userdata": it, "sshkey": it, "hypervisor_hostname": "h"} for who, it in product(WHO, ("", "text\n"))]
OPTIONS = [
    {**NETWORK, "nic_id": nic_id, "options": options}
    for nic_id, options in product(("5101", "5102"), ({}, {"26": "1400"}, {"15": "of.its.own"}, {"51": "1"}))
]
RESTORES = [
    {
        **NETWORK,
        "restore_data": {
            "dhcp_enabled": dhcp,
            "dns_enabled": dns,
            "userdata_enabled": data,
            "vms": [{**one, "vm_data": items}, other],
        },
    }
    for dhcp, dns, data, one, other, items in product(
        (True, False), (True, False), (True, False), STARTS[:6], STARTS[-6:], (ITEMS[1], ITEMS[2], ITEMS[4])
    )
]
BALANCED = [
    {**NETWORK, "lb_rules": [{"id": 1, **first}, {"id": 2, **first, "revoke": revoke, "publicPort": port}]}
    for first, revoke, port in product(
        [
            {"publicIp": ip, "publicPort": 80, "protocol": protocol, "backends": [{"ip": "10.10.1.45", "port": 80}]}
            for ip, protocol in product(("203.0.113.2", "203.0.113.20"), ("tcp", "udp", "tcp-proxy", "sctp"))
        ],
        (True, False),
        (80, 81, 0),
    )
]

gives = st.one_of(
    some(["prepare-nic", "release-nic", "add-dhcp-entry", "add-dns-entry"], STARTS),
    some(["config-dhcp-subnet", "config-dns-subnet"], STARTS),
    some(["save-vm-data"], DATA),
    some(["save-password"], PASSWORDS),
    some(["save-userdata", "save-sshkey", "save-hypervisor-hostname"], TEXTS),
    some(["set-dhcp-options"], OPTIONS),
    some(["restore-network"], RESTORES),
    some(["apply-lb-rules"], BALANCED),
)
takes = st.one_of(
    some(["remove-dhcp-entry", "remove-dns-entry"], BARE), some(["remove-dhcp-subnet", "remove-dns-subnet"], [NETWORK])
)
others = st.one_of(some(["implement-network"], IMPLEMENTS), some(["assign-ip"], PUBLIC))
calls = st.one_of(gives, gives, takes)
walks = st.lists(st.one_of(gives, gives, takes, others), max_size=20)


def walked(walk: list[Call]) -> Scope | None:
    scope: Scope | None = None
    for call in [("implement-network", IMPLEMENTS[0]), *walk]:
        scope = carry_out(scope, call)
    return scope


def nics(scope: Scope | None) -> dict[str, Nic]:
    return dict(scope.networks["204"].nics) if scope is not None else {}


@given(walks)
def test_any_sequence_of_calls_keeps_the_invariants_and_can_be_rendered(walk: list[Call]) -> None:
    scope: Scope | None = None
    for call in walk:
        before, before_text = scope, text(scope)
        scope = carry_out(before, call)
        assert text(before) == before_text, "the value before was changed in place"
        if scope is None:
            continue
        known = nics(scope)
        assert all(key == it.key for key, it in known.items())
        assert len({it.mac for it in known.values()}) == len(known)
        held = [it.ip for it in known.values() if it.ip]
        assert len(set(held)) == len(held)
        ports = [
            (it.public_ip, it.public_port, "udp" if it.protocol == "udp" else "tcp") for it in scope.lb_rules.values()
        ]
        assert len(set(ports)) == len(ports)
        assert all(".." not in name for it in known.values() for name in it.metadata)
        if before is not None:
            assert scope.revision == before.revision + (content(scope) != content(before))
        assert tables(scope) == tables(scope)
        assert len({it.name for it in services(scope)}) == len(services(scope))


@given(walks, calls)
def test_a_repeated_call_changes_nothing(walk: list[Call], call: Call) -> None:
    once = carry_out(walked(walk), call)
    assert carry_out(once, call) == once


@given(walks)
def test_a_state_is_the_same_after_it_was_written_and_read(walk: list[Call]) -> None:
    scope = walked(walk)
    back = msgspec.json.decode(text(scope), type=Scope | None, dec_hook=dec_hook)
    assert back == scope
    if scope is not None and back is not None:
        assert tables(back) == tables(scope)


@given(walks, some(["prepare-nic", "add-dhcp-entry", "add-dns-entry"], STARTS))
def test_adding_and_removing_a_nic_restores_the_nics(walk: list[Call], call: Call) -> None:
    before = walked(walk)
    asked = {**call[1], "nic_uuid": "new", "mac": "02:01:00:cc:00:99", "ip": "10.10.1.99", "nic_id": "5199"}
    asked |= {"hostname": "new"}
    after = carry_out(carry_out(before, (call[0], asked)), ("remove-dhcp-entry", asked))
    assert nics(after) == nics(before)


@given(walks, calls)
def test_a_command_for_one_vm_does_not_change_other_vms(walk: list[Call], call: Call) -> None:
    """Except for a VM that loses its address or its MAC to this VM: that NIC is removed completely.

    A VM that loses its name to this VM keeps the rest. A call may bring the metadata that tells two VMs of one name
    apart, without the name.
    """
    before, asked = walked(walk), call[1]
    after = carry_out(before, call)
    if "mac" not in asked:
        return
    names = {it.hostname for it in nics(after).values() if it.mac == asked["mac"] and it.named}
    for key, it in nics(before).items():
        if it.mac != asked["mac"] and key != asked["nic_uuid"]:
            now = nics(after).get(key, it)
            assert now == it or (now == replace(it, named=False) and it.hostname in names)
            assert key in nics(after) or it.ip == asked["ip"]


@given(walks, st.sampled_from(STARTS))
def test_release_nic_keeps_the_data_of_the_vm(walk: list[Call], asked: dict[str, Any]) -> None:
    before = walked(walk)
    after = carry_out(before, ("release-nic", asked))
    assert {key: replace(it, fresh=True) for key, it in nics(after).items()} == {
        key: replace(it, fresh=True) for key, it in nics(before).items()
    }


@given(walks, takes)
def test_a_repeated_removal_changes_nothing_and_creates_no_scope(walk: list[Call], call: Call) -> None:
    assert carry_out(None, call) is None
    once = carry_out(walked(walk), call)
    assert carry_out(once, call) == once


@given(walks, st.sampled_from(RESTORES))
def test_a_restore_removes_no_password_of_a_listed_vm_and_no_fresh_vm(walk: list[Call], asked: dict[str, Any]) -> None:
    before = walked(walk)
    after = carry_out(before, ("restore-network", asked))
    listed = asked["restore_data"]["vms"]
    addresses, macs = {it["ip"] for it in listed}, {it["mac"] for it in listed}
    for key, it in nics(before).items():
        if it.ip not in addresses and it.mac not in macs and key not in {vm["nic_uuid"] for vm in listed}:
            now = nics(after).get(key)
            assert now is None or replace(now, named=it.named) == it
            assert (now is not None) == (it.fresh or not it.ip or not listed)
        elif key in nics(after) and nics(after)[key].mac == it.mac:
            now = nics(after)[key]
            assert (now.password, now.password_serial) == (it.password, it.password_serial)
