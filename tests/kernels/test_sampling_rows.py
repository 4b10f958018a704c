"""What a request's row on the device holds, and what its edits and counts make of the logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from made_steps import PROMPT, Request, Step, ask, ids, normal, requests

from preble.engine.sampler import SamplingState, edit
from preble.errors import InvalidRequest
from preble.kernels.launch import launch
from preble.kernels.sampling import sample
from preble.kernels.sampling_edits import edited, edited_reference
from preble.kernels.sampling_rows import (
    IN_PROMPT,
    MAX_BIASES,
    MAX_STOP_IDS,
    MOST,
    ROW,
    SamplingRows,
    count_tokens,
    fits,
    packed_row,
)
from preble.sampling import SamplingParams


@triton.jit
def _edits_kernel(logits, out, row, counts, position, VOCABULARY: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.arange(0, TILE)
    x = tl.load(logits + token, mask=token < VOCABULARY, other=0.0)
    x = edited(x, token, row, counts, tl.load(position), VOCABULARY)
    tl.store(out + token, x, mask=token < VOCABULARY)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(request=requests(272), seed=st.integers(0, 99))
def test_edits_are_those_of_the_reference(request: Request, seed: int) -> None:
    """On logits for which fused products are those of two roundings."""
    step = Step.make((normal(1, 272, seed=seed) * 1024).round() / 1024, [request])
    logits, words = step.logits[0], step.params.table[step.rows[0]]
    out = torch.full_like(logits, math.nan)
    launch(
        _edits_kernel, (1,), warps=4, stages=1, logits=logits, out=out, row=words, counts=step.counts,
        position=ids([request.position]), VOCABULARY=272, TILE=512,
    )  # fmt: skip
    assert torch.equal(out, edited_reference(logits, words, step.counts, request.position))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(request=requests(50), seed=st.integers(0, 99))
def test_edits_are_those_of_the_cpu(request: Request, seed: int) -> None:
    logits = normal(1, 50, seed=seed)
    state = SamplingState(
        replace(request.params, stop_token_ids=request.stop_ids), 1, np.array(request.prompt, np.int32), 50, frozenset()
    )
    for token in request.output:
        state.append(token)
    request.position = PROMPT + len(request.output)
    expected = logits.clone()
    edit(expected, [(0, state)])
    step = Step.make(logits, [request])
    words = step.params.table[step.rows[0]].cpu()
    counts = None if step.counts is None else step.counts.cpu()
    torch.testing.assert_close(edited_reference(logits[0], words, counts, request.position), expected[0])


def test_rows_are_entered_where_they_belong() -> None:
    rows = SamplingRows.allocate(5, DEVICE)
    updates = np.stack([packed_row(row, SamplingParams(top_k=row + 2), seed=row, prompt_length=1) for row in (3, 0, 1)])
    updates[2, ROW.value] = -1
    reference = SamplingRows.allocate(5, DEVICE)
    before = rows.table.clone()
    rows.write(torch.from_numpy(updates).to(DEVICE))
    reference.write_reference(torch.from_numpy(updates).to(DEVICE))
    assert torch.equal(rows.table, reference.table)
    assert torch.equal(rows.table[[1, 2, 4]], before[[1, 2, 4]])
    assert rows.table[[3, 0]].cpu().numpy().tolist() == updates[:2].tolist()
    rows.write(torch.from_numpy(updates[:0]).to(DEVICE))


def test_lists_longer_than_a_row_are_the_hosts() -> None:
    many = SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES + 1), 1.0))
    barred = SamplingParams(min_tokens=1)
    stops = tuple(range(MAX_STOP_IDS + 1))
    assert fits(SamplingParams(), stops)
    assert fits(barred, stops[1:])
    for params, stop_ids in ((many, ()), (barred, stops)):
        assert not fits(params, stop_ids)
        with pytest.raises(InvalidRequest, match=f"{MAX_BIASES} logit biases and {MAX_STOP_IDS} stop tokens"):
            packed_row(0, params, seed=0, prompt_length=0, stop_ids=stop_ids)


def test_extreme_biases_fit_fp32() -> None:
    step = Step.make(torch.zeros(1, 272), [ask(temperature=0, logit_bias={0: -1e300, 1: -3e38, 2: 1e-300})])
    assert step.check() == [2]


def test_counts_are_of_outputs_and_remember_the_prompt() -> None:
    counts = torch.full((2, 10), 5, dtype=torch.int16, device=DEVICE)
    count_tokens(counts, 1, ids([1, 2, 2]), ids([2, 3, 3]))
    assert counts[1].tolist() == [0, IN_PROMPT, IN_PROMPT + 1, 2, *[0] * 6]
    assert counts[0].tolist() == [5] * 10
    count_tokens(counts, 1, None, ids([4] * (MOST + 9)))
    assert counts[1].tolist() == [0, 0, 0, 0, MOST, *[0] * 5]
    count_tokens(counts, 1, None)
    assert counts[1].tolist() == [0] * 10


@pytest.mark.parametrize("prompt", [(), (7,)])
def test_sampled_tokens_are_counted_up_to_the_most(prompt: tuple[int, ...]) -> None:
    request = replace(ask(temperature=0, frequency_penalty=0.25, repetition_penalty=2.0), prompt=prompt)
    logits = torch.zeros(1, 272)
    logits[0, 7] = 1e5
    step = Step.make(logits, [request])
    assert step.counts is not None
    for before, after in ((0, 1), (5, 6), (MOST - 1, MOST), (MOST, MOST)):
        mark = IN_PROMPT if prompt else 0
        step.counts[1, 7] = mark + before
        assert step.check() == [7]
        _, _, counts = step.run(sample)
        assert counts is not None
        assert counts[1, 7].item() == mark + after
        assert counts[1].count_nonzero().item() == 1
