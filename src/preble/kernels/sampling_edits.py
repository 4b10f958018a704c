"""What becomes of one logit before a token is chosen: its edits, its depth, its weight and its noise.

From the depth on, everything is an integer: how far the scaled logit lies below the row's largest, in steps of 2**-24,
the weight exp(-depth) in 40 bits, and Gumbel noise in steps of 2**-24. Integers are added and compared alike in any
order and on any chip, so a token is the same function of seed, position and logits in any batch, tile and architecture,
and equal depths are equal probabilities.

The noise of token t of a request with seed s at position p is that of word t % 4 of Philox-4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) with key s and counter (t // 4, p, 0, 0). A word w stands for
v = (w + 1/2) / 2**32, and the noise is -log2(-log2(1 - v)) times ln 2, plus a constant. Its resolution is best where
v is small, the noise large, and the winner found: a token's chance is exact down to about 2**-32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.sampling_rows import (
    BARRED_UNTIL,
    BIAS_IDS,
    BIAS_VALUES,
    BIASES,
    COUNT_ROW,
    FREQUENCY,
    MOST,
    PRESENCE,
    REPETITION,
    STOP_IDS,
    STOPS,
)

_TOO_DEEP = tl.constexpr(2147483520.0)  # the largest fp32 number that fits int32
_ONES = tl.constexpr((1 << 32) - 1)  # the interpreter has no ~ for unsigned numbers
_COUNT_BITS = tl.constexpr(MOST)
_H = tl.constexpr(1 << 31)
_HALF_LOG2_E = tl.constexpr(3098164009)  # log2(e) / 2 * 2**32
_LN_2 = tl.constexpr(1488522236)  # ln(2) * 2**31

# (1 - 2**-f) / f on [0, 1], times 2**32, alternating in sign from +: Chebyshev, error 6e-9.
_HALVING = (2977044448, 1031763232, 238367582, 41219527, 5548193, 493839)
# -log2(1 - r / 2) / r on [0, 1] in powers of f = 1 - r, times 2**31, alternating likewise: Chebyshev, error 2e-7.
_LOG2 = (2147483333, 950638044, 597453792, 426026991, 303085331, 182182777, 74264941, 14357811)
_H0, _H1, _H2, _H3, _H4, _H5 = map(tl.constexpr, _HALVING)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = map(tl.constexpr, _LOG2)


@triton.jit
def edited(x, token, row, counts, position, vocabulary):  # type: ignore[no-untyped-def]
    """Logits x, fp32 [n], of tokens [n] after biases, penalties and barred stops. row: the words of the request."""
    for index in range(tl.load(row + BIASES)):
        bias = tl.load(row + BIAS_VALUES + index).to(tl.float32, bitcast=True)
        x = tl.where(token == tl.load(row + BIAS_IDS + index), x + bias, x)
    if counts is not None:
        count_row = tl.load(row + COUNT_ROW)
        if count_row >= 0:
            repetition = tl.load(row + REPETITION).to(tl.float32, bitcast=True)
            frequency = tl.load(row + FREQUENCY).to(tl.float32, bitcast=True)
            presence = tl.load(row + PRESENCE).to(tl.float32, bitcast=True)
            there = counts + count_row.to(tl.int64) * vocabulary + token
            seen = tl.load(there, mask=token < vocabulary, other=0).to(tl.int32)
            count = seen & _COUNT_BITS
            x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
            # One rounding wherever this is inlined, so that no two kernels see different logits.
            x = tl.fma(-frequency, count.to(tl.float32), x)
            x = tl.where(count > 0, x - presence, x)
    if position < tl.load(row + BARRED_UNTIL):
        for index in range(tl.load(row + STOPS)):
            x = tl.where(token == tl.load(row + STOP_IDS + index), -float("inf"), x)
    return x


@triton.jit
def depth(x, peak, steps):  # type: ignore[no-untyped-def]
    """int32: how far logits x, fp32, lie below the row's largest; `steps` of it to a difference of 1."""
    return tl.minimum(tl.maximum(peak - x, 0.0) * steps, _TOO_DEEP).to(tl.int32)


