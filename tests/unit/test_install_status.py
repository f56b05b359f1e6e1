"""``netloom agent status``: what is not restored yet; and the unit file."""

from __future__ import annotations

import configparser

import pytest

from netloom.agent import heartbeat
from netloom.agent.setup import install
from netloom.errors import HostRefused


def status(unrestored: int | None, *restoring: str) -> install.Status:
    return install.Status(
        current="1",
        previous="",
        held="",
        builds=("1",),
        serves="1",
        pid=7,
        unit="",
        networks=50,
        unrestored=unrestored,
        restoring=restoring,
    )


def test_the_status_waits_until_every_network_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [status(None), status(2, "net-204", "net-205"), status(0)]
    monkeypatch.setattr(install, "status", lambda: seen.pop(0))
    assert install.status_when_restored(20).unrestored == 0
    assert seen == []


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (status(None), "after 0 s the agent does not answer"),
        (status(2, "net-204", "net-205"), "after 0 s 2 networks are not restored: net-204, net-205"),
    ],
)
def test_a_wait_that_is_too_short_names_what_is_missing(
    now: install.Status, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "status", lambda: now)
    with pytest.raises(HostRefused, match=says):
        install.status_when_restored(0)


def test_the_agent_asks_for_its_watchdog_and_the_unit_has_finite_times() -> None:
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(install.UNIT_TEXT)
    service = unit["Service"]
    assert (service["Type"], service["Restart"], service["KillMode"]) == ("notify", "always", "process")
    # One beat that is late by all that it may wait for its answer does not end the agent.
    assert heartbeat.EVERY_S + heartbeat.ANSWER_S_MAX < heartbeat.WATCHDOG_S <= 60
    assert heartbeat.ready("") == "READY=1\nWATCHDOG_USEC=45000000"
    assert heartbeat.ready("3000000") == "READY=1"  # an operator's drop-in
    # A rollback keeps the unit file. An older build sends no beats, and would be ended every 45 seconds.
    assert "WatchdogSec" not in service
    assert 0 < int(service["TimeoutAbortSec"]) <= 10
    assert 300 <= int(service["TimeoutStartSec"]) <= 900


def test_the_unit_starts_after_the_network_is_configured_and_before_cloudstacks_agent() -> None:
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(install.UNIT_TEXT)
    order = unit["Unit"]
    assert "network-online.target" in order["Wants"].split()
    assert {"network.target", "network-online.target"} <= set(order["After"].split())
    assert order["Before"] == "cloudstack-agent.service"
