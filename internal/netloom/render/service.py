"""A process in the namespace of a scope, as a value: its command and the files that it reads."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloom.state.served import Served

SERVICES_DIR = "/run/netloom/services"


class Probe(msgspec.Struct, frozen=True):
    """How to find out whether a running process still answers. Any answer counts.

    ``dns``: send a query to the address ``at``. ``haproxy``: send a command for the worker through the master's socket
    at the path ``at`` in the root directory of the process, so that both processes must answer.
    """

    kind: Literal["dns", "haproxy"]
    at: str


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One supervised process. ``directory`` is its own; file names in both tables are relative to it.

    ``config``: the files that the process reads when it starts; a change restarts or reloads it (``on_change``).
    ``watched_files``: the files in ``watched_directory``, where the process notices changes by itself (dnsmasq's
    hostsdir); a change needs no restart. If the process does not forget (``forgets``) what it has read, it is
    restarted when a text changes or disappears.
    ``capabilities``: those that the process keeps. ``demanded``: those that it is only told to have
    (netloom/confine.py).
    ``check``: a command that accepts or refuses a new configuration before it replaces the old one; empty: none.
    ``places``: file or directory name to the path where the process finds it, in its own root directory; empty: all are
    in ``directory``.
    ``serves``: what is missing without it, in the network ``network_id``; empty: in all networks of the scope.
    """

    name: str  # "dns-204", "lb": unique within the scope
    directory: str
    argv: tuple[str, ...]
    config: dict[str, str]
    on_change: Literal["restart", "reload"] = "restart"
    watched_directory: str = ""
    watched_files: dict[str, str] = {}
    forgets: bool = True
    check: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ("net_bind_service",)
    demanded: tuple[str, ...] = ()
    data_mib_max: int = 128  # private memory of each process, in MiB (RLIMIT_DATA)
    listens: tuple[tuple[str, int], ...] = ()  # ("udp", 53); the process is ready when it listens on all of them
    probe: Probe | None = None
    places: dict[str, str] = {}
    serves: frozenset[Served] = frozenset()
    network_id: str = ""


def directory_of(scope_id: str, name: str) -> str:
    """The directory of a service of a scope: ``/run/netloom/services/net-204/dns-204``."""
    return f"{SERVICES_DIR}/{scope_id}/{name}"
