"""Netlink: encode and decode messages, and a socket that sends many requests in one datagram.

Formats: linux/netlink.h, RFC 3549. A message is a header of 16 bytes, a fixed part that depends on its type, and
attributes: length, type and value, padded to 4 bytes; a value may itself consist of attributes. Numbers are in the
host's byte order unless a family says otherwise. Encoding and decoding are pure functions.
"""

from __future__ import annotations

import errno as errnos
import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from netloom.agent.kernel.namespaces import inside
from netloom.errors import HostRefused

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK = 0x1, 0x2, 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 1, 2, 3, 4
_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 16, 17

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200  # on NLMSG_ERROR and NLMSG_DONE
_NLMSGERR_ATTR_MSG, _NLMSGERR_ATTR_OFFS, _NLMSGERR_ATTR_MISS_TYPE = 1, 2, 5

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11

# Not in the socket module of Python 3.11.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

_HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")
_BATCH = struct.Struct(">BBH")  # nfgenmsg: family, version, subsystem

_ERRNO_MAX = 4095  # linux/err.h

_BUFFER_BYTES = 4 << 20
# The kernel drops acknowledgements that do not fit into the receive buffer; it accounts less than 2 KiB for each.
_MESSAGES_PER_DATAGRAM = _BUFFER_BYTES // 2048
_DATAGRAM_BYTES_MAX = 256 << 10
_RECEIVE_BYTES = 256 << 10
# The kernel answers during the send call, so waiting this long means that the answer was lost.
_ANSWER_S_MAX = 10
_DUMP_TRIES = 50

ALREADY_THERE = frozenset({errnos.EEXIST})
# In this order: no such link; no such rule, table or entry; no such route; no such address.
ALREADY_GONE = frozenset({errnos.ENODEV, errnos.ENOENT, errnos.ESRCH, errnos.EADDRNOTAVAIL})


class NetlinkError(HostRefused):
    """The kernel refused a request, or its answer cannot be decoded.

    ``errno`` is the kernel's, ``what`` describes the request, ``ext_ack`` is the kernel's message, if any.
    """

    def __init__(self, errno: int, what: str, ext_ack: str = "") -> None:
        text = f"{what}: {os.strerror(errno)}"
        super().__init__(f"{text}: {ext_ack}" if ext_ack else text)
        self.errno = errno
        self.what = what
        self.ext_ack = ext_ack


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message; for a request also how to report and to judge its result.

    ``payload`` is the fixed part and the attributes. ``what`` describes the request in errors. ``harmless`` error
    numbers count as success. ``links``: offsets in the payload, each for the index (32 bits) of the link of that name;
    the sender fills them in. ``then``: messages to send right after this one.
    """

    type: int
    flags: int = 0
    payload: bytes = b""
    sequence: int = 0
    what: str = ""
    harmless: frozenset[int] = frozenset()
    links: tuple[tuple[int, str], ...] = ()
    then: tuple[Message, ...] = ()

    def even_if(self, *errors: int) -> Message:
        """The same request, but these error numbers count as success."""
        return replace(self, harmless=self.harmless | frozenset(errors))

    def even_if_there(self) -> Message:
        """The same request, but an object that exists already counts as success."""
        return self.even_if(*ALREADY_THERE)

    def even_if_gone(self) -> Message:
        """The same request, but an object that does not exist counts as success."""
        return self.even_if(*ALREADY_GONE)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. ``errno`` 0 is success. ``data``: the messages before the acknowledgement."""

    errno: int
    ext_ack: str = ""
    data: list[Message] = field(default_factory=list)


# Encoding


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute with its padding. ValueError when the value is longer than 65,531 bytes."""
    length = len(value) + 4
    if length > 0xFFFF:
        raise ValueError(f"netlink attribute {kind}: {len(value)} bytes do not fit")
    return ATTRIBUTE.pack(length, kind) + value + b"\0" * (-length & 3)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute whose value is encoded attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def u8(kind: int, value: int) -> bytes:
    """One byte."""
    return attribute(kind, value.to_bytes(1, sys.byteorder))


def u16(kind: int, value: int) -> bytes:
    """A number of 16 bits in the host's byte order."""
    return attribute(kind, value.to_bytes(2, sys.byteorder))


