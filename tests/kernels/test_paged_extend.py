"""Paged extend and its tiles against attention by definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from closeness import TOLERANCE, relative_error
from device import DEVICE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from made_kv import MadeKV, make_kv

from preble.kernels.architecture import SM_80, SM_90, Architecture, architecture_of, assume
from preble.kernels.fp8 import decoded
from preble.kernels.paged_extend import extend_tiles, paged_extend, paged_extend_reference, tile_tokens

ROWS_BEFORE = 3
"""Rows of the batch that belong to no chunk, as decodes in a mixed step do not."""


@dataclass(frozen=True)
class Case:
    """A batch of chunks, and how they attend."""

    chunks: list[tuple[int, int]]
    """(new tokens, context with them)."""
    page_size: int = 16
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    window: int | None = None
    soft_cap: float | None = None
    q_factor: float = 1.0
    seed: int = 0
    architecture: Architecture = SM_90
    """Whose tiles and conversions are taken, where there is no GPU."""

    @property
    def new(self) -> list[int]:
        return [new for new, _ in self.chunks]

    @property
    def contexts(self) -> list[int]:
        return [context for _, context in self.chunks]

    @property
    def starts(self) -> list[int]:
        return np.cumsum([ROWS_BEFORE, *self.new]).tolist()

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def kv(self) -> MadeKV:
        dtype = torch.uint8 if self.fp8 else self.dtype
        return make_kv(
            self.contexts, page_size=self.page_size, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=dtype,
            seed=self.seed,
        )  # fmt: skip

    def q(self) -> torch.Tensor:
        """A view into a wider matrix, as into the product of the QKV projection; NaN where no chunk has rows."""
        generator = torch.Generator().manual_seed(self.seed)
        width = self.kv_heads * self.group * self.head_dim
        qkv = torch.randn(self.starts[-1] + 1, width + 64, generator=generator).mul_(2 * self.q_factor)
        qkv[:ROWS_BEFORE] = qkv[-1:] = torch.nan
        return qkv.to(DEVICE, self.dtype)[:, :width].view(len(qkv), -1, self.head_dim)


def run(case: Case, kv: MadeKV, q: torch.Tensor, *, reference: bool = False) -> torch.Tensor:
    """What the kernel writes over NaN."""
    out = torch.full(q.shape, float("nan"), dtype=case.dtype, device=DEVICE)
    with assume(case.architecture):
        tokens = tile_tokens(
            architecture_of(DEVICE), query_heads=q.shape[1], kv_heads=case.kv_heads, head_dim=case.head_dim,
            dtype=case.dtype,
        )  # fmt: skip
        tiles = torch.from_numpy(extend_tiles(case.new, case.contexts, tokens)).to(DEVICE)
        (paged_extend_reference if reference else paged_extend)(
            q, kv.keys, kv.values, out, tables=kv.tables, rows=kv.rows, context_lengths=kv.context_lengths,
            query_starts=torch.tensor(case.starts, dtype=torch.int32, device=DEVICE), tiles=tiles,
            page_size=case.page_size, scale=case.scale, window=case.window, soft_cap=case.soft_cap,
            key_scales=kv.key_scales, value_scales=kv.value_scales,
        )  # fmt: skip
    return out


def expected(case: Case, kv: MadeKV, q: torch.Tensor) -> torch.Tensor:
    """In fp64; NaN where nothing is to be written."""
    out = torch.full(q.shape, float("nan"), dtype=torch.float64, device=DEVICE)
    for slots, (new, context), start in zip(kv.slots, case.chunks, case.starts, strict=False):
        keys, values = kv.keys[slots], kv.values[slots]
        if case.fp8:
            assert kv.key_scales is not None
            assert kv.value_scales is not None
            keys, values = decoded(keys) * kv.key_scales[:, None], decoded(values) * kv.value_scales[:, None]
        keys, values = (tensor.double().repeat_interleave(case.group, 1) for tensor in (keys, values))
        scores = torch.einsum("qhd,thd->qht", q[start : start + new].double(), keys) * case.scale
        if case.soft_cap is not None:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        age = torch.arange(context - new, context)[:, None] - torch.arange(context)
        hidden = age < 0 if case.window is None else (age < 0) | (age >= case.window)
        weights = scores.masked_fill(hidden[:, None].to(DEVICE), float("-inf")).softmax(-1)
        out[start : start + new] = torch.einsum("qht,thd->qhd", weights, values)
    return out


def check(case: Case) -> None:
    kv, q = case.kv(), case.q()
    exact = expected(case, kv, q)
    for reference in (True, False):
        check_rows(case, run(case, kv, q, reference=reference), exact)


def check_rows(case: Case, out: torch.Tensor, exact: torch.Tensor) -> None:
    """Each row alone: a token more or less in sight hardly changes the norm of all."""
    assert torch.equal(out.isnan(), exact.isnan())
    errors = [relative_error(row, right) for row, right in zip(out[ROWS_BEFORE:-1], exact[ROWS_BEFORE:-1], strict=True)]
    assert max(errors, default=0.0) < TOLERANCE[case.dtype]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    near = st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
    context = st.one_of(near, st.integers(1, 330))
    chunks = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(context)
        new = draw(st.one_of(st.sampled_from([0, 1]), st.integers(1, 40)))
        chunks.append((min(new, length), length))
    return Case(
        chunks,
        page_size=draw(st.sampled_from([16, 64, 128])),
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 4, 7, 8])),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        fp8=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 300))),
        soft_cap=draw(st.sampled_from([None, None, 5.0])),
        seed=draw(st.integers(0, 9)),
        architecture=draw(st.sampled_from([SM_90, SM_80])),
    )


@settings(max_examples=35, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(cases())
def test_equals_the_definition(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("new", [1, 2, 33])
@pytest.mark.parametrize("context", [127, 128, 129, 160, 257])
def test_a_chunk_that_ends_about_the_end_of_a_tile(new: int, context: int) -> None:
    check(Case([(new, context)], kv_heads=1, group=4, dtype=torch.float16, head_dim=128, page_size=64))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 127, 128, 129, 161, 290])
def test_a_window_that_begins_about_the_edge_of_a_tile(window: int) -> None:
    check(Case([(34, 290)], kv_heads=1, window=window, dtype=torch.float16, head_dim=128, page_size=64))


def test_a_window_skips_what_nobody_sees() -> None:
    """Without that, it would be read: NaN."""
    case = Case([(20, 400)], kv_heads=1, window=10, dtype=torch.float16)
    kv, q = case.kv(), case.q()
    exact = expected(case, kv, q)
    unseen = kv.slots[0][:320]  # up to a tile's edge below 400 - 20 - 9
    kv.keys[unseen] = kv.values[unseen] = torch.nan
    check_rows(case, run(case, kv, q), exact)


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"soft_cap": 20.0}, {"fp8": True}], ids=str)
def test_many_tiles_of_a_long_chunk(options: dict[str, Any]) -> None:
    check(Case([(150, 150), (70, 333)], kv_heads=1, group=7, dtype=torch.float16, **options))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # numpy's; the kernel divides by this infinity
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_large_scores_do_not_overflow(soft_cap: float | None) -> None:
    """Scores of thousands, and tanh of hundreds: e ** 2x is infinite."""
    check(Case([(40, 200)], kv_heads=1, q_factor=500.0, soft_cap=soft_cap))


def test_padding_becomes_zeros_and_reads_nothing() -> None:
    case = Case([(5, 20), (3, 0), (0, 0)], kv_heads=1, dtype=torch.float16)
    kv, q = case.kv(), case.q()
    kv.tables[kv.rows[1:].long()] = 2**30  # reading there would fault
    kv.tables[:, 2:] = 2**30
    for reference in (False, True):
        out = run(case, kv, q, reference=reference)
        assert (out[ROWS_BEFORE + 5 : ROWS_BEFORE + 8] == 0).all()
        assert out[[0, 1, 2, -1]].isnan().all()
        assert out[ROWS_BEFORE : ROWS_BEFORE + 5].isfinite().all()


def test_without_new_tokens_nothing_is_written() -> None:
    case = Case([(0, 30), (0, 0)])
    assert run(case, case.kv(), case.q()).isnan().all()


def test_slots_beyond_32_bits() -> None:
    """Only the addresses matter: 2 ** 31 elements begin where a page of the highest number would lie."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a GPU with 8 GiB")
    case = Case([(20, 200)], page_size=128, kv_heads=8, head_dim=128, dtype=torch.float16)
    kv, q = case.kv(), case.q()
    exact = expected(case, kv, q)
    far = 2**31 // (8 * 128) // 128 + 1
    for name in ("keys", "values"):
        small = getattr(kv, name)
        large = torch.empty(far * 128 + len(small), 8, 128, dtype=small.dtype, device=DEVICE)
        large[far * 128 :] = small
        object.__setattr__(kv, name, large)
    kv.tables += far
    check_rows(case, run(case, kv, q), exact)


@given(
    chunks=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 500)), max_size=8),
    tokens=st.sampled_from([1, 4, 18, 32]),
)
def test_tiles_hold_every_new_token_once_and_the_longest_first(chunks: list[tuple[int, int]], tokens: int) -> None:
    new = [length for length, _ in chunks]
    tiles = extend_tiles(new, [length + cached for length, cached in chunks], tokens)
    assert tiles.dtype == np.int32
    assert tiles.shape == (len(tiles), 2)
    held = [(b, first + i) for b, first in tiles.tolist() for i in range(min(tokens, new[b] - first))]
    assert sorted(held) == [(b, row) for b, length in enumerate(new) for row in range(length)]
    work = [chunks[b][1] + min(first + tokens, new[b]) for b, first in tiles.tolist()]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("architecture", [SM_80, SM_90], ids=lambda architecture: architecture.name)
@pytest.mark.parametrize(("group", "least"), [(1, 32), (4, 8), (7, 4), (8, 4), (32, 1)])
def test_a_tile_has_room_for_a_token(architecture: Architecture, group: int, least: int) -> None:
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {"kv_heads": 2, "query_heads": 2 * group, "head_dim": head_dim, "dtype": dtype}
            assert tile_tokens(architecture, **sizes) >= least
