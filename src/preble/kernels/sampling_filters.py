"""What a row's filters keep, and the best of it, without sorting.

A row's noise is fixed, so the winner among all tokens is the winner among those that a filter keeps, if it is one of
them. If it is not, no token as deep is kept, and the winner among the less deep is next. Whether a token is kept
follows from what lies above it: fewer than k tokens, less than p of the mass. Only top-k and top-p together take a
search, for the mass of the k. (Sampling and rejecting by pivots is FlashInfer's idea; with Gumbel noise the token is
the very one that filtering first would give.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.sampling_edits import depth, edited, noise_of_groups, noise_of_tokens, weight, weight_reference
from preble.kernels.sampling_rows import BOTTOM, DEEPEST, DEPTH_STEPS, SEED, TOP_K, TOP_P

DEEPEST_KEPT = tl.constexpr(BOTTOM)
DEEPER = tl.constexpr((1 << 31) - 1)  # than any token
LOWER = tl.constexpr(-(1 << 31))  # than any score
HOPELESS = tl.constexpr(int(27 * DEPTH_STEPS))  # noise spans 26: no token as deep wins against the largest


@triton.jit
def seed_of(row_words):  # type: ignore[no-untyped-def]
    low, high = tl.load(row_words + SEED), tl.load(row_words + SEED + 1)
    return (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def winner(deep, score, token, limit):  # type: ignore[no-untyped-def]
    """The best score among tokens no deeper than `limit`, and the lowest token that has it."""
    score = tl.where(deep <= limit, score, LOWER)
    top = tl.max(score, axis=0)
    return top, tl.min(tl.where(score == top, token, DEEPER), axis=0)


@triton.jit
def is_filtered(row_words, vocabulary):  # type: ignore[no-untyped-def]
    """Whether more than a depth decides what is kept."""
    top_k = tl.load(row_words + TOP_K)
    return ((top_k > 0) & (top_k < vocabulary)) | (tl.load(row_words + TOP_P).to(tl.float32, bitcast=True) < 1.0)


@triton.jit
def _reached(mass, total, share):  # type: ignore[no-untyped-def]
    """Whether the mass is `share` of the total, or more: then nothing below is kept."""
    return mass.to(tl.float64) >= total.to(tl.float64) * share.to(tl.float64)


@triton.jit
def _is_kept(limit, count, top_k, mass, total, top_p):  # type: ignore[no-untyped-def]
    """Whether a token is kept, given number and mass of those above it, which are no deeper than `limit`.

    The most probable one always is: whatever the logits, this ends.
    """
    nucleus = (top_p >= 1.0) | (_reached(mass, total, top_p) == 0)
    return (limit < 0) | ((count < top_k) & nucleus)


@triton.jit
def _tile(start, logits_row, row_words, counts, position, peak, steps, VOCABULARY: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Neighbouring tokens of a row and their depths."""
    token = start + tl.arange(0, TILE)
    x = tl.load(logits_row + token, mask=token < VOCABULARY, other=-float("inf")).to(tl.float32)
    return token, depth(edited(x, token, row_words, counts, position, VOCABULARY), peak, steps)


