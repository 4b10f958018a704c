"""Frames on a byte stream: how a payload is told from the next one, and how damage is noticed.

A frame is a header of five little-endian 32-bit words and the payload: a mark, the frame's number in its direction
(0, 1, 2, … modulo 2^32), the payload's length in bytes, its CRC-32, and the CRC-32 of the header's other words. So a
damaged length is noticed at once, rather than by waiting for bytes that never come; and a frame that is lost, repeated
or out of place is noticed by its number. This guards against accidents, not against forgery: whoever holds the other
end of the stream can write whole frames.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct

MAX_FRAME = 64 << 20
"""Bytes of payload that one frame carries at most."""

_MARK = int.from_bytes(b"PRBL", "little")
_WORDS = Struct("<IIII")
_CHECK = Struct("<I")
HEADER_BYTES = _WORDS.size + _CHECK.size


class FrameError(Exception):
    """The stream between two processes does not hold what it should; nothing after this point can be trusted."""


class FrameWriter:
    """Numbers the frames of one direction of a stream."""

    def __init__(self) -> None:
        self._number = 0

    def frame(self, payload: bytes) -> bytes:
        """The next frame of the stream, to be written whole and in order.

        Raises:
            FrameError: the payload is longer than `MAX_FRAME`.
        """
        if len(payload) > MAX_FRAME:
            raise FrameError(f"a payload of {len(payload)} bytes does not fit in a frame of {MAX_FRAME}")
        words = _WORDS.pack(_MARK, self._number, len(payload), zlib.crc32(payload))
        self._number = (self._number + 1) & 0xFFFFFFFF
        return b"".join((words, _CHECK.pack(zlib.crc32(words)), payload))


class FrameReader:
    """Takes bytes of one direction of a stream as they come, and gives the payloads of whole frames.

    It never holds more than one frame and what was read along with it: a length is refused before anything waits for
    that many bytes.
    """

    def __init__(self) -> None:
        self._number = 0
        self._buffer = bytearray()

    def payloads(self, received: bytes) -> Iterator[bytes]:
        """The payloads that are whole with `received`, in order; to be iterated to the end before the next call.

        Raises:
            FrameError: the stream is damaged, or a frame is too long; the payloads before that one are given first.
        """
        buffer = self._buffer
        buffer += received
        start = 0
        try:
            while len(buffer) - start >= HEADER_BYTES:
                length, checksum = self._header(start)
                end = start + HEADER_BYTES + length
                if len(buffer) < end:
                    return
                with memoryview(buffer) as view:
                    payload = bytes(view[start + HEADER_BYTES : end])
                if zlib.crc32(payload) != checksum:
                    raise FrameError(f"the payload of frame {self._number} is damaged")
                self._number = (self._number + 1) & 0xFFFFFFFF
                start = end
                yield payload
        finally:
            del buffer[:start]

    def _header(self, start: int) -> tuple[int, int]:
        """Length and checksum of the payload whose frame starts there."""
        mark, number, length, checksum = _WORDS.unpack_from(self._buffer, start)
        (check,) = _CHECK.unpack_from(self._buffer, start + _WORDS.size)
        if mark != _MARK or zlib.crc32(self._buffer[start : start + _WORDS.size]) != check:
            raise FrameError(f"the header of frame {self._number} is damaged")
        if number != self._number:
            raise FrameError(f"frame {number} came where frame {self._number} was due")
        if length > MAX_FRAME:
            raise FrameError(f"frame {number} claims {length} bytes; at most {MAX_FRAME} are taken")
        return length, checksum
