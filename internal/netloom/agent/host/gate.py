"""Close and open the gates of ports: no frame passes a closed one, and no bridge learns a MAC address from it.

The port stays complete, up and in its bridge behind a closed gate. So opening it is one change of a set, and another
host can serve the same addresses with the same MAC addresses meanwhile.

The table ``bridge netloom_gate`` on the host itself has the set ``closed`` with the host ends of the ports, and a chain
for each hook of a bridge but ``forward``:

- ``prerouting``: what comes from the port, before the bridge learns its MAC address.
- ``postrouting``: what leaves through the port, forwarded or flooded.
- ``input``: frames to reserved addresses (01:80:c2:00:00:00 to :0f). They pass no ``prerouting``, and the bridge learns
  from them after this hook (``br_handle_local_finish``).
- ``output``: what the bridge itself sends, spanning tree and multicast queries. They pass no ``postrouting``.

The table is not part of ``bridge netloom`` (frames.py), which is deleted with the last guard and loaded again with
older or newer rules. It exists while a gate is closed. Links are matched by name, so a gate can be closed before its
link exists.

Elements are changed over a socket that stays open. The kernel waits for all CPUs (8 to 20 ms, measured 2026-11) when a
netfilter socket is closed after something was deleted, and meanwhile it accepts no other change.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable

from netloom.agent.kernel import netlink, nft_netlink
from netloom.agent.kernel.netlink import NetlinkError, Socket
from netloom.agent.kernel.nft import Nft

FAMILY, NAME = "bridge", "netloom_gate"
TABLE = f"{FAMILY} {NAME}"
_CLOSED = "closed"  # the set
_FIRST = -400  # before all other chains: br_netfilter hands frames to the host's rules at 0, and at the end
_TRIES = 5

_RULES = {
    "prerouting": f"iifname @{_CLOSED} drop",  # guard: a-closed-gate-emits-nothing
    "input": f"iifname @{_CLOSED} drop",  # guard: reserved-addresses-pass-no-gate
    "output": f"oifname @{_CLOSED} drop",  # guard: a-bridge-sends-nothing-through-a-gate
    "postrouting": f"oifname @{_CLOSED} drop",  # guard: a-closed-gate-lets-nothing-in
}


class _Kernel:
    """One netlink socket in the namespace of the calling thread, used by one thread at a time."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._socket: Socket | None = None
        self._inode = 0

    def __enter__(self) -> Socket:
        self._turn.acquire()
        try:
            inode = os.stat("/proc/thread-self/ns/net").st_ino
            if self._socket is None or inode != self._inode:
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None
                self._socket, self._inode = Socket(netlink.NETLINK_NETFILTER), inode
        except BaseException:
            self._turn.release()
            raise
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._turn.release()


_kernel = _Kernel()


def close(links: Iterable[str]) -> None:
    """Close the gates of these links of the host, which need not exist. Those that are closed stay closed.

    Later frames do not pass. One that a CPU handles at this moment may; ``packets.settled`` waits for it.

    Raises HostRefused.
    """
    names = sorted(set(links))
    if not names:
        return
    with _kernel as nfnetlink:
        if _in_force(nfnetlink):
            try:
                nft_netlink.change(nfnetlink, nft_netlink.add_link_names(FAMILY, NAME, _CLOSED, names))
                return
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise
        # No table, or somebody changed it.
        listed = ", ".join(f'"{it}"' for it in names)
        with Nft(None) as nft:
            nft.run("\n".join([*_table(), f"add element {TABLE} {_CLOSED} {{ {listed} }}"]) + "\n")


def open_(links: Iterable[str]) -> None:
    """Open the gates of these links of the host. Those that are open stay open; with the last one the table goes.

    Raises HostRefused.
    """
    asked = frozenset(links)
    with _kernel as nfnetlink:
        for tries_left in reversed(range(_TRIES)):
            had = nft_netlink.link_names(nfnetlink, FAMILY, NAME, _CLOSED)
            if not had & asked:
                return
            changes = nft_netlink.delete_link_names(FAMILY, NAME, _CLOSED, sorted(had & asked))
            if not had - asked:
                changes.append(nft_netlink.delete_table(FAMILY, NAME))
            try:
                nft_netlink.change(nfnetlink, changes)
                return
            except NetlinkError as error:  # somebody else deleted an element or the table since the listing
                if error.errno != errno.ENOENT or not tries_left:
                    raise


def closed() -> frozenset[str]:
    """The links of the host whose gate is closed: none, if the rules are not all there. Raises HostRefused."""
    with _kernel as nfnetlink:
        if not _in_force(nfnetlink):
            return frozenset()
        return nft_netlink.link_names(nfnetlink, FAMILY, NAME, _CLOSED)


def remove() -> None:
    """Open all gates: delete the table, if there is one. Raises HostRefused."""
    with _kernel as nfnetlink:
        try:
            nft_netlink.change(nfnetlink, [nft_netlink.delete_table(FAMILY, NAME)])
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise


def _in_force(nfnetlink: Socket) -> bool:
    chains = [netlink.string(it.chain) for it in nft_netlink.rules(nfnetlink, FAMILY, NAME)]
    return sorted(chains) == sorted(_RULES)  # guard: a-gate-without-its-rules-is-open


def _table() -> list[str]:
    """Add the table, or replace its rules by the same; its elements stay."""
    lines = [f"add table {TABLE}", f"add set {TABLE} {_CLOSED} {{ type ifname; }}"]
    for hook, rule in _RULES.items():
        chain = f"{TABLE} {hook}"
        lines += [
            f"add chain {chain} {{ type filter hook {hook} priority {_FIRST}; policy accept; }}",
            f"flush chain {chain}",
            f"add rule {chain} {rule}",
        ]
    return lines
