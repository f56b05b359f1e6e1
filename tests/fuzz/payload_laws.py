"""What must hold for any payload and for any sequence of calls on one scope (docs/invariants.md: 3, 4, 5, 17, 32)."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from fuzz.payload_grammar import INTRUDER_MARK, INTRUDERS, PLACES, SECRET_MARK, Call, Place, hostile_texts
from netloom.commands import Context, apply, check_payload, decode
from netloom.errors import NetloomError
from netloom.plan.have import Have, HostLink
from netloom.plan.plan import plan
from netloom.protocol.envelope import parse_current_details, read_envelope, scope_id_of
from netloom.render import flows, ruleset
from netloom.render.guest import tables
from netloom.render.scope import render
from netloom.render.services import services
from netloom.secret import dec_hook, enc_hook
from netloom.state import Scope

T = TypeVar("T")

_NICS = {"eth1": HostLink(name="eth1", up=True, addresses=("192.0.2.11/24",))}
_decoder = msgspec.json.Decoder(Scope, dec_hook=dec_hook)


def stored(scope: Scope | None) -> bytes:
    """The text of a state file."""
    return msgspec.json.encode(scope, enc_hook=enc_hook, order="sorted")


def done(deed: Callable[[], T]) -> T | None:
    """What ``deed`` returns; None if it was refused, in one line without secrets. Raises what is no NetloomError."""
    try:
        return deed()
    except NetloomError as error:
        check_refusal(error)
        return None


def check_refusal(error: NetloomError) -> None:
    """One line of printable ASCII, of bounded length, and without a secret, also in the log's traceback."""
    line = str(error)
    assert line and line.isascii() and line.isprintable() and len(line) <= 2000, line[:200]
    assert error.exit_code in (1, 2, 3)
    assert SECRET_MARK not in line
    assert SECRET_MARK not in "".join(traceback.format_exception(error))


def play(walk: tuple[str, list[tuple[Call, Place]]]) -> list[Scope]:
    """Execute a sequence of calls on a scope that does not exist yet, and check the laws after each of them.

    Returns the scope after each call that changed it.
    """
    scope_id, calls = walk
    scope: Scope | None = None
    after: list[Scope] = []
    hostile: set[str] = set()
    for call, place in calls:
        hostile |= set(hostile_texts(call.payload))
        before, text_before = scope, stored(scope)
        scope = carried_out(scope, call, Context(scope_id=scope_id, registration=place.registration))
        assert stored(before) == text_before, "the call changed the scope before it in place"
        if scope is None or scope is before:
            continue
        check_scope(scope, hostile)
        if before is not None:
            check_change(before, scope)
        after.append(scope)
    return after


def carried_out(scope: Scope | None, call: Call, context: Context) -> Scope | None:
    """The scope after the call; the same object if it was refused or changed nothing."""
    payload = done(lambda: decode(call.command, call.payload))
    if payload is None:
        return scope
    assert SECRET_MARK not in repr(payload)
    outcome = done(lambda: apply(call.command, scope, payload, context))
    if outcome is None:
        return scope
    assert outcome.output.isascii() and len(outcome.output) < 100_000
    again = done(lambda: apply(call.command, outcome.scope, payload, context))
    assert again is not None, "a repeated call is refused"
    assert again.scope == outcome.scope, "a repeated call changes something"
    if scope is None:
        assert outcome.scope is None or outcome.scope.revision == 1
    elif outcome.scope is not None:
        same = replace(outcome.scope, revision=scope.revision) == scope
        assert outcome.scope.revision == scope.revision + (not same)
        return scope if same else outcome.scope
    return outcome.scope


def check_scope(scope: Scope, hostile: set[str]) -> None:
    """It is the same after it was written and read, can be rendered and planned, and shows no secret."""
    loaded = _decoder.decode(stored(scope))
    assert loaded == scope
    assert SECRET_MARK not in repr(replace(scope, networks={}))
    want = render(scope)
    assert render(loaded) == want
    host = Have(scope_id=scope.scope_id, namespace=want.namespace, host_links=_NICS)
    steps = done(lambda: plan(host, want))  # refused: a network without a VLAN on a NIC that the host itself uses
    assert steps is None or steps == plan(host, render(loaded))
    assert flows.flow_check(scope, loaded) == "none"
    texts = configurations(scope)
    assert configurations(loaded) == texts
    for table in tables(scope):
        assert SECRET_MARK not in repr([(it.nic, it.password, it.user_data, it.options) for it in table.nics])
    for name, text in texts.items():
        check_configuration(name, text, hostile)


def check_change(before: Scope, after: Scope) -> None:
    """Any ruleset can be replaced by the next one, and any open flow be checked."""
    have, want = render(before), render(after)
    if have.ruleset is not None and want.ruleset is not None:
        assert (ruleset.swap(have.ruleset, want.ruleset) == "") == (have.ruleset == want.ruleset)
    flows.flow_check(before, after)


def configurations(scope: Scope) -> dict[str, str]:
    """Every text that nft, dnsmasq and haproxy get, by its name."""
    want = render(scope)
    texts = {"ruleset.nft": ruleset.fresh(want.ruleset)} if want.ruleset is not None else {}
    for service in services(scope):
        texts[f"{service.name} argv"] = "\n".join(service.argv)
        for name, text in (*service.config.items(), *service.watched_files.items()):
            texts[f"{service.name}/{name}"] = text
            assert "/" not in name and name not in ("", ".", ".."), name
    return texts


def check_configuration(name: str, text: str, hostile: set[str]) -> None:
    """Plain ASCII, without secrets, and without a text that tries to leave its place."""
    assert text.isascii() and text.replace("\n", "").replace("\t", "").isprintable(), name
    assert SECRET_MARK not in text, name
    if INTRUDER_MARK in text:
        assert [it for it in hostile if it in text] == [], name


# ---- whole payload files


def take_file(command: str, data: bytes) -> None:
    """Read a payload file as the management server does, and execute it as the agent does, on nothing."""
    envelope = done(lambda: read_envelope(data, command))
    if envelope is None:
        return
    assert SECRET_MARK not in repr(envelope.details)
    scope_id = done(lambda: scope_id_of(command, envelope.payload))
    asked = done(lambda: check_payload(command, envelope.payload))
    if scope_id is None or asked is None:
        return
    registration = PLACES["net-204"][0].registration
    outcome = done(lambda: apply(command, None, asked, Context(scope_id=scope_id, registration=registration)))
    if outcome is not None and outcome.scope is not None:
        check_scope(outcome.scope, {it for it in INTRUDERS if json.dumps(it)[1:-1].encode() in data})


def take_details(text: str) -> None:
    """Details that CloudStack stored, and anything else, are read or count as unknown."""
    found = parse_current_details(text, "net-204")
    assert found.epoch >= 0 and all(it.isascii() for it in (found.host, *found.previous))


def take_state(data: bytes, load: Callable[[bytes], Any]) -> None:
    """A damaged state file is refused, or is a scope that can be rendered or is refused then."""
    scope = done(lambda: load(data))
    if scope is not None:
        assert _decoder.decode(stored(scope)) == scope
