"""Frames on a stream."""

from __future__ import annotations

import pytest

from netloom.errors import HostRefused
from netloom.frames import FRAME_BYTES_MAX, FrameBuffer, FrameTooLong, frame
from netloom.wire import REPLY_BYTES_MAX, FrameReader, Reply, encode

BODIES = [b"one", b"", b"x" * 70_000, b"last"]
STREAM = b"".join(map(frame, BODIES))


@pytest.mark.parametrize("size", [1, 3, 4, 7, 4096, len(STREAM)])
def test_frames_arrive_in_pieces_of_any_size(size: int) -> None:
    frames = FrameBuffer(bytes)
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [body for piece in pieces for body in frames.feed(piece)] == BODIES


def test_a_length_over_the_limit_is_an_error_that_quotes_the_bytes() -> None:
    with pytest.raises(FrameTooLong) as error:
        FrameBuffer(bytes).feed(frame(b"one") + b"SSH-2.0-x" + b"\r\n" * 100)
    assert error.value.length > FRAME_BYTES_MAX
    assert error.value.start == (b"SSH-2.0-x" + b"\r\n" * 100)[:60]


@pytest.mark.mutation("a-frame-is-bounded")
def test_a_frame_over_the_readers_limit_is_refused_by_its_length() -> None:
    reader = FrameReader(limit=1000)
    with pytest.raises(HostRefused, match="a frame that is too long"):
        reader.feed((0x3FFFFFFF).to_bytes(4, "big"))
    assert FrameReader(limit=1000).feed(encode(Reply(call_id="a"))) == [Reply(call_id="a")]


def test_an_error_of_the_decoder_is_raised_each_time_and_frames_before_it_are_gone() -> None:
    frames: FrameBuffer[int] = FrameBuffer(lambda body: int(bytes(body)))
    with pytest.raises(ValueError, match="invalid literal"):
        frames.feed(frame(b"1") + frame(b"x"))
    with pytest.raises(ValueError, match="invalid literal"):
        frames.feed(frame(b"2"))


def test_the_agents_frames_are_errors_for_people() -> None:
    assert FrameReader().feed(encode(Reply(call_id="a")) * 2) == [Reply(call_id="a")] * 2
    with pytest.raises(HostRefused, match=r"not a frame, or a frame that is too long: b'Welcome to host1"):
        FrameReader().feed(b"Welcome to host1\r\n")
    with pytest.raises(HostRefused, match="cannot be read"):
        FrameReader().feed(frame(b"\xc1"))


@pytest.mark.mutation("a-frame-is-any-bytes")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x82\xa4type\xa5reply\xa7call_id\xa1\xff",  # not UTF-8
        b"\x83\xa4type\xa5reply\xa7call_id\xa1x\xa1z" + b"\x91" * 900_000,  # an unknown field, deeply nested
        b"\x82\xa4type\xa5reply\xa7call_id\xc2",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_any_bytes_of_a_host_are_a_message_or_an_error_for_people(body: bytes) -> None:
    with pytest.raises(HostRefused, match="cannot be read"):
        FrameReader(REPLY_BYTES_MAX).feed(frame(body))
