"""The connection between two hosts: messages, the proof of the secret, and records that nobody else can make."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom import pairwire
from netloom.agent.standby.sealing import AesGcm, Agreement
from netloom.pairwire import (
    ANSWER_BYTES,
    HELD_AT_ONCE,
    HELLO_BYTES,
    PART_BYTES_MAX,
    PROOF_BYTES,
    Digest,
    Flows,
    FlowsBegin,
    FlowsEnd,
    FlowsWanted,
    Gone,
    GoneDone,
    Held,
    Holds,
    HoldsWanted,
    PairError,
    PairMessage,
    Ping,
    Reader,
    Sealer,
    State,
    Stored,
    Wanted,
    answer,
    decode,
    encode,
    group_of,
    hello,
    holds,
    is_answer,
    is_hello,
    is_proof,
    keys,
    nonce_in,
    parts,
    proof,
    secret_bytes,
)
from netloom.secret import Secret

SECRET, OTHER_SECRET, KEY = bytes(range(32)), bytes(32), b"k" * 32
GROUP = 0x0A0B0C0D
MESSAGES: tuple[PairMessage, ...] = (
    Holds(scopes=(Held("net-204", 2, 1, 9), Held("vpc-1", 1, 0, 4)), more=True),
    State(scope_id="net-204", epoch=2, joined=1, revision=9, data=b"{}"),
    Stored(scope_id="net-204", revision=9, error="no space left"),
    Wanted(scope_ids=("net-204",)),
    Gone(scope_id="net-204"),
    HoldsWanted(),
    GoneDone(scope_id="net-204"),
    Digest(scope_id="net-204", revision=9, digest=b"\1\2"),
    Flows(scope_id="net-204", create=b"\0" * 30, delete=b"\1" * 30),
    FlowsBegin(scope_id="net-204", token=7),
    FlowsEnd(scope_id="net-204", token=7),
    FlowsWanted(scope_id="net-204"),
    Ping(),
)


def records(*messages: PairMessage, key: bytes = KEY) -> list[bytes]:
    sealer = Sealer(AesGcm(key))
    return [sealer.seal(part) for message in messages for part in parts(encode(message))]


def reader(key: bytes = KEY, limit: int = pairwire.MESSAGE_BYTES_MAX) -> Reader:
    return Reader(AesGcm(key), limit)


# ---- messages


def test_every_message_is_read_as_it_was_sent() -> None:
    assert {type(it) for it in MESSAGES} == set(PairMessage.__args__)
    assert [decode(encode(it)) for it in MESSAGES] == list(MESSAGES)


def test_messages_and_fields_of_newer_builds_are_ignored() -> None:
    packed = msgspec.msgpack.encode
    assert decode(packed({"type": "novelty", "x": [1]})) is None
    assert decode(packed({"type": "ping", "novelty": 1})) == Ping()


@pytest.mark.mutation("a-pair-message-is-any-bytes")
@given(st.binary(max_size=200), st.sampled_from(MESSAGES), st.integers(0, 200))
def test_any_bytes_are_a_message_or_refused(data: bytes, message: PairMessage, at: int) -> None:
    whole = encode(message)
    for it in (data, whole[:at] + data + whole[at + len(data) :], b"\xc1", b"\x91" * 100_000):
        try:
            decode(it)
        except PairError:
            continue


def test_a_known_message_without_its_fields_is_refused() -> None:
    wrong: list[object] = [{"type": "stored", "scope_id": "n"}, {"type": 1}, {}, [], {"type": "gone", "scope_id": 1}]
    for damaged in wrong:
        with pytest.raises(PairError):
            decode(msgspec.msgpack.encode(damaged))


@pytest.mark.parametrize("count", [0, 1, HELD_AT_ONCE, HELD_AT_ONCE + 1, 3 * HELD_AT_ONCE])
def test_many_scopes_are_named_in_several_messages(count: int) -> None:
    scopes = [Held(f"net-{at}", 1, 0, at) for at in range(count)]
    messages = holds(scopes)
    assert [scope for it in messages for scope in it.scopes] == scopes
    assert [it.more for it in messages] == [True] * (len(messages) - 1) + [False]
    assert len(messages) == max(1, -(-count // HELD_AT_ONCE))


def test_a_state_is_not_shown() -> None:
    state = State(scope_id="net-204", epoch=1, joined=0, revision=3, data=b"hunter2")
    assert repr(state) == "State(net-204, epoch 1, revision 3, 7 bytes)"


# ---- authentication


def handshake(secret: bytes = SECRET) -> tuple[bytes, bytes, bytes]:
    said = hello(secret, GROUP, os.urandom(32))
    answered = answer(secret, said, os.urandom(32))
    return said, answered, proof(secret, said, answered)


def test_both_ends_prove_the_secret_and_have_the_same_keys() -> None:
    second, first = Agreement(), Agreement()
    said = hello(SECRET, GROUP, second.nonce)
    answered = answer(SECRET, said, first.nonce)
    proved = proof(SECRET, said, answered)
    assert (len(said), len(answered), len(proved)) == (HELLO_BYTES, ANSWER_BYTES, PROOF_BYTES)
    assert HELLO_BYTES <= 64
    assert group_of(said) == GROUP
    assert is_hello(SECRET, said) and is_answer(SECRET, said, answered) and is_proof(SECRET, said, answered, proved)
    agreed = first.agreed(nonce_in(said))
    assert agreed == second.agreed(nonce_in(answered))
    found = keys(SECRET, said, answered, agreed)
    assert found.of_first != found.of_second
    assert [len(it) for it in found] == [32, 32]


@pytest.mark.parametrize("nonce", [bytes(32), b"\1" + bytes(31), b"", bytes(31)], ids=["0", "1", "none", "short"])
def test_a_nonce_that_is_no_public_key_is_refused(nonce: bytes) -> None:
    """With such a nonce the keys would not depend on what the other end has chosen."""
    with pytest.raises(PairError):
        Agreement().agreed(nonce)


def test_each_connection_has_other_keys() -> None:
    said, answered, _ = handshake()
    known = {
        *keys(SECRET, said, answered, bytes(32)),
        *keys(SECRET, said, answered, b"\1" * 32),
        *keys(OTHER_SECRET, said, answered, bytes(32)),
        *keys(SECRET, *handshake()[:2], bytes(32)),
    }
    assert len(known) == 8


def test_another_secret_proves_nothing() -> None:
    said, answered, proved = handshake()
    assert not is_hello(OTHER_SECRET, said)
    assert not is_answer(OTHER_SECRET, said, answered)
    assert not is_proof(OTHER_SECRET, said, answered, proved)


def test_what_was_said_in_another_connection_proves_nothing() -> None:
    said, answered, proved = handshake()
    other_said, other_answered, _ = handshake()
    assert not is_answer(SECRET, other_said, answered)
    assert not is_proof(SECRET, said, other_answered, proved)
    assert not is_proof(SECRET, said, answered, answered[-PROOF_BYTES:])
    assert not is_proof(SECRET, said, answered, said[-PROOF_BYTES:])


@given(st.integers(0, HELLO_BYTES - 1), st.integers(1, 255))
def test_a_changed_handshake_is_refused(at: int, by: int) -> None:
    said, answered, proved = handshake()

    def changed(data: bytes) -> bytes:
        place = at % len(data)
        return data[:place] + bytes((data[place] ^ by,)) + data[place + 1 :]

    assert not is_hello(SECRET, changed(said))
    assert not is_answer(SECRET, said, changed(answered))
    assert not is_answer(SECRET, changed(said), answered)
    assert not is_proof(SECRET, said, answered, changed(proved))
    assert not is_proof(SECRET, changed(said), answered, proved)


@given(st.binary(max_size=80))
def test_any_bytes_are_no_handshake(data: bytes) -> None:
    said, answered, _ = handshake()
    assert not is_hello(SECRET, data)
    assert not is_answer(SECRET, said, data)
    assert not is_proof(SECRET, said, answered, data)


def test_a_newer_host_is_answered_with_the_version_of_the_older_one() -> None:
    said = hello(SECRET, GROUP, bytes(32), version=pairwire.VERSION + 3)
    assert is_hello(SECRET, said)
    answered = answer(SECRET, said, bytes(32))
    assert answered[7] == pairwire.VERSION
    assert is_answer(SECRET, said, answered)
    for version in (0, pairwire.VERSION + 4):
        assert not is_answer(SECRET, said, answered[:7] + bytes((version,)) + answered[8:])


def test_a_secret_has_32_bytes_and_an_error_does_not_quote_it() -> None:
    assert secret_bytes(Secret(SECRET.hex())) == SECRET
    for wrong in ("", "12" * 31, "12" * 33, "hunter2"):
        with pytest.raises(ValueError, match="64 hexadecimal digits") as raised:
            secret_bytes(Secret(wrong))
        assert "hunter2" not in str(raised.value)


# ---- records


@given(st.integers(1, 400))
def test_messages_arrive_in_pieces_of_any_size(size: int) -> None:
    whole, receiver = b"".join(records(*MESSAGES)), reader()
    found = [it for at in range(0, len(whole), size) for it in receiver.feed(whole[at : at + size])]
    assert found == list(MESSAGES)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES_MAX - 60, PART_BYTES_MAX, 5 * PART_BYTES_MAX + 1])
def test_a_state_of_any_size_arrives(size: int) -> None:
    state = State(scope_id="net-204", epoch=1, joined=0, revision=3, data=os.urandom(size))
    assert reader().feed(b"".join(records(Ping(), state, Ping()))) == [Ping(), state, Ping()]


@pytest.mark.mutation("a-record-is-authentic")
@given(st.integers(0, 1 << 12), st.integers(1, 255))
def test_a_changed_record_is_refused(at: int, by: int) -> None:
    (record,) = records(MESSAGES[2])
    at %= len(record)
    receiver = reader()
    with pytest.raises(PairError) as raised:
        receiver.feed(record[:at] + bytes((record[at] ^ by,)) + record[at + 1 :])
        assert at < 4, "a longer length: more is waited for"
        raise PairError("no message")
    assert "cannot be read" not in str(raised.value)


@pytest.mark.mutation("a-record-is-read-once")
def test_a_repeated_record_is_refused() -> None:
    first, second = records(Ping(), Ping())
    receiver = reader()
    assert receiver.feed(first) == [Ping()]
    with pytest.raises(PairError, match="repeated"):
        receiver.feed(first)
    receiver = reader()
    assert receiver.feed(first + second) == [Ping(), Ping()]


@pytest.mark.parametrize(
    "disorder",
    [
        lambda it: [it[1], it[0]],
        lambda it: [it[0], it[2]],
        lambda it: [it[0][:-1] + b"\0", it[1]],
        lambda it: [it[0][:4] + it[1][4:], it[0]],
        lambda it: [(len(it[0]) - 5).to_bytes(4, "big") + it[0][4:-1], it[1]],
        lambda it: [bytes(4), it[0]],
        lambda it: [b"\xff" * 4],
    ],
    ids=["order", "left out", "damaged", "exchanged", "cut", "empty", "long"],
)
def test_records_out_of_order_or_cut_are_refused(disorder: Callable[[list[bytes]], list[bytes]]) -> None:
    with pytest.raises(PairError):
        reader().feed(b"".join(disorder(records(Ping(), Ping(), Ping()))))


def test_records_of_another_key_are_refused() -> None:
    with pytest.raises(PairError):
        reader().feed(records(Ping(), key=b"o" * 32)[0])


@pytest.mark.mutation("a-pair-message-is-bounded")
def test_a_message_that_is_too_long_is_refused_before_it_is_complete() -> None:
    state = State(scope_id="net-204", epoch=1, joined=0, revision=3, data=bytes(4 * PART_BYTES_MAX))
    receiver = reader(limit=2 * PART_BYTES_MAX)
    with pytest.raises(PairError, match="a message of more than"):
        for record in records(state)[:3]:
            receiver.feed(record)


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(PairError, match="unknown kind"):
        reader().feed(Sealer(AesGcm(KEY)).seal(b"\2" + encode(Ping())))
