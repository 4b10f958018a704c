"""Decode attention over a prefix that many running requests have in common: its K and V are read once for all of them.

The query rows of up to R requests are stacked into one tile, so that reading the prefix becomes a product of matrices
on tensor cores. A program attends with one tile to one split of its prefix for one KV head, and leaves a partial answer
for each row. The decode kernel adds partial answers for what each request has alone, from the end of its prefix on;
both are merged by their log-sum-exps.

The idea is that of Hydragen (Juravsky et al. 2024, arXiv 2402.05099) and of cascade inference (FlashInfer).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from preble.kernels.architecture import Architecture, architecture_of
from preble.kernels.fp8 import decoded, from_e4m3
from preble.kernels.launch import launch
from preble.kernels.partials import Partials
from preble.kernels.prefix_groups import SHORTEST_SPLIT
from preble.kernels.tiles import power_of_two, shared_prefix_tile

LOG2_E = tl.constexpr(math.log2(math.e))


def requests_per_tile(
    architecture: Architecture, head_dim: int, dtype: torch.dtype, *, group: int, query_length: int = 1
) -> int:
    """R, how many requests one tile holds if a KV head has `group` query heads in `dtype`. With 1 nothing is shared."""
    return max(1, shared_prefix_tile(architecture, head_dim, dtype.itemsize).rows // (group * query_length))


@triton.jit(do_not_specialize=["tiles"])
def plan_shared_splits_kernel(  # type: ignore[no-untyped-def]
    prefix_lengths,
    split_tokens,
    tiles,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    tile = tl.arange(0, TILES)
    lengths = tl.load(prefix_lengths + tile, mask=tile < tiles, other=0)
    active = tl.sum((lengths > 0).to(tl.int32))
    pieces = tl.maximum(tl.maximum(PIECES - active, 2 * active), 1)
    tokens = tl.maximum(tl.cdiv(tl.sum(lengths), pieces), tl.cdiv(tl.max(lengths), SPLITS))
    tokens = tl.maximum(tokens, SHORTEST)
    tl.store(split_tokens, tl.cdiv(tokens, TILE_TOKENS) * TILE_TOKENS)


def plan_shared_splits(
    prefix_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    *,
    kv_heads: int,
    splits: int,
    tile_tokens: int,
    programs: int,
) -> None:
    """Write to `split_tokens`, int32 [1], how many tokens of a prefix one program of `shared_prefix_decode` reads.

    `prefix_lengths` is int32 [T], 0 for inactive tiles. As many programs get work as the GPU runs at a time,
    `programs`, two for each of its processors; with more tiles than that, about two for each, so that the last ones
    to run are short.
    A multiple of `tile_tokens` (that of `shared_prefix_tile`), with which no prefix has more than `splits` splits.
    """
    tiles = prefix_lengths.shape[0]
    launch(
        plan_shared_splits_kernel,
        (1,),
        warps=1,
        stages=1,
        prefix_lengths=prefix_lengths,
        split_tokens=split_tokens,
        tiles=tiles,
        PIECES=programs // kv_heads,
        SPLITS=splits,
        SHORTEST=SHORTEST_SPLIT,
        TILE_TOKENS=tile_tokens,
        TILES=power_of_two(tiles),
    )


def plan_shared_splits_reference(
    prefix_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    *,
    kv_heads: int,
    splits: int,
    tile_tokens: int,
    programs: int,
) -> None:
    """`plan_shared_splits` in plain Python."""
    lengths = prefix_lengths.tolist()
    active = sum(length > 0 for length in lengths)
    pieces = max(programs // kv_heads - active, 2 * active, 1)
    tokens = max(-(-sum(lengths) // pieces), -(-max(lengths, default=0) // splits), SHORTEST_SPLIT)
    split_tokens.fill_(-(-tokens // tile_tokens) * tile_tokens)


@triton.jit
def _slots(table, position, stop, tokens, PAGE_SIZE: tl.constexpr, TILE_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the tile of tokens from `position` lies; instead of tokens from `stop` on, the last before it is read."""
    if PAGE_SIZE % TILE_TOKENS == 0:  # as a prefix consists of whole pages, and a split of whole tiles, so does this
        place = tl.minimum(position, stop - TILE_TOKENS)
        page = tl.load(table + place // PAGE_SIZE).to(tl.int64)
        slots = page * PAGE_SIZE + place % PAGE_SIZE + tokens
    else:
        places = tl.minimum(position + tokens, stop - 1)
        slots = tl.load(table + places // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + places % PAGE_SIZE
    return slots


@triton.jit(do_not_specialize=["pages_per_row", "partials"])
def shared_prefix_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    tables,
    rows,
    members,
    prefix_lengths,
    split_tokens,
    partial_out,
    partial_lse,
    key_scales,
    value_scales,
    pages_per_row,
    partials,
    SCALE: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERY_LENGTH: tl.constexpr,
    REQUESTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    prefix = tl.load(prefix_lengths + tile)
    length = tl.load(split_tokens)
    start = split * length
    if start >= prefix:
        return
    stop = tl.minimum(start + length, prefix)

    place = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, PADDED_DIM)
    request = place // (GROUP * QUERY_LENGTH)
    within = place % (GROUP * QUERY_LENGTH)
    member = tl.load(members + tile * REQUESTS + request, mask=request < REQUESTS, other=-1)
    row = member.to(tl.int64) * QUERY_LENGTH + within // GROUP
    head = kv_head * GROUP + within % GROUP
    live = (member >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tile_q = tl.load(q + row[:, None] * QUERY_STRIDE + head[:, None] * HEAD_DIM + dims[None, :], mask=live, other=0)
    first = tl.load(members + tile * REQUESTS)
    table = tables + tl.load(rows + first).to(tl.int64) * pages_per_row
    keys += kv_head * HEAD_DIM
    values += kv_head * HEAD_DIM

    factor = SCALE * LOG2_E
    if key_scales is not None:
        factor *= tl.load(key_scales + kv_head)
    cap_factor = factor
    if SOFT_CAP is not None:
        cap_factor = factor * (2.0 / SOFT_CAP)
        factor = SOFT_CAP * LOG2_E
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    answer = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    tokens = tl.arange(0, TILE_TOKENS)
    slots = _slots(table, start, stop, tokens, PAGE_SIZE, TILE_TOKENS)
    for position in tl.range(start, stop, TILE_TOKENS):
        offsets = (slots * (KV_HEADS * HEAD_DIM))[:, None] + dims[None, :]
        if HEAD_DIM == PADDED_DIM:
            k = tl.load(keys + offsets)
            v = tl.load(values + offsets)
        else:
            k = tl.load(keys + offsets, mask=(dims < HEAD_DIM)[None, :], other=0)
            v = tl.load(values + offsets, mask=(dims < HEAD_DIM)[None, :], other=0)
        if key_scales is not None:
            k = from_e4m3(k, tile_q.dtype, CONVERTS_FP8)
            v = from_e4m3(v, tile_q.dtype, CONVERTS_FP8)
        scores = tl.dot(tile_q, tl.trans(k), input_precision="ieee")
        if SOFT_CAP is not None:  # tanh(x) = 1 - 2 / (1 + e ** 2x)
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * cap_factor))
        if PAGE_SIZE % TILE_TOKENS != 0:
            scores = tl.where((position + tokens < stop)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, 1)
        answer = tl.dot(weights.to(v.dtype), v, answer * decay[:, None], input_precision="ieee")
        highest = new_highest
        slots = _slots(table, position + TILE_TOKENS, stop, tokens, PAGE_SIZE, TILE_TOKENS)

    answer /= total[:, None]
    if value_scales is not None:
        answer *= tl.load(value_scales + kv_head)
    partial = (row * (KV_HEADS * GROUP) + head) * partials + split
    tl.store(partial_lse + partial, highest + tl.log2(total), mask=member >= 0)
    tl.store(partial_out + partial[:, None] * HEAD_DIM + dims[None, :], answer, mask=live)


