"""The frames in which a host claims a scope: what is sent is read again, and any other bytes are no claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.claimwire import (
    SIGNATURES_MAX,
    Claim,
    Claimed,
    EvacuationClaim,
    PlacementClaim,
    decode,
    payloads,
    signatures_in,
)
from netloom.ethernet import ETHERTYPE, PAYLOAD_BYTES_MAX, ethernet_frame

PLACED = PlacementClaim("netloom/phys-1", "net-204", 4, "kvm2")
EVACUATED = EvacuationClaim("netloom/phys-1", "kvm1", 1_800_000_000, "kvm2")
SIGNATURE = b"\0\0\0\x0bssh-ed25519\0\0\0\x40" + bytes(64)
(PAYLOAD,), _ = payloads("net-204", PLACED, [SIGNATURE])


@pytest.mark.parametrize("claim", [PLACED, EVACUATED], ids=["placement", "evacuation"])
def test_a_claim_is_read_as_it_was_sent(claim: Claim) -> None:
    (payload,), too_long = payloads("net-204", claim, [SIGNATURE, b"x"])
    assert too_long == 0
    assert decode(payload) == decode(payload + bytes(40)) == Claimed("net-204", claim, (SIGNATURE, b"x"))


def test_a_frame_has_the_type_for_local_experiments_and_goes_to_all() -> None:
    plain = ethernet_frame(b"\2\0\0\0\0\1", 0, b"x")
    assert plain == b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + b"x"
    assert ETHERTYPE == 0x88B5
    assert ethernet_frame(b"\2\0\0\0\0\1", 204, b"x") == plain[:12] + b"\x81\0\0\xcc" + plain[12:]


@given(st.lists(st.integers(0, 1400), max_size=40))
def test_signatures_are_spread_over_frames_and_those_that_fit_into_none_are_counted(lengths: list[int]) -> None:
    signatures = [bytes([at]) * length for at, length in enumerate(lengths)]
    frames, too_long = payloads("net-204", PLACED, signatures)
    assert all(len(it) <= PAYLOAD_BYTES_MAX for it in frames)
    read = [decode(it) for it in frames]
    assert all(it is not None and 1 <= len(it.signatures) <= SIGNATURES_MAX for it in read)
    found = [signature for it in read if it is not None for signature in it.signatures]
    assert len(found) == len(signatures) - too_long
    assert found == [it for it in signatures if it in found or len(it) < 1100]


def test_signatures_of_common_keys_fit() -> None:
    for bits in (2048, 4096, 8192):
        assert payloads("vpc-4294967295", PLACED, [bytes(bits // 8 + 20)])[1] == 0
    assert payloads("net-204", PLACED, [bytes(16384 // 8 + 20)]) == ([], 1)


def test_the_signatures_of_a_proof() -> None:
    assert signatures_in("key:AAAA,mac:AAAA,key:,key:!,key:====,x,key:AQ==") == [b"\0\0\0", b"", b"\1"]
    assert signatures_in("") == []
    assert signatures_in("key:\xff\ud800") == []


@pytest.mark.mutation("a-claim-is-short")
def test_a_claim_that_is_too_long_is_none() -> None:
    assert decode(PAYLOAD + bytes(PAYLOAD_BYTES_MAX - len(PAYLOAD))) is not None
    assert decode(PAYLOAD + bytes(PAYLOAD_BYTES_MAX + 1 - len(PAYLOAD))) is None


@pytest.mark.mutation("a-claim-has-few-signatures")
def test_a_claim_with_many_signatures_is_none() -> None:
    for count in (SIGNATURES_MAX, SIGNATURES_MAX + 1):
        body = PAYLOAD[11 : -len(SIGNATURE) - 3] + b"\xdc" + count.to_bytes(2, "big") + b"\xc4\0" * count
        claimed = decode(PAYLOAD[:9] + len(body).to_bytes(2, "big") + body)
        assert (claimed is not None) == (count == SIGNATURES_MAX)


@pytest.mark.mutation("a-claim-can-be-signed")
def test_a_claim_with_nul_in_a_field_is_none() -> None:
    for claim in (replace(PLACED, owner="a\0b"), replace(PLACED, host="\0"), replace(EVACUATED, dead="a\0")):
        (payload,), _ = payloads("net-204", claim, [SIGNATURE])
        assert decode(payload) is None
    (payload,), _ = payloads("net-204\0", PLACED, [SIGNATURE])
    assert decode(payload) is None


@pytest.mark.parametrize("at", range(len(PAYLOAD)))
def test_a_claim_that_was_cut_is_none(at: int) -> None:
    assert decode(PAYLOAD[:at]) is None


@pytest.mark.parametrize("at", [0, 6, 7, 8])
def test_frames_of_another_kind_or_version_are_no_claims(at: int) -> None:
    assert decode(PAYLOAD[:at] + bytes([PAYLOAD[at] ^ 2]) + PAYLOAD[at + 1 :]) is None


@pytest.mark.mutation("a-claim-is-any-bytes")
@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_a_claim_or_none(data: bytes, at: int) -> None:
    decode(data)
    decode(PAYLOAD[:9] + len(data).to_bytes(2, "big") + data)
    decode(PAYLOAD[:at] + data + PAYLOAD[at + len(data) :])
    assert decode(PAYLOAD[:11] + b"\xc1") is None
