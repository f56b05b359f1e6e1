"""Ask whether any machine behind the uplinks of a port answers: with ARP, below the bridge, in the host's own name."""

from __future__ import annotations

import random

from netloom.agent.host.occupied import Look
from netloom.agent.kernel.arp_probe import Wire, any_answer
from netloom.render.want import Port, Want

_ASKED_MAX = 16  # machines of one port


def anybody_answers(want: Want, timeout_s: float) -> bool | None:
    """Whether a VM or a gateway of a port answers: on a port where nobody answers, the rest says nothing.

    None: there is nobody to ask. False at once if no uplink has a carrier. Blocks for up to the time-out for each port.
    Raises HostRefused when the kernel does not list its links.
    """
    answers = []
    for port in want.ports:
        with Look() as look:
            carrying = look.carrying(port)
        wires = [Wire(link.name, tag) for link, tag in carrying if link.running]
        if carrying and not wires:
            answers.append(False)  # guard: a-link-without-carrier-answers-nobody
        elif wires and (asked := _machines(want, port)):
            answers.append(any_answer(dict.fromkeys(wires, asked), timeout_s))
    return all(answers) if answers else None


def _machines(want: Want, port: Port) -> list[str]:
    """The IPv4 addresses of some machines behind the port: its gateways, and VMs."""
    gateways = {it.via for it in want.routes if it.link == port.link and it.via and ":" not in it.via}
    vms = [it.address for it in want.neighbours if it.link == port.link and ":" not in it.address]
    machines = [*sorted(gateways), *random.sample(vms, min(len(vms), _ASKED_MAX))]
    return machines[:_ASKED_MAX]
