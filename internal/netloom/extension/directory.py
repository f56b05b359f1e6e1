"""The directories of the management server for known host keys, the log and the helper's socket.

The first usable one of a few candidates is taken. The directory of the executable is none of them: CloudStack compares
a checksum of that directory between its management servers.
"""

from __future__ import annotations

import _stat as stat  # the C module

from netloom.errors import BadRequest
from netloom.fastos import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


# The beginning of the names of other users' directories that were found in ours.
_FOREIGN = ".foreign-"


_homes: dict[int, str] = {}  # by user, as passwd said it: the resident helper asks for each call


class NoDirectory(BadRequest):
    """No candidate directory can be used, so host keys cannot be remembered."""


def candidates(environ: Mapping[str, str], uid: int, home: str) -> list[str]:
    """The candidates for persistent files, best first. ``home``: the user's home directory, or empty."""
    return [
        *([environ["NETLOOM_DIR"]] if environ.get("NETLOOM_DIR") else []),
        *([os.path.join(home, ".cache", "netloom")] if home else []),
        f"/var/cache/netloom/{uid}",
        f"/var/tmp/netloom-{uid}",
    ]


def home_of(environ: Mapping[str, str], uid: int) -> str:
    """HOME, else the home directory in passwd (CloudStack's service has no HOME); empty when there is neither."""
    if environ.get("HOME", "").startswith("/"):
        return environ["HOME"]
    if uid not in _homes:
        import pwd  # a C module, needed only without HOME

        try:
            _homes[uid] = pwd.getpwuid(uid).pw_dir
        except KeyError:  # perhaps the name server of the users does not answer
            return ""
    return _homes[uid]


def unusable(path: str, uid: int, *, repair: bool = False) -> str:
    """Why ``path`` cannot be used; empty when it can. Creates the directory and its parents if they are missing.

    A usable directory is no symbolic link, belongs to ``uid`` with mode 0700, and no other user can replace it: anybody
    may create names in /var/tmp. ``repair``: the directory is netloom's alone, so a widened mode is set to 0700 again,
    and what other users put into it is removed.
    """
    if not path.startswith("/"):
        return "not an absolute path"
    try:
        if why := _unsafe_above(path, uid):  # guard: no-other-can-exchange-the-directory
            return why
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.mkdir(path, 0o700)
            found = os.lstat(path)
    except FileExistsError:  # another process has just created it
        found = os.lstat(path)
    except OSError as error:
        return error.strerror or type(error).__name__
    if not stat.S_ISDIR(found.st_mode):
        return "a link" if stat.S_ISLNK(found.st_mode) else "not a directory"
    if found.st_uid != uid:
        return f"owned by uid {found.st_uid}"
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o777 != 0o700:  # guard: the-directory-is-private
        if not repair:
            return f"mode {mode:04o}, not 0700"
        if why := _repaired(path, uid):
            return why
    return "" if os.access(path, os.W_OK | os.X_OK) else "not writable"


def _repaired(path: str, uid: int) -> str:
    """Make the directory private again; the reason if that fails. An entry of another user is not trusted.

    A directory of another user may have content that only its owner can remove. It gets a name that netloom does not
    use, as in build/nuitka/start.c.
    """
    try:
        os.chmod(path, 0o700)
        for name in os.listdir(path):
            entry = os.path.join(path, name)
            found = os.lstat(entry)
            if found.st_uid == uid or name.startswith(_FOREIGN):
                continue
            if stat.S_ISDIR(found.st_mode):  # guard: a-foreign-directory-is-set-aside
                os.rename(entry, os.path.join(path, f"{_FOREIGN}{os.urandom(6).hex()}"))
            else:
                os.unlink(entry)
    except OSError as error:
        return f"its mode was not 0700, and it cannot be repaired: {error.strerror}"
    return ""


def _unsafe_above(path: str, uid: int) -> str:
    """Why another user could replace ``path`` by another directory; empty when none could.

    A parent may be writable for our own group, as home directories often are. In a sticky directory other users cannot
    rename our entries.
    """
    while (path := os.path.dirname(path)) not in ("/", ""):
        try:
            found = os.lstat(path)
        except FileNotFoundError:  # we create it
            continue
        if found.st_uid not in (0, uid):
            return f"{path} is owned by uid {found.st_uid}"
        others = stat.S_IWOTH | (0 if found.st_gid in (0, os.getegid()) else stat.S_IWGRP)
        if not stat.S_ISLNK(found.st_mode) and not found.st_mode & stat.S_ISVTX and found.st_mode & others:
            return f"others may write to {path}"
    return ""


def for_sockets(environ: Mapping[str, str]) -> str | None:
    """The directory for files that need not outlive a reboot; None when no candidate is usable."""
    uid = os.geteuid()
    paths = candidates(environ, uid, home_of(environ, uid))
    if environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        paths.insert(1 if environ.get("NETLOOM_DIR") else 0, os.path.join(environ["XDG_RUNTIME_DIR"], "netloom"))
    return next((path for path in paths if not unusable(path, uid, repair=_is_netlooms(path, environ))), None)


def _is_netlooms(path: str, environ: Mapping[str, str]) -> bool:
    """Whether the directory is netloom's alone. The one in NETLOOM_DIR may be any directory of the user."""
    return path != environ.get("NETLOOM_DIR")


def persistent(environ: Mapping[str, str] | None = None) -> str:
    """The directory for files that must outlive a reboot: known host keys and the log.

    Raises NoDirectory, with the reason for each candidate, when none is usable.
    """
    environ = os.environ if environ is None else environ
    uid = os.geteuid()
    reasons = []
    for path in candidates(environ, uid, home_of(environ, uid)):
        why = unusable(path, uid, repair=_is_netlooms(path, environ))
        if not why:
            return path
        reasons.append(f"{path}: {why}")
    raise NoDirectory(
        "no directory to keep known host keys in: " + "; ".join(reasons),
        hint=f"run: install -d -m 755 /var/cache/netloom && install -d -m 700 -o {uid} /var/cache/netloom/{uid}; "
        f"or set NETLOOM_DIR to a directory of uid {uid} with mode 0700",
    )
