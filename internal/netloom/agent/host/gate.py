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
older or newer rules. It exists while a gate is closed.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom.agent.host.link_table import LinkTable

_CLOSED = "closed"  # the set

TABLE = LinkTable(
    "netloom_gate",
    _CLOSED,
    {
        "prerouting": (f"iifname @{_CLOSED} drop",),  # guard: a-closed-gate-emits-nothing
        "input": (f"iifname @{_CLOSED} drop",),  # guard: reserved-addresses-pass-no-gate
        "output": (f"oifname @{_CLOSED} drop",),  # guard: a-bridge-sends-nothing-through-a-gate
        "postrouting": (f"oifname @{_CLOSED} drop",),  # guard: a-closed-gate-lets-nothing-in
    },
)


def close(links: Iterable[str]) -> None:
    """Close the gates of these links of the host, which need not exist. Those that are closed stay closed.

    Later frames do not pass. One that a CPU handles at this moment may; ``packets.settled`` waits for it.

    Raises HostRefused.
    """
    TABLE.add(links)


def open_(links: Iterable[str]) -> None:
    """Open the gates of these links of the host. Those that are open stay open; with the last one the table goes.

    Raises HostRefused.
    """
    TABLE.discard(links)


def closed() -> frozenset[str]:
    """The links of the host whose gate is closed: none, if the rules are not all there. Raises HostRefused."""
    return TABLE.links()


def remove() -> None:
    """Open all gates: delete the table, if there is one. Raises HostRefused."""
    TABLE.remove()
