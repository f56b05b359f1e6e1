"""All that ever crosses between the agent and the guest process: tables and sockets down, passwords taken up.

The guest process listens on a unix stream socket that only root may connect to. Whoever connects last is its agent; it
is greeted with ``Hello``, which lists what is served by revision, so that a new agent sends only what differs. Every
``Serve``, ``Update``, ``Drop`` and ``Lend`` is answered by one message of the same ``seq``; when the answer is there,
the change is in force. A frame is a length (4 bytes, big endian) and that many bytes of MessagePack; the descriptors of
a message travel with the first byte of its frame (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

import msgspec

from netloom.secret import Secret, dec_hook, enc_hook

GUEST_PROTOCOL = 1

# A network of some hundred VMs with a megabyte of user data each is the largest honest message.
FRAME_BYTES_MAX = 1 << 30

# What the kernel passes in one message (SCM_MAX_FD, net/scm.h).
DESCRIPTORS_MAX = 253

LEASE_S = 12 * 3600

_LENGTH_BYTES = 4
_RECEIVE_BYTES = 1 << 18


class GuestNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a VM and all that is answered to it.

    ``password_id`` names one setting of the password, never its content: whatever the agent likes, so long as another
    password has another id. An acknowledged id is not served again, whichever table comes, until the table has
    another one.
    """

    nic: str  # the key of the state: nic_uuid, else MAC
    mac: str
    ip: str
    prefix_len: int
    gateway: str = ""
    hostname: str = ""
    default_nic: bool = True  # False: no router, DNS, domain or search option
    dhcp: bool = True  # False: the NIC has metadata but no lease
    options: dict[int, bytes] = {}  # extra DHCP options, by code; see option_bytes. They win over the network's
    user_data: Secret | None = None  # None: there is none (404); empty: there is one, of no bytes
    metadata: dict[str, str] = {}  # name -> text, in the order of the listing
    password: Secret | None = None
    password_id: str = ""


class GuestNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """All that is answered in one network. ``revision`` is the agent's, and only compared for equality."""

    scope_id: str
    network_id: str
    revision: int
    server_ip: str  # the device's own guest address
    dns: tuple[str, ...] = ()  # what VMs are told: the device itself, then the network's resolvers
    domain: str = ""
    search: tuple[str, ...] = ()
    mtu: int = 0  # 0: not told
    lease_s: int = LEASE_S
    nics: tuple[GuestNic, ...] = ()


ListenerKind = Literal["dhcp", "metadata", "password"]


class Listener(msgspec.Struct, frozen=True):
    """What one descriptor is for.

    ``macs_checked``: the namespace's own rules drop what comes for this socket with another MAC than that of the
    address's owner, so the guest process need not look (see ``guest/peer.py``).
    """

    kind: ListenerKind
    macs_checked: bool = False


# ---- agent to guest


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """Answer in this network through these sockets, one descriptor per listener, in order.

    Sockets that the network had before are closed; connections that are open go on.
    """

    seq: int
    network: GuestNetwork
    listeners: tuple[Listener, ...]


