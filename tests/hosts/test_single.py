"""One host with Debian 12: the short form, which is part of `make test`."""

from __future__ import annotations

from bed.emulated import EmulatedHost
from bed.lab import Internet
from e2e.networks import MakeLife
from hosts.scenario import whole_life

KINDS = ["debian12"]


def test_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
