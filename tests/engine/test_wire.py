"""Messages to and from worker processes: what arrives is what was sent, or nothing is believed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.engine import wire
from preble.engine.frames import FrameError
from preble.engine.messages import (
    Abort,
    Command,
    Crash,
    Delta,
    Launch,
    LogLine,
    News,
    Pause,
    Ready,
    ResetCache,
    StepReport,
    Submit,
)
from preble.engine.options import EngineOptions
from preble.engine.wire import (
    decode_commands,
    decode_launch,
    decode_news,
    encode_commands,
    encode_launch,
    encode_news,
)
from preble.outputs import ReplicaStats, TokenLogprob
from preble.sampling import SamplingParams
from preble.sched import events

TEXTS = st.text(max_size=20)
COUNTS = st.integers(0, 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
NUMBERS = st.integers(-(2**31), 2**31 - 1)
TOKENS = st.lists(NUMBERS, max_size=20).map(lambda tokens: np.array(tokens, np.int32))
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=20).map(lambda hashes: np.array(hashes, np.uint64))
IDS = st.integers(0, 2**31 - 1)
PAIRS = st.lists(st.tuples(COUNTS, FLOATS), max_size=3).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(10, 2**31 - 1),
    min_tokens=st.integers(0, 10),
    temperature=st.floats(0.01, 1e9),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    top_k=IDS,
    seed=st.none() | st.integers(0, 2**62),
    n=st.integers(1, 100),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.lists(IDS, max_size=3),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 64),
    logit_bias=st.dictionaries(IDS, st.floats(max_value=1e6, allow_nan=False), max_size=3),
)
COMMAND_KINDS: dict[type, st.SearchStrategy[Any]] = {
    Submit: st.builds(
        Submit,
        request_id=TEXTS,
        token_ids=TOKENS,
        prompt_length=COUNTS,
        max_length=COUNTS,
        sampling=SAMPLING,
        seed=COUNTS,
        namespace=TEXTS,
        priority=st.integers(-(2**63), 2**63 - 1),
        deadline=st.none() | FLOATS,
        expected_tokens=st.none() | FLOATS,
        arrived=st.none() | FLOATS,
    ),
    Abort: st.builds(Abort, TEXTS),
    ResetCache: st.builds(ResetCache),
    Pause: st.builds(Pause, st.booleans()),
}
COMMANDS: st.SearchStrategy[Command] = st.one_of(*COMMAND_KINDS.values())
STATS = st.builds(
    ReplicaStats, **{field.name: COUNTS for field in dataclasses.fields(ReplicaStats)}
    | {"device": TEXTS, "attention": TEXTS, "tokens_per_second": FLOATS}
)  # fmt: skip
DELTAS = st.builds(
    Delta,
    request_id=TEXTS,
    token_ids=st.lists(NUMBERS, max_size=4).map(tuple),
    text=TEXTS,
    logprobs=st.lists(st.builds(TokenLogprob, NUMBERS, FLOATS, PAIRS), max_size=2).map(tuple),
    cached_tokens=COUNTS,
    started=FLOATS,
    finish_reason=st.sampled_from([None, "stop", "length", "abort"]),
    error=st.none() | TEXTS,
)
EVENT_KINDS: dict[type, st.SearchStrategy[Any]] = {
    events.Admitted: st.builds(events.Admitted, COUNTS, TEXTS, COUNTS),
    events.Progressed: st.builds(events.Progressed, COUNTS, TEXTS, COUNTS, st.lists(NUMBERS, max_size=4).map(tuple)),
    events.Preempted: st.builds(events.Preempted, COUNTS, TEXTS),
    events.Finished: st.builds(events.Finished, COUNTS, TEXTS),
    events.Stored: st.builds(events.Stored, COUNTS, COUNTS, TEXTS, HASHES),
    events.Evicted: st.builds(events.Evicted, COUNTS, COUNTS, TEXTS, HASHES),
    events.StepTimed: st.builds(events.StepTimed, COUNTS, COUNTS, COUNTS, COUNTS, FLOATS, COUNTS),
    events.ReplicaDown: st.builds(events.ReplicaDown, COUNTS),
    events.ReplicaUp: st.builds(events.ReplicaUp, COUNTS, COUNTS),
}
EVENTS = st.one_of(*EVENT_KINDS.values())
NEWS_KINDS: dict[type, st.SearchStrategy[Any]] = {
    Ready: st.builds(Ready, pages=COUNTS, max_batched_tokens=COUNTS, stats=STATS),
    StepReport: st.builds(
        StepReport,
        replica=COUNTS,
        stats=STATS,
        deltas=st.lists(DELTAS, max_size=3),
        events=st.lists(EVENTS, max_size=3),
        taken=COUNTS,
    ),
    LogLine: st.builds(LogLine, TEXTS, NUMBERS, TEXTS),
    Crash: st.builds(Crash, TEXTS, TEXTS, TEXTS),
}
NEWS: st.SearchStrategy[News] = st.one_of(*NEWS_KINDS.values())
LAUNCHES = st.builds(
    Launch,
    model=TEXTS,
    replica=COUNTS,
    device=TEXTS,
    sharing=COUNTS,
    torch_threads=COUNTS,
    options=st.builds(EngineOptions, kv_memory=st.none() | COUNTS | TEXTS, max_batched_tokens=st.none() | COUNTS),
    pages=st.none() | COUNTS,
    log_level=NUMBERS,
)
DECODERS: tuple[Callable[[bytes], object], ...] = (decode_launch, decode_commands, decode_news)


def same(left: Any, right: Any) -> bool:
    """Equality that looks into arrays, and at types."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(st.lists(COMMANDS, max_size=4))
