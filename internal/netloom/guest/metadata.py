"""The metadata service, with the paths of CloudStack's virtual router, on port 80 of the network's own address.

    /latest/user-data          the user data of the VM
    /latest/meta-data/         the names of the items, one on each line
    /latest/meta-data/<item>   the text of an item
    /latest/<item>             the same; older clients use it

As on the virtual router, an item with an empty text is not listed and gets status 404.

Paths are read as Apache reads them, because guests use what works there. Repeated slashes count as one: cloud-init
before 0.7.5 requests ``//latest/meta-data/``. Dot segments are removed (RFC 3986 section 5.2.4). Letters of either case
are accepted in ``latest``, ``user-data`` and ``meta-data``; the names of items are compared exactly. The names are keys
of a dictionary and never file paths, and the dictionary has no passwords.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import h11

from netloom.guest.http import METHOD_NOT_ALLOWED, HttpAnswer
from netloom.guestwire import GuestNic

_NOT_FOUND = HttpAnswer(404)
_AUTHORITY = re.compile(rb"https?://[^/]*", re.IGNORECASE)

USER_DATA, META_DATA = "user-data", "meta-data"


def respond(request: h11.Request, nic: GuestNic) -> HttpAnswer:
    """Answer ``request`` of the VM that owns ``nic``."""
    if request.method not in (b"GET", b"HEAD"):
        return METHOD_NOT_ALLOWED
    target = request.target.partition(b"?")[0]
    target = target[len(found[0]) :] if (found := _AUTHORITY.match(target)) else target
    path = _normalized(target)
    if path is None:
        return _NOT_FOUND
    if path == "/":
        return HttpAnswer(200, b"latest/\n")
    root, _, name = path.removeprefix("/").partition("/")
    if root.lower() != "latest":
        return _NOT_FOUND
    if not name:
        listed = [USER_DATA] if nic.user_data is not None else []
        return HttpAnswer(200, _lines([*listed, f"{META_DATA}/"]))
    first, _, item = name.partition("/")
    if first.lower() == USER_DATA and not item:
        return _NOT_FOUND if nic.user_data is None else HttpAnswer(200, nic.user_data.reveal().encode())
    if first.lower() == META_DATA and not item:
        names = [name for name, text in nic.metadata.items() if text]
        return HttpAnswer(200, _lines(names)) if names else _NOT_FOUND
    text = nic.metadata.get(item if first.lower() == META_DATA else name, "")
    return HttpAnswer(200, text.encode()) if text else _NOT_FOUND


def _normalized(target: bytes) -> str | None:
    """The decoded path of a request target with single slashes and without dot segments; None if it has no such path.

    The path of ``http://host`` without a slash is ``/``. A trailing slash stays. An encoded slash is refused, as by
    Apache: it is part of a name, and no name has one.
    """
    if b"%2f" in target.lower():
        return None
    try:
        path = unquote_to_bytes(target).decode()
    except UnicodeDecodeError:
        return None
    segments: list[str] = []
    parts = path.split("/")
    for part in parts:
        if part == "..":
            if not segments:
                return None  # above the root
            segments.pop()
        elif part not in ("", "."):
            segments.append(part)
    is_directory = parts[-1] in ("", ".", "..")
    return "/" + "/".join(segments) + ("/" if is_directory and segments else "")


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
