"""The messages between the two hosts of a group that can serve, and the encrypted connection that carries them.

There is one TCP connection for each group. The second host of the group connects to the first, and both send.
It begins with three messages of a fixed length, by which both prove that they know the group's secret::

    hello    "netloom", version (1 byte), group (4 bytes), nonce (32 bytes), tag (16 bytes)     second to first
    answer   "netloom", version (1 byte), nonce (32 bytes), tag (16 bytes)                      first to second
    proof    tag (16 bytes)                                                                    second to first

The version of the hello is the highest that the sender speaks, and that of the answer is the one to use. A tag is the
start of an HMAC-SHA256 with the group's secret of a label and all that was said before. A nonce is an X25519 public
key, new for each connection. So nothing of an earlier connection is of use in another one, and nobody who learns the
secret later can read what was recorded.

Then come records: a length (4 bytes, big endian) and that many bytes, encrypted by AES-GCM. Each direction has a key of
its own, and the nonce is the number of the record. So a record that is changed, repeated, left out or out of order is
refused. A record has a byte, 1 if the message goes on in the next record, else 0, and a part of a message.

A message is MessagePack with a tag. Agents of different builds talk to each other: the tags and the names of the fields
stay as they are, and a message with an unknown tag is ignored.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import msgspec

from netloom.frames import FRAME_BYTES_MAX, FrameBuffer, FrameTooLong, frame
from netloom.secret import Secret

MAGIC = b"netloom"
VERSION = 1
NONCE_BYTES = 32
TAG_BYTES = 16
HELLO_BYTES = len(MAGIC) + 1 + 4 + NONCE_BYTES + TAG_BYTES
ANSWER_BYTES = len(MAGIC) + 1 + NONCE_BYTES + TAG_BYTES
PROOF_BYTES = TAG_BYTES

MESSAGE_BYTES_MAX = FRAME_BYTES_MAX  # a state is not larger in a call, either
PART_BYTES_MAX = 64 << 10  # of a message in one record
_SEALED_BYTES_MAX = 1 + PART_BYTES_MAX + TAG_BYTES
HELD_AT_ONCE = 1000  # scopes in one ``Holds``

_LAST, _GOES_ON = b"\0", b"\1"


class PairError(Exception):
    """The other end does not know the secret, or what it sends is damaged."""


# ---- messages


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A scope of the group whose state the sender has on disk, and which state: see ``Placement`` and ``Scope``."""

    scope_id: str
    epoch: int
    joined: int
    revision: int


class Holds(msgspec.Struct, frozen=True, kw_only=True, tag="holds"):
    """All scopes of the group that the sender has, in as many messages as they need. ``more``: another one follows.

    ``complete``: the sender can read all its states, so it knows that it has no others.
    """

    scopes: tuple[Held, ...] = ()
    more: bool = False
    complete: bool = True


class HoldsWanted(msgspec.Struct, frozen=True, kw_only=True, tag="holds-wanted"):
    """The sender asks for ``Holds``."""


