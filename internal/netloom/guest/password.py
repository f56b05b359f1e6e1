"""The password service, with the protocol of CloudStack's virtual router, on port 8080.

The VM sends a header ``DomU_Request``. ``send_my_password`` is answered with the password. With ``saved_password`` the
VM acknowledges that it has set the password; from then on both requests are answered ``saved_password``. Any other
value, or several headers, are answered ``bad_request``.
"""

from __future__ import annotations

from typing import NamedTuple

import h11

from netloom.guest.http import METHOD_NOT_ALLOWED, HttpAnswer
from netloom.secret import Secret

_SAVED = HttpAnswer(200, b"saved_password")
_BAD_REQUEST = HttpAnswer(400, b"bad_request")


class PasswordAnswer(NamedTuple):
    """``given``: the answer contains the password. ``taken``: the VM acknowledges the password, so it can be erased."""

    answer: HttpAnswer
    given: bool = False
    taken: bool = False


def respond(request: h11.Request, password: Secret | None) -> PasswordAnswer:
    """Answer ``request`` of a VM. ``password`` is None when the VM has none, or has acknowledged it already."""
    if request.method not in (b"GET", b"HEAD"):
        return PasswordAnswer(METHOD_NOT_ALLOWED)
    words = [value.strip() for name, value in request.headers if name == b"domu_request"]
    if words == [b"send_my_password"]:
        if not password:
            return PasswordAnswer(_SAVED)
        return PasswordAnswer(HttpAnswer(200, password.reveal().encode()), given=request.method == b"GET")
    if words == [b"saved_password"] and request.method == b"GET":
        return PasswordAnswer(_SAVED, taken=True)
    return PasswordAnswer(_BAD_REQUEST)
