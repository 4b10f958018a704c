"""Sampling on the device: token for token the reference, whose noise is Gumbel's and whose filters are the CPU's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from preble.engine.distribution import weights
from preble.engine.sampler import SamplingState, edit
from preble.errors import InvalidRequest
from preble.kernels.launch import launch, recorded_launches
from preble.kernels.sampling import SamplingWorkspace, sample, sample_reference
from preble.kernels.sampling_edits import (
    depth_reference,
    edited,
    edited_reference,
    noise_of_groups,
    noise_of_tokens,
    noise_of_words_reference,
    noise_reference,
    philox_reference,
    weight,
    weight_reference,
)
from preble.kernels.sampling_filters import deepest_reference, winner
from preble.kernels.sampling_rows import (
    BOTTOM,
    DEPTH_STEPS,
    IN_PROMPT,
    MAX_BIASES,
    MAX_STOP_IDS,
    MOST,
    ROW,
    STEPS,
    WORDS,
    SamplingRows,
    count_tokens,
    fits,
    packed_row,
)
from preble.sampling import MAX_SEED, SamplingParams

PROMPT = 40
"""Tokens of every prompt here."""
INFINITY = float("inf")


@dataclass
class Request:
    """What a row of the table is made from."""

    params: SamplingParams = SamplingParams()  # noqa: RUF009 (frozen)
    seed: int = 1
    position: int = PROMPT
    stop_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def penalised(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def ask(**options: object) -> Request:
    """A request with these sampling parameters."""
    return Request(SamplingParams(**options))  # type: ignore[arg-type]


@dataclass
class Step:
    """Inputs of `sample`: request i has logits i and row `rows[i]`."""

    logits: torch.Tensor
    requests: list[Request]
    rows: list[int]
    params: SamplingRows
    counts: torch.Tensor | None

    @classmethod
    def make(cls, logits: torch.Tensor, requests: list[Request], rows: list[int] | None = None) -> Step:
        vocabulary = logits.shape[1]
        rows = list(range(len(requests)))[::-1] if rows is None else rows
        params = SamplingRows.allocate(max(len(rows), *rows, 0) + 3, DEVICE)
        penalised = sum(request.penalised for request in requests)
        counts = torch.full((penalised + 1, vocabulary), -5, dtype=torch.int16, device=DEVICE)
        if not penalised:
            counts = None
        packed, count_row = [np.full(WORDS, -1, np.int32)], 0
        for row, request in zip(rows, requests, strict=True):
            if counts is not None and request.penalised:
                count_row += 1
                count_tokens(counts, count_row, ids(request.prompt), ids(request.output))
            packed.append(
                packed_row(
                    row,
                    request.params,
                    seed=request.seed,
                    prompt_length=PROMPT,
                    stop_ids=request.stop_ids,
                    count_row=count_row if request.penalised else -1,
                )
            )
        params.write(torch.from_numpy(np.stack(packed)).to(DEVICE))
        return cls(logits.to(DEVICE), requests, rows, params, counts)

    def run(self, operation: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, last tokens and counts afterwards, with nothing but garbage before."""
        batch, vocabulary = self.logits.shape
        tokens = torch.full((batch,), -77, dtype=torch.int32, device=DEVICE)
        last = torch.full((len(self.params.table),), -88, dtype=torch.int32, device=DEVICE)
        workspace = SamplingWorkspace.allocate(batch + 1, vocabulary, DEVICE)
        for name in SamplingWorkspace.__slots__:
            memory = getattr(workspace, name)
            memory.fill_(math.nan if memory.dtype.is_floating_point else -(1 << 30))
        logits, counts = self.logits.clone(), None if self.counts is None else self.counts.clone()
        operation(  # type: ignore[operator]
            logits,
            tokens,
            last,
            rows=ids(self.rows),
            positions=ids([request.position for request in self.requests]),
            params=self.params,
            counts=counts,
            workspace=workspace,
        )
        assert torch.equal(logits.nan_to_num(), self.logits.nan_to_num()), "the logits were changed"
        return tokens.cpu(), last.cpu(), counts

    def check(self) -> list[int]:
        """Run the kernels and the reference; the tokens."""
        tokens, last, counts = self.run(sample)
        expected_tokens, expected_last, expected_counts = self.run(sample_reference)
        assert tokens.tolist() == expected_tokens.tolist()
        assert last.tolist() == expected_last.tolist()
        assert (counts is None) == (expected_counts is None)
        assert counts is None or expected_counts is None or torch.equal(counts, expected_counts)
        return [int(token) for token in tokens]