@triton.jit
def _minus_product(CONSTANT: tl.constexpr, f, part):  # type: ignore[no-untyped-def]
    """CONSTANT - f * part, f in 32 bits of fraction: a step of Horner's scheme."""
    return tl.full(f.shape, CONSTANT, tl.uint32) - tl.umulhi(f, part)


@triton.jit
def weight(depth):  # type: ignore[no-untyped-def]
    """int64: exp(-depth) times 2**40, for depths up to BOTTOM."""
    octaves = tl.umulhi(depth.to(tl.uint32) << 1, tl.full(depth.shape, _HALF_LOG2_E, tl.uint32))  # 24 bits are fraction
    f = octaves << 8
    part = _minus_product(_H4, f, tl.full(f.shape, _H5, tl.uint32))
    part = _minus_product(_H2, f, _minus_product(_H3, f, part))
    part = _minus_product(_H0, f, _minus_product(_H1, f, part))
    mantissa = _minus_product(_H, f, part >> 1)
    return (mantissa.to(tl.int64) << 9) >> tl.minimum(octaves >> 24, 63).to(tl.int64)


@triton.jit
def _leading_zeros(x):  # type: ignore[no-untyped-def]
    """Of uint32 x > 0. Without the second bit of each pair of ones, conversion to fp32 can't round up to a power."""
    return 158 - ((x & ((x >> 1) ^ _ONES)).to(tl.float32).to(tl.uint32, bitcast=True) >> 23)


@triton.jit
def _log2_part(r, of):  # type: ignore[no-untyped-def]
    """-log2(1 - r / 2) * (of / r) with r and `of` in 32 bits of fraction, the result in 31."""
    f = r ^ _ONES
    part = _minus_product(_L6, f, tl.full(f.shape, _L7, tl.uint32))
    part = _minus_product(_L4, f, _minus_product(_L5, f, part))
    part = _minus_product(_L2, f, _minus_product(_L3, f, part))
    return tl.umulhi(of, _minus_product(_L0, f, _minus_product(_L1, f, part)))


@triton.jit
def noise(word):  # type: ignore[no-untyped-def]
    """int32, at least 0: Gumbel noise plus 6 ln 2 + ln ln 2, in steps of 2**-24, of uniform words, uint32."""
    # 1 - v is 2**-k (1 - r / 2): k leading ones of the word. Without any, r = 2v, whose leading zeros are kept apart.
    ones = (word >> 31) != 0
    zeros = _leading_zeros(tl.where(ones, (word ^ _ONES) | 1, (word << 1) | 1))
    r = tl.where(ones, ((((word ^ _ONES) << 1) | 1) << zeros) ^ _ONES, (word << 1) | 1)
    apart = tl.where(ones, 0, zeros)
    part = _log2_part(r, r << apart)
    bits = tl.where(ones, (zeros << 26) + (part >> 5), part)  # of -log2(1 - v), with this many of fraction:
    fraction = tl.where(ones, 26, 31 + apart)
    zeros = _leading_zeros(bits)
    r = ((bits << zeros) << 1) ^ _ONES
    log = ((fraction + zeros - 26) << 25) + (_log2_part(r, r) >> 6)
    return tl.umulhi(log, tl.full(log.shape, _LN_2, tl.uint32)).to(tl.int32)


@triton.jit
def _philox(seed, group, position):  # type: ignore[no-untyped-def]
    """The four words of each group of four tokens, uint32 [n]."""
    counter = group.to(tl.uint32)
    zero = counter * 0
    return tl.philox(seed, counter, zero + position.to(tl.uint32), zero, zero)


@triton.jit
def noise_of_groups(seed, group, position):  # type: ignore[no-untyped-def]
    """The noise of tokens 4 * group to 4 * group + 3, int32 [4 n]."""
    a, b, c, d = _philox(seed, group, position)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # the last index counts by ones, the one before by twos
    return noise(tl.reshape(words, (4 * group.shape[0],)))


