"""Records of connections: what the kernel lists becomes a record, chunks keep records, any other bytes are refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloom.agent.kernel import conntrack, conntrack_copy
from netloom.agent.kernel.conntrack_copy import Difference, Record, RecordsInvalid
from netloom.agent.kernel.netlink import NetlinkError, be16, be32, u8
from netloom.errors import NetloomError
from unit.conntrack_messages import (
    ESP,
    GUEST,
    HELPER,
    ICMP,
    PUBLIC,
    REPLIED,
    SRC_NAT,
    TCP,
    TIME_WAIT,
    UDP,
    direction,
    listing,
    record,
)


# 40001 is 9c41, 80 is 0050, 432000 is 00069780. The flag MAXACK_SET (0x20) is not copied.
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (listing(), "04060000 0a01010b c000020a 9c41 0050 0e 0307090303 00000000 00069780"),
        (
            listing(translated=PUBLIC, status=REPLIED | SRC_NAT, mark=0x10002, zone=5),
            "84060005 0a01010b c000020a 9c41 0050 c000020a cb007114 0050 9c41 0e 0307090303 00010002 00069780",
        ),
        (
            listing(UDP, source="fd09::1", destination="fd09::2", status=REPLIED & ~conntrack.ASSURED, timeout_s=29),
            "06110000 fd090000000000000000000000000001 fd090000000000000000000000000002 9c41 0050 "
            "0a 0000000000 00000000 0000001d",
        ),
        (listing(ESP, timeout_s=600), "04320000 0a01010b c000020a 0000 0000 0e 0000000000 00000000 00000258"),
    ],
    ids=["plain", "translated", "IPv6", "no ports"],
)
def test_a_listed_connection_becomes_a_record(listed: bytes, expected: str) -> None:
    made = conntrack_copy.record_of(listed)
    assert made is not None
    assert made.hex() == expected.replace(" ", "")


@pytest.mark.parametrize(
    "listed",
    [
        listing(state=1),
        listing(state=2),
        listing(state=TIME_WAIT),
        listing(state=8),
        listing(status=REPLIED | HELPER),
        listing(status=REPLIED | conntrack.EXPECTED),
        listing(status=REPLIED | 0x40),
        listing(UDP, status=conntrack.CONFIRMED),
        listing(ICMP),
    ],
)
def test_a_connection_that_cannot_go_on_has_no_record(listed: bytes) -> None:
    assert conntrack_copy.record_of(listed) is None


def test_a_marked_connection_has_a_record_without_a_reply() -> None:
    listed = listing(UDP, status=conntrack.CONFIRMED, mark=0x80000001)
    assert conntrack_copy.record_of(listed, marked=0x80000000) is not None
    assert conntrack_copy.record_of(listed, marked=0x40000000) is None


def test_a_connection_that_must_be_assured_has_no_record_with_a_reply_only() -> None:
    listed = listing(UDP, status=REPLIED & ~conntrack.ASSURED)
    assert conntrack_copy.record_of(listed, status=REPLIED) is None
    assert conntrack_copy.record_of(listing(UDP), status=REPLIED) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"translated": PUBLIC, "mark": 5},
        {"source": "fd09::1", "destination": "fd09::2"},
        {"zone": 5},
        {"protocol": ESP},
    ],
)
@pytest.mark.parametrize("reported", [True, False])
def test_the_record_of_an_ended_connection_identifies_it(fields: dict[str, object], reported: bool) -> None:
    """A report has the zone, if any, and the identifier right after the directions."""
    listed = listing(**fields)  # type: ignore[arg-type]
    both = 4 + 2 * len(direction(1, *_ends(fields)))
    more = (be16(18, 5) if "zone" in fields else b"") + be32(12, 4711) if reported else b""
    made = conntrack_copy.ended(listed[:both] + more + listed[both:])
    assert made is not None
    assert conntrack_copy.key_of(made) == conntrack_copy.key_of(record(**fields))  # type: ignore[arg-type]
    assert conntrack_copy.decode(conntrack_copy.encode([made])[0]) == [made]


def _ends(fields: dict[str, object]) -> tuple[int, str, str, int, int]:
    protocol, source = fields.get("protocol", TCP), fields.get("source", GUEST)
    assert isinstance(protocol, int) and isinstance(source, str)
    return protocol, source, source, 0, 0


@pytest.mark.parametrize("protocol", [ICMP, 132, 136])
def test_a_connection_that_is_not_copied_has_no_end(protocol: int) -> None:
    assert conntrack_copy.ended(listing(protocol)) is None
    assert conntrack_copy.ended(b"") is None


def test_tcp_is_closed_when_no_end_waits_for_data() -> None:
    assert [state for state in range(10) if conntrack_copy.has_closed(listing(state=state))] == [1, 2, 7, 8, 9]
    assert not conntrack_copy.has_closed(listing(UDP))


LISTED = [listing(translated=PUBLIC), listing(ESP), listing(source="fd09::1", destination="fd09::2")]


@given(
    st.sampled_from(LISTED),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(0, 400),
)
def test_a_damaged_listing_is_refused_or_becomes_a_record(
    listed: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(listed)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    with contextlib.suppress(NetlinkError):
        over = conntrack_copy.ended(bytes(damaged[:length]))
        assert over is None or conntrack_copy.decode(conntrack_copy.encode([over])[0]) == [over]
    with contextlib.suppress(NetlinkError):
        made = conntrack_copy.record_of(bytes(damaged[:length]))
        if made is not None and made[-14] & conntrack.CONFIRMED:
            assert conntrack_copy.decode(conntrack_copy.encode([made])[0]) == [made]


def test_a_listing_with_a_protocol_of_two_bytes_is_refused() -> None:
    with pytest.raises(NetlinkError):
        conntrack_copy.record_of(listing(ESP).replace(u8(1, ESP), be16(1, 0x100 + ESP)))


def test_a_large_table_is_split_into_chunks() -> None:
    many = [record(sport=port, translated=PUBLIC) for port in range(1, 40000)]
    chunks = conntrack_copy.encode(many)
    assert len(chunks) == 4
    assert all(len(it) <= conntrack_copy.CHUNK_BYTES_MAX == 512 << 10 for it in chunks)
    assert [it for chunk in chunks for it in conntrack_copy.decode(chunk)] == many


def test_an_empty_table_is_one_chunk() -> None:
    (chunk,) = conntrack_copy.encode([])
    assert conntrack_copy.decode(chunk) == []


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_in_one_line(noise: bytes) -> None:
    with pytest.raises(NetloomError) as refused:
        conntrack_copy.decode(noise)
    assert "\n" not in str(refused.value)


RECORDS = [record(), record(translated=PUBLIC), record(UDP, source="fd09::1", destination="fd09::2")]


@given(st.integers(0, 155), st.integers(0, 255), st.binary(max_size=40))
@example(at=6, value=0, more=b"")  # another number of records
@example(at=20, value=0, more=b"")  # an address: as good as any
def test_a_damaged_chunk_is_refused_or_has_records(at: int, value: int, more: bytes) -> None:
    (chunk,) = conntrack_copy.encode(RECORDS)
    damaged = chunk[:at] + bytes((value,)) + chunk[at + 1 :] + more
    try:
        decoded = conntrack_copy.decode(damaged)
    except RecordsInvalid:
        return
    assert b"".join(decoded) == damaged[10:]
    for it in decoded:
        assert conntrack_copy.described(it)
        assert conntrack_copy.creation(it)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda it: it[:-1], "no record at byte"),
        (lambda it: it[:5] + b"\2" + it[6:], "unknown format"),
        (lambda it: b"x" + it[1:], "unknown format"),
        (lambda it: it[:9] + b"\1" + it[10:], "3 records instead of 1"),
        (lambda it: it[:10] + b"\5" + it[11:], "no record at byte 10"),
        (lambda it: it[:11] + b"\1" + it[12:], "impossible values"),  # ICMP
        (lambda it: it[:26] + b"\6" + it[27:], "impossible values"),  # not confirmed
        (lambda it: it[:26] + b"\x1e" + it[27:], "impossible values"),  # a bit of NAT
        (lambda it: it[:27] + b"\x0a" + it[28:], "impossible values"),  # a TCP state
        (lambda it: it[:28] + b"\x0f" + it[29:], "impossible values"),  # a window scale
        (lambda it: it + bytes(conntrack_copy.CHUNK_BYTES_MAX), "a chunk of"),
    ],
)
def test_a_refused_chunk_says_why(changed: object, said: str) -> None:
    (chunk,) = conntrack_copy.encode(RECORDS)
    assert callable(changed)
    with pytest.raises(RecordsInvalid, match=said):
        conntrack_copy.decode(changed(chunk))


def test_equal_tables_have_no_difference() -> None:
    before = [record(timeout_s=432000), record(UDP, timeout_s=115)]
    now = [record(UDP, timeout_s=120), record(timeout_s=431990)]
    assert conntrack_copy.difference(before, now) == Difference(delete=[], create=[])


def test_new_ended_and_changed_connections_are_the_difference() -> None:
    new, ended, stays = record(sport=1), record(sport=2), record(sport=3)
    marked, unmarked = record(sport=4, mark=1), record(sport=4)
    closing, open_ = record(sport=5, state=4), record(sport=5)
    elsewhere, here = record(sport=6, translated="203.0.113.21"), record(sport=6, translated=PUBLIC)
    zone, no_zone = record(sport=7, zone=1), record(sport=7)
    made = conntrack_copy.difference(
        [ended, stays, unmarked, open_, here, no_zone], [new, stays, marked, closing, elsewhere, zone]
    )
    assert made.create == [new, marked, closing, elsewhere, zone]
    assert sorted(made.delete) == sorted([ended, unmarked, open_, here, no_zone])


@pytest.mark.mutation("a-renewed-short-timeout-is-sent-again", instead="True")
def test_a_renewed_short_timeout_is_sent_again() -> None:
    """The target's entry runs out after the first timeout; the source's has been renewed since."""
    before, now = record(UDP, timeout_s=3), record(UDP, timeout_s=30)
    assert conntrack_copy.difference([before], [now]) == Difference(delete=[before], create=[now])
    assert conntrack_copy.difference([now], [before]) == Difference(delete=[], create=[])


def test_a_difference_is_carried_out_in_portions_of_a_bounded_size() -> None:
    many = 40_000
    ended = [record(sport=it, translated=PUBLIC) for it in range(many // 4)]
    earlier = [record(UDP, sport=it % 65536, source=f"10.1.{it >> 8}.1") for it in range(many)]
    later = [Record(it[:-5] + b"\1" + it[-4:]) for it in earlier]  # another mark
    portions = conntrack_copy.encode_difference(conntrack_copy.difference([*ended, *earlier], later))
    assert len(portions) > 2
    delete, create = ([conntrack_copy.decode(getattr(it, name)) for it in portions] for name in ("delete", "create"))
    assert all(len(it.delete) + len(it.create) <= conntrack_copy.CHUNK_BYTES_MAX for it in portions)
    assert [it.created for it in portions] == [len(it) for it in create]
    assert [record for part in create for record in part] == later
    # What has ended comes first, then each changed connection in the portion that creates it again.
    assert [record for part in delete for record in part] == [*ended, *earlier]
    gone: set[bytes] = {it[1:16] for it in ended}
    for removed, made in zip(delete, create, strict=True):
        assert {it[1:16] for it in removed} - gone == {it[1:16] for it in made}


def test_no_difference_is_one_empty_portion() -> None:
    (portion,) = conntrack_copy.encode_difference(Difference(delete=[], create=[]))
    assert (conntrack_copy.decode(portion.delete), conntrack_copy.decode(portion.create), portion.created) == (
        [],
        [],
        0,
    )
