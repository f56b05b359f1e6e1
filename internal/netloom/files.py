"""Files that are replaced atomically: a reader sees the old content or the new one, also after a power failure."""

from __future__ import annotations

import contextlib
import os


class NotFlushed(OSError):
    """The new content is in place and could not be taken back, but a power failure may bring the old one back."""


def replace_bytes(
    path: str | os.PathLike[str], data: bytes, *, mode: int = 0o600, group: int | None = None, durable: bool = True
) -> None:
    """Replace the content of ``path``, or create it.

    The data is written to ``.<name>.new`` in the same directory, which is then renamed. Callers that may run at the
    same time need a lock. The new file gets exactly ``mode``, our user and ``group`` (None: our own).
    ``durable``: flush the file before and the directory after the rename (fsync(2)), so that the change survives a
    power failure. Without it only readers are protected. Until the directory is flushed, ``.<name>.old`` is a second
    name of the old file; a crash may leave it, and the next replacement removes it.
    Raises OSError; the old content is in place then, and the temporary files are removed. Raises NotFlushed when the
    directory could not be flushed and the old content could not be put back, for example because the kernel has made
    the file system read-only after a write error.
    """
    directory, name = os.path.split(os.fspath(path))
    new, old = os.path.join(directory, f".{name}.new"), os.path.join(directory, f".{name}.old")
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
        existed = durable and _link(os.fspath(path), old)
        os.rename(new, path)
    except OSError:
        for leftover in (new, old) if durable else (new,):
            with contextlib.suppress(OSError):
                os.unlink(leftover)
        raise
    if not durable:
        return
    try:
        sync_directory(directory or ".")
    except OSError as error:
        _put_back(os.fspath(path), old if existed else "", error)  # guard: an-unflushed-file-is-put-back
        raise
    if existed:
        with contextlib.suppress(OSError):  # a name that nobody reads; the next replacement removes it
            os.unlink(old)


def replace_text(
    path: str | os.PathLike[str], text: str, *, mode: int = 0o600, group: int | None = None, durable: bool = True
) -> None:
    """:func:`replace_bytes` of ``text`` in UTF-8."""
    replace_bytes(path, text.encode(), mode=mode, group=group, durable=durable)


def rename_durably(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """Rename a file within its directory, and flush the directory. A file of the new name is lost.

    Raises OSError; the file has its old name then. Raises NotFlushed when that could not be put back.
    """
    os.rename(path, to)
    try:
        sync_directory(os.path.dirname(os.fspath(path)) or ".")
    except OSError as error:
        _put_back(os.fspath(path), os.fspath(to), error)  # guard: an-unflushed-rename-is-put-back
        raise


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a crash during a replacement has left in ``directory``. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for it in entries:
            if it.name.startswith(".") and it.name.endswith((".new", ".old")):
                os.unlink(it.path)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Flush the names in ``directory`` to disk: renames and removals then survive a power failure. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link(path: str, old: str) -> bool:
    """Give the file a second name, and return whether there is such a file. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(old)  # a crash has left it
    try:
        os.link(path, old)
    except FileNotFoundError:
        return False
    return True


def _put_back(path: str, old: str, cause: OSError) -> None:
    """Make ``path`` what it was: the file that is called ``old`` now, or, if that is empty, no file.

    Raises NotFlushed. A power failure may now keep either content, and the caller reports the change as failed.
    """
    try:
        if old:
            os.rename(old, path)
        else:
            os.unlink(path)
    except OSError:
        raise NotFlushed(cause.errno, cause.strerror) from cause
