"""How a target takes several values from the bytes that a fuzzer gives it. Any bytes are valid."""

from __future__ import annotations

from collections.abc import Iterator

from netloom.frames import frame


class Bytes:
    """Bytes that are taken from the front. What is missing at the end counts as zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """The next byte."""
        return (self.take(1) or b"\0")[0]

    def take(self, length: int) -> bytes:
        """The next bytes, at most ``length``."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def parts(self) -> Iterator[bytes]:
        """The rest as parts, each with its length in two bytes before it."""
        while self._at < len(self._data):
            yield self.take(int.from_bytes(self.take(2), "big"))


def stream(data: Bytes) -> list[bytes]:
    """A stream in pieces. The first byte: the size of the pieces, 0 for one piece; odd: the rest consists of frames.

    Frames are made here, because a fuzzer rarely finds a length of four bytes that fits.
    """
    size = data.number()
    whole = b"".join(map(frame, data.parts())) if size & 1 else data.rest()
    size = size >> 1 or len(whole) or 1
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def as_parts(*bodies: bytes, head: bytes = b"\1") -> bytes:
    """The bytes from which :func:`stream` makes frames of these bodies."""
    return head + b"".join(len(body).to_bytes(2, "big") + body for body in bodies)
