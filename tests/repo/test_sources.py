"""The sources that are compiled into the executable are pinned: every file by its hash."""

from __future__ import annotations

import re

from package import sources
from repo.files import ROOT

LINES = [it for it in (ROOT / "build/nuitka/sources.txt").read_text().splitlines() if it and not it.startswith("#")]


def test_every_source_has_a_version_and_every_file_a_hash() -> None:
    packages = dict(it.split(" ") for it in LINES if not re.match("[0-9a-f]{64} ", it))
    files = [it.split(" ")[1] for it in LINES if it.split(" ")[1] not in packages.values()]
    assert sorted(packages) == ["libffi-dev", "python3.11", "zlib"]
    for package, version in packages.items():
        own = [it for it in files if it.startswith(f"{package}_")]
        whole = version.partition(":")[2] or version
        # libffi is linked from Debian's archive of position-independent code.
        assert (f"{package}_{whole}_amd64.deb" if package == "libffi-dev" else f"{package}_{whole}.dsc") in own
    assert all(any(it.startswith(f"{package}_") for package in packages) for it in files)


def test_the_bill_of_materials_uses_the_pinned_sources() -> None:
    found = {it.name: it for it in sources.sources()}
    for name in ("python3.11", "zlib"):
        assert any(it.startswith(found[name].sha256 + " ") for it in LINES)
        assert found[name].version in " ".join(LINES)
