"""The engine's file, what it refuses, and leases that took too long to renew.

The engine's thread and sockets: kernel/test_standby_engine.py.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from netloom import files, standbywire
from netloom.agent.standby.engine import Engine
from netloom.agent.standby.group_file import NAME, Contents, GroupFile, Record
from netloom.agent.standby.member import NANOSECONDS, GroupMember, GroupView
from netloom.errors import HostRefused
from netloom.secret import Secret
from netloom.standby.decision import Kept, Local
from netloom.standbywire import GroupHost, GroupSpec
from unit.standby_group import PAIR, SPEC, Group, Leases, Lines


def engine(directory: Path, log: Lines | None = None) -> Engine:
    return Engine(directory, log or Lines(), lambda _: None, Leases(lambda: 0.0))


def test_a_group_is_on_disk_with_its_secret_for_root_alone(tmp_path: Path) -> None:
    engine(tmp_path).set_group(SPEC, "kvm2")
    path = tmp_path / NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert SPEC.secret.reveal() in path.read_text()
    assert GroupFile(tmp_path).load().groups == (Record(spec=SPEC, me="kvm2", kept=Kept(active="kvm1")),)
    again = engine(tmp_path)
    before = path.stat().st_ino
    again.set_group(SPEC, "kvm2")
    assert path.stat().st_ino == before  # nothing was written


def test_a_group_may_get_other_addresses_and_nothing_else(tmp_path: Path) -> None:
    it = engine(tmp_path)
    it.set_group(SPEC, "kvm1")
    moved = replace(SPEC, first=GroupHost(name="kvm1", address="198.51.100.1", port=9))
    it.set_group(moved, "kvm1")
    assert GroupFile(tmp_path).load().groups[0].spec == moved
    for other, me in (
        (replace(SPEC, secret=Secret("11" * 32)), "kvm1"),
        (replace(SPEC, first=SPEC.second, second=SPEC.first), "kvm1"),
        (replace(SPEC, lease_ms=500), "kvm1"),
        (SPEC, "kvm2"),
    ):
        with pytest.raises(HostRefused, match="never changes"):
            it.set_group(other, me)
    assert GroupFile(tmp_path).load().groups[0].spec == moved


@pytest.mark.parametrize(
    ("spec", "me", "why"),
    [
        (replace(SPEC, group_id="xyz"), "kvm1", "8 hexadecimal digits"),
        (replace(SPEC, group_id="00000000"), "kvm1", "8 hexadecimal digits"),
        (SPEC, "kvm9", "none of its hosts"),
        (replace(SPEC, witness=SPEC.first), "kvm1", "has different hosts"),
        (replace(SPEC, first=GroupHost(name="kvm1", address="host.example")), "kvm1", "not numeric"),
        (replace(SPEC, first=GroupHost(name="kvm1", address="fe80::1%eth0")), "kvm1", "not numeric"),
        (replace(SPEC, first=GroupHost(name="kvm1", address="192.0.2.1", port=0)), "kvm1", "no port 0"),
        (replace(SPEC, secret=Secret("xx" * 32)), "kvm1", "not hexadecimal"),
        (replace(SPEC, secret=Secret("5a" * 8)), "kvm1", "32 bytes"),
        (replace(SPEC, lease_ms=0), "kvm1", "a lease lasts"),
    ],
)
def test_a_group_that_cannot_work_is_refused(tmp_path: Path, spec: GroupSpec, me: str, why: str) -> None:
    with pytest.raises(HostRefused, match=why) as caught:
        engine(tmp_path).set_group(spec, me)
    assert spec.secret.reveal() not in str(caught.value)
    assert not (tmp_path / NAME).exists()


def test_a_group_that_was_left_is_not_joined_again(tmp_path: Path) -> None:
    """Its promises are forgotten."""
    it = engine(tmp_path)
    it.set_group(SPEC, "kvm3")
    it.forget_group(SPEC.group_id)
    it.forget_group(SPEC.group_id)
    for again in (it, engine(tmp_path)):
        with pytest.raises(HostRefused, match="has left it"):
            again.set_group(SPEC, "kvm3")
    assert GroupFile(tmp_path).load() == Contents(forgotten=(SPEC.group_id,))


def test_a_group_that_cannot_be_saved_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    it = engine(tmp_path)
    monkeypatch.setattr(files, "sync_directory", fails)
    with pytest.raises(HostRefused, match=r"cannot be written: No space left on device \(free space"):
        it.set_group(SPEC, "kvm1")
    monkeypatch.undo()
    assert not (tmp_path / NAME).exists()
    it.set_group(SPEC, "kvm1")


@pytest.mark.mutation("an-unreadable-file-serves-nothing", instead="None")
@pytest.mark.parametrize(
    "damage",
    ["", "{}x", '{"groups": [{}]}', '{"version": 2}', "kept", "\0" * 500],
    ids=["empty", "no JSON", "no group", "newer", "a host that is none", "zeros"],
)
def test_a_file_that_cannot_be_read_is_left_and_no_group_is_served(tmp_path: Path, damage: str) -> None:
    engine(tmp_path).set_group(SPEC, "kvm1")
    path = tmp_path / NAME
    path.write_text(path.read_text().replace('"active": "kvm1"', '"active": "kvm3"') if damage == "kept" else damage)
    before, log = path.read_text(), Lines()
    it = engine(tmp_path, log)
    assert it.refused is not None
    assert len(log.with_("cannot be read")) == 1 and SPEC.secret.reveal() not in log.lines[0]
    with pytest.raises(HostRefused, match="cannot be read"):
        it.set_group(SPEC, "kvm1")
    with pytest.raises(HostRefused, match="cannot be read"):
        it.forget_group(SPEC.group_id)
    it.start()
    it.stop()
    assert it.views() == {}
    assert path.read_text() == before


class StoppedLeases(Leases):
    """The thread is stopped before the kernel carries out the renewal: the lease counts from ``at`` all the same."""

    def __init__(self, group: Group, stopped_s: float) -> None:
        super().__init__(lambda: group.now)
        self.group = group
        self.stopped_s = stopped_s

    def renew(self, lives: Mapping[int, float], at: float) -> bool:
        self.group.now_ns += round(self.stopped_s * NANOSECONDS)
        return super().renew({mark: s - self.stopped_s for mark, s in lives.items()}, at)


@pytest.mark.parametrize("stopped_s", [0.0, 0.3, 0.8])
def test_all_leases_are_renewed_in_one_change_to_what_the_decision_says(tmp_path: Path, stopped_s: float) -> None:
    group, other = Group().start(), Group().start()
    leases = StoppedLeases(group, stopped_s)
    it = Engine(tmp_path, Lines(), lambda _: None, leases, clock_ns=lambda: group.now_ns)
    members = [one.first.member for one in (group, other) if one.first.member is not None]
    members[1].spec = replace(SPEC, group_id="0000002b")
    ends = [group.now + 1.3, group.now + 1.2]
    for member, until in zip(members, ends, strict=True):
        assert member._member is not None
        member._member.lease_until = until
    it._renew(members)
    assert [leases.until[mark] for mark in (0x2A, 0x2B)] == pytest.approx(ends, abs=0.001)
    assert [member.view(group.now).lease_s for member in members] == pytest.approx([s - group.now for s in ends])
    leases.until.clear()
    it._renew(members)
    assert leases.until == {}  # nothing to do


def test_a_group_without_a_witness_is_on_disk_and_gets_none_later(tmp_path: Path) -> None:
    it = engine(tmp_path)
    it.set_group(PAIR, "kvm2")
    assert GroupFile(tmp_path).load().groups == (Record(spec=PAIR, me="kvm2", kept=Kept(active="kvm1")),)
    with pytest.raises(HostRefused, match="never changes"):
        it.set_group(SPEC, "kvm2")
    with pytest.raises(HostRefused, match="none of its hosts"):
        engine(tmp_path / "other").set_group(PAIR, "kvm3")


class SpecOfEarlierBuilds(msgspec.Struct, frozen=True, kw_only=True):
    """``GroupSpec`` before there were groups without a witness."""

    group_id: str
    owner: str
    first: GroupHost
    second: GroupHost
    witness: GroupHost
    secret: Secret = Secret()
    lease_ms: int = 1000


def test_earlier_builds_read_groups_with_a_witness_and_refuse_the_others() -> None:
    as_before = SpecOfEarlierBuilds(
        group_id=SPEC.group_id,
        owner=SPEC.owner,
        first=SPEC.first,
        second=SPEC.second,
        witness=GroupHost(name="kvm3", address="2001:db8::3"),
        secret=SPEC.secret,
    )
    assert standbywire.packed(SPEC) == standbywire.packed(as_before)
    assert standbywire.unpacked(standbywire.packed(as_before), GroupSpec) == SPEC
    with pytest.raises(HostRefused, match="cannot be read.*use one version"):
        standbywire.unpacked(standbywire.packed(PAIR), SpecOfEarlierBuilds)


@pytest.mark.mutation("only-news-wake-the-engine", instead="member is not None")
def test_what_the_engine_was_told_before_wakes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[object] = []
    it = engine(tmp_path)
    it.set_local(SPEC.group_id, Local())  # no such group
    it.set_group(SPEC, "kvm1")
    it._begin()
    monkeypatch.setattr(it, "_post", posted.append)
    for local, count in ((Local(), 1), (Local(), 1), (Local(behind=True), 2), (Local(), 3), (Local(), 3)):
        it.set_local(SPEC.group_id, local)
        assert len(posted) == count
    it._begin()  # after a restart of the engine its members know nothing
    it.set_local(SPEC.group_id, Local())
    assert len(posted) == 4


def test_a_view_is_made_when_it_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = engine(tmp_path)
    others = [replace(SPEC, group_id=f"000000{number:02x}") for number in range(1, 21)]
    for spec in others:
        it.set_group(spec, "kvm1")
    it._begin()
    made: list[str] = []
    view = GroupMember.view

    def noted(member: GroupMember, now: float) -> GroupView:
        made.append(member.spec.group_id)
        return view(member, now)

    monkeypatch.setattr(GroupMember, "view", noted)
    views = it.views()
    assert len(views) == 20 and others[3].group_id in views and set(views) == {spec.group_id for spec in others}
    assert made == []
    assert views[others[3].group_id].spec == others[3] and views.get("0000ffff") is None
    assert made == [others[3].group_id]
    it._members = {}
    assert views.get(others[3].group_id) is not None, "the groups of one look stay the same"
