"""Prompts written in a format and read back share what they shared."""

from __future__ import annotations

import gzip
import json
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import saved, shared_tokens

from preble.errors import InvalidRequest
from preble.sim.trace import Trace, TracedRequest
from preble.sim.traces import FileTrace, read_trace, write_trace

Prompt = tuple[tuple[int, ...], int]
"""The contents of its blocks, and how many tokens the last one holds."""
BLOCK_SIZES = {"mooncake": 512, "bailian": 16, "blocks": 5}


def length(prompt: Prompt, block_size: int) -> int:
    contents, fill = prompt
    return (len(contents) - 1) * block_size + fill


def sharing(one: Prompt, other: Prompt, block_size: int) -> int:
    """Tokens of the leading blocks that are equal in content and in how far they are filled."""
    shared = 0
    for number, (first, second) in enumerate(zip(one[0], other[0], strict=False)):
        fills = {
            prompt[1] if number == len(prompt[0]) - 1 else block_size
            for prompt in (one, other)
        }  # fmt: skip
        if first != second or len(fills) > 1:
            break
        shared += fills.pop()
    return shared


def hashed(prompts: list[Prompt], scheme: str, block_size: int, numbers: list[int]) -> list[list[int]]:
    """Block numbers, as formats make them: of a block and all before it, or of the block alone; with how far the last
    one is filled, or without."""
    known: dict[object, int] = {}
    result = []
    for contents, fill in prompts:
        row = []
        for at, content in enumerate(contents):
            key: object = contents[: at + 1] if "chained" in scheme else content
            if "filled" in scheme:
                key = (key, fill if at == len(contents) - 1 else block_size)
            row.append(known.setdefault(key, numbers[len(known) % len(numbers)] + len(known) // len(numbers)))
        result.append(row)
    return result


@st.composite
def written(draw: st.DrawFn) -> tuple[str, int, list[Prompt], list[dict[str, object]]]:
    """Format, block size, prompts, and the lines that tell of them, in order of arrival."""
    format = draw(st.sampled_from(sorted(BLOCK_SIZES)))
    block_size = BLOCK_SIZES[format]
    fills = st.sampled_from([1, 2, block_size - 1, block_size])
    contents = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
    prompts: list[Prompt] = draw(st.lists(st.tuples(contents, fills), min_size=1, max_size=8))
    scheme = draw(st.sampled_from(["chained filled", "chained", "filled", "alone"]))
    # Far enough apart that numbers made by counting on from them stay different.
    numbers = [draw(st.sampled_from([0, -(2**63), 2**40, 2**62]))]
    rows: list[dict[str, object]] = []
    for at, (prompt, ids) in enumerate(zip(prompts, hashed(prompts, scheme, block_size, numbers), strict=True)):
        tokens = length(prompt, block_size)
        if format == "blocks":
            rows.append({"t": at, "in": tokens, "out": 1, "block": block_size, "blocks": ids})
        else:
            rows.append({"timestamp": at, "input_length": tokens, "output_length": 1, "hash_ids": ids})
        if format == "bailian":
            rows[-1]["chat_id"] = at
    return format, block_size, prompts, rows


def assert_shares(trace: Trace, prompts: list[Prompt], block_size: int) -> None:
    assert [one.prompt_tokens for one in trace.requests] == [length(one, block_size) for one in prompts]
    for one, other in combinations(range(len(prompts)), 2):
        assert shared_tokens(trace, one, other) == sharing(prompts[one], prompts[other], block_size)


def assert_numbered(trace: Trace) -> None:
    """Numbers count from 0 in order of first use; that of a partial block is in no prompt of another length."""
    order = list(dict.fromkeys(number for one in trace.requests for number in one.blocks.tolist()))
    assert order == list(range(len(order)))
    for one in trace.requests:
        if one.prompt_tokens % trace.block_size:
            last = one.blocks[-1]
            assert {other.prompt_tokens for other in trace.requests if last in other.blocks} == {one.prompt_tokens}


@settings(max_examples=150, deadline=None)
@given(written())
def test_any_two_prompts_share_what_they_shared(made: tuple[str, int, list[Prompt], list[dict[str, object]]]) -> None:
    format, block_size, prompts, rows = made
    with tempfile.TemporaryDirectory() as folder:
        trace = read_trace(saved(Path(folder), rows))
        assert (trace.format, trace.block_size) == (format, block_size)
        assert_shares(trace, prompts, block_size)
        assert_numbered(trace)
        again = Path(folder) / "again.jsonl.gz"
        write_trace(trace, again)
        assert_shares(read_trace(again), prompts, block_size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2) | st.just(2**31 - 1), min_size=1, max_size=6), min_size=1, max_size=6))
def test_token_ids_come_back_as_they_are(prompts: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trace = read_trace(saved(Path(folder), [{"tokens": ids, "t": 1} for ids in prompts]))
    assert [one.blocks.tolist() for one in trace.requests] == prompts
    assert [trace.tokens(one).tolist() for one in trace.requests] == prompts


requests = st.builds(
    TracedRequest,
    arrival=st.floats(0, 1e6),
    prompt_tokens=st.just(3),
    output_tokens=st.integers(1, 1000),
    blocks=st.lists(st.integers(0, 5), min_size=3, max_size=3).map(lambda ids: np.array(ids, dtype=np.int32)),
    session=st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
    think=st.floats(0, 1e6),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=1, max_size=8), st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_a_written_trace_keeps_times_sessions_and_think_times(drawn: list[TracedRequest], name: str) -> None:
    ordered = sorted(drawn, key=lambda one: one.arrival)
    trace = Trace("drawn", 1, tuple(ordered))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_trace(trace, path)
        first = path.read_bytes()
        write_trace(trace, path)
        assert path.read_bytes() == first
        back = read_trace(path)
    assert (first[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert not name.endswith(".gz") or first[4:8] == bytes(4), "no time of writing"
    for one, other in zip(ordered, back.requests, strict=True):
        assert other.arrival == one.arrival - ordered[0].arrival
        assert (other.output_tokens, other.session) == (one.output_tokens, one.session)
        assert other.think == (one.think if one.session is not None else 0)


def test_lines_are_in_the_schema_and_count_the_turns(tmp_path: Path) -> None:
    blocks = np.array([3, 1], dtype=np.int32)
    turns = [TracedRequest(float(at), 7, 2, blocks, session, 0.5) for at, session in enumerate(("a", None, "b", "a"))]
    write_trace(Trace("some", 5, tuple(turns)), tmp_path / "some.jsonl.gz")
    with gzip.open(tmp_path / "some.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    plain = {"in": 7, "out": 2, "block": 5, "blocks": [3, 1]}
    assert rows == [
        {"t": 0.0, **plain, "sid": "a", "turn": 0, "think_s": 0.5},
        {"t": 1.0, **plain},
        {"t": 2.0, **plain, "sid": "b", "turn": 0, "think_s": 0.5},
        {"t": 3.0, **plain, "sid": "a", "turn": 1, "think_s": 0.5},
    ]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    trace: FileTrace = read_trace(saved(tmp_path, ['{"tokens": [1]}']))
    with pytest.raises(InvalidRequest, match=r"none/x\.jsonl cannot be written: No such file"):
        write_trace(trace, tmp_path / "none" / "x.jsonl")
