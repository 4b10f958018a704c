"""The numbers that sampling is made of: noise that is Gumbel's, weights that are exponentials."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE
from made_steps import ids, normal

from preble.kernels.launch import launch
from preble.kernels.sampling_edits import (
    depth_reference,
    noise_of_groups,
    noise_of_tokens,
    noise_of_words_reference,
    noise_reference,
    philox_reference,
    weight,
    weight_reference,
)
from preble.kernels.sampling_rows import BOTTOM, DEPTH_STEPS
from preble.sampling import MAX_SEED


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
