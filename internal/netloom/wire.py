"""The messages between the management server and an agent: Hello, Call and Reply, over one SSH channel.

One channel carries many calls. A frame is a length (4 bytes, big endian) and that many bytes of MessagePack.
Both ends send ``Hello`` first. Then the management server sends ``Call`` messages, and the agent answers each with one
``Reply`` of the same ``call_id``, in any order. The agent executes a ``call_id`` once; it answers a repeated one from
memory.
"""

from __future__ import annotations

import msgspec

from netloom.errors import HostRefused
from netloom.frames import FRAME_BYTES_MAX, FrameBuffer, FrameTooLong, frame

# A reply has an error of one line, or the output of a custom action: about 100 KB (commands.actions).
REPLY_BYTES_MAX = 1 << 20

PROTOCOL_VERSION = 1
OLDEST_PROTOCOL = 1  # the oldest that we still understand; management servers and agents are updated at different times


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of each end. Unknown fields are ignored.

    ``build`` names the exact program. ``protocol`` and ``oldest`` are the newest and the oldest protocol it speaks.
    ``held``: the build that an operator of the host went back from; it is not installed there again automatically.
    ``unrestored``: how many scopes an agent has not restored yet since its start; ``restoring`` has the next of them.
    """

    version: str
    build: str
    protocol: int = PROTOCOL_VERSION
    oldest: int = OLDEST_PROTOCOL
    held: str = ""
    unrestored: int = 0
    restoring: tuple[str, ...] = ()

    def understands(self, other: Hello) -> bool:
        """Whether both ends have a protocol in common."""
        return max(self.oldest, other.oldest) <= min(self.protocol, other.protocol)


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """The registration details that an agent gets: no hosts, no user name, no secret."""

    owner: str
    guest_nic: str = "eth1"
    public_nic: str = "eth1"
    ingress_open: bool = False  # firewall=absent
    broadcast: str = ""  # network.broadcast: "", "vlan", "vxlan"
    isolation: str = "vlan"  # guest.isolation; not a Literal: an unknown word must not make the frame invalid
    ip6_gateway: str = ""  # public.ip6.gateway
    ip6_address: str = ""  # public.ip6.address, with prefix length
    lb_idle_s: int = 600  # loadbalancer.idle.timeout
    lb_connections_max: int = 8000  # loadbalancer.max.conn
    conntrack_helpers: tuple[str, ...] = ()  # conntrack.helpers, sorted
    conntrack_max_per_vm: int = 32_000  # conntrack.max.per.vm; 0: no maximum


class Signers(msgspec.Struct, frozen=True, kw_only=True):
    """Who can sign placements of a registration: ``keys``, public, as SubjectPublicKeyInfo in DER (RFC 5280).

    ``host``: the name of this host in the registration.
    """

    host: str
    keys: tuple[bytes, ...]


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """One command for one scope of one host.

    ``command`` is a command of the Network Extension Script Protocol, or ``locate`` (does this host have the scope?).
    ``payload`` is the JSON text of CloudStack's ``payload`` object (for custom-action: of the file without the two
    details). ``remaining_ms`` is the time until the caller's deadline. ``epoch``: the number of the placement that the
    caller knows; 0 for a scope that was never moved. ``signers``: of the registration, as the caller knows them.

    Operators' commands about placements have their own commands and payloads (placementwire.py).
    """

    call_id: str
    command: str
    scope_id: str
    registration: Registration
    payload: bytes = b"{}"
    remaining_ms: int = 60_000
    epoch: int = 0
    signers: Signers | None = None


class Evacuated(msgspec.Struct, frozen=True, kw_only=True):
    """A host that an operator declared dead, and the proof that this host may take its scopes (extension/proof.py).

    ``until``: UTC, in seconds since 1970. ``owner``: the registration whose scopes these are.
    """

    host: str
    until: int
    proof: str
    owner: str = ""


class StandbyReply(msgspec.Struct, frozen=True, kw_only=True):
    """The group that a scope belongs to (standbywire.py), as one of its hosts knows it.

    ``host``: the one that stands by, ``witness``: the third one, or empty, by their names there. ``term``: of the
    group. ``behind``: one line, why the standby lacks something of the scope; empty: it has all, as far as is known.
    ``serving``: whether the host that replies is active and has a lease. ``standby_silent_s``, ``witness_silent_s``:
    for how many seconds it has not heard them.
    """

    group_id: str
    host: str
    witness: str
    term: int = 0
    behind: str = ""
    serving: bool = False
    standby_silent_s: int = 0
    witness_silent_s: int = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The result of a call: ``status`` is the exit status, ``output`` goes to stdout, ``error`` is one line.

    ``holds``: whether the agent has a state of the scope. It is the answer to ``locate``, and is set in every reply.
    ``note``: one line for the log of the management server, about something that this call did not ask for.
    ``data``: the answer to a command about placements.

    About the placement, in every reply: ``epoch`` and ``gate`` are those of ``state.Placement``; ``gate`` is empty
    without a state. ``proof``: its authorisation. ``moved_to``: the host to which the scope went from here; ``epoch``
    is the number of that placement then, and a call that failed was not executed. ``drained``: no scope is placed here
    any more.
    ``evacuated``: the dead hosts whose scopes this host may take, each with the time limit and the authorisation.

    Of a scope with a standby: ``standby`` is its group. ``epoch`` grows with each take-over, and ``proof`` holds from
    the number ``proof_from`` on; 0: for ``epoch`` only. The gate is "standby" on the host that stands by, which does
    not hold the scope then and names the active host in ``moved_to``. It is the same on the active host while that has
    no lease: it holds the scope, and ``moved_to`` is empty. ``about_to_move``: the scope has left its group for a move
    that begins now, so it gets no standby here.
    """

    call_id: str
    status: int = 0
    output: str = ""
    error: str = ""
    hint: str = ""
    holds: bool = False
    revision: int = 0
    note: str = ""
    data: bytes = b""
    epoch: int = 0
    gate: str = ""
    proof: str = ""
    moved_to: str = ""
    drained: bool = False
    evacuated: tuple[Evacuated, ...] = ()
    standby: StandbyReply | None = None
    proof_from: int = 0
    about_to_move: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether the call was refused, and not executed, because the host does not serve the scope.

        A call that succeeded was executed: the scope has left only afterwards, while a hook was running for example.
        """
        return bool(self.status and (self.moved_to or self.gate in ("passive", "incoming", "standby")))


class Activation(msgspec.Struct, frozen=True):
    """The result of ``netloom agent activate``, which prints it as JSON. ``build``: the one in use now."""

    outcome: str  # "activated", "current", "newer", "held"
    build: str
    reason: str = ""  # why ``build`` is not the one that was to be activated
    did: tuple[str, ...] = ()  # what was changed on the host, for people


Message = Hello | Call | Reply

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame, length included."""
    return frame(_encoder.encode(message))


class FrameReader:
    """Assembles messages from a stream of bytes, which may arrive in pieces of any size.

    ``limit``: the largest message in bytes. Calls carry the user data of whole networks; replies are small, and a host
    is not trusted with the memory of the management server.
    """

    def __init__(self, limit: int = FRAME_BYTES_MAX) -> None:
        self._frames = FrameBuffer(_decoder.decode, limit)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete with ``data``.

        Raises HostRefused for a frame that is too long (often text that the remote shell printed) or not a message.
        """
        try:
            return self._frames.feed(data)
        except FrameTooLong as error:
            raise HostRefused(
                f"the host sent something that is not a frame, or a frame that is too long: {error.start!r}",
                hint="does the login shell print text?",
            ) from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # guard: a-frame-is-any-bytes
            raise HostRefused(f"the host sent a frame that cannot be read: {error}") from error
