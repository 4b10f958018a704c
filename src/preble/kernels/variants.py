"""What is shipped: every kernel as models and options call for it, to be compiled ahead.

Shapes are those of published models. Options are taken in pairs: any two values of two options (the model is one of
them) meet in some variant. What most models run, without any option, is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch

from preble.kernels.add_norm import add_norm
from preble.kernels.architecture import architecture_of
from preble.kernels.merge import merge_partials
from preble.kernels.paged_decode import paged_decode
from preble.kernels.paged_extend import paged_extend, tile_tokens
from preble.kernels.partials import Partials
from preble.kernels.prepare import prepare_inputs, update_tables
from preble.kernels.rotate_and_store import rotate_and_store
from preble.kernels.sampling import SamplingWorkspace, sample
from preble.kernels.sampling_rows import WORDS, SamplingRows
from preble.kernels.shared_prefix import plan_shared_splits, requests_per_tile, shared_prefix_decode
from preble.kernels.silu_mul import silu_mul
from preble.kernels.splits import SHARED_SPLITS, WAVES, plan_splits, splits_for, tile_of, work_items
from preble.kernels.store_kv import store_kv

META = torch.device("meta")
CONTEXT = 131072
"""Tokens for which page tables have room."""
TABLE_ROWS = 513


@dataclass(frozen=True, slots=True)
class Variant:
    """A way in which public wrappers are called."""

    name: str
    """Unique: kernel, model shape, options."""
    call: Callable[[int], object]
    """Calls public wrappers on tensors on the device "meta", for a batch of the given size."""
    specialisations: Mapping[str, int] = field(default_factory=dict)
    """By kernel: how many times it may be compiled as the batch size varies; otherwise once."""


class Model(NamedTuple):
    """The shape of a model, as far as kernels see it."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    width: int
    inner: int
    vocabulary: int

    @property
    def qkv_width(self) -> int:
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim


MODELS = (
    Model("llama-3-8b", 32, 8, 128, 4096, 14336, 128256),
    Model("llama-3-70b", 64, 8, 128, 8192, 28672, 128256),
    Model("llama-3.2-1b", 32, 8, 64, 2048, 8192, 128256),
    Model("llama-2-7b", 32, 32, 128, 4096, 11008, 32000),
    Model("qwen2.5-7b", 28, 4, 128, 3584, 18944, 152064),
    Model("phi-2", 32, 32, 80, 2560, 10240, 51200),
    Model("phi-3-mini", 32, 32, 96, 3072, 8192, 32064),
    Model("gemma-2-9b", 16, 8, 256, 3584, 14336, 256000),
)
EXTREMES = tuple(model for model in MODELS if model.head_dim in (64, 256))
"""Checked in fp32, too: the least and the most registers."""
VOCABULARIES = tuple(model for model in MODELS if model.vocabulary in (32000, 256000))


_AGAIN = {"plan_shared_splits_kernel": 8}
"""It holds the lengths of all tiles at once, and is compiled for each power of two of them: it is quickly done."""


def variants(full: bool = False) -> Iterator[Variant]:
    """Options in pairs; with `full`, those of attention in every combination."""
    shapes: dict[str, Sequence[Any]] = {"model": MODELS}
    reading = shapes | {"soft_cap": (None, 50.0), "fp8": (False, True)}
    all_pages = {"page_size": (64, 16, 128)}
    pages = all_pages if full else {"page_size": (64, 16)}  # above 64 they are all larger than a tile
    windows, lengths = {"window": (None, 4096)}, {"query_length": (1, 4)}
    longest = {"query_length": (1, 4, 8)} if full else lengths
    ways: dict[str, Sequence[Any]] = {} if full else {"work": (True, False), "shared": (False, True)}
    yield from _of(_decode, full, **reading, **pages, **windows, **longest, **ways)
    yield from _of(_extend, full, **reading, **all_pages, **windows)
    yield from _of(_shared_prefix, full, **reading, **pages, **lengths)
    yield from _of(_rotate_and_store, full, **shapes, fp8=(False, True), norm=(False, True))
    yield from _of(_store_kv, full, **shapes, fp8=(False, True))
    yield from _of(_add_norm, full, **shapes, first=(False, True))
    yield from _of(_silu_mul, full, **shapes)
    yield from _of(_sample, full, model=MODELS if full else VOCABULARIES, penalties=(False, True))
    yield from _of(_prepare, full, page_size=(64, 16, 128), logits=(True, False))
    if not full:
        yield from _of(_decode, full, model=EXTREMES, page_size=(128,), query_length=(8,))
        yield from _of(_shared_prefix, full, model=EXTREMES, page_size=(128,))
    for dtype, models in (torch.float32, EXTREMES), (torch.float16, EXTREMES[:1]):
        options: dict[str, Sequence[Any]] = {"model": MODELS if full else models, "dtype": (dtype,)}
        for call in (_decode, _extend, _shared_prefix, _rotate_and_store, _store_kv, _add_norm, _silu_mul, _sample):
            yield from _of(call, full, **options)