def test_commands_arrive_as_they_were_sent(commands: list[Command]) -> None:
    (payload,) = encode_commands(commands)
    assert same(decode_commands(payload), commands)


@given(st.lists(NEWS, max_size=3))
def test_news_arrives_as_it_was_sent(news: list[News]) -> None:
    (payload,) = encode_news(news)
    assert same(decode_news(payload), news)


@given(LAUNCHES)
def test_a_launch_arrives_as_it_was_sent(launch: Launch) -> None:
    assert same(decode_launch(encode_launch(launch)), launch)


def test_every_message_has_its_place_in_these_tests() -> None:
    for union, kinds in ((Command, COMMAND_KINDS), (News, NEWS_KINDS), (events.Event, EVENT_KINDS)):
        assert set(kinds) == set(get_args(union))


def test_arrays_that_arrive_can_be_written_to() -> None:
    tokens = np.arange(10, dtype=np.int32)[::3]
    submit = Submit("a", tokens, 4, 8, SamplingParams(), 0)
    (arrived,) = decode_commands(encode_commands([submit])[0])
    assert isinstance(arrived, Submit)
    assert arrived.token_ids.tolist() == [0, 3, 6, 9]
    arrived.token_ids[0] = 7
    assert tokens[0] == 0


def test_numpy_numbers_arrive_as_pythons() -> None:
    timed: Any = events.StepTimed(0, np.int64(5), np.int32(2), np.uint8(3), np.float32(0.5))
    stats = ReplicaStats(*([0] * 14), 0.0)
    stats = dataclasses.replace(stats, device="cpu", attention="torch")
    (report,) = decode_news(encode_news([StepReport(0, stats, [], [timed])])[0])
    assert isinstance(report, StepReport)
    assert same(report.events, [events.StepTimed(0, 5, 2, 3, 0.5)])


