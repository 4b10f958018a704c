"""Attention of prefill chunks: new tokens attend to their cached prefix and to each other, all K and V in pages.

The online softmax of FlashAttention-2 (Dao 2023), causal, over a ragged batch. A program answers one query tile of one
KV head: `tile_tokens` new tokens x the query heads that share the head, packed as rows of one tile, so that K and V are
read once for all of them and short chunks still fill the tensor cores. It walks over the KV tokens in tiles: those
that every row sees whole without a mask, those on the diagonal or on the edge of a sliding window with one.

Programs of the longest tiles start first, all KV heads of a tile beside each other: neighbours on the GPU walk over the
same K and V at the same pace, which reach them through the L2 cache, and the grid ends with its shortest programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from preble.kernels.architecture import Architecture, architecture_of
from preble.kernels.fp8 import decoded, from_e4m3
from preble.kernels.launch import launch
from preble.kernels.tiles import extend_tile, power_of_two

EDGE_TOKENS = 64
"""KV tokens at a time where a mask is needed, at most: it costs registers, and what it hides was computed in vain."""


def tile_tokens(
    architecture: Architecture, *, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """New tokens of one query tile, for queries of `dtype`: what `extend_tiles` is to be called with."""
    return max(1, extend_tile(architecture, head_dim, dtype.itemsize).rows // (query_heads // kv_heads))


def extend_tiles(
    query_lengths: Sequence[int] | NDArray[np.integer],
    context_lengths: Sequence[int] | NDArray[np.integer],
    tokens: int,
) -> NDArray[np.int32]:
    """The query tiles of a batch, the longest work first: int32 [T, 2] of (sequence, first new token in it).

    Sequence b has `query_lengths[b]` new tokens, the last of which sees `context_lengths[b]` tokens; a tile has up to
    `tokens` of the new ones (`tile_tokens`). A sequence without new tokens has no tile.
    """
    new = np.asarray(query_lengths, dtype=np.int64)
    tiles_of = -(-new // tokens)
    sequences = np.repeat(np.arange(len(new)), tiles_of)
    first = (np.arange(len(sequences)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)) * tokens
    seen = (np.asarray(context_lengths, dtype=np.int64) - new)[sequences] + np.minimum(first + tokens, new[sequences])
    longest_first = np.argsort(-seen, kind="stable")
    return np.stack([sequences, first], axis=1)[longest_first].astype(np.int32)


@triton.jit
def _rows(query_start, first, GROUP: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of a tile, by pointers: all heads of the group for one token, then for the next.

    Returns for each its token's row in the batch (int64), its head within the group and whether there is such a row.
    The loads are volatile: the compiler would keep what it has computed from them before, and spill.
    """
    start = tl.load(query_start, volatile=True)
    begin = start + tl.load(first, volatile=True)
    stop = tl.minimum(begin + ROWS // GROUP, tl.load(query_start + 1, volatile=True))
    flat = begin * GROUP + tl.arange(0, ROWS)
    return (flat // GROUP).to(tl.int64), flat % GROUP, flat < stop * GROUP


@triton.jit
def _pages(table, start, end, PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The page of the TOKENS tokens from `start`, or the page of each of them. Never looks past the token `end - 1`."""
    if PAGE_SIZE >= TOKENS:
        tokens = start
    else:
        tokens = start + tl.arange(0, TOKENS)
    return tl.load(table + tl.minimum(tokens, tl.maximum(end - 1, 0)) // PAGE_SIZE)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, answer, largest, total, begin, end, positions, table, keys, values, score_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, CONVERTS_FP8: tl.constexpr,
    TOKENS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on over the KV tokens from `begin`, a multiple of TOKENS, to `end`, with MASKED any number."""
    of_tile = tl.arange(0, TOKENS)
    dims = tl.arange(0, PADDED_DIM)
    # Pages are looked up a tile ahead: loads of K and V that had to wait for it would be issued too late.
    pages = _pages(table, begin, end, PAGE_SIZE, TOKENS)
    for start in tl.range(begin, end, TOKENS):
        tokens = start + of_tile
        if PAGE_SIZE >= TOKENS:  # the tile lies in one page
            slot = pages.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE
            offsets = of_tile[:, None] * STRIDE + dims[None, :]
            k_pointers = keys + slot * STRIDE + offsets
            v_pointers = values + slot * STRIDE + offsets
        else:
            slots = pages.to(tl.int64) * PAGE_SIZE + of_tile % PAGE_SIZE
            k_pointers = keys + slots[:, None] * STRIDE + dims[None, :]
            v_pointers = values + slots[:, None] * STRIDE + dims[None, :]
        pages = _pages(table, start + TOKENS, end, PAGE_SIZE, TOKENS)
        # Past `end` K may be anything, as it is masked in the scores, but V must be no NaN.
        if HEAD_DIM == PADDED_DIM:
            k = tl.load(k_pointers)
        else:
            k = tl.load(k_pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
        if MASKED:
            v = tl.load(v_pointers, mask=(tokens < end)[:, None] & (dims < HEAD_DIM)[None, :], other=0)
        elif HEAD_DIM == PADDED_DIM:
            v = tl.load(v_pointers)
        else:
            v = tl.load(v_pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
        if FP8:
            k = from_e4m3(k, query.dtype, CONVERTS_FP8)
            v = from_e4m3(v, query.dtype, CONVERTS_FP8)

        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if SOFT_CAP is not None:  # cap * tanh(x) = cap - 2 * cap / (1 + e ** 2x), in units of log2(e)
            cap = SOFT_CAP * 1.4426950408889634
            scores = cap - 2 * cap / (1 + tl.exp2(scores * score_scale))
            unit = 1.0
        else:
            unit = score_scale
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOW is not None:
                seen = seen & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1) * unit)
        if MASKED:  # a row may have seen nothing yet
            base = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        else:
            base = now_largest
        weights = tl.exp2(scores * unit - base[:, None])
        decay = tl.exp2(largest - base)
        total = total * decay + tl.sum(weights, 1)
        answer = tl.dot(weights.to(v.dtype), v, answer * decay[:, None], input_precision="ieee")
        largest = now_largest
    return answer, largest, total


@triton.jit(do_not_specialize=["scale", "table_stride"])
def _paged_extend(  # type: ignore[no-untyped-def]
    q, keys, values, out, tables, rows, context_lengths, query_starts, tiles, key_scales, value_scales, scale,
    table_stride, Q_STRIDE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, CONVERTS_FP8: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    query_start = tl.load(query_starts + sequence)
    query_length = tl.load(query_starts + sequence + 1) - query_start
    context = tl.load(context_lengths + sequence)
    table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride

    row, query_head, held = _rows(query_starts + sequence, tiles + 2 * tile + 1, GROUP, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    held = held[:, None] & (dims < HEAD_DIM)[None, :]
    q_pointers = q + row[:, None] * Q_STRIDE + (head * GROUP + query_head)[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q_pointers, mask=held, other=0.0)

    score_scale = scale * 1.4426950408889634
    if FP8:
        score_scale *= tl.load(key_scales + head)
    if SOFT_CAP is not None:
        score_scale *= 2 / SOFT_CAP

    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    keys += head * HEAD_DIM
    values += head * HEAD_DIM
    position = context - query_length + first
    positions = position + tl.arange(0, ROWS) // GROUP
    end = tl.minimum(position + ROWS // GROUP, context)
    # Every row sees the tokens from `whole` to `diagonal`, both multiples of TOKENS. The masked ones on either side
    # come first: what they need in registers would else be kept from the loop that has none to spare.
    whole = 0
    diagonal = tl.maximum(position + 1, 0) // TOKENS * TOKENS
    answer = tl.zeros([ROWS, PADDED_DIM], dtype=tl.float32)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if WINDOW is not None:
        begin = tl.maximum(position - WINDOW + 1, 0) // EDGE * EDGE
        diagonal = tl.maximum(diagonal, begin)
        whole = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), TOKENS) * TOKENS, diagonal)
        answer, largest, total = _attend(
            query, answer, largest, total, begin, whole, positions, table, keys, values, score_scale,
            HEAD_DIM, PADDED_DIM, STRIDE, PAGE_SIZE, WINDOW, SOFT_CAP, FP8, CONVERTS_FP8, EDGE, True,
        )  # fmt: skip
    answer, largest, total = _attend(
        query, answer, largest, total, diagonal, end, positions, table, keys, values, score_scale,
        HEAD_DIM, PADDED_DIM, STRIDE, PAGE_SIZE, WINDOW, SOFT_CAP, FP8, CONVERTS_FP8, EDGE, True,
    )  # fmt: skip
    answer, largest, total = _attend(
        query, answer, largest, total, whole, diagonal, positions, table, keys, values, score_scale,
        HEAD_DIM, PADDED_DIM, STRIDE, PAGE_SIZE, WINDOW, SOFT_CAP, FP8, CONVERTS_FP8, TOKENS, False,
    )  # fmt: skip
    norm = 1 / tl.where(total == 0, 1.0, total)
    if FP8:
        norm *= tl.load(value_scales + head)
    # The rows anew: kept from before, they would take registers from the loops.
    row, query_head, held = _rows(query_starts + sequence, tiles + 2 * tile + 1, GROUP, ROWS)
    held = held[:, None] & (dims < HEAD_DIM)[None, :]
    out_row = row * (KV_HEADS * GROUP) + head * GROUP + query_head
    out_pointers = out + out_row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_pointers, (answer * norm[:, None]).to(out.dtype.element_ty), mask=held)


def paged_extend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    tiles: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write to `out` the attention of the new tokens of B sequences, whose K and V are in the cache already.

    - `q` [N, query_heads, head_dim], fp32, fp16 or bf16: contiguous but for the stride of its rows.
    - `keys`, `values` [slots, kv_heads, head_dim], contiguous: `q`'s dtype, or uint8 that holds e4m3, then with
      `key_scales`, `value_scales` fp32 [kv_heads]. Slots are `page * page_size + offset`.
    - `out` [N, query_heads, head_dim], contiguous. Rows of no tile are left alone; those of a sequence whose context
      length is 0 become zeros.
    - `tables` int32 [table_rows, pages_per_row]: page numbers; sequence b's are in row `rows[b]` (int32 [B]).
    - `context_lengths` int32 [B]: tokens that the last new token sees, itself included.
    - `query_starts` int32 [B + 1]: sequence b's new tokens are rows `query_starts[b]` to `query_starts[b + 1]`.
    - `tiles` int32 [T, 2]: what `extend_tiles` gives for the tokens that `tile_tokens` gives.
    - `page_size`: 16, 64 or 128. `scale` of the scores: positive.
    - `window`: a token sees itself and the `window - 1` tokens before it, or all of them. `soft_cap`: scores become
      `soft_cap * tanh(score / soft_cap)`.
    """
    query_heads, head_dim = q.shape[1:]
    kv_heads = keys.shape[1]
    architecture = architecture_of(q.device)
    tile = extend_tile(architecture, head_dim, q.dtype.itemsize)
    launch(
        _paged_extend,
        (kv_heads, tiles.shape[0]),
        warps=tile.warps,
        stages=tile.stages,
        q=q,
        keys=keys,
        values=values,
        out=out,
        tables=tables,
        rows=rows,
        context_lengths=context_lengths,
        query_starts=query_starts,
        tiles=tiles,
        key_scales=key_scales,
        value_scales=value_scales,
        scale=scale,
        table_stride=tables.stride(0),
        Q_STRIDE=q.stride(0),
        KV_HEADS=kv_heads,
        GROUP=query_heads // kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_two(head_dim),
        PAGE_SIZE=page_size,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        FP8=keys.dtype == torch.uint8,
        CONVERTS_FP8=architecture.converts_fp8,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        EDGE=min(tile.tokens, EDGE_TOKENS),
    )


def paged_extend_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tables: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    tiles: torch.Tensor,
    page_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """`paged_extend` as its definition, in fp32, or in fp64 for q of fp64; needs no `tiles`."""
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = keys.shape[1]
    for sequence, context in enumerate(context_lengths.tolist()):
        begin, stop = query_starts[sequence : sequence + 2].tolist()
        if context == 0:
            out[begin:stop] = 0
            continue
        tokens = torch.arange(context, device=q.device)
        slots = tables[rows[sequence]].long()[tokens // page_size] * page_size + tokens % page_size
        k = _real(keys[slots], key_scales).to(precise)
        v = _real(values[slots], value_scales).to(precise)
        grouped = q[begin:stop].to(precise).view(stop - begin, kv_heads, q.shape[1] // kv_heads, q.shape[2])
        scores = torch.einsum("nhgd,thd->nhgt", grouped, k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        positions = tokens[context - (stop - begin) :, None]
        seen = tokens <= positions
        if window is not None:
            seen &= tokens > positions - window
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        out[begin:stop] = torch.einsum("nhgt,thd->nhgd", weights, v).flatten(1, 2).to(out.dtype)


def _real(cached: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """K or V [tokens, kv_heads, head_dim] as numbers."""
    return cached if scales is None else decoded(cached) * scales[:, None]
