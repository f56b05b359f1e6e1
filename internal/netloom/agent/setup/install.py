"""netloom's place on a host: its builds side by side, one of them in use, and the ways from one to the next.

    /usr/local/libexec/netloom/<build>/netloom   the programs
    /usr/local/libexec/netloom/current           the build in use: a link, replaced in one step
    /usr/local/libexec/netloom/previous          the one before it, whose state files are in /var/lib/netloom/previous
    /usr/local/libexec/netloom/held              names the build that an operator went back from

Killed between any two steps, the next start uses a whole build, and whoever installs goes on from there. What runs for
the networks is not touched: namespaces, rules, resolvers and the guest process outlive an agent.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from netloom.agent import connect
from netloom.agent.connect import LOG, SOCKET, UNIT, UNIT_FILE
from netloom.errors import HostRefused
from netloom.program import build_id, is_newer, path
from netloom.sockets import peer_credentials
from netloom.wire import Activation, FrameReader, Hello

LIBEXEC = Path("/usr/local/libexec/netloom")
STATE = Path("/var/lib/netloom")
SCOPES = STATE / "scopes"
PREVIOUS_STATES = STATE / "previous"  # the state files as they were when the previous build ended
REPLACED_STATES = STATE / "undone"  # the state files that a rollback replaced

PROGRAM = "netloom"
_CURRENT, _PREVIOUS, _HELD = "current", "previous", "held"
MADE_PARENT = ".made-parent"  # says that the directory above is ours to remove (so does extension/deploy.py)
_BUILD = re.compile(r"[0-9][A-Za-z0-9._-]{0,99}\Z")
# What an upload leaves beside the program while it is under way (extension/deploy.py).
_UPLOADS = re.compile(r"\.(?:part|new)[A-Za-z0-9.-]*\Z")

UPLOAD_S_MAX = 3600.0  # a build in whose directory nothing came for so long is not on its way any more
LOCK_S_MAX = 60.0
STOP_S_MAX = 15.0
START_S_MAX = 30.0
_HELLO_S_MAX = 5.0

UNIT_TEXT = f"""[Unit]
Description=netloom agent: guest networks of Apache CloudStack
After=network.target local-fs.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={LIBEXEC}/{_CURRENT}/{PROGRAM} agent serve --log {LOG}
# READY is said when every network stands again, and that may take its time; a stop waits for what was begun.
TimeoutStartSec=infinity
Restart=always
RestartSec=1
# The networks' own processes are the agent's children and stay when it goes.
KillMode=process
LimitNOFILE=1048576
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""


class Running(msgspec.Struct, frozen=True):
    """The agent that answers: its process, and what it says of itself. ``hello`` is None when it says nothing."""

    pid: int
    hello: Hello | None

    @property
    def build(self) -> str:
        return self.hello.build if self.hello else ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A host at a glance. ``serves``: the build of the agent that answers; empty, and no ``pid``, when none does."""

    current: str
    previous: str
    held: str
    builds: tuple[str, ...]
    serves: str
    pid: int | None
    unit: str
    networks: int


# ------------------------------------------------------------------------------------------------------- what is there


def current() -> str:
    """The build in use; empty where none is installed."""
    return _target(_CURRENT)


def previous() -> str:
    """The build that the one in use took the place of; empty where there is none to go back to."""
    before = _target(_PREVIOUS)
    return before if before != current() else ""


def held() -> str:
    """The build that an operator went back from; empty where nobody did."""
    try:
        return (LIBEXEC / _HELD).read_text().strip()
    except OSError:
        return ""


def builds() -> list[str]:
    """The builds that lie there."""
    try:
        found = os.listdir(LIBEXEC)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if _BUILD.match(name) and not (LIBEXEC / name).is_symlink())


def running(socket_path: str = SOCKET) -> Running | None:
    """The agent that listens on the socket; None when none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as agent:
        agent.settimeout(_HELLO_S_MAX)
        try:
            agent.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except TimeoutError:  # stopped, with a full backlog
            return Running(0, None)
        pid = peer_credentials(agent).pid
        reader = FrameReader()
        try:
            while data := agent.recv(4096):
                for message in reader.feed(data):
                    return Running(pid, message if isinstance(message, Hello) else None)
        except (OSError, HostRefused):
            pass
        return Running(pid, None)


