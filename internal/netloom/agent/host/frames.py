"""Guard the host and the wire from the frames of VMs, on every bridge of a segment.

Four tables on the host itself. What they drop does not depend on the ports that a bridge has, as far as the kernel
allows this, because others plug in the VMs at any time.

``inet netloom`` and ``arp netloom`` drop IP, IPv6 and ARP in frames to 01:80:c2:00:00:00 to :0f (IEEE 802.1Q, table
8-1: the addresses that a bridge does not forward). They hold for all links of the host, so no moment is left between
the plugging of a VM and the guard of its port.

``netdev netloom`` has a chain for each bridge at the ingress of the bridge device. Only frames for the host itself pass
there, ARP included, and all are dropped. Forwarded frames do not pass there.

``bridge netloom`` has the rest:

- ``input``: the kernel delivers frames to the reserved addresses from the *port*, so the chain above does not see them.
  Only the control protocols that these addresses are reserved for may pass, and only to bridges of others: the rule
  holds for all bridges of the host. 01:80:c2:00:00:0e passes this hook because the bridge's group_fwd_mask has bit 14.
- ``forward``: only ordinary frames leave for the wire. The set ``uplinks`` names the links that lead there. What agents
  say to each other on the wire reaches no VM.

Bridges that others created are guarded while a port of ours is in them, in the same tables:

- Each port that leads to guests has a chain ``from-<port>`` at its ingress. It drops the same frames as ``input``. A
  bridge of others keeps its group_fwd_mask, so frames to :0e (and to :00 with STP) pass no hook of the family bridge.
  IP and ARP in them are dropped without this chain, which adds the other protocols.
- ``others_guests`` names the same ports: the host takes no tagged frames from them, for example on a VLAN link above.
- A bridge that the host itself does not use has a chain ``to-<bridge>``, which drops what is for the host.
- ``others_uplinks`` names their ports that lead to the wire, ``others_trunks`` those of bridges with VLAN filtering.
  There the bridge itself has checked the outer tag, and may have removed it or added its own.

The kernel moves the outer VLAN tag out of the frame before the hooks. nftables puts it back for matches of bytes from
the start of the frame (``@ll``), and only for these. ``meta protocol`` and ``@nh`` are what follows this tag.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from netloom.agent.host.learning import bound_learning
from netloom.agent.host.observe_nft import (
    FRAMES_FAMILY,
    FROM_PORT,
    GUARD_FAMILY,
    GUARD_TABLE,
    GUARDED,
    OTHERS,
    OTHERS_GUESTS,
    OTHERS_TRUNKS,
    OTHERS_UPLINKS,
    RESERVED,
    STACK_FAMILY,
    TO_BRIDGE,
    UPLINKS,
    former_chains,
    guarded_bridges,
    guarded_others,
    guarded_uplinks,
)
from netloom.agent.kernel import kept, links
from netloom.agent.kernel.nft import NftRefused
from netloom.ethernet import ETHERTYPE
from netloom.plan.have import Others

_TYPE = "@ll,96,16"  # the EtherType, or the length of an IEEE 802.3 frame (below 0x600)
# Protocols of reserved addresses: MAC control, LACP and OAM, 802.1X, MACsec, LLDP, MVRP, MMRP, MSRP, PTP, CFM.
_CONTROL = "0x8808, 0x8809, 0x888e, 0x88e5, 0x88cc, 0x88f5, 0x88f6, 0x22ea, 0x88f7, 0x8902"
# A tag of any kind in front: 802.1Q, 802.1ad, old double tags, 802.1ah, VN-Tag, 802.1BR, FabricPath, TRILL.
_TAGS = "0x8100, 0x88a8, 0x9100, 0x9200, 0x9300, 0x88e7, 0x8926, 0x893f, 0x8903, 0x22f3"
# On a closed bridge the host can still ask for an address; the bridge is open again when it has one.
_ASKED_FOR = "udp dport { 68, 546 } accept"
_LOOPS = "0x9000, 0x88e3"  # loop detection of switches (Ethernet Configuration Testing), rings (IEC 62439-2)
_HOSTS = f"0x{ETHERTYPE:04x}"  # what agents say to each other (claimwire.py)
_VENDORS = ("00000c", "00e02b", "00e052", "000081")  # switch protocols in SNAP: Cisco, Extreme, Foundry, Nortel
_ETHERNET_IN_SNAP = ("000000", "0000f8")  # an EtherType follows: RFC 1042, IEEE 802.1H
_TRIES = 3
_SETS = (GUARDED, UPLINKS, OTHERS, OTHERS_GUESTS, OTHERS_UPLINKS, OTHERS_TRUNKS)
_RESERVED = "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00"

_LLC = "meta protocol 0x0004"  # IEEE 802.3 with an LLC header

_NOT_CONTROL = f"{_RESERVED} {_TYPE} >= 0x0600 {_TYPE} != {{ {_CONTROL} }} drop"

_BEFORE_FRAGMENTS_ARE_JOINED = -450
# The host's own protocols: the family, the hook, and the rule. The family arp has no expression for Ethernet addresses.
_STACK = (
    (STACK_FAMILY, "prerouting", f"meta iiftype ether {_RESERVED} drop"),  # guard: no-moment-without-a-guard
    ("arp", "input", "@ll,0,48 & 0xfffffffffff0 == 0x0180c2000000 drop"),
)
_FAMILIES = (GUARD_FAMILY, FRAMES_FAMILY, *(family for family, _, _ in _STACK))
GUARD_TABLES = tuple(f"{family} {GUARD_TABLE}" for family in _FAMILIES)

_RULES = {
    "input": (
        _NOT_CONTROL,  # guard: reserved-addresses-reach-no-socket
        f"iifname @{OTHERS_GUESTS} meta protocol {{ {_TAGS} }} drop",
        f"iifname @{OTHERS_GUESTS} iifname != @{OTHERS_TRUNKS} {_TYPE} {{ {_TAGS} }} drop",
    ),
    "forward": (
        f"iifname @{UPLINKS} ether daddr 01:80:c2:00:00:0e drop",
        # The protocol first: it differs for nearly every packet.
        f"meta protocol {_HOSTS} iifname @{UPLINKS} drop",  # guard: vms-hear-no-claims
        f"meta protocol {_HOSTS} iifname @{OTHERS_UPLINKS} oifname @{OTHERS_GUESTS} drop",  # guard: nor-behind-others
        f"oifname @{UPLINKS} jump wire",
        f"iifname != @{OTHERS_UPLINKS} oifname @{OTHERS_UPLINKS} jump wire",
        f"iifname != @{OTHERS_TRUNKS} oifname @{OTHERS_TRUNKS} jump trunk",  # guard: no-second-tag-leaves
    ),
    "wire": (f"{_TYPE} {{ {_TAGS} }} drop", "jump control"),
    # The outer tag, where there is one, is that of the bridge. Another one would be read next by a switch.
    "trunk": (f"meta protocol {{ {_TAGS} }} drop", "jump control"),
    "control": (
        # Reserved addresses of the IEEE (STP, LACP, LLDP, GVRP, MVRP, CFM), and of Cisco (CDP, VTP, DTP, PVST, ISL).
        "ether daddr & ff:ff:ff:ff:ff:00 == 01:80:c2:00:00:00 drop",
        "ether daddr & ff:ff:ff:00:00:00 == 01:00:0c:00:00:00 drop",
        # The same protocols to another address, by EtherType.
        f"meta protocol {{ {_CONTROL}, {_LOOPS}, {_HOSTS} }} drop",
        f"{_LLC} jump llc",
    ),
    # A chain of its own: nft 1.0.6 aborts when it lists such matches of bytes behind "meta protocol" in one rule.
    "llc": (
        "@nh,0,16 0x4242 drop",  # STP
        *(f"@nh,0,48 0xaaaa03{vendor} drop" for vendor in _VENDORS),
        *(f"@nh,0,48 0xaaaa03{it} @nh,48,16 {{ {_TAGS}, {_CONTROL}, {_HOSTS} }} drop" for it in _ETHERNET_IN_SNAP),
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
    with kept.nft(None) as nft:
        nft.run("\n".join(lines) + "\n")
    links.change(None, [links.confine_bridge(bridge)])  # guard: lldp-frames-are-filtered
    bound_learning([bridge])


def unguard(bridge: str, *, last: bool) -> None:
    """Delete the guard of a bridge that is gone; with the ``last`` one, delete the tables. Raises HostRefused."""
    chain = f"{GUARD_FAMILY} {GUARD_TABLE} {bridge}"
    # Some kernels delete the chain with its device. Add it first, so that deleting it always works.
    lines = [f"add table {GUARD_FAMILY} {GUARD_TABLE}", f"add chain {chain}", f"delete chain {chain}"]
    lines += _frames_table()
    lines += [*_elements("add", GUARDED, (bridge,)), *_elements("delete", GUARDED, (bridge,))]
    lines += _elements("delete", UPLINKS, sorted(_former_uplinks(guarded_bridges() - {bridge})))
    if last:
        lines += [f"delete table {family} {GUARD_TABLE}" for family in _FAMILIES]
    with kept.nft(None) as nft:
        nft.run("\n".join(lines) + "\n")


def unguard_all(bridges: Iterable[str]) -> None:
    """Delete all guards, and the settings that they need on these bridges of ours. Raises HostRefused."""
    with kept.nft(None) as nft:
        nft.run("\n".join(_without_tables()) + "\n")
    links.change(None, [links.release_bridge(bridge) for bridge in bridges])


def guard_others(others: Others) -> None:
    """Guard these bridges of others, and no further ones; without any guard left, delete the tables.

    Raises HostRefused.
    """
    for tries_left in reversed(range(_TRIES)):
        lines = _others_lines(others) if others.bridges or guarded_bridges() else _without_tables()
        try:
            with kept.nft(None) as nft:
                nft.run("\n".join(lines) + "\n")
            bound_learning(others.bridges)
            return
        except NftRefused:  # a VM may have been unplugged meanwhile
            if not tries_left:
                raise


def _others_lines(others: Others) -> list[str]:
    found = {it.name for it in links.find_links(None, sorted(others.closed | others.ports))}
    others = msgspec.structs.replace(others, closed=others.closed & found, ports=others.ports & found)
    had, table = guarded_others(), f"{GUARD_FAMILY} {GUARD_TABLE}"
    lines = [f"add table {table}"]
    for prefix, those, before, policy, rule in (
        (TO_BRIDGE, others.closed, had.closed, "drop", _ASKED_FOR),  # guard: bridges-of-others-are-closed
        (FROM_PORT, others.ports, had.ports, "accept", _NOT_CONTROL),  # guard: ports-of-others-are-guarded
    ):
        for link in sorted(before - those):
            chain = f"chain {table} {prefix}{link}"
            lines += [f"add {chain}", f"flush {chain}", f"delete {chain}"]
        for link in sorted(those):
            hook = f'type filter hook ingress device "{link}" priority filter; policy {policy};'
            chain = f"{table} {prefix}{link}"
            lines += [f"add chain {chain} {{ {hook} }}", f"flush chain {chain}", f"add rule {chain} {rule}"]
    lines += _frames_table()
    sets = (
        (OTHERS, others.bridges),
        (OTHERS_GUESTS, others.ports),  # guard: the-host-takes-no-tags-of-guests
        (OTHERS_UPLINKS, others.uplinks),  # guard: uplinks-of-others-are-guarded
        (OTHERS_TRUNKS, others.trunks),
    )
    for name, elements in sets:
        lines += [f"flush set {FRAMES_FAMILY} {GUARD_TABLE} {name}", *_elements("add", name, sorted(elements))]
    return lines


def _without_tables() -> list[str]:
    return [f"{verb} table {table}" for verb in ("add", "delete") for table in GUARD_TABLES]


def _former_uplinks(guarded: frozenset[str]) -> set[str]:
    """The uplinks that are gone, or are no longer a port of one of the bridges in ``guarded``."""
    uplinks = guarded_uplinks()
    found = {it.name: it.master_index for it in links.find_links(None, sorted(uplinks))}
    masters = {it.index for it in links.find_links(None, sorted(guarded))}
    return {name for name in uplinks if found.get(name) not in masters}


def _frames_table() -> list[str]:
    """Add all tables but that of the bridges' chains, with their sets and rules, or replace the rules by the same."""
    table = f"{FRAMES_FAMILY} {GUARD_TABLE}"
    lines = [f"add table {table}"]
    lines += [f"add set {table} {name} {{ type ifname; }}" for name in _SETS]
    for chain in _RULES:
        hooked = chain in ("input", "forward")
        hook = f" {{ type filter hook {chain} priority filter; policy accept; }}" if hooked else ""
        lines.append(f"add chain {table} {chain}{hook}")
    for chain, rules in _RULES.items():
        lines.append(f"flush chain {table} {chain}")
        lines += [f"add rule {table} {chain} {rule}" for rule in rules]
    for family, hook, rule in _STACK:
        chain = f"{family} {GUARD_TABLE} {RESERVED}"
        at = f"type filter hook {hook} priority {_BEFORE_FRAGMENTS_ARE_JOINED}; policy accept;"
        lines += [f"add table {family} {GUARD_TABLE}", f"add chain {chain} {{ {at} }}"]
        lines += [f"flush chain {chain}", f"add rule {chain} {rule}"]
    for chain in former_chains(family for family, _, _ in _STACK):
        lines += [f"flush chain {chain}", f"delete chain {chain}"]  # guard: no-chain-of-an-older-build-stays
    return lines


def _elements(verb: str, name: str, links_of: Iterable[str]) -> list[str]:
    listed = ", ".join(f'"{it}"' for it in links_of)
    return [f"{verb} element {FRAMES_FAMILY} {GUARD_TABLE} {name} {{ {listed} }}"] if listed else []