def u32(kind: int, value: int) -> bytes:
    """A number of 32 bits in the host's byte order."""
    return attribute(kind, value.to_bytes(4, sys.byteorder))


def be16(kind: int, value: int) -> bytes:
    """A number of 16 bits, big endian."""
    return attribute(kind, value.to_bytes(2, "big"))


def be32(kind: int, value: int) -> bytes:
    """A number of 32 bits, big endian."""
    return attribute(kind, value.to_bytes(4, "big"))


def text(kind: int, value: str) -> bytes:
    """A string attribute with the zero byte that the kernel expects at the end."""
    return attribute(kind, value.encode() + b"\0")


def encode(message: Message) -> bytes:
    """A message with its header and padding, without ``then``."""
    length = _HEADER.size + len(message.payload)
    header = _HEADER.pack(length, message.type, message.flags, message.sequence, 0)
    return header + message.payload + b"\0" * (-length & 3)


# Decoding


def decode(data: bytes | memoryview) -> list[Message]:
    """The messages of one datagram.

    Raises NetlinkError (EBADMSG) when a length exceeds the data.
    """
    return [
        Message(kind, flags, bytes(data[start:end]), sequence) for kind, flags, sequence, start, end in _messages(data)
    ]


def kind_of(data: bytes) -> int:
    """The type of the first message of a datagram; 0 if it is cut short."""
    return int(_HEADER.unpack_from(data)[1]) if len(data) >= _HEADER.size else 0


