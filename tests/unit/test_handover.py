"""Copies that are read in parts."""

from __future__ import annotations

import pytest

from netloom.agent.scopes.handover import Copy
from netloom.errors import HostRefused
from netloom.placementwire import Part, ReadPart

WHAT = "the state of net-204"


def three_parts() -> Copy:
    return Copy([Part(data=it) for it in (b"one", b"two", b"three")])


def test_a_copy_is_read_in_its_parts() -> None:
    copy = three_parts()
    first = copy.part(ReadPart(), WHAT)
    rest = [copy.part(ReadPart(number=it, token=first.token), WHAT) for it in (1, 2)]
    assert [it.data for it in (first, *rest)] == [b"one", b"two", b"three"]
    assert {(it.token, it.parts) for it in (first, *rest)} == {(copy.token, 3)}


@pytest.mark.mutation("parts-of-two-copies-are-not-mixed")
def test_parts_of_two_copies_are_not_mixed() -> None:
    first, second = three_parts(), three_parts()
    assert first.token != second.token
    for token in (first.token, ""):
        with pytest.raises(HostRefused, match="the state of net-204: it was read anew meanwhile"):
            second.part(ReadPart(number=1, token=token), WHAT)


@pytest.mark.parametrize("number", [-1, 3, 1 << 40])
def test_a_copy_has_no_other_parts(number: int) -> None:
    copy = three_parts()
    with pytest.raises(HostRefused, match=f"there is no part {number} to be read"):
        copy.part(ReadPart(number=number, token=copy.token), WHAT)


def test_a_copy_is_forgotten_when_its_last_part_was_read() -> None:
    copy = three_parts()
    copy.part(ReadPart(number=2, token=copy.token), WHAT)
    for number in range(3):
        with pytest.raises(HostRefused):
            copy.part(ReadPart(number=number, token=copy.token), WHAT)


def test_without_parts_nothing_can_be_read() -> None:
    for asked in (ReadPart(), ReadPart(number=1)):
        with pytest.raises(HostRefused):
            Copy().part(asked, WHAT)
