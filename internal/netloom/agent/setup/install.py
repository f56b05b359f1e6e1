"""Install, activate and roll back builds of netloom on a host.

    /usr/local/libexec/netloom/<build>/netloom   the programs
    /usr/local/libexec/netloom/current           a symbolic link to the build in use, replaced atomically
    /usr/local/libexec/netloom/previous          the build before it; its state files are in /var/lib/netloom/previous
    /usr/local/libexec/netloom/held              the name of the build that an operator rolled back from
    /usr/local/libexec/netloom/.untested         there while the selftest of a first installation has not passed

If an installation is killed between two steps, the next start uses a complete build, and the next installation
continues. The networks are not touched: namespaces, rules, resolvers and the guest process keep running without an
agent.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from netloom.agent import connect, hung
from netloom.agent.connect import LOG, SOCKET, UNIT, UNIT_FILE, UNTESTED
from netloom.errors import HostRefused
from netloom.files import replace_bytes, replace_text, sync_directory
from netloom.program import build_id, is_newer, path
from netloom.sockets import peer_credentials
from netloom.state import Placement
from netloom.wire import Activation, FrameReader, Hello

LIBEXEC = Path("/usr/local/libexec/netloom")
STATE = Path("/var/lib/netloom")
SCOPES = STATE / "scopes"
PREVIOUS_STATES = STATE / "previous"  # the state files from the time when the previous build was replaced
REPLACED_STATES = STATE / "undone"  # the state files that a rollback replaced

PROGRAM = "netloom"
_CURRENT, _PREVIOUS, _HELD = "current", "previous", "held"
# An empty file: we created the directory above LIBEXEC, so uninstalling removes it. extension/deploy.py writes it too.
MADE_PARENT = ".made-parent"
_BUILD = re.compile(r"[0-9][A-Za-z0-9._-]{0,99}\Z")
# The temporary files of an upload, beside the program (extension/deploy.py).
_UPLOADS = re.compile(r"\.(?:part|new)[A-Za-z0-9.-]*\Z")

UPLOAD_S_MAX = 3600.0  # a build whose directory was not changed for this long is not being uploaded any more
LOCK_S_MAX = 60.0
STOP_S_MAX = 15.0
START_S_MAX = 30.0
_HELLO_S_MAX = 5.0

UNIT_TEXT = f"""[Unit]
Description=netloom agent: guest networks of Apache CloudStack
# The NICs, bonds and bridges of the host's own configuration come first. NICs that appear later are waited for anyway.
Wants=network-online.target
After=network.target network-online.target local-fs.target
# CloudStack's agent plugs VMs into the bridges and starts them.
Before=cloudstack-agent.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={LIBEXEC}/{_CURRENT}/{PROGRAM} agent serve --log {LOG}
# The agent reports READY when it answers calls. It restores the networks after that: see STATUS in systemctl status.
# Older builds, to which a rollback may go back, report READY when all networks are restored.
TimeoutStartSec=600
# A stop waits for running work.
TimeoutStopSec=30
# The agent asks for a watchdog of 45 s (WATCHDOG_USEC in sd_notify(3)). When it hangs it gets SIGABRT, and writes the
# stacks of its threads. There is no WatchdogSec here, because older builds would be ended by it.
TimeoutAbortSec=5
Restart=always
RestartSec=1
# The processes of the networks are children of the agent. They keep running when it stops.
KillMode=process
LimitNOFILE=1048576
# Each network has a bound of its own (confine.py). systemd's default for a unit would stop networks of others.
TasksMax=infinity
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""


class Running(msgspec.Struct, frozen=True):
    """The running agent: its pid, and its Hello; None when it sent none."""

    pid: int
    hello: Hello | None

    @property
    def build(self) -> str:
        return self.hello.build if self.hello else ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is installed on a host. ``serves``: the build of the running agent.

    Without a running agent ``serves`` is empty and ``pid`` is None. ``networks``: the number of scopes with a state.
    ``unrestored``: how many of them the agent has not restored yet since its start; None: it does not answer.
    ``restoring``: the next of them.
    """

    current: str
    previous: str
    held: str
    builds: tuple[str, ...]
    serves: str
    pid: int | None
    unit: str
    networks: int
    unrestored: int | None = None
    restoring: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------------------- looking


def current() -> str:
    """The build in use; empty when none is installed."""
    return _target(_CURRENT)


def previous() -> str:
    """The build that a rollback activates; empty when there is none."""
    before = _target(_PREVIOUS)
    return before if before != current() else ""


def held() -> str:
    """The build that an operator rolled back from; empty when there is none."""
    try:
        return (LIBEXEC / _HELD).read_text().strip()
    except OSError:
        return ""


def builds() -> list[str]:
    """The builds in LIBEXEC, complete or not, sorted by name."""
    try:
        found = os.listdir(LIBEXEC)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if _BUILD.match(name) and not (LIBEXEC / name).is_symlink())


def running(socket_path: str = SOCKET) -> Running | None:
    """The agent that listens on the socket; None when none does.

    ``hello`` is None when it does not answer. Then its pid is 0 if no process holds the agent's lock.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as agent:
        agent.settimeout(_HELLO_S_MAX)
        try:
            agent.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except (TimeoutError, BlockingIOError):  # the process is stopped and its backlog is full
            return Running(hung.agent_pid(os.path.dirname(socket_path)), None)
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


