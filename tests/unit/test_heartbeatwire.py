"""Heartbeats: what is sent is read again; what was changed, cut or made without the secret is nothing."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.claimwire import decode
from netloom.ethernet import PAYLOAD_BYTES_MAX
from netloom.heartbeatwire import (
    HEARTBEAT_BYTES,
    NOBODY,
    PROOF_BYTES,
    SEGMENTS_MAX,
    Beat,
    Echo,
    WireSays,
    from_ethernet,
    group_of,
    in_ethernet,
    key_of,
    pack,
    unpack,
)
from netloom.secret import Secret

SECRET = Secret("5a" * 32)
KEY = key_of(SECRET)
NUMBERS = st.integers(0, (1 << 64) - 1)
ECHOES = st.none() | st.builds(Echo, st.binary(min_size=8, max_size=8).filter(any), NUMBERS)

WIRES = st.builds(WireSays, st.integers(1, (1 << 32) - 1), st.booleans(), st.none() | st.booleans())


@st.composite
def beats(draw: st.DrawFn) -> Beat:
    sender = draw(st.integers(0, 2))
    heard = [None if at == sender else draw(ECHOES) for at in range(3)]
    greeting = [None if at == sender else draw(ECHOES) for at in range(3)]
    return Beat(
        group_id=draw(st.binary(min_size=4, max_size=4)).hex(),
        sender=sender,
        boot=draw(st.binary(min_size=8, max_size=8).filter(any)),
        seq=draw(NUMBERS),
        sent=draw(NUMBERS),
        heard=(heard[0], heard[1], heard[2]),
        greeting=(greeting[0], greeting[1], greeting[2]),
        term=draw(NUMBERS),
        active=draw(st.integers(0, 1)),
        released=draw(st.booleans()),
        voted=draw(NUMBERS),
        grants=draw(st.sampled_from([0, 1, NOBODY])),
        grants_term=draw(NUMBERS),
        wants=draw(NUMBERS),
        ready=draw(st.booleans()),
        wires=tuple(draw(st.lists(WIRES, max_size=SEGMENTS_MAX))),
    )


BEAT = Beat(
    group_id="0000002a",
    sender=1,
    boot=b"bootboot",
    seq=7,
    sent=1 << 40,
    heard=(Echo(b"abcdefgh", 5), None, None),
    greeting=(None, None, Echo(b"ijklmnop", 6)),
    term=2,
    active=0,
    released=False,
    voted=3,
    grants=0,
    grants_term=2,
    wants=0,
    ready=True,
)
MESSAGE = pack(BEAT, KEY)


@given(beats())
def test_a_heartbeat_is_read_as_it_was_sent(beat: Beat) -> None:
    message = pack(beat, KEY)
    assert unpack(message, KEY) == beat
    assert group_of(message) == beat.group_id
    assert from_ethernet(in_ethernet(message)) == message


def test_the_proof_is_an_hmac_with_a_key_for_heartbeats_alone() -> None:
    key = hmac.digest(bytes.fromhex(SECRET.reveal()), b"netloom heartbeat 1", hashlib.sha256)
    assert key == KEY
    assert MESSAGE[-16:] == hmac.digest(key, MESSAGE[:-16], hashlib.sha256)[:16]


@pytest.mark.mutation("a-heartbeat-is-proved")
def test_a_heartbeat_without_the_right_proof_is_none() -> None:
    assert unpack(pack(BEAT, key_of(Secret("5b" * 32))), KEY) is None
    assert unpack(MESSAGE[:-PROOF_BYTES] + bytes(PROOF_BYTES), KEY) is None
    for at in range(len(MESSAGE)):
        assert unpack(MESSAGE[:at] + bytes([MESSAGE[at] ^ 1]) + MESSAGE[at + 1 :], KEY) is None


@given(st.integers(0, HEARTBEAT_BYTES + 20))
def test_a_heartbeat_that_was_cut_or_has_more_bytes_is_none(length: int) -> None:
    changed = (MESSAGE + bytes(20))[:length]
    assert (unpack(changed, KEY) is not None) == (length == HEARTBEAT_BYTES)
    assert (group_of(changed) is not None) == (length == HEARTBEAT_BYTES)


@pytest.mark.parametrize(
    "wrong",
    [{"active": 2}, {"grants": 2}, {"boot": bytes(8)}],
    ids=["active", "grants", "boot"],
)
def test_a_heartbeat_about_hosts_that_do_not_exist_is_none(wrong: dict[str, int]) -> None:
    assert unpack(pack(replace(BEAT, **wrong), KEY), KEY) is None


def test_a_frame_of_a_heartbeat_is_no_claim_and_short_enough_for_any_link() -> None:
    payload = in_ethernet(MESSAGE)
    assert decode(payload) is None
    assert len(payload) <= PAYLOAD_BYTES_MAX
    assert from_ethernet(payload + bytes(40)) == MESSAGE  # padding
    for at in range(9):
        assert from_ethernet(payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :]) is None


def test_a_secret_that_is_not_hexadecimal_is_no_key_and_is_not_quoted() -> None:
    with pytest.raises(ValueError) as caught:
        key_of(Secret("something else"))
    assert "something" not in str(caught.value)
