"""All that ever crosses SSH: hello, Call, Reply.

One channel carries many calls. A frame is a length (4 bytes, big endian) and that many bytes of MessagePack.
Both ends say ``Hello`` first; then the management side sends ``Call`` messages, and the agent answers each with one
``Reply`` of the same ``call_id``, in any order. A repeated ``call_id`` is answered from memory, not carried out twice.
"""

from __future__ import annotations

import msgspec

from netloom.errors import HostRefused

PROTOCOL_VERSION = 1
OLDEST_PROTOCOL = 1  # that is still understood: of a newer agent by an older management server, and the other way

# A restore of hundreds of VMs with a megabyte of user data each is the largest honest message.
FRAME_BYTES_MAX = 1 << 30

_LENGTH_BYTES = 4


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Who speaks. ``build`` names the exact program; ``protocol`` and ``oldest``, the newest and the oldest that it
    speaks, decide whether the two understand each other. Fields that one end does not know it ignores.

    ``held``: the build that an operator of the host went back from; it is not installed there again by itself.
    """

    version: str
    build: str
    protocol: int = PROTOCOL_VERSION
    oldest: int = OLDEST_PROTOCOL
    held: str = ""

    def understands(self, other: Hello) -> bool:
        """Whether there is a protocol that both speak."""
        return max(self.oldest, other.oldest) <= min(self.protocol, other.protocol)


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's registration details as the agent may know them: no host, no user, no secret."""

    owner: str
    guest_nic: str = "eth1"
    public_nic: str = "eth1"
    ingress_open: bool = False  # firewall=absent
    broadcast: str = ""  # network.broadcast: "", "vlan", "vxlan"
    isolation: str = "vlan"  # guest.isolation
    ip6_gateway: str = ""  # public.ip6.gateway
    ip6_address: str = ""  # public.ip6.address, with prefix length


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """One command for one scope of one host.

    ``command`` is a name of the protocol, or ``locate`` (does this host hold the scope?). ``payload`` is the
    JSON text of CloudStack's ``payload`` object (for custom-action: the flat payload without the two details).
    ``remaining_ms`` is the time that is left of the caller's deadline.
    """

    call_id: str
    command: str
    scope_id: str
    registration: Registration
    payload: bytes = b"{}"
    remaining_ms: int = 60_000


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The outcome: ``status`` is the exit status to end with, ``output`` goes to stdout, ``error`` is one line.

    ``holds``: whether the agent has a state of the scope (answers ``locate``, and every other call too).
    """

    call_id: str
    status: int = 0
    output: str = ""
    error: str = ""
    hint: str = ""
    holds: bool = False
    revision: int = 0


Message = Hello | Call | Reply

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame, length included."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Cuts a stream of bytes into messages, however the transport cut it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes.

        Raises HostRefused when the stream is not ours: the remote shell printed something, or the frame is too long.
        """
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > FRAME_BYTES_MAX:
                raise HostRefused(
                    f"the host sent something that is not a frame: {bytes(self._buffer[:60])!r}",
                    hint="does the login shell print text?",
                )
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            try:
                messages.append(_decoder.decode(bytes(self._buffer[_LENGTH_BYTES:end])))
            except msgspec.MsgspecError as error:
                raise HostRefused(f"the host sent a frame that cannot be read: {error}") from error
            del self._buffer[:end]
        return messages
