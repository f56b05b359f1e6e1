"""Make the RPM package with rpmbuild."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from package.deb import DESCRIPTION, MAINTAINER, SUMMARY
from package.product import ROOT, Product
from package.tree import EXTENSION, File, Papers, lay, tree

LICENCE = "usr/share/licenses/netloom/LICENSE"

# The package must not depend on the machine or the time, and rpmbuild must not change the executable.
MACROS = {
    "_buildhost": "localhost",
    "use_source_date_epoch_as_buildtime": "1",
    "clamp_mtime_to_source_date_epoch": "1",
    "source_date_epoch_from_changelog": "0",
    "_binary_payload": "w6.xzdio",  # read by EL8, too
    "_binary_filedigest_algorithm": "8",
    "_build_id_links": "none",
    "__os_install_post": "%{nil}",
    "__brp_compress": "%{nil}",
    "debug_package": "%{nil}",
    "optflags": "%{nil}",
}

# Without the directories above EXTENSION: they are CloudStack's, and rpm would change their owner to root.
OWN_DIRECTORIES = ("usr/lib/netloom", EXTENSION, "usr/share/doc/netloom", "usr/share/licenses/netloom")


def write(product: Product, papers: Papers, dist: Path) -> Path:
    """Write the package; its path. The same product gives the same bytes. Raises SystemExit."""
    entries = tree(product, papers, "rpm") | {LICENCE: File(ROOT / "LICENSE")}
    listed = [f"%dir /{path}" for path in OWN_DIRECTORIES] + [_listed(path) for path in sorted(entries)]
    with tempfile.TemporaryDirectory(prefix="netloom-rpm-") as directory:
        stage, top, spec = (Path(directory, name) for name in ("stage", "top", "netloom.spec"))
        lay(entries, stage)
        spec.write_text(_spec(product, stage, listed))
        defines = [f"--define={name} {value}" for name, value in (MACROS | {"_topdir": str(top)}).items()]
        built = subprocess.run(
            ["rpmbuild", "-bb", "--target=x86_64-linux", *defines, str(spec)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=os.environ | {"SOURCE_DATE_EPOCH": str(product.epoch), "LC_ALL": "C.UTF-8"},
        )
        if built.returncode != 0:
            raise SystemExit(f"release: rpmbuild ended with {built.returncode}:\n{built.stdout}")
        made = top / "RPMS/x86_64" / f"netloom-{product.version}-{product.release}.x86_64.rpm"
        target = dist / made.name
        target.write_bytes(made.read_bytes())
    return target


def _spec(product: Product, stage: Path, listed: list[str]) -> str:
    return f"""\
Name: netloom
Version: {product.version}
Release: {product.release}
Summary: {SUMMARY[0].upper()}{SUMMARY[1:]}
License: Apache-2.0
Packager: {MAINTAINER}
ExclusiveArch: x86_64
Requires: glibc >= 2.28
Requires: libgcc
AutoReqProv: no

%description
{DESCRIPTION}

%install
mkdir -p %{{buildroot}}
cp -a {stage}/. %{{buildroot}}

%files
%defattr(-,root,root,-)
{chr(10).join(listed)}

%changelog
* {product.time:%a %b %d %Y} {MAINTAINER} - {product.version}-{product.release}
- Build {product.build}. The changes are in changelog.gz.
"""


def _listed(path: str) -> str:
    kind = "%license " if path == LICENCE else "%doc " if path.startswith(("usr/share/doc/", "usr/share/man/")) else ""
    return f"{kind}/{path}"
