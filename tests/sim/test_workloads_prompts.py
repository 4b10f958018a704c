"""Chained block numbers: two prompts share as many blocks as they have whole blocks in common."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.errors import InvalidRequest
from preble.sim.workloads.prompts import PromptBook, Segment

segments = st.builds(Segment, st.integers(0, 2), st.integers(1, 20))
paths = st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=12)


def spelled(path: list[Segment]) -> list[object]:
    """The prompt token by token: a token is its place in a text, after the whole segments before it."""
    return [(tuple(path[:i]), key, place) for i, (key, tokens) in enumerate(path) for place in range(tokens)]


def common(one: list[object], other: list[object]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(paths, st.integers(1, 9))
def test_prompts_share_exactly_the_whole_blocks_in_common(paths: list[list[Segment]], size: int) -> None:
    book = PromptBook(size)
    prompts = [spelled(path) for path in paths]
    numbered = [book.blocks(path) for path in paths]
    for prompt, blocks in zip(prompts, numbered, strict=True):
        assert blocks.dtype == np.int32
        assert len(blocks) == -(-len(prompt) // size)
    for i, (prompt, blocks) in enumerate(zip(prompts, numbered, strict=True)):
        for other, others in zip(prompts[:i], numbered[:i], strict=True):
            shared = common(prompt, other) // size
            assert blocks[:shared].tolist() == others[:shared].tolist()
            assert not set(blocks[shared:].tolist()) & set(others[shared:].tolist())


@given(paths, st.integers(2, 9))
def test_a_partial_block_is_in_one_prompt_only(paths: list[list[Segment]], size: int) -> None:
    book = PromptBook(size)
    seen: list[int] = []
    partial: list[int] = []
    for path in paths:
        blocks = book.blocks(path).tolist()
        seen += blocks
        if sum(segment.tokens for segment in path) % size:
            partial.append(blocks[-1])
    assert all(seen.count(number) == 1 for number in partial)


def test_a_prompt_never_changes_afterwards() -> None:
    book = PromptBook(4)
    first = book.blocks([Segment("a", 8)])
    kept = first.tolist()
    book.blocks([Segment("a", 40)])
    first_again = book.blocks([Segment("a", 8)])
    first_again[:] = -1
    assert first.tolist() == kept
    assert book.blocks([Segment("a", 8)]).tolist() == kept


@pytest.mark.parametrize(
    ("path", "message"),
    [([], "at least one segment"), ([Segment("a", 3), Segment("b", 0)], "at least 1 token; 'b' has 0")],
)
def test_an_empty_prompt_is_refused(path: list[Segment], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PromptBook(16).blocks(path)
