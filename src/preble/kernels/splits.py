"""How decode attention is split over the tokens of sequences, found out on the GPU from their lengths.

All splits of a step have one length, so the work of a ragged batch is cut into programs of about the same size: a
long sequence into many, a short one not at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preble.kernels.architecture import architecture_of
from preble.kernels.launch import launch
from preble.kernels.tiles import Tile, decode_tile, power_of_two

SHARED_SPLITS = 32
"""The most pieces a shared prefix is cut into: with 8 KV heads, one prefix then still fills a GPU."""
WAVES = 4
"""Programs for each processor that a plan aims at."""
SHORTEST_SPLIT = 2
"""Tiles. A shorter split takes hardly less time, and costs a merge."""
FEWEST_SPLITS = 8
MOST_SPLITS = 128


def splits_for(batch: int, kv_heads: int, processors: int) -> int:
    """Into how many splits a sequence of a batch of up to `batch` may be cut: fixed, as the scratch memory is.

    Twice what equal lengths need to fill the GPU, as lengths differ.
    """
    wanted = -(-2 * WAVES * processors // (batch * kv_heads))
    return max(FEWEST_SPLITS, min(wanted, MOST_SPLITS))


def work_items(batch: int, kv_heads: int, programs: int) -> int:
    """The most (sequence, split) pairs that `plan_splits` makes for a batch: the size of its `work`."""
    return batch + programs // kv_heads


def tile_of(q: torch.Tensor, kv_heads: int, query_length: int) -> Tile:
    """The tile that decodes q [N, query_heads, head_dim]; planning and merging go by its tokens."""
    return decode_tile(architecture_of(q.device), q.shape[2], q.shape[1] // kv_heads * query_length, q.itemsize)


@triton.jit
def first_token(  # type: ignore[no-untyped-def]
    context_length, start, QUERY_LENGTH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr
):
    """The token that a sequence's first split begins with: with a window, that of the first query, down to a tile."""
    first = start
    if WINDOW is not None:
        first = tl.maximum(start, (context_length - QUERY_LENGTH - WINDOW + 1) // TILE * TILE)
    return first


@triton.jit(do_not_specialize=["batch", "items", "splits", "programs"])
def plan_splits_kernel(  # type: ignore[no-untyped-def]
    context_lengths,
    starts,
    split_tokens,
    work,
    batch,
    items,
    splits,
    programs,
    QUERY_LENGTH: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequences = tl.arange(0, BLOCK)
    here = sequences < batch
    context_length = tl.load(context_lengths + sequences, mask=here, other=0)
    start = tl.zeros_like(sequences)
    if starts is not None:
        start = tl.load(starts + sequences, mask=here, other=0)
    own = tl.maximum(context_length - first_token(context_length, start, QUERY_LENGTH, WINDOW, TILE), 0)

    even = tl.cdiv(tl.sum(own.to(tl.int64), 0) * KV_HEADS, programs).to(tl.int32)
    longest = tl.cdiv(tl.max(own, 0), splits)
    tokens = tl.maximum(tl.maximum(even, longest), SHORTEST * TILE)
    tokens = tl.cdiv(tokens, TILE) * TILE
    tl.store(split_tokens, tokens)

    if work is not None:
        # Sequences with nothing to read have an item too: one program writes their zeros.
        counts = tl.where(here, tl.maximum(tl.cdiv(own, tokens), 1), 0)
        begins = tl.cumsum(counts, 0) - counts
        for split in range(tl.max(counts, 0)):
            tl.store(work + begins + split, sequences * splits + split, mask=split < counts)
        for item in range(0, items, BLOCK):
            places = item + sequences
            unused = (places >= tl.sum(counts, 0)) & (places < items)
            tl.store(work + places, tl.full([BLOCK], -1, tl.int32), mask=unused)


def plan_splits(
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    query_length: int = 1,
    kv_heads: int,
    splits: int,
    tile_tokens: int,
    programs: int,
    work: torch.Tensor | None = None,
) -> None:
    """Set the length of a split so that about `programs` of about the same length are to do: once a step and window.

    context_lengths and starts: int32 [B], as in `paged_decode`. split_tokens: int32 [1], set to a multiple of
    `tile_tokens` (that of `tile_of`), such that no sequence has more than `splits` splits.
    work: int32 [`work_items(B, kv_heads, programs)`], set to a list of the splits (sequence * splits + split, then -1).
    """
    batch = context_lengths.shape[0]
    items = 0
    if work is not None:
        items = work.shape[0]
        if items < work_items(batch, kv_heads, programs):
            raise ValueError(f"work has {items} items; {work_items(batch, kv_heads, programs)} are possible")
    launch(
        plan_splits_kernel,
        (1,),
        warps=4,
        stages=1,
        context_lengths=context_lengths,
        starts=starts,
        split_tokens=split_tokens,
        work=work,
        batch=batch,
        items=items,
        splits=splits,
        programs=programs,
        QUERY_LENGTH=query_length,
        WINDOW=window,
        KV_HEADS=kv_heads,
        TILE=tile_tokens,
        SHORTEST=SHORTEST_SPLIT,
        BLOCK=max(512, power_of_two(batch)),
    )


def own_tokens(
    context_length: int, start: int, *, query_length: int, window: int | None, tile_tokens: int
) -> tuple[int, int]:
    """The tokens, (first, stop), that the splits of a sequence cover: `first_token` for one sequence, on the host."""
    if window is not None:
        start = max(start, (context_length - query_length - window + 1) // tile_tokens * tile_tokens)
    return start, max(context_length, start)


def plan_splits_reference(
    context_lengths: torch.Tensor,
    split_tokens: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    query_length: int = 1,
    kv_heads: int,
    splits: int,
    tile_tokens: int,
    programs: int,
    work: torch.Tensor | None = None,
) -> None:
    """`plan_splits` in PyTorch."""
    lengths = context_lengths.tolist()
    own = []
    for length, start in zip(lengths, starts.tolist() if starts is not None else [0] * len(lengths), strict=True):
        first, stop = own_tokens(length, start, query_length=query_length, window=window, tile_tokens=tile_tokens)
        own.append(stop - first)
    least = max(-(-sum(own) * kv_heads // programs), -(-max(own) // splits), SHORTEST_SPLIT * tile_tokens)
    tokens = -(-least // tile_tokens) * tile_tokens
    split_tokens.fill_(tokens)
    if work is not None:
        items = [b * splits + s for b, length in enumerate(own) for s in range(max(1, -(-length // tokens)))]
        work.copy_(torch.tensor(items + [-1] * (len(work) - len(items)), dtype=torch.int32))
