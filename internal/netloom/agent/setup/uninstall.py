"""Uninstall netloom from a host, and leave the host as it was before the installation.

The programs, the agent, the guest process, the systemd unit, sockets, logs and state files are removed. Foreign files
in our directories are kept and listed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from netloom import program
from netloom.agent.actions.hooks import STARTED
from netloom.agent.connect import LOG, SOCKET, UNTESTED
from netloom.agent.host import fence, gate, lease, unmanaged
from netloom.agent.host.bridged_frames import BridgedFrames
from netloom.agent.host.converge import KernelHost
from netloom.agent.host.frames import GUARD_TABLES, unguard_all
from netloom.agent.host.host_sysctls import RECORD, restore
from netloom.agent.host.observe import our_shared_links
from netloom.agent.kernel import namespaces
from netloom.agent.processes.guest_process import DIRECTORY, FORMER
from netloom.agent.processes.process import alive, read_record
from netloom.agent.scopes.store import Store
from netloom.agent.setup import install
from netloom.agent.setup.install import LIBEXEC, SCOPES, STATE
from netloom.agent.standby.group_file import GroupFile
from netloom.errors import HostRefused
from netloom.guestwire import GuestHello
from netloom.guestwire.channel import Channel, ChannelError
from netloom.plan.have import CARRIERS
from netloom.wire import Call, FrameReader, Hello, Registration, Reply, encode

Networks = Literal["refuse", "remove", "leave"]

_ANSWER_S_MAX = 60.0
_HELLO_S_MAX = 5.0


class Kept(msgspec.Struct, frozen=True):
    """What stays on the host. ``files``: those of others. ``kept``: objects of ours, with the reason.

    ``next``: the commands that remove them when the reason is gone.
    """

    files: list[str] = []
    kept: list[str] = []
    next: list[str] = []


def uninstall(networks: Networks) -> Kept:
    """Remove netloom from this host; return what stays.

    ``networks``, if there are networks on the host: ``refuse`` changes nothing and raises HostRefused; ``remove``
    deletes them first; ``leave`` keeps them and their state files, but nothing answers DHCP or metadata requests.
    A network with a standby cannot be left: without an agent its lease ends. Nor is a host removed that stands by.
    A bridge with a VM stays, without its guard: nobody would maintain it. Networks that are left keep their guards.
    Raises HostRefused also when the agent, the guest process or a network cannot be stopped.
    """
    with install.locked():
        scopes = _scopes()
        check_groups(grouped_scopes(Store(str(SCOPES)), scopes, STATE), networks)
        if scopes and networks == "refuse":
            raise HostRefused(
                f"{len(scopes)} networks live on this host: {', '.join(scopes[:10])}",
                hint="delete them in CloudStack, or use --networks remove or --networks leave",
            )
        if scopes and networks == "remove":
            _delete_all(scopes)
        # Calls that come meanwhile wait for this lock, and find nothing then (agent/connect.py).
        with install.start_lock():
            install.stop()
            _stop_guest_process()
            install.remove_unit()
            leave = bool(scopes) and networks == "leave"
            if leave:
                kept = [f"{len(scopes)} networks with their bridges and guards: they run on"]
                after = ["netloom agent install"]
            else:
                kept, after = remove_shared_links()
                BridgedFrames().leave()
                unmanaged.release()
                restore(STATE / RECORD)
            namespaces.release()
            return Kept(_remove_files(keep_networks=leave), kept, after)


def remove_shared_links() -> tuple[list[str], list[str]]:
    """Remove all guards, and the unused links of segments; what stays, and the commands that remove it."""
    try:
        KernelHost().tidy()
        found = our_shared_links()
        bridges = [link for _, link in sorted(found.items()) if link.kind == "bridge" and link.ours]
        unguard_all([it.name for it in bridges])  # guard: no-guard-without-its-agent
        gate.remove()  # guard: no-gate-without-its-agent
        lease.remove()  # guard: no-lease-without-its-agent
        fence.TABLE.remove()  # guard: no-fence-without-its-agent
    except HostRefused as error:
        return [f"guards and bridges: {error}"], [
            f"nft delete table {it}" for it in (*GUARD_TABLES, gate.TABLE.label, lease.TABLE.label, fence.TABLE.label)
        ]
    kept, after = [], []
    for bridge in bridges:
        carrier = found.get(bridge.carrier)
        ours = [carrier.name] if carrier is not None and carrier.ours and carrier.kind in CARRIERS else []
        others = [it for it in bridge.ports if it not in ours]
        kept.append(f"bridge {' and '.join([bridge.name, *ours])}: {', '.join(others) or 'something'} is plugged in")
        after += [f"ip link delete {it}" for it in (bridge.name, *ours)]
    return kept, after


def _scopes() -> list[str]:
    """The ids of the scopes with a state file, deleted ones included."""
    if not SCOPES.exists():
        return []
    store = Store(str(SCOPES))
    return sorted({*store.living(), *store.ended()})


def grouped_scopes(store: Store, scopes: Iterable[str], directory: Path) -> dict[str, tuple[str, str]]:
    """The scopes that have a standby: this host's name, and that of the host that serves them, as its disk says.

    Both are empty if that is not known. Raises HostRefused for a state or a ``standby.json`` that cannot be read.
    """
    loaded = ((scope_id, store.load(scope_id)) for scope_id in scopes)
    group_of = {scope_id: it.placement.group for scope_id, it in loaded if it is not None and it.placement.group}
    if not group_of:
        return {}
    known = {it.spec.group_id: (it.me, it.kept.active) for it in GroupFile(directory).load().groups}
    return {scope_id: known.get(group_id, ("", "")) for scope_id, group_id in group_of.items()}


def check_groups(grouped: Mapping[str, tuple[str, str]], networks: Networks) -> None:
    """Raises HostRefused if networks would stop, or lose their standby, and nobody asked for that."""
    copies = {scope_id: active for scope_id, (me, active) in grouped.items() if me != active}
    if copies:  # guard: a-standby-is-not-removed
        raise HostRefused(
            f"this host stands by for {len(copies)} networks: {', '.join(sorted(copies)[:10])}",
            hint="take it out of the registration detail hosts: CloudStack's next calls choose other hosts; "
            "or register standby=off",
        )
    if grouped and networks == "leave":  # guard: a-network-with-a-lease-is-not-left
        raise HostRefused(
            f"{len(grouped)} networks have a standby, and would stop here: {', '.join(sorted(grouped)[:10])}",
            hint="netloom drain this host first, or register standby=off",
        )


def _delete_all(scopes: Iterable[str]) -> None:
    """Let the agent carry out the delete command of each scope. Raises HostRefused."""
    serving = install.running()
    if serving is not None and serving.hello is None:  # it hangs
        with install.start_lock():
            install.stop()
    if serving is None or serving.hello is None:
        install.start_current()
    store = Store(str(SCOPES))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as agent:
        agent.settimeout(_ANSWER_S_MAX)
        agent.connect(SOCKET)
        agent.sendall(encode(Hello(version="", build=install.current())))
        for scope_id in scopes:
            scope = store.load(scope_id)
            kind, number = scope_id.split("-")
            command, key = ("destroy-vpc", "vpc_id") if kind == "vpc" else ("destroy-network", "network_id")
            _call(agent, scope_id, command, {key: number}, scope.owner if scope else "")


def _call(agent: socket.socket, scope_id: str, command: str, payload: dict[str, str], owner: str) -> None:
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
                    raise HostRefused(f"{scope_id} cannot be deleted: {message.error}", hint=message.hint)
                return
    raise HostRefused(f"{scope_id} cannot be deleted: the agent closed the connection")


def _stop_guest_process() -> None:
    """Stop the guest process, and the one that it replaces if the agent was stopped too early to do so.

    Its Hello has its pid: SO_PEERCRED gives that of the agent, which opened the socket.
    """
    former = read_record(DIRECTORY / FORMER)
    if former is not None and alive(former):
        install.terminate(former.pid)
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
                    install.terminate(_started_pid(message.pid))
                    return
    raise HostRefused("the guest process does not answer", hint="kill it by hand: its command line is netloom guest")


def _started_pid(claimed: int) -> int:
    """The pid of the guest process that the agent started. The process itself is not trusted with the choice of a pid.

    Raises HostRefused if the process claims another one.
    """
    record = read_record(DIRECTORY / "guest.json")
    recorded = record.pid if record is not None else 0
    if claimed != recorded:
        raise HostRefused(
            f"the guest process says that it is process {claimed}, the agent started {recorded}",
            hint="kill it by hand: its command line is netloom guest",
        )
    return claimed


def _remove_files(*, keep_networks: bool) -> list[str]:
    made_parent = (LIBEXEC / install.MADE_PARENT).exists()
    _remove([LIBEXEC / "current"])  # first: calls that come meanwhile start no program that is being removed
    _remove_unpacked(install.builds())
    for build in install.builds():
        install.remove_build(build)
    _remove(LIBEXEC.glob(".*.*"), [LIBEXEC / name for name in ("previous", "held", UNTESTED, install.MADE_PARENT)])
    shutil.rmtree(install.PREVIOUS_STATES, ignore_errors=True)
    shutil.rmtree(install.REPLACED_STATES, ignore_errors=True)
    _remove(Path(LOG).parent.glob(f"{Path(LOG).name}*"), [GroupFile(STATE).path])
    _remove(
        [DIRECTORY / it for it in ("agent.sock", "guest.sock", "guest.json", FORMER, "guest.log", STARTED.name)],
        DIRECTORY.glob("*.lock"),
    )
    _remove_directories(DIRECTORY / "empty", *([] if keep_networks else [DIRECTORY / "services"]), DIRECTORY)
    if not keep_networks:
        _forget_keys()
    _remove_directories(*([] if keep_networks else [SCOPES]), STATE / "hooks", STATE, Path(LOG).parent, LIBEXEC)
    if made_parent:
        _remove_directories(LIBEXEC.parent)
    ours = (LIBEXEC, STATE, DIRECTORY, Path(LOG).parent)
    return [str(path) for it in ours for path in (it.rglob("*") if it.exists() else ()) if not path.is_dir()]


def _forget_keys() -> None:
    """Forget who can sign placements. What an operator said about this host stays."""
    with contextlib.suppress(HostRefused):  # a file that cannot be read stays, and is named
        store = Store(str(SCOPES))
        store.save_host_record(msgspec.structs.replace(store.host_record(), signers={}, over=0))


def _remove_unpacked(builds: list[str]) -> None:
    """Remove the unpacked copies of these builds, and our directories above them if they are empty then."""
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
        with contextlib.suppress(OSError):  # missing, or not empty
            directory.rmdir()
