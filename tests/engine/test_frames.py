"""Frames on a byte stream: whatever happens to the bytes, what comes out was sent."""

from __future__ import annotations

import tracemalloc
import zlib
from itertools import islice
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.engine.frames import HEADER_BYTES, MAX_FRAME, FrameError, FrameReader, FrameWriter

PAYLOADS = st.lists(st.binary(max_size=50), max_size=5)


def stream(payloads: list[bytes]) -> bytes:
    writer = FrameWriter()
    return b"".join(writer.frame(payload) for payload in payloads)


def header(number: int, length: int, mark: bytes = b"PRBL") -> bytes:
    """A header whose checksum is right, whatever it says."""
    words = mark + pack("<III", number, length, 0)
    return words + pack("<I", zlib.crc32(words))


@given(PAYLOADS, st.lists(st.integers(0, 400), max_size=6))
def test_payloads_arrive_however_the_stream_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    sent = stream(payloads)
    ends = sorted({min(cut, len(sent)) for cut in cuts} | {len(sent)})
    reader, received, start = FrameReader(), [], 0
    for end in ends:
        received += reader.payloads(sent[start:end])
        start = end
    assert received == payloads


@given(PAYLOADS.filter(bool), st.data())
def test_a_flipped_bit_is_noticed_in_its_frame(payloads: list[bytes], data: st.DataObject) -> None:
    damaged = bytearray(stream(payloads))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    ends = [len(stream(payloads[: count + 1])) for count in range(len(payloads))]
    intact = sum(end <= bit // 8 for end in ends)
    reader = FrameReader()
    arriving = reader.payloads(bytes(damaged))
    assert list(islice(arriving, intact)) == payloads[:intact]
    with pytest.raises(FrameError, match="damaged"):
        next(arriving)
    with pytest.raises(FrameError, match="damaged"):  # nothing after it is believed
        list(reader.payloads(stream(payloads)))


@given(PAYLOADS.filter(lambda payloads: len(payloads) > 1), st.data())
def test_a_repeated_a_lost_and_a_late_frame_are_noticed(payloads: list[bytes], data: st.DataObject) -> None:
    writer = FrameWriter()
    frames = [writer.frame(payload) for payload in payloads]
    index = data.draw(st.integers(1, len(frames) - 1))
    for wrong in (
        frames[:index] + frames[index - 1 :],
        frames[: index - 1] + frames[index:],
        [*frames[: index - 1], frames[index], frames[index - 1]],
    ):
        with pytest.raises(FrameError, match="came where frame"):
            list(FrameReader().payloads(b"".join(wrong)))


def test_the_longest_frame_passes_and_a_longer_one_is_refused_on_both_sides() -> None:
    longest = bytes(MAX_FRAME)
    writer = FrameWriter()
    assert list(FrameReader().payloads(writer.frame(longest))) == [longest]
    with pytest.raises(FrameError, match="does not fit"):
        writer.frame(longest + b"\0")
    with pytest.raises(FrameError, match=f"claims {MAX_FRAME + 1} bytes"):
        list(FrameReader().payloads(header(0, MAX_FRAME + 1)))


def test_a_refused_frame_uses_up_no_number() -> None:
    writer, reader = FrameWriter(), FrameReader()
    with pytest.raises(FrameError):
        writer.frame(bytes(MAX_FRAME + 1))
    assert list(reader.payloads(writer.frame(b"next"))) == [b"next"]


@pytest.mark.parametrize("length", [MAX_FRAME, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_claimed_length_allocates_nothing(length: int) -> None:
    reader = FrameReader()
    tracemalloc.start()
    try:
        if length > MAX_FRAME:
            with pytest.raises(FrameError):
                list(reader.payloads(header(0, length)))
        else:
            assert list(reader.payloads(header(0, length) + b"some of it")) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_stream_of_something_else_is_refused_at_its_first_header() -> None:
    for start in (b"HTTP/1.1 400 Bad Request\r\n\r\n", header(0, 0, mark=b"PRBM"), bytes(HEADER_BYTES)):
        with pytest.raises(FrameError, match="the header of frame 0 is damaged"):
            list(FrameReader().payloads(start))


@given(st.binary(max_size=200))
def test_random_bytes_give_frames_or_a_frame_error(received: bytes) -> None:
    reader = FrameReader()
    if len(received) < HEADER_BYTES:
        assert list(reader.payloads(received)) == []
    else:
        with pytest.raises(FrameError):
            list(reader.payloads(received))


def test_numbers_start_over_after_the_last_one() -> None:
    writer, reader = FrameWriter(), FrameReader()
    writer._number = reader._number = 0xFFFFFFFF  # four billion frames later
    assert list(reader.payloads(writer.frame(b"last") + writer.frame(b"first"))) == [b"last", b"first"]
