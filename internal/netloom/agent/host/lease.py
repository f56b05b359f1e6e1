"""Leases: the ports of a scope pass frames only while the lease of its group lives, and the kernel ends it by itself.

A group of hosts has two that can serve its scopes (``standby/decision.py``). Both have them complete, with their ports
up and in their bridges. The ports of the one whose lease lives are served; the other one is silent, and the bridges
learn nothing from its ports. No process takes part when a lease ends, so it also ends when all of them are stopped.

The table also keeps heartbeats from VMs, so it exists on each host of a group.

The table ``bridge netloom_lease`` on the host itself has the map ``ports`` from the host ends of the ports to the mark
of their group, two sets of marks, ``alive_1`` and ``alive_2``, whose elements expire, and the hooks of ``gate.py``.
Frames of a port pass while its mark is in both sets. Frames of other links pass untouched.

The rules write the mark into the frame, look it up, and write 0. Nothing else is lost by that: a frame that goes into
another namespace or comes out of one has the mark 0 there (``skb_scrub_packet``).

**A lease never ends late.** The kernel counts a timeout from the moment when it handles the change. A thread that is
stopped between its look at the clock and that moment would make the lease too long, after the other host has begun to
serve. So ``renew`` changes one set after the other, and looks at the clock after each change. Only if that was not late
does it change the other set. So one of the two ends in time, wherever the thread is stopped. What was late is written
again, before anything else.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping

from netloom.agent.host.link_table import FAMILY, MarkTable, OpenSocket
from netloom.agent.kernel import netlink, nft_netlink
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket
from netloom.ethernet import ETHERTYPE, MAGIC

_PORTS = "ports"  # the map
_ALIVE = ("alive_1", "alive_2")

# A renewal ends so much earlier than asked; within this time the kernel has to carry it out. A busy host takes longer.
_EARLY_S = 0.01
# The kernel may round a shorter timeout up.
_SHORTEST_S = 0.01

# The map has no mark of other links. The rule ends there then, and changes nothing.
_FROM_PORTS, _TO_PORTS = (f"meta mark set {it} map @{_PORTS} goto pass" for it in ("iifname", "oifname"))

# What the hosts of groups say to each other on VLANs is sent and heard below the bridges. So a bridge need not pass it:
# neither to a VM, nor from one. @nh is what follows the EtherType.
_HEARTBEATS = f"meta protocol 0x{ETHERTYPE:04x} @nh,0,{8 * len(MAGIC)} 0x{MAGIC.hex()} drop"

TABLE = MarkTable(
    "netloom_lease",
    _PORTS,
    dict.fromkeys(_ALIVE, "type mark; flags timeout;"),
    {
        "pass": (
            f"meta mark != @{_ALIVE[0]} drop",  # guard: the-first-set-ends-a-lease
            f"meta mark != @{_ALIVE[1]} drop",  # guard: the-second-set-ends-a-lease
            "meta mark set 0",  # guard: a-lease-leaves-no-mark
        ),
        "prerouting": (_FROM_PORTS,),  # guard: without-a-lease-a-port-emits-nothing
        "input": (_FROM_PORTS,),  # guard: reserved-addresses-pass-no-port
        "output": (_TO_PORTS,),  # guard: a-bridge-sends-nothing-without-a-lease
        "postrouting": (_TO_PORTS,),  # guard: without-a-lease-nothing-comes-in
        "forward": (_HEARTBEATS,),  # guard: vms-hear-no-heartbeats
    },
)

LIVES = tuple((TABLE.name, it) for it in _ALIVE)

# Not shared with other tables: loading those may take long. What it changes is not reported to ``NftWatch``.
_kernel = OpenSocket(netlink.OF_LEASES)
_in_doubt: dict[int, int] = {}  # mark -> the index of the set in which its element may be too long


def guard(ports: Mapping[str, int]) -> None:
    """Let frames pass these links of the host, which need not exist, only while their mark lives. No mark is 0.

    Others stay as they are. This gives no mark a life. Later frames do not pass; one that a CPU handles at this moment
    may, see ``packets.settled``.

    Raises HostRefused.
    """
    if ports:
        TABLE.put(ports)


def release(links: Iterable[str]) -> None:
    """Let all frames pass these links of the host. With the last one the table goes, and all lives with it.

    Raises HostRefused.
    """
    TABLE.discard(links)


def guarded() -> dict[str, int]:
    """The links of the host that pass frames only while their mark lives: none, if the rules are not all there.

    Raises HostRefused.
    """
    return TABLE.marks()


def hide_heartbeats(is_member: bool) -> None:
    """Let no VM of this host hear or send heartbeats, while the host is a member of a group: no bridge passes them.

    Raises HostRefused.
    """
    if is_member:
        TABLE.put({})
    elif not guarded():
        TABLE.remove()


class Leases:
    """The leases for the thread that decides who serves. All raise HostRefused."""

    def renew(self, lives: Mapping[int, float], at: float) -> bool:
        """As ``renew``, and make the table if there is none: a port that is guarded later passes frames at once."""
        if renew(lives, at):
            return True
        TABLE.put({})
        return renew(lives, at)

    def end(self, marks: Iterable[int]) -> bool:
        return end(marks)

    def alive(self) -> dict[int, float]:
        return alive()


def renew(lives: Mapping[int, float], at: float | None = None) -> bool:
    """Let these marks live so many seconds from ``at`` on, instead of as long as before.

    ``at``: when the seconds were counted, ``time.monotonic``; None: now. A life ends some 10 ms before that time, never
    later. A mark with no more left than that ends.

    Returns False if there is no table: no port is guarded, or somebody deleted it, and ``KernelHost.keep_gates_closed``
    restores it. Raises HostRefused; then no life is longer than it was or than asked, whichever is longer.
    """
    began = time.monotonic() if at is None else at
    ends = {mark: began + life for mark, life in lives.items()}
    try:
        with _kernel as nfnetlink:
            first = {mark: _in_doubt.get(mark, 0) for mark in ends}
            for turn in (0, 1):
                _write(nfnetlink, ends, {mark: it ^ turn for mark, it in first.items()})
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def end(marks: Iterable[int]) -> bool:
    """Let these marks live no longer, at once. Those that do not live do not matter.

    Returns False if there is no table, as ``renew`` does. Raises HostRefused.
    """
    try:
        with _kernel as nfnetlink:
            _end(nfnetlink, list(marks))
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def alive() -> dict[int, float]:
    """For how many seconds each mark that lives will do so. Raises HostRefused."""
    with _kernel as nfnetlink:
        one, other = (nft_netlink.lives(nfnetlink, FAMILY, TABLE.name, it) for it in _ALIVE)
    return {mark: min(one[mark], other[mark]) / 1000 for mark in one.keys() & other.keys()}


def remove() -> None:
    """Let all frames pass all links: delete the table, if there is one. Raises HostRefused."""
    TABLE.remove()


def _write(nfnetlink: Socket, ends: Mapping[int, float], where: Mapping[int, int]) -> None:
    """Write the lives of the marks into one of the sets each, until the kernel has done that in time.

    ``ends``: when each one ends, ``time.monotonic``. ``where``: the index of its set.
    """
    early_s = _EARLY_S
    while True:
        began = time.monotonic()
        left = {mark: it - began - early_s for mark, it in ends.items()}
        over = [mark for mark, it in left.items() if it < _SHORTEST_S]
        if over:
            _end(nfnetlink, over)
        _in_doubt.update({mark: where[mark] for mark in left.keys() - over})
        changes: list[Message] = []
        for index, name in enumerate(_ALIVE):
            some = {mark: int(it * 1000) for mark, it in left.items() if where[mark] == index and mark not in over}
            changes += nft_netlink.put_lives(FAMILY, TABLE.name, name, some) if some else ()
        if changes:
            nft_netlink.change(nfnetlink, changes)
        took_s = time.monotonic() - began
        if took_s <= early_s:  # guard: a-late-renewal-is-written-again
            for mark in left:
                _in_doubt.pop(mark, None)
            return
        early_s = 2 * took_s


def _end(nfnetlink: Socket, marks: list[int]) -> None:
    changes = [it for name in _ALIVE for it in nft_netlink.end_lives(FAMILY, TABLE.name, name, marks)]
    if changes:
        nft_netlink.change(nfnetlink, changes)
    for mark in marks:
        _in_doubt.pop(mark, None)
