"""The host as it was found: program, agent, guest process, unit, sockets, logs and states go, and what held them.

What somebody else has put into our directories stays, and is named.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from netloom import program
from netloom.agent import connect
from netloom.agent.connect import LOG, SOCKET, UNIT, UNIT_FILE
from netloom.agent.kernel import namespaces
from netloom.agent.processes.guest_process import DIRECTORY
from netloom.agent.setup import install
from netloom.agent.setup.install import LIBEXEC, SCOPES, STATE
from netloom.agent.store import Store
from netloom.errors import HostRefused
from netloom.guestwire import GuestHello
from netloom.guestwire.channel import Channel, ChannelError
from netloom.wire import Call, FrameReader, Hello, Registration, Reply, encode

Networks = Literal["refuse", "remove", "leave"]

_ANSWER_S_MAX = 60.0
_HELLO_S_MAX = 5.0


def uninstall(networks: Networks) -> list[str]:
    """Removes netloom from this host; the files that stay, because others have put them there.

    ``networks``, where some live here: ``refuse`` raises HostRefused and touches nothing, ``remove`` ends them first,
    ``leave`` lets them stand as they are, with their states and without anybody who answers their VMs' DHCP.
    """
    with install.locked():
        living = _living()
        if living and networks == "refuse":
            raise HostRefused(
                f"{len(living)} networks live on this host: {', '.join(living[:10])}",
                hint="delete them in CloudStack, or say --networks remove (they end here) or --networks leave",
            )
        if living and networks == "remove":
            _end_all(living)
        install.stop_for_good()
        _end_guest_process()
        _remove_unit()
        namespaces.release()
        return _remove_files(stand=bool(living) and networks == "leave")


def _living() -> list[str]:
    """The scopes that have something on this host."""
    if not SCOPES.exists():
        return []
    store = Store(str(SCOPES))
    return sorted({*store.living(), *store.ended()})


def _end_all(living: Iterable[str]) -> None:
    """Each is destroyed as CloudStack would have it destroyed. Raises HostRefused."""
    if install.running() is None:
        install.start_current()
    store = Store(str(SCOPES))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as agent:
        agent.settimeout(_ANSWER_S_MAX)
        agent.connect(SOCKET)
        agent.sendall(encode(Hello(version="", build=install.current())))
        for scope_id in living:
            scope = store.load(scope_id)
            kind, number = scope_id.split("-")
            command, key = ("destroy-vpc", "vpc_id") if kind == "vpc" else ("destroy-network", "network_id")
            _ask(agent, scope_id, command, {key: number}, scope.owner if scope else "")


def _ask(agent: socket.socket, scope_id: str, command: str, payload: dict[str, str], owner: str) -> None:
    call = Call(
        call_id=f"uninstall-{os.getpid()}-{scope_id}",
        command=command,
        scope_id=scope_id,
        registration=Registration(owner=owner),
        payload=msgspec.json.encode(payload),
    )
    agent.sendall(encode(call))
    reader = FrameReader()
    while data := agent.recv(1 << 16):
        for message in reader.feed(data):
            if isinstance(message, Reply):
                if message.status:
                    raise HostRefused(f"{scope_id} does not end: {message.error}", hint=message.hint)
                return
    raise HostRefused(f"{scope_id} does not end: the agent hung up")


def _end_guest_process() -> None:
    """The process says itself who it is; whoever opened its socket was the agent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(DIRECTORY / "guest.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        channel = Channel(sock)
        while select.select([channel], [], [], _HELLO_S_MAX)[0]:
            try:
                arrived = channel.receive()
            except ChannelError:
                return
            for message, _ in arrived:
                if isinstance(message, GuestHello):
                    install.end(message.pid)
                    return
    raise HostRefused("the guest process does not answer", hint="end it: its command line is netloom guest")


def _remove_unit() -> None:
    if not Path(UNIT_FILE).exists():
        return
    if connect.systemd_runs():
        install.systemctl("disable", "--quiet", UNIT)
    Path(UNIT_FILE).unlink()
    if connect.systemd_runs():
        install.systemctl("daemon-reload")


def _remove_files(*, stand: bool) -> list[str]:
    made_parent = (LIBEXEC / install.MADE_PARENT).exists()
    _remove_unpacked(install.builds())
    for build in install.builds():
        install.remove_build(build)
    _remove(LIBEXEC.glob(".*.*"), [LIBEXEC / name for name in ("current", "previous", "held", install.MADE_PARENT)])
    shutil.rmtree(install.BEFORE, ignore_errors=True)
    shutil.rmtree(install.UNDONE, ignore_errors=True)
    _remove(Path(LOG).parent.glob(f"{Path(LOG).name}*"))
    _remove(
        [DIRECTORY / name for name in ("agent.sock", "guest.sock", "guest.json", "guest.log")], DIRECTORY.glob("*.lock")
    )
    _remove_directories(DIRECTORY / "empty", *([] if stand else [DIRECTORY / "services"]), DIRECTORY)
    _remove_directories(*([] if stand else [SCOPES]), STATE / "hooks", STATE, Path(LOG).parent, LIBEXEC)
    if made_parent:
        _remove_directories(LIBEXEC.parent)
    ours = (LIBEXEC, STATE, DIRECTORY, Path(LOG).parent)
    return [str(file) for it in ours for file in (it.rglob("*") if it.exists() else ()) if not file.is_dir()]


def _remove_unpacked(builds: list[str]) -> None:
    """What the one file unpacked of these builds, beside the one that runs, and the directories that it made for it."""
    unpacked = program.unpacked()
    if not unpacked:
        return
    programs = Path(unpacked).parent
    for build in builds:
        shutil.rmtree(programs / build, ignore_errors=True)
    for directory in (programs, *programs.parents[:2]):
        if directory.name in ("programs", "netloom", ".cache", "0", "netloom-0"):  # extension/directory.py
            _remove_directories(directory)


def _remove(*files: Iterable[Path]) -> None:
    for file in (file for group in files for file in group):
        file.unlink(missing_ok=True)


def _remove_directories(*directories: Path) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # not there, or somebody else's file is in it
            directory.rmdir()
