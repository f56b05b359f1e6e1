"""Receive netlink's multicast messages: what the kernel reports to those who have joined a group (netlink(7))."""

from __future__ import annotations

import ctypes
import errno
import itertools
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Self

from netloom.agent.kernel import netlink
from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.kernel.netlink import NetlinkError

Filter = tuple[tuple[int, int, int, int], ...]  # linux/filter.h: code, jump if true, jump if false, constant

MARK_AT = 14 if sys.byteorder == "little" else 12  # the upper half of nlmsg_pid, see ``netlink.marked_socket``

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_RECEIVE_BYTES = 256 << 10


class Multicast:
    """A socket in groups of one namespace. ``fileno`` becomes readable when messages have come.

    While it is open, the kernel keeps the namespace, even a deleted one. Only one thread at a time may use it.
    """

    def __init__(
        self, protocol: int, namespace: str | None, groups: Iterable[int], *, what: str, filtered: Filter = ()
    ) -> None:
        """``what``: what is done here, for errors. Raises NamespaceError, NetlinkError, OSError."""
        self._what = what
        self._socket = high_socket(netlink.open_socket(protocol, namespace))
        try:
            self._socket.setblocking(False)
            if filtered:
                attach_filter(self._socket, filtered)
            # An unbound netlink socket has port 0, the kernel's own, and receives no multicast messages.
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop receiving."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor to wait on, for ``loop.add_reader``."""
        return self._socket.fileno()

    def _datagrams(self, at_most: int | None = None) -> Iterator[bytes | None]:
        """The kernel's datagrams that have arrived, oldest first; None where it dropped some. Does not wait.

        Raises NetlinkError.
        """
        for _ in itertools.repeat(None) if at_most is None else range(at_most):
            try:
                data, _, _, sender = self._socket.recvmsg(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno or errno.EIO, self._what) from error
                yield None
                continue
            if sender[0] == 0:
                yield data


def attach_filter(sock: socket.socket, program: Filter) -> None:
    """Make the kernel run the filter on each message, and drop those for which it returns 0."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *it) for it in program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))
