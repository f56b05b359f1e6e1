"""The running program: where its file is, which build it is, and how to start it again.

The program is either the one executable file or a checkout of the sources. The one file unpacks itself and then
executes the unpacked copy (build/nuitka/start.c), so ``sys.executable`` and ``__file__`` do not lead back to it; the
environment variable NETLOOM_EXE has its path.
"""

from __future__ import annotations

import sys
import time

from netloom import __version__
from netloom.fastos import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping, Sequence

# Unpacked builds younger than this are not removed: a process that is just starting one does not show in /proc yet.
UNUSED_S = 3600.0

# Nuitka's start code sets these for the program. A child that is also built by Nuitka would misread them as its own.
_COMPILER_VARIABLES = ("NUITKA_ORIGINAL_ARGV0", "NUITKA_ONEFILE_DIRECTORY", "NUITKA_ONEFILE_PARENT")

# Builds have about 30 characters. A host may claim any, and a number of thousands of digits cannot be converted.
_BUILD_CHARACTERS_MAX = 100  # guard: a-hosts-build-is-any-text

_PACKAGE = os.path.dirname(__file__)

_path: str | None = None
_begun = ""


def path() -> str | None:
    """The absolute path of the one file that is running; None in a checkout."""
    return _path


def begun() -> str:
    """What the one file's door in C has done of this call, in the form of build/nuitka/call.h; empty: nothing."""
    return _begun


def build_id() -> str:
    """Version and content hash of the one file, ``0.1.0-1f2e3d4c5b6a``; in a checkout ``source-0.1.0``."""
    return f"source-{__version__}" if _path is None else os.path.basename(_unpacked())


def unpacked() -> str:
    """The directory into which the one file has unpacked itself; empty in a checkout."""
    return "" if _path is None else _unpacked()


def is_newer(build: str, than: str) -> bool:
    """Whether ``build`` may replace the build ``than`` automatically. False for two builds of the same age."""
    return _age(build) > _age(than)


def _age(build: str) -> tuple[list[int], int]:
    """The version, and the optional number between version and hash (``0.1.0-57-1f2e3d4c5b6a``)."""
    version, *rest = build[:_BUILD_CHARACTERS_MAX].split("-")
    numbers = [int(number) for number in version.split(".") if number.isdecimal()]
    return numbers, int(rest[0]) if len(rest) > 1 and rest[0].isdecimal() else 0


def command() -> list[str]:
    """The argv that starts this program again: the one file, or interpreter, options and script."""
    if _path is not None:
        return [_path]
    argv = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    argv[0] = sys.executable
    if argv[-1] == sys.argv[0]:
        argv[-1] = os.path.abspath(argv[-1])
    return argv


def start_detached(argv: list[str], environ: Mapping[str, str], descriptors: Sequence[int]) -> None:
    """Start ``argv`` as a daemon: own session, parent process 1, working directory ``/``, umask 077.

    ``descriptors`` become its descriptors 0, 1, 2 and so on; every other one is closed. When ``argv[0]`` cannot be
    executed, a line about it is written to its descriptor 2. Raises OSError when no process can be created.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():  # the grandchild is no session leader, so it cannot acquire a terminal
            os._exit(0)
        moved = list(descriptors)
        while min(moved) < len(moved):  # above the numbers that they are to have
            moved = [os.dup(fd) for fd in moved]
        for number, fd in enumerate(moved):  # guard: agent-holds-none-of-the-relays-streams
            os.dup2(fd, number)
        close_all_but(*range(len(moved)))
        os.chdir("/")
        os.umask(0o077)
        os.execve(argv[0], argv, environ)
    except OSError as error:
        os.write(2, f"{argv[0]} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def close_all_but(*kept: int) -> None:
    """Close every other open descriptor. Lists /proc/self/fd, because the limit of descriptors may be a billion."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the descriptor of the listing itself
                continue


def stamp() -> tuple[object, ...]:
    """A value that changes when the file of the running program, or a source file of the checkout, is replaced."""
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


def take_environment(environ: MutableMapping[str, str]) -> None:
    """Read and remove the variables that the one file's start code has set, so that no child inherits them."""
    global _begun, _path
    begun, executable, tidy_is_due = (environ.pop(f"NETLOOM_{it}", None) for it in ("BEGUN", "EXE", "TIDY"))
    for name in _COMPILER_VARIABLES:
        environ.pop(name, None)
    search = environ.pop("NETLOOM_PATH", None)
    if search is not None and environ.get("PATH") == "/":  # as Nuitka leaves it for a call (build/nuitka/build)
        environ.pop("PYTHONHOME", None)
        environ["PATH"] = search
        if not search:
            environ.pop("PATH")
    _path, _begun = (executable, begun or "") if "__compiled__" in globals() else (None, "")
    if tidy_is_due and _path is not None:  # at the first start of this build, and after some minutes without a start
        tidy(os.path.dirname(_unpacked()), build_id())


def tidy(programs: str, build: str) -> None:
    """Remove from ``programs`` the unpacked builds that no process runs and that were not started for an hour.

    ``build`` itself is kept. Directories whose names begin with a dot, left by a killed unpacking or removal, go too.
    """
    try:
        old = [
            entry.path
            for entry in os.scandir(programs)
            if entry.name != build and entry.stat(follow_symlinks=False).st_mtime < time.time() - UNUSED_S
        ]
        if not old:
            return
        import shutil  # takes a third of a bare start, but only once per build

        running = set(_running())
        for directory in old:
            if directory not in running:
                leaving = os.path.join(programs, f".old-{os.path.basename(directory).lstrip('.')}")
                os.rename(directory, leaving)  # atomic, so that no process starts a half removed build
                shutil.rmtree(leaving, ignore_errors=True)
    except OSError:  # tidying must not make a call fail; the next build tries again
        pass


def _unpacked() -> str:
    return os.path.dirname(os.readlink("/proc/self/exe"))


def _running() -> Iterator[str]:
    """The program directories of the processes whose /proc/<pid>/exe we may read; that includes all of our user."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                yield os.path.dirname(os.readlink(f"/proc/{entry}/exe"))
            except OSError:  # the process has ended, or belongs to another user
                continue
