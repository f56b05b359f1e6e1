"""Guard the host and the wire from the frames of VMs, on every bridge of a segment.

Two tables on the host itself. Neither needs to know the ports of a bridge, because others plug in the VMs at any time.

``netdev netloom`` has a chain for each bridge at the ingress of the bridge device. Only frames for the host itself pass
there, ARP included, and all are dropped. Forwarded frames do not pass there.

``bridge netloom`` has the rest:

- ``input``: the kernel delivers frames to 01:80:c2:00:00:00 to :0f (IEEE 802.1Q, table 8-1: the addresses that a bridge
  does not forward) from the *port*, so the chain above does not see them. Only the control protocols that these
  addresses are reserved for may pass, and only to bridges of others: the rule holds for all bridges of the host, so
  there is no moment between the plugging of a VM and the guard of its port. 01:80:c2:00:00:0e passes this hook
  because the bridge's group_fwd_mask has bit 14.
- ``forward``: only ordinary frames leave for the wire. The set ``uplinks`` names the links that lead there.

Headers are matched as bytes: the kernel moves the outer VLAN tag out of the frame before the hooks, nftables puts it
back for matches of bytes, and only for these.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom.agent.host.observe_nft import (
    FRAMES_FAMILY,
    GUARD_FAMILY,
    GUARD_TABLE,
    GUARDED,
    UPLINKS,
    guarded_bridges,
    guarded_uplinks,
)
from netloom.agent.kernel import links
from netloom.agent.kernel.nft import Nft

_TYPE = "@ll,96,16"  # the EtherType, or the length of an IEEE 802.3 frame (below 0x600)
# Protocols of reserved addresses: MAC control, LACP and OAM, 802.1X, MACsec, LLDP, MVRP, MMRP, MSRP, PTP, CFM.
_CONTROL = "0x8808, 0x8809, 0x888e, 0x88e5, 0x88cc, 0x88f5, 0x88f6, 0x22ea, 0x88f7, 0x8902"
# A tag of any kind in front: 802.1Q, 802.1ad, old double tags, 802.1ah, VN-Tag, 802.1BR, FabricPath, TRILL.
_TAGS = "0x8100, 0x88a8, 0x9100, 0x9200, 0x9300, 0x88e7, 0x8926, 0x893f, 0x8903, 0x22f3"
_RESERVED = "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00"

_RULES = {
    "input": (
        f"{_RESERVED} {_TYPE} >= 0x0600 {_TYPE} != {{ {_CONTROL} }} drop",  # guard: reserved-addresses-reach-no-socket
    ),
    "forward": (
        f"iifname @{UPLINKS} ether daddr 01:80:c2:00:00:0e drop",
        f"oifname @{UPLINKS} jump wire",
    ),
    "wire": (
        f"{_TYPE} {{ {_TAGS} }} drop",
        # Reserved addresses of the IEEE (STP, LACP, LLDP, GVRP, MVRP, CFM), and of Cisco (CDP, VTP, DTP, PVST, ISL).
        "ether daddr & ff:ff:ff:ff:ff:00 == 01:80:c2:00:00:00 drop",
        "ether daddr & ff:ff:ff:00:00:00 == 01:00:0c:00:00:00 drop",
        # The same protocols to another address: by EtherType, as LLC of STP, as SNAP of Cisco.
        f"{_TYPE} {{ {_CONTROL} }} drop",
        f"{_TYPE} < 0x0600 @ll,112,16 0x4242 drop",
        f"{_TYPE} < 0x0600 @ll,112,48 0xaaaa0300000c drop",
    ),
}


def guard(bridge: str, uplinks: tuple[str, ...]) -> None:
    """Guard the bridge; guarding it again changes nothing. Raises HostRefused."""
    hook = f'type filter hook ingress device "{bridge}" priority filter; policy drop;'
    lines = [
        f"add table {GUARD_FAMILY} {GUARD_TABLE}",
        f"add chain {GUARD_FAMILY} {GUARD_TABLE} {bridge} {{ {hook} }}",
        *_frames_table(),
        *_elements("add", GUARDED, (bridge,)),
        *_elements("add", UPLINKS, uplinks),  # guard: only-ordinary-frames-leave
    ]
    with Nft(None) as nft:
        nft.run("\n".join(lines) + "\n")
    links.change(None, [links.confine_bridge(bridge)])  # guard: lldp-frames-are-filtered


def unguard(bridge: str, *, last: bool) -> None:
    """Delete the guard of a bridge that is gone; with the ``last`` one, delete both tables. Raises HostRefused."""
    chain = f"{GUARD_FAMILY} {GUARD_TABLE} {bridge}"
    # Some kernels delete the chain with its device. Add it first, so that deleting it always works.
    lines = [f"add table {GUARD_FAMILY} {GUARD_TABLE}", f"add chain {chain}", f"delete chain {chain}"]
    lines += _frames_table()
    lines += [*_elements("add", GUARDED, (bridge,)), *_elements("delete", GUARDED, (bridge,))]
    lines += _elements("delete", UPLINKS, sorted(_former_uplinks(guarded_bridges() - {bridge})))
    if last:
        lines += [f"delete table {family} {GUARD_TABLE}" for family in (GUARD_FAMILY, FRAMES_FAMILY)]
    with Nft(None) as nft:
        nft.run("\n".join(lines) + "\n")


def _former_uplinks(guarded: frozenset[str]) -> set[str]:
    """The uplinks that are gone, or are no longer a port of one of the bridges in ``guarded``."""
    uplinks = guarded_uplinks()
    found = {it.name: it.master_index for it in links.find_links(None, sorted(uplinks))}
    masters = {it.index for it in links.find_links(None, sorted(guarded))}
    return {name for name in uplinks if found.get(name) not in masters}


def _frames_table() -> list[str]:
    """Add the table with its sets and rules, or replace its rules by the same."""
    table = f"{FRAMES_FAMILY} {GUARD_TABLE}"
    lines = [f"add table {table}"]
    lines += [f"add set {table} {name} {{ type ifname; }}" for name in (GUARDED, UPLINKS)]
    for chain in _RULES:
        hook = f" {{ type filter hook {chain} priority filter; policy accept; }}" if chain != "wire" else ""
        lines.append(f"add chain {table} {chain}{hook}")
    for chain, rules in _RULES.items():
        lines.append(f"flush chain {table} {chain}")
        lines += [f"add rule {table} {chain} {rule}" for rule in rules]
    return lines


def _elements(verb: str, name: str, links_of: Iterable[str]) -> list[str]:
    listed = ", ".join(f'"{it}"' for it in links_of)
    return [f"{verb} element {FRAMES_FAMILY} {GUARD_TABLE} {name} {{ {listed} }}"] if listed else []
