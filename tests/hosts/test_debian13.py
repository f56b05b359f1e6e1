"""Debian 13: newer versions of the kernel, nft, systemd and all services."""

from __future__ import annotations

from bed.emulated import EmulatedHost
from bed.lab import Internet
from e2e.networks import MakeLife
from hosts.scenario import whole_life

KINDS = ["debian13"]


def test_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
