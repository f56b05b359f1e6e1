"""Atomic replacement of files, and the credentials of a socket's peer."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from netloom.files import NotFlushed, rename_durably, replace_bytes, replace_text
from netloom.sockets import peer_credentials
from unit.failing_flush import FailingFlush


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_with_the_given_mode_and_group(durable: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    before = os.umask(0o077)
    try:
        replace_text(file, "old")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        replace_text(file, "n\u00e9w", mode=0o644, group=os.getgid(), durable=durable)
    finally:
        os.umask(before)
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("n\u00e9w", 0o644)
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    replace_bytes(file, b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / ".a.json.new").symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        replace_bytes(tmp_path / "a.json", b"new")
    assert other.read_text() == "kept"


def test_peer_credentials_name_this_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid(), os.getgid())


@pytest.mark.mutation("an-unflushed-file-is-put-back")
@pytest.mark.parametrize("before", [b"old", None])
def test_a_file_is_as_before_when_its_directory_cannot_be_flushed(
    before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    if before is not None:
        replace_bytes(file, before)
    with monkeypatch.context() as patch:
        failing = FailingFlush(patch)
        with pytest.raises(OSError, match="Input/output error"):
            replace_bytes(file, b"new")
    assert failing.flushed == 1
    assert (file.read_bytes() if file.exists() else None) == before
    assert os.listdir(tmp_path) == (["a.json"] if before else [])
    replace_bytes(file, b"new")
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_says_so_when_the_old_file_cannot_be_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    replace_bytes(file, b"old")
    with monkeypatch.context() as patch:
        FailingFlush(patch, read_only=True)
        with pytest.raises(NotFlushed, match="Input/output error"):
            replace_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    replace_bytes(file, b"newer")  # what a crash has left is no obstacle
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.mutation("an-unflushed-rename-is-put-back")
def test_a_rename_is_taken_back_when_the_directory_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    replace_bytes(file, b"old")
    with monkeypatch.context() as patch:
        FailingFlush(patch)
        with pytest.raises(OSError, match="Input/output error"):
            rename_durably(file, tmp_path / "a.ended")
    assert os.listdir(tmp_path) == ["a.json"]
    rename_durably(file, tmp_path / "a.ended")
    assert os.listdir(tmp_path) == ["a.ended"]
