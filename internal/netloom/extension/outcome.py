"""What a call prints, and what a reply of the agent means for it. Values and text; nothing is written here."""

from __future__ import annotations

import json

from netloom import names
from netloom.commands.table import row_of
from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.protocol.envelope import StoredDetails
from netloom.wire import Reply

# The width of CloudStack's column for what ensure-network-device prints; a longer text is never stored.
DETAILS_CHARACTERS_MAX = 1023


def ensured(stored: StoredDetails, host: str, scope_id: str) -> str:
    """What ensure-network-device prints, without a newline: one JSON object that replaces what was stored.

    Always the same text for the same facts, for CloudStack writes to its database when the text differs. What we
    stored about an earlier move goes on; what does not fit any more is left out, oldest first.
    """
    details: dict[str, object] = {"host": host, "namespace": names.namespace(scope_id)}
    if scope_id.startswith("vpc-"):
        details["vpc_id"] = scope_id.removeprefix("vpc-")
    if stored.epoch:
        details["epoch"] = stored.epoch
    previous = [left for left in stored.previous if left != host]
    while True:
        kept = {**details, "previous": ",".join(previous)} if previous else details
        text = json.dumps(kept, separators=(",", ":"))
        if len(text) <= DETAILS_CHARACTERS_MAX or not previous:
            return text
        previous = previous[1:]


def printed(command: str, reply: Reply) -> str:
    """What goes to stdout after a call that the agent carried out: nothing, where the protocol defines no result."""
    row = row_of(command)
    return reply.output if row.output is not None else ""


def failure(host: str, reply: Reply) -> NetloomError | None:
    """The error that a reply stands for: with the host's name, the agent's sentence and its exit status."""
    if not reply.status:
        return None
    kind: type[NetloomError] = {1: BadRequest, 2: HostUnreachable}.get(reply.status, HostRefused)
    return kind(f"{host}: {reply.error or 'the agent failed and did not say why'}", hint=reply.hint)
