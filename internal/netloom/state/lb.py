"""Load balancing rules: a port of a public address, and the guests that share its connections."""

from __future__ import annotations

from typing import Literal

import msgspec


class Backend(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """A guest that gets a share of the connections."""

    ip: str
    port: int


class Balancing(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a scope's haproxy, from the registration.

    ``idle_s``: a connection without data for so many seconds is closed. ``connections_max``: connections of all rules
    together at the same time; each rule has an equal share.
    """

    idle_s: int = 600
    connections_max: int = 8000


class LbRule(msgspec.Struct, frozen=True, kw_only=True):
    """One balanced port of a public address. If it has no backend, connections are refused."""

    rule_id: int
    public_ip: str
    public_port: int
    protocol: Literal["tcp", "udp", "tcp-proxy"]
    algorithm: Literal["roundrobin", "leastconn", "source"]
    backends: tuple[Backend, ...] = ()
    name: str = ""
    network_id: str = ""
