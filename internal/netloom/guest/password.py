"""The virtual router's password protocol, on port 8080: a header ``DomU_Request`` and a word for an answer.

``send_my_password`` is answered by the password, ``saved_password`` means that it has arrived, and from then on both
are answered ``saved_password``. Anything else is ``bad_request``.
"""

from __future__ import annotations

from typing import NamedTuple

import h11

from netloom.guest.http import ONLY_READING, HttpAnswer
from netloom.secret import Secret

_SAVED = HttpAnswer(200, b"saved_password")
_BAD = HttpAnswer(400, b"bad_request")


class PasswordAnswer(NamedTuple):
    """``given``: the password is on its way to the VM. ``taken``: it has arrived; forget it."""

    answer: HttpAnswer
    given: bool = False
    taken: bool = False


def respond(request: h11.Request, password: Secret | None) -> PasswordAnswer:
    """What becomes of ``request`` from the VM whose password, as far as it is not taken yet, is ``password``."""
    if request.method not in (b"GET", b"HEAD"):
        return PasswordAnswer(ONLY_READING)
    words = [value.strip() for name, value in request.headers if name == b"domu_request"]
    if words == [b"send_my_password"]:
        if not password:
            return PasswordAnswer(_SAVED)
        return PasswordAnswer(HttpAnswer(200, password.reveal().encode()), given=request.method == b"GET")
    if words == [b"saved_password"] and request.method == b"GET":
        return PasswordAnswer(_SAVED, taken=True)
    return PasswordAnswer(_BAD)
