"""Where the management side keeps things: the first usable of a few directories.

Never beside the executable: CloudStack compares a checksum of that directory between its servers.
"""

from __future__ import annotations

import _stat as stat  # the C module

from netloom.errors import BadRequest
from netloom.fastos import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class NoDirectory(BadRequest):
    """None of the directories can be used; what has to be remembered cannot be."""


def candidates(environ: Mapping[str, str], uid: int, home: str) -> list[str]:
    """The persistent directories, best first. ``home``: the user's home, empty when there is none."""
    return [
        *([environ["NETLOOM_DIR"]] if environ.get("NETLOOM_DIR") else []),
        *([os.path.join(home, ".cache", "netloom")] if home else []),
        f"/var/cache/netloom/{uid}",
        f"/var/tmp/netloom-{uid}",
    ]


def home_of(environ: Mapping[str, str], uid: int) -> str:
    """HOME, or the home that passwd names (CloudStack's service has no HOME); empty when neither is there."""
    if environ.get("HOME", "").startswith("/"):
        return environ["HOME"]
    import pwd  # a C module, wanted only here

    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return ""


def unusable(path: str, uid: int) -> str:
    """Why ``path`` cannot be used; empty when it can. Makes the directory, and those above it, where they are missing.

    Usable is a directory of ours that nobody else can enter, nor put another one in the place of, and no link: /var/tmp
    is everybody's.
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
    except FileExistsError:  # somebody was as quick
        found = os.lstat(path)
    except OSError as error:
        return error.strerror or type(error).__name__
    if not stat.S_ISDIR(found.st_mode):
        return "a link" if stat.S_ISLNK(found.st_mode) else "not a directory"
    if found.st_uid != uid:
        return f"owned by uid {found.st_uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:  # guard: the-directory-is-private
        return f"mode {stat.S_IMODE(found.st_mode):04o}, not 0700"
    return "" if os.access(path, os.W_OK | os.X_OK) else "not writable"


def _unsafe_above(path: str, uid: int) -> str:
    """Why somebody else could put another directory in the place of ``path``; empty when nobody could.

    Homes that their own group may write to are usual; in a sticky directory what is ours stays in its place.
    """
    while (path := os.path.dirname(path)) not in ("/", ""):
        try:
            found = os.lstat(path)
        except FileNotFoundError:  # we will make it
            continue
        if found.st_uid not in (0, uid):
            return f"{path} is owned by uid {found.st_uid}"
        others = stat.S_IWOTH | (0 if found.st_gid in (0, os.getegid()) else stat.S_IWGRP)
        if not stat.S_ISLNK(found.st_mode) and not found.st_mode & stat.S_ISVTX and found.st_mode & others:
            return f"others may write to {path}"
    return ""


def for_sockets(environ: Mapping[str, str]) -> str | None:
    """The directory for what lives no longer than this boot; None when there is none to be had."""
    uid = os.geteuid()
    paths = candidates(environ, uid, home_of(environ, uid))
    if environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        paths.insert(1 if environ.get("NETLOOM_DIR") else 0, os.path.join(environ["XDG_RUNTIME_DIR"], "netloom"))
    return next((path for path in paths if not unusable(path, uid)), None)


def persistent(environ: Mapping[str, str] | None = None) -> str:
    """The directory for what has to outlive a reboot: known host keys and the log.

    Raises NoDirectory, with each candidate's reason, when there is none.
    """
    environ = os.environ if environ is None else environ
    uid = os.geteuid()
    reasons = []
    for path in candidates(environ, uid, home_of(environ, uid)):
        why = unusable(path, uid)
        if not why:
            return path
        reasons.append(f"{path}: {why}")
    raise NoDirectory(
        "no directory to keep known host keys in: " + "; ".join(reasons),
        hint="set NETLOOM_DIR to a directory of ours with mode 0700",
    )
