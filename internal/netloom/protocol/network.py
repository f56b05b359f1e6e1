"""The fields of all calls about a network, and the payloads that have no others."""

from __future__ import annotations

import msgspec

from netloom.protocol.scalars import (
    Document,
    GuestType,
    Id,
    IPv4,
    IPv4List,
    IPv4PrefixList,
    IPv6List,
    IPv6PrefixList,
    Vlan,
    Word,
)


class NetworkPayload(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that describe a network (docs/protocol.md, section 2).

    ``vlan`` is empty before the first implement and after shutdown. ``gateway`` and ``cidr`` are lists on shared
    networks with several ranges; in calls about a NIC the gateway is the NIC's.
    """

    network_id: Id
    vpc_id: Id = Id("")
    zone_id: Id = Id("")
    vlan: Vlan = Vlan("")
    guest_type: GuestType = GuestType("isolated")
    network_state: Word = Word("")
    gateway: IPv4List = IPv4List()
    cidr: IPv4PrefixList = IPv4PrefixList()
    network_ip6_gateway: IPv6List = IPv6List()
    network_ip6_cidr: IPv6PrefixList = IPv6PrefixList()


class ImplementNetwork(NetworkPayload, frozen=True, kw_only=True):
    """implement-network. ``extension_ip``: the device's own guest address; absent if it needs none."""

    extension_ip: IPv4 = IPv4("")


class ShutdownNetwork(NetworkPayload, frozen=True, kw_only=True):
    """shutdown-network: delete the network; CloudStack may implement it again."""


class DestroyNetwork(NetworkPayload, frozen=True, kw_only=True):
    """destroy-network: delete the network for good. ``network_state`` is ``allocated``."""


class EnsureNetworkDevice(msgspec.Struct, frozen=True, kw_only=True):
    """ensure-network-device, for a network, or for a VPC or its tier. ``current_details`` is JSON in a string."""

    network_id: Id = Id("")
    vpc_id: Id = Id("")
    zone_id: Id = Id("")
    network_state: Word = Word("")
    vpc_state: Word = Word("")
    current_details: Document = Document("")

    def __post_init__(self) -> None:
        if not self.network_id and not self.vpc_id:
            raise ValueError("neither network_id nor vpc_id is given")

    @property
    def is_ending(self) -> bool:
        """Whether the network or VPC is being removed, or has no VM: its state before destroy-network is allocated."""
        return self.network_state in ("shutdown", "allocated", "destroy") or self.vpc_state == "inactive"
