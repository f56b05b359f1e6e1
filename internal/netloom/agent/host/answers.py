"""Ask whether any machine behind the uplinks of a port answers: with ARP, below the bridge, in the host's own name."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Self

from netloom.agent.host.occupied import Look
from netloom.agent.kernel.arp_probe import SignsOfLife, Wire
from netloom.render.want import Port, Want

LOOK_EVERY_S = 1.0
_ASKED_MAX = 16  # machines of one port


class Neighbours:
    """The VMs and gateways behind some ports, to be asked once or again and again. For one thread at a time.

    Sockets stay open between the questions. The uplinks of the ports are looked up when nobody has answered, else once
    a second.
    """

    def __init__(self, find: Callable[[], Want]) -> None:
        """``find``: the ports, and who is asked, as the host is now. May raise HostRefused."""
        self._find = find
        self._asked: list[dict[Wire, list[str]]] = []  # of each port where somebody can be asked; empty: no carrier
        self._look_at = 0.0
        self._signs: list[SignsOfLife] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets."""
        while self._signs:
            self._signs.pop().close()

    def anybody_answers(self, timeout_s: float) -> bool | None:
        """Whether a VM or a gateway of a port answers: on a port where nobody answers, the rest says nothing.

        None: there is nobody to ask. False at once if no uplink has a carrier. Blocks for up to the time-out for each
        port. Raises HostRefused when the kernel does not list its links.
        """
        if time.monotonic() >= self._look_at:
            self._asked = _questions(self._find())
            self._look_at = time.monotonic() + LOOK_EVERY_S
        while len(self._signs) < len(self._asked):
            self._signs.append(SignsOfLife())
        answers = [signs.any_answer(asked, timeout_s) for signs, asked in zip(self._signs, self._asked, strict=False)]
        if not all(answers):
            self._look_at = 0.0  # guard: after-silence-the-uplinks-are-looked-up
        return all(answers) if answers else None


def _questions(want: Want) -> list[dict[Wire, list[str]]]:
    found: list[dict[Wire, list[str]]] = []
    for port in want.ports:
        with Look() as look:
            carrying = look.carrying(port)
        wires = [Wire(link.name, tag) for link, tag in carrying if link.running]
        if carrying and not wires:
            found.append({})  # guard: a-link-without-carrier-answers-nobody
        elif wires and (machines := _machines(want, port)):
            found.append(dict.fromkeys(wires, machines))
    return found


def _machines(want: Want, port: Port) -> list[str]:
    """The IPv4 addresses of some machines behind the port: its gateways, and VMs."""
    gateways = {it.via for it in want.routes if it.link == port.link and it.via and ":" not in it.via}
    vms = [it.address for it in want.neighbours if it.link == port.link and ":" not in it.address]
    machines = [*sorted(gateways), *random.sample(vms, min(len(vms), _ASKED_MAX))]
    return machines[:_ASKED_MAX]
