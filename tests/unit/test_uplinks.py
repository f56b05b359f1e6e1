"""A registered device that is a bridge: the NIC that carries its VLANs, as CloudStack's KVM agent finds it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from netloom import names
from netloom.errors import HostRefused
from netloom.plan.have import Have, HostLink
from netloom.plan.plan import plan
from netloom.plan.steps import AttachPort
from netloom.plan.uplinks import follow, is_nic_name
from netloom.render.want import Port, Segment, Want

# The names in LibvirtComputingResource.java, each with what really follows it, and ports that are no NICs.
NICS = (
    "eth1 eth1.100 bond0 bond0.100 vlan100 vx5 em1 ens3 ens1f0np0 eno1 enp3s0f1 team0 enx0a1b2c dummy0 lo p1p2 p10p1_1"
)
OTHERS = "vnet7 vnetg204 vnetpn204.101 veth0 tap0 virbr0-nic wlan0 usb0 enP2p1s0 px1p1 p1 pp1p1 xeth1 fwpr100p0"


@pytest.mark.mutation("ports-are-nics-by-the-agents-names")
def test_nics_have_the_names_that_the_kvm_agent_knows() -> None:
    assert [name for name in (NICS + " " + OTHERS).split() if is_nic_name(name)] == NICS.split()


def want(vlan: str = "101", kind: str = "vlan") -> Want:
    segment = Segment(
        bridge=names.vxlan_bridge(vlan) if kind == "vxlan" else names.bridge("cloudbr1", vlan),
        nic="cloudbr1",
        vlan=vlan,
        vlan_link="" if vlan == "untagged" else names.vlan_link("cloudbr1", vlan),
        kind="vxlan" if kind == "vxlan" else "vlan",
    )
    return Want(namespace="cs-net-7", ports=(Port(link="gst-7", host_link="vnetg7", mac="0a:1", segment=segment),))


def host(*links: HostLink) -> dict[str, HostLink]:
    """These links, and the bridge cloudbr1; each bridge has its ports."""
    found = (HostLink(name="cloudbr1", kind="bridge", up=True), *links)
    return {it.name: replace(it, ports=tuple(p.name for p in found if p.master == it.name)) for it in found}


def port(name: str, master: str = "cloudbr1", **more: object) -> HostLink:
    return replace(HostLink(name=name, up=True, master=master), **more)


def segment(want: Want) -> Segment:
    return want.ports[0].segment


@pytest.mark.parametrize(
    ("links", "nic"),
    [
        ([port("eth1")], "eth1"),
        ([port("eth1"), port("vnet7", kind="tun"), port("veth3", kind="veth")], "eth1"),
        ([port("bond0", kind="bond"), HostLink(name="eth1", master="bond0")], "bond0"),
        ([port("bond0.100", kind="vlan", parent="bond0", vlan_id=100)], "bond0"),
        ([port("vlan100", kind="vlan", parent="enp3s0", vlan_id=100), port("enp3s0")], "enp3s0"),
    ],
)
def test_a_bridge_is_followed_to_the_nic_below_it(links: list[HostLink], nic: str) -> None:
    found = segment(follow(want(), host(*links)))
    assert (found.nic, found.bridge, found.vlan_link) == (nic, f"br{nic}-101", f"{nic}.101")


@pytest.mark.parametrize(
    ("links", "told"),
    [
        ([], "bridge cloudbr1 has no NIC (it has no ports), so it is open which NIC carries VLAN 101"),
        ([port("vnet7"), port("lan0")], "bridge cloudbr1 has no NIC (its ports: vnet7, lan0), so"),
        ([port("eth2"), port("eth1"), port("vnet7")], "bridge cloudbr1 has 2 NICs (eth1, eth2), so"),
    ],
)
def test_a_bridge_without_one_nic_is_refused_with_its_ports_and_the_remedy(links: list[HostLink], told: str) -> None:
    with pytest.raises(HostRefused) as refused:
        follow(want(), host(*links))
    assert refused.value.message.startswith(told)
    assert refused.value.hint == "name the NIC itself in guest.network.device"
    for stays in ("eth1", "cloudbr1"):
        ours = HostLink(name="vnetg7", kind="veth", master=f"br{stays}-101")
        bridge = HostLink(name=f"br{stays}-101", kind="bridge")
        assert segment(follow(want(), host(*links, ours, bridge))).bridge == f"br{stays}-101"


@pytest.mark.parametrize("it", [want("untagged"), want("5001", "vxlan")])
def test_untagged_networks_and_tunnels_use_the_bridge_itself(it: Want) -> None:
    assert follow(it, host(port("eth1"))) is it


def test_a_device_that_is_no_bridge_is_used_as_it_is() -> None:
    assert follow(want(), {"cloudbr1": HostLink(name="cloudbr1")}) == want()
    assert follow(want(), {}) == want()


# Earlier versions, and a KVM agent that was started before the bridge, put the VLAN above the bridge.
ABOVE = (
    port("eth1"),
    HostLink(name="cloudbr1.101", kind="vlan", parent="cloudbr1", vlan_id=101, up=True, master="brcloudbr1-101"),
    HostLink(name="brcloudbr1-101", kind="bridge", up=True, alias="netloom carries cloudbr1.101"),
    HostLink(name="vnetg8", kind="veth", alias="netloom net-8", up=True, master="brcloudbr1-101"),
)
VM = HostLink(name="vnet7", kind="tun", up=True, master="brcloudbr1-101")
TAKEN = HostLink(name="eth1.101", kind="vlan", parent="eth1", vlan_id=101, up=True, master="breth1-101")


@pytest.mark.mutation("vms-above-a-label-keep-their-wire")
@pytest.mark.parametrize(
    ("more", "stays"), [([VM], True), ([], False), ([VM, TAKEN], False), ([VM, replace(TAKEN, name="v101")], False)]
)
def test_the_vlan_stays_above_the_bridge_while_a_vm_is_there_and_receives(more: list[HostLink], stays: bool) -> None:
    found = segment(follow(want(), host(*ABOVE, *more)))
    device, other = ("cloudbr1", "eth1") if stays else ("eth1", "cloudbr1")
    assert (found.bridge, found.besides) == (f"br{device}-101", other)


@pytest.mark.mutation("vms-above-a-label-move-to-the-nic")
def test_ports_above_the_bridge_move_to_the_nic_where_the_frames_are() -> None:
    links = host(*ABOVE, VM, TAKEN, HostLink(name="breth1-101", kind="bridge", up=True))
    have = Have(scope_id="net-7", namespace="cs-net-7", host_links=links)
    moved = [it for it in plan(have, follow(want(), links)) if isinstance(it, AttachPort)]
    assert moved == [AttachPort("vnet7", "breth1-101"), AttachPort("vnetg8", "breth1-101")]
    kept = follow(want(), host(*ABOVE, VM))
    have = replace(have, host_links=host(*ABOVE, VM))
    assert not [it for it in plan(have, kept) if isinstance(it, AttachPort)]
