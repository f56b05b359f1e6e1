"""UDP ports of the source NAT address that are forwarded to a guest, and which source ports other guests may use.

If a flow of another guest left with such a port, it would take over the remote end's conversation.
"""

from __future__ import annotations

from itertools import pairwise

from netloom.render.active import Active, ForwardedPorts, target_port
from netloom.state import Ports


def forwarded_udp(now: Active) -> list[ForwardedPorts]:
    """The UDP forwards of the source NAT address."""
    if now.source_nat is None:
        return []
    address = now.source_nat.address
    return [it for it in now.forwarded if it.forward.public_ip == address and it.forward.protocol == "udp"]


def keeps_port(part: ForwardedPorts, port: int) -> bool:
    """Whether the guest's port for a public port has the same number. The guest may use it as its source port."""
    return target_port(part.forward, port) == port


def free_ports(taken: list[Ports]) -> Ports | None:
    """A range of source ports outside ``taken``: a fixed block if one is free, so that the rule seldom changes."""
    for block in (Ports(49152, 65535), Ports(32768, 49151), Ports(16384, 32767), Ports(1024, 16383)):
        if all(it.last < block.first or it.first > block.last for it in taken):
            return block
    gaps = [Ports(a.last + 1, b.first - 1) for a, b in pairwise([Ports(0, 1023), *sorted(taken), Ports(65536, 65536)])]
    widest = max(gaps, key=lambda it: it.count)
    return widest if widest.count > 0 else None
