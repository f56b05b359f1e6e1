"""Kernel events that deviate from the desired state of a scope."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from netloom.agent.host.watcher import deviation
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.neighbours import NeighbourRow
from netloom.agent.kernel.routes import RouteRow
from netloom.agent.kernel.watch import Event, Kind
from netloom.names import guest_link
from netloom.netobjects import Address, Neighbour, Rule
from netloom.render.scope import render
from netloom.render.want import Want
from netloom.state import Nic, Scope
from unit.scopes import A1, B1, wish

MAC = "02:01:00:cc:00:03"


def scope() -> Scope:
    plain = wish(held=(A1, B1))
    network = replace(plain.networks["204"], nics={"u1": Nic(mac=MAC, nic_uuid="u1", ip="10.1.1.11")})
    return replace(plain, networks={"204": network})


WANT = render(scope())


def link(name: str, mac: str, kind: str = "veth") -> Link:
    return Link(
        index=7,
        name=name,
        kind=kind,
        mac=mac,
        up=True,
        master_index=None,
        mtu=1500,
        alias="",
        vlan_id=None,
        parent_index=9,
        peer_netns=0,
        running=True,
    )


def address(at: str, cidr: str) -> AddressRow:
    return AddressRow(address=Address(link=at, cidr=cidr), link_local=False, scope="global")


def neighbour(at: str, ip: str, mac: str, *, permanent: bool = True) -> NeighbourRow:
    return NeighbourRow(neighbour=Neighbour(link=at, address=ip, mac=mac), permanent=permanent)


def wished() -> list[Event]:
    """The kernel's events while the network is created."""
    rows: list[tuple[Kind, Link | AddressRow | RouteRow | Rule | NeighbourRow]] = []
    rows += [("link", link(it.link, it.mac)) for it in WANT.ports]
    rows += [("address", address(it.link, it.cidr)) for it in WANT.addresses]
    rows += [("route", RouteRow(route=it, protocol="static", scope="link", metric=0)) for it in WANT.routes]
    rows += [("rule", it) for it in WANT.rules]
    rows += [("neighbour", NeighbourRow(neighbour=it, permanent=True)) for it in WANT.neighbours]
    return [Event(kind=kind, row=row) for kind, row in rows]


@pytest.mark.parametrize("event", wished(), ids=lambda it: f"{it.kind}-{getattr(it.row, 'name', '')}")
def test_a_wanted_object_is_no_deviation_but_its_removal_is(event: Event) -> None:
    assert deviation(WANT, event) == ""
    assert deviation(WANT, replace(event, gone=True)) != ""
    assert deviation(Want(namespace=""), replace(event, gone=True)) == ""


GUEST = guest_link("204")
STRANGE = [
    Event(kind="overrun"),
    Event(kind="link", row=replace(link(GUEST, WANT.ports[0].mac), up=False)),
    Event(kind="link", row=link(GUEST, "02:00:00:00:00:99")),
    Event(kind="link", row=link("veth7", MAC)),
    Event(kind="address", row=address(GUEST, "203.0.113.99/32")),
    Event(kind="rule", row=Rule(priority=99, mark=1, mask=1, table=99)),
    Event(kind="neighbour", row=neighbour(GUEST, "10.1.1.11", "02:00:00:00:00:99")),
    Event(kind="neighbour", row=neighbour(GUEST, "10.1.1.11", MAC, permanent=False)),
    Event(kind="neighbour", row=neighbour(GUEST, "10.1.1.99", MAC)),
]
COMMON = [
    Event(kind="link", row=link("tunl0", "", kind="ipip")),
    Event(kind="link", gone=True, row=link("veth7", MAC)),
    Event(kind="address", row=address(GUEST, "fe80::1/64")),
    Event(kind="address", row=address("lo", "127.0.0.1/8")),
    Event(kind="rule", row=Rule(priority=32766, mark=0, mask=0, table=254)),
    Event(kind="neighbour", row=neighbour("pub-101", "203.0.113.1", MAC, permanent=False)),
    Event(kind="neighbour", gone=True, row=neighbour(GUEST, "10.1.1.99", MAC)),
]


@pytest.mark.parametrize("event", STRANGE, ids=range(len(STRANGE)))
def test_an_unwanted_object_or_change_is_a_deviation(event: Event) -> None:
    assert deviation(WANT, event) != ""


@pytest.mark.parametrize("event", COMMON, ids=range(len(COMMON)))
def test_unrelated_events_are_ignored(event: Event) -> None:
    assert deviation(WANT, event) == ""
