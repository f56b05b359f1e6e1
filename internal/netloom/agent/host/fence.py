"""Fence uplinks off: no frame passes between a fenced one and our ports. Ports of VMs on this host stay connected.

A host that is cut off from all others may have been given up: another host may serve its networks. So it fences its
uplinks, and asks who answers for its addresses when it hears somebody again (``scopes/isolation.py``).

The table ``bridge netloom_fence`` on the host itself has the set ``fenced`` with the uplinks. It exists while there are
some. It outlives the agent: a new agent finds there what it has to ask.
"""

from __future__ import annotations

from netloom import names
from netloom.agent.host.link_table import LinkTable

_FENCED = "fenced"  # the set
_OURS = [f"{prefix}*" for prefix in names.HOST_PORTS]

TABLE = LinkTable(
    "netloom_fence",
    _FENCED,
    {
        "forward": (
            f"iifname @{_FENCED} goto inwards",  # guard: a-fenced-uplink-lets-nothing-in
            f"oifname @{_FENCED} goto outwards",  # guard: a-fenced-uplink-lets-nothing-out
        ),
        "inwards": [f'oifname "{it}" drop' for it in _OURS],
        "outwards": [f'iifname "{it}" drop' for it in _OURS],
    },
)