def ids(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(batch: int, vocabulary: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


# Noise, weights and depths


@triton.jit
def _numbers_kernel(numbers, weights, of_groups, of_tokens, seed, position, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of each number as a depth, and the noise of each as a token."""
    index = tl.arange(0, COUNT)
    number = tl.load(numbers + index)
    at, key = tl.load(position), tl.load(seed)
    tl.store(weights + index, weight(number))
    tl.store(of_tokens + index, noise_of_tokens(key, number, at))
    first = tl.load(numbers + tl.arange(0, COUNT // 4) * 4)
    tl.store(of_groups + index, noise_of_groups(key, first // 4, at))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (MAX_SEED, 131071), (0x123456789ABCDEF, 7), (1 << 32, 1)])
def test_kernels_and_reference_have_the_same_noise(seed: int, position: int) -> None:
    vocabulary, count = 152064, 4096
    starts = torch.randperm(vocabulary // 4, generator=torch.Generator().manual_seed(position))[: count // 4]
    numbers = ids((starts[:, None] * 4 + torch.arange(4)).flatten().tolist())
    weighed = torch.empty(count, dtype=torch.int64, device=DEVICE)
    noises = torch.empty(2, count, dtype=torch.int32, device=DEVICE)
    launch(
        _numbers_kernel, (1,), warps=4, stages=1, numbers=numbers, weights=weighed, of_groups=noises[0],
        of_tokens=noises[1], seed=torch.tensor([seed], device=DEVICE), position=ids([position]), COUNT=count,
    )  # fmt: skip
    expected = noise_reference(seed, position, vocabulary)[numbers.cpu().long()]
    assert torch.equal(noises[0].cpu().long(), expected)
    assert torch.equal(noises[1].cpu().long(), expected)


def test_kernels_and_reference_have_the_same_weights() -> None:
    count = 4096
    numbers = torch.linspace(0, BOTTOM, count, dtype=torch.float64).to(torch.int32)
    numbers[1:40] = torch.arange(1, 40)
    weighed = torch.empty(count, dtype=torch.int64, device=DEVICE)
    noises = torch.empty(2, count, dtype=torch.int32, device=DEVICE)
    launch(
        _numbers_kernel, (1,), warps=4, stages=1, numbers=numbers.to(DEVICE), weights=weighed, of_groups=noises[0],
        of_tokens=noises[1], seed=torch.tensor([1], device=DEVICE), position=ids([1]), COUNT=count,
    )  # fmt: skip
    assert torch.equal(weighed.cpu(), weight_reference(numbers.long()))


def test_weights_are_exponentials() -> None:
    deep = torch.linspace(0, BOTTOM, 100001, dtype=torch.float64).long()
    exact = torch.exp(deep.double() / -DEPTH_STEPS)
    torch.testing.assert_close(weight_reference(deep).double() / 2**40, exact, rtol=1e-7, atol=2.0**-40)
    assert weight_reference(torch.tensor([0])).item() == 1 << 40
    assert (weight_reference(torch.arange(2000)).diff() <= 0).all()


def test_generator_is_philox() -> None:
    """The known answer of its authors for a key and a counter of zeros, and each part of both matters."""
    zeros = philox_reference(0, torch.tensor([0]), 0)[:, 0].tolist()
    assert zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    streams = {
        tuple(philox_reference(seed, torch.arange(4), position).flatten().tolist())
        for seed in (0, 1, 1 << 31, 1 << 32, MAX_SEED)
        for position in (0, 1, 1 << 20)
    }
    assert len(streams) == 15


def test_noise_is_the_double_logarithm_of_its_word() -> None:
    edges = [0, 1, 3, 127, (1 << 24) - 1, (1 << 31) - 1, (1 << 31) + 1, (1 << 32) - 2, (1 << 32) - 1]
    some = torch.randint(0, 1 << 32, (200000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor(edges), 1 << torch.arange(32), some])
    exact = torch.log(-torch.log1p(-(words.double() + 0.5) / 2**32)).neg() + math.log(64) + math.log(math.log(2))
    error = (noise_of_words_reference(words).double() / DEPTH_STEPS - exact).abs()
    # The largest word of all has the noise of the one before it.
    assert error[words < (1 << 32) - 1].max() < 1e-6
    assert error.max() < 0.05
    assert noise_of_words_reference(words).min() >= 0


def noise(seed: int, positions: int, vocabulary: int) -> torch.Tensor:
    """Of many positions, int64 [positions, vocabulary]; without Gumbel's constant."""
    words = philox_reference(seed, torch.arange(vocabulary // 4)[None], torch.arange(positions)[:, None])
    return noise_of_words_reference(words.permute(1, 2, 0).reshape(positions, vocabulary))


def test_noise_is_gumbels_into_the_tail() -> None:
    values = noise(11, 32, 1 << 16).flatten().double() / DEPTH_STEPS - math.log(64) - math.log(math.log(2))
    for bound in (-2.0, 0.0, 1.0, 3.0, 6.0, 9.0, 12.0, 14.0):
        expected = len(values) * -math.expm1(-math.exp(-bound))
        assert abs(int((values > bound).sum()) - expected) < 4 * math.sqrt(expected) + 1, bound
    # Neither neighbours nor positions know of each other.
    table = (values - values.mean()).view(32, 1 << 16)
    for other in (table.roll(1, 1), table.roll(2, 1), table.roll(1, 0)):
        assert abs(float((table * other).mean() / table.var())) < 4 / math.sqrt(len(values))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_distributed_as_the_logits_say(temperature: float) -> None:
    """Chi-square, as many degrees of freedom as likely tokens: within five standard deviations."""
    positions, vocabulary = 20000, 64
    logits = normal(1, vocabulary, 2.0, seed=5)[0]
    steps = torch.tensor(DEPTH_STEPS / temperature)
    deep = depth_reference(logits, logits.amax(), steps)
    tokens = (noise(3, positions, vocabulary) - deep).argmax(1)
    expected = positions * torch.softmax(logits.double() / temperature, 0)
    likely = expected >= 10
    observed = torch.bincount(tokens, minlength=vocabulary).double()
    observed, expected = (
        torch.cat([values[likely], values[~likely].sum(0, keepdim=True)]) for values in (observed, expected)
    )
    freedom = len(expected) - 1
    assert freedom > 15
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


# Tokens


SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.9},
    {"top_k": 1},
    {"top_k": 7},
    {"min_p": 0.1},
    {"top_k": 50, "min_p": 0.02, "temperature": 2.0},
    {"top_k": 200, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
    {"top_p": 1e-60},
    {"top_p": 0.5, "temperature": 1e-20},
    {"temperature": 1e30, "top_p": 0.5},
    {"top_k": 10**7, "min_p": 1.0},
]


@st.composite
def requests(draw: st.DrawFn, vocabulary: int) -> Request:
    options: dict[str, object] = dict(draw(st.sampled_from(SETTINGS)))
    token = st.sampled_from([0, vocabulary // 2, vocabulary - 1]) | st.integers(0, vocabulary - 1)
    if draw(st.booleans()):
        options["logit_bias"] = draw(
            st.dictionaries(token, st.sampled_from([-INFINITY, -4.0, 2.5, 8.0, 1e6]), max_size=MAX_BIASES)
        )
    if draw(st.booleans()):  # sums and products of these and of the logits are exact
        options["repetition_penalty"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
        options["presence_penalty"] = draw(st.sampled_from([0.0, 0.5, -1.5]))
        options["frequency_penalty"] = draw(st.sampled_from([0.0, 0.25, -0.5]))
    stop_ids = ()
    if draw(st.booleans()):
        options["min_tokens"] = 5
        stop_ids = tuple(draw(st.lists(token, unique=True, max_size=MAX_STOP_IDS)))
    return Request(
        SamplingParams(**options),  # type: ignore[arg-type]
        seed=draw(st.sampled_from([0, 1, 2**31, 2**32 + 5, MAX_SEED]) | st.integers(0, MAX_SEED)),
        position=PROMPT + draw(st.sampled_from([0, 1, 4, 5, 1000])),
        stop_ids=stop_ids,
        prompt=tuple(draw(st.lists(token, max_size=5))),
        output=tuple(draw(st.lists(token, max_size=5))),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    vocabulary = draw(st.sampled_from([1, 37, 272, 2048, 2049, 5000]))
    asked = draw(st.lists(requests(vocabulary), min_size=1, max_size=3))
    kind = draw(st.sampled_from(["normal", "peaked", "flat", "equal", "ties"]))
    spread = {"normal": 3.0, "peaked": 12.0, "flat": 0.3, "equal": 0.0, "ties": 1.5}[kind]
    logits = normal(len(asked), vocabulary, spread, seed=draw(st.integers(0, 99)))
    logits = (logits * (2 if kind == "ties" else 1024)).round() / (2 if kind == "ties" else 1024)
    banned = draw(st.sampled_from([0.0, 0.0, 0.5, 0.99, 1.0]))
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < banned] = -INFINITY
    for row in logits:
        if draw(st.integers(0, 9)) == 9:
            row[draw(st.integers(0, vocabulary - 1))] = draw(st.sampled_from([math.nan, INFINITY]))
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.float16])))
    rows = draw(st.permutations(range(len(asked) + 3)))[: len(asked)]
    return Step.make(logits, asked, rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(step=steps())
def test_tokens_are_those_of_the_reference(step: Step) -> None:
    step.check()


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


# The CPU's sampler


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


# Rows and counts


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
