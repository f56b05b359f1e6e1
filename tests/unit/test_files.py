"""Atomic replacement of files, and the credentials of a socket's peer."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from netloom.files import replace_bytes, replace_text
from netloom.sockets import peer_credentials


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
