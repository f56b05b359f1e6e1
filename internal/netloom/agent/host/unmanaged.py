"""Tell NetworkManager and systemd-networkd to leave VMs' taps and our links alone.

Both may take a link out of its bridge that they did not put there: NetworkManager when networking is switched off and
on, networkd when a file of the operator matches all links (``Name=*``). Nobody puts a VM's tap back.

Each of them reads a file below /run, which is gone after a boot like the links. It is written only where that program
runs, and read at once: ``unmanaged-devices`` of NetworkManager.conf(5) takes effect for existing links with a reload,
which ``managed`` of its device sections does not; ``Unmanaged`` is in systemd.network(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from netloom.agent.environment import PATH
from netloom.files import replace_text

# Taps of VMs (libvirt names them vnet0), our ports (vnetg204), and the VXLAN bridges of CloudStack.
ALWAYS = ("vnet*", "brvx-*")

_TAME = re.compile(r"[A-Za-z0-9_.-]+")  # other characters mean something in these files
_RELOAD_S_MAX = 10.0


class Program(msgspec.Struct, frozen=True):
    """``place``: a directory that exists where the program may run. ``runs``: what exists once it has run.

    ``text``: the file for these names.
    """

    place: str
    runs: str
    file: str
    text: Callable[[list[str]], str]
    reload: tuple[str, ...]


def _for_networkmanager(names: list[str]) -> str:
    listed = ";".join(f"interface-name:{it}" for it in names)
    # A file of the operator may replace the first list. The second one holds for links that are made later.
    return f"[keyfile]\nunmanaged-devices+={listed}\n\n[device-netloom]\nmatch-device={listed}\nmanaged=0\n"


def _for_networkd(names: list[str]) -> str:
    return f"[Match]\nName={' '.join(names)}\n\n[Link]\nUnmanaged=yes\n"


_HEAD = "# Written by netloom, which removes it at its uninstallation. Links that carry networks of CloudStack.\n"
PROGRAMS = (
    Program(
        "/run/NetworkManager",
        "/run/NetworkManager",
        "/run/NetworkManager/conf.d/netloom.conf",
        _for_networkmanager,
        ("nmcli", "general", "reload", "conf"),
    ),
    # The first file that matches a link counts, in the order of the names.
    # systemd-tmpfiles makes its directory on every host, and `networkctl` would ask D-Bus to start it.
    Program(
        "/run/systemd/netif",
        "/run/systemd/netif/state",
        "/run/systemd/network/00-netloom.network",
        _for_networkd,
        ("networkctl", "reload"),
    ),
)


def mark(links: Iterable[str]) -> None:
    """Have both programs leave the taps of VMs and these links alone. Only a change of the names takes time.

    A program that does not answer reads its file at its next start.
    """
    names = [
        *ALWAYS,  # guard: taps-of-vms-are-left-alone
        *sorted(it for it in set(links) if _TAME.fullmatch(it)),
    ]
    for program in PROGRAMS:
        text = _HEAD + program.text(names)
        # A read-only /run is no reason to fail: nothing else depends on these files.
        with contextlib.suppress(OSError):
            if os.path.isdir(program.place) and _content(program.file) != text:
                _make_readable(os.path.dirname(program.file))
                replace_text(program.file, text, mode=0o644, durable=False)
                _reload(program)


def is_marked() -> bool:
    """Whether both programs have been told of some links, as far as they run. Not after a boot."""
    return all(os.path.exists(it.file) for it in PROGRAMS if os.path.isdir(it.place))


def release() -> None:
    """Remove the files, and have the programs forget them."""
    for program in PROGRAMS:
        with contextlib.suppress(OSError):
            os.unlink(program.file)
            _reload(program)


def _content(path: str) -> str:
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        return Path(path).read_text()
    return ""


def _make_readable(directory: str) -> None:
    """Make a directory that other users may read, whatever the umask is: networkd is not root."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
        os.chmod(directory, 0o755)


def _reload(program: Program) -> None:
    if not os.path.exists(program.runs):
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            program.reload,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": PATH},
            timeout=_RELOAD_S_MAX,
            check=False,
        )