def test_half_a_surrogate_pair_does_not_end_the_replica_that_it_is_sent_to() -> None:
    sampling = SamplingParams(stop=("half \ud83d", "whole \U0001f600"), logit_bias={1: 0.5})
    submit = Submit("a", np.arange(3, dtype=np.int32), 3, 9, sampling, 2**63 - 1)
    (arrived,) = decode_commands(encode_commands([submit])[0])
    assert isinstance(arrived, Submit)
    assert arrived.sampling == dataclasses.replace(sampling, stop=("half \ufffd", "whole \U0001f600"))
    assert arrived.token_ids.tolist() == [0, 1, 2]
    assert arrived.seed == 2**63 - 1
    assert decode_news(encode_news([LogLine("preble", 30, "file \udcff")])[0]) == [LogLine("preble", 30, "file \ufffd")]


def test_something_else_is_not_sent() -> None:
    nothing: Any = object()
    with pytest.raises(TypeError, match="object cannot be sent"):
        encode_commands([Abort(nothing)])
    with pytest.raises(KeyError):
        encode_commands([nothing])


def test_what_is_too_long_for_a_frame_goes_out_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Command] = [Abort(f"request {index}") for index in range(100)]
    monkeypatch.setattr(wire, "MAX_FRAME", 200)
    payloads = encode_commands(commands)
    assert all(len(payload) <= 200 for payload in payloads)
    assert [command for payload in payloads for command in decode_commands(payload)] == commands
    with pytest.raises(FrameError, match=r"an? Abort of .* does not fit"):
        encode_commands([*commands, Abort("x" * 200), *commands])


def test_more_commands_than_a_list_may_hold_go_out_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Command] = [Abort(str(index)) for index in range(10)]
    monkeypatch.setattr(wire, "MAX_ITEMS", 3)
    arrived = [decode_commands(payload) for payload in encode_commands(commands)]
    assert max(map(len, arrived)) <= 3
    assert [command for some in arrived for command in some] == commands


# What did not come from us


def hostile(payload: bytes) -> None:
    """All decoders take it, or refuse it in the one documented way."""
    for decode in DECODERS:
        with suppress(FrameError):
            decode(payload)


@given(st.lists(NEWS, min_size=1, max_size=2), st.data())
def test_a_truncated_payload_is_refused(news: list[News], data: st.DataObject) -> None:
    (payload,) = encode_news(news)
    with pytest.raises(FrameError):
        decode_news(payload[: data.draw(st.integers(0, len(payload) - 1))])
    with pytest.raises(FrameError):
        decode_news(payload + b"\0")


@settings(max_examples=300)
@given(st.lists(COMMANDS, max_size=2).map(encode_commands) | st.lists(NEWS, max_size=2).map(encode_news), st.data())
def test_flipped_bits_give_messages_or_a_frame_error(payloads: list[bytes], data: st.DataObject) -> None:
    damaged = bytearray(payloads[0])
    for bit in data.draw(st.lists(st.integers(0, 8 * len(damaged) - 1), min_size=1, max_size=4)):
        damaged[bit // 8] ^= 1 << bit % 8
    hostile(bytes(damaged))


@given(st.binary(max_size=100))
def test_random_bytes_give_messages_or_a_frame_error(payload: bytes) -> None:
    hostile(payload)


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXTS | st.binary(max_size=20)
    | st.sampled_from(["Submit", "Abort", "StepReport", "Delta", "Stored", "SamplingParams", "Launch"]),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=40,
)  # fmt: skip


@settings(max_examples=300)
@given(JSON_LIKE)
def test_random_msgpack_gives_messages_or_a_frame_error(value: object) -> None:
    hostile(msgspec.msgpack.encode(value))
    hostile(msgspec.msgpack.encode([value]))


def packed(message: object) -> list[Any]:
    """A message as it travels, to be spoilt."""
    encode: Callable[[Sequence[Any]], list[bytes]]
    encode = encode_news if isinstance(message, get_args(News)) else encode_commands
    found: list[list[Any]] = msgspec.msgpack.decode(encode([message])[0])
    return found[0]


