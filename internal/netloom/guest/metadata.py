"""The metadata service, with the paths of CloudStack's virtual router, on port 80 of the network's own address.

    /latest/user-data          the user data of the VM
    /latest/meta-data/         the names of the items, one on each line
    /latest/meta-data/<item>   the text of an item
    /latest/<item>             the same; older clients use it

As on the virtual router, an item with an empty text is not listed and gets status 404. The names are keys of a
dictionary and never file paths, so ``..`` has no meaning. The dictionary has no passwords.
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
    try:
        path = unquote_to_bytes(target).decode()
    except UnicodeDecodeError:
        return _NOT_FOUND
    if path in ("", "/"):
        return HttpAnswer(200, b"latest/\n")
    if path in ("/latest", "/latest/"):
        listed = [USER_DATA] if nic.user_data is not None else []
        return HttpAnswer(200, _lines([*listed, f"{META_DATA}/"]))
    if not path.startswith("/latest/"):
        return _NOT_FOUND
    name = path.removeprefix("/latest/")
    if name == USER_DATA:
        return _NOT_FOUND if nic.user_data is None else HttpAnswer(200, nic.user_data.reveal().encode())
    if name in (META_DATA, f"{META_DATA}/"):
        names = [name for name, text in nic.metadata.items() if text]
        return HttpAnswer(200, _lines(names)) if names else _NOT_FOUND
    text = nic.metadata.get(name.removeprefix(f"{META_DATA}/"), "")
    return HttpAnswer(200, text.encode()) if text else _NOT_FOUND


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
