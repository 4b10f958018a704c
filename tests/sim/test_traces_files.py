"""Files that are compressed, broken or missing, and what malformed lines are told."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import EXAMPLES, saved

from preble.errors import InvalidRequest
from preble.sim.traces import FORMATS, FileTrace, read_trace


def values(trace: FileTrace) -> list[Any]:
    return [
        (one.arrival, one.prompt_tokens, one.output_tokens, one.blocks.tolist(), one.session, one.think)
        for one in trace.requests
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_gzip_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path: Path, format: str) -> None:
    plain = read_trace(saved(tmp_path, EXAMPLES[format]))
    text = "\ufeff" + "\r\n\n  \n".join(["", *EXAMPLES[format]])
    for name in ("x.jsonl.gz", "x"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()))
        packed = read_trace(path)
        assert packed.name == "x"
        assert values(packed) == values(plain)


BAD_LINES: list[tuple[str, str | dict[str, object], str]] = [
    ("mooncake", '{"timestamp": 1', "this is not JSON"),
    ("mooncake", "[1, 2]", "expected a JSON object"),
    ("mooncake", "[" * 100_000, "this is not JSON"),
    ("mooncake", {"input_length": ...}, "input_length is missing"),
    ("mooncake", {"output_length": ...}, "output_length is missing"),
    ("mooncake", {"timestamp": ...}, "timestamp is missing"),
    ("mooncake", {"hash_ids": ...}, "hash_ids is missing"),
    ("mooncake", {"input_length": 0, "hash_ids": []}, "input_length is 0, expected a whole number from 1"),
    ("mooncake", {"input_length": 1100.0}, "input_length is 1100.0"),
    ("mooncake", {"input_length": True}, "input_length is True"),
    ("mooncake", {"input_length": 2**31}, "input_length is 2147483648"),
    ("mooncake", {"output_length": -1}, "output_length is -1, expected a whole number from 0"),
    ("mooncake", {"timestamp": float("nan")}, "timestamp is nan, expected milliseconds"),
    ("mooncake", {"timestamp": float("inf")}, "timestamp is inf"),
    ("mooncake", {"timestamp": 10**400}, "timestamp is 1000"),
    ("mooncake", {"hash_ids": "123"}, "hash_ids is '123', expected a list"),
    ("mooncake", {"hash_ids": [1, 2, 3.5]}, r"hash_ids is \[1, 2, 3.5\], expected a list"),
    ("mooncake", {"hash_ids": [1, 2, True]}, "True"),
    ("mooncake", {"hash_ids": [1, 2, 2**63]}, "64 bits"),
    ("mooncake", {"hash_ids": [1, 2]}, "hash_ids has 2 numbers, but 1100 prompt tokens are 3 blocks of 512"),
    ("mooncake", {"input_length": 1024}, "hash_ids has 3 numbers, but 1024 prompt tokens are 2 blocks of 512"),
    ("bailian", {"chat_id": ...}, "chat_id is missing"),
    ("bailian", {"chat_id": []}, r"chat_id is \[\]"),
    ("bailian", {"parent_chat_id": 1.5}, "parent_chat_id is 1.5"),
    ("bailian", {"input_length": 33}, "3 blocks of 16"),
    ("azure", "2023-11-16 18:17:99,4808,10", "TIMESTAMP is '2023-11-16 18:17:99'"),
    ("azure", "2023-11-16 18:17:03,4808", "there are 2 values, expected 3"),
    ("azure", "2023-11-16 18:17:03,0,10", "ContextTokens is 0"),
    ("azure", "2023-11-16 18:17:03,many,10", "ContextTokens is 'many'"),
    ("azure", '2023-11-16 18:17:03,"4"x,10', "this is not CSV"),
    ("burstgpt", "x,ChatGPT,472,18,490,Conversation log", "Timestamp is 'x'"),
    ("burstgpt", "inf,ChatGPT,472,18,490,Conversation log", "Timestamp is inf"),
    ("burstgpt", "5,ChatGPT,-472,18,490,Conversation log", "Request tokens is -472"),
    ("blocks", {"t": 1e13}, "t is 10000000000000.0, expected seconds"),
    ("blocks", {"block": ..., "blocks": ...}, "its block is absent, expected 16 tokens"),
    ("blocks", {"block": 10}, "its block is 10 tokens, expected 16 tokens"),
    ("blocks", {"block": ...}, "block is missing"),
    ("blocks", {"blocks": ...}, "blocks is missing"),
    ("blocks", {"think_s": -1}, "think_s is -1, expected seconds, a number from 0"),
    ("blocks", {"sid": {}}, "sid is {}"),
    ("prompts", {"text": ...}, "there is no prompt"),
    ("prompts", {"prompt": "b"}, "it has text and prompt"),
    ("prompts", {"text": ""}, "text is empty"),
    ("prompts", {"text": ["a"]}, "text is a list, expected a string"),
    ("prompts", {"text": "\ud800"}, "surrogate"),
    ("prompts", {"t": ...}, "either every line has a time or none"),
    ("prompts", {"text": ..., "tokens": [1]}, "to mix them takes a tokenizer"),
    ("prompts", {"t": None}, "t is None"),
    ("prompts", {"output_tokens": "many"}, "output_tokens is 'many'"),
]
"""Format, a line or what to change in the format's first (`...` removes it), and the complaint about it."""