def attributes(data: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """The attributes from ``offset`` on, in order; types without their flag bits.

    Raises NetlinkError (EBADMSG) when a length exceeds the data.
    """
    found = []
    end = len(data)
    while offset < end:
        if end - offset < 4:
            raise NetlinkError(errnos.EBADMSG, "netlink attribute", "cut short")
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            raise NetlinkError(errnos.EBADMSG, f"netlink attribute {kind & NLA_TYPE_MASK}", f"length {length}")
        found.append((kind & NLA_TYPE_MASK, data[offset + 4 : offset + length]))
        offset += (length + 3) & ~3
    return found


def attribute_map(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes from ``offset`` on by type. Of repeated ones the last counts, as in the kernel's own parser.

    Raises NetlinkError (EBADMSG) like :func:`attributes`.
    """
    return dict(attributes(data, offset))


def number(value: bytes | None, default: int = 0) -> int:
    """An attribute's value as an unsigned number in the host's byte order."""
    return default if value is None else int.from_bytes(value, sys.byteorder)


def string(value: bytes | None) -> str:
    """An attribute's value as text, without the zero byte at its end. Bytes that are not UTF-8 are escaped."""
    return "" if value is None else value.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def decode_error(payload: bytes, flags: int) -> tuple[int, str]:
    """The error number (0: success) and the kernel's message in an NLMSG_DONE.

    Raises NetlinkError (EBADMSG) when it cannot be decoded.
    """
    if len(payload) < 4:
        raise NetlinkError(errnos.EBADMSG, "netlink acknowledgement", "cut short")
    code = _error_number(payload)
    return code, _ext_ack(payload[4:]) if flags & _NLM_F_ACK_TLVS else ""


def _decode_acknowledgement(payload: bytes, flags: int) -> tuple[int, str]:
    """As decode_error for an NLMSG_ERROR, which quotes the request's header, or the whole request if not capped."""
    if len(payload) < 4 + _HEADER.size:
        raise NetlinkError(errnos.EBADMSG, "netlink acknowledgement", "cut short")
    code = _error_number(payload)
    if not flags & _NLM_F_ACK_TLVS:
        return code, ""
    quoted = _HEADER.size
    if code and not flags & _NLM_F_CAPPED:
        quoted = max(quoted, (_HEADER.unpack_from(payload, 4)[0] + 3) & ~3)
    return code, _ext_ack(payload[4 + quoted :])


def _error_number(payload: bytes) -> int:
    code = -int(_ERROR.unpack_from(payload)[0])
    if not 0 <= code <= _ERRNO_MAX:  # guard: an-error-number-is-a-number-of-the-kernels
        raise NetlinkError(errnos.EBADMSG, "netlink acknowledgement", f"error number {code}")
    return code


def _ext_ack(data: bytes) -> str:
    values = attribute_map(data)
    words = [string(values[_NLMSGERR_ATTR_MSG])] if _NLMSGERR_ATTR_MSG in values else []
    if _NLMSGERR_ATTR_MISS_TYPE in values:
        words.append(f"attribute {number(values[_NLMSGERR_ATTR_MISS_TYPE])} is missing")
    if not words and _NLMSGERR_ATTR_OFFS in values:
        words.append(f"byte {number(values[_NLMSGERR_ATTR_OFFS])} of the request")
    return ", ".join(words)


def _messages(data: bytes | memoryview) -> Iterable[tuple[int, int, int, int, int]]:
    offset, end = 0, len(data)
    while offset < end:
        if end - offset < _HEADER.size:
            raise NetlinkError(errnos.EBADMSG, "netlink message", "cut short")
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > end:
            raise NetlinkError(errnos.EBADMSG, f"netlink message of type {kind}", f"length {length}")
        yield kind, flags, sequence, offset + _HEADER.size, offset + length
        offset += (length + 3) & ~3


# The upper halves of the addresses of sockets whose changes are told apart from all others, see ``marked_socket``.
# Process numbers are below 1 << 22, and the addresses that the kernel chooses are above 1 << 31.
OF_CONNECTIONS, OF_LEASES = 0x4E4C, 0x4E4D
_ports = itertools.count(os.getpid() * 31)


def open_socket(protocol: int, namespace: str | None) -> socket.socket:
    """Open a netlink socket in a namespace, with large buffers. Raises NamespaceError, OSError."""
    with inside(namespace):
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        for option, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                made.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
            except PermissionError:  # in a container: as much as is allowed
                made.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_BYTES)
    except BaseException:
        made.close()
        raise
    return made


class Socket:
    """A netlink socket of one namespace. Any thread may use it, one at a time.

    While it is open, the kernel keeps the namespace, even a deleted one.
    """

    def __init__(self, protocol: int, namespace: str | None = None, *, port: int = 0) -> None:
        """``port``: the address of the socket, which is in the kernel's reports of its changes; 0: any free one.

        Raises NamespaceError when the namespace does not exist, OSError when the kernel lacks the protocol, or the port
        is in use in the namespace.
        """
        self._socket = open_socket(protocol, namespace)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _ANSWER_S_MAX, 0))
            self._socket.bind((port, 0))
            booked = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        except BaseException:
            self._socket.close()
            raise
        self._messages_max = max(1, min(_MESSAGES_PER_DATAGRAM, booked // 4096))
        self._sequence = 0
        self._buffer = bytearray(_RECEIVE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def request(self, messages: Sequence[Message]) -> list[Message]:
        """Send the messages in one datagram; return all data of the answers, in the order of the requests.

        Except in nf_tables, the kernel processes each message on its own: a failed one does not affect the others. A
        message with ``NLM_F_DUMP`` must be the only one.

        Raises NetlinkError for the first message that failed with an error that is not harmless.
        """
        answers = self.exchange(messages)
        for message, answer in zip(messages, answers, strict=True):
            if answer.errno and answer.errno not in message.harmless:
                raise NetlinkError(answer.errno, message.what or f"netlink request {message.type}", answer.ext_ack)
        return [data for answer in answers for data in answer.data]

    def failures(self, messages: Sequence[Message]) -> dict[int, int]:
        """Send the messages; return the error number of each that failed, by its place in ``messages``.

        Much cheaper than :meth:`exchange`: only failures and the last message of a datagram are acknowledged. The order
        is kept, and each message is processed on its own.

        Raises NetlinkError when the kernel cannot be asked.
        """
        failed: dict[int, int] = {}
        for begin in range(0, len(messages), self._messages_max):
            part = messages[begin : begin + self._messages_max]
            first = self._sequence + 1
            self._sequence = (self._sequence + len(part)) % 0x40000000
            last = len(part) - 1
            batch = []
            for at, it in enumerate(part):
                payload = it.payload
                flags = it.flags | NLM_F_REQUEST | (NLM_F_ACK if at == last else 0)
                batch.append(_HEADER.pack(_HEADER.size + len(payload), it.type, flags, first + at, 0))
                batch.append(payload + b"\0" * (-len(payload) & 3))
            self._send(b"".join(batch))
            answered = False
            while not answered:
                for kind, flags, sequence, start, end in _messages(received := self._receive()):
                    at = sequence - first
                    if kind != NLMSG_ERROR or not 0 <= at <= last:
                        continue  # the late answer to an earlier request
                    code, _ = _decode_acknowledgement(bytes(received[start:end]), flags)
                    if code:
                        failed[begin + at] = code
                    answered = answered or at == last
        return failed

    def transaction(self, subsystem: int, messages: Sequence[Message]) -> None:
        """Send the messages as one transaction of nfnetlink: all of them take effect, or none. Not for long ones.

        Raises NetlinkError for the first message that was refused.
        """
        if not messages:
            return
        first = self._sequence + 1
        last = len(messages)  # the begin has the place 0
        self._sequence = (self._sequence + last + 2) % 0x40000000
        head = _BATCH.pack(0, 0, subsystem)
        framed = [Message(_NFNL_MSG_BATCH_BEGIN, payload=head), *messages, Message(_NFNL_MSG_BATCH_END, payload=head)]
        batch = []
        for at, it in enumerate(framed):
            # A refusal is reported in any case, and before this acknowledgement. Not that of the end: before Linux 6.10
            # the begin and the end of a transaction are not acknowledged.
            flags = it.flags | NLM_F_REQUEST | (NLM_F_ACK if at == last else 0)
            batch.append(_HEADER.pack(_HEADER.size + len(it.payload), it.type, flags, first + at, 0))
            batch.append(it.payload + b"\0" * (-len(it.payload) & 3))
        self._send(b"".join(batch))
        while True:
            for kind, flags, sequence, start, end in _messages(received := self._receive()):
                at = sequence - first
                if kind != NLMSG_ERROR or not 0 <= at < len(framed):
                    continue  # the late answer to an earlier request
                code, words = _decode_acknowledgement(bytes(received[start:end]), flags)
                if code:  # that of the first message: the transaction as a whole was refused
                    raise NetlinkError(code, framed[at].what or framed[1].what, words)
                if at == last:
                    return

    def exchange(self, messages: Sequence[Message]) -> list[Answer]:
        """As :meth:`request`, but return an answer per message instead of raising an error."""
        if any(message.flags & NLM_F_DUMP == NLM_F_DUMP for message in messages):
            if len(messages) != 1:
                raise ValueError("a socket carries out one dump at a time")
            dumped = self.dump(messages[0])
            return [Answer(0, "", [Message(kind, 0, payload) for kind, payload in dumped])]
        answers: list[Answer] = []
        batch: list[bytes] = []
        size = 0
        for message in messages:
            flags = message.flags | NLM_F_REQUEST | NLM_F_ACK
            encoded = encode(replace(message, flags=flags, sequence=self._sequence + 1 + len(batch)))
            if len(batch) == self._messages_max or (batch and size + len(encoded) > _DATAGRAM_BYTES_MAX):
                answers += self._exchange(batch)
                batch, size = [], 0
                encoded = encode(replace(message, flags=flags, sequence=self._sequence + 1))
            batch.append(encoded)
            size += len(encoded)
        return answers + self._exchange(batch) if batch else answers

    def _exchange(self, batch: list[bytes]) -> list[Answer]:
        """Send messages that are numbered from the next sequence number on; wait for all acknowledgements."""
        first = self._sequence + 1
        self._sequence = (self._sequence + len(batch)) % 0x40000000
        self._send(b"".join(batch))
        data: list[list[Message]] = [[] for _ in batch]
        answers: list[Answer | None] = [None] * len(batch)
        missing = len(batch)
        while missing:
            for message in decode(self._receive()):
                at = message.sequence - first
                if not 0 <= at < len(batch) or answers[at] is not None:
                    continue  # the late answer to an earlier request
                if message.type == NLMSG_ERROR:
                    code, words = _decode_acknowledgement(message.payload, message.flags)
                    answers[at] = Answer(code, words, data[at])
                    missing -= 1
                elif message.type not in (NLMSG_NOOP, NLMSG_DONE):
                    data[at].append(message)
        return [answer for answer in answers if answer is not None]

    def dump(self, message: Message) -> list[tuple[int, bytes]]:
        """Types and payloads of the messages that the kernel lists for ``message``, as one consistent listing.

        If the objects changed during the listing (NLM_F_DUMP_INTR), it is requested again.

        Raises NetlinkError: refused, or interrupted by changes fifty times (EINTR).
        """
        what = message.what or f"netlink dump {message.type}"
        for _ in range(_DUMP_TRIES):
            found = self._dump_once(message, what)
            if found is not None:
                return found
        raise NetlinkError(errnos.EINTR, what, "the objects kept changing while they were listed")

    def _dump_once(self, message: Message, what: str) -> list[tuple[int, bytes]] | None:
        self._sequence = sequence = (self._sequence + 1) % 0x40000000
        self._send(encode(replace(message, flags=message.flags | NLM_F_REQUEST | NLM_F_DUMP, sequence=sequence)))
        found: list[tuple[int, bytes]] = []
        disturbed = False
        while True:
            try:
                data = bytes(self._receive())
            except NetlinkError as error:
                if error.errno != errnos.ENOBUFS:
                    raise
                disturbed = True  # messages were dropped: read to the end, then request again
                continue
            for kind, flags, number_of, start, end in _messages(data):
                if number_of != sequence:
                    continue
                disturbed = disturbed or bool(flags & NLM_F_DUMP_INTR)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    decoder = decode_error if kind == NLMSG_DONE else _decode_acknowledgement
                    # Old kernels and some families end a complete listing with a DONE that has no error number.
                    code, words = decoder(data[start:end], flags) if end - start >= 4 else (0, "")
                    if code and code not in message.harmless:
                        raise NetlinkError(code, what, words)
                    return None if disturbed else found
                if kind != NLMSG_NOOP:
                    found.append((kind, data[start:end]))

    def _send(self, datagram: bytes) -> None:
        try:
            self._socket.sendto(datagram, (0, 0))
        except OSError as error:
            raise NetlinkError(error.errno or errnos.EIO, "send to netlink") from error

    def _receive(self) -> memoryview:
        while True:
            try:
                length, _, flags, sender = self._socket.recvmsg_into([self._buffer])
            except BlockingIOError as error:
                raise NetlinkError(errnos.ETIMEDOUT, "wait for netlink") from error
            except OSError as error:
                raise NetlinkError(error.errno or errnos.EIO, "receive from netlink") from error
            if sender[0] != 0:
                continue  # from another process, not from the kernel
            if flags & socket.MSG_TRUNC:
                raise NetlinkError(errnos.EMSGSIZE, "receive from netlink")
            return memoryview(self._buffer)[:length]


def marked_socket(protocol: int, namespace: str | None, mark: int) -> Socket:
    """A socket whose changes can be told apart: ``mark`` is the upper half of its address, which is in all reports.

    Raises NamespaceError, OSError.
    """
    while True:
        try:
            return Socket(protocol, namespace, port=mark << 16 | next(_ports) & 0xFFFF)
        except OSError as error:
            if error.errno != errnos.EADDRINUSE:
                raise
