"""Rows of links as the kernel encodes them, where this kernel may lack the feature."""

from __future__ import annotations

import pytest

from netloom.agent.kernel.links import decode_link
from netloom.agent.kernel.netlink import nested, text, u8

_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_BR_VLAN_FILTERING = 3, 18, 1, 2, 7  # if_link.h


@pytest.mark.parametrize("filtering", [0, 1])
def test_the_vlan_filtering_of_a_bridge_is_read(filtering: int) -> None:
    data = nested(_IFLA_INFO_DATA, u8(_IFLA_BR_VLAN_FILTERING, filtering))
    info = nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"), data)
    link = decode_link(bytes(16) + text(_IFLA_IFNAME, "cloudbr0") + info)
    assert (link.kind, link.vlan_filtering) == ("bridge", bool(filtering))
