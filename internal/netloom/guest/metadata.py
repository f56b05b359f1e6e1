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
    segments = _segments(target)
    if segments is None:
        return _NOT_FOUND
    if segments in ([], [""]):
        return HttpAnswer(200, b"latest/\n")
    root, *rest = segments
    fixed = rest[0].lower() if rest else ""
    if root.lower() != "latest":
        return _NOT_FOUND
    if rest in ([], [""]):
        listed = [USER_DATA] if nic.user_data is not None else []
        return HttpAnswer(200, _lines([*listed, f"{META_DATA}/"]))
    if fixed == USER_DATA and rest[1:] in ([], [""]):
        return _NOT_FOUND if nic.user_data is None else HttpAnswer(200, nic.user_data.reveal().encode())
    if fixed == META_DATA and rest[1:] in ([], [""]):
        names = [name for name, text in nic.metadata.items() if text]
        return HttpAnswer(200, _lines(names)) if names else _NOT_FOUND
    text = nic.metadata.get("/".join(rest[1:] if fixed == META_DATA else rest), "")
    return HttpAnswer(200, text.encode()) if text else _NOT_FOUND


def _segments(target: bytes) -> list[str] | None:
    """The decoded segments of a request's path, without empty and dot segments; None if there is no such path.

    A trailing slash gives an empty last segment. An encoded slash is part of a segment (RFC 3986 section 2.2).
    """
    try:
        parts = [unquote_to_bytes(part).decode() for part in target.split(b"/")]
    except UnicodeDecodeError:
        return None
    segments: list[str] = []
    for part in parts:
        if part == "..":
            if not segments:
                return None  # above the root
            segments.pop()
        elif part not in ("", "."):
            segments.append(part)
    return [*segments, ""] if parts[-1] in ("", ".", "..") else segments


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
