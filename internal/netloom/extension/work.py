"""One call, carried out: check it, find the host, send it, and what to print.

The same code for the process that CloudStack started and for a helper that lives longer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from netloom.commands.table import decode, row_of
from netloom.extension.call import Story
from netloom.extension.deadline import Deadline
from netloom.extension.hostkeys import parse_pins
from netloom.extension.registration import registration
from netloom.protocol.envelope import Envelope, StoredDetails, parse_current_details, read_envelope, scope_id_of
from netloom.protocol.network import EnsureNetworkDevice
from netloom.wire import Call

if TYPE_CHECKING:
    from netloom.extension.hosts import Pool

_RESOLVING_MAX = 32


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """A call that has been checked: to whom it may go, and what it says."""

    envelope: Envelope
    stored: StoredDetails
    call: Call

    @property
    def scope_id(self) -> str:
        return self.call.scope_id


def prepare(command: str, payload: bytes, executable: str, call_id: str) -> Errand:
    """Check everything that can be checked without a host. Raises BadRequest; nothing was touched then."""
    row_of(command)  # an unknown word is told as such, whatever the file holds
    envelope = read_envelope(payload, command)
    asked = decode(command, envelope.payload)
    parse_pins(envelope.details.hostkeys)  # a misspelt pin is told now, whichever host is asked
    stored = envelope.network_details
    if isinstance(asked, EnsureNetworkDevice):
        current = parse_current_details(asked.current_details)
        stored = current if current.host else stored
    return Errand(
        envelope=envelope,
        stored=stored,
        call=Call(
            call_id=call_id,
            command=command,
            scope_id=scope_id_of(command, envelope.payload),
            registration=registration(envelope.details, executable),
            payload=envelope.payload,
        ),
    )


def carry_out(command: str, payload: bytes, deadline: Deadline, executable: str, story: Story) -> str:
    """What the call prints. Raises NetloomError with the exit status."""
    loop = asyncio.new_event_loop()
    resolve_in_threads(loop)
    # Neither loop nor threads are closed: that would wait for a resolver, and the process ends next anyway.
    return loop.run_until_complete(carried_out(command, payload, deadline, executable, story, os.environ, None))


async def carried_out(
    command: str,
    payload: bytes,
    deadline: Deadline,
    executable: str,
    story: Story,
    environ: Mapping[str, str],
    pool: Pool | None,
) -> str:
    """The same inside a loop; ``pool`` has the channels of earlier calls. None: this one is alone."""
    story.doing = "checking the payload"
    errand = prepare(command, payload, executable, story.call_id)
    story.scope_id = errand.scope_id
    story.doing = "loading SSH"
    from netloom.extension.dispatch import dispatch  # asyncssh: twenty bare start-ups, and a bad payload needs none
    from netloom.extension.hosts import Pool  # the same

    story.doing = f"asking {', '.join(errand.envelope.details.candidates)}"
    return await dispatch(errand, deadline, environ, story, pool or Pool())


def resolve_in_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Let a resolver that hangs for one host keep no other waiting."""
    loop.set_default_executor(ThreadPoolExecutor(_RESOLVING_MAX))
