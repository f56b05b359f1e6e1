"""The two hosts are started once; every test begins with stand-ins that answer, and with a directory of its own."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssh.lab import Caller, SshLab


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshLab]:
    # The names of the namespaces are fixed, so that a run which was killed is cleared away by the next one.
    with Path(tempfile.gettempdir(), "stest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lab = SshLab(tmp_path_factory.mktemp("stest"))
        try:
            lab.up()
            yield lab
        finally:
            lab.down()


@pytest.fixture
def lab(started: SshLab) -> SshLab:
    started.h1.play()
    started.h2.play()
    return started


@pytest.fixture
def caller(lab: SshLab, tmp_path: Path) -> Caller:
    return Caller(lab, tmp_path)
