"""The result of a convergence of the host: steps, changed services, announcements."""

from __future__ import annotations

import msgspec

from netloom.plan.steps import Step


class Announcement(msgspec.Struct, frozen=True):
    """An ARP announcement: on this link, the address now belongs to this MAC address."""

    namespace: str
    link: str
    address: str
    mac: str


class HostChanges(msgspec.Struct, frozen=True):
    """The steps that were done, the services that changed, and the addresses to announce.

    ``settled``: the scope was as it was left, so nobody looked at the host (settled.py).
    """

    steps: tuple[Step, ...] = ()
    announcements: tuple[Announcement, ...] = ()
    services: tuple[str, ...] = ()
    settled: bool = False

    @property
    def count(self) -> int:
        return len(self.steps) + len(self.services)
