"""The oldest nft that netloom supports, 0.9.8 of Debian 11, loads every ruleset as the installed one does.

Its library is that of the Debian 11 in which ``make build`` tries the one file. It runs in a process of its own, with
the kernel of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import netloom
from kernel import oldest_nft
from kernel.scratch import scratch
from netloom.agent.setup.selftest import NFT_OLDEST

ROOT = Path(os.environ.get("NETLOOM_BUILD_CACHE", "/var/cache/netloom-build")) / "bullseye"
LIBRARIES = ("libnftables.so.1", "libnftnl.so.11")


def with_the_oldest_nft(part: str, directory: Path) -> dict[str, Any]:
    """What ``oldest_nft`` writes. The other libraries are those of this machine, because its Python needs them."""
    assert (ROOT / "usr/sbin/nft").exists(), f"there is no Debian 11 with nft in {ROOT}: make build makes it"
    for name in LIBRARIES:
        shutil.copy(ROOT / "usr/lib/x86_64-linux-gnu" / name, directory / name)
    paths = f"{Path(netloom.__file__).parents[1]}:{Path(__file__).parents[1]}"
    with scratch() as namespace:
        done = subprocess.run(
            [sys.executable, "-m", "kernel.oldest_nft", namespace, part],
            env=os.environ | {"PYTHONPATH": paths, "LD_LIBRARY_PATH": str(directory)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert tuple(found["version"]) == NFT_OLDEST
    return found


@pytest.mark.mutation("old-contexts-have-tables-in-common", instead="True")
def test_many_scripts_in_several_threads_do_not_crash_the_oldest_nft(tmp_path: Path) -> None:
    assert with_the_oldest_nft("threads", tmp_path)["scripts"] == 200


@pytest.mark.mutation("two-values-are-named-in-the-rule", instead='f"dnat ip to {key} map @forwards_{protocol}"')
def test_the_oldest_nft_loads_every_ruleset_like_the_installed_one(tmp_path: Path) -> None:
    found = with_the_oldest_nft("loads", tmp_path)
    with scratch() as namespace:
        assert found["loaded"] == oldest_nft.digests(namespace)


@pytest.mark.mutation("sets-are-declared-by-commands", instead="_block(want, [*_marker(want), *_body(refilled)])")
def test_the_oldest_nft_changes_every_ruleset_and_passes_the_selftest(tmp_path: Path) -> None:
    found = with_the_oldest_nft("changes", tmp_path)
    assert found["wrong"] == []
    assert {"netdev to-cloudbr0", "netdev from-port", "bridge llc", "bridge learning", "inet reserved_addresses",
            "arp reserved_addresses"} <= found["host"].keys()  # fmt: skip
    assert found["failed"] == []
    assert found["leases"] == [{"a": 1, "b": 2}, {"a": 1, "b": 1}, {}, {"a": 2, "b": 1, "c": 1}]
    assert found["gates"] == [["a", "b"], ["a", "b", "c"], [], ["a", "b", "c", "d"], ["a", "d"], []]
