"""Bound the MAC addresses that a bridge learns from a VM, where the kernel has no bound.

The bridges that netloom makes have ``fdb_max_learned``. Linux has it since 6.7, and netloom changes no setting of a
bridge of others. In both cases rules in the table ``bridge netloom`` bound what each VM adds: a frame from a MAC
address that is new on its port passes only at a low rate. Frames from addresses that the port has already are not
affected. A bridge forgets an address after 300 seconds without a frame, and so do the rules.

libvirt names the ports of VMs ``vnet<number>``. So the rules need to know no port, and hold from its first frame. They
see frames to reserved addresses in the hook ``input`` (see ``frames``), all others in ``prerouting``.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom import names
from netloom.agent.host.observe_nft import FRAMES_FAMILY, GUARD_TABLE
from netloom.agent.kernel import kept, links
from netloom.agent.kernel.nft import NftRefused
from netloom.agent.log import complain

VM_PORTS = '"vnet*"'
_OUR_PORTS = tuple(f'"{prefix}*"' for prefix in names.HOST_PORTS)
FORGOTTEN_AFTER_S = 300  # IFLA_BR_AGEING_TIME, the kernel's default
FRESH_PER_S, FRESH_BURST = 2, 256
_ADDRESSES_MAX = 1 << 18  # of all VMs of the host: 300 that send from as many addresses as they can
_PORTS_MAX = 1 << 14

_PAIR = "iifname . ether saddr"
_RATE = f"{FRESH_PER_S}/second burst {FRESH_BURST} packets"
_RULES = (
    f"{_PAIR} @vm_macs update @vm_macs {{ {_PAIR} }} return",
    f"update @vm_fresh_macs {{ iifname limit rate over {_RATE} }} drop",  # guard: a-vm-adds-few-learned-addresses
    f"update @vm_macs {{ {_PAIR} }} return",
    "drop",
)


def bound_learning(bridges: Iterable[str]) -> None:
    """Add the rules if one of the bridges has no bound of its own; adding them again changes nothing.

    Raises NetlinkError, NamespaceError. If nft refuses the rules, a warning is logged: without them the network works.
    """
    if all(it.learned_max for it in links.find_links(None, list(bridges))):  # guard: bridges-without-a-bound-get-rules
        return
    table = f"{FRAMES_FAMILY} {GUARD_TABLE}"
    forgets = f"flags dynamic,timeout; timeout {FORGOTTEN_AFTER_S}s;"
    lines = [
        f"add table {table}",
        f"add set {table} vm_macs {{ type ifname . ether_addr; size {_ADDRESSES_MAX}; {forgets} }}",
        f"add set {table} vm_fresh_macs {{ type ifname; size {_PORTS_MAX}; {forgets} }}",
        f"add chain {table} learning",
        f"flush chain {table} learning",
        *(f"add rule {table} learning {it}" for it in _RULES),
    ]
    for hook in ("prerouting", "input"):
        chain = f"{table} learning_{hook}"
        # Before the filter chains: those must not decide which frames count.
        lines += [
            f"add chain {chain} {{ type filter hook {hook} priority -350; policy accept; }}",
            f"flush chain {chain}",
            *(f"add rule {chain} iifname {it} accept" for it in _OUR_PORTS),
            f"add rule {chain} iifname {VM_PORTS} jump learning",
        ]
    try:
        with kept.nft(None) as nft:
            nft.run("\n".join(lines) + "\n")
    except NftRefused as refused:
        complain(f"warning: what VMs add to the MAC addresses of bridges is not bounded: {refused}")
