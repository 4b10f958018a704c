"""Sampling on the device: token for token the reference, whose filters are the CPU's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from made_steps import INFINITY, PROMPT, Request, Step, ask, ids, normal, steps

from preble.engine.distribution import weights
from preble.kernels.launch import launch, recorded_launches
from preble.kernels.sampling import SamplingWorkspace, sample
from preble.kernels.sampling_edits import depth_reference
from preble.kernels.sampling_filters import deepest_reference, winner
from preble.kernels.sampling_rows import DEPTH_STEPS, STEPS, WORDS, SamplingRows, packed_row
from preble.sampling import SamplingParams


@settings(max_examples=100, deadline=None, derandomize=True)
@given(step=steps())
def test_tokens_are_those_of_the_reference(step: Step) -> None:
    step.check()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_k": 3},
        {"top_p": 0.1},
        {"top_k": 8, "top_p": 0.4},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.8, "temperature": 0.01},
    ],
)
def test_what_lies_at_the_edge_of_a_filter(options: dict[str, object]) -> None:
    """Few tokens are kept, each is as likely as not one of the last, and every second draw is rejected."""
    logits = normal(1, 37, 0.002).repeat(14, 1)
    kept = set(Step.make(logits, [replace(ask(**options), seed=seed) for seed in range(14)]).check())
    assert len(kept) > 1


@triton.jit
def _winner_kernel(deep, score, token, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    top, best = winner(tl.load(deep + index), tl.load(score + index), tl.load(token + index), 5)
    tl.store(out, top)
    tl.store(out + 1, best)


def test_of_equal_scores_the_lowest_token_wins() -> None:
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    launch(
        _winner_kernel, (1,), warps=1, stages=1, deep=ids([5, 5, 6, 0]), score=ids([7, 7, 9, -3]),
        token=ids([8, 4, 2, 1]), out=out, SIZE=4,
    )  # fmt: skip
    assert out.tolist() == [7, 4]


CROWD = [
    {"top_p": 0.95},
    {"top_k": 3000},
    {"top_k": 2500, "top_p": 0.5},
    {"top_k": 2500, "top_p": 0.5},
    {"top_k": 2500, "top_p": 0.5},
    {"top_k": 4999, "top_p": 0.99, "min_p": 0.5},
    {"top_k": 1500, "top_p": 0.999},
    {"top_k": 1100, "temperature": 3.0},
]


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_filters_that_keep_more_than_the_candidates(spread: float) -> None:
    asked = [replace(ask(**options), seed=index) for index, options in enumerate(CROWD)]
    Step.make(normal(len(asked), 5000, spread, seed=3), asked).check()


def test_most_probable_tokens_may_be_neighbours() -> None:
    """The slices then have more to keep than room, or nothing."""
    logits = normal(3, 5000, 0.5)
    logits[0, :1500] += 10
    logits[1, 2000:2064] += 10
    logits[2, ::3] += 10
    for options in ({"top_p": 0.9}, {"top_k": 64, "top_p": 0.9}, {"top_k": 1200, "top_p": 0.99}):
        Step.make(logits, [replace(ask(**options), seed=seed) for seed in range(3)]).check()


def test_what_one_slice_leaves_out_is_missed_by_no_filter() -> None:
    """The candidates of the other slices are as heavy, or as many, as if they made up for it."""
    slices = torch.arange(5000) // 32 % 3
    sloping = torch.where(slices == 0, torch.linspace(0.01, 0.0, 5000), -0.5)
    sloping[(slices != 0) & (torch.arange(5000) % 2 == 0)] = -INFINITY
    asked = [replace(ask(top_p=0.5), seed=seed) for seed in range(6)]
    Step.make(sloping.repeat(6, 1), asked).check()
    steps = torch.where(slices == 0, -1.0, -INFINITY)
    steps[(slices == 0).nonzero()[:600]] = 0.0
    asked = [replace(ask(top_k=601), seed=seed) for seed in range(6)]
    Step.make(steps.repeat(6, 1), asked).check()


def test_a_slice_has_room_for_its_most_probable_tokens() -> None:
    """Few, the last in its order, before about as many equals as there is room for, which must not displace them."""
    one = (torch.arange(5000) // 32 % 3 == 0).nonzero()[:, 0]
    logits = torch.full((1, 5000), -INFINITY)
    logits[0, one] = -6.0
    logits[0, one[-1030:]] = -4.0
    logits[0, one[-6:]] = 0.0
    logits[0, one[:300] + 32] = -3.0  # of another slice
    (token,) = Step.make(logits, [ask(top_p=0.14)]).check()
    assert token in one[-6:]


def test_all_but_one_may_be_far_below() -> None:
    """Where depths are so large that two do not add up in 32 bits."""
    logits = normal(3, 5000, 1.0)
    logits[:, 77] = 75.0
    asked = [ask(top_k=30, top_p=0.9), ask(top_k=2000, top_p=0.9), ask(top_k=2)]
    assert Step.make(logits, asked).check() == [77] * 3
    Step.make(logits, [replace(one, params=replace(one.params, temperature=10.0)) for one in asked]).check()


def test_token_depends_on_neither_batch_nor_row() -> None:
    logits = normal(6, 2100, seed=8)
    asked = [replace(ask(top_p=0.95 if index % 2 else 1.0), seed=index) for index in range(6)]
    together = Step.make(logits, asked).check()
    alone = [Step.make(logits[index : index + 1], asked[index : index + 1], [index]).check() for index in range(6)]
    assert together == [token for tokens in alone for token in tokens]
    assert len(set(together)) > 1


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(4, 272)
    first, second, third, fourth = Step.make(
        logits, [Request(seed=5), Request(seed=6), Request(seed=5, position=PROMPT + 1), Request(seed=5 + 2**32)]
    ).check()
    assert len({first, second, third, fourth}) == 4


def test_greedy_takes_the_first_of_equals() -> None:
    logits = normal(3, 5000).clamp(max=4.0)
    logits[0, [4999, 2079, 2080]] = 5.0
    logits[1, [40, 33, 65]] = 5.0
    logits[2, 2048] = 5.0
    assert Step.make(logits, [ask(temperature=0), ask(top_k=1), ask(temperature=0)]).check() == [2079, 33, 2048]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of the interpreter: the overflow is meant
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5, "top_p": 0.9}])
def test_invalid_logits_give_no_token(options: dict[str, object]) -> None:
    logits = normal(8, 2100)
    logits[0, 2099] = math.nan
    logits[1, 3] = INFINITY
    logits[2] = -INFINITY
    logits[3] = -INFINITY
    logits[3, 7] = 1.0
    logits[5] = math.nan
    logits[6, 3] = INFINITY
    asked = [ask(**options) for _ in range(8)]
    asked[3] = ask(**options, logit_bias={7: -INFINITY})
    asked[4] = ask(**options, repetition_penalty=0.01)
    asked[4].prompt = (9,)
    logits[4, 9] = 3e38
    asked[6] = ask(**options, logit_bias={3: -INFINITY})
    step = Step.make(logits, asked)
    tokens, last, counts = step.run(sample)
    assert tokens[:7].tolist() == [-1] * 7
    assert [last[row].item() for row in step.rows[:7]] == [0] * 7
    assert counts is not None
    assert step.counts is not None
    assert torch.equal(counts, step.counts), "what was not sampled was counted"
    assert tokens[7] >= 0
    step.check()


def test_padding_touches_nothing() -> None:
    step = Step.make(normal(3, 272), [ask(), ask(top_k=3), ask(temperature=0)], [4, 2, 0])
    step.rows = [-1, 2, -1]
    tokens, last, _ = step.run(sample)
    assert tokens[[0, 2]].tolist() == [-1, -1]
    assert (last == -88).nonzero().flatten().tolist() == [row for row in range(len(last)) if row != 2]
    step.check()


def test_launches_depend_on_the_batch_alone() -> None:
    """So that they can be captured; and on the device "meta" nothing may be read."""
    with recorded_launches() as launches:
        table = SamplingRows(torch.empty(9, WORDS, dtype=torch.int32, device="meta"))
        table.write(torch.empty(2, WORDS, dtype=torch.int32, device="meta"))
        step = [torch.empty(4, dtype=torch.int32, device="meta") for _ in range(4)]
        sample(
            torch.empty(4, 128256, dtype=torch.bfloat16, device="meta"),
            step[0],
            step[1],
            rows=step[2],
            positions=step[3],
            params=table,
            workspace=SamplingWorkspace.allocate(8, 128256, "meta"),
        )
    assert [one.grid for one in launches] == [(2,), (63, 4), (63, 4), (4,)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    vocabulary=st.sampled_from([5, 100, 3000]),
    spread=st.sampled_from([0.5, 2.0, 8.0]),
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.25, 0.5, 1.0, 4.0]),
    top_k=st.sampled_from([0, 2, 5, 60, 1000, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.003, 0.1, 0.7, 1.0]),
)
@example(vocabulary=100, spread=0.0, seed=0, temperature=1.0, top_k=3, top_p=0.5, min_p=1.0)
@example(vocabulary=100, spread=40.0, seed=0, temperature=0.25, top_k=0, top_p=1.0, min_p=0.0)
def test_filters_keep_what_those_of_the_cpu_keep(
    vocabulary: int, spread: float, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """On a grid of logits, on which ties are ties to both; sums that meet p to the last digits are left out."""
    assume(top_k != 1)
    logits = (normal(1, vocabulary, spread, seed)[0] * 8).round() / 8
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    words = torch.from_numpy(packed_row(0, params, seed=0, prompt_length=0))
    deep = depth_reference(logits, logits.amax(), words.view(torch.float32)[STEPS.value])
    ranked = torch.softmax(logits.double() / temperature, 0).sort(descending=True).values
    ranked = ranked[: top_k or None] if top_k < vocabulary else ranked
    sums = logits.double().div(temperature).softmax(0)
    sums = torch.stack([sums[deep <= bound].sum() for bound in deep.unique()])
    kth = deep.sort().values[min(top_k or vocabulary, vocabulary) - 1]
    share = sums / sums[deep.unique() <= kth][-1]
    assume(top_p == 1.0 or (share - top_p).abs().min() > 1e-5)
    assume(min_p in (0.0, 1.0) or (deep / DEPTH_STEPS + math.log(min_p)).abs().min() > 1e-5)
    kept = weights(logits[None].clone(), logits.amax()[None], [params])[0] > 0
    assert torch.equal(deep <= deepest_reference(deep, words), kept)
