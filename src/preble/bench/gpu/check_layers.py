"""The kernels between the matrix products, and the one that prepares a step, against their references in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from preble.bench.gpu.check_decode import HALVES
from preble.bench.gpu.exact import check_cases, varied
from preble.bench.gpu.place import Place
from preble.bench.gpu.record import Record
from preble.kernels.add_norm import add_norm, add_norm_reference
from preble.kernels.fp8 import decoded
from preble.kernels.prepare import prepare_inputs, prepare_inputs_reference, update_tables, update_tables_reference
from preble.kernels.rotate_and_store import rotate_and_store, rotate_and_store_reference
from preble.kernels.silu_mul import silu_mul, silu_mul_reference

EPS = 1e-5
Case = tuple[Callable[[], torch.Tensor], torch.Tensor, torch.dtype]


def run_layers(place: Place, record: Record, shard: tuple[int, int]) -> None:
    """Widths and numbers of rows that are and are not multiples of a tile."""
    dtypes = (torch.float32, torch.float16) if place.toy else HALVES
    rows = (3, 1) if place.toy else (129, 1, 4096)
    widths = (96,) if place.toy else (4096, 896, 2048, 14336, 5632)
    count = 2 if place.toy else 6
    norms = varied({"dtype": dtypes, "rows": rows, "width": widths, "first": (False, True)}, count)
    check_cases(place, record, "add and norm", norms, shard, _add_norm)
    check_cases(
        place, record, "SiLU and mul", varied({"dtype": dtypes, "rows": rows, "width": widths}, count), shard, _silu
    )
    rotations = varied(
        {
            "dtype": dtypes,
            "rows": rows,
            "heads": ((4, 2),) if place.toy else ((32, 8), (28, 4), (8, 8)),
            "head_dim": (64,) if place.toy else (128, 64, 80, 96, 256),
            "normed": (False, True),
            "fp8": (False, True, False),
        },
        2 if place.toy else 12,
    )
    check_cases(place, record, "rotate and store", rotations, shard, _rotate)
    steps = varied({"page_size": (64, 16, 128), "decoding": (True, False)}, 2 if place.toy else 6)
    check_cases(place, record, "prepare", steps, shard, _prepare)


def _random(place: Place, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=place.generator(seed), device=place.device)


def _add_norm(place: Place, seed: int, *, dtype: torch.dtype, rows: int, width: int, first: bool) -> Case:
    x = None if first else _random(place, seed, rows, width).to(dtype)
    residual = _random(place, seed + 100, rows, width).to(dtype)
    weight = 1 + 0.3 * _random(place, seed + 200, width).to(dtype)

    def call() -> torch.Tensor:
        stream = residual.clone()
        out = torch.full_like(residual, float("nan"))
        add_norm(x, stream, weight, EPS, out)
        return torch.cat([stream, out])

    exact_stream, exact_out = residual.double(), torch.empty_like(residual, dtype=torch.float64)
    add_norm_reference(None if x is None else x.double(), exact_stream, weight.double(), EPS, exact_out)
    return call, torch.cat([exact_stream, exact_out]), dtype


def _silu(place: Place, seed: int, *, dtype: torch.dtype, rows: int, width: int) -> Case:
    gate_up = (3 * _random(place, seed, rows, 2 * width)).to(dtype)

    def call() -> torch.Tensor:
        out = torch.full((rows, width), float("nan"), dtype=dtype, device=place.device)
        silu_mul(gate_up, out)
        return out

    exact = torch.empty(rows, width, dtype=torch.float64, device=place.device)
    silu_mul_reference(gate_up.double(), exact)
    return call, exact, dtype


def _rotate(
    place: Place,
    seed: int,
    *,
    dtype: torch.dtype,
    rows: int,
    heads: tuple[int, int],
    head_dim: int,
    normed: bool,
    fp8: bool,
) -> Case:
    query_heads, kv_heads = heads
    qkv = _random(place, seed, rows, (query_heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = 100 * _random(place, seed + 100, rows, head_dim // 2)
    slots = torch.randperm(rows + 7, generator=torch.Generator().manual_seed(seed))[:rows].int().to(place.device)
    if rows > 1:
        slots[rows // 2] = -1
    arguments: dict[str, Any] = {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "slots": slots,
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "eps": EPS,
    }
    if normed:
        arguments |= {name: 1 + 0.3 * _random(place, seed + 200, head_dim).to(dtype) for name in ("q_norm", "k_norm")}
    if fp8:
        arguments |= {
            name: 0.01 + 0.01 * _random(place, seed + 300, kv_heads).abs() for name in ("key_scales", "value_scales")
        }
    shape = (rows + 7, kv_heads, head_dim)

    def run(kernel: Callable[..., None], work: torch.Tensor, cache: torch.dtype) -> torch.Tensor:
        keys, values = (torch.full(shape, 7, dtype=cache, device=place.device) for _ in range(2))
        kernel(work, keys, values, **arguments)
        stored = [
            decoded(x) * arguments[f"{name}_scales"][:, None] if fp8 else x
            for name, x in (("key", keys), ("value", values))
        ]
        return torch.cat([work.flatten(), *(x.flatten().to(work.dtype) for x in stored)])

    exact = run(rotate_and_store_reference, qkv.double(), torch.uint8 if fp8 else torch.float64)
    return lambda: run(rotate_and_store, qkv.clone(), torch.uint8 if fp8 else dtype), exact, dtype


def _prepare(place: Place, seed: int, *, page_size: int, decoding: bool) -> Case:
    """Whole numbers: they must be equal, and as fp32 their error is 0 or much more than its limit."""
    generator = torch.Generator().manual_seed(seed)
    counts = [1] * 20 + [0] * 4 if decoding else [1, 1, 700, 3, 64]
    table_rows, pages = 40, 64
    firsts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    if decoding:
        firsts = torch.arange(len(counts))
    entries = len(counts) if decoding else sum(counts)
    rows = torch.randperm(table_rows, generator=generator)[: len(counts)]
    starts = torch.randint(0, pages * page_size - 700, (len(counts),), generator=generator)
    chunks = torch.stack([rows, starts, torch.tensor(counts), firsts], 1).int().to(place.device)
    source = torch.randint(-1, 2, (entries,), generator=generator).int().to(place.device)
    last = torch.randint(100, 200, (table_rows,), generator=generator).int().to(place.device)
    updates = torch.tensor([[5, 3, 7], [-1, 0, 9], [6, 0, 8]], dtype=torch.int32, device=place.device)
    tables = torch.randint(0, 500, (table_rows, pages), generator=generator).int().to(place.device)

    def run(enter: Callable[..., None], prepare: Callable[..., None]) -> torch.Tensor:
        table = tables.clone()
        enter(table, updates)
        names = ("token_ids", "positions", "slots", "context_lengths", "rows")
        outs = {
            name: torch.full((entries if index < 3 else len(counts),), -77, dtype=torch.int32, device=place.device)
            for index, name in enumerate(names)
        }
        prepare(chunks=chunks, token_source=source, tables=table, last_tokens=last, page_size=page_size, **outs)
        return torch.cat([table.flatten(), *outs.values()]).float()

    exact = run(update_tables_reference, prepare_inputs_reference)
    return lambda: run(update_tables, prepare_inputs), exact, torch.float32
