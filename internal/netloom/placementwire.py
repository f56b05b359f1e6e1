"""The commands between an operator's netloom and the agents about placements: their payloads and answers.

They travel in the ``payload`` of a ``Call`` and the ``data`` of a ``Reply``, as MessagePack. A move of a scope from
host A to host B takes these commands; ARCHITECTURE.md has the reasons::

    A  read-state      the state, in parts
    B  receive         stores the state as "incoming", and builds the scope behind a closed gate
    A  read-flows      the open connections; B  add-flows   (A still serves: most of the table is copied now)
    A  close           closes the gate, if the state is still that revision; the flows that changed since, in parts
    A  read-flows      a further part; B  add-flows   (only if there are several)
    B  open            adds these flows, opens the gate, announces the addresses
    A  finish          remembers where the scope went, and removes it

Until ``close`` nothing has changed for the network. After ``close`` the old host opens again by itself, unless it hears
within ``CLOSED_S`` that the move is finished, or that somebody else answers for the addresses. The new host may open
until ``OPEN_WITHIN_S`` after its last ``receive`` or ``add-flows`` before ``close`` only, so the two cannot both be
open.

If the new host does not open, two more commands end the move before that time::

    B  drop            forgets the scope, so no later ``open`` is obeyed
    A  reopen          opens the gate again; only after the answer to ``drop``
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from netloom.errors import HostRefused

T = TypeVar("T")

GATEWAY = "gateway"  # as the ``witness`` of a scope whose group has none

# Commands about one scope: the call's ``scope_id`` names it.
READ_STATE = "read-state"
RECEIVE = "receive"
READ_FLOWS = "read-flows"
ADD_FLOWS = "add-flows"
CLOSE = "close"
REOPEN = "reopen"
OPEN = "open"
FINISH = "finish"
DROP = "drop"
SCOPE_COMMANDS = frozenset({READ_STATE, RECEIVE, READ_FLOWS, ADD_FLOWS, CLOSE, REOPEN, OPEN, FINISH, DROP})

# Commands about a host: the call's ``scope_id`` is empty.
PLACEMENTS = "placements"
SET_DRAINED = "set-drained"
SET_EVACUATED = "set-evacuated"
HOST_COMMANDS = frozenset({PLACEMENTS, SET_DRAINED, SET_EVACUATED})

COMMANDS = SCOPE_COMMANDS | HOST_COMMANDS
READING = frozenset({PLACEMENTS, READ_STATE, READ_FLOWS})  # these change nothing

OPEN_WITHIN_S = 5.0
CLOSED_S = 6.0  # more than OPEN_WITHIN_S, by more than the rates of two clocks differ
INCOMING_S = 900.0  # a host forgets a scope that was never opened there

RECORD_S = 7 * 86_400  # so long a host may take the scopes of a dead one

PART_BYTES_MAX = 512 * 1024  # of a state or a table of flows in one reply


class ReadPart(msgspec.Struct, frozen=True, kw_only=True):
    """``read-state``, ``read-flows``: part ``number`` of the copy that ``token`` names. Part 0 makes a new copy.

    ``read-flows`` also reads what follows the first part in ``Closed``.
    """

    number: int = 0
    token: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a state (JSON, with secrets) or of a table of flows. ``parts``: how many there are.

    The data of the parts of a state is joined. Each part of a table of flows is for an ``add-flows`` of its own, with
    its ``gone``.
    """

    token: str = ""
    parts: int = 1
    data: bytes = b""
    gone: bytes = b""
    revision: int = 0
    epoch: int = 0
    owner: str = ""


class Receive(msgspec.Struct, frozen=True, kw_only=True):
    """``receive``: become the next host of the scope, with this state.

    ``epoch``, ``host``, ``proof``: the new placement. ``peer``: the host that serves the scope now, or did.
    """

    epoch: int
    host: str
    proof: str
    peer: str
    state: bytes


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``receive``, ``add-flows`` and ``open``.

    ``ready``: for ``open``. It holds until its time is over, until ``drop``, and until the next ``receive``. Use only
    one from before ``close``, because the old host counts from its own ``close``.

    ``flows``: how many connections of this part stand now. ``refused``: how many the kernel refused, ``why`` the first.
    """

    ready: str = ""
    flows: int = 0
    refused: int = 0
    why: str = ""


class AddFlows(msgspec.Struct, frozen=True, kw_only=True):
    """``add-flows``: a part of the table of connections."""

    epoch: int
    flows: bytes = b""
    gone: bytes = b""


class Close(msgspec.Struct, frozen=True, kw_only=True):
    """``close``: close the gate, if the state has this ``revision``. ``token``: of the flows that were read before."""

    epoch: int
    to: str
    revision: int
    token: str = ""


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``close``: the connections that are new or changed since ``read-flows``, and those that ended.

    ``counts``: how many new or changed ones each part has. This is the first part; ``read-flows`` with ``token`` reads
    the others.
    """

    flows: bytes = b""
    gone: bytes = b""
    counts: tuple[int, ...] = (0,)
    token: str = ""


