"""The difference of two listings is that of their records, however few messages are decoded for it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom.agent.kernel import conntrack_changes
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Difference, difference, record_of
from netloom.agent.kernel.netlink import ATTRIBUTE, be16
from unit.conntrack_messages import ESP, HELPER, ICMP, PUBLIC, REPLIED, TCP, UDP, listing

MARKED = 1 << 31

MESSAGES = st.builds(
    listing,
    st.sampled_from([TCP, UDP, ESP, ICMP]),
    sport=st.integers(1, 4),
    translated=st.sampled_from(["", "", PUBLIC]),
    status=st.sampled_from([REPLIED, REPLIED, 0, REPLIED | HELPER]),
    state=st.sampled_from([3, 3, 4, 7]),
    mark=st.sampled_from([0, 0, 1, MARKED]),
    timeout_s=st.sampled_from([3, 30, 59, 60, 61, 432000, 431990]),
    zone=st.sampled_from([0, 0, 7]),
) | st.builds(
    listing,
    st.sampled_from([TCP, UDP, ESP]),
    source=st.just("2001:db8::1"),
    destination=st.just("2001:db8::2"),
    sport=st.integers(1, 2),
    timeout_s=st.sampled_from([30, 432000]),
)


def _identity(message: bytes) -> tuple[bytes, bool]:
    """What no two connections of a table have in common: family, original tuple, and whether it has a zone."""
    return message[: 4 + ATTRIBUTE.unpack_from(message, 4)[0]], be16(18, 7) in message


TABLES = st.lists(MESSAGES, max_size=8, unique_by=_identity)


def _records_of(messages: Iterable[bytes]) -> Difference:
    """All of them, as to be created."""
    return difference([], [it for message in messages if (it := record_of(message, marked=MARKED)) is not None])


@given(TABLES, TABLES)
def test_the_difference_of_messages_is_that_of_their_records(before: list[bytes], now: list[bytes]) -> None:
    listed = Listing(before, marked=MARKED)
    assert listed.records == _records_of(before).create
    expected = difference(listed.records, _records_of(now).create)
    found = listed.difference(now)
    assert sorted(found.create) == sorted(expected.create)
    assert sorted(found.delete) == sorted(expected.delete)


def test_a_connection_whose_timeout_alone_differs_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [(protocol, port) for protocol in (TCP, UDP) for port in range(100)]
    before = Listing([listing(protocol, sport=port, timeout_s=100) for protocol, port in many])
    decoded: list[bytes] = []

    def counted(message: bytes, *, marked: int) -> None:
        decoded.append(message)

    monkeypatch.setattr(conntrack_changes, "record_of", counted)
    now = [listing(protocol, sport=port, timeout_s=120) for protocol, port in many]
    now[7] = listing(TCP, sport=7, timeout_s=120, mark=1)
    before.difference(now)
    assert decoded == [now[7]]
