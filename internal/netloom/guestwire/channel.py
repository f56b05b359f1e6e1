"""Messages and descriptors over a unix stream socket.

A frame is a length (4 bytes, big endian) and that many bytes of MessagePack; the descriptors of a message travel with
the first byte of its frame (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

import msgspec

from netloom.guestwire import GuestMessage, LentSockets, ServeNetwork, decode, encode

# A network of some hundred VMs with a megabyte of user data each is the largest honest message.
FRAME_BYTES_MAX = 1 << 30

# What the kernel passes in one message (SCM_MAX_FD, net/scm.h).
DESCRIPTORS_MAX = 253

_LENGTH_BYTES = 4
_RECEIVE_BYTES = 1 << 18


class ChannelError(Exception):
    """The other end is gone, or what came is not ours."""


class Channel:
    """Messages and descriptors over one connected unix stream socket, without ever blocking.

    The owner watches ``fileno()``: ``receive`` when it is readable, ``flush`` when it is writable and ``pending``.
    """

    def __init__(self, sock: socket.socket, *, pending_bytes_max: int = FRAME_BYTES_MAX) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._arrived: deque[int] = deque()
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._out_bytes = 0
        self._out_bytes_max = pending_bytes_max

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._out)

    def receive(self) -> list[tuple[GuestMessage, list[int]]]:
        """The messages that have come, each with its descriptors, which are the caller's from now on.

        Raises ChannelError at the end of the stream, and when something else than our frames comes.
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
            raise ChannelError("descriptors were lost on the way: is the limit of open files reached?")
        if not data:
            raise ChannelError("the other end is gone")
        self._buffer += data
        messages: list[tuple[GuestMessage, list[int]]] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            (length,) = struct.unpack_from(">I", self._buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ChannelError(f"a frame of {length} bytes is not ours")
            if len(self._buffer) - start - _LENGTH_BYTES < length:
                break
            with memoryview(self._buffer) as view, view[start + _LENGTH_BYTES : start + _LENGTH_BYTES + length] as body:
                try:
                    message = decode(body)
                except msgspec.MsgspecError as error:
                    raise ChannelError(f"a message cannot be read: {error}") from None
            start += _LENGTH_BYTES + length
            count = len(message.listeners) if isinstance(message, ServeNetwork | LentSockets) else 0
            if len(self._arrived) < count:
                raise ChannelError(f"{count} descriptors were announced and {len(self._arrived)} came")
            messages.append((message, [self._arrived.popleft() for _ in range(count)]))
        del self._buffer[:start]
        return messages

    def queue(self, message: GuestMessage, descriptors: Sequence[int] = ()) -> None:
        """Say ``message`` as soon as the other end takes it. The descriptors must stay open until then.

        Raises ChannelError when the other end has not read for so long that too much waits.
        """
        body = encode(message)
        frame = memoryview(len(body).to_bytes(_LENGTH_BYTES, "big") + body)
        if self._out and self._out_bytes + len(frame) > self._out_bytes_max:
            raise ChannelError("the other end does not read")
        self._out.append((frame, tuple(descriptors)))
        self._out_bytes += len(frame)

    def flush(self) -> None:
        """Write what the other end takes now. Raises ChannelError when it is gone."""
        while self._out:
            frame, descriptors = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ChannelError(f"the other end is gone: {error.strerror}") from error
            self._out_bytes -= sent
            if sent == len(frame):
                self._out.popleft()
            else:
                self._out[0] = (frame[sent:], ())

    def close(self) -> None:
        """Close the socket, and the descriptors that came and were not handed out."""
        self._sock.close()
        while self._arrived:
            with contextlib.suppress(OSError):
                os.close(self._arrived.popleft())
        self._out.clear()
