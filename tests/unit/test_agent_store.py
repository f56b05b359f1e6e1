"""The state directory and the log, without an agent."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from msgspec.structs import replace

from netloom import logfile
from netloom.agent.log import Log
from netloom.agent.scopes.store import HostRecord, Store, Unreadable
from netloom.errors import HostRefused
from netloom.state import Network, Placement, PublicIp, Scope
from unit.failing_flush import FailingFlush

SCOPE = Scope(
    scope_id="net-204",
    owner="test",
    revision=7,
    networks={
        "204": Network(network_id="204", implemented=True, vlan="1204", cidr="10.10.1.0/24", gateway="10.10.1.1")
    },
    public_ips={
        "203.0.113.20": PublicIp(address="203.0.113.20", vlan="101", gateway="", cidr="203.0.113.0/24", exit=1)
    },
)


def test_a_saved_scope_is_loaded_unchanged(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "scopes"))
    store.save(SCOPE)
    assert Store(str(tmp_path / "scopes")).load("net-204") == SCOPE
    assert (store.living(), store.ended()) == (["net-204"], [])
    assert store.load("net-205") is None


def test_a_long_state_is_one_line(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    addresses = {f"10.0.{at >> 8}.{at & 255}": SCOPE.public_ips["203.0.113.20"] for at in range(5000)}
    store.save(replace(SCOPE, public_ips=addresses))
    assert (tmp_path / "net-204.json").read_bytes().count(b"\n") == 1
    assert store.encoded(SCOPE).count(b"\n") > 30


@pytest.mark.mutation("the-only-copy-is-known-in-older-states")
def test_an_older_state_of_an_incoming_scope_tells_that_it_was_passive(tmp_path: Path) -> None:
    """In earlier builds ``why`` had that, while the scope was incoming."""
    store = Store(str(tmp_path))
    placement = Placement(epoch=2, host="h1", gate="incoming", peer="h2", why="somebody answers for 203.0.113.20")
    encoded = store.encoded(replace(SCOPE, placement=placement, schema=2))
    (tmp_path / "net-204.json").write_bytes(encoded.replace(b"was_passive", b"unknown"))
    loaded = store.load("net-204")
    assert loaded is not None
    assert loaded.placement == replace(placement, why="", was_passive="somebody answers for 203.0.113.20")
    passive = replace(SCOPE, placement=replace(placement, gate="passive"), schema=2)
    store.save(passive)
    assert store.load("net-204") == passive


def test_a_retired_scope_may_be_created_again_before_it_is_forgotten(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save(SCOPE)
    store.retire("net-204")
    assert (store.living(), store.ended(), store.load("net-204")) == ([], ["net-204"], None)
    store.save(SCOPE)
    assert (store.living(), store.ended()) == (["net-204"], [])
    store.retire("net-204")
    store.forget("net-204")
    store.forget("net-204")
    store.retire("net-204")
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_left_by_a_crash_is_removed(tmp_path: Path) -> None:
    Store(str(tmp_path)).save(SCOPE)
    (tmp_path / ".net-204.json.new").write_text('{"scope')
    (tmp_path / ".net-204.json.old").write_text("{}")
    (tmp_path / "notes.txt").write_text("an operator's")
    store = Store(str(tmp_path))
    assert store.living() == ["net-204"]
    assert sorted(it.name for it in tmp_path.iterdir()) == ["net-204.json", "notes.txt"]


@pytest.mark.parametrize("change", ["save", "retire"])
def test_a_state_is_as_before_when_its_change_cannot_be_flushed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.save(SCOPE)
    with monkeypatch.context() as patch:
        FailingFlush(patch)
        with pytest.raises(HostRefused, match="nothing was changed: Input/output error") as refused:
            store.save(replace(SCOPE, revision=8)) if change == "save" else store.retire("net-204")
    assert refused.value.hint == "the host's disk fails: see dmesg"
    assert (store.load("net-204"), store.living(), store.ended()) == (SCOPE, ["net-204"], [])
    assert [it.name for it in tmp_path.iterdir()] == ["net-204.json"]


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("change", ["save", "retire"])
def test_a_standby_is_told_of_a_change_only_if_it_will_last(
    change: str, read_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call fails otherwise, and a standby that takes over must not have what failed."""
    store = Store(str(tmp_path))
    told: list[object] = []
    store.on_saved, store.on_retired = (lambda scope, text: told.append(scope)), told.append
    store.save(SCOPE)
    with monkeypatch.context() as patch:
        FailingFlush(patch, read_only=read_only)
        with pytest.raises(HostRefused):
            store.save(replace(SCOPE, revision=8)) if change == "save" else store.retire("net-204")
    assert told == [SCOPE]


