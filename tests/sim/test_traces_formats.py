"""What each reader makes of a small file of its format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_traces import EXAMPLES, saved, shared_tokens

from preble.errors import InvalidRequest
from preble.sim.traces import FORMATS, read_trace


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_recognised_by_its_first_line_whatever_the_file_is_called(tmp_path: Path, format: str) -> None:
    path = saved(tmp_path, EXAMPLES[format], name="something.dat")
    found = read_trace(path)
    named = read_trace(path, format=format)
    assert (found.format, named.format) == (format, format)
    assert found.name == "something"
    assert len(found.requests) == len(named.requests) == 3
    for trace in (found, named):
        assert trace.requests[0].arrival == 0
        assert [len(one.blocks) for one in trace.requests] == [
            -(-one.prompt_tokens // trace.block_size) for one in trace.requests
        ]
        assert {one.blocks.dtype for one in trace.requests} == {np.dtype(np.int32)}


def test_the_examples_in_error_messages_are_of_their_formats(tmp_path: Path) -> None:
    for name, one in FORMATS.items():
        first = one.example.split(" or {")[0]
        lines = [first] if one.is_json else [first, *EXAMPLES[name][1:]]
        assert read_trace(saved(tmp_path, lines)).format == name


def test_mooncake_counts_milliseconds_and_blocks_of_512(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, EXAMPLES["mooncake"]))
    assert trace.block_size == 512
    assert [one.arrival for one in trace.requests] == [0.0, 0.5, 0.7]
    assert [one.prompt_tokens for one in trace.requests] == [1100, 1024, 600]
    assert [one.output_tokens for one in trace.requests] == [5, 6, 7]
    assert [one.session for one in trace.requests] == [None, None, None]
    assert [one.blocks.tolist() for one in trace.requests] == [[0, 1, 2], [0, 1], [0, 3]]
    assert shared_tokens(trace, 0, 1) == 1024
    assert shared_tokens(trace, 0, 2) == 512


def test_block_numbers_may_be_any_64_bits_and_count_from_0_in_order_of_arrival(tmp_path: Path) -> None:
    row = {"input_length": 1024, "output_length": 1}
    trace = read_trace(
        saved(
            tmp_path,
            [
                {"timestamp": 9000, **row, "hash_ids": [-(2**63), 2**63 - 1]},
                {"timestamp": 2000, **row, "hash_ids": [2**40, 0]},
                {"timestamp": 2000, **row, "hash_ids": [2**40, -(2**63)]},
            ],
        )
    )
    assert [one.blocks.tolist() for one in trace.requests] == [[0, 1], [0, 2], [2, 3]]
    assert [one.arrival for one in trace.requests] == [0, 0, 7]


def test_a_partial_block_never_matches_one_that_is_filled_otherwise(tmp_path: Path) -> None:
    lengths = {"full": 1024, "partial": 700, "same": 700, "shorter": 699}
    trace = read_trace(
        saved(
            tmp_path,
            [
                {"timestamp": 0, "input_length": length, "output_length": 1, "hash_ids": [5, 6]}
                for length in lengths.values()
            ],
        )
    )
    assert shared_tokens(trace, 1, 2) == 700
    assert shared_tokens(trace, 0, 1) == shared_tokens(trace, 1, 3) == shared_tokens(trace, 0, 3) == 512


def test_bailian_chats_of_one_root_are_a_session(tmp_path: Path) -> None:
    row = {"input_length": 16, "output_length": 1, "type": "text", "turn": 1, "hash_ids": [1]}
    parents = {10: 11, 11: 12, 12: -1, 13: -1, 14: 99, 15: 99, 16: 12}
    lines = [
        {"chat_id": chat, "parent_chat_id": parent, "timestamp": chat / 2, **row} for chat, parent in parents.items()
    ]
    trace = read_trace(saved(tmp_path, lines))
    assert trace.block_size == 16
    assert [one.session for one in trace.requests] == ["12", "12", "12", "13", "99", "99", "12"]
    assert {one.think for one in trace.requests} == {0.0}
    assert [one.arrival for one in trace.requests] == [0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_bailian_chats_that_are_their_own_ancestors_are_an_error(tmp_path: Path) -> None:
    row = {"timestamp": 1, "input_length": 16, "output_length": 1, "hash_ids": [1]}
    lines = [{"chat_id": chat, "parent_chat_id": parent, **row} for chat, parent in ((1, -1), (2, 3), (3, 2))]
    with pytest.raises(InvalidRequest, match="line 2: chat 2 descends from itself"):
        read_trace(saved(tmp_path, lines))


def test_azure_times_have_seven_digits_or_a_time_zone_and_columns_any_order(tmp_path: Path) -> None:
    old = read_trace(saved(tmp_path, EXAMPLES["azure"]))
    assert [one.arrival for one in old.requests] == [0.0, 0.052, 2.0]
    assert [one.prompt_tokens for one in old.requests] == [4808, 3180, 110]
    assert [one.output_tokens for one in old.requests] == [10, 8, 27]
    assert old.block_size == 4808
    assert [one.blocks.tolist() for one in old.requests] == [[0], [1], [2]]
    assert not any(shared_tokens(old, *pair) for pair in ((0, 1), (0, 2), (1, 2)))
    new = read_trace(
        saved(
            tmp_path,
            [
                "\ufeffTIMESTAMP,NumImages,ContextTokens,GeneratedTokens\r",
                "2024-05-10 00:00:00.009930+00:00,3,2162,5\r",
                "2024-05-10 00:00:00+00:00,0,2399,0\r",
                '"2024-05-10 02:00:01.5+02:00",0,76,15\r',
            ],
        )
    )
    assert [one.arrival for one in new.requests] == [0.0, 0.00993, 1.5]
    assert [one.prompt_tokens for one in new.requests] == [2399, 2162, 76]
    assert [one.output_tokens for one in new.requests] == [1, 5, 15]
    assert (new.without_output, new.left_out) == (1, 0)


def test_burstgpt_leaves_failed_requests_out_and_counts_them(tmp_path: Path) -> None:
    lines = [*EXAMPLES["burstgpt"], "119,GPT-4,417,0,417,API log", "120,GPT-4,0,0,0,API log", "121,GPT-4,0,9,9,API log"]
    trace = read_trace(saved(tmp_path, lines))
    assert [one.arrival for one in trace.requests] == [0, 40, 113]
    assert [(one.prompt_tokens, one.output_tokens) for one in trace.requests] == [(472, 18), (1087, 230), (417, 276)]
    assert (trace.left_out, trace.without_output) == (3, 0)
    assert trace.block_size == 1087
    assert trace.first(1).left_out == 3, "a cut trace still says what its file was"
    with pytest.raises(InvalidRequest, match=r"no request that could be replayed: all 1 of its requests failed"):
        read_trace(saved(tmp_path, [EXAMPLES["burstgpt"][0], "119,GPT-4,417,0,417,API log"]))


def test_burstgpt_sessions_think_between_an_end_and_the_next_request(tmp_path: Path) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    lines = [
        header,
        "100.0,aa,43,GPT-4,906,446,1352,Conversation log",
        "110.0,,2,ChatGPT,36,29,65,API log",
        "120.0,bb,5,ChatGPT,36,29,65,Conversation log",
        "150.5,aa,3,GPT-4,906,446,1352,Conversation log",
        "151.0,aa,3,GPT-4,906,446,1352,Conversation log",
    ]
    trace = read_trace(saved(tmp_path, lines))
    assert [one.session for one in trace.requests] == ["aa", None, "bb", "aa", "aa"]
    assert [one.think for one in trace.requests] == [0, 0, 0, 7.5, 0]


def test_blocks_have_sessions_and_think_times(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, EXAMPLES["blocks"]))
    assert trace.block_size == 16
    assert [one.arrival for one in trace.requests] == [0, 0.25, 2.5]
    assert [one.session for one in trace.requests] == ["a", None, "a"]
    assert [one.think for one in trace.requests] == [0, 0, 1.5]
    assert [one.blocks.tolist() for one in trace.requests] == [[0, 1], [0], [0, 2, 3]]


def test_blocks_without_blocks_share_nothing(tmp_path: Path) -> None:
    lines = [{"t": 7, "in": 30, "out": 0, "sid": 4}, {"t": 6.5, "in": 50, "out": 2}]
    trace = read_trace(saved(tmp_path, lines))
    assert trace.block_size == 50
    assert [one.arrival for one in trace.requests] == [0, 0.5]
    assert [one.blocks.tolist() for one in trace.requests] == [[0], [1]]
    assert [one.session for one in trace.requests] == [None, "4"]
    assert [one.output_tokens for one in trace.requests] == [2, 1]
    assert trace.without_output == 1


def test_texts_without_a_tokenizer_are_their_bytes(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, [*EXAMPLES["prompts"], {"text": "né", "t": 9}]))
    assert trace.block_size == 1
    assert trace.requests[0].blocks.tolist() == list(b"Once upon a time")
    assert trace.requests[3].blocks.tolist() == [0x6E, 0xC3, 0xA9]
    assert shared_tokens(trace, 0, 1) == len("Once ")
    assert [one.arrival for one in trace.requests] == [0, 1.5, 2, 6]
    assert [one.output_tokens for one in trace.requests] == [9, 128, 128, 128]
    assert [one.session for one in trace.requests] == ["a", None, "17", None]


def test_texts_go_through_the_tokenizer_and_mix_with_token_ids(tmp_path: Path) -> None:
    words = {"one": 11, "two": 22}
    lines = [{"text": "one two"}, {"tokens": [11, 22, 2**31 - 1]}]
    trace = read_trace(saved(tmp_path, lines), tokenize=lambda text: [words[word] for word in text.split()])
    assert [one.blocks.tolist() for one in trace.requests] == [[11, 22], [11, 22, 2**31 - 1]]
    with pytest.raises(InvalidRequest, match="line 2: it has tokens, the lines before have text"):
        read_trace(saved(tmp_path, lines))


def test_what_a_tokenizer_may_not_give(tmp_path: Path) -> None:
    path = saved(tmp_path, ['{"text": "a"}'])
    for given in ([], [-1], [2**31], [0.5], [[1]]):
        with pytest.raises(InvalidRequest, match="line 1: "):
            read_trace(path, tokenize=lambda text, given=given: given)


def test_prompts_without_times_arrive_in_a_poisson_process_drawn_from_the_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"tokens": [number]} for number in range(2000)])
    first, again, other = ([one.arrival for one in read_trace(path, seed=seed).requests] for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] == 0
    gaps = np.diff(first)
    # Gaps of a Poisson process have the mean 1 and the deviation 1, here within 4 standard errors.
    assert abs(gaps.mean() - 1) < 4 / np.sqrt(len(gaps))
    assert abs(gaps.std() - 1) < 4 * np.sqrt(2 / len(gaps))
    assert [one.blocks[0] for one in read_trace(path).requests] == list(range(2000)), "in the order of the file"
