"""Paged attention against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preble.engine.batch import SequenceSlice
from preble.kernels import paged_attention
from preble.kernels.paged_attention import PagedAttention
from preble.kernels.reference import reference_attention
from preble.kernels.runs import Run, join, slots_of, split_shared, tokens_in

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of what is computed before the result is rounded to its dtype, which costs up to half a unit in the last place."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are not worth a second thread, which would wait for a processor on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Layout:
    """Sequences, and the slots of the memory that they point into."""

    sequences: list[SequenceSlice]
    slots: int

    @property
    def rows(self) -> int:
        return sum(sequence.query_length for sequence in self.sequences)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Batches of decodes and prefill chunks over pages in any order, some starting with pages of another sequence."""
    page = draw(st.sampled_from([1, 3, 16, 64]))
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from([8, 150, 400]))), min_size=1, max_size=6))
    rng = draw(st.randoms(use_true_random=False))
    pages = sum(-(-length // page) for length in lengths) + 2
    free = list(range(pages))
    if draw(st.booleans()):
        rng.shuffle(free)
    tables: list[list[int]] = []
    sequences = []
    rows = 0
    for length in lengths:
        query = draw(st.one_of(st.just(1), st.integers(1, min(length, 100))))
        table: list[int] = []
        if tables and draw(st.booleans()):
            parent = draw(st.sampled_from(tables))
            most = min(len(parent), (length - query) // page)  # pages with tokens of this step are its own
            table = parent[: draw(st.integers(most // 2, most))]
        table = table + [free.pop() for _ in range(-(-length // page) - len(table))]
        tables.append(table)
        last = length - (len(table) - 1) * page
        runs = [(number * page, page) for number in table[:-1]] + [(table[-1] * page, last)]
        sequences.append(SequenceSlice(rows, query, length, tuple(join(runs))))
        rows += query
    return Layout(sequences, pages * page)


def operands(
    layout: Layout, *, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, keys and values. What no sequence has written is NaN, as uninitialised memory may be."""
    generator = torch.Generator().manual_seed(layout.slots)
    q = torch.randn(layout.rows, kv_heads * group, head_dim, generator=generator).to(dtype)
    keys, values = torch.full((2, layout.slots, kv_heads, head_dim), torch.nan, dtype=dtype)
    for kv in (keys, values):
        for sequence in layout.sequences:
            shape = (sequence.context_length, kv_heads, head_dim)
            kv[slots_of(sequence.runs)] = torch.randn(shape, generator=generator).to(dtype)
    return q, keys, values


def check(
    layout: Layout,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    plan = PagedAttention.plan(layout.sequences, group=group, window=window)
    q, keys, values = operands(layout, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    scale = head_dim**-0.5
    for _ in range(2):  # a plan serves every layer
        out = plan(q, keys, values, scale)
        assert out.shape == q.shape
        assert out.dtype == dtype
        expected = reference_attention(q, keys, values, scale, sequences=layout.sequences, window=window)
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=TOLERANCE[dtype])
        q, values = q.flip(0), -values


SHAPES = {
    "kv_heads": st.sampled_from([1, 2, 3]),
    "group": st.sampled_from([1, 4, 7, 8]),
    "head_dim": st.sampled_from([16, 24, 64, 80, 128]),
    "window": st.one_of(st.none(), st.integers(1, 160)),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
}


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), kv_heads=SHAPES["kv_heads"], group=SHAPES["group"], head_dim=SHAPES["head_dim"],
       window=SHAPES["window"], dtype=SHAPES["dtype"])  # fmt: skip
def test_equals_the_definition(
    layout: Layout, kv_heads: int, group: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    check(layout, kv_heads=kv_heads, group=group, head_dim=head_dim, window=window, dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), group=SHAPES["group"], window=SHAPES["window"], dtype=SHAPES["dtype"],
       shared=st.integers(1, 40), long=st.integers(1, 40), tail=st.integers(0, 40), batch=st.integers(1, 80),
       longest=st.integers(0, 50), band=st.integers(1, 50))  # fmt: skip
def test_equals_the_definition_however_it_is_split(
    layout: Layout, group: int, window: int | None, dtype: torch.dtype,
    shared: int, long: int, tail: int, batch: int, longest: int, band: int,
) -> None:  # fmt: skip
    """Thresholds that make a few hundred tokens go through every kind of read, as thousands do with the real ones."""
    thresholds = {
        "SHARED_TOKENS": shared,
        "LONG_RUN": long,
        "SHORT_TAIL": tail,
        "GATHERED_TAILS": batch,
        "LONGEST_READ": long + longest,  # at least one gathered run
        "BAND": band,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in thresholds.items():
            patch.setattr(paged_attention, name, value)
        check(layout, kv_heads=2, group=group, head_dim=16, window=window, dtype=dtype)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_single_token(window: int | None, dtype: torch.dtype) -> None:
    layout = Layout([SequenceSlice(0, 1, 1, ((5, 1),))], 8)
    check(layout, kv_heads=2, group=1, head_dim=64, window=window, dtype=dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 7])
def test_a_window_counts_the_token_itself(window: int) -> None:
    """Keys are zero, so that every token in sight weighs the same, and values are one-hot: the output says which."""
    layout = Layout([SequenceSlice(0, 1, 6, ((0, 6),)), SequenceSlice(1, 6, 6, ((6, 6),))], 12)
    q, keys, values = torch.zeros(7, 1, 6), torch.zeros(12, 1, 6), torch.eye(6).repeat(2, 1)[:, None]
    out = PagedAttention.plan(layout.sequences, group=1, window=window)(q, keys, values, 1.0)
    seen = torch.tensor([[position - window < key <= position for key in range(6)] for position in (5, *range(6))])
    assert torch.equal(out[:, 0] > 0, seen)


def test_large_scores_do_not_overflow() -> None:
    layout = Layout([SequenceSlice(i, 1, 340, ((0, 300), (300 + 40 * i, 40))) for i in range(3)], 420)
    q, keys, values = operands(layout, kv_heads=2, group=2, head_dim=16)
    q *= 1e3
    out = PagedAttention.plan(layout.sequences, group=2, window=None)(q, keys, values, 1.0)
    expected = reference_attention(q, keys, values, 1.0, sequences=layout.sequences)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)


def test_plans_run_in_two_threads() -> None:
    layout = Layout([SequenceSlice(i, 1, 700, ((0, 500), (512 + 200 * i, 200))) for i in range(8)], 2112)
    q, keys, values = operands(layout, kv_heads=2, group=2, head_dim=16)
    expected = reference_attention(q, keys, values, 0.25, sequences=layout.sequences)

    def forward(flipped: bool) -> None:
        for _ in range(20):
            plan = PagedAttention.plan(layout.sequences, group=2, window=None)
            out = plan(q, keys, -values if flipped else values, 0.25).double()
            torch.testing.assert_close(out, -expected if flipped else expected, rtol=0, atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(forward, [False, True]))


class TestSplitShared:
    def test_reads_a_common_prefix_once(self) -> None:
        tables = [[(0, 2000), (2048 + 128 * i, 100)] for i in range(32)]
        (members, runs), *alone = split_shared(tables, 256)
        assert (members, runs) == (list(range(32)), [(0, 2000)])
        assert alone == [([i], [(2048 + 128 * i, 100)]) for i in range(32)]

    def test_shares_at_every_level(self) -> None:
        tables = [[(0, 300), (400, 80)], [(0, 300), (400, 80), (900, 1)], [(0, 310)]]
        assert split_shared(tables, 10) == [
            ([0, 1, 2], [(0, 300)]),
            ([0, 1], [(400, 80)]),
            ([1], [(900, 1)]),
            ([2], [(300, 10)]),
        ]

    def test_does_not_share_what_saves_too_little(self) -> None:
        tables: list[list[Run]] = [[(0, 10), (20, 5)], [(0, 15)]]
        assert split_shared(tables, 11) == [([0], [(0, 10), (20, 5)]), ([1], [(0, 15)])]

    def test_leaves_out_empty_tables(self) -> None:
        assert split_shared([[], [(3, 1)], []], 1) == [([1], [(3, 1)])]

    @given(layouts(), st.integers(1, 100))
    def test_loses_and_repeats_nothing(self, layout: Layout, minimum: int) -> None:
        read: list[list[Run]] = [[] for _ in layout.sequences]
        for members, runs in split_shared([sequence.runs for sequence in layout.sequences], minimum):
            assert len(members) == 1 or (len(members) - 1) * tokens_in(runs) >= minimum
            for member in members:
                read[member].extend(runs)
        for sequence, runs in zip(layout.sequences, read, strict=True):
            assert sorted(slots_of(runs)) == sorted(slots_of(sequence.runs))
