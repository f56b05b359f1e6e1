"""`make demo`, `make bench` and `make test` work in a checkout below any directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from repo.files import ROOT

# Runs a command on a host and in a VM, which have their own /tmp and /root.
PROGRAM = """
from bed import Bed
with Bed(hosts=1, vlans=[1204]) as bed:
    vm = bed.hosts[0].vm("web-1", vlan=1204, mac="02:01:00:cc:00:03", ip="10.10.1.45/24", gateway="10.10.1.1")
    print(bed.hosts[0].sh("hostname"), vm.sh("hostname"), sep="", end="")
"""
COPIED = ("build/ci", "cmd", "internal", "tests")


@pytest.fixture(params=["/tmp", "/root"])
def checkout(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A checkout below a directory that is not visible in simulated machines."""
    with tempfile.TemporaryDirectory(prefix="netloom-checkout-", dir=request.param) as directory:
        for name in COPIED:
            shutil.copytree(
                ROOT / name, Path(directory, name), ignore=shutil.ignore_patterns("__pycache__", "payloads")
            )
        Path(directory, ".venv").symlink_to(sys.prefix)
        yield Path(directory)


def test_the_bed_works_in_a_checkout_hidden_from_its_machines(checkout: Path) -> None:
    copies = set(Path("/opt").glob("netloom-*"))
    command = [sys.executable, str(checkout / "build/ci/checkout.py"), "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["h1", "web-1"]
    assert set(Path("/opt").glob("netloom-*")) == copies
