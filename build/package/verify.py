"""Test the packages: install each in a new root file system, use it there, remove it, and look for leftovers."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from package.product import ROOT

LAUNCHER = "/usr/share/cloudstack-management/extensions/netloom/netloom.sh"
PROGRAM = "usr/lib/netloom/netloom"
# Directories of CloudStack, of shells and of rpm: rpm creates missing ones and does not remove them.
OF_OTHERS = {
    "usr/share/cloudstack-management",
    "usr/share/cloudstack-management/extensions",
    "usr/share/fish",
    "usr/share/fish/vendor_completions.d",
    "usr/share/licenses",
    "usr/share/zsh",
    "usr/share/zsh/site-functions",
}
# Directories where package managers keep their records, and where this test writes.
NOT_THE_PACKAGE = ("var/lib/dpkg", "var/lib/rpm", "var/log", "var/cache", "tmp", "proc", "dev")
BASH = """
source /usr/share/bash-completion/completions/netloom
COMP_WORDS=(netloom hosts ''); COMP_CWORD=2; _netloom; echo "${COMPREPLY[*]}"
"""
FISH = "source $argv[1]; complete --do-complete 'netloom hosts '"
ZSH = """
_describe() { print -- ${${(P)2}%%:*} }
complete() { words=(netloom hosts ''); CURRENT=3; source $1 }
complete $1
"""


class Wrong(Exception):
    """A package does not do what it should."""


def main() -> int:
    """The exit status: 1 when a package is wrong."""
    dist = ROOT / "dist"
    try:
        _sums(dist)
        _output(["mandoc", "-T", "lint", "-W", "warning", str(ROOT / "docs/netloom.1")])
        for suffix, installed in {"deb": _deb, "rpm": _rpm}.items():
            (package,) = dist.glob(f"netloom[-_][0-9]*.{suffix}")
            with tempfile.TemporaryDirectory(prefix="netloom-root-", dir="/var/tmp") as directory:
                root = Path(directory, "root")
                subprocess.run([Path(__file__).with_name("root"), root], check=True)
                installed(root, package)
            print(f"verified: {package.name}")
        (archive,) = dist.glob("netloom-*-extension.zip")
        _archive(archive, dist / "netloom")
        print(f"verified: {archive.name}")
    except Wrong as wrong:
        print(f"release: {wrong}", file=sys.stderr)
        return 1
    return 0


def _deb(root: Path, package: Path) -> None:
    before = _entries(root)
    (root / "tmp/netloom.deb").write_bytes(package.read_bytes())
    _output(["lintian", "--allow-root", "--fail-on=error,warning", str(package)])
    _inside(root, "dpkg", "--install", "/tmp/netloom.deb")
    _test_installed(root)
    zsh, fish = root / "usr/share/zsh/vendor-completions/_netloom", root / "usr/share/fish/vendor_completions.d"
    _expect("zsh's completion", _output(["zsh", "-f", "-c", ZSH, "zsh", str(zsh)]).split()[:2], ["forget", "list"])
    offered = _output(["fish", "--no-config", "-c", FISH, str(fish / "netloom.fish")])
    _expect("fish's completion", [line.partition("\t")[0] for line in offered.splitlines()], ["forget", "list"])
    _expect("dpkg --verify", _inside(root, "dpkg", "--verify", "netloom"), "")
    _inside(root, "dpkg", "--purge", "netloom")
    _check_removed(before, root, set())


def _rpm(root: Path, package: Path) -> None:
    before = _entries(root)
    # --nodeps: in this Debian, rpm does not know that glibc and libgcc are installed.
    rpm = ["rpm", f"--root={root}", "--dbpath=/var/lib/rpm"]
    _output([*rpm, "--nodeps", "--nosignature", "--install", str(package)])
    _test_installed(root)
    _expect("rpm --verify", _output([*rpm, "--nodeps", "--verify", "netloom"]), "")
    _output([*rpm, "--erase", "netloom"])
    _check_removed(before, root, OF_OTHERS)


def _test_installed(root: Path) -> None:
    """Use the installed package as an operator and CloudStack do."""
    version = _inside(root, "netloom", "version")
    if not version.startswith("netloom "):
        raise Wrong(f"netloom version printed {version!r}")
    _expect("the launcher", _inside(root, LAUNCHER, "version"), version)
    _expect("the completion", _inside(root, "bash", "-c", BASH).split()[:2], ["forget", "list"])
    page = gzip.decompress((root / "usr/share/man/man1/netloom.1.gz").read_bytes())
    _expect("the man page", page, (ROOT / "docs/netloom.1").read_bytes())
    _expect("the installed executable", _sha256(root / PROGRAM), _sha256(ROOT / "dist/netloom"))


def _archive(archive: Path, executable: Path) -> None:
    """Check the files of the archive. CloudStack removes the first directory of each name."""
    with zipfile.ZipFile(archive) as opened:
        names = {name.partition("/")[2] for name in opened.namelist()}
        _expect("the archive", names, {"LICENSE", "THIRD-PARTY-LICENSES", "manifest.yaml", "netloom"})
        (inside,) = (name for name in opened.namelist() if name.endswith("/netloom"))
        _expect("its executable", hashlib.sha256(opened.read(inside)).hexdigest(), _sha256(executable))


def _sums(dist: Path) -> None:
    for line in (dist / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split("  ")
        _expect(f"the sum of {name}", _sha256(dist / name), wanted)


def _check_removed(before: set[str], root: Path, left: set[str]) -> None:
    _expect("what is left after removal", _entries(root) - before, left)
    _expect("what is missing after removal", before - _entries(root), set())


def _entries(root: Path) -> set[str]:
    found = set()
    for folder, directories, names in os.walk(root):
        at = os.path.relpath(folder, root)
        directories[:] = [it for it in directories if os.path.normpath(os.path.join(at, it)) not in NOT_THE_PACKAGE]
        found |= {os.path.normpath(os.path.join(at, it)) for it in [*directories, *names]}
    return found


def _inside(root: Path, *argv: str) -> str:
    """The output of a command in the root, with its own /proc and without the environment of this machine."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8"}
    return _output(["unshare", "--mount", "--pid", "--fork", f"--root={root}", "--mount-proc", *argv], environment)


def _output(argv: Sequence[str], environment: dict[str, str] | None = None) -> str:
    ended = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd="/",
    )
    if ended.returncode != 0:
        raise Wrong(f"{' '.join(argv)} ended with {ended.returncode}: {(ended.stdout + ended.stderr).strip()[-800:]}")
    return ended.stdout


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r} instead of {wanted!r}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
