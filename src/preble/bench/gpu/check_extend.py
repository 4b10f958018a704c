"""Attention of prefill chunks against its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch

from preble.bench.gpu.check_decode import options, queries
from preble.bench.gpu.exact import check_cases, exact_attention, varied
from preble.bench.gpu.made_kv import make_kv
from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record
from preble.kernels.architecture import architecture_of
from preble.kernels.paged_extend import extend_tiles, paged_extend, tile_tokens

CHUNKS = ((1, 1), (17, 17), (700, 900), (64, 64), (33, 2048), (512, 3000), (2, 129), (1500, 1500), (127, 128), (1, 777))
"""(new tokens, context with them)."""
TOY_CHUNKS = ((17, 17), (3, 40), (1, 20))


def run_extend(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Ragged batches of chunks, with and without a cached prefix."""
    chosen = options(place, windows=True)
    del chosen["query_length"], chosen["listed"]
    cases = varied(chosen, 2 if place.toy else 10 if place.quick else 24)
    check_cases(place, record, "extend", cases, shard, _extend)


def _extend(
    place: Place,
    seed: int,
    *,
    dtype: torch.dtype,
    page_size: int,
    head_dim: int,
    heads: tuple[int, int],
    soft_cap: float | None,
    fp8: bool,
    window: int | None,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor, torch.dtype]:
    chunks = TOY_CHUNKS if place.toy else CHUNKS
    counts, contexts = [count for count, _ in chunks], [context for _, context in chunks]
    kv = make_kv(
        place, contexts, page_size=page_size, kv_heads=heads[1], head_dim=head_dim, dtype=dtype, fp8=fp8, seed=seed
    )
    q = queries(place, sum(counts), heads, head_dim, dtype, seed)
    tokens = tile_tokens(
        architecture_of(place.device), query_heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype
    )
    tiles = torch.from_numpy(extend_tiles(counts, contexts, tokens)).to(place.device)
    query_starts = torch.tensor([0, *counts], device=place.device).cumsum(0).int()
    scale = head_dim**-0.5

    def call() -> torch.Tensor:
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=place.device)
        paged_extend(
            q,
            kv.keys,
            kv.values,
            out,
            tables=kv.tables,
            rows=kv.rows,
            context_lengths=kv.context_lengths,
            query_starts=query_starts,
            tiles=tiles,
            page_size=page_size,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            **kv.scales,
        )
        return out

    return call, exact_attention(q, kv, counts, scale=scale, window=window, soft_cap=soft_cap), dtype
