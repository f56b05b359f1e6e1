"""Run nftables scripts in a namespace: with libnftables in this process, or with the ``nft`` program.

A script is one transaction. The library (``nftables/libnftables.h``, libnftables(3)) exits the process when it gets no
file descriptor, so a call is refused while fewer than 16 are free. Only one thread at a time may use the library, so
large scripts, and listings of any length, go to the program. The program is also used where the library is missing, and
while it would get descriptors that it cannot wait for (descriptors.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import IO, Any, Self

from netloom.agent.environment import PATH
from netloom.agent.kernel import descriptors
from netloom.agent.kernel.namespaces import inside, own_identity
from netloom.errors import HostRefused

_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON
_DESCRIPTORS_MIN = 16
# Some 2,000 rules: the library takes 0.1 s for them, the program 10 to 20 ms more.
_LIBRARY_BYTES_MAX = 128 << 10
_PROGRAM_S_MAX = 120
_ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C"}  # LC_ALL: messages in English

# One lock for all contexts: the library keeps link indexes in one list per process, and looks up protocol numbers with
# functions that return static memory. Measured with 1.0.6 (2026-11): with two threads in two namespaces, one rule in
# fourteen that named a link (iif) was loaded with the index of the other namespace's link.
_library_lock = threading.Lock()

_MESSAGE = re.compile(r"^[^\s:]*:(?P<line>\d+):\d+-\d+: Error: (?P<text>.*)$", re.MULTILINE)
_LINE_MAX = 200


class NftError(HostRefused):
    """nftables refused a script, or cannot be used.

    ``reason`` is the first line of its message; ``line`` the line of the script that it names, else empty.
    """

    def __init__(self, reason: str, *, line: str = "", hint: str = "") -> None:
        super().__init__(f"nftables: {reason}: {line}" if line else f"nftables: {reason}", hint=hint)
        self.reason = reason
        self.line = line


class NftRefused(NftError):
    """The script was refused, e.g. because it refers to an object that does not exist."""


class Nft:
    """nftables of one namespace. Any thread may use it. Calls into the library wait for each other, in all objects.

    Close it before the namespace is deleted: its socket keeps the namespace alive.
    """

    def __init__(self, namespace: str | None, *, use: str = "") -> None:
        """``use``: ``library`` or ``program``; empty: the library if it loads.

        Raises NamespaceError; NftError when too few descriptors are free, or neither library nor program exists.
        """
        self.namespace = namespace
        library = None if use == "program" else load_library()
        if use == "library" and library is None:
            raise NftError(f"{_LIBRARY} cannot be loaded", hint="apt install libnftables1")
        if library is not None and not _can_wait():  # guard: libnftables-gets-low-descriptors
            library = None
        self._turn: AbstractContextManager[object] = _library_lock if library else threading.Lock()
        with self._turn, inside(namespace):
            self._inode = own_identity()
            self._engine: _Library | _Program = _Library(library) if library else _Program()
        self._aside = _Program() if library and not use else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, script: str) -> None:
        """Run a script as one transaction. Raises NftError; then nothing has changed."""
        self._call(script)

    def check(self, script: str) -> None:
        """Check a script without changing anything. Raises NftError when it is refused."""
        self._call(script, dry=True)

    def list_json(self, command: str) -> dict[str, Any]:
        """The output of a listing command with ``nft -j`` (libnftables-json(5)): ``{"nftables": [...]}``.

        Raises NftError, also when the object to list does not exist.
        """
        printed = self._call(command, as_json=True)
        if not printed.strip():
            return {"nftables": []}
        try:
            found = json.loads(printed)
        except ValueError as error:
            raise NftError(f"the output of {command!r} is not JSON") from error
        if not isinstance(found, dict):
            raise NftError(f"the output of {command!r} is not a JSON object")
        return found

    def list_text(self, command: str) -> str:
        """The output of a listing command. Raises NftError, also when the object to list does not exist."""
        return self._call(command, long=True)  # the length is not known before

    def close(self) -> None:
        """Close the socket; closing again does nothing."""
        with self._turn:
            self._engine.close()

    def _call(self, script: str, *, dry: bool = False, as_json: bool = False, long: bool = False) -> str:
        if "\0" in script:
            raise NftError("the script contains a zero byte")
        engine, turn = self._engine, self._turn
        if self._aside is not None and (long or len(script) > _LIBRARY_BYTES_MAX) and _Program.is_there():
            engine, turn = self._aside, nullcontext()
        # Enter the namespace although the context has its socket: the library looks up link indexes with new sockets,
        # and before 0.9.9 it reopens its own socket when a listing was interrupted.
        with turn, inside(self.namespace):
            if own_identity() != self._inode:
                raise NftError(
                    f"namespace {self.namespace} was replaced by another since it was opened", hint="open it again"
                )
            status, printed, complaint = engine.call(script, dry, as_json)
        if status != 0:
            raise error_of(script, complaint)
        return printed


def version() -> tuple[int, ...]:
    """The version of the library or the program that :class:`Nft` uses here; empty if neither says it."""
    try:
        with Nft(None) as nft:
            about = nft.list_json("list tables")["nftables"][0]["metainfo"]["version"]
        return tuple(map(int, str(about).split(".")))
    except (NftError, LookupError, TypeError, ValueError):
        return ()


def error_of(script: str, complaint: str) -> NftRefused:
    """The error for a message of nftables, with the line of the script that it names."""
    found = _MESSAGE.search(complaint)
    if not found:
        first = next((line.strip() for line in complaint.splitlines() if line.strip()), "failed without a message")
        return NftRefused(first)
    lines = script.splitlines()
    at = int(found["line"])
    line = lines[at - 1].strip() if 0 < at <= len(lines) else ""
    return NftRefused(found["text"], line=line if len(line) <= _LINE_MAX else line[: _LINE_MAX - 3] + "...")


@cache
def load_library() -> ctypes.CDLL | None:
    """libnftables, or None when it cannot be loaded."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_output.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
        library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        library.nft_run_cmd_from_filename.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).restype = ctypes.c_char_p
            getattr(library, name).argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


