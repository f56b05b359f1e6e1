"""The directory of a supervised service: configuration, watched files, log, and the record of its process.

It is ``/run/netloom/services/<scope>/<service>``, so a reboot removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import msgspec

from netloom.agent.processes.process import run
from netloom.errors import HostRefused, one_line
from netloom.files import replace_text
from netloom.render.service import SERVICES_DIR, Service

NOGROUP = 65534  # the group nogroup of Debian, nobody of Enterprise Linux

_RECORD = "running.json"
_LOG = "log"


def record_path(directory: str | Path) -> Path:
    """Where the record of the service's process is."""
    return Path(directory, _RECORD)


def log_path(service: Service) -> Path:
    """Where the output of the service's process goes."""
    return Path(service.directory, _LOG)


def last_output(service: Service) -> str:
    """The output of the service's process in one line, to complete an error message."""
    try:
        text = log_path(service).read_text(errors="replace")
    except OSError:
        text = ""
    return one_line(text, 400) or "it printed nothing"


# --------------------------------------------------------------------------------------------------- directories


def make_services_directory() -> None:
    """Make the directory of all services. It belongs to the host and stays when the last network is deleted."""
    _make_directory(Path(SERVICES_DIR))


def make_directory(service: Service) -> None:
    """Make the service's directory and its parents."""
    _make_directory(Path(service.directory))


def _make_directory(directory: Path) -> None:
    # dnsmasq reads its files as an unprivileged user, so others may pass through.
    for part in (*reversed([p for p in directory.parents if p.is_relative_to(SERVICES_DIR)]), directory):
        if not part.exists():
            part.mkdir(parents=True)
            part.chmod(0o711)


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
    """A hash of what a process gets when it starts: its arguments and its configuration."""
    return hashlib.sha256(msgspec.json.encode((service.argv, sorted(service.config.items())))).hexdigest()


def has_configuration(service: Service) -> bool:
    """Whether the configuration was written before, so that a process may have been started with it."""
    return any(Path(service.directory, name).exists() for name in service.config)


def replace_configuration(namespace: str, service: Service) -> None:
    """Replace the configuration, once the service's own program has accepted it.

    Raises HostRefused with the program's message when it is refused; the old configuration stays then.
    """
    directory = Path(service.directory)
    for name, text in service.config.items():
        replace_text(directory / f"{name}.candidate", text, durable=False)
    if service.check:
        candidates = {f"{directory}/{name}": f"{directory}/{name}.candidate" for name in service.config}
        argv = [candidates.get(argument, argument) for argument in service.check]
        checked = run(namespace, argv)
        if checked.returncode != 0:
            raise HostRefused(
                f"{service.name}: the configuration was refused: {one_line(checked.stdout, 400)}"
            )  # guard: a-refused-file-stays-a-candidate
    for name in service.config:
        (directory / f"{name}.candidate").rename(directory / name)


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


def write_watched_files(service: Service) -> list[str]:
    """Write, replace and remove watched files as the service wants them; the steps in words."""
    if not service.watched_directory:
        return []
    watched = Path(service.directory, service.watched_directory)
    # dnsmasq reads them after it has changed to the user nobody and the group NOGROUP. No other user may.
    if not watched.exists():
        watched.mkdir(mode=0o750)
        watched.chmod(0o750)
        os.chown(watched, 0, NOGROUP)
    had = _watched_files(watched)
    did = []
    for name, text in service.watched_files.items():
        if name not in had or had[name].read_text() != text:
            replace_text(watched / name, text, mode=0o640, group=NOGROUP, durable=False)
            did.append(f"write {service.name}/{name}")
    for name in had.keys() - service.watched_files.keys():
        had[name].unlink()
        did.append(f"remove {service.name}/{name}")
    return did


def _watched_files(directory: Path) -> dict[str, Path]:
    """Name to path, without the temporary files of a replacement. dnsmasq ignores names that begin with a dot too."""
    return {path.name: path for path in directory.iterdir() if not path.name.startswith(".")}
