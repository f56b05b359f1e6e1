"""Command lines and the entry points that they select: one table for the doors in Python and in C."""

from __future__ import annotations

from typing import Literal

Expected = Literal["call", "agent", "guest", "confine", "helper", "people"]

LINES: list[tuple[str, Expected]] = [
    ("ensure-network-device /tmp/cs-extnet.payload 60", "call"),
    ("ensure-network-device", "call"),  # a protocol command with too few arguments: one line, no help text
    ("frobnicate /tmp/cs-extnet.payload 60", "call"),  # a newer CloudStack's command
    ("agent serve", "agent"),
    ("agent connect --socket", "agent"),
    ("agent", "agent"),
    ("agent activate --by-word", "agent"),
    ("agent install --hosts h1,h2", "people"),
    ("agent uninstall --networks remove", "people"),
    ("agent --help", "people"),
    ("guest", "guest"),
    ("confine 1 /run", "confine"),
    ("helper", "helper"),
    ("", "people"),
    ("--help", "people"),
    ("version", "people"),
    ("--version", "people"),
    ("-V", "people"),
    ("-h", "people"),
    ("help", "people"),
    ("help agent install", "people"),
    ("hosts list --json", "people"),
    ("hosts forget kvm1", "people"),
    ("move net-204 --to h2", "people"),
    ("export archive net-204", "people"),
    ("frobnicate", "people"),
    ("-frob-network /tmp/cs-extnet.payload 60", "people"),
    ("frob-network /tmp/cs-extnet.payload 60 more", "call"),
    ("export archive-1 net-204", "people"),
    ("agent install-x 60", "agent"),
]