class Update(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """Answer from this table from now on, through the sockets that are there."""

    seq: int
    network: GuestNetwork


class Drop(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """The network is gone: close everything of it. What is not there is dropped successfully."""

    seq: int
    scope_id: str
    network_id: str


class Lend(msgspec.Struct, frozen=True, kw_only=True, tag="lend"):
    """Hand me copies of the network's sockets and go on serving.

    With them a new agent can give the same sockets, and what waits in them, to the next guest process.
    """

    seq: int
    scope_id: str
    network_id: str


class Try(msgspec.Struct, frozen=True, kw_only=True, tag="try"):
    """Try to do what a taken-over guest process would; refused unless the process was started for it."""

    seq: int


# ---- guest to agent


class Served(msgspec.Struct, frozen=True):
    """One network that the guest process answers in."""

    scope_id: str
    network_id: str
    revision: int
    listeners: tuple[Listener, ...]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Who serves what. ``layers`` names the walls around the process that this kernel has (guest/sandbox.py)."""

    version: str
    build: str
    pid: int
    protocol: int = GUEST_PROTOCOL
    layers: tuple[str, ...] = ()
    served: tuple[Served, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The message of that number is in force, or ``error`` says why not."""

    seq: int
    error: str = ""


class Lent(msgspec.Struct, frozen=True, kw_only=True, tag="lent"):
    """The answer to ``Lend``: one descriptor per listener, in order; none when the network is not served."""

    seq: int
    listeners: tuple[Listener, ...] = ()


class PasswordTaken(msgspec.Struct, frozen=True, kw_only=True, tag="taken"):
    """A VM acknowledged its password: erase it. Said again to every new agent until a table comes without that id."""

    scope_id: str
    network_id: str
    nic: str
    password_id: str


class Notice(msgspec.Struct, frozen=True, kw_only=True, tag="notice"):
    """Something for the agent's log: one line, made by us, never a tenant's text."""

    scope_id: str
    network_id: str
    nic: str
    text: str


class Tried(msgspec.Struct, frozen=True, kw_only=True, tag="tried"):
    """What each attempt of ``Try`` came to: the errno's name, or ``possible``."""

    seq: int
    outcomes: dict[str, str]


Message = Serve | Update | Drop | Lend | Try | Hello | Done | Lent | PasswordTaken | Notice | Tried

_encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=dec_hook)


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

    def receive(self) -> list[tuple[Message, list[int]]]:
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
        messages: list[tuple[Message, list[int]]] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            (length,) = struct.unpack_from(">I", self._buffer, start)
            if length > FRAME_BYTES_MAX:
                raise ChannelError(f"a frame of {length} bytes is not ours")
            if len(self._buffer) - start - _LENGTH_BYTES < length:
                break
            with memoryview(self._buffer) as view, view[start + _LENGTH_BYTES : start + _LENGTH_BYTES + length] as body:
                try:
                    message = _decoder.decode(body)
                except msgspec.MsgspecError as error:
                    raise ChannelError(f"a message cannot be read: {error}") from None
            start += _LENGTH_BYTES + length
            count = len(message.listeners) if isinstance(message, Serve | Lent) else 0
            if len(self._arrived) < count:
                raise ChannelError(f"{count} descriptors were announced and {len(self._arrived)} came")
            messages.append((message, [self._arrived.popleft() for _ in range(count)]))
        del self._buffer[:start]
        return messages

    def queue(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Say ``message`` as soon as the other end takes it. The descriptors must stay open until then.

        Raises ChannelError when the other end has not read for so long that too much waits.
        """
        body = _encoder.encode(message)
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


# ---- values of DHCP options

_ADDRESSES = {3, 4, 5, 6, 7, 8, 9, 10, 11, 33, 41, 42, 44, 45, 48, 49, 65, *range(68, 77), 150}
_ADDRESS = {1, 16, 28, 32}
_U8 = {19, 20, 23, 27, 29, 30, 31, 34, 36, 37, 39, 46, 116}
_U16 = {13, 22, 26}
_U32 = {2, 24, 35, 38}
_TEXT = {12, 14, 15, 17, 18, 40, 47, 60, 62, 64, 66, 67, 100, 101, 114, 252}
_ROUTES = {121, 249}
_SEARCH = 119
# Pad, end, and what belongs to the exchange itself; a lease time from elsewhere could make the lease infinite.
_OURS = {0, 255, *range(50, 60), 61, 80, 82}


def option_bytes(code: int, text: str) -> bytes:
    """The value of DHCP option ``code`` that a person wrote as ``text``.

    Types as in RFC 2132, 3397 (119), 3442 (121: ``10.0.0.0/8 via 10.1.1.1, ...``) and 2563 (116). ``0x...`` is taken as
    bytes for every code; codes without a type here are addresses when the text is a list of them, else text.
    Raises ValueError, with the reason, when the text is no such value or the code is not the caller's to set.
    """
    if not 0 < code < 255 or code in _OURS:
        raise ValueError(f"option {code} is not one that can be set")
    text = text.strip()
    value = _option_value(code, text)
    if not value:
        raise ValueError(f"option {code}: no value")
    return value


def _option_value(code: int, text: str) -> bytes:
    if text[:2].lower() == "0x":
        return bytes.fromhex(text[2:].replace(":", ""))
    if code in _TEXT:
        return text.encode()
    items = [item.strip() for item in text.split(",")]
    if code in _ADDRESSES:
        return b"".join(IPv4Address(item).packed for item in items)
    if code in _ADDRESS:
        return IPv4Address(text).packed
    for codes, size in ((_U8, 1), (_U16, 2), (_U32, 4)):
        if code in codes:
            return _number(code, text, size)
    if code == 25:
        return b"".join(_number(code, item, 2) for item in items)
    if code == _SEARCH:
        return b"".join(domain_bytes(item) for item in items)
    if code in _ROUTES:
        return b"".join(_route(item) for item in items)
    try:
        return b"".join(IPv4Address(item).packed for item in items)
    except ValueError:
        return text.encode()


def _number(code: int, text: str, size: int) -> bytes:
    words = {"true": 1, "false": 0}
    number = words[text.lower()] if size == 1 and text.lower() in words else int(text)
    try:
        return number.to_bytes(size, "big", signed=code == 2)
    except OverflowError:
        raise ValueError(f"option {code}: {number} does not fit in {size} bytes") from None


def _route(text: str) -> bytes:
    prefix, _, router = text.partition(" via ")
    network = IPv4Network(prefix.strip())
    return (
        bytes([network.prefixlen])
        + network.network_address.packed[: (network.prefixlen + 7) // 8]
        + IPv4Address(router.strip()).packed
    )


def domain_bytes(name: str) -> bytes:
    """A domain name as DNS writes it, uncompressed. Raises ValueError for what is none."""
    labels = [label.encode("ascii") for label in name.rstrip(".").split(".")]
    if any(not 0 < len(label) < 64 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise ValueError(f"{name!r} is not a domain name")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
