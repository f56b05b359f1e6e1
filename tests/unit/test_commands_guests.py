"""What VMs are given, as changes of a value: leases, names, metadata, passwords, and all of them in one restore."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from netloom.errors import BadRequest
from netloom.guestwire import GuestNic
from netloom.render.guest import tables
from netloom.secret import Secret
from netloom.state import Nic, Scope
from unit.payload_player import call, implement, network, play

WEB = "6b7c2a10-0000-4000-8000-000000005101"
DB = "6b7c2a10-0000-4000-8000-000000005102"
DUAL = "6b7c2a10-0000-4000-8000-000000005103"
FIRST_VM = ("030", "031", "032", "033", "034", "035")
ANOTHER: dict[str, Any] = {"nic_id": "5102", "nic_uuid": DB, "mac": "02:01:00:cc:00:04", "hostname": "win-db-1"}


def told(*fixtures: str, after: Scope | None = None) -> Scope:
    """The implemented network after these payload files."""
    scope = after or implement().scope
    for fixture in fixtures:
        scope = play(scope, fixture).scope
    assert scope is not None
    return scope


def nic(scope: Scope | None, key: str = WEB) -> Nic | None:
    assert scope is not None
    return scope.networks["204"].nics.get(key)


def served(scope: Scope | None, key: str = WEB) -> GuestNic:
    """What the guest process is told of a NIC."""
    assert scope is not None
    (table,) = tables(scope)
    return next(it for it in table.nics if it.nic == key)


def test_a_first_start_gives_all_there_is() -> None:
    scope = told(*FIRST_VM)
    known = nic(scope)
    assert known is not None
    assert (known.leased, known.named, known.password) == (True, True, Secret("FAKE-pass-4711"))
    assert known.metadata["local-hostname"] == "web-1"
    assert (scope.networks["204"].dhcp, scope.networks["204"].dns) == (True, True)


def test_a_stopped_vm_keeps_everything_and_a_later_start_brings_no_password_and_takes_none() -> None:
    scope = told(*FIRST_VM)
    assert told("100", after=scope) == scope
    again = nic(told("100", "030", "031", "032", "033", "034", "036", after=scope))
    before = nic(scope)
    assert again is not None and before is not None
    assert (again.password, again.password_serial) == (before.password, before.password_serial)


@pytest.mark.parametrize("name", [{"nic_uuid": WEB}, {"mac": "02:01:00:cc:00:03"}, {"nic_id": "5101"}], ids=str)
def test_a_removed_vm_loses_everything_however_barely_it_is_named(name: dict[str, Any]) -> None:
    scope = told(*FIRST_VM, "040")
    full = call(scope, "set-dhcp-options", nic_id="5101", options={"26": "1400"}).scope
    after = call(full, "remove-dhcp-entry", **name).scope
    assert nic(after) is None
    assert nic(after, DUAL) is not None
    assert network(call(after, "release-nic", nic_id="5101")).dhcp_options == {}
    assert call(after, "remove-dhcp-entry", **name).scope == after


def test_options_go_with_their_nic_also_when_it_was_never_known() -> None:
    early = call(told(*FIRST_VM), "set-dhcp-options", nic_id="5102", options={"26": "1400"}).scope
    assert network(call(early, "remove-dhcp-entry", nic_id="5102", mac=ANOTHER["mac"])).dhcp_options == {}
    own = call(early, "set-dhcp-options", nic_id="5101", options={"26": "1300"}).scope
    heir = call(own, "add-dhcp-entry", **ANOTHER, ip="10.10.1.45")  # the address of the first
    assert network(heir).dhcp_options == {"5102": {"26": "1400"}}
    assert call(None, "set-dhcp-options", nic_id="5101", options={}).scope is None


def test_a_name_can_go_without_the_lease() -> None:
    after = nic(told(*FIRST_VM, "102"))
    assert after is not None
    assert (after.named, after.leased, after.password) == (False, True, Secret("FAKE-pass-4711"))


@pytest.mark.parametrize("taken", [{"ip": "10.10.1.45"}, {"ip": "10.10.1.99", "mac": "02:01:00:cc:00:03"}], ids=str)
def test_who_is_given_the_address_or_the_mac_of_another_gets_nothing_else_of_its_own(taken: dict[str, Any]) -> None:
    after = call(told(*FIRST_VM), "add-dhcp-entry", **(ANOTHER | taken)).scope
    assert nic(after) is None
    heir = nic(after, DB)
    assert heir is not None
    assert (heir.metadata, heir.user_data, heir.password, heir.named) == ({}, None, None, False)


def test_options_may_come_before_the_nic_is_known_and_before_the_network_is() -> None:
    first = call(None, "set-dhcp-options", nic_id="5101", options={"26": "1400", "15": "early.example"}).scope
    scope = told("020", "030", "032", after=first)
    assert served(scope).options == {15: b"early.example", 26: (1400).to_bytes(2, "big")}
    assert served(call(scope, "set-dhcp-options", nic_id="5101", options={}).scope).options == {}
    with pytest.raises(BadRequest, match=r"payload\.options\.3: "):
        call(scope, "set-dhcp-options", nic_id="5101", options={"3": "no address"})
    with pytest.raises(BadRequest, match=r"payload\.options\.51: "):
        call(scope, "set-dhcp-options", nic_id="5101", options={"51": "4294967295"})


@pytest.mark.parametrize("order", [("031", "033"), ("033", "031"), ("034", "032"), ("032", "034")], ids="-".join)
def test_services_open_with_whatever_asks_first(order: tuple[str, ...]) -> None:
    scope = told(*order)
    assert (scope.networks["204"].dhcp, scope.networks["204"].dns) == (True, True)


def test_resets_change_what_they_are_about_and_nothing_else() -> None:
    before = nic(told(*FIRST_VM))
    after = nic(told(*FIRST_VM, "090", "091", "092", "093"))
    assert before is not None and after is not None
    assert after.password == Secret('FAKE-new-pass "9" <&>\'=')
    assert after.password_serial == before.password_serial + 1
    assert after.metadata["public-keys"].endswith("second@example.org")
    assert after.metadata.keys() - before.metadata.keys() <= {"hypervisor-host-name"}
    assert nic(told(*FIRST_VM, "090", "090")) == nic(told(*FIRST_VM, "090")), "told twice is one setting"


@pytest.mark.parametrize("text", ["", "\n", "no newline", "\n\nlines\r\n\n", "caf\u00e9 \U0001f600 \0 end"])
def test_user_data_is_kept_to_the_byte(text: str) -> None:
    after = call(told(*FIRST_VM), "save-userdata", nic_uuid=WEB, mac="02:01:00:cc:00:03", userdata=text).scope
    assert served(after).user_data == Secret(text)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a\\b", "..", ".", "", "a\0b", "x" * 300])
def test_items_with_hostile_names_are_left_out(name: str) -> None:
    bad = {"dir": "metadata", "file": name, "content": "x"}
    good = {"dir": "metadata", "file": "instance-id", "content": "i-1"}
    who: dict[str, Any] = {"nic_uuid": WEB, "mac": "02:01:00:cc:00:03", "ip": "10.10.1.45"}
    elsewhere = {**bad, "dir": name or "../metadata", "file": "vm-id"}
    saved = call(told(*FIRST_VM), "save-vm-data", **who, vm_data=[good, bad, elsewhere]).scope
    assert served(saved).metadata == {"instance-id": "i-1"}
    vms = [{**who, "vm_data": [bad, good]}]
    after = restore(told(*FIRST_VM), vms=vms)
    assert served(after).metadata == {"instance-id": "i-1"}


def restore(scope: Scope, *, vms: list[Any], **enabled: bool) -> Scope:
    services = {"dhcp_enabled": True, "dns_enabled": True, "userdata_enabled": True} | enabled
    after = call(scope, "restore-network", restore_data={**services, "vms": vms}).scope
    assert after is not None
    return after


def test_one_restore_gives_every_listed_vm_all_it_needs() -> None:
    scope = told("110")
    (table,) = tables(scope)
    assert [(it.ip, it.dhcp, it.hostname) for it in table.nics] == [
        ("10.10.1.45", True, "web-1"),
        ("10.10.1.162", True, "win-db-1"),
        ("10.10.1.77", True, "dual-1"),
    ]
    assert all(it.named for it in scope.networks["204"].nics.values())
    assert [it.metadata["local-ipv4"] for it in table.nics] == [it.ip for it in table.nics]
    assert not served(scope, DUAL).default_nic
    assert told("110", after=scope) == scope


@pytest.mark.mutation("a-restore-keeps-other-vms", instead="nics.__init__(replace(network, nics={}))")
def test_a_restore_leaves_other_vms_and_all_passwords_alone() -> None:
    other: dict[str, Any] = {
        "nic_id": "5109",
        "nic_uuid": "other",
        "mac": "02:01:00:cc:00:09",
        "ip": "10.10.1.9",
        "hostname": "o",
    }
    scope = told(*FIRST_VM)
    scope = call(scope, "add-dhcp-entry", **other).scope or scope
    scope = call(scope, "save-password", **other, password="theirs").scope or scope
    after = told("110", after=scope)
    assert nic(after, "other") == nic(scope, "other")
    kept, before = nic(after), nic(scope)
    assert kept is not None and before is not None
    assert (kept.password, kept.password_serial) == (before.password, before.password_serial)


def test_two_vms_that_have_changed_places_keep_what_they_had_in_a_restore() -> None:
    two = call(told(*FIRST_VM), "add-dhcp-entry", **ANOTHER, ip="10.10.1.162", ip6_address="fd00::162").scope
    two = call(two, "save-password", **ANOTHER, ip="10.10.1.162", password="theirs").scope
    two = call(two, "add-dhcp-entry", nic_uuid=WEB, mac="02:01:00:cc:00:03", ip6_address="fd00::45").scope
    assert two is not None
    before = {key: it.password for key, it in two.networks["204"].nics.items()}
    vms = [{"nic_uuid": WEB, "mac": "02:01:00:cc:00:03", "ip": "10.10.1.162", "ip6_address": "fd00::162"}]
    vms += [{"nic_uuid": DB, "mac": "02:01:00:cc:00:04", "ip": "10.10.1.45", "ip6_address": "fd00::45"}]
    after = restore(two, vms=vms)
    assert {key: it.password for key, it in after.networks["204"].nics.items()} == before
    assert (served(after).ip, served(after, DB).ip) == ("10.10.1.162", "10.10.1.45")


@pytest.mark.parametrize("service", ["dhcp", "dns", "userdata"])
def test_a_restore_leaves_services_alone_that_are_not_enabled(service: str) -> None:
    """As they were: neither begun where they were not, nor ended where they were."""
    vm: dict[str, Any] = {"nic_uuid": WEB, "mac": "02:01:00:cc:00:03", "ip": "10.10.1.45", "hostname": "web-1"}
    vm |= {"default_nic": True, "device_id": "0"}
    vm["vm_data"] = [{"dir": "metadata", "file": "instance-id", "content": "i-2"}]
    off = {f"{service}_enabled": False}
    bare = restore(told("030"), vms=[vm], **off)
    fresh = nic(bare)
    assert fresh is not None
    of_it = {"dhcp": fresh.leased, "dns": fresh.named, "userdata": bool(fresh.metadata)}
    assert of_it == {it: it != service for it in of_it}
    on = bare.networks["204"]
    assert (on.dhcp, on.dns) == (service != "dhcp", service != "dns")
    full = nic(restore(told(*FIRST_VM), vms=[vm], **off))
    before = nic(told(*FIRST_VM))
    assert full is not None and before is not None
    assert (full.leased, full.named) == (True, True)
    assert (full.metadata == before.metadata) == (service == "userdata")
    assert replace(full, metadata={}, user_data=None) == replace(before, metadata={}, user_data=None)


@pytest.mark.mutation("an-absent-default-nic-changes-nothing")
def test_a_call_without_default_nic_leaves_it_as_it_was() -> None:
    who: dict[str, Any] = {"nic_id": "5109", "nic_uuid": "other", "mac": "02:01:00:cc:00:09", "ip": "10.10.1.9"}
    scope = told("030")
    given: dict[str, Any]
    for given, default in (({}, True), ({"default_nic": "false"}, False), ({}, False), ({"default_nic": "true"}, True)):
        scope = call(scope, "add-dhcp-entry", **{**who, **given}).scope or scope
        found = nic(scope, "other")
        assert found is not None and found.default is default


@pytest.mark.mutation("a-changed-nic-shows-its-subnet-at-once")
def test_a_netmask_alone_shows_the_subnet_at_once() -> None:
    """The address comes from an earlier call."""
    who: dict[str, Any] = {"nic_uuid": "other", "mac": "02:01:00:cc:00:09"}
    scope = call(told("030"), "prepare-nic", **who, ip="10.10.1.9", netmask="255.255.255.0").scope
    wider = call(scope, "prepare-nic", **who, netmask="255.255.0.0")
    assert network(wider).cidr == "10.10.0.0/16"
    assert call(wider.scope, "prepare-nic", **who, netmask="255.255.0.0").scope == wider.scope


# --- a restore lists all VMs (docs/protocol.md, section 3)

ONE: dict[str, Any] = {"nic_uuid": "u-1", "mac": "02:01:00:cc:00:01", "ip": "10.10.1.11", "hostname": "web"}
TWO: dict[str, Any] = {"nic_uuid": "u-2", "mac": "02:01:00:cc:00:02", "ip": "10.10.1.12", "hostname": "db"}
ITEMS = [{"dir": "metadata", "file": "instance-id", "content": "i"}]


def deployed(*vms: dict[str, Any], after: Scope | None = None) -> Scope:
    """The network with these VMs, or ``after`` with them."""
    scope = after or implement().scope
    for vm in vms:
        named = {**vm, "nic_id": vm["nic_uuid"][2:], "netmask": "255.255.255.0", "default_nic": "true"}
        unnamed = {key: it for key, it in named.items() if key != "hostname"}
        scope = call(scope, "add-dhcp-entry", **named).scope
        scope = call(scope, "add-dns-entry", **named).scope
        items = [{**ITEMS[0], "content": f"i-{vm['nic_uuid']}"}]
        scope = call(scope, "save-vm-data", **unnamed, vm_data=items).scope
        scope = call(scope, "save-password", **unnamed, password="theirs").scope
    assert scope is not None
    return scope


def restarted(scope: Scope, *vms: dict[str, Any]) -> Scope:
    restarted = implement(scope).scope
    assert restarted is not None
    return restore(restarted, vms=[{**vm, "default_nic": True, "vm_data": ITEMS} for vm in vms])


@pytest.mark.mutation("a-restore-lists-all-vms")
def test_a_vm_that_was_expunged_while_the_host_was_dead_goes_at_the_restore() -> None:
    scope = restarted(deployed(ONE, TWO), ONE)
    assert [it.hostname for it in scope.networks["204"].nics.values()] == ["web"]
    (table,) = tables(scope)
    assert [it.mac for it in table.nics] == [ONE["mac"]]
    (gone,) = scope.networks["204"].unlisted.values()
    assert (gone.password, gone.user_data, gone.metadata) == (None, None, {})
    assert restarted(scope, ONE).networks["204"].unlisted == {}, "the next restart forgets it"


@pytest.mark.mutation("an-unlisted-nic-comes-back", instead="None")
@pytest.mark.parametrize("last", ["prepare-nic", "add-dhcp-entry", "add-dns-entry"])
@pytest.mark.parametrize("restart", ["before", "within", "after"])
def test_a_vm_that_is_being_deployed_during_a_restart_keeps_everything(last: str, restart: str) -> None:
    """``last``: the VM's command before the list was made. ``restart``: when implement-network and the restore came."""
    commands = ["prepare-nic", "add-dhcp-entry", "add-dns-entry", "save-vm-data"]
    two = {**TWO, "nic_id": "2", "netmask": "255.255.255.0", "default_nic": "true"}
    scope: Scope | None = deployed(ONE)
    for command in commands:
        more: dict[str, Any] = {"vm_data": [*ITEMS, {"dir": "password", "file": "vm_password", "content": "new"}]}
        if restart == "within" and command == last:
            scope = implement(scope).scope
        scope = call(scope, command, **two, **(more if command == "save-vm-data" else {})).scope
        assert scope is not None
        if command == last:
            if restart == "after":
                scope = implement(scope).scope
            assert scope is not None
            scope = restore(scope, vms=[{**ONE, "vm_data": ITEMS}])
    assert scope is not None
    nic = scope.networks["204"].nics["u-2"]
    assert (nic.leased, nic.named, nic.hostname, nic.metadata) == (True, True, "db", {"instance-id": "i"})
    assert nic.password == Secret("new")