@pytest.mark.mutation("an-unflushed-state-is-not-used")
@pytest.mark.parametrize("change", ["save", "retire"])
def test_a_state_that_a_power_failure_may_undo_is_not_used(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel makes a file system read-only after an error, so the old state cannot be put back."""
    store = Store(str(tmp_path))
    store.save(SCOPE)
    with monkeypatch.context() as patch:
        FailingFlush(patch, read_only=True)
        with pytest.raises(HostRefused, match="a power failure may undo that: Input/output error"):
            store.save(replace(SCOPE, revision=8)) if change == "save" else store.retire("net-204")
        with pytest.raises(Unreadable, match="a power failure may undo that"):
            store.load("net-204")
        assert store.load("net-205") is None
    assert store.load("net-204") == (replace(SCOPE, revision=8) if change == "save" else None)


def test_a_scope_that_was_created_again_has_not_ended(tmp_path: Path) -> None:
    """A crash may leave both files."""
    store = Store(str(tmp_path))
    store.save(SCOPE)
    (tmp_path / "net-204.ended").write_text("{}")
    assert (store.living(), store.ended()) == (["net-204"], [])


def test_a_state_file_under_another_name_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save(SCOPE)
    (tmp_path / "net-204.json").rename(tmp_path / "net-205.json")
    with pytest.raises(Unreadable, match="is about net-204"):
        store.load("net-205")


@pytest.mark.mutation("a-state-file-is-any-bytes")
@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b'{"schema":1}',
        b'{"schema":1,"\x9b":1}',  # not UTF-8
        b'{"schema":1,"x":' + b"[" * 100_000,
        b'{"schema":1,"scope_id":"net-204","owner":"\xff"}',
    ],
)
def test_a_state_file_with_any_bytes_is_unreadable_and_nothing_else(damaged: bytes, tmp_path: Path) -> None:
    """The agent answers that it holds the scope of an unreadable file, so that no other host takes it over."""
    store = Store(str(tmp_path))
    (tmp_path / "net-204.json").write_bytes(damaged)
    with pytest.raises(Unreadable, match="cannot be read"):
        store.load("net-204")


@pytest.mark.parametrize("damaged", [b"", b'{"to":"\x9b","epoch":1,"drained":"\x9b"}', b'{"x":' + b"[" * 100_000])
def test_damaged_files_about_moves_and_about_the_host_stop_nothing_else(damaged: bytes, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "scopes"))
    store.save_host_record(HostRecord(drained=True))
    (record,) = (it for it in tmp_path.rglob("*") if it.is_file())
    record.write_bytes(damaged)
    (tmp_path / "scopes" / "net-204.moved").write_bytes(damaged)
    assert store.moved() == {}
    with pytest.raises(HostRefused, match="cannot be read"):
        store.host_record()


def test_a_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostRefused, match="Not a directory|File exists"):
        Store(str(tmp_path / "file" / "scopes"))


@pytest.mark.mutation("the-log-is-bounded")
def test_defect_63_the_log_is_bounded_and_has_one_line_per_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logfile, "BYTES_MAX", 1000)
    log = Log(str(tmp_path / "netloom" / "agent.log"))
    for number in range(100):
        log.line(f"call={number}\nforged line \x1b[31m")
    files = sorted((tmp_path / "netloom").iterdir())
    assert [file.name for file in files] == ["agent.log", "agent.log.1"]
    assert all(file.stat().st_size < 1100 for file in files)
    lines = files[0].read_text().splitlines()
    assert lines[-1].endswith("call=99 forged line \\x1b[31m")
    assert oct(files[0].stat().st_mode)[-3:] == "600"


def test_the_log_continues_in_the_old_file_when_rotation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No closed descriptor is written to: its number may already belong to a new socket."""
    monkeypatch.setattr(logfile, "BYTES_MAX", 200)
    log = Log(str(tmp_path / "agent.log"))
    log.line("x" * 300)
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        log.line("in need")
        log.line("still in need")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    log.line("better")
    older = (tmp_path / "agent.log.1").read_text().splitlines()
    assert [line.partition(" ")[2] for line in older[1:]] == ["in need", "still in need"]
    assert (tmp_path / "agent.log").read_text().endswith(" better\n")
    assert len(os.listdir("/proc/self/fd")) == before
