"""An uninstall on a host with groups: no network stops, or loses its standby, without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloom.agent.scopes.store import Store
from netloom.agent.setup.uninstall import check_groups, grouped_scopes
from netloom.agent.standby.group_file import Contents, GroupFile, Record
from netloom.errors import HostRefused
from netloom.standby.decision import Kept
from netloom.state import Placement, Scope
from unit.standby_group import SPEC


def grouped(directory: Path, me: str) -> dict[str, tuple[str, str]]:
    """The host has a network with a standby, and one without; kvm1 is active."""
    store = Store(str(directory / "scopes"))
    placement = Placement(group=SPEC.group_id)
    store.save(Scope(scope_id="net-204", owner=SPEC.owner, placement=placement, schema=3))
    store.save(Scope(scope_id="net-205", owner=SPEC.owner))
    GroupFile(directory).save(Contents(groups=(Record(spec=SPEC, me=me, kept=Kept(active="kvm1")),)))
    return grouped_scopes(store, ["net-204", "net-205"], directory)


@pytest.mark.mutation("a-network-with-a-lease-is-not-left")
def test_a_network_with_a_standby_is_not_left_without_an_agent(tmp_path: Path) -> None:
    found = grouped(tmp_path, "kvm1")
    check_groups(found, "remove")
    with pytest.raises(HostRefused, match="1 networks have a standby, and would stop here: net-204") as raised:
        check_groups(found, "leave")
    assert "netloom drain" in raised.value.hint


@pytest.mark.mutation("a-standby-is-not-removed")
@pytest.mark.parametrize("networks", ["refuse", "remove", "leave"])
def test_a_host_that_stands_by_is_not_removed(tmp_path: Path, networks: str) -> None:
    with pytest.raises(HostRefused, match="stands by for 1 networks: net-204") as raised:
        check_groups(grouped(tmp_path, "kvm2"), networks)  # type: ignore[arg-type]
    assert "registration detail hosts" in raised.value.hint


def test_networks_without_a_standby_are_no_reason(tmp_path: Path) -> None:
    grouped(tmp_path, "kvm1")
    assert grouped_scopes(Store(str(tmp_path / "scopes")), ["net-205"], tmp_path) == {}
    assert grouped_scopes(Store(str(tmp_path / "none")), [], tmp_path / "none") == {}
    check_groups({}, "leave")
