"""A disk on which the names of a directory cannot be flushed."""

from __future__ import annotations

import os
import stat

import pytest


class FailingFlush:
    """Lets fsync(2) of directories fail. ``read_only``: renames and removals fail from then on, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, read_only: bool = False) -> None:
        self.flushed = 0
        real = os.fsync

        def fsync(fd: int) -> None:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                real(fd)
                return
            self.flushed += 1
            if read_only:
                monkeypatch.setattr(os, "rename", refused)
                monkeypatch.setattr(os, "unlink", refused)
            raise OSError(5, "Input/output error")

        def refused(*_: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "fsync", fsync)
