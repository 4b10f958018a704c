"""Damaged and forged frames: `FrameError` and nothing else, and memory in proportion to what came."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import msgspec
import numpy as np
import pytest
from hostile_values import check_brief, fuzz, mutated
from hypothesis import strategies as st

from preble.engine.frames import FrameError, FrameReader, FrameWriter
from preble.engine.messages import Abort, Command, Crash, Delta, LogLine, News, Pause, ResetCache, StepReport, Submit
from preble.engine.wire import decode_commands, decode_launch, decode_news, encode_commands, encode_news
from preble.outputs import ReplicaStats, TokenLogprob
from preble.sampling import SamplingParams
from preble.sched.events import Finished

STATS = ReplicaStats(0, "cpu", "torch", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0.5)
SAMPLING = SamplingParams(stop="x", logit_bias={5: 1.0}, seed=3)
COMMANDS: list[Command] = [
    Submit("a", np.arange(5, dtype=np.int32), 4, 9, SAMPLING, 3, namespace="n", deadline=1.5),
    Abort("a"),
    ResetCache(),
    Pause(True),
]
NEWS: list[News] = [
    StepReport(
        0, STATS, [Delta("a", (1, 2), "xy", (TokenLogprob(1, -0.5, ((2, -0.7),)),), 3, 0.5)], [Finished("a", 0)]
    ),
    LogLine("preble", 30, "text"),
    Crash("RuntimeError", "text", "trace"),
]


def read(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The payloads of a stream that comes in pieces."""
    reader = FrameReader()
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    return [payload for start, stop in pairwise(edges) for payload in reader.payloads(stream[start:stop])]


def test_frames() -> None:
    def attempt(payloads: list[bytes], random: Random) -> None:
        writer = FrameWriter()
        stream = b"".join(map(writer.frame, payloads))
        cuts = [random.randrange(len(stream) + 1) for _ in range(3)]
        assert read(stream, cuts) == payloads
        damaged = mutated(stream, random)
        try:
            found = read(damaged, cuts)
        except FrameError:
            return
        # What is not refused is the beginning of what was sent: nothing is made up, repeated or left out.
        assert found == payloads[: len(found)]

    fuzz("frames", 40, st.lists(st.binary(max_size=60), min_size=1, max_size=4), attempt)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([type(one).__name__ for one in (*COMMANDS, *NEWS, SAMPLING, STATS)])


def test_messages() -> None:
    good = [*encode_commands(COMMANDS), *encode_news(NEWS)]

    def attempt(made: object, random: Random) -> None:
        payload = msgspec.msgpack.encode(made) if random.random() < 0.1 else mutated(random.choice(good), random)
        for decode in (decode_commands, decode_news, decode_launch):
            try:
                decode(payload)
            except FrameError as error:
                check_brief(error)

    fuzz("messages of workers", 40, st.lists(st.tuples(NAMES, ANYTHING) | ANYTHING, max_size=3), attempt)


def test_a_forged_length_takes_no_memory() -> None:
    """A frame of a list that claims 2^32 - 1 entries, and one inside the other."""
    for payload in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff" * 10_000,
        b"\x91" * 100_000,
        b"\xc6\xff\xff\xff\xff",
    ):
        for decode in (decode_commands, decode_news, decode_launch):
            with pytest.raises(FrameError):
                decode(payload)
