"""The sources that are compiled into the executable, pinned by build/nuitka/sources.txt and requirements/build.txt."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from package.product import ROOT
from package.requirements import DIRECTORY, pins

PINS = ROOT / "build" / "nuitka" / "sources.txt"


@dataclass(frozen=True)
class Place:
    """A file of a pinned archive, of a pinned wheel, or of the interpreter that the build has made.

    ``archive``: the name of the archive, or ``wheel`` (a build tool), ``site`` (a carried package) or ``interpreter``.
    """

    archive: str  # a file name pattern
    path: str  # a file name pattern


@dataclass(frozen=True)
class Source:
    """A source that is compiled into the executable. ``within``: the name of the source that includes it."""

    name: str
    version: str
    licence: str  # SPDX
    purl: str
    places: tuple[Place, ...]
    sha256: str = ""
    within: str = ""
    proof: tuple[Place, str] | None = None  # a file that contains its version, and the pattern to find there
    library: Place | None = None  # the linked library, which has the hash ``sha256``

    @property
    def ref(self) -> str:
        """Its reference in the bill of materials."""
        return f"{self.name}=={self.version}"

    @property
    def texts(self) -> dict[str, str]:
        """Its licence texts, by name. Raises SystemExit when the build is missing or used another version."""
        if self.proof and not re.search(self.proof[1], _read(self.proof[0])):
            raise SystemExit(f"release: {self.name} in {self.within} is not {self.version}: see {__file__}")
        if self.library and self.sha256 != hashlib.sha256(_path(self.library).read_bytes()).hexdigest():
            raise SystemExit(f"release: {self.name} that was linked is not the pinned {self.version}: see {__file__}")
        return {place.path.removeprefix("*/"): _licence(place) for place in self.places}


_DEBIAN, _BOOKWORM = "pkg:deb/debian/", "?arch=source&distro=bookworm"
_PYTHON = "python3.11_*.orig.tar.*"
_HEADER = Place(_PYTHON, "*/Modules/expat/expat.h")


def sources() -> list[Source]:
    """All sources, sorted by name."""
    build, debian = dict(pins("build.txt")), pinned()
    nuitka, zig = build["nuitka"], build["ziglang"]
    return [
        Source(
            # The part of click that typer includes, under click's licence.
            "click", "8.3.1", "BSD-3-Clause", "pkg:pypi/click@8.3.1",
            (Place("site", "typer/_click/LICENSE.txt"),),
            within="typer",
            proof=(Place("site", "typer/_click/__init__.py"), r"pallets/click/releases/tag/8\.3\.1\n"),
        ),
        Source(
            "expat", "2.5.0", "MIT", "pkg:generic/expat@2.5.0",
            (Place(_PYTHON, "*/Modules/expat/COPYING"),),
            within="python3.11",
            proof=(_HEADER, r"XML_MAJOR_VERSION 2\n#define XML_MINOR_VERSION 5\n#define XML_MICRO_VERSION 0\n"),
        ),
        Source(
            # The files of glibc that zig links into every program: start code, and a few functions. Their licence
            # allows the distribution of such a program without restrictions.
            "glibc", "2.28", "LGPL-2.1-or-later WITH AdditionRef-glibc-start-files-exception", "pkg:generic/glibc@2.28",
            (
                Place("wheel", "ziglang/lib/libc/glibc/csu/elf-init-2.33.c"),
                Place("wheel", "ziglang/lib/libc/glibc/io/stat-2.32.c"),
                Place("wheel", "ziglang/lib/libc/glibc/LICENSES"),
            ),
            within="ziglang",
            proof=(Place("wheel", "ziglang/lib/libc/glibc/csu/elf-init-2.33.c"), "unlimited\n   permission to link"),
        ),
        Source(
            # In the compiled part of cffi. The wheel does not name the version; 3.5 would have ffi_get_version.
            "libffi", "3.4", "MIT", "pkg:generic/libffi@3.4",
            (Place("interpreter", "deps/include/ffi.h"),),
            within="cffi",
            proof=(Place("site", "_cffi_backend.*.so"), r"(?s)\A(?!.*ffi_get_version).*ffi_tramp_alloc"),
        ),
        Source(
            "libffi", "3.4.4-1", "MIT", f"{_DEBIAN}libffi@3.4.4-1{_BOOKWORM}",
            (Place("interpreter", "deps/include/ffi.h"),),
            sha256="7b528305c15d79329730cca8f7a0e818e9772b836b29b409131d584c0c03abf2",
            library=Place("interpreter", "deps/lib/libffi.a"),
        ),
        Source(
            "mpdecimal", "2.5.1", "BSD-2-Clause", "pkg:generic/mpdecimal@2.5.1",
            (Place(_PYTHON, "*/Modules/_decimal/libmpdec/mpdecimal.h"),),
            within="python3.11",
            proof=(Place(_PYTHON, "*/Modules/_decimal/libmpdec/mpdecimal.h"), 'MPD_VERSION "2.5.1"'),
        ),
        Source(
            "nuitka", nuitka, "AGPL-3.0-or-later WITH AdditionRef-Nuitka-Runtime-Library-Exception-1.0",
            f"pkg:pypi/nuitka@{nuitka}",
            (
                Place("wheel", f"nuitka-{nuitka}.dist-info/licenses/LICENSE-RUNTIME.txt"),
                Place("wheel", f"nuitka-{nuitka}.dist-info/licenses/NOTICE.txt"),
                Place("wheel", f"nuitka-{nuitka}.dist-info/licenses/LICENSE.txt"),
            ),
        ),
        _debian("python3.11", debian, "PSF-2.0", Place(_PYTHON, "*/LICENSE"), Place(_PYTHON, "*/Doc/license.rst")),
        Source("ziglang", zig, "MIT", f"pkg:pypi/ziglang@{zig}", (Place("wheel", "ziglang/LICENSE"),)),
        _debian("zlib", debian, "Zlib", Place("zlib_*.orig.tar.*", "*/LICENSE")),
        Source(
            # One file of zlib, without a version: only its year is known.
            "zlib-crc32", "2022", "Zlib", "pkg:generic/zlib-crc32@2022",
            (Place("wheel", "nuitka/build/inline_copy/zlib/LICENSE"),),
            within="nuitka",
            proof=(Place("wheel", "nuitka/build/inline_copy/zlib/crc32.c"), r"\(C\) 1995-2022 Mark Adler"),
        ),
        Source(
            "zstd", "1.4.7", "BSD-3-Clause", "pkg:generic/zstd@1.4.7",
            (Place("wheel", "nuitka/build/inline_copy/zstd/LICENSE.txt"),),
            within="nuitka",
            proof=(
                Place("wheel", "nuitka/build/inline_copy/zstd/zstd.h"),
                r"VERSION_MAJOR +1\n#define ZSTD_VERSION_MINOR +4\n#define ZSTD_VERSION_RELEASE +7\n",
            ),
        ),
    ]  # fmt: skip


def pinned() -> dict[str, tuple[str, str]]:
    """Each Debian source package with its version and the hash of its .dsc file."""
    found: dict[str, tuple[str, str]] = {}
    for line in PINS.read_text().splitlines():
        first, _, second = line.partition(" ")
        if re.fullmatch("[0-9a-f]{64}", first):
            if second.endswith(".dsc"):
                package = second.partition("_")[0]
                found[package] = (found[package][0], first)
        elif first and first != "#":
            found[first] = (second, "")
    return found


def tools() -> list[Path]:
    """The directories where the build installed the pinned Nuitka."""
    there = f"lib/python3.*/site-packages/nuitka-{dict(pins('build.txt'))['nuitka']}.dist-info"
    return [path for path in sorted(_cache().glob("tools-*")) if list(path.glob(there))]


def sites() -> list[Path]:
    """The directories where the build installed the packages that the executable carries."""
    digest = hashlib.sha256((DIRECTORY / "runtime.txt").read_bytes()).hexdigest()[:12]
    return list(_cache().glob(f"site-{digest}"))


def _cache() -> Path:
    return Path(os.environ.get("NETLOOM_BUILD_CACHE") or "/var/cache/netloom-build")


def _debian(name: str, pinned: dict[str, tuple[str, str]], licence: str, *places: Place) -> Source:
    version, sha256 = pinned[name]
    purl = f"{_DEBIAN}{name}@{quote(version)}{_BOOKWORM}"
    return Source(name, version, licence, purl, places, sha256=sha256)


def _licence(place: Place) -> str:
    """The text of a licence file, or the comment at the beginning of a C file."""
    text = _read(place)
    return text.partition("*/")[0] if place.path.endswith((".h", ".c")) else text


def _read(place: Place) -> str:
    if place.archive in ("wheel", "site", "interpreter"):
        return _path(place).read_text(encoding="utf-8", errors="replace")
    hashes = {name: sha256 for sha256, name in re.findall(r"^([0-9a-f]{64}) (\S+)$", PINS.read_text(), re.MULTILINE)}
    for path in _cache().glob(f"sources-*/{place.archive}"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == hashes.get(path.name):
            return _member(path, place.path)
    raise SystemExit(f"release: {place.archive} is not in the build's cache: make build")


def _path(place: Place) -> Path:
    if place.archive == "wheel":
        found = [path for there in tools() for path in there.glob(f"lib/python3.*/site-packages/{place.path}")]
    elif place.archive == "site":
        found = [path for there in sites() for path in there.glob(place.path)]
    else:
        found = list(_cache().glob(f"interpreter-*/{place.path}"))
    if not found:
        raise SystemExit(f"release: {place.path} is not in the build's cache: make build")
    return max(found, key=lambda path: path.stat().st_mtime)


def _member(archive: Path, pattern: str) -> str:
    with tarfile.open(archive) as opened:
        for member in opened:
            if fnmatch.fnmatch(member.name, pattern) and member.name.count("/") == pattern.count("/"):
                file = opened.extractfile(member)
                assert file is not None
                return file.read().decode("utf-8", errors="replace")
    raise SystemExit(f"release: no {pattern} in {archive}")
