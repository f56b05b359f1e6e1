"""The messages between the agent and the guest process, and the values of DHCP options.

The guest process listens on a unix stream socket that only root may connect to. The latest connection is the agent's;
an earlier one is closed. The guest process first sends ``GuestHello`` with the networks that it serves and their
revisions, so a new agent sends only the differences.

The agent sends requests: ``ServeNetwork``, ``UpdateNetwork``, ``DropNetwork``, ``LendSockets`` and ``Ping``. Each is
answered by ``Ack`` or ``LentSockets`` with the same ``seq``, after the change is in force. ``PasswordTaken`` and
``Notice`` come at any time. ``channel`` carries the messages.

An agent and a guest process of different builds talk to each other during an upgrade. So the tags and the names of the
fields stay as they are.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Literal

import msgspec

from netloom.secret import Secret, dec_hook, enc_hook

GUEST_PROTOCOL = 2

LEASE_S = 12 * 3600


class GuestNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a VM, and the data that the guest process answers with.

    ``password_id`` identifies the password without revealing it; a new password has a new id. A password that the VM
    has acknowledged is not sent again until a table has another id.
    """

    nic: str  # the key of the NIC in the scope's state: its UUID, or its MAC address if it has no UUID
    mac: str
    ip: str
    prefix_len: int
    gateway: str = ""
    hostname: str = ""
    default_nic: bool = True  # False: no router, DNS, domain or search option
    dhcp: bool = True  # False: the NIC has metadata but no lease
    options: dict[int, bytes] = {}  # extra DHCP options by code (see option_bytes); they replace the network's
    user_data: Secret | None = None  # None: status 404; empty: an empty document
    metadata: dict[str, str] = {}  # text by name, in the order of the listing
    password: Secret | None = None
    password_id: str = ""


class GuestNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """The table of one network. ``revision`` is set by the agent, and only compared for equality."""

    scope_id: str
    network_id: str
    revision: int
    server_ip: str  # the device's own guest address
    dns: tuple[str, ...] = ()  # resolvers for the VMs: the device itself, then those of the network
    domain: str = ""
    search: tuple[str, ...] = ()
    mtu: int = 0  # 0: unknown; no MTU option is sent
    lease_s: int = LEASE_S
    nics: tuple[GuestNic, ...] = ()


ListenerKind = Literal["dhcp", "metadata", "password"]


class Listener(msgspec.Struct, frozen=True):
    """The service of one socket.

    ``macs_checked``: nftables rules of the namespace drop packets to this socket that do not come from the MAC address
    of the owner of the source address. So the guest process does not check the MAC address (see ``guest/peer.py``).
    """

    kind: ListenerKind
    macs_checked: bool = False


# ---- agent to guest


class ServeNetwork(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """Serve a network on these sockets: one descriptor for each listener, in this order.

    Sockets that the network had before are closed. Open connections continue.
    """

    seq: int
    network: GuestNetwork
    listeners: tuple[Listener, ...]


class UpdateNetwork(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """Replace the table of a network that is served."""

    seq: int
    network: GuestNetwork


class DropNetwork(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """Stop serving a network: close its sockets and connections. Succeeds if the network is not served."""

    seq: int
    scope_id: str
    network_id: str


class LendSockets(msgspec.Struct, frozen=True, kw_only=True, tag="lend"):
    """Send copies of the network's sockets, and continue to serve it.

    A new agent passes the copies, and with them the requests that wait in the sockets, to the next guest process.
    """

    seq: int
    scope_id: str
    network_id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """A liveness probe, answered by ``Ack``."""

    seq: int


# ---- guest to agent


class Served(msgspec.Struct, frozen=True):
    """One network that the guest process serves."""

    scope_id: str
    network_id: str
    revision: int
    listeners: tuple[Listener, ...]


class GuestHello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of the guest process. ``layers`` names the layers of its sandbox (guest/sandbox.py)."""

    version: str
    build: str
    pid: int
    protocol: int = GUEST_PROTOCOL
    layers: tuple[str, ...] = ()
    served: tuple[Served, ...] = ()


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The request with this ``seq`` is done. If ``error`` is not empty it failed, and nothing has changed."""

    seq: int
    error: str = ""


class LentSockets(msgspec.Struct, frozen=True, kw_only=True, tag="lent"):
    """The answer to ``LendSockets``: a descriptor for each listener, in this order. None if it is not served."""

    seq: int
    listeners: tuple[Listener, ...] = ()


class PasswordTaken(msgspec.Struct, frozen=True, kw_only=True, tag="taken"):
    """A VM has acknowledged its password, so the agent erases it.

    The message is repeated to every new agent, and for every table that still has the id.
    """

    scope_id: str
    network_id: str
    nic: str
    password_id: str


class Notice(msgspec.Struct, frozen=True, kw_only=True, tag="notice"):
    """A line for the agent's log. It contains no text from a tenant.

    ``limited``: it says that the NIC has used up its share of a service. It is repeated while that lasts.
    """

    scope_id: str
    network_id: str
    nic: str
    text: str
    limited: bool = False


GuestMessage = (
    ServeNetwork
    | UpdateNetwork
    | DropNetwork
    | LendSockets
    | Ping
    | GuestHello
    | Ack
    | LentSockets
    | PasswordTaken
    | Notice
)

_encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
_decoder: msgspec.msgpack.Decoder[GuestMessage] = msgspec.msgpack.Decoder(GuestMessage, dec_hook=dec_hook)


def encode(message: GuestMessage) -> bytes:
    """The body of the frame of ``message``."""
    return _encoder.encode(message)


def decode(body: bytes | memoryview) -> GuestMessage:
    """The message in the body of a frame. Raises msgspec.MsgspecError if it is no valid message."""
    return _decoder.decode(body)


# ---- values of DHCP options

_ADDRESSES = {3, 4, 5, 6, 7, 8, 9, 10, 11, 33, 41, 42, 44, 45, 48, 49, 65, *range(68, 77), 150}
_ADDRESS = {1, 16, 28, 32}
_U8 = {19, 20, 23, 27, 29, 30, 31, 34, 36, 37, 39, 46, 116}
_U16 = {13, 22, 26}
_U32 = {2, 24, 35, 38}
_TEXT = {12, 14, 15, 17, 18, 40, 47, 60, 62, 64, 66, 67, 100, 101, 114, 252}
_ROUTES = {121, 249}
_SEARCH = 119
# Pad, end, and the options that the server sets itself. For example, a foreign lease time could make a lease infinite.
_RESERVED = {0, 255, *range(50, 60), 61, 80, 82}


def option_bytes(code: int, text: str) -> bytes:
    """The value of DHCP option ``code``, from the text that an operator has entered.

    The types are those of RFC 2132, RFC 3397 (119), RFC 3442 (121: ``10.0.0.0/8 via 10.1.1.1, ...``) and RFC 2563
    (116). ``0x...`` means bytes for every code. For a code of unknown type, a list of addresses is encoded as
    addresses, and anything else as text. Raises ValueError, with the reason, if the text has the wrong type or the
    code is reserved.
    """
    if not 0 < code < 255 or code in _RESERVED:
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
    """A domain name in the encoding of DNS, uncompressed. Raises ValueError if ``name`` is no domain name."""
    labels = [label.encode("ascii") for label in name.rstrip(".").split(".")]
    if any(not 0 < len(label) < 64 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise ValueError(f"{name!r} is not a domain name")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