@pytest.mark.mutation("a-list-may-be-old", instead="True")
@pytest.mark.parametrize("shared", ["ip", "mac"])
@pytest.mark.parametrize("lists", ["nobody", "the new one", "the expunged one"])
@pytest.mark.parametrize("done", range(4), ids="after {} commands".format)
def test_a_new_vm_with_the_address_of_an_expunged_one_gets_everything(done: int, lists: str, shared: str) -> None:
    """The list of the restore comes at any moment of the new VM's deployment, and may be older than this."""
    three: dict[str, Any] = {"nic_uuid": "u-3", "mac": "02:01:00:cc:00:03", "ip": "10.10.1.13", "hostname": "db"}
    three[shared] = TWO[shared]
    new = {**three, "nic_id": "3", "netmask": "255.255.255.0", "default_nic": "true"}
    items: dict[str, Any] = {"vm_data": [*ITEMS, {"dir": "password", "file": "vm_password", "content": "new"}]}
    scope = implement(deployed(ONE, TWO)).scope
    for at, command in enumerate(("prepare-nic", "add-dhcp-entry", "save-vm-data", "add-dns-entry")):
        if at == done:
            assert scope is not None
            more = {"nobody": [], "the new one": [three], "the expunged one": [TWO]}[lists]
            scope = restore(scope, vms=[{**vm, "vm_data": ITEMS} for vm in (ONE, *more)])
        scope = call(scope, command, **new, **(items if command == "save-vm-data" else {})).scope
    assert scope is not None
    nics = scope.networks["204"].nics
    assert set(nics) == {"u-1", "u-3"}
    assert (nics["u-3"].leased, nics["u-3"].named, nics["u-3"].password) == (True, True, Secret("new"))
    assert nics["u-1"].password == Secret("theirs")


