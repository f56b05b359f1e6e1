"""The directory of a supervised service: configuration, watched files, log, and the record of its process.

It is ``/run/netloom/services/<scope>/<service>``, so a reboot removes it.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import shutil
import threading
from pathlib import Path

import msgspec

from netloom.agent.processes.process import open_log, run
from netloom.errors import HostRefused, one_line
from netloom.files import remove_leftovers, replace_text
from netloom.render.service import SERVICES_DIR, Service

# The users and groups of scopes. They are in no passwd file and in no range that is assigned to users of a directory,
# subordinate ids, dynamic users or containers (systemd's UIDS-GIDS.md: 0x70000000 to 0x7fffffff are free).
USERS = range(0x7E7F0000, 0x7E800000)

# A log that is longer is shortened to its last half.
LOG_BYTES_MAX = 256 << 10

_RECORD = "running.json"
_DRAINING = "draining.json"
_LOG = "log"
_CANDIDATE = ".candidate"  # ends the name of a configuration that the program has not accepted yet

_users_lock = threading.Lock()  # two scopes must not find the same number free


def record_path(directory: str | Path) -> Path:
    """Where the record of the service's process is."""
    return Path(directory, _RECORD)


def draining_path(directory: str | Path) -> Path:
    """Where the record of a replaced process is that only waits until its connections have ended."""
    return Path(directory, _DRAINING)


def log_path(service: Service) -> Path:
    """Where the output of the service's process goes."""
    return Path(service.directory, _LOG)


def bound_log(path: Path) -> None:
    """Keep only the end of a log that is too long. A process that has the file open appends to this end."""
    try:
        size = os.stat(path).st_size
        if size <= LOG_BYTES_MAX:
            return
        with path.open("r+b") as file:
            file.seek(size - LOG_BYTES_MAX // 2)
            file.readline()
            end = file.read(LOG_BYTES_MAX // 2)
            file.truncate(0)  # guard: a-long-log-is-shortened
        appended = open_log(path)
        try:
            os.write(appended, b"(older lines were removed)\n" + end)
        finally:
            os.close(appended)
    except OSError:  # removed with its service
        return


def last_output(service: Service) -> str:
    """The output of the service's process in one line, to complete an error message."""
    try:
        text = log_path(service).read_text(errors="replace")
    except OSError:
        text = ""
    return one_line(text, 400) or "it printed nothing"


# --------------------------------------------------------------------------------------------------- directories


def make_services_directory() -> None:
    """Make the directory of all services. It belongs to the host and stays when the last network is deleted.

    Files that an agent was about to replace when it was killed are removed, those that were refused, too.
    """
    directory = Path(SERVICES_DIR)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o711)
    for service in directory.glob("*/*/"):
        for each in (service, *filter(Path.is_dir, service.iterdir())):
            remove_leftovers(each)  # guard: a-killed-replacement-leaves-no-file
        for refused in service.glob(f"*{_CANDIDATE}"):
            refused.unlink()


def make_directory(service: Service) -> int:
    """Make the service's directory and that of its scope; return the scope's user, whose number is also its group."""
    directory = Path(service.directory)
    user = _make_scope_directory(directory.parent)
    _own(directory, user)
    return user


def user_of_scope(scope_id: str) -> int | None:
    """The user of the scope; None if it has no services."""
    try:
        group = os.stat(f"{SERVICES_DIR}/{scope_id}").st_gid
    except FileNotFoundError:
        return None
    return group if group in USERS else None


def _make_scope_directory(directory: Path) -> int:
    """Make the scope's directory, whose group is the record of the scope's user. It lives as long as the services.

    The search for a free number starts at one that depends on the scope alone.
    """
    with _users_lock:
        user = user_of_scope(directory.name)
        if user is None:
            used = {user_of_scope(scope_id) for scope_id in scopes()}
            first = int.from_bytes(hashlib.sha256(directory.name.encode()).digest()[:4], "big")
            candidates = (USERS[(first + turn) % len(USERS)] for turn in range(len(USERS)))
            user = next(it for it in candidates if it not in used and not _is_known(it))  # guard: users-differ
        _own(directory, user)
        return user


def _is_known(number: int) -> bool:
    """Whether the host knows a user or a group of this number."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(number)
        return True
    with contextlib.suppress(KeyError):
        grp.getgrgid(number)
        return True
    return False


def _own(directory: Path, user: int, mode: int = 0o710) -> None:
    """Make the directory, of which the scope's user can use what is in it, and other users nothing."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(directory, 0, user)
    directory.chmod(mode)


def remove_sockets(service: Service) -> None:
    """Remove the sockets that earlier versions of the service had in its directory."""
    for path in Path(service.directory).glob("*.sock"):
        path.unlink(missing_ok=True)


def scopes() -> set[str]:
    """The scopes that have a directory."""
    return set(os.listdir(SERVICES_DIR))


def services(scope_id: str) -> set[str]:
    """The names of the services of the scope that have a directory."""
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(f"{SERVICES_DIR}/{scope_id}"))
    return set()


