"""Files that are replaced atomically: a reader sees the old content or the new one, also after a power failure."""

from __future__ import annotations

import contextlib
import os


def replace_bytes(
    path: str | os.PathLike[str], data: bytes, *, mode: int = 0o600, group: int | None = None, durable: bool = True
) -> None:
    """Replace the content of ``path``, or create it.

    The data is written to ``.<name>.new`` in the same directory, which is then renamed. Callers that may run at the
    same time need a lock. The new file gets exactly ``mode``, our user and ``group`` (None: our own).
    ``durable``: flush the file before and the directory after the rename (fsync(2)), so that the change survives a
    power failure. Without it only readers are protected.
    Raises OSError; the old content is intact then, and the temporary file is removed.
    """
    directory, name = os.path.split(os.fspath(path))
    new = os.path.join(directory, f".{name}.new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is
            if group is not None:
                os.fchown(fd, -1, group)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
        os.rename(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    if durable:
        sync_directory(directory or ".")


def replace_text(
    path: str | os.PathLike[str], text: str, *, mode: int = 0o600, group: int | None = None, durable: bool = True
) -> None:
    """:func:`replace_bytes` of ``text`` in UTF-8."""
    replace_bytes(path, text.encode(), mode=mode, group=group, durable=durable)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Flush the names in ``directory`` to disk: renames and removals then survive a power failure. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
