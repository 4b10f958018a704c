"""Decode attention over a paged KV cache, split over the tokens so that few long sequences fill the GPU too.

A program answers all query heads of one KV head of one sequence over one *split* of its tokens: their rows, times 1 to
8 new tokens, are packed into one tensor-core tile, so K and V are read once. A sequence with one split is answered at
once, others leave partial answers with their log-sum-exps to `merge_partials`. (Dao et al., "Flash-Decoding for
long-context inference", 2023; packing the group: Shazeer, "Fast Transformer Decoding", 2019.)

How long a split is, the GPU finds out from the lengths (`preble.kernels.splits`), so a CUDA graph holds for all.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl

from preble.kernels.architecture import architecture_of
from preble.kernels.fp8 import decoded, from_e4m3
from preble.kernels.launch import launch
from preble.kernels.partials import Partials
from preble.kernels.splits import first_token, own_tokens, tile_of
from preble.kernels.tiles import power_of_two

LOG2_E = tl.constexpr(log2(e))


@triton.jit
def page_numbers(table, token, end, TILE: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages of the tokens of a tile: one number where it lies in one page, else one for each token."""
    tokens = token if TILE <= PAGE else token + tl.arange(0, TILE)
    return tl.load(table + tokens // PAGE, mask=tokens < end, other=0)


@triton.jit(do_not_specialize=["pages_per_row", "splits", "first_split", "partials"])
def paged_decode_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    out,
    partial_out,
    partial_lse,
    tables,
    rows,
    context_lengths,
    starts,
    split_tokens,
    work,
    key_scales,
    value_scales,
    pages_per_row,
    splits,
    first_split,
    partials,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERY_LENGTH: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    # KV heads count fastest: programs that run together then read neighbouring memory and the same table entries.
    kv_head = tl.program_id(0)
    if work is None:
        sequence = tl.program_id(1)
        split = tl.program_id(2)
    else:
        item = tl.load(work + tl.program_id(1))
        if item < 0:
            return
        sequence = item // splits
        split = item % splits
    context_length = tl.load(context_lengths + sequence)
    start = 0
    if starts is not None:
        start = tl.load(starts + sequence)
    length = tl.load(split_tokens)
    first = first_token(context_length, start, QUERY_LENGTH, WINDOW, TILE)
    begin = first + split * length
    end = tl.minimum(begin + length, context_length)
    if (begin >= end) & ((split > 0) | (context_length > 0)):
        return

    row = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + row % GROUP
    query = sequence.to(tl.int64) * QUERY_LENGTH + row // GROUP
    kept = (row < GROUP * QUERY_LENGTH)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + (query * QUERY_STRIDE + head * HEAD_DIM)[:, None] + dims[None, :], mask=kept, other=0.0)
    last = context_length - QUERY_LENGTH + row // GROUP  # the last token that a row sees
    factor = SCALE if SOFT_CAP is not None else SCALE * LOG2_E
    if key_scales is not None:
        factor *= tl.load(key_scales + kv_head)

    # Lower than any score and finite: rows that have seen nothing yet need no care.
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    sums = tl.zeros([ROWS, TILE], tl.float32)  # summed up over a row only once, after the loop
    answer = tl.zeros([ROWS, BLOCK_DIM], tl.float32)

    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    table = tables + tl.load(rows + sequence).to(tl.int64) * pages_per_row
    offsets = tl.arange(0, TILE)
    pages = page_numbers(table, begin, end, TILE, PAGE)  # read one tile ahead
    for token in range(begin, end, TILE):
        tokens = token + offsets
        there = tokens < end
        if TILE <= PAGE:
            base = (pages.to(tl.int64) * PAGE + token % PAGE) * STRIDE + kv_head * HEAD_DIM
            places = base + (offsets[:, None] * STRIDE + dims[None, :])
        else:
            slots = pages.to(tl.int64) * PAGE + tokens % PAGE
            places = slots[:, None] * STRIDE + (kv_head * HEAD_DIM + dims)[None, :]
        pages = page_numbers(table, token + TILE, end, TILE, PAGE)
        # Masks hide slots that were never written: even with a weight of 0, a NaN would shine through.
        mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + places, mask=mask, other=0)
        v = tl.load(values + places, mask=mask, other=0)
        if key_scales is not None:
            k = from_e4m3(k, queries.dtype, CONVERTS_FP8)
            v = from_e4m3(v, queries.dtype, CONVERTS_FP8)

        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * factor
        if SOFT_CAP is not None:
            decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / SOFT_CAP))
            tanh = (1.0 - decay) / (1.0 + decay)  # of the magnitude, so that nothing overflows
            scores = tl.where(scores < 0.0, -tanh, tanh) * (SOFT_CAP * LOG2_E)
        seen = tokens[None, :] <= last[:, None]
        if WINDOW is not None:
            seen &= tokens[None, :] > last[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        sums = sums * correction[:, None] + weights
        answer = tl.dot(weights.to(v.dtype), v, answer * correction[:, None], input_precision="ieee")
        highest = higher

    total = tl.sum(sums, 1)
    divisor = tl.where(total == 0.0, 1.0, total)  # rows that have seen nothing
    answer = answer / divisor[:, None]
    if value_scales is not None:
        answer *= tl.load(value_scales + kv_head)
    place = query * (KV_HEADS * GROUP) + head
    if (context_length == 0) | ((start == 0) & (context_length - first <= length)):
        tl.store(out + place[:, None] * HEAD_DIM + dims[None, :], answer.to(out.dtype.element_ty), mask=kept)
    else:
        place = place * partials + first_split + split
        lse = tl.where(total == 0.0, float("-inf"), highest + tl.log2(divisor))
        tl.store(partial_out + place[:, None] * HEAD_DIM + dims[None, :], answer, mask=kept)
        tl.store(partial_lse + place, lse, mask=row < GROUP * QUERY_LENGTH)


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    partials: Partials,
    splits: int,
    first_split: int = 0,
    starts: torch.Tensor | None = None,
    page_size: int,
    query_length: int = 1,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    work: torch.Tensor | None = None,
) -> None:
    """Attend with the last `query_length` (1 to 8) tokens of B sequences, whose K and V already lie in the cache.

    - q, out: [B * query_length, query_heads, head_dim], bf16, fp16 or fp32; q's rows may be strided, out is contiguous.
    - keys, values: [slots, kv_heads, head_dim] of q's dtype, or uint8 holding e4m3 with scales fp32 [kv_heads].
    - tables: int32 [table_rows, pages]; rows: int32 [B], the row of each sequence.
    - context_lengths: int32 [B], the new tokens included. 0 for padding: reads nothing, `out` becomes zeros.
    - starts: int32 [B], multiples of the page size up to context_length - query_length: tokens before them are
      answered by others, in partials 0 to `first_split`. None: all are answered here.
    - window: a query sees itself and `window - 1` tokens before. soft_cap: scores become cap * tanh(score / cap).
    - split_tokens and work: as `plan_splits` left them, planned with the same starts, window, query_length and splits.
      With `work`, only as many programs start as have something to do; without it, `splits` for every sequence.

    Sequences with one split and no start are written to `out`. What others are written to, split s to partial
    `first_split + s`, `merge_partials` brings together.
    """
    kv_heads, head_dim = keys.shape[1:]
    if first_split + splits > partials.splits:
        raise ValueError(f"{first_split} + {splits} splits do not fit in partials for {partials.splits}")
    tile = tile_of(q, kv_heads, query_length)
    batch = context_lengths.shape[0]
    launch(
        paged_decode_kernel,
        (kv_heads, batch, splits) if work is None else (kv_heads, work.shape[0]),
        warps=tile.warps,
        stages=tile.stages,
        q=q,
        keys=keys,
        values=values,
        out=out,
        partial_out=partials.out,
        partial_lse=partials.lse,
        tables=tables,
        rows=rows,
        context_lengths=context_lengths,
        starts=starts,
        split_tokens=split_tokens,
        work=work,
        key_scales=key_scales,
        value_scales=value_scales,
        pages_per_row=tables.stride(0),
        splits=splits,
        first_split=first_split,
        partials=partials.splits,
        SCALE=scale,
        SOFT_CAP=soft_cap,
        WINDOW=window,
        QUERY_LENGTH=query_length,
        QUERY_STRIDE=q.stride(0),
        KV_HEADS=kv_heads,
        GROUP=q.shape[1] // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        PAGE=page_size,
        CONVERTS_FP8=architecture_of(q.device).converts_fp8,
        ROWS=tile.rows,
        TILE=tile.tokens,
    )


