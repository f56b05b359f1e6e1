"""A process that a scope wants inside its namespace, as a value: what to run, and the files it reads."""

from __future__ import annotations

from typing import Literal

import msgspec

SERVICES_DIR = "/run/netloom/services"


class Probe(msgspec.Struct, frozen=True):
    """How to find out whether a running process still answers: any answer will do.

    ``dns``: a query to this address. ``haproxy``: a word for the worker through the master's socket at this path, so
    that both have to be awake.
    """

    kind: Literal["dns", "haproxy"]
    at: str


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One supervised process. ``directory`` is its own; file names in both tables are relative to it.

    ``config``: the files that the process reads when it starts; a change restarts or reloads it (``on_change``).
    ``watched_files``: the files in ``watched_directory``, where the process notices changes by itself (dnsmasq's
    hostsdir); a change needs no restart. If the process does not forget (``forgets``) what it has read, it is
    restarted when a text changes or disappears.
    ``check``: a command that accepts or refuses a new configuration before it replaces the old one; empty: none.
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
    listens: tuple[tuple[str, int], ...] = ()  # ("udp", 53): it is ready when it listens on all of these
    probe: Probe | None = None


def directory_of(scope_id: str, name: str) -> str:
    """Where a service of a scope keeps its files: ``/run/netloom/services/net-204/dns-204``."""
    return f"{SERVICES_DIR}/{scope_id}/{name}"
