from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from preble.engine.sampler import Sampler, SamplingState, edit, uniform
from preble.sampling import SamplingParams

SAMPLER = Sampler()
NUDGE = 3e-6
"""How far fp32 may move a cumulative probability from the reference's float64."""


def state(params, *, seed=0, prompt=(), output=(), vocabulary=100, eos=()):
    made = SamplingState(params, seed, np.array(prompt, np.int32), vocabulary, frozenset(eos))
    for token in output:
        made.append(token)
    return made


def sample_one(row, made, position=0):
    result = SAMPLER.sample(torch.tensor(row, dtype=torch.float32)[None], [made], [position])
    assert result.invalid == ([] if result.tokens[0] >= 0 else [0])
    return result.tokens[0]


def edited_row(row, params, prompt, output, eos):
    """What biases, penalties and min_tokens make of the logits, one token at a time."""
    row = [np.float32(value) for value in row]
    for token, bias in params.logit_bias:
        row[token] += np.float32(bias)
    for token in {*prompt, *output}:
        factor = np.float32(params.repetition_penalty)
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(output):
        row[token] -= np.float32(params.frequency_penalty) * np.float32(output.count(token))
        row[token] -= np.float32(params.presence_penalty)
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else eos)}:
            row[token] = np.float32(-np.inf)
    return np.array(row)


def reference(row, params, number, top_p, min_p):
    """Temperature, top_k, top_p, min_p and the inverse CDF, by definition, in float64."""
    if params.temperature == 0.0 or params.top_k == 1:
        return int(np.argmax(row))
    scaled = (row.astype(np.float64) - row.max()) / params.temperature
    kept = np.where(scaled > -80, np.exp(scaled), 0.0)
    if 0 < params.top_k < len(kept):
        kept[kept < np.sort(kept)[-params.top_k]] = 0.0
    if params.top_p < 1.0:
        total, mass = kept.sum(), 0.0
        for value in np.sort(kept)[::-1]:
            mass += value
            if mass >= top_p * total:
                break
        kept[kept < value] = 0.0
    kept[kept < min_p] = 0.0
    cumulative = np.cumsum(kept)
    return int(np.searchsorted(cumulative, min(max(number, 0.0), 1 - 1e-12) * cumulative[-1], side="right"))


def acceptable(row, params, number):
    """The reference's tokens when every comparison it makes may fall either way within rounding."""
    nudges = itertools.product((-NUDGE, 0.0, NUDGE), repeat=3)
    return {reference(row, params, number + a, params.top_p + b, params.min_p * (1 + c)) for a, b, c in nudges}


@st.composite
def situations(draw_from):
    vocabulary = draw_from(st.sampled_from([1, 2, 7, 40, 256, 300, 8200]))
    tokens = st.integers(0, vocabulary - 1)
    if draw_from(st.booleans()):  # few distinct values: ties everywhere
        spread = draw_from(st.sampled_from([0.0, 0.5, 3.0]))
        row = np.random.default_rng(draw_from(st.integers(0, 99))).integers(-4, 4, vocabulary) * spread
    else:
        scale = draw_from(st.sampled_from([0.01, 1.0, 5.0]))
        row = np.random.default_rng(draw_from(st.integers(0, 99))).normal(size=vocabulary) * scale
    row = row.astype(np.float32)
    for token in draw_from(st.lists(tokens, max_size=3)):
        row[token] = -np.inf
    params = SamplingParams(
        max_tokens=50,
        min_tokens=draw_from(st.integers(0, 6)),
        temperature=draw_from(st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0])),
        top_p=draw_from(st.sampled_from([1.0, 0.95, 0.5, 1e-6]) | st.floats(0.01, 1.0)),
        top_k=draw_from(st.sampled_from([0, 1, 2, 5, 50, 200, 5000])),
        min_p=draw_from(st.sampled_from([0.0, 0.0, 0.05, 0.9])),
        repetition_penalty=draw_from(st.sampled_from([1.0, 1.3, 0.5])),
        presence_penalty=draw_from(st.sampled_from([0.0, 1.5, -1.0])),
        frequency_penalty=draw_from(st.sampled_from([0.0, 0.5])),
        stop_token_ids=draw_from(st.lists(tokens, max_size=2)),
        ignore_eos=draw_from(st.booleans()),
        logit_bias=draw_from(st.dictionaries(tokens, st.sampled_from([-math.inf, -1.0, 2.5]), max_size=3)),
        logprobs=draw_from(st.sampled_from([None, 0, 3, 64])),
    )
    prompt, output = draw_from(st.lists(tokens, max_size=8)), draw_from(st.lists(tokens, max_size=8))
    return row, params, prompt, output, draw_from(st.frozensets(tokens, max_size=2))


