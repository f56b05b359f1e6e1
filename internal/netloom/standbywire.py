"""Groups of hosts that stand by for each other: what the management side hands out, and the commands about it.

A *group* is a host that serves scopes, a host that stands by for it, and perhaps a witness. Its hosts talk to each
other with a secret that the management side hands out over SSH. A group never changes: another standby or another
witness is another group. ``standby/decision.py`` decides which of its hosts serves.

The commands travel in the ``payload`` of a ``Call`` and the ``data`` of a ``Reply``, as MessagePack::

    active     set-group      makes the group, or finds the one that it is active in with these hosts
    others     set-group      the same group, with its secret
    active     join-group     the scope belongs to the group from now on; the state goes to the standby
    active     leave-group    the scope belongs to no group any more; the standby has forgotten it
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from netloom.errors import HostRefused
from netloom.secret import Secret, dec_hook, enc_hook
from netloom.standby.decision import Group

T = TypeVar("T")

SET_GROUP = "set-group"  # about a host: the call's ``scope_id`` is empty
JOIN_GROUP = "join-group"
LEAVE_GROUP = "leave-group"
COMMANDS = frozenset({SET_GROUP, JOIN_GROUP, LEAVE_GROUP})

PORT = 7788  # UDP and TCP, on the management addresses of the hosts
LEASE_MS = 1000
GROUP_ID_CHARACTERS = 8  # hexadecimal; as a number it is the group's mark in the kernel


class GroupHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host of a group: its name in the registration, and where its agent listens to the others."""

    name: str
    address: str
    port: int = PORT


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A group. ``group_id``: 8 hexadecimal digits, random. ``secret``: 64 hexadecimal digits.

    ``first`` is active in term 0, ``second`` stands by. ``witness``: None if the upstream has the second vote; agents
    before 2026-12 refuse such a group. ``owner``: the registration whose scopes the group has.
    """

    group_id: str
    owner: str
    first: GroupHost
    second: GroupHost
    witness: GroupHost | None
    secret: Secret = Secret()
    lease_ms: int = LEASE_MS

    @property
    def hosts(self) -> tuple[GroupHost, ...]:
        return (self.first, self.second) if self.witness is None else (self.first, self.second, self.witness)

    @property
    def names(self) -> Group:
        """The names of the hosts, for the decision."""
        return Group(self.first.name, self.second.name, self.witness.name if self.witness is not None else "")

    @property
    def mark(self) -> int:
        """The group in the kernel's lease table, see agent/host/lease.py. Not 0."""
        return int(self.group_id, 16)


class SetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """``set-group``: this host, ``host`` in the registration, is a member of the group.

    The answer is a ``GroupAnswer`` with the group that the host has: if ``reuses``, perhaps an older one with the same
    hosts, in which this host is active, with its secret. ``exists``: the group is such an older one. A member that does
    not know it has lost its disk, and with it a vote perhaps, so it refuses.
    """

    host: str
    group: GroupSpec
    reuses: bool = False
    exists: bool = False


class GroupAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``set-group``."""

    group: GroupSpec


class JoinGroup(msgspec.Struct, frozen=True, kw_only=True):
    """``join-group``: the scope belongs to this group from now on. Only the active host of the group obeys.

    ``epoch``: the number of the placement from now on, higher than the one that the scope has. ``proof``: the
    authorisation of this host (extension/proof.py); ``standby_proof``: that of the standby.
    """

    group_id: str
    epoch: int
    proof: str
    standby_proof: str


class LeaveGroup(msgspec.Struct, frozen=True, kw_only=True):
    """``leave-group``: the scope is served by this host alone from now on. ``group_id``: the one that it has.

    ``is_forgotten``: the standby has just said to the sender that it does not have the scope. That counts only in a
    group without a witness, and if the standby has been silent for long, so that it cannot have got it since.
    ``fenced``: the other host of the group, of which an operator says that it is off. A host that stands by serves the
    scope then, too. ``asks_first``: only if nobody answers for the addresses.

    ``moves``: a move of the scope follows, so it joins no group here in the next minute.
    """

    group_id: str
    is_forgotten: bool = False
    fenced: str = ""
    asks_first: bool = False
    moves: bool = False


_encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)


def packed(message: msgspec.Struct) -> bytes:
    """The message as it travels: with the secret, over SSH only."""
    return _encoder.encode(message)


def unpacked(data: bytes, shape: type[T]) -> T:
    """The message of this ``shape``. Raises HostRefused for other data: the other end is of another version."""
    try:
        return msgspec.msgpack.decode(data, type=shape, dec_hook=dec_hook)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HostRefused(f"a message about a standby cannot be read: {error}", hint="use one version") from error