def remove_scope(scope_id: str) -> None:
    """Remove the directories of the scope."""
    shutil.rmtree(f"{SERVICES_DIR}/{scope_id}", ignore_errors=True)


# ------------------------------------------------------------------------------------------------- configuration


def digest(service: Service) -> str:
    """A hash of what a process gets when it starts: its arguments, its configuration, and what confines it."""
    got = (service.argv, sorted(service.config.items()), service.capabilities, service.data_mib_max)
    return hashlib.sha256(msgspec.json.encode(got)).hexdigest()


def has_configuration(service: Service) -> bool:
    """Whether the configuration was written before, so that a process may have been started with it."""
    return any(Path(service.directory, name).exists() for name in service.config)


def replace_configuration(namespace: str, service: Service, user: int) -> None:
    """Replace the configuration, which the scope's user can read, once the service's own program has accepted it.

    Raises HostRefused with the program's message when it is refused; the old configuration stays then.
    """
    directory = Path(service.directory)
    for name, text in service.config.items():
        replace_text(directory / f"{name}{_CANDIDATE}", text, mode=0o640, group=user, durable=False)
    if service.check:
        candidates = {f"{directory}/{name}": f"{directory}/{name}{_CANDIDATE}" for name in service.config}
        argv = [candidates.get(argument, argument) for argument in service.check]
        checked = run(namespace, argv, f"{service.name}: ")
        if checked.returncode != 0:
            raise HostRefused(
                f"{service.name}: the configuration was refused: {one_line(checked.stdout, 400)}"
            )  # guard: a-refused-file-stays-a-candidate
    for name in service.config:
        (directory / f"{name}{_CANDIDATE}").rename(directory / name)


# ------------------------------------------------------------------------------------------------- watched files


def misses_changes(service: Service) -> bool:
    """Whether the running process will not notice all changes of its watched files, and has to be restarted.

    Either the directory that it watches was removed, or a text is about to disappear from a file and the process never
    forgets what it has read.
    """
    if not service.watched_directory:
        return False
    watched = Path(service.directory, service.watched_directory)
    if not watched.exists():
        return True
    if service.forgets:
        return False
    return any(service.watched_files.get(name) != path.read_text() for name, path in _watched_files(watched).items())


def write_watched_files(service: Service, user: int) -> list[str]:
    """Write, replace and remove watched files as the service wants them; the steps in words.

    The scope's user can read them, and no other user.
    """
    if not service.watched_directory:
        return []
    watched = Path(service.directory, service.watched_directory)
    _own(watched, user, 0o750)
    had = _watched_files(watched)
    did = []
    for name, text in service.watched_files.items():
        if name not in had or had[name].read_text() != text:
            replace_text(watched / name, text, mode=0o640, group=user, durable=False)
            did.append(f"write {service.name}/{name}")
        elif had[name].stat().st_gid != user:  # an earlier version wrote it
            os.chown(had[name], 0, user)
    for name in had.keys() - service.watched_files.keys():
        had[name].unlink()
        did.append(f"remove {service.name}/{name}")
    return did


def _watched_files(directory: Path) -> dict[str, Path]:
    """Name to path, without the temporary files of a replacement. dnsmasq ignores names that begin with a dot too."""
    return {path.name: path for path in directory.iterdir() if not path.name.startswith(".")}
