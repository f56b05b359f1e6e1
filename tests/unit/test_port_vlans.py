"""On which uplinks, and with which tag, a scope's segment leaves a bridge. This kernel may lack VLAN filtering."""

from __future__ import annotations

import struct
from typing import cast

import pytest

from netloom.agent.host.occupied import wires
from netloom.agent.kernel.arp_probe import Wire
from netloom.agent.kernel.bridge_vlans import PortVlans, list_port_vlans
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.netlink import Message, Socket, attribute, u32

_AF_BRIDGE, _RTM_NEWLINK = 7, 16
_IFLA_MASTER, _IFLA_AF_SPEC, _IFLA_BRIDGE_VLAN_INFO = 10, 26, 2  # if_link.h, if_bridge.h
_PVID, _UNTAGGED = 2, 4
END = "vnetpn520.101"


class Listed:
    """A socket whose every listing has these ports of bridges: index, index of the bridge, flags and VLAN."""

    def __init__(self, *ports: tuple[int, int, list[tuple[int, int]]]) -> None:
        self._ports = ports

    def dump(self, message: Message) -> list[tuple[int, bytes]]:
        assert message.payload[0] == _AF_BRIDGE
        return [
            (
                _RTM_NEWLINK,
                struct.pack("=BxHiII", _AF_BRIDGE, 1, index, 0, 0)
                + u32(_IFLA_MASTER, master)
                + attribute(
                    _IFLA_AF_SPEC, b"".join(attribute(_IFLA_BRIDGE_VLAN_INFO, struct.pack("=HH", *it)) for it in rows)
                ),
            )
            for index, master, rows in self._ports
        ]


def test_the_vlans_of_a_bridges_ports_are_read() -> None:
    rows = [(_PVID | _UNTAGGED, 1), (0, 7), (_UNTAGGED, 8)]
    found = list_port_vlans(cast(Socket, Listed((3, 9, rows), (4, 10, [(0, 5)]), (5, 9, []))), 9)
    assert found == {
        3: PortVlans(1, frozenset({7}), frozenset({1, 8})),
        5: PortVlans(0, frozenset(), frozenset()),
    }
    assert [found[3].tag_of(it) for it in (1, 7, 8, 9)] == [0, 7, 0, None]


def link(index: int, name: str, kind: str = "", *, filtering: bool = False, running: bool = True) -> Link:
    return Link(
        index=index,
        name=name,
        kind=kind,
        mac="",
        up=True,
        master_index=None,
        mtu=1500,
        alias="netloom net-520" if name == END else "",
        vlan_id=None,
        parent_index=None,
        peer_netns=None,
        running=running,
        vlan_filtering=filtering,
    )


PORTS = [link(1, "eth1"), link(2, "eth2"), link(3, END, "veth"), link(4, "vnet3", "tun")]
UNTAGGED_1 = PortVlans(1, frozenset(), frozenset({1}))


@pytest.mark.parametrize(
    ("own", "uplink", "expected"),
    [
        (UNTAGGED_1, UNTAGGED_1, (Wire("eth1"),)),
        (PortVlans(7, frozenset(), frozenset({7})), PortVlans(1, frozenset({7}), frozenset({1})), (Wire("eth1", 7),)),
        (UNTAGGED_1, PortVlans(7, frozenset(), frozenset({7})), None),
        (PortVlans(0, frozenset({1}), frozenset()), UNTAGGED_1, None),
    ],
    ids=["native", "tagged", "another VLAN", "the port takes no frames without a tag"],
)
def test_a_bridge_that_filters_vlans_is_asked_in_the_vlan_of_the_port(
    own: PortVlans, uplink: PortVlans, expected: tuple[Wire, ...] | None
) -> None:
    bridge = link(9, "cloudbr0", "bridge", filtering=True)
    found = wires(END, bridge, PORTS, {1: uplink, 3: own})
    assert found == (expected or f"no uplink of bridge cloudbr0 carries the VLAN of {END}")


def test_every_uplink_of_another_bridge_is_asked_or_none() -> None:
    bridge = link(9, "cloudbr0", "bridge")
    assert wires(END, bridge, PORTS, {}) == (Wire("eth1"), Wire("eth2"))
    assert wires(END, bridge, [*PORTS, link(5, "eth3", running=False)], {}) == "eth3 has no link"
    assert wires(END, bridge, PORTS[2:], {}) == "bridge cloudbr0 has no uplink"