def _of(call: Callable[..., object], full: bool, **options: Sequence[Any]) -> Iterator[Variant]:
    """What is not said in a name is as in most models."""
    for choice in _product(options) if full else pairwise(options):
        said = [name if value is True else str(getattr(value, "name", f"{name} {value}")) for name, value in
                choice.items() if value]  # fmt: skip
        yield Variant(f"{call.__name__[1:]}: {', '.join(said)}", partial(call, **choice), _AGAIN)


def _product(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices in which any two values of two options meet; each value of the first also with all others' firsts."""
    names = list(options)
    choices = [tuple(enumerate(indices)) for indices in product(*(range(len(options[name])) for name in names))]
    chosen = [choice for choice in choices if not any(index for _, index in choice[1:])]
    open_pairs = {pair for choice in choices for pair in combinations(choice, 2)}
    open_pairs.difference_update(*(combinations(choice, 2) for choice in chosen))
    while open_pairs:
        best = max(choices, key=lambda choice: sum(pair in open_pairs for pair in combinations(choice, 2)))
        open_pairs.difference_update(combinations(best, 2))
        chosen.append(best)
    return [{names[place]: options[names[place]][index] for place, index in choice} for choice in chosen]


def _ints(*shape: int, offset: int = 0) -> torch.Tensor:
    """int32, beginning `offset` numbers into a buffer."""
    size = int(torch.Size(shape).numel())
    return torch.empty(offset + size, dtype=torch.int32, device=META)[offset:].view(shape)


def _queries(model: Model, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """The query heads within the QKV product. (A view of a slice would have another stride for a batch of 1.)"""
    heads = model.query_heads + 2 * model.kv_heads
    return torch.empty(rows, heads, model.head_dim, dtype=dtype, device=META)[:, : model.query_heads]


def _answers(model: Model, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, model.query_heads, model.head_dim, dtype=dtype, device=META)


def _cache(model: Model, page_size: int, dtype: torch.dtype, fp8: bool) -> dict[str, Any]:
    """K and V of a layer, with their scales where they have any, as the wrappers name them."""
    shape = (4096 * page_size, model.kv_heads, model.head_dim)
    tensors = {
        name: torch.empty(shape, dtype=torch.uint8 if fp8 else dtype, device=META) for name in ("keys", "values")
    }
    if fp8:
        scales = {name: torch.empty(model.kv_heads, device=META) for name in ("key_scales", "value_scales")}
        tensors |= scales
    return tensors


def _tables(page_size: int) -> torch.Tensor:
    return _ints(TABLE_ROWS, CONTEXT // page_size + 1)


def _scale(model: Model) -> float:
    return float(model.head_dim**-0.5)


def _decode(
    size: int,
    model: Model,
    page_size: int = 64,
    window: int | None = None,
    soft_cap: float | None = None,
    fp8: bool = False,
    query_length: int = 1,
    work: bool = True,
    shared: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Plan, decode and merge; `shared`: after others have answered the tokens before some starts."""
    starts, first_split = (_ints(size), SHARED_SPLITS) if shared else (None, 0)
    q, out = (make(model, size * query_length, dtype) for make in (_queries, _answers))
    context_lengths, split_tokens = _ints(size), _ints(1)
    processors = architecture_of(META).processors
    splits, programs = splits_for(size, model.kv_heads, processors), WAVES * processors
    items = _ints(work_items(size, model.kv_heads, programs)) if work else None
    tile = tile_of(q, model.kv_heads, query_length)
    partials = Partials.allocate(
        rows=size * query_length, query_heads=model.query_heads, splits=first_split + splits, head_dim=model.head_dim,
        device=META,
    )  # fmt: skip
    plan_splits(
        context_lengths, split_tokens, starts=starts, window=window, query_length=query_length,
        kv_heads=model.kv_heads, splits=splits, tile_tokens=tile.tokens, programs=programs, work=items,
    )  # fmt: skip
    paged_decode(
        q, out=out, **_cache(model, page_size, dtype, fp8), tables=_tables(page_size), rows=_ints(size),
        context_lengths=context_lengths, split_tokens=split_tokens, partials=partials, splits=splits,
        first_split=first_split, starts=starts, page_size=page_size, query_length=query_length, scale=_scale(model),
        window=window, soft_cap=soft_cap, work=items,
    )  # fmt: skip
    merge_partials(
        partials, out, context_lengths=context_lengths, split_tokens=split_tokens, splits=splits,
        query_length=query_length, kv_heads=model.kv_heads, window=window, starts=starts,
        shared_split_tokens=_ints(1) if shared else None, first_split=first_split,
    )  # fmt: skip


def _extend(
    size: int,
    model: Model,
    page_size: int = 64,
    window: int | None = None,
    soft_cap: float | None = None,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """In a mixed step, after as many decodes."""
    rows = size * 37
    tokens = tile_tokens(
        architecture_of(META), query_heads=model.query_heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
        dtype=dtype,
    )  # fmt: skip
    paged_extend(
        _queries(model, size + rows, dtype)[size:], out=_answers(model, size + rows, dtype)[size:],
        **_cache(model, page_size, dtype, fp8), tables=_tables(page_size), rows=_ints(size),
        context_lengths=_ints(size), query_starts=_ints(size + 1), tiles=_ints(size * -(-37 // tokens), 2),
        page_size=page_size, scale=_scale(model), window=window, soft_cap=soft_cap,
    )  # fmt: skip


def _shared_prefix(
    size: int,
    model: Model,
    page_size: int = 64,
    window: int | None = None,
    soft_cap: float | None = None,
    fp8: bool = False,
    query_length: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    architecture = architecture_of(META)
    requests = requests_per_tile(
        architecture, model.head_dim, dtype, group=model.query_heads // model.kv_heads, query_length=query_length
    )
    tiles = -(-size // requests)
    prefix_lengths, split_tokens = _ints(tiles), _ints(1)
    plan_shared_splits(
        prefix_lengths, split_tokens, kv_heads=model.kv_heads, splits=SHARED_SPLITS, tile_tokens=64,
        programs=WAVES * architecture.processors,
    )  # fmt: skip
    partials = Partials.allocate(
        rows=size * query_length, query_heads=model.query_heads, device=META, head_dim=model.head_dim,
        splits=SHARED_SPLITS + splits_for(size, model.kv_heads, architecture.processors),
    )  # fmt: skip
    shared_prefix_decode(
        _queries(model, size * query_length, dtype), **_cache(model, page_size, dtype, fp8),
        tables=_tables(page_size), rows=_ints(size), members=_ints(tiles, requests), prefix_lengths=prefix_lengths,
        split_tokens=split_tokens, partials=partials, splits=SHARED_SPLITS, page_size=page_size,
        query_length=query_length, scale=_scale(model), soft_cap=soft_cap,
    )  # fmt: skip


def _rotate_and_store(
    size: int, model: Model, fp8: bool = False, norm: bool = False, dtype: torch.dtype = torch.bfloat16
) -> None:
    weights = torch.empty(2, model.head_dim, dtype=dtype, device=META)
    turns = torch.empty(2, size, model.head_dim // 2, device=META)
    rotate_and_store(
        torch.empty(size, model.qkv_width, dtype=dtype, device=META), **_cache(model, 64, dtype, fp8), cos=turns[0],
        sin=turns[1], slots=_ints(size), query_heads=model.query_heads, kv_heads=model.kv_heads,
        head_dim=model.head_dim, q_norm=weights[0] if norm else None, k_norm=weights[1] if norm else None,
    )  # fmt: skip


def _store_kv(size: int, model: Model, fp8: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    k, v = torch.empty(2, size, model.kv_heads, model.head_dim, dtype=dtype, device=META)
    store_kv(k, v, **_cache(model, 64, dtype, fp8), slots=_ints(size))


def _add_norm(size: int, model: Model, first: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    x, residual, out = torch.empty(3, size, model.width, dtype=dtype, device=META)
    add_norm(None if first else x, residual, torch.empty(model.width, dtype=dtype, device=META), 1e-5, out)


def _silu_mul(size: int, model: Model, dtype: torch.dtype = torch.bfloat16) -> None:
    gate_up = torch.empty(size, 2 * model.inner, dtype=dtype, device=META)
    silu_mul(gate_up, torch.empty(size, model.inner, dtype=dtype, device=META))


def _sample(size: int, model: Model, penalties: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    rows = SamplingRows(_ints(TABLE_ROWS, WORDS))
    rows.write(_ints(size, WORDS, offset=4 * size))
    sample(
        torch.empty(size, model.vocabulary, dtype=dtype, device=META), _ints(size), _ints(TABLE_ROWS),
        rows=_ints(size, offset=size), positions=_ints(size, offset=size), params=rows,
        counts=torch.empty(TABLE_ROWS, model.vocabulary, dtype=torch.int16, device=META) if penalties else None,
        workspace=SamplingWorkspace.allocate(TABLE_ROWS, model.vocabulary, META),
    )  # fmt: skip


def _prepare(size: int, page_size: int, logits: bool) -> None:
    """What was sent in one buffer may begin anywhere in it."""
    tables, tokens = _tables(page_size), size * 37
    update_tables(tables, _ints(size, 3, offset=size))
    prepare_inputs(
        chunks=_ints(size, 4, offset=size), token_source=_ints(tokens, offset=size), tables=tables,
        last_tokens=_ints(TABLE_ROWS), page_size=page_size, token_ids=_ints(tokens), positions=_ints(tokens),
        slots=_ints(tokens), context_lengths=_ints(size), rows=_ints(size), logit_rows=_ints(size) if logits else None,
    )  # fmt: skip
