"""Any bytes: each target with its corpus, with damaged inputs of it, and with random ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import netlink_targets, run, targets, wire_targets
from fuzz.pieces import Bytes, as_parts, stream
from fuzz.targets import CORPUS, TARGETS, Target, corpus
from netloom.agent.kernel import netlink
from netloom.agent.kernel.netlink import Message
from netloom.extension.helper_client import DOING, pack
from netloom.frames import frame

# Targets with sockets or a whole grammar: an input takes a millisecond.
SLOW = {"calls", "guest-process", "agent", "helper", "metadata", "password", "host"}


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_of_the_corpus_is_taken(name: str) -> None:
    inputs = corpus(name)
    assert inputs
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"make fuzz TARGET={name} INPUT={path}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_taken(name: str) -> None:
    whole = [path.read_bytes() for path in corpus(name)]
    words = targets.tokens(name) or [b"\0", b"\xff\xff\xff\xff"]

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(whole)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            new = draw(st.binary(max_size=4) | st.sampled_from(words) | st.sampled_from(whole))
            data[at : at + draw(st.integers(0, 8))] = new
        return bytes(data)

    @settings(max_examples=60 if name in SLOW else 150)
    @given(damaged() | damaged() | damaged() | st.binary(max_size=300))
    def take(data: bytes) -> None:
        TARGETS[name](data)

    take()


def test_the_corpus_is_small_and_has_no_other_directories() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 400_000
    assert max(sizes) <= run.KEPT_BYTES_MAX


def test_an_input_is_a_stream_in_pieces_of_any_size() -> None:
    frames = frame(b"one") + frame(b"two")
    for size in (1, 2, 3, 7, 100):
        pieces = stream(Bytes(as_parts(b"one", b"two", head=bytes((size << 1 & 0xFF | 1,)))))
        assert b"".join(pieces) == frames
        assert len(pieces) == -(-len(frames) // size)
    assert stream(Bytes(b"\0" + frames)) == [frames]
    assert stream(Bytes(b"")) == []


def test_a_fault_is_an_exception_and_reproduced_by_its_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "crash").write_bytes(b"fatal")
    (tmp_path / "good").write_bytes(b"good")

    def take(data: bytes) -> None:
        if data == b"fatal":
            raise ValueError

    monkeypatch.setitem(TARGETS, "dhcp", take)
    assert run.main(["dhcp", f"--input={tmp_path / 'good'}"]) == 0
    with pytest.raises(ValueError):
        run.main(["dhcp", f"--input={tmp_path / 'crash'}"])


def test_few_small_inputs_reach_all_that_many_do() -> None:
    target: Target = TARGETS["netlink-object"]
    inputs = [path.read_bytes() for path in corpus("netlink-object")]
    padded = [it + b"\0" * 40 for it in inputs[:5]]
    kept = run.minimised(target, inputs + padded + inputs)
    assert set(kept) <= set(inputs + padded)
    assert len(kept) == len(set(kept)) <= len(inputs) + len(padded)

    def reached(given: list[bytes]) -> set[tuple[str, int, int]]:
        return {pair for it in given for pair in run.pairs_of_lines(target, it)}

    assert reached(kept) == reached(inputs + padded)


@pytest.mark.mutation("an-error-number-is-a-number-of-the-kernels")
def test_an_answer_with_any_error_number_is_taken() -> None:
    for code in (-(1 << 31), 1, (1 << 31) - 1):
        refused = Message(netlink.NLMSG_ERROR, payload=struct.pack("=i", code) + bytes(16), sequence=1)
        netlink_targets.take_answer(netlink_targets.as_answer(0, refused))


@pytest.mark.mutation("an-nftables-object-has-a-head")
def test_an_nftables_object_without_a_head_is_refused() -> None:
    end = Message(netlink.NLMSG_DONE, netlink.NLM_F_MULTI, bytes(4), sequence=1)
    for listing in range(len(netlink_targets.LISTINGS)):
        netlink_targets.take_answer(netlink_targets.as_answer(listing, Message(16, sequence=1), end))


@pytest.mark.mutation("a-client-has-a-deadline")
@pytest.mark.parametrize("times", [b"nan 1", b"1 nan", b"inf 1"])
def test_a_client_of_the_helper_without_a_deadline_is_disconnected(times: bytes) -> None:
    request = pack(b"prepare-nic", b"/x", b"id", times, b"NETLOOM_DIR=/x", b"", b"{}")
    wire_targets.take_helper_client(as_parts(request[4:]))


@pytest.mark.mutation("a-helper-sends-any-fields", instead="[fields[0]]")
def test_a_helper_may_send_a_message_without_its_field() -> None:
    wire_targets.take_helper(as_parts(pack(DOING)[4:]))