@pytest.mark.mutation("fresh-nics-are-kept", instead="key not in listed and nic.ip")
def test_a_vm_that_stops_during_a_restart_keeps_everything() -> None:
    """CloudStack does not list a NIC while it is being released."""
    before = implement(deployed(ONE, TWO)).scope
    before = call(before, "release-nic", nic_uuid="u-2", mac=TWO["mac"]).scope
    assert before is not None
    assert restore(before, vms=[ONE]).networks["204"].nics["u-2"].password == Secret("theirs")


def test_a_restore_does_not_list_nics_with_ipv6_only() -> None:
    six: dict[str, Any] = {"nic_uuid": "u-6", "mac": "02:01:00:cc:00:06", "ip6_address": "fd00::6", "hostname": "six"}
    scope = call(deployed(ONE), "add-dns-entry", **six).scope
    assert scope is not None
    assert restarted(scope, ONE).networks["204"].nics["u-6"].named


@pytest.mark.parametrize(
    "vms",
    [
        [],
        [{**ONE, "nic_uuid": "not a word!"}, {**ONE, "mac": "nonsense"}],
        [ONE, {"nic_uuid": "u-9", "ip": "10.10.1.99", "hostname": "x"}],
        [ONE, None],
    ],
    ids=["empty", "unreadable", "without a MAC address", "no object"],
)
def test_an_incomplete_list_removes_no_vm(vms: list[Any]) -> None:
    settled = implement(deployed(ONE, TWO)).scope
    assert settled is not None
    assert set(restore(settled, vms=vms).networks["204"].nics) == {"u-1", "u-2"}


