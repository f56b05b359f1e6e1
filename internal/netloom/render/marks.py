"""The bits of a packet's and a connection's mark, and the route tables that they choose.

``0x0000ffff`` is the number of the exit (``PublicIp.exit``) that a connection belongs to; it stands in the connection's
mark and is copied to packets that have to leave by that exit. ``0x80000000`` stands in the connection's mark alone:
the connection was revoked, and its packets are dropped whichever end sends them. ``0x00010000`` stands in a packet's
mark alone: a guest began the connection, outward, so an operator's rules may choose its way.
"""

from __future__ import annotations

EXIT_MASK = 0x0000FFFF
POLICY = 0x00010000
REVOKED = 0x80000000

_EXIT_TABLES = 20000


def exit_of(mark: int) -> int:
    """The exit that a mark names; 0 is none, the main table decides."""
    return mark & EXIT_MASK


def table(exit_number: int) -> int:
    """The route table of an exit; its policy rule has the same number as priority."""
    return _EXIT_TABLES + exit_number
