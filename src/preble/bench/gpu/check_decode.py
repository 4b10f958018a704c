"""Decode attention against its definition, with and without prefixes read once for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from preble.bench.gpu.exact import check_cases, exact_attention, varied
from preble.bench.gpu.made_kv import MadeKV, make_kv
from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record
from preble.kernels.architecture import architecture_of
from preble.kernels.merge import merge_partials
from preble.kernels.paged_decode import paged_decode
from preble.kernels.partials import Partials
from preble.kernels.shared_prefix import plan_shared_splits, requests_per_tile, shared_prefix_decode
from preble.kernels.splits import plan_splits, tile_of, work_items
from preble.kernels.tiles import shared_prefix_tile

PROGRAMS_PER_PROCESSOR = 4
SPLITS, SHARED_SPLITS = 16, 8
LENGTHS = (1, 17, 700, 0, 3000, 64, 65, 4097, 128, 1023, 8)
TOY_LENGTHS = (17, 0, 70)
TAILS = (1, 64, 130, 17, 1000, 63, 5, 300, 2, 77, 128, 129, 31, 500, 16, 400, 3, 90)
TOY_TAILS = (1, 20)

HALVES = (torch.bfloat16, torch.float16)
"""What GPUs serve in."""


def options(place: Place, *, windows: bool) -> dict[str, tuple[Any, ...]]:
    """What varies; at toy sizes in the types that the interpreter computes rightly."""
    chosen: dict[str, tuple[Any, ...]] = {
        "dtype": (torch.float32, torch.float16) if place.toy else HALVES,
        "page_size": (64, 16, 128),
        "head_dim": (128, 64, 80, 96, 256),
        "heads": ((32, 8), (8, 8), (28, 4), (16, 2)),
        "soft_cap": (None, None, 30.0),
        "fp8": (False, False, True),
        "query_length": (1, 1, 4, 8),
    }
    if place.toy:
        chosen |= {"head_dim": (64,), "heads": ((4, 2),), "page_size": (16,), "query_length": (1,)}
    if windows:
        chosen |= {"window": (None, 100, None, 1500), "listed": (True, True, False)}
    return chosen


def run_decode(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Ragged batches; every split of the work."""
    cases = varied(options(place, windows=True), 2 if place.toy else 12 if place.quick else 28)
    check_cases(place, record, "decode", cases, shard, _decode)


def run_shared(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Batches in which some requests have a prefix in common."""
    cases = varied(options(place, windows=False), 1 if place.toy else 8 if place.quick else 16)
    check_cases(place, record, "shared prefix", cases, shard, _shared)


def queries(
    place: Place, rows: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Random queries, a view into the product of a merged QKV projection."""
    numbers = torch.randn(
        rows, heads[0] + 2 * heads[1], head_dim, generator=place.generator(seed + 1000), device=place.device
    )
    return (numbers * 2).to(dtype)[:, : heads[0]]


def _decode(
    place: Place,
    seed: int,
    *,
    dtype: torch.dtype,
    page_size: int,
    head_dim: int,
    heads: tuple[int, int],
    soft_cap: float | None,
    fp8: bool,
    query_length: int,
    window: int | None,
    listed: bool,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor, torch.dtype]:
    lengths = [max(length, query_length) if length else 0 for length in (TOY_LENGTHS if place.toy else LENGTHS)]
    kv = make_kv(
        place, lengths, page_size=page_size, kv_heads=heads[1], head_dim=head_dim, dtype=dtype, fp8=fp8, seed=seed
    )
    q = queries(place, len(lengths) * query_length, heads, head_dim, dtype, seed)
    masks: dict[str, Any] = {"soft_cap": soft_cap, "window": window}
    scale = head_dim**-0.5

    def call() -> torch.Tensor:
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=place.device)
        _attend(place, q, kv, out, page_size=page_size, scale=scale, query_length=query_length, listed=listed, **masks)
        return out

    exact = exact_attention(q, kv, [query_length] * len(lengths), scale=scale, **masks)
    return call, exact, dtype


