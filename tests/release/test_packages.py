"""The packages and the archive, built from a script in place of the executable."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from package import archive, deb, rpm
from package.product import Product, product, release
from package.tree import EXTENSION, Papers
from repo.files import ROOT

PAPERS = Papers("licences\n", "{}\n")
STAND_IN = """\
#!/bin/sh
if [ "$*" = "version --json" ]; then echo '{"version": "0.1.0", "build": "0.1.0-1f2e3d4c5b6a", "wire": 1}'; exit; fi
printf '%s\\n' "$#" "$@" "$PWD" "$SETTING"
exit 3
"""


@dataclass(frozen=True)
class Made:
    """The paths of the files that were built."""

    deb: Path
    rpm: Path
    zip: Path
    manifest: Path


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Product:
    path = tmp_path_factory.mktemp("built") / "netloom"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return product(path, 1_795_803_605, [])


@pytest.fixture(scope="module")
def made(stand_in: Product, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _make(stand_in, tmp_path_factory.mktemp("dist"))


def _make(it: Product, dist: Path) -> Made:
    return Made(
        deb.write(it, PAPERS, dist), rpm.write(it, PAPERS, dist), *archive.write(it, PAPERS, "https://x.invalid", dist)
    )


def said(*words: str | Path, **environment: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_packages_are_reproducible(made: Made, stand_in: Product, tmp_path: Path) -> None:
    """Build again with another directory, umask, time zone, language and file time."""
    os.utime(stand_in.executable, (1_000_000_000, 1_000_000_000))
    before = os.umask(0o077)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TZ", "Pacific/Auckland")
        patched.setenv("LC_ALL", "C")
        patched.setenv("TMPDIR", str(tmp_path))
        dist = tmp_path / "dist"
        dist.mkdir()
        try:
            again = _make(stand_in, dist)
        finally:
            os.umask(before)
    for first, second in zip(vars(made).values(), vars(again).values(), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def of_deb(path: Path) -> dict[str, str]:
    """The mode of each file by its path, without directories. Everything must belong to root."""
    with tarfile.open(
        fileobj=BytesIO(subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True).stdout)
    ) as tar:
        members = tar.getmembers()
    assert {(it.uid, it.gid) for it in members} == {(0, 0)}
    assert {it.mode for it in members if it.isdir()} == {0o755}
    return {
        it.name[1:]: stat.filemode((stat.S_IFLNK if it.issym() else stat.S_IFREG) | it.mode)
        for it in members
        if not it.isdir()
    }


def of_rpm(path: Path) -> dict[str, str]:
    listed = said("rpm", "-qp", "--qf", "[%{FILEMODES:perms} %{FILEUSERNAME} %{FILEGROUPNAME} %{FILENAMES}\n]", path)
    rows = [line.split(" ", 3) for line in listed.splitlines()]
    assert {(user, group) for _, user, group, _ in rows} == {("root", "root")}
    return {name: mode for mode, _, _, name in rows if not mode.startswith("d")}


def test_deb_and_rpm_install_the_same_files(made: Made) -> None:
    alike = {name: mode for name, mode in of_deb(made.deb).items() if "/zsh/" not in name}
    other = {name: mode for name, mode in of_rpm(made.rpm).items() if "/zsh/" not in name}
    assert alike.pop("/usr/share/doc/netloom/changelog.Debian.gz") == "-rw-r--r--"
    assert alike.pop("/usr/share/lintian/overrides/netloom") == "-rw-r--r--"
    assert other.pop("/usr/share/licenses/netloom/LICENSE") == "-rw-r--r--"
    assert alike == other
    assert {name for name, mode in alike.items() if mode == "-rwxr-xr-x"} == {
        "/usr/lib/netloom/netloom",
        f"/{EXTENSION}/netloom.sh",
    }
    assert {name for name, mode in alike.items() if mode.startswith("l")} == {"/usr/bin/netloom"}


def test_packages_have_no_scripts_and_depend_only_on_the_c_library(made: Made) -> None:
    control = said("dpkg-deb", "-I", made.deb, LC_ALL="C")
    assert re.findall(r"lines +(?:\* )?(\w+)", control) == ["control", "md5sums"]
    assert said("dpkg-deb", "-f", made.deb, "Depends").strip() == "libc6 (>= 2.28), libgcc-s1"
    assert said("rpm", "-qp", "--scripts", made.rpm) == ""
    needs = said("rpm", "-qpR", made.rpm).splitlines()
    assert {line for line in needs if not line.startswith("rpmlib(")} == {"glibc >= 2.28", "libgcc"}


def dpkg(root: Path, *words: str | Path) -> str:
    return said("dpkg", f"--root={root}", "--force-depends", "--log=/dev/null", *words)


def test_the_deb_installs_and_removes_cleanly(made: Made, tmp_path: Path) -> None:
    for folder in ("info", "updates"):
        (tmp_path / "var/lib/dpkg" / folder).mkdir(parents=True)
    for name in ("status", "available"):
        (tmp_path / "var/lib/dpkg" / name).touch()
    dpkg(tmp_path, "--install", made.deb)
    assert dpkg(tmp_path, "--verify", "netloom") == ""
    assert (tmp_path / "usr/bin/netloom").resolve() == tmp_path / "usr/lib/netloom/netloom"
    dpkg(tmp_path, "--purge", "netloom")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["var"]


def test_the_rpm_installs_and_removes_cleanly(made: Made, tmp_path: Path) -> None:
    tool = ("rpm", f"--root={tmp_path}", "--dbpath=/db")
    said(*tool, "--nodeps", "--nosignature", "-i", made.rpm)
    assert said(*tool, "--nodeps", "-V", "netloom") == ""
    assert (tmp_path / "usr/lib/netloom/netloom").read_text() == STAND_IN
    said(*tool, "-e", "netloom")
    assert [path for path in (tmp_path / "usr").rglob("*") if not path.is_dir()] == []
    assert not (tmp_path / EXTENSION).exists()


def test_the_launcher_passes_everything_through(stand_in: Product, tmp_path: Path) -> None:
    """Arguments, environment, working directory and exit status are passed through, without a process in between."""
    launcher = tmp_path / "netloom.sh"
    text = (ROOT / "build/package/netloom.sh").read_text()
    assert text.count("/usr/lib/netloom/netloom") == 1
    launcher.write_text(text.replace("/usr/lib/netloom/netloom", str(stand_in.executable)))
    launcher.chmod(0o755)
    words: Sequence[str] = ["two words", "", "*", "$HOME", "-n", "line\nend"]
    ended = subprocess.run(
        [launcher, *words], cwd="/", env={"SETTING": "kept"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3
    assert ended.stdout == "\n".join([str(len(words)), *words, "/", "kept"]) + "\n"
    assert text.splitlines()[-1].startswith("exec ")


def test_the_archive_is_one_directory_with_the_executable(made: Made, stand_in: Product) -> None:
    with zipfile.ZipFile(made.zip) as opened:
        assert {it.date_time for it in opened.infolist()} == {_to_two_seconds(stand_in)}
        modes = {it.filename: oct(it.external_attr >> 16) for it in opened.infolist()}
        assert opened.read("netloom-0.1.0/netloom") == stand_in.executable.read_bytes()
        assert opened.read("netloom-0.1.0/manifest.yaml") == made.manifest.read_bytes()
    assert modes == {
        "netloom-0.1.0/LICENSE": "0o100644",
        "netloom-0.1.0/THIRD-PARTY-LICENSES": "0o100644",
        "netloom-0.1.0/manifest.yaml": "0o100644",
        "netloom-0.1.0/netloom": "0o100755",
    }


def _to_two_seconds(it: Product) -> tuple[int, ...]:
    """The product's time, rounded down: zip stores even seconds only."""
    *rest, second = it.time.timetuple()[:6]
    return (*rest, second // 2 * 2)


def newer(one: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False).returncode == 0


def test_snapshots_sort_by_commit_time_and_before_their_release() -> None:
    early, late = (
        release("0.1.0", f"0.1.0-{it}", epoch, []) for it, epoch in (("ff00", 1_700_000_000), ("00ff", 1_700_000_001))
    )
    tagged = release("0.1.0", "0.1.0-ff00", 1_700_000_000, ["v0.1.0", "other"])
    assert (early, tagged) == ("0.20231114221320.ff00", "1")
    assert newer(f"0.1.0-{late}", f"0.1.0-{early}") and newer(f"0.1.0-{tagged}", f"0.1.0-{late}")
    script = 'print(rpm.vercmp("{}", "{}"))'
    for one, other in ((late, early), (tagged, late)):
        assert said("rpm", "--eval", "%{lua:" + script.format(one, other) + "}").strip() == "1"


def test_the_version_comes_from_the_executable(stand_in: Product) -> None:
    told = json.loads(said(stand_in.executable, "version", "--json"))
    assert (stand_in.version, stand_in.build) == (told["version"], told["build"])
