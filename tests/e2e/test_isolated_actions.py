"""Custom actions of CloudStack's own smoke test on a network, and their effect on guests."""

from __future__ import annotations

import json

import pytest

from bed.cloudstack import Failed
from bed.lab import Internet
from e2e.networks import OUTSIDE, Life


def action_message(life: Life, action: str, **params: str) -> str:
    """Run an action; returns its message, as the API and the UI show it."""
    details = json.loads(life.network.custom_action(action, **params))
    assert (details["status"], details["printmessage"]) == ("success", "true")
    return str(details["message"])


@pytest.mark.binary
def test_smoke_08_custom_actions_on_a_network(life: Life, internet: Internet) -> None:
    life.network.implement()
    vm, _ = life.vm("web")
    cidr = f"{OUTSIDE}/32"
    assert vm.ping(OUTSIDE).ok
    assert "office" in action_message(life, "pbr-create-table", table_id="100", table_name="office")
    assert "office" in action_message(life, "pbr-list-tables")
    assert cidr in action_message(life, "pbr-add-route", table="office", route=f"blackhole {cidr}")
    assert cidr in action_message(life, "pbr-list-routes", table="office")
    assert vm.ping(OUTSIDE).ok  # no rule uses the route yet
    assert cidr in action_message(life, "pbr-add-rule", table="office", rule=f"to {cidr}")
    assert cidr in action_message(life, "pbr-list-rules", table="office")
    assert not vm.ping(OUTSIDE, timeout_s=0.3).answered
    assert vm.ping("198.51.100.2").ok
    assert cidr in action_message(life, "pbr-delete-rule", table="office", rule=f"to {cidr}")
    assert vm.ping(OUTSIDE).ok
    assert cidr in action_message(life, "pbr-delete-route", table="office", route=f"blackhole {cidr}")
    assert "office" in action_message(life, "pbr-delete-table", table_id="100", table_name="office")
    assert action_message(life, "check") == "nothing to do: all is as it should be"


def test_invalid_actions_and_routes_fail_with_a_remedy(life: Life) -> None:
    life.network.implement()
    with pytest.raises(Failed, match=r"custom-action pbr-flush: there is no such action on this host \(known: check,"):
        life.network.custom_action("pbr-flush")
    action_message(life, "pbr-create-table", table_id="101")
    link = f"gst-{life.network.facts.network_id}"
    with pytest.raises(Failed, match=rf"'eth0' is not a link of net-\d+ \(links here: {link}, pub-101\)"):
        life.network.custom_action("pbr-add-route", table_id="101", route="default via 192.0.2.1 dev eth0")
