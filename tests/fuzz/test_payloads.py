"""Any payload, and any sequence of calls, is executed or refused in one line, and what is stored can be rendered."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fuzz import payload_grammar as grammar
from fuzz.payload_grammar import Call, Place
from fuzz.payload_laws import done, play, take_details, take_file
from netloom.commands import TABLE, decode


@pytest.mark.parametrize("kind", sorted(grammar.scalar_types(), key=str), ids=lambda it: str(it.__name__))
def test_the_grammar_has_valid_values_of_every_type(kind: Any) -> None:
    """If this fails for a new type: add values of it to ``payload_grammar.POOL``."""
    found: list[bool] = []

    @settings(max_examples=100, database=None)
    @given(grammar.values(kind))
    def draw(value: object) -> None:
        found.append(grammar.accepts(kind, json.loads(json.dumps(value))))

    draw()
    assert sum(found) > len(found) // 2


@pytest.mark.parametrize("command", sorted(TABLE))
def test_the_grammar_has_every_field_of_a_command_and_most_payloads_are_valid(command: str) -> None:
    place = grammar.PLACES["net-204" if "network_id" in TABLE[command].payload.__struct_fields__ else "vpc-7"][0]
    seen: set[str] = set()
    valid: list[bool] = []

    @settings(max_examples=150, database=None)
    @given(grammar.payloads(command, place))
    def draw(payload: dict[str, object]) -> None:
        seen.update(payload)
        valid.append(done(lambda: decode(command, grammar.as_json(payload))) is not None)

    draw()
    assert {it.encode_name for it in msgspec.structs.fields(TABLE[command].payload)} <= seen
    assert sum(valid) > len(valid) // 3


@settings(max_examples=300)
@given(grammar.walks())
def test_any_sequence_of_calls_is_executed_or_refused_in_one_line(walk: tuple[str, list[tuple[Call, Place]]]) -> None:
    event(f"{min(len(play(walk)), 6)} calls changed the scope")


@settings(max_examples=300)
@given(st.sampled_from(grammar.REAL), st.data())
def test_a_real_payload_file_with_hostile_values_is_executed_or_refused(
    real: tuple[str, dict[str, object]], data: st.DataObject
) -> None:
    command, file = real
    take_file(command, grammar.as_json(data.draw(grammar.spoilt(file)), ascii_only=data.draw(st.booleans())))


DETAILS = st.sampled_from(["host", "epoch", "namespace", "previous"])


@settings(max_examples=100)
@given(st.recursive(st.sampled_from(grammar.HOSTILE), lambda it: st.dictionaries(DETAILS, it)))
def test_stored_details_are_never_a_failure(details: object) -> None:
    take_details(json.dumps(details))