def _target(link: str) -> str:
    try:
        name = os.readlink(LIBEXEC / link)
    except OSError:
        return ""
    return name if _BUILD.match(name) and (LIBEXEC / name / PROGRAM).exists() else ""


# ------------------------------------------------------------------------------------------------ from one to the next


def activate(*, forced_by_operator: bool, require: Callable[[], None]) -> Activation:
    """Puts this build in use, unless a newer one is. ``forced_by_operator``: an operator asks, so that ``held`` does not count.

    ``require`` raises when the host lacks what networks need; nothing has changed then. Raises HostRefused, too, when
    the new agent does not come up: then the one before serves again.
    """
    build = build_id()
    if path() != str(LIBEXEC / build / PROGRAM):
        raise HostRefused(f"{path() or 'a checkout'} is not {LIBEXEC / build / PROGRAM}", hint="netloom agent install")
    _only_roots(LIBEXEC)
    _only_roots(LIBEXEC / build)
    with locked():
        now, serves = current(), running()
        if now and is_newer(now, than=build):
            reason = f"{now} is installed, which is newer than {build}: an automatic downgrade is refused"
            return Activation("newer", now, reason)
        if held() == build and not forced_by_operator:
            return Activation("held", now, f"an operator of the host went back from {build} to {now}")
        if now == build and serves is not None and serves.build == build and connect.has_unit() == _systemd():
            return Activation("current", build)
        require()
        _write_unit()
        if now in ("", build):
            _switch(now, build, lambda: None, lambda: None)
        else:
            _switch(now, build, lambda: _keep_state(now), _drop_kept_state)
        if is_newer(build, than=held()) or forced_by_operator:
            (LIBEXEC / _HELD).unlink(missing_ok=True)
        return Activation("activated", build, did=tuple(_remove_old()))


def rollback(*, keep_state: bool) -> Activation:
    """Goes back to the previous build and, for each network that still lives here, to its state of then.

    ``keep_state``: the networks keep the state that they have. What is replaced is kept in ``REPLACED_STATES``. The build that
    is left is not installed again by itself. Raises HostRefused.
    """
    with locked():
        now, before = current(), previous()
        if not before:
            raise HostRefused(f"there is no build before {now or 'this one'} on this host to go back to")
        undone: list[str] = []
        shutil.rmtree(REPLACED_STATES, ignore_errors=True)
        if keep_state:
            _switch(now, before, lambda: None, lambda: None)
        else:
            _switch(
                now,
                before,
                lambda: undone.extend(_put_state(PREVIOUS_STATES / "scopes", REPLACED_STATES)),
                lambda: _put_state(REPLACED_STATES),
            )
        _write(LIBEXEC / _HELD, f"{now}\n", 0o644)
        (LIBEXEC / _PREVIOUS).unlink(missing_ok=True)
        return Activation("activated", before, f"went back from {now} to {before}", tuple(undone))


def status() -> Status:
    """What is installed, what serves, and how many networks live here."""
    agent = running()
    living = [name for name in os.listdir(SCOPES) if name.endswith(".json")] if SCOPES.exists() else []
    return Status(
        current=current(),
        previous=previous(),
        held=held(),
        builds=tuple(builds()),
        serves=agent.build if agent else "",
        pid=agent.pid if agent else None,
        unit=UNIT if connect.has_unit() else "",
        networks=len(living),
    )