@triton.jit
def noise_of_tokens(seed, token, position):  # type: ignore[no-untyped-def]
    """The noise of any tokens, int32 [n]."""
    a, b, c, d = _philox(seed, token // 4, position)
    even = token % 2 == 0
    return noise(tl.where(token % 4 < 2, tl.where(even, a, b), tl.where(even, c, d)))


def edited_reference(
    logits: torch.Tensor, row: torch.Tensor, counts: torch.Tensor | None, position: int
) -> torch.Tensor:
    """A request's logits, fp32 [vocabulary], after its edits. row: its words, int32 [WORDS]."""
    words, floats, x = row.tolist(), row.view(torch.float32), logits.to(torch.float32, copy=True)
    biases = slice(BIAS_IDS.value, BIAS_IDS.value + words[BIASES.value])
    values = slice(BIAS_VALUES.value, BIAS_VALUES.value + words[BIASES.value])
    x[row[biases].long()] += floats[values]
    count_row = words[COUNT_ROW.value]
    if counts is not None and count_row >= 0:
        seen = counts[count_row].int()
        count = seen & MOST
        repetition, frequency, presence = floats[[REPETITION.value, FREQUENCY.value, PRESENCE.value]]
        x = torch.where(seen != 0, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - frequency * count - presence * (count > 0)
    if position < words[BARRED_UNTIL.value]:
        x[row[STOP_IDS.value : STOP_IDS.value + words[STOPS.value]].long()] = -torch.inf
    return x


def depth_reference(x: torch.Tensor, peak: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """`depth`, int64."""
    return ((peak - x) * steps).clamp(max=_TOO_DEEP.value).long()


def weight_reference(depth: torch.Tensor) -> torch.Tensor:
    """`weight`, int64."""
    octaves = _high(2 * depth, _HALF_LOG2_E.value)
    f = (octaves << 8) & _WORD
    mantissa = (1 << 31) - _high(f, _alternating(f, _HALVING) >> 1)
    return (mantissa << 9) >> (octaves >> 24).clamp(max=63)


def noise_reference(seed: int, position: int, vocabulary: int) -> torch.Tensor:
    """The noise of every token of the vocabulary, int64."""
    groups = torch.arange(-(-vocabulary // 4))
    return noise_of_words_reference(philox_reference(seed, groups, position).T.reshape(-1)[:vocabulary])


def noise_of_words_reference(word: torch.Tensor) -> torch.Tensor:
    """`noise`, int64."""
    ones = word >= 1 << 31
    zeros = 32 - _bit_length(torch.where(ones, (_WORD - word) | 1, 2 * word + 1))
    r = torch.where(ones, _WORD - (((2 * (_WORD - word) + 1) << zeros) & _WORD), (2 * word + 1) & _WORD)
    apart = torch.where(ones, 0, zeros)
    part = _high(r << apart, _alternating(_WORD - r, _LOG2))
    bits = torch.where(ones, (zeros << 26) + (part >> 5), part)
    fraction = torch.where(ones, 26, 31 + apart)
    zeros = 32 - _bit_length(bits)
    r = _WORD - (((bits << zeros) << 1) & _WORD)
    log = ((fraction + zeros - 26) << 25) + (_high(r, _alternating(_WORD - r, _LOG2)) >> 6)
    return _high(log, _LN_2.value)


def philox_reference(seed: int, counter: torch.Tensor, second: int) -> torch.Tensor:
    """Philox-4x32-10 with key `seed` and counters (counter, second, 0, 0): words as int64 [4, n]."""
    low, high = seed & _WORD, seed >> 32
    zero = torch.zeros_like(counter)
    a, b, c, d = counter, zero + second, zero, zero
    for _ in range(10):
        a, b, c, d = (
            _high(c, 0xCD9E8D57) ^ b ^ low,
            (c * 0xCD9E8D57) & _WORD,
            _high(a, 0xD2511F53) ^ d ^ high,
            (a * 0xD2511F53) & _WORD,
        )
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return torch.stack([a, b, c, d])


_WORD = (1 << 32) - 1


def _high(a: torch.Tensor, b: torch.Tensor | int) -> torch.Tensor:
    """Upper half of the product of two words."""
    return (a * b >> 32) & _WORD


def _alternating(f: torch.Tensor, coefficients: tuple[int, ...]) -> torch.Tensor:
    part = torch.full_like(f, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        part = coefficient - _high(f, part)
    return part


def _bit_length(x: torch.Tensor) -> torch.Tensor:
    return torch.frexp(x.double()).exponent.long()
