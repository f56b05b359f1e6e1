"""Frames on a stream: a length (4 bytes, big endian) and that many bytes. wire and guestwire both use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

M = TypeVar("M")

# The largest legitimate messages carry the user data of hundreds of VMs, a megabyte each: a restore of a network, and
# the table of a network for the guest process.
FRAME_BYTES_MAX = 1 << 30

_LENGTH_BYTES = 4
_QUOTED_BYTES = 60


class FrameTooLong(Exception):
    """A frame claims more than the reader's limit. ``start`` has the first 60 bytes."""

    def __init__(self, length: int, start: bytes) -> None:
        super().__init__(f"a frame of {length} bytes")
        self.length = length
        self.start = start


def frame(body: bytes) -> bytes:
    """The frame of ``body``."""
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameBuffer(Generic[M]):
    """Assembles frames from pieces of any size, and decodes the body of each.

    ``limit``: the largest body in bytes. A frame that claims more is refused by its length, before its body arrives.
    """

    def __init__(self, decode: Callable[[memoryview], M], limit: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._decode = decode
        self._limit = limit

    def feed(self, data: bytes) -> list[M]:
        """The messages that are complete with ``data``. Raises FrameTooLong, and what ``decode`` raises."""
        self._buffer += data
        messages: list[M] = []
        start, size = 0, len(self._buffer)
        try:
            while size - start >= _LENGTH_BYTES:
                body_start = start + _LENGTH_BYTES
                length = int.from_bytes(self._buffer[start:body_start], "big")
                if length > self._limit:  # guard: a-frame-is-bounded
                    raise FrameTooLong(length, bytes(self._buffer[start : start + _QUOTED_BYTES]))
                end = body_start + length
                if size < end:
                    break
                # A view, not a copy: a body can have many megabytes.
                with memoryview(self._buffer) as view, view[body_start:end] as body:
                    messages.append(self._decode(body))
                start = end
        finally:
            del self._buffer[:start]
        return messages