def place() -> None:
    """Copies the program that runs to its place on this host, whole or not at all. Raises HostRefused."""
    source, target = path(), LIBEXEC / build_id() / PROGRAM
    if source is None:
        raise HostRefused("a checkout cannot be installed", hint="use the one file that make build makes")
    if source == str(target):
        return
    try:
        made_parent = not LIBEXEC.parent.exists()
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if made_parent:
            (LIBEXEC / MADE_PARENT).touch()
        new = target.with_name(f".new.{os.getpid()}")
        try:
            shutil.copyfile(source, new)
            new.chmod(0o755)
            _sync(new)
            new.rename(target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise HostRefused(f"{target}: {error.strerror}") from error


def _switch(now: str, to: str, between: Callable[[], object], undo: Callable[[], object]) -> None:
    """Ends the agent, does what is to be done while none runs, and starts that of ``to``; undoes it if that fails."""
    with _nobody_starts():
        stop()
        between()
        _link(_CURRENT, to)
        _start()
        if _comes(to):
            return
        why = _last_line() or "it said nothing"
        stop()
        if now in ("", to):
            raise HostRefused(f"the agent of {to} does not answer: {why}", hint=f"look at {LOG}")
        undo()
        _link(_CURRENT, now)
        _start()
        back = "serves again" if _comes(now) else "does not answer either"
        raise HostRefused(f"the agent of {to} does not answer, {now} {back}: {why}", hint=f"look at {LOG}")


def stop() -> None:
    """Ends whoever serves; what was begun is finished. Networks go on. Raises HostRefused."""
    if connect.has_unit():
        systemctl("stop", UNIT)
    while (agent := running()) is not None:
        if not agent.pid:
            raise HostRefused("an agent that does not answer cannot be found", hint="end it by hand")
        end(agent.pid)
    _wait_for_lock()


def stop_for_good() -> None:
    """The same, and no relay that comes at the moment starts another one before we have ended it."""
    with _nobody_starts():
        stop()


def start_current() -> None:
    """Starts the agent of the build in use; returns when it answers. Raises HostRefused."""
    with _nobody_starts():
        _start()
        if not _comes(current()):
            raise HostRefused(f"the agent of {current()} does not answer", hint=f"look at {LOG}")


def _start() -> None:
    if connect.has_unit():
        connect.start_unit()
    else:
        connect.start([str(LIBEXEC / _CURRENT / PROGRAM)], [])


def _comes(build: str) -> bool:
    until = time.monotonic() + START_S_MAX
    while time.monotonic() < until:
        agent = running()
        if agent is not None and agent.build == build:
            return True
        time.sleep(0.05)
    return False


def end(pid: int) -> None:
    """SIGTERM, and SIGKILL to one that does not end; returns when it has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], STOP_S_MAX)[0]:
                return
    finally:
        os.close(process)
    raise HostRefused(f"the agent (process {pid}) does not end", hint="is the kernel hung? look at dmesg")


def _wait_for_lock() -> None:
    """Until no agent holds the lock of the one that serves: one may be on its way out, or not listen yet."""
    directory = os.path.dirname(SOCKET)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    lock = os.open(f"{directory}/agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(lock, STOP_S_MAX, "an agent that does not listen holds its lock")
    finally:
        os.close(lock)


@contextlib.contextmanager
def _nobody_starts() -> Iterator[None]:
    """Relays that find no agent wait for ours instead of starting one."""
    os.makedirs(os.path.dirname(SOCKET), mode=0o711, exist_ok=True)
    lock = connect.open_lock(os.path.dirname(SOCKET))
    try:
        _acquire(lock, LOCK_S_MAX, "another start of the agent does not come to an end")
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One installation, rollback or removal at a time. Raises HostRefused."""
    directory = os.path.dirname(SOCKET)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    lock = os.open(f"{directory}/install.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(lock, LOCK_S_MAX, "another installation on this host does not come to an end")
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, wait_s: float, otherwise: str) -> None:
    until = time.monotonic() + wait_s
    while not connect.locked(lock):
        if time.monotonic() > until:
            raise HostRefused(otherwise)
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- systemd


def _systemd() -> bool:
    return connect.systemd_runs()


def _write_unit() -> None:
    """The unit, enabled, so that the networks are back after a reboot. Before the first start: it is what starts."""
    if not _systemd():
        return
    unit = Path(UNIT_FILE)
    if not unit.exists() or unit.read_text() != UNIT_TEXT:
        _write(unit, UNIT_TEXT, 0o644)
        systemctl("daemon-reload")
    systemctl("enable", "--quiet", UNIT)


def systemctl(*words: str) -> None:
    """Raises HostRefused with what it complains of."""
    done = subprocess.run(
        ["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise HostRefused(f"systemctl {' '.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")


# --------------------------------------------------------------------------------------------------------------- files


def _link(name: str, build: str) -> None:
    new = LIBEXEC / f".{name}.{os.getpid()}"
    new.unlink(missing_ok=True)
    new.symlink_to(build)
    new.rename(LIBEXEC / name)
    _sync(LIBEXEC)


def _keep_state(build: str) -> None:
    """A copy of the state files for the way back to ``build``; it takes the place of the copy before."""
    new = STATE / f".previous.{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    if SCOPES.exists():
        shutil.copytree(SCOPES, new / "scopes")
    else:
        (new / "scopes").mkdir(parents=True)
    new.chmod(0o700)
    shutil.rmtree(PREVIOUS_STATES, ignore_errors=True)
    new.rename(PREVIOUS_STATES)
    _sync(STATE)
    _link(_PREVIOUS, build)


def _drop_kept_state() -> None:
    """After an agent that did not come up: what it may have written goes, and there is no build to go back to."""
    _put_state(PREVIOUS_STATES / "scopes")
    (LIBEXEC / _PREVIOUS).unlink(missing_ok=True)


def _put_state(kept: Path, aside: Path | None = None) -> list[str]:
    """Each network that still lives here gets its file of ``kept``; the names of those whose file was another one.

    A network that has ended since does not come back, for its addresses may be somebody else's now; one that came since
    keeps what it has. What is replaced goes to ``aside``.
    """
    changed = []
    for file in sorted(kept.glob("*.json")):
        present = SCOPES / file.name
        if not present.exists() or present.read_bytes() == file.read_bytes():
            continue
        if aside is not None:
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy2(present, aside / file.name)
        new = SCOPES / f".{file.name}.new"  # a name that the agent clears away, should we not come to the end
        shutil.copy2(file, new)
        _sync(new)
        new.rename(present)
        changed.append(file.stem)
    if changed:
        _sync(SCOPES)
    return changed


def _remove_old() -> list[str]:
    """Removes the builds beyond the previous one, but none that somebody may be about to put in use.

    What is not ours in their directories stays, with them.
    """
    now = current()
    keep = {now, previous(), held()}
    long_ago = time.time() - UPLOAD_S_MAX
    old = [it for it in builds() if it not in keep and not is_newer(it, than=now)]
    return [build for build in old if (LIBEXEC / build).stat().st_mtime < long_ago and remove_build(build)]


def remove_build(build: str) -> bool:
    """Removes what we have put into the build's directory, and the directory; whether it is gone."""
    directory = LIBEXEC / build
    for entry in directory.iterdir():
        if entry.name == PROGRAM or _UPLOADS.match(entry.name):
            entry.unlink()
    with contextlib.suppress(OSError):  # somebody else's file is in it
        directory.rmdir()
    return not directory.exists()


def _only_roots(directory: Path) -> None:
    found = directory.lstat()
    if directory.is_symlink() or found.st_uid != 0 or found.st_mode & 0o022:
        raise HostRefused(f"{directory} is a link, or others than root may write there", hint="remove it")


def _write(file: Path, text: str, mode: int) -> None:
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.chmod(mode)
    _sync(new)
    new.rename(file)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _last_line() -> str:
    try:
        lines = Path(LOG).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""
