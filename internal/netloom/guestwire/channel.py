"""Messages and descriptors over a unix stream socket.

Each message is one frame (frames.py) of MessagePack. Its descriptors travel with the first byte of the frame
(SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections import deque
from collections.abc import Sequence

import msgspec

from netloom.frames import FRAME_BYTES_MAX, FrameBuffer, FrameTooLong, frame
from netloom.guestwire import GuestMessage, LentSockets, ServeNetwork, decode, encode

# The maximum number of descriptors in one message (SCM_MAX_FD, net/scm.h).
DESCRIPTORS_MAX = 253

_RECEIVE_BYTES = 1 << 18


class ChannelError(Exception):
    """The connection is closed, or the received data is no valid message."""


class Channel:
    """Messages and descriptors over one connected unix stream socket. No method blocks.

    The owner polls ``fileno()``. It calls ``receive`` when the socket is readable, and ``flush`` when the socket is
    writable and ``pending`` is true. ``queue`` fails when more than ``pending_bytes_max`` waits.

    ``message_bytes_max``: of a received message. An attacker may control the guest process.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        pending_bytes_max: int = FRAME_BYTES_MAX,
        message_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames = FrameBuffer(decode, message_bytes_max)
        self._arrived: deque[int] = deque()
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._out_bytes = 0
        self._out_bytes_max = pending_bytes_max

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """Whether messages wait to be written."""
        return bool(self._out)

    def receive(self) -> list[tuple[GuestMessage, list[int]]]:
        """The messages that have arrived, each with its descriptors. The caller has to close the descriptors.

        Raises ChannelError when the other end has closed the connection, and for data that is no valid message.
        """
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _RECEIVE_BYTES, socket.CMSG_SPACE(DESCRIPTORS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise ChannelError(f"the other end is gone: {error.strerror}") from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._arrived.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            raise ChannelError("descriptors were lost: is the limit of open files reached?")
        if not data:
            raise ChannelError("the other end is gone")
        try:
            messages = self._frames.feed(data)
        except FrameTooLong as error:
            raise ChannelError(f"a frame of {error.length} bytes is too long") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # guard: a-message-is-any-bytes
            raise ChannelError(f"a message cannot be read: {error}") from None
        counts = [_descriptors_of(message) for message in messages]
        missing = sum(counts) - len(self._arrived)
        if missing > 0:
            raise ChannelError(f"{sum(counts)} descriptors were announced and {len(self._arrived)} came")
        if -missing > DESCRIPTORS_MAX:  # guard: waiting-descriptors-are-bounded
            raise ChannelError(f"{-missing} descriptors came that no message announces")
        return [
            (message, [self._arrived.popleft() for _ in range(count)])
            for message, count in zip(messages, counts, strict=True)
        ]

    def queue(self, message: GuestMessage, descriptors: Sequence[int] = ()) -> None:
        """Queue ``message`` for ``flush``. The descriptors must stay open until it is written.

        Raises ChannelError when too much waits already, because the other end does not read.
        """
        data = memoryview(frame(encode(message)))
        if self._out and self._out_bytes + len(data) > self._out_bytes_max:
            raise ChannelError("the other end does not read")
        self._out.append((data, tuple(descriptors)))
        self._out_bytes += len(data)

    def flush(self) -> None:
        """Write as much as the socket accepts now. Raises ChannelError when the connection is closed."""
        while self._out:
            data, descriptors = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ChannelError(f"the other end is gone: {error.strerror}") from error
            self._out_bytes -= sent
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], ())

    def close(self) -> None:
        """Close the socket, and the received descriptors that ``receive`` has not returned."""
        self._sock.close()
        while self._arrived:
            with contextlib.suppress(OSError):
                os.close(self._arrived.popleft())
        self._out.clear()


def _descriptors_of(message: GuestMessage) -> int:
    """How many descriptors come with the message."""
    return len(message.listeners) if isinstance(message, ServeNetwork | LentSockets) else 0
