"""The check of a call before any host is asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from netloom import wire
from netloom.commands import decode
from netloom.extension.request import check
from netloom.protocol import reader

PAYLOADS = Path(__file__).parents[1] / "payloads"
INDEX = json.loads((PAYLOADS / "index.json").read_text())


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row["file"])
def test_a_payload_file_is_parsed_once(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller parses the file and the JSON text in its ``current_details`` once, and the agent its payload once.

    All of them have the spelling that the fast parser takes.
    """
    parsed: Counter[str] = Counter()

    def parse(text: bytes) -> Any:
        parsed[text.decode()] += 1
        return msgspec.json.decode(text)

    counted = SimpleNamespace(**vars(msgspec) | {"json": SimpleNamespace(decode=parse, encode=msgspec.json.encode)})
    monkeypatch.setattr(reader, "msgspec", counted)
    monkeypatch.setattr(reader, "json", None)
    file = (PAYLOADS / row["file"]).read_bytes()
    request = check(row["command"], file, "/ext/net/net.sh", "id-1")
    inner = {json.loads(file)["payload"]["current_details"]} if row["command"] == "ensure-network-device" else set()
    assert parsed == dict.fromkeys({file.decode()} | inner, 1)

    parsed.clear()
    decode(row["command"], request.call.payload)
    assert parsed == {request.call.payload.decode(): 1}


def test_a_call_has_the_fields_of_the_payload_and_no_secret() -> None:
    file = {
        "physical-network-extension-details": {"hosts": "h1", "password": "hunter2", "physicalnetworkname": "p"},
        "network-extension-details": {"host": "h9"},
        "payload": {"network_id": "204", "vlan": "", "novelty": {"x": None, "y": [1.10, "\u00e9"]}},
    }
    request = check("shutdown-network", json.dumps(file).encode(), "/ext/net/net.sh", "id-1")
    assert request.call.payload == '{"network_id":"204","novelty":{"y":[1.1,"\u00e9"]}}'.encode()
    assert (request.scope_id, request.stored.host, request.call.registration.owner) == ("net-204", "h9", "net/p")
    assert b"hunter2" not in wire.encode(request.call)


@pytest.mark.parametrize(
    ("file", "installs"),
    [
        ("010-isolated-ensure-first", True),
        ("012-isolated-ensure-implemented", False),  # its host is stored
        ("130-isolated-ensure-before-destroy", False),
        ("120-isolated-ensure-shutdown", False),
        ("131-isolated-destroy-network", False),
        ("126-isolated-shutdown-network", False),
        ("123-isolated-apply-fw-rules-shutdown", False),
        ("237-vpc-shutdown-vpc-nothing-stored", False),
        ("104-isolated-remove-dhcp-entry-network-shut", False),
        ("500-custom-action-network", False),
        ("020-isolated-implement-network", True),
        ("301-shared-prepare-nic", True),
    ],
)
def test_only_calls_that_build_install(file: str, installs: bool) -> None:
    command = next(row["command"] for row in INDEX if row["file"] == f"{file}.json")
    request = check(command, (PAYLOADS / f"{file}.json").read_bytes(), "/ext/net/net.sh", "id-1")
    assert request.installs == installs