class Reopen(msgspec.Struct, frozen=True, kw_only=True):
    """``reopen``: open the gate again, because the new host has not opened and never will by that ``close``.

    All values are those of ``close``: a host that was closed for another move since stays closed.
    """

    epoch: int
    to: str
    token: str


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """``open``: add these flows, open the gate and announce the addresses. ``ready``: from ``Received``.

    ``dead``: the host that served the scope is dead, so ``ready`` is not needed. The host asks first whether somebody
    answers for the addresses, and refuses then. ``fenced``: it does not ask, because an operator says that the dead
    host is off. ``taken_from``: the dead host, if it may still have a copy; the scope is claimed on its VLANs then.
    """

    epoch: int
    ready: str = ""
    flows: bytes = b""
    gone: bytes = b""
    dead: bool = False
    fenced: bool = False
    taken_from: str = ""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """``finish``: the scope is served by ``to`` with ``epoch``; remember that and remove it here."""

    epoch: int
    to: str


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """``drop``: forget a scope that is incoming here. ``epoch``: as in ``receive``."""

    epoch: int


class ListPlacements(msgspec.Struct, frozen=True, kw_only=True):
    """``placements``: the scopes whose ids come after ``after``."""

    after: str = ""


class HeldScope(msgspec.Struct, frozen=True, kw_only=True):
    """One scope of a host. ``gate`` as in ``state.Placement``, or "moved", then ``peer`` has the scope.

    Of a scope with a standby (standbywire.py): ``group`` is its group, ``standby`` the host that stands by, ``term``
    that of the group, and ``epoch`` grows with each take-over. The gate of the copy that stands by is "standby", and
    ``peer`` is the active host. The active host has the same gate without a ``peer`` while it has no lease.
    ``witness``: of the group, or GATEWAY. ``behind``: one line, why the standby lacks something. ``took_over``: one
    line about the last take-over.

    ``size``: what a move of it costs, roughly: its networks, public addresses and NICs together. ``failed``: the state
    cannot be read, or the host does not do what it says.
    """

    scope_id: str
    owner: str = ""
    epoch: int = 0
    revision: int = 0
    gate: str = "open"
    peer: str = ""
    networks: int = 0
    nics: int = 0
    public_ips: int = 0
    why: str = ""
    group: str = ""
    standby: str = ""
    witness: str = ""
    term: int = 0
    behind: str = ""
    took_over: str = ""


class Placements(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``placements``. ``more``: there are scopes after the last one.

    ``evacuated``: the dead hosts whose scopes this host may take, or has taken.
    """

    scopes: tuple[HeldScope, ...] = ()
    more: bool = False
    drained: bool = False
    evacuated: tuple[str, ...] = ()


class SetDrained(msgspec.Struct, frozen=True, kw_only=True):
    """``set-drained``: whether no scope is placed on this host any more.

    ``over``: records about this host that hold at most until then are over: it was declared dead, and is back.
    """

    drained: bool
    over: int = 0  # UTC, in seconds since 1970


class SetEvacuated(msgspec.Struct, frozen=True, kw_only=True):
    """``set-evacuated``: this host may take the scopes of ``owner`` from ``host``, which is dead.

    ``proof`` empty: not any more; with ``owner`` empty, too: those of nobody. Scopes that were taken from it are not
    claimed any more then.
    """

    host: str
    owner: str = ""
    until: int = 0  # UTC, in seconds since 1970
    proof: str = ""


_encoder = msgspec.msgpack.Encoder()


def packed(message: msgspec.Struct) -> bytes:
    """The message as it travels."""
    return _encoder.encode(message)


def unpacked(data: bytes, shape: type[T]) -> T:
    """The message of this ``shape``. Raises HostRefused for other data: the other end is of another version."""
    try:
        return msgspec.msgpack.decode(data, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HostRefused(f"a message about a placement cannot be read: {error}", hint="use one version") from error