SUBMIT = Submit("a", np.arange(4, dtype=np.int32), 4, 8, SamplingParams(), 1)
SAMPLING_AT = 5


@pytest.mark.parametrize("index", range(1, 11))
@pytest.mark.parametrize("wrong", [{"a": 1}, [b"\0" * 8], b"\0\0\0", 1.5, True])
def test_a_value_of_the_wrong_type_is_refused_in_any_field(index: int, wrong: object) -> None:
    message = packed(SUBMIT)
    if isinstance(wrong, float) and isinstance(message[index], float | None):
        return  # a deadline, say
    message[index] = wrong
    with pytest.raises(FrameError, match=r"holds no message|are no array"):
        decode_commands(msgspec.msgpack.encode([message]))


@pytest.mark.parametrize(
    ("field", "wrong", "why"),
    [
        ("temperature", -1.0, "temperature must be at least 0"),
        ("top_p", 7.0, "top_p must be"),
        ("n", 0, "n must be"),
        ("stop", [""], "empty string"),
        ("logit_bias", [[-1, 0.0]], "non-negative"),
        ("logprobs", 10**6, "logprobs must be between"),
    ],
)
def test_sampling_that_means_nothing_is_refused(field: str, wrong: object, why: str) -> None:
    message = packed(SUBMIT)
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    message[SAMPLING_AT][1 + names.index(field)] = wrong
    with pytest.raises(FrameError, match=why):
        decode_commands(msgspec.msgpack.encode([message]))


def test_missing_and_surplus_fields_are_refused() -> None:
    message = packed(SUBMIT)
    for wrong in (message[:-1], [*message, 0], message[1:], []):
        with pytest.raises(FrameError, match="holds no message"):
            decode_commands(msgspec.msgpack.encode([wrong]))


def test_a_direction_takes_only_its_own_messages() -> None:
    (command,), (news,) = encode_commands([Abort("a")]), encode_news([LogLine("preble", 30, "text")])
    launch = encode_launch(Launch("model", 0, "cpu", 1, 1, EngineOptions()))
    for decode, payloads in (
        (decode_launch, (command, news, msgspec.msgpack.encode([]), launch[:0])),
        (decode_commands, (news, launch)),
        (decode_news, (command, launch)),
    ):
        for payload in payloads:
            with pytest.raises(FrameError):
                decode(payload)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x91\x99\xaaStepReport", b"\xdd\x00\x00\x00\x01"])
def test_deep_nesting_ends_in_a_frame_error(opening: bytes) -> None:
    hostile(opening * 1_000_000)
    message = packed(SUBMIT)
    nested = msgspec.msgpack.encode(message[:-1])[1:] + opening * 1_000_000
    hostile(b"\x91" + bytes([0x90 | len(message)]) + nested)


def test_a_list_longer_than_any_message_needs_is_refused() -> None:
    message = packed(SUBMIT)
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    message[SAMPLING_AT][1 + names.index("stop_token_ids")] = [0] * (wire.MAX_ITEMS + 1)
    with pytest.raises(FrameError, match="of length <= 1048576"):
        decode_commands(msgspec.msgpack.encode([message]))


@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 2**24])
def test_a_claimed_count_allocates_nothing(count: int) -> None:
    claims = count.to_bytes(4)
    report = packed(StepReport(0, ReplicaStats(0, "cpu", "torch", *([0] * 11), 0.0)))
    head = b"\x91" + bytes([0x90 | len(report)]) + b"".join(map(msgspec.msgpack.encode, report[:3]))
    tracemalloc.start()
    try:
        for opening in (b"", b"\x91", b"\x91\x9b\xa6Submit", b"\x91\x95\xa5Crash", head):
            for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):
                for decode in DECODERS:
                    with pytest.raises(FrameError):
                        decode(opening + kind + claims + b"\0")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_messages_themselves_do_without_the_codec() -> None:
    code = "import preble.replica.base, preble.engine.messages, sys; print('msgspec' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
