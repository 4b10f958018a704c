"""Sampling of a whole step on the GPU: logits in, tokens out, nothing read by the host on the way.

Three launches over a grid that the batch size alone decides. A program of the first two takes a slice of a row, every
so-many-th chunk of 32 tokens, in registers:

1. the largest logit of each slice, or +inf where one is invalid;
2. for sampled rows, each token's depth below the row's largest and its noise, and the best of the slice; for rows with
   top-k or top-p instead the most probable tokens of the slice and the slice's mass;
3. one program per row merges what its slices found, and enters the token.

Filters are applied to the slices' most probable tokens, 4096 in all, or by the last program to the whole row where
these turn out not to be enough: see `preble.kernels.sampling_filters`. Depths, noise and masses are integers, so no
result depends on the order of sums, on the batch or on the chip: see `preble.kernels.sampling_edits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch
from preble.kernels.sampling_edits import (
    depth,
    depth_reference,
    edited,
    edited_reference,
    noise_of_groups,
    noise_reference,
    weight,
)
from preble.kernels.sampling_filters import (
    DEEPER,
    DEEPEST_KEPT,
    HOPELESS,
    LOWER,
    deepest_reference,
    is_filtered,
    seed_of,
    token_of_candidates,
    token_of_row,
    winner,
)
from preble.kernels.sampling_rows import (
    COUNT_ROW,
    DEEPEST,
    MOST,
    SEED,
    STEPS,
    WORDS,
    SamplingRows,
)
from preble.kernels.tiles import power_of_two

SLICE = 2048
"""Tokens of a slice."""
CANDIDATES = 4096
"""The most probable tokens of a row that its last program keeps in registers."""

_SLICE = tl.constexpr(SLICE)
_CHUNK = tl.constexpr(32)
_WORDS = tl.constexpr(WORDS)
_MOST = tl.constexpr(MOST)


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What the launches of a step hand on, for up to B rows of S slices. Nothing in it outlives the step."""

    peaks: torch.Tensor
    """fp32 [B, S]: the largest logit; +inf in invalid slices."""
    tokens: torch.Tensor
    """int32 [2, B, S]: the tokens of the largest logit and of the best score."""
    scores: torch.Tensor
    """int32 [B, S]: the best score."""
    masses: torch.Tensor
    """int64 [B, S]: the sum of the weights."""
    reaches: torch.Tensor
    """int32 [B, S]: tokens less deep than this are all among the candidates."""
    candidates: torch.Tensor
    """int32 [2, B, S, C]: depths and tokens; unused places are deeper than any token."""

    @classmethod
    def allocate(cls, batch: int, vocabulary: int, device: torch.device | str) -> SamplingWorkspace:
        """Uninitialised memory for up to `batch` rows, about 32 KiB each."""
        slices = triton.cdiv(vocabulary, SLICE)
        candidates = min(SLICE, CANDIDATES // power_of_two(slices))
        shapes = {"tokens": (2, batch, slices), "candidates": (2, batch, slices, candidates)}
        dtypes = {"peaks": torch.float32, "masses": torch.int64}
        return cls(
            **{
                name: torch.empty(shapes.get(name, (batch, slices)), dtype=dtypes.get(name, torch.int32), device=device)
                for name in cls.__slots__
            }
        )


@triton.jit
def _slice_tokens():  # type: ignore[no-untyped-def]
    """The tokens of this program: chunks are dealt out in turn, since frequent tokens are neighbours."""
    index = tl.arange(0, _SLICE)
    return (index // _CHUNK * tl.num_programs(0) + tl.program_id(0)) * _CHUNK + index % _CHUNK


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _peaks_kernel(  # type: ignore[no-untyped-def]
    logits, rows, positions, table, counts, peaks, best, logits_stride: tl.constexpr, VOCABULARY: tl.constexpr
):
    entry = tl.program_id(1)
    row = tl.load(rows + entry)
    if row >= 0:
        token = _slice_tokens()
        there = logits + entry.to(tl.int64) * logits_stride + token
        x = tl.load(there, mask=token < VOCABULARY, other=-float("inf")).to(tl.float32)
        valid = x < float("inf")  # NaN is not
        invalid = tl.min(valid.to(tl.int32), axis=0) == 0
        row_words = table + row.to(tl.int64) * _WORDS
        x = edited(tl.where(valid, x, 0.0), token, row_words, counts, tl.load(positions + entry), VOCABULARY)
        peak = tl.max(x, axis=0)
        at = entry * tl.num_programs(0) + tl.program_id(0)
        tl.store(peaks + at, tl.where(invalid, float("inf"), peak))
        tl.store(best + at, tl.min(tl.where(x == peak, token, DEEPER), axis=0))


@triton.jit
def _row_peak(peaks, entry, SLICES: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row; not finite if the row is invalid."""
    part = tl.arange(0, TILE)
    return tl.max(tl.load(peaks + entry * SLICES + part, mask=part < SLICES, other=-float("inf")), axis=0)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _slices_kernel(  # type: ignore[no-untyped-def]
    logits,
    rows,
    positions,
    table,
    counts,
    peaks,
    scores,
    drawn,
    masses,
    reaches,
    candidate_depths,
    candidate_tokens,
    logits_stride: tl.constexpr,
    VOCABULARY: tl.constexpr,
    SLICES: tl.constexpr,
    SLICES_TILE: tl.constexpr,
    PER_SLICE: tl.constexpr,
):
    entry = tl.program_id(1)
    row = tl.load(rows + entry)
    if row < 0:
        return
    row_words = table + row.to(tl.int64) * _WORDS
    steps = tl.load(row_words + STEPS).to(tl.float32, bitcast=True)
    peak = _row_peak(peaks, entry, SLICES, SLICES_TILE)
    if (steps == 0.0) | (tl.abs(peak) == float("inf")):
        return
    token = _slice_tokens()
    there = logits + entry.to(tl.int64) * logits_stride + token
    x = tl.load(there, mask=token < VOCABULARY, other=-float("inf")).to(tl.float32)
    position = tl.load(positions + entry)
    x = edited(x, token, row_words, counts, position, VOCABULARY)
    deep = depth(x, peak, steps)
    at = entry * SLICES + tl.program_id(0)
    if is_filtered(row_words, VOCABULARY):
        tl.store(masses + at, tl.sum(tl.where(deep <= DEEPEST_KEPT, weight(deep), 0), axis=0))
        # Halve until no more tokens are less deep than there is room for, and no fewer than half as many.
        reach = DEEPEST_KEPT + 1
        if tl.sum((deep <= DEEPEST_KEPT).to(tl.int32), axis=0) > PER_SLICE:
            reach = 0
            found = 0
            above = DEEPEST_KEPT + 1
            while (above - reach > 1) & (found < PER_SLICE // 2):
                middle = reach + (above - reach) // 2  # their sum may not fit
                count = tl.sum((deep < middle).to(tl.int32), axis=0)
                reach = tl.where(count <= PER_SLICE, middle, reach)
                found = tl.where(count <= PER_SLICE, count, found)
                above = tl.where(count <= PER_SLICE, above, middle)
        tl.store(reaches + at, reach)
        taken = deep < reach
        place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        start = at.to(tl.int64) * PER_SLICE
        tl.store(candidate_depths + start + place, deep, mask=taken)
        tl.store(candidate_tokens + start + place, token, mask=taken)
        place = tl.arange(0, PER_SLICE)
        tl.store(candidate_depths + start + place, DEEPER, mask=place >= tl.sum(taken.to(tl.int32), axis=0))
    else:
        limit = tl.minimum(tl.load(row_words + DEEPEST), HOPELESS)
        best = tl.min(token, axis=0)
        score = LOWER
        if tl.min(deep, axis=0) <= limit:
            first = tl.arange(0, _SLICE // 4) * 4  # of each group of four
            group = (first // _CHUNK * SLICES + tl.program_id(0)) * (_CHUNK // 4) + first % _CHUNK // 4
            score, best = winner(deep, noise_of_groups(seed_of(row_words), group, position) - deep, token, limit)
        tl.store(scores + at, score)
        tl.store(drawn + at, best)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "out_tokens"])
def _tokens_kernel(  # type: ignore[no-untyped-def]
    logits,
    rows,
    positions,
    table,
    counts,
    out_tokens,
    last_tokens,
    peaks,
    best,
    scores,
    drawn,
    masses,
    reaches,
    candidate_depths,
    candidate_tokens,
    logits_stride: tl.constexpr,
    VOCABULARY: tl.constexpr,
    SLICES: tl.constexpr,
    SLICES_TILE: tl.constexpr,
    PER_SLICE: tl.constexpr,
    TILE: tl.constexpr,
):
    entry = tl.program_id(0)
    row = tl.load(rows + entry)
    chosen = -1
    if row >= 0:
        row_words = table + row.to(tl.int64) * _WORDS
        steps = tl.load(row_words + STEPS).to(tl.float32, bitcast=True)
        peak = _row_peak(peaks, entry, SLICES, SLICES_TILE)
        part = tl.arange(0, SLICES_TILE)
        at = entry * SLICES + part
        there = part < SLICES
        if tl.abs(peak) < float("inf"):
            if steps == 0.0:
                best_of = tl.load(peaks + at, mask=there, other=-float("inf")) == peak
                chosen = tl.min(tl.where(best_of, tl.load(best + at, mask=there, other=DEEPER), DEEPER), axis=0)
            elif is_filtered(row_words, VOCABULARY):
                position = tl.load(positions + entry)
                reach = tl.min(tl.load(reaches + at, mask=there, other=DEEPER), axis=0)
                total = tl.sum(tl.load(masses + at, mask=there, other=0), axis=0)
                place = tl.arange(0, SLICES_TILE * PER_SLICE)
                used = place < SLICES * PER_SLICE
                place += entry.to(tl.int64) * (SLICES * PER_SLICE)
                deep = tl.load(candidate_depths + place, mask=used, other=DEEPER)
                token = tl.load(candidate_tokens + place, mask=used, other=0)
                chosen = token_of_candidates(deep, token, total, row_words, position, reach, VOCABULARY)
                if chosen < 0:
                    logits_row = logits + entry.to(tl.int64) * logits_stride
                    chosen = token_of_row(total, logits_row, row_words, counts, position, peak, steps, VOCABULARY, TILE)
            else:
                score = tl.load(scores + at, mask=there, other=LOWER)
                best_of = there & (score == tl.max(score, axis=0))
                chosen = tl.min(tl.where(best_of, tl.load(drawn + at, mask=there, other=DEEPER), DEEPER), axis=0)
            if counts is not None:
                count_row = tl.load(row_words + COUNT_ROW)
                if count_row >= 0:
                    counted = counts + count_row.to(tl.int64) * VOCABULARY + chosen
                    count = tl.load(counted).to(tl.int32)
                    tl.store(counted, tl.where((count & _MOST) < _MOST, count + 1, count).to(tl.int16))
        tl.store(last_tokens + row, tl.maximum(chosen, 0))
    tl.store(out_tokens + entry, chosen)


def sample(
    logits: torch.Tensor,
    out_tokens: torch.Tensor,
    last_tokens: torch.Tensor,
    *,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: SamplingRows,
    counts: torch.Tensor | None = None,
    workspace: SamplingWorkspace,
) -> None:
    """The next token of each of B requests, in three launches.

    logits: [B, vocabulary], any float dtype, read as fp32 and left as they are; the last dimension is contiguous.
    rows: int32 [B], the row of each request in `params` and `last_tokens`, none named twice; -1 is padding.
    positions: int32 [B]: index of the token to sample in its request, prompt included.
    params: what each request asks for.
    counts: int16 [penalty_rows, vocabulary] contiguous, see `count_tokens`; None without penalties, which then apply to
        no request. The sampled tokens are counted.
    workspace: for at least B rows of this vocabulary.

    Written are
    out_tokens: int32 [B]. -1 for padding and for invalid rows: a NaN or +inf among the logits, or nothing finite left.
    last_tokens: int32 [R]: the token of each of the rows; 0 for invalid ones, so that it can be looked up.
    """
    batch, vocabulary = logits.shape
    slices, per_slice = workspace.candidates.shape[2:]
    grid = (slices, batch)
    shared: dict[str, Any] = {"logits": logits, "rows": rows, "positions": positions, "table": params.table}
    shared |= {"counts": counts, "logits_stride": logits.stride(0), "VOCABULARY": vocabulary, "peaks": workspace.peaks}
    found = {
        "scores": workspace.scores, "drawn": workspace.tokens[1], "masses": workspace.masses,
        "reaches": workspace.reaches, "candidate_depths": workspace.candidates[0],
        "candidate_tokens": workspace.candidates[1], "SLICES": slices, "SLICES_TILE": power_of_two(slices),
        "PER_SLICE": per_slice,
    }  # fmt: skip
    # Left alone, ptxas would rather spill a few registers than let one program less run at a time.
    launch(_peaks_kernel, grid, warps=8, stages=1, maxnreg=64, **shared, best=workspace.tokens[0])
    launch(_slices_kernel, grid, warps=8, stages=1, maxnreg=96, **shared, **found)
    launch(
        _tokens_kernel, (batch,), warps=16, stages=1, maxnreg=128, **shared, **found, best=workspace.tokens[0],
        out_tokens=out_tokens, last_tokens=last_tokens, TILE=SLICE,
    )  # fmt: skip


def sample_reference(
    logits: torch.Tensor,
    out_tokens: torch.Tensor,
    last_tokens: torch.Tensor,
    *,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: SamplingRows,
    counts: torch.Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
) -> None:
    """`sample` in PyTorch, row by row; it needs no workspace."""
    for entry, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        out_tokens[entry] = -1
        if row < 0:
            continue
        words = params.table[row]
        token = out_tokens[entry] = _token_reference(logits[entry], words, counts, position)
        last_tokens[row] = max(int(token), 0)
        if counts is not None and token >= 0 and words[COUNT_ROW.value] >= 0:
            counted = counts[words[COUNT_ROW.value]]
            counted[token] += 1 if (counted[token] & MOST) < MOST else 0


def _token_reference(logits: torch.Tensor, words: torch.Tensor, counts: torch.Tensor | None, position: int) -> int:
    x = edited_reference(logits, words, counts, position)
    if not (logits < torch.inf).all() or not x.amax().isfinite():
        return -1
    steps = words.view(torch.float32)[STEPS.value]
    if steps == 0.0:
        return int((x == x.amax()).nonzero()[0])
    deep = depth_reference(x, x.amax(), steps)
    seed = int(words[SEED.value : SEED.value + 2].view(torch.int64))
    score = noise_reference(seed, position, len(x)).to(x.device) - deep
    score[deep > deepest_reference(deep, words)] = torch.iinfo(torch.int64).min
    return int((score == score.amax()).nonzero()[0])
