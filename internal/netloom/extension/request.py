"""A call whose payload has been checked: the message for the agent, and the facts that choose the host."""

from __future__ import annotations

import msgspec

from netloom.commands.table import check_payload, only_removes, row_of
from netloom.extension.hostkeys import parse_pins
from netloom.extension.registration import registration
from netloom.protocol.envelope import PhysicalDetails, StoredDetails, parse_current_details, read_envelope, scope_id_of
from netloom.protocol.network import EnsureNetworkDevice
from netloom.protocol.reader import dump
from netloom.wire import Call


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A checked call.

    ``stored``: the host that CloudStack remembers, and what we stored with it. ``vlan``: the segment in the payload.
    ``installs``: whether the program is installed or upgraded on hosts that the call asks. ``only_removes``: see
    commands/table.py. ``ends``: an ensure-network-device before the end of the network.
    """

    details: PhysicalDetails
    stored: StoredDetails
    call: Call
    vlan: str = ""
    installs: bool = False
    only_removes: bool = False
    ends: bool = False

    @property
    def scope_id(self) -> str:
        return self.call.scope_id


def check(command: str, payload_file: bytes, executable: str, call_id: str) -> Request:
    """Checks all that can be checked without a host. ``payload_file`` is parsed once, and written once into the Call.

    Raises BadRequest; nothing was changed then.
    """
    kind = row_of(command).kind  # report an unknown command before looking at the payload
    envelope = read_envelope(payload_file, command)
    payload_text = dump(envelope.payload)  # guard: registration-does-not-cross-the-wire
    payload = check_payload(command, envelope.payload)
    parse_pins(envelope.details.hostkeys)  # report a misspelt pin now, not when its host is first asked
    stored = envelope.network_details
    removes = only_removes(command, payload)
    installs = kind == "builds" and not removes
    ends = False
    if isinstance(payload, EnsureNetworkDevice):
        ends = payload.is_ending
        current = parse_current_details(payload.current_details)
        stored = current if current.host else stored
        # CloudStack sends it before removals, too. A stored host stays the host, whatever it has: only look.
        installs = not stored.host and not payload.is_ending  # guard: placing-for-a-removal-installs-nothing
    return Request(
        details=envelope.details,
        stored=stored,
        call=Call(
            call_id=call_id,
            command=command,
            scope_id=scope_id_of(command, envelope.payload),
            registration=registration(envelope.details, executable),
            payload=payload_text,
            epoch=stored.epoch,
        ),
        vlan=str(getattr(payload, "vlan", "")),
        installs=installs,
        only_removes=removes,
        ends=ends,
    )