@triton.jit
def _below(limit, logits_row, row_words, counts, position, peak, steps, VOCABULARY: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number and mass of the tokens of a row that are no deeper than `limit`."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.int64)
    for start in range(0, VOCABULARY, TILE):
        _, deep = _tile(start, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
        count += (deep <= limit).to(tl.int32)
        mass += tl.where(deep <= limit, weight(deep), 0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _search(low, high, middle, count, top_k):  # type: ignore[no-untyped-def]
    """Halve [low, high], which holds the least depth that top_k tokens reach, if any: `count` reach the middle."""
    above = tl.where(count == top_k, middle, low)
    return tl.where(count < top_k, middle + 1, above), tl.where(count >= top_k, middle, high)


@triton.jit
def token_of_row(  # type: ignore[no-untyped-def]
    total, logits_row, row_words, counts, position, peak, steps, VOCABULARY: tl.constexpr, TILE: tl.constexpr
):
    """The token of a filtered row, from all its logits. total: the mass of the row."""
    top_k = tl.load(row_words + TOP_K)
    top_k = tl.where((top_k > 0) & (top_k < VOCABULARY), top_k, DEEPER)
    top_p = tl.load(row_words + TOP_P).to(tl.float32, bitcast=True)
    seed = seed_of(row_words)
    limit = DEEPEST_KEPT + 0
    if (top_k < VOCABULARY) & (top_p < 1.0):
        low = 0
        while low < limit:
            middle = low + (limit - low) // 2  # their sum may not fit
            count, _ = _below(middle, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
            low, limit = _search(low, limit, middle, count, top_k)
        _, total = _below(limit, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
    limit = tl.minimum(limit, tl.load(row_words + DEEPEST))
    chosen = -1
    while chosen < 0:
        top = LOWER
        best = 0
        best_depth = 0
        for start in range(0, VOCABULARY, TILE):
            token, deep = _tile(start, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
            if tl.min(deep, axis=0) <= tl.minimum(limit, HOPELESS):
                group = start // 4 + tl.arange(0, TILE // 4)
                tile_top, tile_best = winner(deep, noise_of_groups(seed, group, position) - deep, token, limit)
                tile_depth = tl.min(tl.where(token == tile_best, deep, DEEPER), axis=0)
                better = tile_top > top
                best = tl.where(better, tile_best, best)
                best_depth = tl.where(better, tile_depth, best_depth)
                top = tl.where(better, tile_top, top)
        limit = best_depth - 1
        count, mass = _below(limit, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
        if _is_kept(limit, count, top_k, mass, total, top_p):
            chosen = best
    return chosen


@triton.jit
def token_of_candidates(deep, token, total, row_words, position, reach, VOCABULARY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token of a filtered row, from its most probable ones: all less deep than `reach`; -1 if more are needed."""
    top_k = tl.load(row_words + TOP_K)
    top_k = tl.where((top_k > 0) & (top_k < VOCABULARY), top_k, DEEPER)
    top_p = tl.load(row_words + TOP_P).to(tl.float32, bitcast=True)
    heavy = tl.where(deep < reach, weight(deep), 0)
    enough = tl.sum((deep < reach).to(tl.int32), axis=0) >= top_k
    if top_k == DEEPER:
        enough = _reached(tl.sum(heavy, axis=0), total, top_p)
    chosen = -1
    if enough | (reach > DEEPEST_KEPT):
        limit = reach - 1
        if (top_k < VOCABULARY) & (top_p < 1.0):
            low = 0
            while low < limit:
                middle = low + (limit - low) // 2  # their sum may not fit
                count = tl.sum((deep <= middle).to(tl.int32), axis=0)
                low, limit = _search(low, limit, middle, count, top_k)
            total = tl.sum(tl.where(deep <= limit, heavy, 0), axis=0)
        limit = tl.minimum(limit, tl.load(row_words + DEEPEST))
        score = noise_of_tokens(seed_of(row_words), token, position) - deep
        while chosen < 0:
            top, best = winner(deep, score, token, limit)
            best_depth = tl.min(tl.where(token == best, deep, DEEPER), axis=0)
            limit = tl.where(top > LOWER, best_depth, 0) - 1
            mass = tl.sum(tl.where(deep <= limit, heavy, 0), axis=0)
            count = tl.sum((deep <= limit).to(tl.int32), axis=0)
            if _is_kept(limit, count, top_k, mass, total, top_p):
                chosen = best
    return chosen


def deepest_reference(deep: torch.Tensor, words: torch.Tensor) -> int:
    """The largest depth that the filters keep of int64 [vocabulary]. words: the row of the request, int32 [WORDS]."""
    ranked = deep.sort().values
    top_k, share = int(words[TOP_K.value]), float(words.view(torch.float32)[TOP_P.value])
    deepest = BOTTOM
    if 0 < top_k < len(deep):
        deepest = min(deepest, int(ranked[top_k - 1]))
    if share < 1.0:
        ranked = ranked[ranked <= deepest]
        masses = weight_reference(ranked).cumsum(0)
        deepest = int(ranked[(masses.double() >= masses[-1].double() * share).nonzero()[0]])
    return min(deepest, int(words[DEEPEST.value]))