# --------------------------------------------------------------------------------------------------- replacing


def activate(*, forced_by_operator: bool, require: Callable[[], None]) -> Activation:
    """Put this build in use, unless a newer one is in use.

    ``forced_by_operator``: activate it although an operator rolled back from it (``held``).
    ``require`` raises HostRefused when the host lacks something that networks need; the host is as before then.
    Raises HostRefused also when the new agent does not answer; the previous build is in use again then.
    """
    build = build_id()
    if path() != str(LIBEXEC / build / PROGRAM):
        raise HostRefused(f"{path() or 'a checkout'} is not {LIBEXEC / build / PROGRAM}", hint="netloom agent install")
    _let_only_root_write(LIBEXEC)
    _let_only_root_write(LIBEXEC / build)
    with locked():
        now, serves = current(), running()
        if now and is_newer(now, than=build):
            reason = f"{now} is installed, which is newer than {build}: an automatic downgrade is refused"
            return Activation("newer", now, reason)
        if held() == build and not forced_by_operator:
            return Activation("held", now, f"an operator of the host went back from {build} to {now}")
        if (
            now == build
            and serves is not None
            and serves.build == build
            and connect.has_unit() == connect.systemd_runs()
        ):
            return Activation("current", build)
        if not now and serves is None:
            _start_first(build, require)
        else:
            require()
            (LIBEXEC / UNTESTED).unlink(missing_ok=True)
            _write_unit()
            if now in ("", build):
                switch(now, build, lambda: None, lambda: None)
            else:
                switch(now, build, lambda: save_states(now), undo_save_states)
        if is_newer(build, than=held()) or forced_by_operator:
            (LIBEXEC / _HELD).unlink(missing_ok=True)
        return Activation("activated", build, did=tuple(_remove_old()))