def shared_prefix_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    members: torch.Tensor,
    prefix_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    partials: Partials,
    splits: int,
    page_size: int,
    query_length: int = 1,
    scale: float,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Partial answers of attention to the prefixes that requests have in common, one for each split.

    - `q`: [B * query_length, query_heads, head_dim], `query_length` rows for each of the B sequences of the batch; the
      row stride is free.
    - `keys`, `values`: [slots, kv_heads, head_dim] in q's dtype, or uint8 holding e4m3 with `key_scales` and
      `value_scales`, fp32 [kv_heads].
    - `tables`: int32 [table_rows, pages_per_row], `rows`: int32 [B], the row of each sequence.
    - `members`: int32 [T, R], each tile's sequences, from the left; -1 for none. None is in two tiles. R times the
      GQA group times `query_length` is best what `requests_per_tile` gives: it decides the size of the tile.
    - `prefix_lengths`: int32 [T], the tokens that a tile's members have in common, a multiple of `page_size`; all of
      them lie before the new tokens, so that every row sees them all. 0 for inactive tiles, which write nothing.
    - `split_tokens`: int32 [1], from `plan_shared_splits` with the same `splits` (and T, and KV heads).
    - `scale` > 0 goes on the scores, then `soft_cap`: cap * tanh(score / cap).

    Split s of a prefix, tokens `s * split_tokens` to `(s + 1) * split_tokens`, is written to `partials` [row, head, s]
    for all rows and query heads of the tile's members. No other partials are touched.
    """
    kv_heads, head_dim = keys.shape[1:]
    group = q.shape[1] // kv_heads
    architecture = architecture_of(q.device)
    tile = shared_prefix_tile(architecture, head_dim, q.element_size())
    tiles, requests = members.shape
    launch(
        shared_prefix_kernel,
        (tiles, kv_heads, splits),
        warps=tile.warps,
        stages=tile.stages,
        q=q,
        keys=keys,
        values=values,
        tables=tables,
        rows=rows,
        members=members,
        prefix_lengths=prefix_lengths,
        split_tokens=split_tokens,
        partial_out=partials.out,
        partial_lse=partials.lse,
        key_scales=key_scales,
        value_scales=value_scales,
        SCALE=scale,
        QUERY_STRIDE=q.stride(0),
        pages_per_row=tables.stride(0),
        partials=partials.splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_two(head_dim),
        QUERY_LENGTH=query_length,
        REQUESTS=requests,
        PAGE_SIZE=page_size,
        TILE_ROWS=max(16, power_of_two(requests * group * query_length)),
        TILE_TOKENS=tile.tokens,
        SOFT_CAP=soft_cap,
        CONVERTS_FP8=architecture.converts_fp8,
    )


def shared_prefix_decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    members: torch.Tensor,
    prefix_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    partials: Partials,
    splits: int,
    page_size: int,
    query_length: int = 1,
    scale: float,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """`shared_prefix_decode` in plain PyTorch: each member reads the prefix through its own table row."""
    group = q.shape[1] // keys.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    length = int(split_tokens)
    for sequences, prefix in zip(members.tolist(), prefix_lengths.tolist(), strict=True):
        for sequence in sequences if prefix else []:
            if sequence < 0:
                continue
            positions = torch.arange(prefix, device=q.device)
            pages = tables[rows[sequence].long(), positions // page_size].long()
            slots = pages * page_size + positions % page_size
            k, v = keys[slots], values[slots]  # [prefix, kv_heads, head_dim]
            if key_scales is not None and value_scales is not None:
                k, v = decoded(k) * key_scales[:, None], decoded(v) * value_scales[:, None]
            k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
            own = slice(sequence * query_length, (sequence + 1) * query_length)
            scores = torch.einsum("nhd,thd->nht", q[own].to(wide), k) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            for split, start in enumerate(range(0, prefix, length)):
                assert split < splits
                part = scores[..., start : start + length]
                answer = torch.einsum("nht,thd->nhd", part.softmax(-1), v[start : start + length])
                partials.out[own, :, split] = answer.float()
                partials.lse[own, :, split] = (part.logsumexp(-1) * math.log2(math.e)).float()
