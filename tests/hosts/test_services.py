"""A user with sudo, dnsmasq confined by AppArmor, and services that are missing."""

from __future__ import annotations

import pytest

from bed.cloudstack import FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.lab import Internet
from e2e.networks import MakeLife
from hosts.scenario import whole_life

KINDS = ["apparmor"]

PROFILE = "/usr/share/apparmor/extra-profiles/usr.sbin.dnsmasq /etc/apparmor.d/usr.sbin.dnsmasq"


@pytest.fixture(scope="module")
def cloud(bed: EmulatedBed) -> FakeCloudStack:
    """A CloudStack that logs in as a user with sudo."""
    return FakeCloudStack.on(bed.management).register(hosts=bed.hosts, **bed.login("netadmin", by="key"))


def test_life_of_a_user_with_sudo(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    whole_life(host, make_life, internet)