class _Library:
    def __init__(self, library: ctypes.CDLL) -> None:
        _spare_descriptors()
        self._library = library
        self._context: int | None = library.nft_ctx_new(0)
        if not self._context:
            raise NftError("libnftables gave no context")
        if library.nft_ctx_buffer_output(self._context) or library.nft_ctx_buffer_error(self._context):
            self.close()
            raise NftError("libnftables cannot buffer its output")

    def call(self, script: str, dry: bool, as_json: bool) -> tuple[int, str, str]:
        if self._context is None:
            raise NftError("used after it was closed")
        _spare_descriptors()
        library, context = self._library, self._context
        library.nft_ctx_set_dry_run(context, dry)
        library.nft_ctx_output_set_flags(context, _OUTPUT_JSON if as_json else 0)
        # From a file, because the library names the line of an error only for files.
        with _in_memory(script) as file:
            status: int = library.nft_run_cmd_from_filename(context, f"/proc/self/fd/{file.fileno()}".encode())
        printed = library.nft_ctx_get_output_buffer(context) or b""
        complaint = library.nft_ctx_get_error_buffer(context) or b""
        return status, printed.decode("utf-8", "replace"), complaint.decode("utf-8", "replace")

    def close(self) -> None:
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None


class _Program:
    @staticmethod
    def is_there() -> bool:
        return shutil.which("nft", path=PATH) is not None

    def call(self, script: str, dry: bool, as_json: bool) -> tuple[int, str, str]:
        # With --json the program expects JSON on standard input, so the command is an argument.
        arguments = ["--json", script] if as_json else [*(["--check"] if dry else []), "--file", "-"]
        try:
            # No pipe: if this process were killed while writing to it, the program would run the part that it received.
            with _in_memory("" if as_json else script) as file:
                done = subprocess.run(
                    ["nft", *arguments],
                    stdin=file,
                    capture_output=True,
                    env=_ENVIRONMENT,
                    cwd="/",
                    timeout=_PROGRAM_S_MAX,
                    check=False,
                )
        except FileNotFoundError as error:
            hint = "apt install nftables"
            raise NftError(f"neither {_LIBRARY} nor the program nft exists", hint=hint) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NftError(f"the program nft: {error}") from error
        if done.returncode < 0:
            raise NftError(f"the program nft was killed by signal {-done.returncode}")
        return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")

    def close(self) -> None:
        pass


def _in_memory(script: str) -> IO[bytes]:
    """A file in memory with the script; it is removed with its last open descriptor."""
    file = open(os.memfd_create("netloom.nft", os.MFD_CLOEXEC), "w+b")  # noqa: SIM115, the caller closes it
    file.write(script.encode() + b"\n")
    file.seek(0)
    return file


def _can_wait() -> bool:
    """Whether the library can wait for the socket that it would open now. Raises NftError when none can be opened."""
    try:
        return descriptors.low_is_free()
    except OSError as error:
        raise NftError(
            f"no file descriptor is free: {os.strerror(error.errno or 0)}", hint="raise LimitNOFILE"
        ) from error


def _spare_descriptors() -> None:
    """Raises NftError unless _DESCRIPTORS_MIN more descriptors can be opened, whichever limit applies."""
    taken: list[int] = []
    try:
        for _ in range(_DESCRIPTORS_MIN):
            # One by one, so that those opened are closed when the next one is refused.
            taken.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise NftError(
            f"fewer than {_DESCRIPTORS_MIN} file descriptors are free: {os.strerror(error.errno or 0)}",
            hint="raise LimitNOFILE",
        ) from error
    finally:
        for fd in taken:
            os.close(fd)
