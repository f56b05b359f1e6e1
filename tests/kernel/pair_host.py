"""A program: one host's end of a pair connection. Prints what its handler is told, a line each.

Arguments: the host's name (kvm1 is the first of the group, kvm2 the second), their addresses, the port. A line on its
input is sent as the error of a ``Stored``.
"""

from __future__ import annotations

import asyncio
import sys

from netloom.agent.log import Log
from netloom.agent.standby.pair import Pairs
from netloom.pairwire import PairMessage, Stored
from netloom.secret import Secret
from netloom.standbywire import GroupHost, GroupSpec

GROUP = "0a0b0c0d"
SECRET = bytes(range(32))


class _Host:
    def pair_connected(self, group_id: str) -> None:
        self._say("connected")

    def pair_lost(self, group_id: str) -> None:
        self._say("lost")

    def pair_gap(self, group_id: str) -> None:
        self._say("gap")

    def pair_received(self, group_id: str, message: PairMessage) -> None:
        if isinstance(message, Stored):
            self._say(message.error)

    def _say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


async def _run(me: str, first: str, second: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    one, two, three = (
        GroupHost(name=name, address=address, port=port)
        for name, address in (("kvm1", first), ("kvm2", second), ("kvm3", second))
    )
    spec = GroupSpec(group_id=GROUP, owner="o", first=one, second=two, witness=three, secret=Secret(SECRET.hex()))
    pairs = Pairs(loop, Log(), _Host())
    pairs.set_groups([(spec, me)])
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        pairs.send(GROUP, Stored(scope_id="net-204", revision=1, error=line.strip()))


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