def paged_decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    partials: Partials,
    splits: int,
    first_split: int = 0,
    starts: torch.Tensor | None = None,
    page_size: int,
    query_length: int = 1,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    work: torch.Tensor | None = None,
) -> None:
    """`paged_decode` in PyTorch, one split after the other; `work` says nothing that the lengths do not."""
    kv_heads = keys.shape[1]
    group = q.shape[1] // kv_heads
    tokens = int(split_tokens)
    tile_tokens = tile_of(q, kv_heads, query_length).tokens
    lengths = context_lengths.tolist()
    for b, length in enumerate(lengths):
        queries = slice(b * query_length, (b + 1) * query_length)
        start = int(starts[b]) if starts is not None else 0
        if length == 0:
            out[queries] = 0
            continue
        first, stop = own_tokens(length, start, query_length=query_length, window=window, tile_tokens=tile_tokens)
        for split, begin in enumerate(range(first, stop, tokens)):
            positions = torch.arange(begin, min(begin + tokens, stop), device=q.device)
            slots = tables[rows[b].long(), positions // page_size].long() * page_size + positions % page_size
            k = _real(keys[slots], key_scales).repeat_interleave(group, 1)
            v = _real(values[slots], value_scales).repeat_interleave(group, 1)
            scores = torch.einsum("qhd,thd->qht", _real(q[queries]), k) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            last = torch.arange(length - query_length, length, device=q.device)[:, None]
            seen = positions <= last
            if window is not None:
                seen &= positions > last - window
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
            answer = torch.einsum("qht,thd->qhd", scores.softmax(-1).nan_to_num(0.0), v)
            if start == 0 and stop - first <= tokens:
                out[queries] = answer.to(out.dtype)
            else:
                partials.out[queries, :, first_split + split] = answer.float()
                partials.lse[queries, :, first_split + split] = (scores.logsumexp(-1) * LOG2_E.value).float()


def _real(tensor: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """In the precision to compute in; e4m3 codes with the scale of their head."""
    if scales is not None:
        return decoded(tensor) * scales[:, None]
    return tensor if tensor.dtype == torch.float64 else tensor.float()