@pytest.mark.parametrize(("format", "bad", "message"), BAD_LINES, ids=[f"{one[0]}: {one[2]}" for one in BAD_LINES])
def test_a_malformed_line_is_named_by_file_and_number(
    tmp_path: Path, format: str, bad: str | dict[str, object], message: str
) -> None:
    good = EXAMPLES[format]
    if isinstance(bad, dict):
        bad = {key: value for key, value in (json.loads(good[0]) | bad).items() if value is not ...}
    path = saved(tmp_path, [*good, "", bad, *good[1:]], name="some.trace")
    with pytest.raises(InvalidRequest, match=rf"some\.trace, line {len(good) + 2}: .*{message}"):
        read_trace(path)


def test_token_ids_that_fit_no_int32_are_named(tmp_path: Path) -> None:
    for wrong in (-1, 2**31, 2**70):
        with pytest.raises(InvalidRequest, match=rf"line 2: .*({wrong}|64 bits)"):
            read_trace(saved(tmp_path, [{"tokens": [1, 2]}, {"tokens": [3, wrong, 5]}]))


def test_what_is_no_trace_is_told_what_traces_look_like(tmp_path: Path) -> None:
    json_names_in_csv = "timestamp,input_length,output_length,hash_ids"
    for line in ('{"kind": "texts"}', "a,b,c", json_names_in_csv, "some words", '"unclosed', "[1]"):
        with pytest.raises(InvalidRequest, match=r"line 1: .* begins no trace format") as caught:
            read_trace(saved(tmp_path, [line]))
        for one in FORMATS.values():
            assert f"{one.name}: {one.example}" in str(caught.value)
    with pytest.raises(InvalidRequest, match="line 2: this is not JSON"):
        read_trace(saved(tmp_path, ["", '{"t": 1, '], name="x"))


def test_an_unknown_format_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'parquet', expected one of mooncake, bailian, azure, burstgpt, blocks"):
        read_trace(saved(tmp_path, EXAMPLES["blocks"]), format="parquet")
    with pytest.raises(InvalidRequest, match="line 1: no column is called 'TIMESTAMP'"):
        read_trace(saved(tmp_path, EXAMPLES["burstgpt"]), format="azure")
    with pytest.raises(InvalidRequest, match="line 1: this is not JSON"):
        read_trace(saved(tmp_path, EXAMPLES["burstgpt"]), format="blocks")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.jsonl cannot be read: No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(InvalidRequest, match=r"cannot be read: .*null"):
        read_trace("a\0b")
    for content in (b"", b"\n  \n", gzip.compress(b"")):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(InvalidRequest, match="empty is empty"):
            read_trace(tmp_path / "empty")
    with pytest.raises(InvalidRequest, match="has no request that could be replayed"):
        read_trace(saved(tmp_path, EXAMPLES["azure"][:1]))
    (tmp_path / "rubbish").write_bytes(bytes(range(128, 256)) * 100)
    with pytest.raises(InvalidRequest, match="line 1: this is not text in UTF-8"):
        read_trace(tmp_path / "rubbish")
    (tmp_path / "latin").write_bytes(b'{"text": "a", "t": 1}\n{"text": "\xe9", "t": 1}\n')
    with pytest.raises(InvalidRequest, match="latin, line 2: this is not text in UTF-8"):
        read_trace(tmp_path / "latin")