@pytest.mark.mutation("a-restore-takes-a-nic-once", instead="data.vms.items")
def test_a_restore_that_names_a_nic_twice_takes_the_first_and_can_be_repeated() -> None:
    twice = [{**ONE, "device_id": "1"}, {"nic_uuid": ONE["nic_uuid"], "device_id": "2"}]
    once = restore(deployed(), vms=twice)
    assert [it.device_id for it in once.networks["204"].nics.values()] == ["1"]
    assert restore(once, vms=twice) == once


def test_one_bad_host_name_fails_no_other_vm_and_is_told() -> None:
    settled = implement(deployed(TWO)).scope
    assert settled is not None
    scope = restore(settled, vms=[{**ONE, "hostname": "web_1"}, TWO])
    assert [(it.nic, it.dhcp) for it in tables(scope)[0].nics] == [("u-1", True), ("u-2", True)]
    assert [it.hostname for it in scope.networks["204"].nics.values() if it.named and it.hostname] == ["db"]
    assert "web_1" in str(scope.left_out["restore-network 204"])
    assert "restore-network 204" not in restore(scope, vms=[ONE, TWO]).left_out


@pytest.mark.mutation("a-name-told-anew-has-one-vm", instead="named")
@pytest.mark.parametrize("spelling", ["db", "DB"])  # the metadata of the new VM comes later
def test_a_new_vm_takes_its_name_from_an_expunged_one(spelling: str) -> None:
    new = {**TWO, "nic_uuid": "u-3", "mac": "02:01:00:cc:00:03", "ip": "10.10.1.13", "hostname": spelling}
    scope = call(deployed(ONE, TWO), "add-dns-entry", **new).scope
    assert scope is not None
    assert [it.hostname for it in scope.networks["204"].nics.values() if it.named] == ["web", spelling]
    listed = restore(deployed(TWO), vms=[{**new, "vm_data": [{**ITEMS[0], "content": "i-3"}]}])
    assert [it.ip for it in listed.networks["204"].nics.values() if it.named] == ["10.10.1.13"], "also by a restore"