def _attend(
    place: Place,
    q: torch.Tensor,
    kv: MadeKV,
    out: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    query_length: int,
    listed: bool,
    window: int | None,
    soft_cap: float | None,
    partials: Partials | None = None,
    first_split: int = 0,
    starts: torch.Tensor | None = None,
    shared_split_tokens: torch.Tensor | None = None,
) -> None:
    """Plan, decode, merge."""
    kv_heads = kv.keys.shape[1]
    programs = PROGRAMS_PER_PROCESSOR * architecture_of(place.device).processors
    partials = _poisoned(q, SPLITS) if partials is None else partials
    split_tokens = torch.full((1,), -1, dtype=torch.int32, device=place.device)
    work = None
    if listed:
        items = work_items(len(kv.rows), kv_heads, programs)
        work = torch.full((items,), -1, dtype=torch.int32, device=place.device)
    scales: dict[str, Any] = {**kv.scales}
    plan: dict[str, Any] = {"starts": starts, "window": window, "query_length": query_length}
    plan_splits(
        kv.context_lengths,
        split_tokens,
        kv_heads=kv_heads,
        splits=SPLITS,
        tile_tokens=tile_of(q, kv_heads, query_length).tokens,
        programs=programs,
        work=work,
        **plan,
    )
    paged_decode(
        q,
        kv.keys,
        kv.values,
        out,
        tables=kv.tables,
        rows=kv.rows,
        context_lengths=kv.context_lengths,
        split_tokens=split_tokens,
        partials=partials,
        splits=SPLITS,
        first_split=first_split,
        page_size=page_size,
        scale=scale,
        soft_cap=soft_cap,
        work=work,
        **plan,
        **scales,
    )
    merge_partials(
        partials,
        out,
        context_lengths=kv.context_lengths,
        split_tokens=split_tokens,
        splits=SPLITS,
        kv_heads=kv_heads,
        shared_split_tokens=shared_split_tokens,
        first_split=first_split,
        **plan,
    )


def _shared(
    place: Place,
    seed: int,
    *,
    dtype: torch.dtype,
    page_size: int,
    head_dim: int,
    heads: tuple[int, int],
    soft_cap: float | None,
    fp8: bool,
    query_length: int,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor, torch.dtype]:
    prefix = page_size * (2 if place.toy else 40)
    tails = [tail + query_length for tail in (TOY_TAILS if place.toy else TAILS)]
    # The first and the last have nothing in common with the others.
    lengths = [min(100, prefix), *(prefix + tail for tail in tails), query_length]
    kv = make_kv(
        place,
        lengths,
        page_size=page_size,
        kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        fp8=fp8,
        shared_tokens=prefix,
        seed=seed,
    )
    q = queries(place, len(lengths) * query_length, heads, head_dim, dtype, seed)
    architecture = architecture_of(place.device)
    each = requests_per_tile(architecture, head_dim, dtype, group=heads[0] // heads[1], query_length=query_length)
    sharing = list(range(1, 1 + len(tails)))
    tiles = [sharing[first : first + each] for first in range(0, len(sharing), each)]

    def ints(numbers: list[Any]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=place.device)

    members = ints([tile + [-1] * (each - len(tile)) for tile in tiles] + [[0] * each])
    prefix_lengths = ints([prefix] * len(tiles) + [0])  # the last tile is not active
    starts = ints([0, *[prefix] * len(tails), 0])
    scale = head_dim**-0.5

    def call() -> torch.Tensor:
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=place.device)
        partials = _poisoned(q, SHARED_SPLITS + SPLITS)
        split_tokens = ints([-1])
        plan_shared_splits(
            prefix_lengths,
            split_tokens,
            kv_heads=heads[1],
            splits=SHARED_SPLITS,
            tile_tokens=shared_prefix_tile(architecture, head_dim, dtype.itemsize).tokens,
            programs=2 * architecture.processors,
        )
        shared_prefix_decode(
            q,
            kv.keys,
            kv.values,
            tables=kv.tables,
            rows=kv.rows,
            members=members,
            prefix_lengths=prefix_lengths,
            split_tokens=split_tokens,
            partials=partials,
            splits=SHARED_SPLITS,
            page_size=page_size,
            query_length=query_length,
            scale=scale,
            soft_cap=soft_cap,
            **kv.scales,
        )
        _attend(
            place,
            q,
            kv,
            out,
            page_size=page_size,
            scale=scale,
            query_length=query_length,
            listed=True,
            window=None,
            soft_cap=soft_cap,
            partials=partials,
            first_split=SHARED_SPLITS,
            starts=starts,
            shared_split_tokens=split_tokens,
        )
        return out

    return call, exact_attention(q, kv, [query_length] * len(lengths), scale=scale, soft_cap=soft_cap), dtype


def _poisoned(q: torch.Tensor, splits: int) -> Partials:
    rows, query_heads, head_dim = q.shape
    partials = Partials.allocate(rows=rows, query_heads=query_heads, splits=splits, head_dim=head_dim, device=q.device)
    partials.out.fill_(float("nan"))
    partials.lse.fill_(float("nan"))
    return partials
