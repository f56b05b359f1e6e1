"""Where the management side keeps things: the first usable of a few directories.

Never beside the executable: CloudStack compares a checksum of that directory between its servers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from netloom.errors import BadRequest


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

    Usable is a directory of ours that nobody else can enter, and no link: /var/tmp is everybody's.
    """
    if not path.startswith("/"):
        return "not an absolute path"
    try:
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
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"mode {stat.S_IMODE(found.st_mode):04o}, not 0700"
    return "" if os.access(path, os.W_OK | os.X_OK) else "not writable"


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