@given(situations(), st.integers(0, 2**63 - 1), st.integers(0, 2**17))
def test_equals_the_slow_reference(situation, seed, position):
    row, params, prompt, output, eos = situation
    made = state(params, seed=seed, prompt=prompt, output=output, vocabulary=len(row), eos=eos)
    token = sample_one(row, made, position)
    edited = edited_row(row, params, prompt, output, eos)
    if not np.isfinite(row.max()) or not np.isfinite(edited.max()):
        assert token == -1
    else:
        assert token in acceptable(edited, params, uniform(seed, position))
        assert edited[token] > -np.inf


@given(st.lists(st.tuples(situations(), st.integers(0, 2**63 - 1)), min_size=1, max_size=8), st.randoms())
def test_no_row_depends_on_the_batch(rows, random):
    vocabulary = max(len(row) for (row, *_), _ in rows)
    logits, states = [], []
    for (row, params, prompt, output, eos), seed in rows:
        logits.append(np.pad(row, (0, vocabulary - len(row)), constant_values=-1.0))
        states.append(state(params, seed=seed, prompt=prompt, output=output, vocabulary=vocabulary, eos=eos))
    logits = torch.from_numpy(np.stack(logits))
    positions = [seed % 1000 for _, seed in rows]
    before = logits.clone()
    alone = [SAMPLER.sample(logits[i : i + 1].clone(), [states[i]], [positions[i]]) for i in range(len(rows))]
    order = random.sample(range(len(rows)), len(rows)) * 2
    together = SAMPLER.sample(logits[order], [states[i] for i in order], [positions[i] for i in order])
    assert together.tokens == [alone[i].tokens[0] for i in order]
    assert together.logprobs == [alone[i].logprobs[0] for i in order]
    assert together.invalid == [place for place, i in enumerate(order) if alone[i].invalid]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_wide_vocabulary_in_large_batches(threads):
    """Enough logits for several chunks and for torch to share them among threads."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 32_003, generator=generator) * 2
    logits[10:] *= 4
    kinds = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.1}, {"top_k": 3000, "top_p": 0.8, "temperature": 1.5}]
    params = [SamplingParams(**kinds[i % 5], logprobs=5) for i in range(20)]
    states = [state(one, seed=i, vocabulary=32_003) for i, one in enumerate(params)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = SAMPLER.sample(logits, states, list(range(20)))
        for i in range(20):
            alone = SAMPLER.sample(logits[i : i + 1], [states[i]], [i])
            assert alone.tokens == together.tokens[i : i + 1]
            assert alone.logprobs == together.logprobs[i : i + 1]
            assert together.tokens[i] in acceptable(logits[i].numpy(), params[i], uniform(i, i))
    finally:
        torch.set_num_threads(before)


# Biases, penalties and min_tokens, against transformers where it defines the same thing


def ours(row, params, prompt=(), output=(), eos=()):
    values = torch.tensor(row)[None].clone()
    edit(values, [(0, state(params, prompt=prompt, output=output, vocabulary=len(row), eos=eos))])
    return values[0]


def theirs(row, processors, tokens=()):
    scores = torch.tensor(row)[None]
    for processor in processors:
        scores = processor(torch.tensor([tokens], dtype=torch.int64), scores)
    return scores[0]


def test_penalties_and_bias_equal_those_of_transformers():
    row = np.random.default_rng(0).normal(size=60).astype(np.float32) * 3
    prompt, output = [1, 2, 3, 3], [5, 5, 2]
    expected = theirs(row, [RepetitionPenaltyLogitsProcessor(1.7)], prompt + output)
    got = ours(row, SamplingParams(temperature=0, repetition_penalty=1.7), prompt, output)
    torch.testing.assert_close(got, expected)
    expected = theirs(row, [SequenceBiasLogitsProcessor({(4,): -2.0, (9,): 3.5})], prompt)
    got = ours(row, SamplingParams(temperature=0, logit_bias={4: -2.0, 9: 3.5}))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("generated", [0, 2, 3])
def test_min_tokens_bars_stop_tokens_like_transformers(generated):
    row, prompt, output = np.ones(20, np.float32), [1, 2], [3] * generated
    processor = MinNewTokensLengthLogitsProcessor(len(prompt), 3, eos_token_id=[7, 9])
    got = ours(row, SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[9]), prompt, output, eos=[7])
    assert torch.equal(got, theirs(row, [processor], prompt + output))
    ignoring = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[9], ignore_eos=True)
    assert ours(row, ignoring, prompt, output, eos=[7])[7] == 1.0


def test_presence_and_frequency_penalties_count_the_output_alone():
    row = np.zeros(6, np.float32)
    params = SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.25)
    assert ours(row, params, prompt=[0, 1], output=[1, 2, 2]).tolist() == [0, -1.25, -1.5, 0, 0, 0]


@given(st.lists(st.integers(0, 300), max_size=300), st.lists(st.integers(0, 300), max_size=50))
def test_seen_tokens_are_counted_as_they_come(output, prompt):
    made = state(SamplingParams(repetition_penalty=2.0), prompt=prompt, output=output, vocabulary=301)
    counted = dict(zip(made.seen.ids.tolist(), made.seen.counts.tolist(), strict=True))
    assert counted == {token: output.count(token) for token in {*prompt, *output}}
    assert made.generated == len(output)


def test_any_number_of_distinct_tokens():
    made = state(SamplingParams(repetition_penalty=2.0), prompt=[3, 4], output=[*range(300), 7])
    assert made.seen.ids.tolist() == [3, 4, 0, 1, 2, *range(5, 300)]
    assert made.seen.counts.sum() == 301


# The random numbers


def test_splitmix64():
    from preble.engine import sampler

    golden = sampler._GOLDEN
    stream = [sampler._mix(golden * i % 2**64) for i in (1, 2, 3)]
    assert stream == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published for seed 0


def test_numbers_of_neighbouring_seeds_and_positions_are_unrelated():
    numbers = np.array([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert 0.0 <= numbers.min() < numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    deviation = 1 / math.sqrt(12 * numbers.size)
    assert abs(numbers.mean() - 0.5) < 4 * deviation
    for a, b in (
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[1:], numbers[:-1]),
        (numbers[1:, :-1], numbers[:-1, 1:]),
        (numbers[1:, 1:], numbers[:-1, :-1]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)
    assert uniform(2**63 - 1, 0) != uniform(2**63 - 2, 0)


def test_a_seed_of_the_largest_size():
    row = np.random.default_rng(0).normal(size=50)
    made = state(SamplingParams(), seed=2**63 - 1)
    assert 0 <= sample_one(row, made, 10**6) < 50


# Greedy, invalid rows, log-probabilities


def test_greedy_takes_the_first_of_equals():
    assert sample_one([1, 5, 5, 2], state(SamplingParams(temperature=0))) == 1
    assert sample_one([1, 5, 5, 2], state(SamplingParams(temperature=2.0, top_k=1))) == 1


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"temperature": 0, "presence_penalty": 1}])
@pytest.mark.parametrize("bad", [[1, math.nan, 3], [math.nan] * 3, [-math.inf] * 3, [0, math.inf, 0]])
def test_invalid_rows_are_told_apart(options, bad):
    good = [0.0, -5.0, 50.0]
    made = state(SamplingParams(**options, logprobs=1), vocabulary=3, output=[0])
    result = SAMPLER.sample(torch.tensor([good, bad, good]), [made] * 3, [0, 1, 2])
    assert result.invalid == [1]
    assert result.tokens == [2, -1, 2]
    assert result.logprobs[1] is None
    assert result.logprobs[0] == result.logprobs[2] is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_is_invalid(temperature):
    banned = SamplingParams(temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})
    assert sample_one([1.0, 2.0], state(banned, vocabulary=2)) == -1
    assert sample_one([1.0, 2.0, -3.0], state(banned, vocabulary=3)) == 2


def test_nan_under_a_barred_token_is_caught():
    barred = SamplingParams(temperature=0, min_tokens=1, stop_token_ids=[1])
    assert sample_one([1.0, math.nan], state(barred, vocabulary=2)) == -1


@pytest.mark.parametrize("temperature", [1e-300, 1e-10, 1e300])
def test_extreme_temperatures(temperature):
    token = sample_one([1.0, 300.0, -math.inf, 299.0], state(SamplingParams(temperature=temperature), seed=1))
    assert token == 1 if temperature < 1 else token in (0, 1, 3)


@pytest.mark.parametrize("bias", [-1e300, 1e6])
def test_extreme_biases(bias):
    params = SamplingParams(temperature=1.0, logit_bias={0: bias})
    assert (sample_one([9.0, 5.0], state(params, vocabulary=2)) == 0) == (bias > 0)


@pytest.mark.parametrize("vocabulary", [3, 40, 3000])
def test_logprobs_are_those_of_the_model(vocabulary):
    row = torch.from_numpy(np.random.default_rng(1).integers(-8, 8, vocabulary).astype(np.float32) / 2)
    params = SamplingParams(temperature=2.0, top_k=2, logit_bias={0: 50.0}, logprobs=20)
    result = SAMPLER.sample(row[None], [state(params, vocabulary=vocabulary)], [0])
    expected = row.double().log_softmax(0)
    (logprob,) = result.logprobs
    assert result.tokens == [0]
    assert logprob.token_id == 0
    assert logprob.logprob == pytest.approx(float(expected[0]), abs=1e-5)
    order = sorted(range(vocabulary), key=lambda token: (-row[token], token))[:20]
    assert [token for token, _ in logprob.top] == order
    assert [value for _, value in logprob.top] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_logprobs_for_those_who_asked():
    asked = [None, 0, 2]
    states = [state(SamplingParams(temperature=0, logprobs=count), vocabulary=9) for count in asked]
    result = SAMPLER.sample(torch.arange(9.0).expand(3, 9), states, [0, 0, 0])
    assert [None if one is None else len(one.top) for one in result.logprobs] == asked
    assert result.logprobs[2].top[0] == (8, result.logprobs[2].logprob)


def test_no_rows():
    assert SAMPLER.sample(torch.empty(0, 9), [], []).tokens == []