class State(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """The state of a scope, to be kept on disk and applied. ``data``: the file, with passwords. ``Stored`` answers."""

    scope_id: str
    epoch: int
    joined: int
    revision: int
    data: bytes

    def __repr__(self) -> str:
        return f"State({self.scope_id}, epoch {self.epoch}, revision {self.revision}, {len(self.data)} bytes)"


class Stored(msgspec.Struct, frozen=True, kw_only=True, tag="stored"):
    """The state with this revision is on disk. If ``error`` is not empty, it is not."""

    scope_id: str
    revision: int
    error: str = ""


class Wanted(msgspec.Struct, frozen=True, kw_only=True, tag="wanted"):
    """The sender asks for the states of these scopes."""

    scope_ids: tuple[str, ...]


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """The scope belongs to the group no more. The receiver forgets it, and answers."""

    scope_id: str


class GoneDone(msgspec.Struct, frozen=True, kw_only=True, tag="gone-done"):
    """The sender has nothing of the scope any more."""

    scope_id: str


class Digest(msgspec.Struct, frozen=True, kw_only=True, tag="digest"):
    """A hash of what the sender has made of the state with this revision."""

    scope_id: str
    revision: int
    digest: bytes


class Flows(msgspec.Struct, frozen=True, kw_only=True, tag="flows"):
    """Connections of a scope that were established, and those that have ended: records of connection tracking."""

    scope_id: str
    create: bytes = b""
    delete: bytes = b""


class FlowsBegin(msgspec.Struct, frozen=True, kw_only=True, tag="flows-begin"):
    """The connections between this and ``FlowsEnd`` with the same ``token`` are all that the scope has."""

    scope_id: str
    token: int


class FlowsEnd(msgspec.Struct, frozen=True, kw_only=True, tag="flows-end"):
    """See ``FlowsBegin``."""

    scope_id: str
    token: int


class FlowsWanted(msgspec.Struct, frozen=True, kw_only=True, tag="flows-wanted"):
    """The sender asks for all connections of the scope."""

    scope_id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """The sender lives."""


PairMessage = (
    Holds
    | HoldsWanted
    | State
    | Stored
    | Wanted
    | Gone
    | GoneDone
    | Digest
    | Flows
    | FlowsBegin
    | FlowsEnd
    | FlowsWanted
    | Ping
)
# They may be dropped, and other messages may overtake them. Their own order is kept.
FLOW_MESSAGES = (Flows, FlowsBegin, FlowsEnd)


class _Tagged(msgspec.Struct):
    type: str


_TAGS = frozenset(str(it.__struct_config__.tag) for it in PairMessage.__args__)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[PairMessage] = msgspec.msgpack.Decoder(PairMessage)
_tag_decoder = msgspec.msgpack.Decoder(_Tagged)


def encode(message: PairMessage) -> bytes:
    """The message as MessagePack."""
    return _encoder.encode(message)


def decode(data: bytes | bytearray | memoryview) -> PairMessage | None:
    """The message; None for one with an unknown tag, which a newer build has sent. Raises PairError for other data."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # guard: a-pair-message-is-any-bytes
        if _is_newer(data):
            return None
        raise PairError(f"a message cannot be read: {error}") from None


def _is_newer(data: bytes | bytearray | memoryview) -> bool:
    try:
        return _tag_decoder.decode(data).type not in _TAGS
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def holds(scopes: Iterable[Held], *, complete: bool = True) -> list[Holds]:
    """The messages that name these scopes; at least one."""
    rest = tuple(scopes)
    starts = range(0, max(len(rest), 1), HELD_AT_ONCE)
    return [Holds(scopes=rest[at : at + HELD_AT_ONCE], more=at != starts[-1], complete=complete) for at in starts]


# ---- authentication


class Keys(NamedTuple):
    """The keys of one connection, 32 bytes each."""

    of_first: bytes  # for the records that the first host of the group sends
    of_second: bytes


def secret_bytes(secret: Secret) -> bytes:
    """The 32 bytes of a group's secret. Raises ValueError for other text, without the text."""
    try:
        found = bytes.fromhex(secret.reveal())
    except ValueError:
        found = b""
    if len(found) != 32:
        raise ValueError("the secret of a group has 64 hexadecimal digits")
    return found


def _mac(secret: bytes, label: str, *said: bytes) -> bytes:
    """32 bytes. All that is said has a fixed length, so the whole cannot be read in two ways."""
    return hmac.digest(secret, f"netloom pair {label}\0".encode() + b"".join(said), hashlib.sha256)


def _tag(secret: bytes, label: str, *said: bytes) -> bytes:
    return _mac(secret, label, *said)[:TAG_BYTES]


def hello(secret: bytes, group: int, nonce: bytes, version: int = VERSION) -> bytes:
    """The first message of the second host. ``group``: ``GroupSpec.mark``."""
    said = MAGIC + bytes((version,)) + group.to_bytes(4, "big") + nonce
    return said + _tag(secret, "hello", said)


def group_of(said: bytes) -> int | None:
    """The group that a hello names; None if it is no hello. The hello is not verified yet."""
    start, version, group = said[: len(MAGIC)], said[len(MAGIC) :][:1], said[len(MAGIC) + 1 :][:4]
    if start != MAGIC or version == b"\0" or len(said) != HELLO_BYTES:
        return None
    return int.from_bytes(group, "big")


def is_hello(secret: bytes, said: bytes) -> bool:
    """Whether somebody who knows the secret has made this hello: now, or earlier."""
    tag = _tag(secret, "hello", said[:-TAG_BYTES])
    return group_of(said) is not None and hmac.compare_digest(said[-TAG_BYTES:], tag)


def answer(secret: bytes, hello: bytes, nonce: bytes) -> bytes:
    """The answer of the first host to a hello."""
    said = MAGIC + bytes((min(hello[len(MAGIC)], VERSION),)) + nonce
    return said + _tag(secret, "answer", hello, said)


def is_answer(secret: bytes, hello: bytes, said: bytes) -> bool:
    """Whether this is the answer to our hello, of somebody who knows the secret."""
    if len(said) != ANSWER_BYTES or said[: len(MAGIC)] != MAGIC or not 1 <= said[len(MAGIC)] <= hello[len(MAGIC)]:
        return False
    return hmac.compare_digest(said[-TAG_BYTES:], _tag(secret, "answer", hello, said[:-TAG_BYTES]))


def proof(secret: bytes, hello: bytes, answer: bytes) -> bytes:
    """The last message of the second host before its records."""
    return _tag(secret, "proof", hello, answer)


def is_proof(secret: bytes, hello: bytes, answer: bytes, said: bytes) -> bool:
    """Whether the sender of the hello has heard this answer and knows the secret."""
    return hmac.compare_digest(said, proof(secret, hello, answer))


def nonce_in(said: bytes) -> bytes:
    """The nonce of a hello or an answer."""
    return said[-TAG_BYTES - NONCE_BYTES : -TAG_BYTES]


def keys(secret: bytes, hello: bytes, answer: bytes, agreed: bytes) -> Keys:
    """The keys of the connection. ``agreed``: what X25519 makes of the nonces, 32 bytes."""
    base = _mac(secret, "keys", hello, answer, agreed)
    return Keys(_mac(base, "first"), _mac(base, "second"))


# ---- records


class Cipher(Protocol):
    """AES-256-GCM with one key. The tag is a part of the encrypted text."""

    def encrypt(self, number: int, text: bytes) -> bytes: ...

    def decrypt(self, number: int, sealed: memoryview) -> bytes | None:
        """None: the text was not encrypted with this key and number."""


class Sealer:
    """Makes the records of one direction. In the order in which they are made, they have to be sent."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher
        self._number = 0

    def seal(self, text: bytes) -> bytes:
        """The record for one of the ``parts`` of a message."""
        sealed = self._cipher.encrypt(self._number, text)
        self._number += 1
        return frame(sealed)


def parts(message: bytes) -> Iterator[bytes]:
    """The texts of the records of an encoded message."""
    if len(message) <= PART_BYTES_MAX:
        yield _LAST + message
        return
    with memoryview(message) as view:
        for at in range(0, len(message), PART_BYTES_MAX):
            end = at + PART_BYTES_MAX
            yield (_GOES_ON if end < len(message) else _LAST) + view[at:end]


class Reader:
    """Assembles the messages of one direction from pieces of any size.

    ``limit``: the largest message in bytes. Nothing is kept of a message whose sender does not know the secret, but the
    bytes of one record.
    """

    def __init__(self, cipher: Cipher, limit: int = MESSAGE_BYTES_MAX) -> None:
        self._cipher = cipher
        self._limit = limit
        self._number = 0
        self._message = bytearray()
        self._frames = FrameBuffer(self._open, _SEALED_BYTES_MAX)

    def feed(self, data: bytes) -> list[PairMessage]:
        """The messages that are complete with ``data``, without those of unknown tags.

        Raises PairError; nothing may be fed after that.
        """
        messages = []
        try:
            texts = self._frames.feed(data)
        except FrameTooLong as error:
            raise PairError(f"a record of {error.length} bytes") from None
        for text in texts:
            if text[:1] not in (_LAST, _GOES_ON):
                raise PairError("a record of an unknown kind")
            if len(self._message) + len(text) - 1 > self._limit:  # guard: a-pair-message-is-bounded
                raise PairError(f"a message of more than {self._limit} bytes")
            if text[:1] == _LAST and not self._message:
                messages.append(decode(memoryview(text)[1:]))
                continue
            self._message += memoryview(text)[1:]
            if text[:1] == _LAST:
                whole, self._message = self._message, bytearray()
                messages.append(decode(whole))
        return [it for it in messages if it is not None]

    def _open(self, sealed: memoryview) -> bytes:
        text = self._cipher.decrypt(self._number, sealed)
        if not text:
            raise PairError("a record is damaged, repeated or out of order")
        self._number += 1  # guard: a-record-is-read-once
        return text
