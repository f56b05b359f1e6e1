"""The bits of packet marks and connection marks, and the route tables that they select.

``0x0000ffff``: the number of the exit (``PublicIp.exit``) that a connection uses. It is stored in the connection's mark
and copied to the mark of those packets that must leave through this exit.
``0x80000000``, in the connection's mark only: the connection is revoked. Its packets are dropped in both directions.
``0x00010000``, in a packet's mark only: a guest opened the connection to the outside, so the operator's rules
(``pbr-add-rule``) may select the route.
"""

from __future__ import annotations

EXIT_MASK = 0x0000FFFF
POLICY = 0x00010000
REVOKED = 0x80000000

_EXIT_TABLES = 20000


def exit_of(mark: int) -> int:
    """The exit number in a mark; 0: none, so the main route table is used."""
    return mark & EXIT_MASK


def table(exit_number: int) -> int:
    """The route table of an exit. Its policy routing rule has the same number as its priority."""
    return _EXIT_TABLES + exit_number
