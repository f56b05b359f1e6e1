"""Fixtures of the emulated hosts: each test module names the machines that it needs in ``KINDS``.

The machines of a module boot once. After a failure their logs are in ``dist/hosts/<module>/``. The result of a module
is written to ``dist/hosts/<module>.json``; build/ci/platforms.py makes the table of docs/platforms.md from these files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bed import images
from bed.cloudstack import ALL_SERVICES, FakeCloudStack
from bed.emulated import EmulatedBed, EmulatedHost
from bed.lab import Internet
from binary.onefile import build_id
from e2e.networks import OUTSIDE, PUBLIC_VLAN, MakeLife, MakeVpc, making_lives, making_vpcs

pytest.register_assert_rewrite("hosts.scenario")

RESULTS = Path(__file__).resolve().parents[2] / "dist" / "hosts"
_beds: dict[str, EmulatedBed] = {}
_results: dict[str, dict[str, int]] = {}


def _name(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("test_")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    counts = _results.setdefault(_name(item), {"passed": 0, "failed": 0})
    if report.failed:  # type: ignore[attr-defined]
        counts["failed"] += 1
        if bed := _beds.get(_name(item)):
            for host in bed.emulated:
                host.keep_logs(RESULTS / _name(item))
    elif report.when == "call":  # type: ignore[attr-defined]
        counts["passed"] += 1
    return report


@pytest.fixture(scope="module")
def bed(request: pytest.FixtureRequest) -> Iterator[EmulatedBed]:
    """The machines of this module, all running."""
    name = _name(request.node)
    began = time.time()
    kinds = [images.KINDS[kind] for kind in request.module.KINDS]
    bed = EmulatedBed(kinds, public_vlans=[PUBLIC_VLAN])
    with bed:
        _beds[name] = bed
        yield bed
        del _beds[name]
        versions = [{"kind": host.kind.name, **host.versions()} for host in bed.emulated]
    result = {
        **_results.get(name, {"passed": 0, "failed": 0}),
        "build": build_id(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.time() - began),
        "hosts": versions,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.fixture(scope="module")
def host(bed: EmulatedBed) -> EmulatedHost:
    """The first machine."""
    return bed.emulated[0]


@pytest.fixture(scope="module")
def internet(bed: EmulatedBed) -> Internet:
    """The gateway of the public VLAN. Its other address is on lo and represents hosts behind it."""
    return bed.internet(vlan=PUBLIC_VLAN, address="203.0.113.1/24", also=[f"{OUTSIDE}/32"])


@pytest.fixture(scope="module")
def cloud(bed: EmulatedBed) -> FakeCloudStack:
    """A CloudStack that logs in as root by key, and whose networks have all services."""
    return FakeCloudStack.on(bed.management).register(hosts=bed.hosts, **bed.login("root", by="key"))


@pytest.fixture
def make_life(bed: EmulatedBed, internet: Internet, cloud: FakeCloudStack) -> Iterator[MakeLife]:
    """Make networks with all services that are deleted after the test."""
    with making_lives(bed, cloud) as make:
        yield lambda **options: make(**{"offering": ALL_SERVICES, "brisk": True, **options})


@pytest.fixture
def make_vpc(bed: EmulatedBed, internet: Internet) -> Iterator[MakeVpc]:
    """Make VPCs that are deleted after the test."""
    with making_vpcs(bed) as make:
        yield make
