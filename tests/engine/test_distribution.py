from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from preble.engine.distribution import draw, largest, weights
from preble.engine.sampler import uniform
from preble.sampling import SamplingParams


def shares(row, params):
    values = torch.tensor(row)[None]
    kept = weights(values, values.amax(1), [params])[0].double()
    return kept / kept.sum()


def theirs(row, processors):
    scores = torch.tensor(row)[None]
    for processor in processors:
        scores = processor(None, scores)
    return scores[0]


@pytest.mark.parametrize("vocabulary", [50, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 7, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_filters_equal_those_of_transformers(vocabulary, temperature, top_k, top_p, min_p):
    row = np.random.default_rng(vocabulary).normal(size=vocabulary).astype(np.float32) * 2
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    expected = theirs(row, processors).double().softmax(0)
    got = shares(row, params)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


def test_weights_do_not_depend_on_the_batch():
    options = [
        {},
        {"top_k": 200},
        {"top_p": 0.9},
        {"top_p": 0.2},
        {"min_p": 0.05},
        {"top_k": 3, "top_p": 0.5},
        {"top_k": 1000, "top_p": 0.999, "min_p": 0.001},
        {"top_k": 10**6},
    ]
    params = [SamplingParams(**one, temperature=0.5 + 0.1 * i) for i, one in enumerate(options)]
    rows = torch.from_numpy(np.random.default_rng(2).normal(size=(len(params), 5000)).astype(np.float32) * 2)
    together = weights(rows.clone(), rows.amax(1), params)
    for i, one in enumerate(params):
        assert torch.equal(together[i], weights(rows[i : i + 1].clone(), rows[i].amax(0, keepdim=True), [one])[0])


def test_top_p_beyond_the_ranked_tokens_is_exact():
    """Half the tokens are just below the others in weight, and the others alone have the mass."""
    row = np.array([0.0, -2e-7] * 300, np.float32)
    assert 0.999999 < np.exp(row[1]) < 1.0
    kept = shares(row, SamplingParams(top_p=0.4999)) > 0
    assert kept.tolist() == [True, False] * 300
    assert (shares(row, SamplingParams(top_p=0.5001)) > 0).all()


def test_banned_and_hopeless_tokens_weigh_nothing():
    row = np.array([-np.inf, 0.0, -500.0, -1.0], np.float32)
    assert (shares(row, SamplingParams()) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 100, 1000, 4096, 4127])
@pytest.mark.parametrize("count", [1, 2, 20, 64])
def test_the_largest_are_those_of_topk(vocabulary, count):
    count = min(count, vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    values = torch.cat([torch.randn(3, vocabulary, generator=generator), torch.arange(vocabulary).float()[None]])
    values[1] = values[1].round()
    assert torch.equal(largest(values, count), values.topk(count).values)


def test_top_k_keeps_ties_like_transformers():
    row = np.array([1, 3, 2, 2, 2, 0, 3, 2], np.float32)
    expected = theirs(row, [TopKLogitsWarper(3)]).softmax(0)
    assert (expected > 0).tolist() == [False, True, True, True, True, False, True, True]
    torch.testing.assert_close(shares(row, SamplingParams(top_k=3)).float(), expected)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_tokens_come_as_often_as_they_should(options):
    """Pearson's statistic over 20,000 positions of one seed: it is fixed, so this always passes or always fails."""
    row = torch.linspace(2, -2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    params, count = SamplingParams(**options), 20_000
    expected = shares(row.numpy(), params).numpy() * count
    kept = weights(row.repeat(count, 1), torch.full((count,), 2.0), [params] * count)
    tokens = draw(kept, [uniform(11, position) for position in range(count)])
    observed = np.bincount(tokens, minlength=12)
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.3, 1.0]), min_size=1, max_size=700), st.floats(0, 1, exclude_max=True))
def test_draw_never_gives_an_impossible_token(row, number):
    row[len(row) // 2] = 1.0
    (token,) = draw(torch.tensor([row]), [number])
    assert row[token] > 0
    assert draw(torch.tensor([row]), [0.0]) == [next(i for i, weight in enumerate(row) if weight)]
    assert draw(torch.tensor([row]), [1 - 2**-53])[0] >= len(row) // 2
