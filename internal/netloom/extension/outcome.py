"""The output of a call, and the error that an agent's reply stands for. Pure functions."""

from __future__ import annotations

import json

from netloom import names
from netloom.commands.actions import bounded_output
from netloom.commands.network import broadcast_domain
from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.extension.placement import Unplaced, Use
from netloom.extension.request import Request
from netloom.protocol.envelope import StoredDetails
from netloom.wire import Reply

# The width of CloudStack's database column for the output of ensure-network-device; it does not store a longer text.
DETAILS_CHARACTERS_MAX = 1023


def ensured(stored: StoredDetails, placed: Use | Unplaced, scope_id: str, standby: str = "") -> str:
    """The output of ensure-network-device, without a newline: one JSON object that replaces the stored details.

    The same facts give the same text, because CloudStack writes to its database when the text differs. ``standby``: the
    host that stands by for the scope; empty: none. ``previous`` are the hosts that the scope left and that may still
    have it; those that do not fit are left out, oldest first.
    """
    details: dict[str, object] = {"host": placed.host, "namespace": names.namespace(scope_id)}
    if scope_id.startswith("vpc-"):
        details["vpc_id"] = scope_id.removeprefix("vpc-")
    if placed.epoch:
        details["epoch"] = placed.epoch
    if standby:
        details["standby"] = standby
    left = (*stored.previous, *placed.left)
    previous = list(dict.fromkeys(it for it in left if it not in (placed.host, standby)))
    while True:
        kept = {**details, "previous": ",".join(previous)} if previous else details
        text = json.dumps(kept, separators=(",", ":"))
        if len(text) <= DETAILS_CHARACTERS_MAX or not previous:
            return text
        previous = previous[1:]


def printed(request: Request, reply: Reply) -> str:
    """The output of a call that succeeded.

    CloudStack interprets the output of implement-network, so it is computed here and never taken from a host. Only the
    output of a custom action is the host's: printable text of bounded length. Other commands print nothing.
    """
    command = request.call.command
    if command == "implement-network":
        return broadcast_domain(request.vlan, request.call.registration.broadcast)
    if command == "custom-action":
        return bounded_output(reply.output)
    return ""  # guard: a-hosts-text-is-not-printed


def error_in(host: str, reply: Reply) -> NetloomError | None:
    """The error of a reply, with the host's name and the agent's exit status; None when the call succeeded."""
    if not reply.status:
        return None
    kind: type[NetloomError] = {1: BadRequest, 2: HostUnreachable}.get(reply.status, HostRefused)
    return kind(f"{host}: {reply.error or 'the agent failed and did not say why'}", hint=reply.hint)