def _start_first(build: str, require: Callable[[], None]) -> None:
    """Start the agent of the first build on this host while ``require`` tests the host.

    The agent waits for the end of the test before it changes or serves anything (:func:`wait_for_selftest`). Raises
    HostRefused.
    """
    had_unit = Path(UNIT_FILE).exists()
    with start_lock():
        stop()
        untested = os.open(LIBEXEC / UNTESTED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(untested, fcntl.LOCK_EX)
            try:
                set_link(_CURRENT, build)
                _write_unit()
                _start()
                require()
            except BaseException:
                _take_back(had_unit)
                raise
            (LIBEXEC / UNTESTED).unlink()
        finally:
            os.close(untested)  # releases the lock
        if not _wait_for(build):
            why = _last_log_line() or "its log is empty"
            stop()
            raise HostRefused(f"the agent of {build} does not answer: {why}", hint=f"look at {LOG}")


def wait_for_selftest() -> None:
    """Wait while the selftest of a first installation runs. Raises HostRefused if it has not passed."""
    try:
        untested = os.open(LIBEXEC / UNTESTED, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(untested, fcntl.LOCK_SH)
        if (LIBEXEC / UNTESTED).exists():  # guard: an-untested-host-is-not-served
            raise HostRefused("the selftest of this host has not passed", hint="netloom agent install")
    finally:
        os.close(untested)


def _take_back(had_unit: bool) -> None:
    """End the agent that waits for the selftest, and remove what :func:`_start_first` made. Raises HostRefused."""
    if connect.has_unit():
        systemctl("stop", UNIT)
    until = time.monotonic() + STOP_S_MAX
    while not connect.has_unit() and time.monotonic() < until:  # it may still be starting
        if pid := hung.agent_pid(os.path.dirname(SOCKET)):
            terminate(pid)
            break
        time.sleep(0.02)
    if not had_unit:
        remove_unit()
    (LIBEXEC / _CURRENT).unlink(missing_ok=True)
    (LIBEXEC / UNTESTED).unlink()  # last: an agent that starts before does not serve


def rollback(*, keep_state: bool) -> Activation:
    """Put the previous build in use, with the state files from the time when it was replaced.

    Networks that were deleted or created since then are not affected. ``keep_state``: keep the present state files.
    Replaced state files are kept in REPLACED_STATES. The build that is rolled back from is not activated again
    automatically. Raises HostRefused.
    """
    with locked():
        now, before = current(), previous()
        if not before:
            raise HostRefused(f"there is no build before {now or 'this one'} on this host to go back to")
        restored: list[str] = []
        shutil.rmtree(REPLACED_STATES, ignore_errors=True)
        # First: if it could not be written afterwards, the next call would undo the rollback.
        with _holding(now):
            if keep_state:
                switch(now, before, lambda: None, lambda: None)
            else:
                switch(
                    now,
                    before,
                    lambda: restored.extend(_restore_all_states(PREVIOUS_STATES / "scopes", REPLACED_STATES)),
                    lambda: _restore_states(REPLACED_STATES),
                )
        (LIBEXEC / _PREVIOUS).unlink(missing_ok=True)
        return Activation("activated", before, f"went back from {now} to {before}", tuple(restored))


def status() -> Status:
    """The installed builds, the running agent, and the number of scopes."""
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
        unrestored=agent.hello.unrestored if agent and agent.hello else None,
        restoring=agent.hello.restoring if agent and agent.hello else (),
    )


def status_when_restored(within_s: float) -> Status:
    """Wait until the agent has restored every network. Raises HostRefused when that takes longer than ``within_s``."""
    until = time.monotonic() + within_s
    while (now := status()).unrestored != 0:
        if time.monotonic() > until:
            missing = "the agent does not answer"
            if now.unrestored is not None:
                missing = f"{now.unrestored} networks are not restored: {', '.join(now.restoring)}"
            raise HostRefused(f"after {within_s:.0f} s {missing}", hint=f"look at {LOG}")
        time.sleep(0.2)
    return now


def copy_program() -> None:
    """Copy the running program to its directory in LIBEXEC, atomically. Raises HostRefused."""
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


@contextlib.contextmanager
def _holding(build: str) -> Iterator[None]:
    """Record that an operator goes back from this build; an error takes the record back. Raises HostRefused."""
    file, before = LIBEXEC / _HELD, held()
    try:
        replace_text(file, f"{build}\n", mode=0o644)
    except OSError as error:
        raise HostRefused(f"{file} cannot be written: {error.strerror}", hint="nothing was changed") from error
    try:
        yield
    except BaseException:
        if before:
            replace_text(file, f"{before}\n", mode=0o644)
        else:
            file.unlink(missing_ok=True)
        raise


def switch(now: str, to: str, while_stopped: Callable[[], object], undo: Callable[[], object]) -> None:
    """Stop the agent, call ``while_stopped``, and start the build ``to``.

    If the new agent does not answer, or the link cannot be changed, call ``undo``, start the build ``now`` again, and
    raise HostRefused. If ``while_stopped`` raises OSError, it has changed nothing, so there is no ``undo``.
    """
    with start_lock():
        stop()
        done = False
        try:
            while_stopped()
            done = True
            set_link(_CURRENT, to)
        except OSError as error:
            try:
                if done:
                    undo()
            finally:
                if now:
                    _start()  # guard: an-agent-runs-after-a-failed-switch
            back = "no agent runs"
            if now:
                back = f"{now} serves again" if _wait_for(now) else f"{now} does not answer either"
            raise HostRefused(f"{to} cannot be put in use, {back}: {error}", hint="is the disk full?") from error
        _start()
        if _wait_for(to):
            return
        why = _last_log_line() or "its log is empty"
        stop()
        if now in ("", to):
            raise HostRefused(f"the agent of {to} does not answer: {why}", hint=f"look at {LOG}")
        undo()
        set_link(_CURRENT, now)
        _start()
        back = "serves again" if _wait_for(now) else "does not answer either"
        raise HostRefused(f"the agent of {to} does not answer, {now} {back}: {why}", hint=f"look at {LOG}")


def stop() -> None:
    """Stop the agent. It finishes its running calls; the networks keep running. Raises HostRefused."""
    if connect.has_unit():
        systemctl("stop", UNIT)
    while (agent := running()) is not None:
        if not agent.pid:
            raise HostRefused("the agent does not answer and its process is unknown", hint="kill it by hand")
        terminate(agent.pid)
    _end_silent()
    _wait_for_lock()


def _end_silent() -> None:
    """End an agent that does not listen and still holds its lock after STOP_S_MAX seconds. Raises HostRefused."""
    until = time.monotonic() + STOP_S_MAX
    while pid := hung.agent_pid(os.path.dirname(SOCKET)):
        if time.monotonic() > until:
            terminate(pid)
            return
        time.sleep(0.05)


def start_current() -> None:
    """Start the agent of the build in use, and wait until it answers. Raises HostRefused."""
    with start_lock():
        _start()
        if not _wait_for(current()):
            raise HostRefused(f"the agent of {current()} does not answer", hint=f"look at {LOG}")


def _start() -> None:
    if connect.has_unit():
        connect.start_unit()
    else:
        connect.start([str(LIBEXEC / _CURRENT / PROGRAM)], [])


def _wait_for(build: str) -> bool:
    """Wait until an agent of this build answers. False after START_S_MAX seconds."""
    until = time.monotonic() + START_S_MAX
    while time.monotonic() < until:
        agent = running()
        if agent is not None and agent.build == build:
            return True
        time.sleep(0.02)
    return False


def terminate(pid: int) -> None:
    """Send SIGTERM, and SIGKILL after STOP_S_MAX seconds; return when the process has ended. Raises HostRefused."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
                signal.pidfd_send_signal(process, signal.SIGCONT)  # a stopped process handles no SIGTERM
            if select.select([process], [], [], STOP_S_MAX)[0]:
                return
    finally:
        os.close(process)
    raise HostRefused(f"the agent (process {pid}) does not end", hint="is the kernel hung? see dmesg")


def _wait_for_lock() -> None:
    """Wait until no agent holds the agent's lock: one may still be stopping, or not listen yet.

    Raises HostRefused.
    """
    directory = os.path.dirname(SOCKET)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    lock = os.open(f"{directory}/agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(lock, STOP_S_MAX, "an agent that does not listen does not release its lock")
    finally:
        os.close(lock)


@contextlib.contextmanager
def start_lock() -> Iterator[None]:
    """Hold the lock for starting an agent: relays that find no agent wait, instead of starting one."""
    os.makedirs(os.path.dirname(SOCKET), mode=0o711, exist_ok=True)
    lock = connect.open_lock(os.path.dirname(SOCKET))
    try:
        _acquire(lock, LOCK_S_MAX, "another process has been starting the agent for too long")
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of installation, rollback and removal. Raises HostRefused."""
    directory = os.path.dirname(SOCKET)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    lock = os.open(f"{directory}/install.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(lock, LOCK_S_MAX, "another installation on this host has been running for too long")
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, wait_s: float, error: str) -> None:
    until = time.monotonic() + wait_s
    while not connect.locked(lock):
        if time.monotonic() > until:
            raise HostRefused(error)
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- systemd


def _write_unit() -> None:
    """Write and enable the agent's systemd unit, so that the networks are restored after a reboot.

    It has to exist before the first start: systemd starts the agent where there is a unit.
    """
    if not connect.systemd_runs():
        return
    unit = Path(UNIT_FILE)
    if not unit.exists() or unit.read_text() != UNIT_TEXT:
        replace_text(unit, UNIT_TEXT, mode=0o644)
        systemctl("daemon-reload")
    systemctl("enable", "--quiet", UNIT)


def remove_unit() -> None:
    """Disable and remove the agent's systemd unit, if there is one. Raises HostRefused."""
    if not Path(UNIT_FILE).exists():
        return
    if connect.systemd_runs():
        systemctl("disable", "--quiet", UNIT)
    Path(UNIT_FILE).unlink()
    if connect.systemd_runs():
        systemctl("daemon-reload")


def systemctl(*args: str) -> None:
    """Run systemctl. Raises HostRefused with its error message."""
    done = subprocess.run(
        ["systemctl", *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise HostRefused(f"systemctl {' '.join(args)}: {done.stderr.strip() or f'status {done.returncode}'}")


# --------------------------------------------------------------------------------------------------------------- files


def set_link(name: str, build: str) -> None:
    """Let the symbolic link lead to this build. Raises OSError; it leads where it led then."""
    link, new = LIBEXEC / name, LIBEXEC / f".{name}.{os.getpid()}"
    before = os.readlink(link) if link.is_symlink() else ""
    _replace_link(new, build, link)
    try:
        sync_directory(LIBEXEC)
    except OSError:
        if before:
            _replace_link(new, before, link)  # guard: an-unflushed-link-is-put-back
        else:
            link.unlink()
        raise


def _replace_link(new: Path, target: str, link: Path) -> None:
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.rename(link)


def save_states(build: str) -> None:
    """Copy the state files for a later rollback to ``build``. The copy replaces the previous one."""
    new = STATE / f".previous.{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    if SCOPES.exists():
        shutil.copytree(SCOPES, new / "scopes")
    else:
        (new / "scopes").mkdir(parents=True)
    new.chmod(0o700)
    shutil.rmtree(PREVIOUS_STATES, ignore_errors=True)
    new.rename(PREVIOUS_STATES)
    sync_directory(STATE)
    set_link(_PREVIOUS, build)


def undo_save_states() -> None:
    """Undo :func:`save_states` after a failed start: restore the state files; there is no rollback any more."""
    _restore_states(PREVIOUS_STATES / "scopes")
    (LIBEXEC / _PREVIOUS).unlink(missing_ok=True)


def _restore_all_states(kept: Path, aside: Path) -> list[str]:
    """:func:`_restore_states`. Raises OSError; the files that were replaced before are put back then."""
    try:
        return _restore_states(kept, aside)
    except OSError:
        _restore_states(aside)
        raise


def _restore_states(kept: Path, aside: Path | None = None) -> list[str]:
    """Replace the state files of the scopes that still exist by those of ``kept``; return the ids of changed scopes.

    A scope that was deleted since then is not restored, because its addresses may have another owner now. A scope that
    was created since then keeps its state, and so does one that was moved: with its former placement, two hosts could
    serve it. Replaced files are copied to ``aside``.
    """
    changed = []
    for file in sorted(kept.glob("*.json")):
        present = SCOPES / file.name
        if not present.exists() or present.read_bytes() == file.read_bytes():
            continue
        now = _placement(present)
        if now is not None and now != _placement(file):
            continue  # guard: a-rollback-undoes-no-move
        if aside is not None:
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy2(present, aside / file.name)
        replace_bytes(present, file.read_bytes())
        changed.append(file.stem)
    return changed


class _Placed(msgspec.Struct):
    """The part of a state file that says where the scope lives; older builds write none."""

    placement: Placement = Placement()


def _placement(file: Path) -> tuple[int, str] | None:
    """Epoch and gate in a state file; None if it cannot be read."""
    try:
        placement = msgspec.json.decode(file.read_bytes(), type=_Placed).placement
    except (OSError, msgspec.MsgspecError):
        return None
    return placement.epoch, placement.gate


def _remove_old() -> list[str]:
    """Remove builds that are not newer than the current one; return those whose directory is gone.

    The previous and the held build stay, and so do builds that may still be uploaded or activated.
    """
    now = current()
    keep = {now, previous(), held()}
    long_ago = time.time() - UPLOAD_S_MAX
    old = [it for it in builds() if it not in keep and not is_newer(it, than=now)]
    return [build for build in old if (LIBEXEC / build).stat().st_mtime < long_ago and remove_build(build)]


def remove_build(build: str) -> bool:
    """Remove our files from the build's directory, and the directory. False when a foreign file is left in it."""
    directory = LIBEXEC / build
    for entry in directory.iterdir():
        if entry.name == PROGRAM or _UPLOADS.match(entry.name):
            entry.unlink()
    with contextlib.suppress(OSError):  # not empty
        directory.rmdir()
    return not directory.exists()


def _let_only_root_write(directory: Path) -> None:
    """Check that the directory and its program are root's; take a write permission of others away.

    Raises HostRefused for a link, for another owner, and for a program that others could have changed.
    """
    for entry in (directory, directory / PROGRAM):
        with contextlib.suppress(FileNotFoundError):
            found = entry.lstat()
            if entry.is_symlink() or found.st_uid != 0:
                raise HostRefused(f"{entry} is a link, or belongs to another user than root", hint="remove it")
            if not found.st_mode & 0o022:
                continue
            if entry != directory:
                raise HostRefused(
                    f"users other than root could change {entry}",
                    hint=f"remove {directory}; the next call installs it again",
                )
            entry.chmod(found.st_mode & 0o755)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _last_log_line() -> str:
    try:
        lines = Path(LOG).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1][-300:] if lines else ""
