"""The targets of fuzzing: name to a function that takes any bytes. It raises an exception for a fault of the program.

``make fuzz`` runs them with atheris. Tests run the files of ``corpus/<target>/`` through them.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from fuzz import guest_targets, netlink_targets, payload_grammar, wire_targets
from fuzz.payload_grammar import Call, Place
from fuzz.payload_laws import play, take_details, take_file, take_state
from netloom.agent.scopes.store import Store

Target = Callable[[bytes], None]

CORPUS = Path(__file__).with_name("corpus")


def take_payload(data: bytes) -> None:
    """A payload file. The first line is the command."""
    command, _, file = data.partition(b"\n")
    take_file(command.decode("ascii", "replace"), file)


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(payload_grammar.walks(20))
def _play(walk: tuple[str, list[tuple[Call, Place]]]) -> None:
    play(walk)


def take_calls(data: bytes) -> None:
    """The bytes choose a sequence of calls by the grammar."""
    fuzz_one_input: Callable[[bytes], object] = _play.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    fuzz_one_input(data)


def take_current_details(data: bytes) -> None:
    """The details that CloudStack stored."""
    take_details(data.decode("utf-8", "surrogateescape"))


@functools.cache
def _store() -> tuple[tempfile.TemporaryDirectory[str], Store]:
    directory = tempfile.TemporaryDirectory()
    return directory, Store(directory.name)


def take_state_file(data: bytes) -> None:
    """A damaged state file."""
    directory, store = _store()
    Path(directory.name, "net-204.json").write_bytes(data)
    take_state(data, lambda _: store.load("net-204"))


TARGETS: dict[str, Target] = {
    "payload": take_payload,
    "calls": take_calls,
    "details": take_current_details,
    "state-file": take_state_file,
    "host": wire_targets.take_host,
    "caller": wire_targets.take_caller,
    "placement": wire_targets.take_placement,
    "claim": wire_targets.take_claim,
    "heartbeat": wire_targets.take_heartbeat,
    "pair": wire_targets.take_pair,
    "helper": wire_targets.take_helper,
    "helper-client": wire_targets.take_helper_client,
    "guest-process": guest_targets.take_guest_process,
    "agent": guest_targets.take_agent,
    "dhcp": guest_targets.take_datagram,
    "metadata": guest_targets.take_metadata_requests,
    "password": guest_targets.take_password_requests,
    "netlink-object": netlink_targets.take_object,
    "netlink-answer": netlink_targets.take_answer,
    "netlink-event": netlink_targets.take_events,
}


def corpus(target: str) -> list[Path]:
    """The inputs of a target that are kept."""
    return sorted((CORPUS / target).glob("*"))


_HTTP = (
    *("GET ", "HEAD ", "POST ", " HTTP/1.1\r\n", "HTTP/1.0", "Host: x\r\n", "Content-Length: ", "chunked\r\n", "//"),
    *("Transfer-Encoding: ", "Connection: close\r\n", "Expect: 100-continue\r\n", "/latest/", "meta-data/", "%2e"),
    *("DomU_Request: send_my_password\r\n", "DomU_Request: saved_password\r\n", "\r\n\r\n"),
)
_WIRE = payload_grammar.words("type hello call reply call_id status output payload registration")
_PAIR = payload_grammar.words(
    "type greets holds scopes state data stored wanted gone digest flows create delete token ping"
)
_GUEST_WIRE = payload_grammar.words("type seq serve update drop lend ping done lent taken notice listeners network")


def tokens(target: str) -> list[bytes]:
    """Words that a fuzzer inserts: fields, words and values of the protocol, of our messages, and of HTTP."""
    words: dict[tuple[str, ...], Iterable[str]] = {
        ("payload", "details"): _words_of_payloads(),
        ("metadata", "password"): _HTTP,
        ("helper", "helper-client"): payload_grammar.words("beat doing answer nan inf 1e999 30"),
        ("host", "caller"): _WIRE,
        ("guest-process", "agent"): _GUEST_WIRE,
        ("pair",): _PAIR,
    }
    return [it.encode("utf-8", "surrogatepass") for names, own in words.items() if target in names for it in own]


def _words_of_payloads() -> list[str]:
    fields = {place[-1] for _, file in payload_grammar.REAL for place in payload_grammar.places_in(file) if place}
    values = (*payload_grammar.POOL, *payload_grammar.HOSTILE, *(it for it in fields if isinstance(it, str)))
    return sorted({text for it in values if len(text := json.dumps(it)) < 60})
