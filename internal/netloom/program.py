"""Which program this is: the one file that somebody put somewhere, or a checkout.

The one file unpacks itself and becomes what it unpacked (build/nuitka/start.c), so ``sys.executable`` and ``__file__``
are of no use to find it again; it says by NETLOOM_EXE where it is.
"""

from __future__ import annotations

import sys
import time

from netloom import __version__
from netloom.fastos import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

# A program that was started longer ago is found among the processes; one that is just starting is younger.
UNUSED_S = 3600.0

# What Nuitka's start tells the program; a child that is such a program itself would take it for its own.
_OF_THE_COMPILER = ("NUITKA_ORIGINAL_ARGV0", "NUITKA_ONEFILE_DIRECTORY", "NUITKA_ONEFILE_PARENT")

_PACKAGE = os.path.dirname(__file__)

_path: str | None = None


def path() -> str | None:
    """The one file that is running, absolute; None from a checkout."""
    return _path


def build_id() -> str:
    """Version and hash of what the one file was made of: ``0.1.0-1f2e3d4c5b6a``; from a checkout ``source-0.1.0``."""
    return f"source-{__version__}" if _path is None else os.path.basename(_unpacked())


def unpacked() -> str:
    """Where the one file that runs has unpacked itself; empty from a checkout."""
    return "" if _path is None else _unpacked()


def is_newer(build: str, than: str) -> bool:
    """Whether ``build`` may take the place of the build ``than`` by itself. Of two of the same age neither is newer."""
    return _age(build) > _age(than)


def _age(build: str) -> tuple[list[int], int]:
    """Version, then the number between it and the hash (``0.1.0-57-1f2e3d4c5b6a``), where there is one."""
    version, *rest = build.split("-")
    numbers = [int(number) for number in version.split(".") if number.isdecimal()]
    return numbers, int(rest[0]) if len(rest) > 1 and rest[0].isdecimal() else 0


def command() -> list[str]:
    """The words that start this program again: the one file, or interpreter, options and script."""
    if _path is not None:
        return [_path]
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    words[0] = sys.executable
    if words[-1] == sys.argv[0]:
        words[-1] = os.path.abspath(words[-1])
    return words


def close_all_but(*kept: int) -> None:
    """Close every other descriptor: those that there are, for the limit may be a thousand million."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the one that the list was read from
                continue


def stamp() -> tuple[object, ...]:
    """What becomes another value when somebody puts another program in the place of the one that runs."""
    if _path is not None:
        return _seen(_path)
    found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(_PACKAGE) for name in names)
    return tuple((path, *_seen(path)) for path in found if path.endswith(".py"))


def _seen(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def begin(environ: MutableMapping[str, str]) -> None:
    """Take what the start of the one file left in the environment, where no child shall find it."""
    global _path
    told, in_a_while = environ.pop("NETLOOM_EXE", None), environ.pop("NETLOOM_TIDY", None)
    for name in _OF_THE_COMPILER:
        environ.pop(name, None)
    search = environ.pop("NETLOOM_PATH", None)
    if search is not None and environ.get("PATH") == "/":  # as Nuitka leaves it for a call (build/nuitka/build)
        environ.pop("PYTHONHOME", None)
        environ["PATH"] = search
        if not search:
            environ.pop("PATH")
    _path = told if "__compiled__" in globals() else None
    if in_a_while and _path is not None:  # the first start of this build, or after some minutes without one
        tidy(os.path.dirname(_unpacked()), build_id())


def tidy(programs: str, build: str) -> None:
    """Remove the unpacked builds but ``build`` that nobody started for an hour and no process runs.

    And what was left of an unpacking, or of a removal, that was killed: names with a dot in front.
    """
    try:
        old = [
            entry.path
            for entry in os.scandir(programs)
            if entry.name != build and entry.stat(follow_symlinks=False).st_mtime < time.time() - UNUSED_S
        ]
        if not old:
            return
        import shutil  # a third of a bare start-up, once for each build

        running = set(_running())
        for directory in old:
            if directory not in running:
                leaving = os.path.join(programs, f".old-{os.path.basename(directory).lstrip('.')}")
                os.rename(directory, leaving)  # at once, so that nobody starts a build of which half is gone
                shutil.rmtree(leaving, ignore_errors=True)
    except OSError:  # it is not what we were started for, and the next build tries again
        pass


def _unpacked() -> str:
    return os.path.dirname(os.readlink("/proc/self/exe"))


def _running() -> Iterator[str]:
    """The directories of the programs of all processes that we may look at: the directory is ours, so they are ours."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                yield os.path.dirname(os.readlink(f"/proc/{entry}/exe"))
            except OSError:  # gone, or somebody else's
                continue
