"""Paged attention against its definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.engine.batch import SequenceSlice
from preble.kernels.paged_attention import PagedAttention
from preble.kernels.reference import reference_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Layout:
    """Sequences and how many slots they point into."""

    sequences: list[SequenceSlice]
    slots: int
    rows: int


def merge(slots: list[int]) -> tuple[tuple[int, int], ...]:
    """Slots in token order as (first slot, length) of contiguous runs."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([slot, 1])
    return tuple((start, length) for start, length in runs)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Batches of decodes and prefill chunks over pages in any order, some starting with pages of another sequence."""
    page = draw(st.sampled_from([1, 3, 16, 64]))
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    rng = draw(st.randoms(use_true_random=False))
    free = list(range(sum(-(-length // page) for length in lengths) + 2))
    if draw(st.booleans()):
        rng.shuffle(free)
    tables: list[list[int]] = []
    sequences = []
    rows = 0
    for length in lengths:
        query = draw(st.one_of(st.just(1), st.integers(1, length)))
        needed = -(-length // page)
        table: list[int] = []
        if tables and draw(st.booleans()):
            parent = draw(st.sampled_from(tables))
            full_cached_pages = min(len(parent), (length - query) // page)
            table = parent[: draw(st.integers(0, full_cached_pages))]
        table = table + [free.pop() for _ in range(needed - len(table))]
        tables.append(table)
        slots = [number * page + offset for number in table for offset in range(page)][:length]
        sequences.append(SequenceSlice(rows, query, length, merge(slots)))
        rows += query
    pages = sum(-(-length // page) for length in lengths) + 2
    return Layout(sequences, pages * page, rows)


def check(
    layout: Layout,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(layout.rows)
    q = torch.randn(layout.rows, kv_heads * group, head_dim, generator=generator).to(dtype)
    keys, values = torch.full((2, layout.slots, kv_heads, head_dim), torch.nan, dtype=dtype)  # memory as it may be
    written = [
        slot
        for sequence in layout.sequences
        for first, length in sequence.runs
        for slot in range(first, first + length)
    ]
    for kv in (keys, values):
        kv[written] = torch.randn(len(written), kv_heads, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5
    attention = PagedAttention.plan(layout.sequences, group=group, window=window)
    expected = reference_attention(q, keys, values, scale, sequences=layout.sequences, window=window)
    for _ in range(2):  # a plan serves every layer
        out = attention(q, keys, values, scale)
        assert out.shape == q.shape
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=100, deadline=None)
@given(
    layout=layouts(),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 4, 7, 8]),
    head_dim=st.sampled_from([16, 24, 64, 80, 128]),
    window=st.one_of(st.none(), st.integers(1, 160)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_definition(
    layout: Layout, kv_heads: int, group: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    check(layout, kv_heads=kv_heads, group=group, head_dim=head_dim, window=window, dtype=dtype)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_single_token(window: int | None) -> None:
    check(Layout([SequenceSlice(0, 1, 1, ((5, 1),))], 8, 1), kv_heads=2, group=4, head_dim=64, window=window)
