"""Names on a host fit the kernel's limit, are unique, and stay as other programs expect them."""

from __future__ import annotations

from itertools import combinations

import pytest

from netloom import names

IDS = ["1", "7", "77", "204", "1234567", "12345678", "305419896", "9999999999"]
TAGS = ["1", "12", "120", "1204", "4094", "16777215"]


def test_names_used_by_other_programs_are_fixed() -> None:
    assert names.namespace(names.scope_of("204", "")) == "cs-net-204"
    assert names.namespace(names.scope_of("310", "7")) == "cs-vpc-7"
    assert (names.bridge("eth1", "1204"), names.vlan_link("eth1", "1204")) == ("breth1-1204", "eth1.1204")


def test_the_carrier_of_a_bridge_is_read_from_the_name_that_the_kvm_agent_gives_it() -> None:
    assert names.carrier_of("breth1-1204") == "eth1.1204"
    assert names.carrier_of("brbond0.5-7") == "bond0.5.7"
    assert names.carrier_of("brvx-5001") == "vxlan5001"
    for other in (
        "cloudbr0",
        "br0",
        "br-lan",
        "virbr0",
        "breth1-x",
        "eth1-1204",
        names.bridge("enp130s0f1np1", "1204"),
    ):
        assert names.carrier_of(other) == ""


@pytest.mark.mutation("a-long-link-name-is-hashed", instead="True")
@pytest.mark.parametrize("nic", ["eth1", "enp129s0f0", "enx0123456789ab"])
@pytest.mark.parametrize("tag", [*TAGS[:5], names.UNTAGGED])
def test_defect_45_long_names_of_nics_and_long_ids_fit(nic: str, tag: str) -> None:
    made = [names.bridge(nic, tag), names.vlan_link(nic, tag)]
    made += [names.guest_port(it) for it in IDS]
    made += [names.public_port(scope, tag) for it in IDS for scope in (f"net-{it}", f"vpc-{it}")]
    assert [it for it in made if len(it) > names.LINK_NAME_MAX] == []


@pytest.mark.mutation("a-host-port-has-every-digit", instead='f"vnetp{digits}"[:9]')
def test_defect_46_no_two_networks_share_a_name() -> None:
    """The reference extension truncated the names of networks 1234567 and 305419896 on VLAN 4094 to the same name."""
    guests = [names.guest_port(it) for it in IDS]
    publics = [names.public_port(f"{kind}-{it}", tag) for kind in ("net", "vpc") for it in IDS for tag in TAGS]
    inside = [names.guest_link(it) for it in IDS] + [names.public_link(tag) for tag in TAGS]
    assert [pair for pair in combinations(guests + publics, 2) if pair[0] == pair[1]] == []
    assert len(set(inside)) == len(inside)


def test_the_kvm_agent_keeps_a_bridge_with_our_port() -> None:
    """The KVM agent keeps a bridge that has a port with ``vnet`` in its name. It treats ``vxlan`` ports differently."""
    ports = [names.guest_port(it) for it in IDS] + [names.public_port(f"net-{it}", tag) for it in IDS for tag in TAGS]
    assert all("vnet" in it and "vxlan" not in it for it in ports)
    assert not any(it.removeprefix("vnet").isdigit() for it in ports), "libvirt's own numbering"
