"""The VLANs of bridge ports, for bridges that filter VLANs (rtnetlink; linux/if_bridge.h)."""

from __future__ import annotations

import socket
import struct

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import Message, Socket
from netloom.agent.kernel.rtnetlink import RTM_GETLINK, RTM_NEWLINK, fixed_part

_AF_BRIDGE = getattr(socket, "AF_BRIDGE", 7)
_IFLA_MASTER, _IFLA_AF_SPEC, _IFLA_EXT_MASK = 10, 26, 29
_RTEXT_FILTER_BRVLAN = 2
_IFLA_BRIDGE_VLAN_INFO = 2
_PVID, _UNTAGGED = 0x2, 0x4

_HEAD = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_INFO = struct.Struct("=HH")  # bridge_vlan_info: flags, VLAN


class PortVlans(msgspec.Struct, frozen=True):
    """The VLANs of a port: ``own`` is that of frames that come without a tag (0: they are dropped).

    ``tagged`` and ``untagged``: the VLANs whose frames leave with their tag, or without it.
    """

    own: int
    tagged: frozenset[int]
    untagged: frozenset[int]

    def tag_of(self, vlan: int) -> int | None:
        """The tag that frames of a VLAN have when they leave through this port, 0 for none; None: they do not."""
        return 0 if vlan in self.untagged else vlan if vlan in self.tagged else None


def list_port_vlans(rtnetlink: Socket, bridge: int) -> dict[int, PortVlans]:
    """The VLANs of each port of the bridge with this index, by the index of the port. Raises NetlinkError."""
    payload = _HEAD.pack(_AF_BRIDGE, 0, 0, 0, 0) + netlink.u32(_IFLA_EXT_MASK, _RTEXT_FILTER_BRVLAN)
    found = {}
    for kind, answer in rtnetlink.dump(Message(RTM_GETLINK, payload=payload, what="list VLANs of bridge ports")):
        index = fixed_part(_HEAD, answer, "link")[2]
        values = netlink.attribute_map(answer, _HEAD.size)
        if kind == RTM_NEWLINK and netlink.number(values.get(_IFLA_MASTER)) == bridge:
            found[index] = _decoded(values.get(_IFLA_AF_SPEC, b""))
    return found


def _decoded(spec: bytes) -> PortVlans:
    rows = [
        fixed_part(_INFO, value, "VLAN of a bridge port")
        for kind, value in netlink.attributes(spec)
        if kind == _IFLA_BRIDGE_VLAN_INFO
    ]
    return PortVlans(
        own=next((vlan for flags, vlan in rows if flags & _PVID), 0),
        tagged=frozenset(vlan for flags, vlan in rows if not flags & _UNTAGGED),
        untagged=frozenset(vlan for flags, vlan in rows if flags & _UNTAGGED),
    )
