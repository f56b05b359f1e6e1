"""The package: the one file of this program, as it is uploaded to hosts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache

from netloom import program
from netloom.errors import BadRequest

# e_machine of the ELF header (elf(5)), and the name that uname(1) prints.
_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 22: "s390x", 21: "ppc64le"}


@dataclass(frozen=True)
class Package:
    """The file to upload. ``size`` is in bytes; ``machine`` is the architecture as uname(1) names it."""

    path: str
    build: str
    size: int
    sha256: str
    machine: str


@cache
def package() -> Package | None:
    """The file of the running program; None in a checkout. Raises BadRequest when it cannot be read."""
    path = program.path()
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(20)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Package(path, program.build_id(), os.fstat(file.fileno()).st_size, digest, machine_of(head))
    except OSError as error:
        raise BadRequest(
            f"{path}: {error.strerror}", hint="make this file readable: it is uploaded to hosts that lack it"
        ) from error


def machine_of(head: bytes) -> str:
    """The architecture of an ELF file with these first 20 bytes; that of this machine when it is not an ELF file."""
    if head[:4] != b"\x7fELF":
        return os.uname().machine
    return _MACHINES.get(int.from_bytes(head[18:20], "little" if head[5] == 1 else "big"), "another machine")
