"""A text value that logs, messages and tracebacks do not show."""

from __future__ import annotations

import hmac


class Secret:
    """Text that prints as ``***``: a password, a key, a VM's user data.

    ``str``, ``repr``, format strings and the locals of a traceback do not show it. Only :meth:`reveal` returns it;
    search for that name to see where secrets are used. Two secrets are equal if their texts are equal.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __len__(self) -> int:
        return len(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a secret is not pickled")


def enc_hook(value: object) -> object:
    """Encode a Secret as its text. For the msgspec encoder of state files only, where secrets are stored."""
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(f"{type(value).__name__} is not encoded")


def dec_hook(shape: type, value: object) -> object:
    """Decode what :func:`enc_hook` has encoded. The ValueError that it raises does not contain the value."""
    if shape is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError("not a secret's text")
