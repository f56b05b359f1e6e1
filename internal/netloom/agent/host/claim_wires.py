"""The links on which a scope is claimed: the uplinks of the bridges of its ports."""

from __future__ import annotations

from netloom.agent.host.occupied import Look
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.render.want import Want


def claim_wires(want: Want) -> frozenset[ClaimWire]:
    """The links of a scope, also those that are down now. Raises HostRefused when the kernel does not list them.

    Only ports with an IPv4 address that is announced: for others nobody can ask by ARP.
    """
    asked = {it.link for it in want.announce}
    with Look() as look:
        found = [pair for port in want.ports if port.link in asked for pair in look.carrying(port)]
    return frozenset(ClaimWire(it.name, it.index, it.mac, tag) for it, tag in found if it.mac)