def test_two_nics_of_one_vm_share_its_name() -> None:
    second = {**TWO, "nic_uuid": "u-3", "mac": "02:01:00:cc:00:03", "ip": "10.10.1.13", "device_id": "1"}
    scope: Scope | None = deployed(TWO)
    scope = call(scope, "add-dns-entry", **second).scope
    scope = call(scope, "save-vm-data", **second, vm_data=[{**ITEMS[0], "content": "i-u-2"}]).scope
    scope = call(scope, "add-dns-entry", **TWO, nic_id="2").scope
    assert scope is not None
    assert [it.ip for it in scope.networks["204"].nics.values() if it.named] == ["10.10.1.13", "10.10.1.12"]


@pytest.mark.mutation("an-empty-list-of-items-is-unknown", instead="with_items(nic, valid_items(items))")
@pytest.mark.parametrize("command", ["restore-network", "save-vm-data"])
def test_an_empty_list_of_metadata_keeps_the_known_items(command: str) -> None:
    scope = deployed(ONE)
    scope = call(scope, "save-userdata", **ONE, userdata="#cloud-config").scope or scope
    if command == "save-vm-data":
        after = call(scope, command, **ONE, vm_data=[]).scope
    else:
        after = restore(scope, vms=[{**ONE, "vm_data": []}])
    assert after is not None
    kept = after.networks["204"].nics["u-1"]
    assert (kept.metadata, kept.user_data) == ({"instance-id": "i-u-1"}, Secret("#cloud-config"))
