"""Fixtures of the SSH tests: two hosts for all tests, with stand-in agents; a new directory for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bed import Bed
from bed.lab import Host
from ssh.deploy_lab import BALLAST_MB, ONE, TWO, deploying, wipe
from ssh.lab import Caller, SshLab, running_lab
from ssh.onefile import OneFiles


@pytest.fixture(scope="session")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshLab]:
    with running_lab(tmp_path_factory.mktemp("stest")) as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: SshLab) -> SshLab:
    shared_lab.h1.set_behaviour()
    shared_lab.h2.set_behaviour()
    return shared_lab


@pytest.fixture
def caller(lab: SshLab, tmp_path: Path) -> Caller:
    return Caller(lab, tmp_path)


@pytest.fixture(scope="session")
def deploy_bed() -> Iterator[tuple[Bed, OneFiles]]:
    with deploying(hosts=1) as it:
        yield it


@pytest.fixture
def files(deploy_bed: tuple[Bed, OneFiles]) -> OneFiles:
    return deploy_bed[1]


@pytest.fixture
def bed(deploy_bed: tuple[Bed, OneFiles]) -> Iterator[Bed]:
    """A bed whose host has no files of netloom."""
    yield deploy_bed[0]
    wipe(deploy_bed[0])


@pytest.fixture
def host(bed: Bed) -> Host:
    return bed.hosts[0]


@pytest.fixture
def one(files: OneFiles) -> Path:
    return files.make(ONE, ballast_mb=BALLAST_MB)


@pytest.fixture
def two(files: OneFiles) -> Path:
    return files.make(TWO)
