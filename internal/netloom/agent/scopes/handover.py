"""What a host remembers of a move of one of its scopes, until its agent restarts."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from netloom import placementwire as wire
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.errors import HostRefused


class Copy:
    """A copy of a state or of connections, made once and read in parts. ``token`` tells the copies apart.

    It is forgotten when its last part was read. Without parts it is a copy that nobody has asked for.
    """

    def __init__(self, parts: Sequence[wire.Part] = ()) -> None:
        self.token = uuid.uuid4().hex if parts else ""
        self._parts = [replace(it, token=self.token, parts=len(parts)) for it in parts]

    def part(self, asked: wire.ReadPart, what: str) -> wire.Part:
        """The part that is asked for. ``what`` is copied, for the error.

        Raises HostRefused when this is another copy, or has no such part any more.
        """
        if asked.number and asked.token != self.token:  # guard: parts-of-two-copies-are-not-mixed
            raise HostRefused(f"{what}: it was read anew meanwhile", hint="repeat the command")
        if not 0 <= asked.number < len(self._parts):
            raise HostRefused(f"{what}: there is no part {asked.number} to be read", hint="repeat the command")
        part = self._parts[asked.number]
        if asked.number == part.parts - 1:
            self._parts = []
        return part


class Handover:
    """What the host remembers.

    On the old host: ``before``, the connections that the new host has, of the copy ``flows``; ``closing``, the last
    ``close`` that was carried out. On the new host: ``reception``, which names the last ``receive``. ``rest``: work
    that must not delay the opening of the gate.
    """

    def __init__(self) -> None:
        self.state = Copy()
        self.flows = Copy()
        self.before = Listing()
        self.closing: wire.Close | None = None
        self.reception = uuid.uuid4().hex
        self.rest: Callable[[], None] | None = None
