"""The files that the Debian and the RPM package install."""

from __future__ import annotations

import gzip
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from package import completion
from package.product import ROOT, Product

Packaging = Literal["deb", "rpm"]

EXTENSION = "usr/share/cloudstack-management/extensions/netloom"
DOCUMENTS = "usr/share/doc/netloom"
ZSH = {"deb": "usr/share/zsh/vendor-completions", "rpm": "usr/share/zsh/site-functions"}


@dataclass(frozen=True)
class File:
    """A regular file. A Path as ``content``: a copy of that file."""

    content: bytes | Path
    mode: int = 0o644


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Papers:
    """The legal documents of a product: third-party licences, and the bill of materials."""

    licences: str
    bill: str  # CycloneDX, JSON


def tree(product: Product, papers: Papers, packaging: Packaging) -> dict[str, File | Link]:
    """The installed files by path, sorted. There are no configuration files, and no scripts at installation."""
    words = completion.words()
    entries: dict[str, File | Link] = {
        "usr/lib/netloom/netloom": File(product.executable, 0o755),
        "usr/bin/netloom": Link("../lib/netloom/netloom"),
        f"{EXTENSION}/netloom.sh": File(Path(__file__).with_name("netloom.sh"), 0o755),
        "usr/share/man/man1/netloom.1.gz": File(packed((ROOT / "docs/netloom.1").read_bytes())),
        "usr/share/bash-completion/completions/netloom": File(completion.bash(words).encode()),
        f"{ZSH[packaging]}/_netloom": File(completion.zsh(words).encode()),
        "usr/share/fish/vendor_completions.d/netloom.fish": File(completion.fish(words).encode()),
        f"{DOCUMENTS}/copyright": File(_copyright(product).encode()),
        f"{DOCUMENTS}/THIRD-PARTY-LICENSES": File(papers.licences.encode()),
        f"{DOCUMENTS}/netloom.cdx.json": File(papers.bill.encode()),
        f"{DOCUMENTS}/changelog.gz": File(packed((ROOT / "CHANGELOG.md").read_bytes())),
    }
    return dict(sorted(entries.items()))


def lay(entries: dict[str, File | Link], directory: Path) -> None:
    """Write the files below ``directory``, regardless of the umask. dpkg-deb and rpmbuild set the times."""
    for path, entry in entries.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, Link):
            target.symlink_to(entry.target)
            continue
        if isinstance(entry.content, Path):
            shutil.copyfile(entry.content, target)
        else:
            target.write_bytes(entry.content)
        target.chmod(entry.mode)
    for folder, _, _ in os.walk(directory):
        os.chmod(folder, 0o755)


def packed(content: bytes) -> bytes:
    """``content`` compressed by gzip, without file name and time."""
    return gzip.compress(content, 9, mtime=0)


def _copyright(product: Product) -> str:
    return f"""\
netloom. Copyright {product.time.year} its authors.

Licensed under the Apache License, Version 2.0 (the "License"); you may not use
this file except in compliance with the License. On Debian its text is in
/usr/share/common-licenses/Apache-2.0, elsewhere in
/usr/share/licenses/netloom/LICENSE.

The executable contains the Python interpreter and libraries of other authors.
Their names, copyrights and licences are in THIRD-PARTY-LICENSES beside this
file, the bill of materials is in netloom.cdx.json.
"""
