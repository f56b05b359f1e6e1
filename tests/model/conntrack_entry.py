"""A connection-tracking entry as a plain value, with the fields that ``render.flows`` reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    protocol: int
    src: str
    dst: str
    sport: int
    dport: int
    reply_src: str
    reply_dst: str
    reply_sport: int
    reply_dport: int
    icmp_type: int
    icmp_code: int
    mark: int
    status: int = 0
    master: None = None