def test_broken_gzip_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    content = ("\n".join(f'{{"tokens": [{number}, {number * 7919 % 1000}]}}' for number in range(3000))).encode()
    packed = gzip.compress(content)
    wrong_at = len(packed) // 2
    for broken in (packed[: len(packed) // 2], packed[:-8] + bytes(8), b"not gzip", packed[:5]):
        path.write_bytes(broken)
        with pytest.raises(InvalidRequest, match=r"x\.gz cannot be read past line \d+: "):
            read_trace(path)
    path.write_bytes(packed[:wrong_at] + bytes(100) + packed[wrong_at + 100 :])
    with pytest.raises(InvalidRequest, match=r"x\.gz(, line \d+:| cannot be read past line)"):
        read_trace(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutilated_files(draw: st.DrawFn) -> bytes:
    """An example with a line changed: other values, other text, other bytes."""
    lines: list[str | bytes] = list(EXAMPLES[draw(st.sampled_from(sorted(FORMATS)))])
    number = draw(st.integers(0, len(lines) - 1))
    line = lines[number]
    assert isinstance(line, str)
    kind = draw(st.sampled_from(["value", "text", "bytes", "cut", "splice"]))
    if kind == "value" and line.startswith("{"):
        row = json.loads(line)
        row[draw(st.sampled_from(sorted(row)))] = draw(json_values)
        lines[number] = json.dumps(row)
    elif kind == "value":
        cells = line.split(",")
        cells[draw(st.integers(0, len(cells) - 1))] = draw(st.text(max_size=5) | st.integers().map(str))
        lines[number] = ",".join(cells)
    elif kind == "text":
        lines[number] = draw(st.text(max_size=30))
    elif kind == "bytes":
        lines[number] = draw(st.binary(max_size=30))
    elif kind == "cut":
        lines[number] = line[: draw(st.integers(0, len(line)))]
    else:
        at = draw(st.integers(0, len(line)))
        lines[number] = line[:at] + draw(st.text(max_size=3)) + line[at:]
    return b"\n".join(one if isinstance(one, bytes) else one.encode("utf-8", "surrogatepass") for one in lines)


def read_or_refused(content: bytes, format: str | None = None) -> FileTrace | str:
    """The trace, or what was said against it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.trace"
        path.write_bytes(content)
        try:
            return read_trace(path, format=format)
        except InvalidRequest as error:
            return str(error)


@settings(max_examples=400, deadline=None)
@given(mutilated_files() | st.binary(max_size=60), st.none() | st.sampled_from(sorted(FORMATS)))
def test_whatever_a_file_holds_it_is_read_or_one_error_names_it(content: bytes, format: str | None) -> None:
    trace = read_or_refused(content, format)
    if isinstance(trace, str):
        assert "some.trace" in trace
        return
    for one in trace.requests:
        assert one.prompt_tokens >= 1
        assert one.output_tokens >= 1
        assert one.think >= 0
        assert len(one.blocks) == -(-one.prompt_tokens // trace.block_size)
        assert one.blocks.min() >= 0
    arrivals = [one.arrival for one in trace.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_in_gzip_is_an_error_or_harmless(at: int, byte: int) -> None:
    lengths = random.Random(3)
    lines = [f'{{"t":{number},"in":{lengths.randrange(1, 99)},"out":1}}\n' for number in range(500)]
    packed = bytearray(gzip.compress("".join(lines).encode(), mtime=0))
    packed[at % len(packed)] = byte
    trace = read_or_refused(bytes(packed))
    assert len(trace.requests) == 500 if isinstance(trace, FileTrace) else "some.trace" in trace


def test_progress_counts_the_bytes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, [{"t": number, "in": 5, "out": 1} for number in range(2000)], name="long.jsonl")
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take standard error for a terminal
    size = path.stat().st_size
    read_trace(path, progress=True)
    drawn = capsys.readouterr()
    assert not drawn.out
    assert "long.jsonl" in drawn.err
    assert f"{size / 1000:.1f}/{size / 1000:.1f} kB" in drawn.err
    read_trace(path)
    assert capsys.readouterr() == ("", "")
