"""Stories: sequences of the client's payload files, with the changes of the state that each of them causes.

``payloads/<story>.txt`` has the changes. ``UPDATE_GOLDEN=1 pytest tests/golden`` writes these files again. Read the
difference before you commit it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from golden.rendered import GOLDEN, UPDATE
from netloom.errors import NetloomError
from netloom.secret import enc_hook
from netloom.state import Scope
from unit.payload_player import PAYLOADS, play

INDEX = {it["file"][:3]: it for it in json.loads((PAYLOADS / "index.json").read_text())}
VALUE_CHARACTERS_MAX = 90
BESIDE = ("scope_id", "owner", "schema", "revision", "placement", "uplinks")

# Each story starts without a state.
STORIES = {
    "isolated-first-vm": "020 021 022 024 030 031 032 033 034 035 020",
    "isolated-vms": "020 030 032 034 035 100 036 039 040 041 037 090 091 092 093 600 102 101 037 038",
    "isolated-restart": "020 021 023 110 111 051 137 138",
    "isolated-addresses": "020 021 050 053 054 055 052 056 057 058 059 060",
    "isolated-firewall": "020 021 050 022 070 071 073 072",
    "isolated-balanced": "020 021 050 080 081 084 082 085 083 086",
    "isolated-end": "020 021 050 054 057 058 070 080 121 122 123 124 125 126 131 132",
    "isolated-ends-otherwise": "020 127 136 128 103 104 132",
    "isolated-after-failover": "139 051 053",
    "isolated-without-source-nat": "140",
    "isolated-without-an-address": "141",
    "vpc": "203 210 211 212 217 220 221 222 223 224 225 226 227 228 230 229 231 213 214 215 216 232 233 235",
    "vpc-with-an-address": "202 210 225 234 204 236",
    "vpc-torn-down-with-its-tiers": "202 210 238 237",
    "vpc-after-failover": "220 211 212",
    "shared": "301 302 303 304 305 306 310 311 312 313 316",
    "shared-two-ranges": "301 303 305 307 308 309 311 312 313 314 315 316",
    "shared-begun-by-a-restart": "314 315 312",
    "shared-untagged": "317",
    "shared-private-vlan": "318",
    "l2": "320",
    "ipv6": "401 402 403 404 405 406 408 407",
    "ipv6-only-shared": "409",
    "reservation-outside": "700 701 702 703 704 705 706 707 708",
    "reservation-inside": "710 711 712 713 714 715 716 710",
    "source-nat-moves": "020 021 050 054 720 721 056",
    "vpc-source-nat-moves": "202 210 211 225 722 723 724",
    "restart-brings-rules-before-their-addresses": "730 731 732 733 734 735",
    "balanced-whole-lists": "020 021 050 740 741",
    "restore-with-unknown-data": "020 024 035 750 760 761",
}


def flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, it in value.items():
            yield from flat(it, (*path, key))
    else:
        text = json.dumps(value, ensure_ascii=True)
        yield path, text if len(text) <= VALUE_CHARACTERS_MAX else f"{text[:VALUE_CHARACTERS_MAX]}... ({len(text)})"


def document(scope: Scope | None) -> dict[tuple[str, ...], str]:
    """The state as paths and values, without the values that every new network has."""
    plain = json.loads(msgspec.json.encode(scope, enc_hook=enc_hook)) if scope is not None else {}
    values = dict(flat({key: it for key, it in plain.items() if key not in BESIDE}))
    bare = {"null", "false", '""', "[]", "{}"}
    # In these fields an empty value is information, because "not set" has another value.
    meaningful = {"default_egress_allow": {"false"}, "acl": {"[]"}}
    return {path: value for path, value in values.items() if value not in bare - meaningful.get(path[-1], set())}


def difference(before: Scope | None, after: Scope | None) -> list[str]:
    """Added, changed and removed values. If everything below a path was removed, only the path is listed."""
    had, has = document(before), document(after)
    lines = [f"    + {'.'.join(path)} = {has[path]}" for path in has.keys() - had.keys()]
    lines += [
        f"    ~ {'.'.join(path)} = {had[path]} -> {has[path]}"
        for path in had.keys() & has.keys()
        if had[path] != has[path]
    ]
    left = {path[:length] for path in has for length in range(len(path))}
    for path in had.keys() - has.keys():
        whole = next((path[:length] for length in range(len(path)) if path[:length] not in left), path)
        lines.append(f"    - {'.'.join(whole)}" if whole != path else f"    - {'.'.join(path)} = {had[path]}")
    lines = sorted(set(lines), key=lambda line: line[6:])
    if before is None and after is not None:
        return ["    (the scope begins)", *lines]
    if before is not None and after is None:
        return ["    (the scope ends)"]
    return lines or ["    (nothing changes)"]


def changes(story: str) -> str:
    scope: Scope | None = None
    lines = []
    for number in STORIES[story].split():
        lines.append(f"{INDEX[number]['file'].removesuffix('.json')}")
        try:
            after = play(scope, number).scope
        except NetloomError as refused:
            lines.append(f"    (refused: {refused})")
            continue
        lines += difference(scope, after)
        scope = after
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("story", STORIES)
def test_payload_story_matches_the_golden_file(story: str) -> None:
    file = GOLDEN / "payloads" / f"{story}.txt"
    if UPDATE:
        file.write_text(changes(story))
    assert file.read_text() == changes(story), f"{file}: UPDATE_GOLDEN=1 writes it again"


def test_every_payload_is_in_a_story() -> None:
    elsewhere = {number for number, it in INDEX.items() if it["command"] in ("ensure-network-device", "custom-action")}
    assert {it for story in STORIES.values() for it in story.split()} == INDEX.keys() - elsewhere


@pytest.mark.parametrize("story", STORIES)
def test_repeating_each_call_of_a_story_changes_nothing(story: str) -> None:
    """CloudStack repeats calls. Each call is sent twice; the second changes nothing."""
    scope: Scope | None = None
    for number in STORIES[story].split():
        try:
            once = play(scope, number)
        except NetloomError:
            continue
        assert play(once.scope, number).scope == once.scope, number
        scope = once.scope
