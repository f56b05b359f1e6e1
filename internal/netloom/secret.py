"""A value that is counted, not quoted."""

from __future__ import annotations

import hmac


class Secret:
    """Text that prints as ``***``: a password, a key, a VM's user data.

    Neither ``str``, ``repr``, a format string nor a traceback's locals show it; :meth:`reveal` does, and is
    the word to look for when one asks where secrets go. Two secrets are equal when their texts are.
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
    """For msgspec encoders of the state file, the one place where secrets are written: the text itself."""
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(f"{type(value).__name__} is not encoded")


def dec_hook(shape: type, value: object) -> object:
    """For msgspec decoders of what :func:`enc_hook` wrote. Raises ValueError without quoting."""
    if shape is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError("not a secret's text")
