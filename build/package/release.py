"""`make release`: make all files of a release in dist/, from dist/netloom."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from package import archive, deb, licences, rpm, sbom
from package.product import ROOT, Product, committed
from package.sources import sources
from package.tree import Papers

# The URL in the manifest below which the archive is published. This default does not resolve.
URL = "https://netloom.invalid/"


def main() -> int:
    """The exit status. Raises SystemExit."""
    dist = ROOT / "dist"
    made = committed(dist / "netloom")
    for old in _products(dist):
        old.unlink()
    for path in write(made, dist, os.environ.get("RELEASE_URL") or URL):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size}")
    return 0


def write(made: Product, dist: Path, url: str) -> list[Path]:
    """Write all files of the release and their SHA256SUMS; their paths."""
    environment = ROOT / ".venv-runtime"
    carried = sources()
    bill = sbom.bill(made, environment, carried)
    papers = Papers(licences.third_party(environment, carried, bill), bill)
    program = dist / f"netloom-{made.build}"
    shutil.copyfile(made.executable, program)
    program.chmod(0o755)
    bill_path = dist / f"netloom-{made.build}.cdx.json"
    bill_path.write_text(papers.bill)
    licences_path = dist / f"netloom-{made.build}-THIRD-PARTY-LICENSES"
    licences_path.write_text(papers.licences)
    written = [program, bill_path, licences_path, deb.write(made, papers, dist), rpm.write(made, papers, dist)]
    written += archive.write(made, papers, url, dist)
    sums = dist / "SHA256SUMS"
    sums.write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(written)))
    return [*written, sums]


def _products(dist: Path) -> list[Path]:
    """The files of an earlier release."""
    return [*dist.glob("netloom-[0-9]*"), *dist.glob("netloom_[0-9]*.deb"), *dist.glob("SHA256SUMS")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
