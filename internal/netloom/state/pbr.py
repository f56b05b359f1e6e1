"""An operator's policy routing: named route tables, their routes, and the rules that select a table for a packet.

The custom actions ``pbr-*`` change it. Routes and rules are read and printed in the syntax of ip-route(8) and
ip-rule(8).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.netobjects import ANYWHERE, route_text, selector_text

RouteKind = Literal["unicast", "blackhole", "unreachable", "prohibit"]


class PbrTable(msgspec.Struct, frozen=True, kw_only=True):
    """A route table of the scope: the kernel's number, and a name that only operators see."""

    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.number} {self.name}"


class PbrRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route. A table has one route per destination. Only ``unicast`` routes have ``link``, ``via`` and ``source``."""

    table: int
    destination: str  # a prefix; the default route is ANYWHERE
    kind: RouteKind = "unicast"
    link: str = ""  # a link of the namespace: "pub-101"
    via: str = ""  # empty: on-link
    source: str = ""  # preferred source address of the device's own packets

    def __str__(self) -> str:
        destination = "default" if self.destination == ANYWHERE else self.destination
        return route_text(destination, self.kind, self.via, self.link, self.source)


class PbrRule(msgspec.Struct, frozen=True, kw_only=True):
    """Outward connections of guests that match look up a table. Empty ``source``, ``destination``, ``iif``: any."""

    priority: int
    table: int
    source: str = ""  # a prefix, as destination is
    destination: str = ""
    iif: str = ""  # a guest link: "gst-204"

    @property
    def selector(self) -> str:
        """The packets that the rule matches, as ip-rule(8) writes them."""
        return selector_text(self.source, self.destination, self.iif) or "from all"


class Pbr(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, sorted: tables by number, routes by table and destination, rules by priority."""

    tables: tuple[PbrTable, ...] = ()
    routes: tuple[PbrRoute, ...] = ()
    rules: tuple[PbrRule, ...] = ()

    def name_of(self, number: int) -> str:
        """The name of a table; its number if the table does not exist."""
        return next((it.name for it in self.tables if it.number == number), str(number))
