"""All hosts of a group get another build, as an operator does it: their networks are served all the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bed.machines import until
from bed.standby import STATIC_NAT, StandbyBed, standby_bed
from e2e.commands import with_commands
from e2e.takeovers import NOBODY_TAKES_OVER_S, watched
from ssh.deploy_lab import deploying_files
from ssh.onefile import OneFiles

BALLAST_MB = 15  # as large as the real program


@pytest.fixture(scope="module")
def files() -> Iterator[OneFiles]:
    with deploying_files() as it:
        yield it


@pytest.fixture(scope="module")
def the_bed(files: OneFiles) -> Iterator[StandbyBed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLOOM_ONE_FILE", str(files.make("0.1.0-1-aaaa", ballast_mb=BALLAST_MB)))
        with standby_bed(details={"standby": "auto"}) as bed:
            yield bed


@pytest.fixture
def it(the_bed: StandbyBed, request: pytest.FixtureRequest) -> StandbyBed:
    """``with_commands`` repeats a test while CloudStack sends commands."""
    the_bed.has_commands = getattr(request, "param", "") == "commands"
    return the_bed


def builds(it: StandbyBed, program: Path) -> list[str]:
    """The build of each candidate's agent, as the operator sees it."""
    told = run(it, program, "agent", "status")
    return [line.split()[1] for line in told.splitlines()[1:]]


def run(it: StandbyBed, program: Path, *words: str) -> str:
    hosts = ",".join(host.address for host in it.candidates)
    login = ["--hosts", hosts, "--sshkey", "/root/key"]
    return it.bed.management.run(str(program), *words, *login, HOME="/root").out


@with_commands
@pytest.mark.long
def test_all_hosts_get_another_build_and_no_packet_is_lost(
    it: StandbyBed, files: OneFiles, record_testsuite_property: Callable[[str, object], None]
) -> None:
    it.make_ready()
    build = "0.1.0-3-cccc" if it.has_commands else "0.1.0-2-bbbb"
    newer = files.make(build, ballast_mb=BALLAST_MB)
    with watched(it, "active"), it.vm.serve_udp(53):
        steady = it.internet.steady_udp(STATIC_NAT, 53)
        began = time.monotonic()
        run(it, newer, "agent", "install")
        record_testsuite_property("upgrade_s", round(time.monotonic() - began, 1))
        time.sleep(NOBODY_TAKES_OVER_S)
        measured = steady.stop()
        assert set(builds(it, newer)) == {build}
        assert until(it.is_ready, seconds=60), it.shown()
    assert measured.sent - measured.answered <= 1, "the last one may be on its way"
