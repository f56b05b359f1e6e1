"""Make the Debian package with dpkg-deb."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from email.utils import format_datetime
from pathlib import Path

from package.product import Product
from package.tree import DOCUMENTS, File, Link, Papers, lay, packed, tree

MAINTAINER = "netloom maintainers <maintainers@netloom.invalid>"
SUMMARY = "guest networks for Apache CloudStack on plain Linux hosts"
DESCRIPTION = """\
CloudStack calls one executable for every event of a network; netloom carries
it over SSH to a host, where a network namespace with nftables, DHCP, DNS and
load balancing replaces the virtual router. This package is for the management
server. Hosts do not need it: netloom installs itself there."""

# Tags of lintian that are overridden, each with the reason.
OVERRIDES = """\
# The same executable is installed on hosts. It is linked for an older C library.
netloom: hardening-no-pie [usr/lib/netloom/netloom]
# The package is not uploaded to Debian.
netloom: initial-upload-closes-no-bugs [usr/share/doc/netloom/changelog.Debian.gz:1]
"""


def write(product: Product, papers: Papers, dist: Path) -> Path:
    """Write the package; its path. The same product gives the same bytes."""
    target = dist / f"netloom_{product.version}-{product.release}_amd64.deb"
    entries = tree(product, papers, "deb")
    entries[f"{DOCUMENTS}/changelog.Debian.gz"] = File(packed(_changelog(product).encode()))
    entries["usr/share/lintian/overrides/netloom"] = File(OVERRIDES.encode())
    entries["DEBIAN/md5sums"] = File(_md5sums(entries).encode())
    entries["DEBIAN/control"] = File(_control(product, entries).encode())
    with tempfile.TemporaryDirectory(prefix="netloom-deb-") as directory:
        lay(entries, Path(directory))
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "--threads-max=1", "-Zxz", "-z6", "--build", directory, str(target)],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"SOURCE_DATE_EPOCH": str(product.epoch)},
        )
    return target


def _control(product: Product, entries: dict[str, File | Link]) -> str:
    size = sum(len(_bytes(entry)) for path, entry in entries.items() if isinstance(entry, File))
    fields = {
        "Package": "netloom",
        "Version": f"{product.version}-{product.release}",
        "Architecture": "amd64",
        "Maintainer": MAINTAINER,
        "Installed-Size": str((size + 1023) // 1024),
        "Depends": "libc6 (>= 2.28), libgcc-s1",
        "Section": "net",
        "Priority": "optional",
        "Description": "\n ".join([SUMMARY, *DESCRIPTION.splitlines()]),
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def _md5sums(entries: dict[str, File | Link]) -> str:
    return "".join(
        f"{hashlib.md5(_bytes(entry), usedforsecurity=False).hexdigest()}  {path}\n"
        for path, entry in sorted(entries.items())
        if isinstance(entry, File)
    )


def _changelog(product: Product) -> str:
    return (
        f"netloom ({product.version}-{product.release}) unstable; urgency=medium\n\n"
        f"  * Build {product.build}. The changes are in changelog.gz.\n\n"
        f" -- {MAINTAINER}  {format_datetime(product.time)}\n"
    )


def _bytes(entry: File) -> bytes:
    return entry.content.read_bytes() if isinstance(entry.content, Path) else entry.content
