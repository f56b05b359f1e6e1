"""Metadata as CloudStack's virtual router serves it, from port 80 of the network's own address.

``/latest/user-data``; ``/latest/meta-data/``, the names one a line; ``/latest/meta-data/<item>`` and the older
``/latest/<item>``. An item without text is neither listed nor there, as on the virtual router. Names are keys of a
dictionary, never paths, so there is nothing to climb out of; passwords are in no such dictionary.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import h11

from netloom.guest.http import ONLY_READING, HttpAnswer
from netloom.guestwire import GuestNic

_NOT_THERE = HttpAnswer(404)
_AUTHORITY = re.compile(rb"https?://[^/]*", re.IGNORECASE)

USER_DATA, META_DATA = "user-data", "meta-data"


def respond(request: h11.Request, nic: GuestNic) -> HttpAnswer:
    """The answer to ``request`` from the VM that owns ``nic``."""
    if request.method not in (b"GET", b"HEAD"):
        return ONLY_READING
    target = request.target.partition(b"?")[0]
    target = target[len(found[0]) :] if (found := _AUTHORITY.match(target)) else target
    try:
        path = unquote_to_bytes(target).decode()
    except UnicodeDecodeError:
        return _NOT_THERE
    if path in ("", "/"):
        return HttpAnswer(200, b"latest/\n")
    if path in ("/latest", "/latest/"):
        listed = [USER_DATA] if nic.user_data is not None else []
        return HttpAnswer(200, _lines([*listed, f"{META_DATA}/"]))
    if not path.startswith("/latest/"):
        return _NOT_THERE
    name = path.removeprefix("/latest/")
    if name == USER_DATA:
        return _NOT_THERE if nic.user_data is None else HttpAnswer(200, nic.user_data.reveal().encode())
    if name in (META_DATA, f"{META_DATA}/"):
        names = [name for name, text in nic.metadata.items() if text]
        return HttpAnswer(200, _lines(names)) if names else _NOT_THERE
    text = nic.metadata.get(name.removeprefix(f"{META_DATA}/"), "")
    return HttpAnswer(200, text.encode()) if text else _NOT_THERE


def _lines(names: list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()
