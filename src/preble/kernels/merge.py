"""Partial answers of attention become one: weighted by the shares of their log-sum-exps.

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; as the last step of Flash-Decoding.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.launch import launch
from preble.kernels.partials import Partials
from preble.kernels.splits import first_token, own_tokens, tile_of
from preble.kernels.tiles import power_of_two

MOST_PROGRAMS = 2048
"""Programs take several heads before there are more than these: most of a large batch have nothing to merge."""
CHUNK = 4096
"""Numbers that a program reads at a time: 32 splits of a head of 128."""


@triton.jit(do_not_specialize=["first_split", "partials", "heads"])
def merge_partials_kernel(  # type: ignore[no-untyped-def]
    partial_out,
    partial_lse,
    out,
    context_lengths,
    starts,
    split_tokens,
    shared_split_tokens,
    first_split,
    partials,
    heads,
    QUERY_LENGTH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    sequence = row // QUERY_LENGTH
    context_length = tl.load(context_lengths + sequence)
    start = 0
    shared = 0
    if starts is not None:
        start = tl.load(starts + sequence)
        shared = tl.cdiv(start, tl.load(shared_split_tokens))
    first = first_token(context_length, start, QUERY_LENGTH, WINDOW, TILE)
    own = tl.cdiv(tl.maximum(context_length - first, 0), tl.load(split_tokens))
    if (context_length == 0) | ((start == 0) & (own <= 1)):
        return  # `out` is written already

    dims = tl.arange(0, BLOCK_DIM)
    kept = dims < HEAD_DIM
    first_head = tl.program_id(1) * heads
    for head in range(first_head, tl.minimum(first_head + heads, QUERY_HEADS)):
        place = row.to(tl.int64) * QUERY_HEADS + head
        highest = -1.0e30  # lower than any, and finite: chunks without an answer need no care
        total = 0.0
        answer = tl.zeros([BLOCK_DIM], tl.float32)
        for chunk in range(0, first_split + own, CHUNK):
            indices = chunk + tl.arange(0, CHUNK)
            written = (indices < shared) | ((indices >= first_split) & (indices < first_split + own))
            parts = place * partials + indices
            lse = tl.load(partial_lse + parts, mask=written, other=float("-inf"))
            values = tl.load(
                partial_out + parts[:, None] * HEAD_DIM + dims[None, :],
                mask=written[:, None] & kept[None, :],
                other=0.0,
            )
            higher = tl.maximum(highest, tl.max(lse, 0))
            shares = tl.exp2(lse - higher)
            correction = tl.exp2(highest - higher)
            total = total * correction + tl.sum(shares, 0)
            answer = answer * correction + tl.sum(values * shares[:, None], 0)
            highest = higher
        answer = answer / tl.where(total == 0.0, 1.0, total)
        tl.store(out + place * HEAD_DIM + dims, answer.to(out.dtype.element_ty), mask=kept)


def merge_partials(
    partials: Partials,
    out: torch.Tensor,
    *,
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    splits: int,
    query_length: int = 1,
    kv_heads: int,
    window: int | None = None,
    starts: torch.Tensor | None = None,
    shared_split_tokens: torch.Tensor | None = None,
    first_split: int = 0,
) -> None:
    """Write to `out` what `paged_decode` has not: the rows of sequences with several splits, or with a start.

    - out: [B * query_length, query_heads, head_dim], contiguous, bf16, fp16 or fp32.
    - context_lengths, split_tokens, splits, window, starts, first_split: those that `paged_decode` was given.
    - shared_split_tokens: int32 [1], goes with `starts`: tokens before them are answered in partials 0 to
      ceil(start / shared_split_tokens), at most `first_split`. A partial that saw nothing has a log-sum-exp of -inf
      and finite numbers.
    """
    if (starts is None) != (shared_split_tokens is None):
        raise ValueError("starts and shared_split_tokens go together: give both, or neither")
    if first_split + splits > partials.splits:
        raise ValueError(f"{first_split} + {splits} splits do not fit in partials for {partials.splits}")
    rows, query_heads, head_dim = out.shape
    heads = -(-rows * query_heads // MOST_PROGRAMS)
    launch(
        merge_partials_kernel,
        (rows, triton.cdiv(query_heads, heads)),
        warps=4,
        stages=1,
        partial_out=partials.out,
        partial_lse=partials.lse,
        out=out,
        context_lengths=context_lengths,
        starts=starts,
        split_tokens=split_tokens,
        shared_split_tokens=shared_split_tokens,
        first_split=first_split,
        partials=partials.splits,
        heads=heads,
        QUERY_LENGTH=query_length,
        WINDOW=window,
        TILE=tile_of(out, kv_heads, query_length).tokens,
        QUERY_HEADS=query_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=power_of_two(head_dim),
        CHUNK=CHUNK // power_of_two(head_dim),
    )


def merge_partials_reference(
    partials: Partials,
    out: torch.Tensor,
    *,
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    splits: int,
    query_length: int = 1,
    kv_heads: int,
    window: int | None = None,
    starts: torch.Tensor | None = None,
    shared_split_tokens: torch.Tensor | None = None,
    first_split: int = 0,
) -> None:
    """`merge_partials` in PyTorch."""
    tile_tokens = tile_of(out, kv_heads, query_length).tokens
    for b, length in enumerate(context_lengths.tolist()):
        start = int(starts[b]) if starts is not None else 0
        first, stop = own_tokens(length, start, query_length=query_length, window=window, tile_tokens=tile_tokens)
        own = -(-(stop - first) // int(split_tokens))
        if length == 0 or (start == 0 and own <= 1):
            continue
        shared = -(-start // int(shared_split_tokens)) if shared_split_tokens is not None else 0
        written = [*range(shared), *range(first_split, first_split + own)]
        queries = slice(b * query_length, (b + 1) * query_length)
        shares = torch.softmax(partials.lse[queries][..., written] * 0.6931471805599453, -1)
        out[queries] = torch.einsum("qhs,qhsd->qhd", shares, partials.out[queries][:, :, written]).to(out.dtype)
